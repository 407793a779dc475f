"""Files that commands write: complete under their name, or not there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from embell.errors import UsageError


def check_outputs(**paths: str | None) -> None:
    """Raises UsageError, before any work is done, for a file that cannot be written or is named twice."""
    seen: dict[str, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        target = "-" if path == "-" else os.path.realpath(path)
        if target in seen:
            raise UsageError(f"--{option} and --{seen[target]} both write to {path}; name two files")
        seen[target] = option
        if path == "-":
            continue
        if Path(target).is_dir():
            raise UsageError(f"--{option} {path}: is a directory; name a file")
        if not Path(target).parent.is_dir():
            raise UsageError(f"--{option} {path}: there is no directory {Path(path).parent}; make it first")
        if not os.access(target if os.path.exists(target) else Path(target).parent, os.W_OK):
            raise UsageError(f"--{option} {path}: may not be written")


@contextmanager
def whole_file(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that appears under its name only when it is complete; links are followed.

    `-` is stdout, and what is no regular file (a device, a pipe) is written to directly.
    """
    if path == "-":
        sys.stdout.flush()
        yield sys.stdout.buffer if "b" in mode else sys.stdout
        sys.stdout.flush()
        return
    target = Path(os.path.realpath(path))
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if target.exists() and not target.is_file():
        with target.open(mode, **text) as file:
            yield file
        return
    part = target.with_name(f"{target.name}.part")
    try:
        with part.open(mode, **text) as file:
            yield file
        sync(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the file has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
