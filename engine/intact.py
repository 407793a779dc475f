"""Whether the files of an index generation are still what was written.

The manifest knows their sizes, times and checksums. A file whose time is another one, since it was copied or written to, is read and summed; if
its sum is right, its new time is noted beside it. A disk that loses bits without a trace is not noticed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson

_TIMES = "times.json"
_right: dict[Path, tuple[int, int]] = {}
"""Files that this process found to be right, by inode and time."""


def noted_files(directory: Path) -> dict[str, list[int]]:
    """What the files in a directory are, by name: bytes, time of the last change in nanoseconds, checksum."""
    found = {}
    for path in sorted(directory.iterdir()):
        at = path.stat()
        found[path.name] = [at.st_size, at.st_mtime_ns, _sum(path)]
    return found


def check_files(directory: Path, names: Sequence[str], noted: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError if one of these files, of those that were noted, is not what was written, OSError if it is gone or cannot be read."""
    later: dict[str, int] | None = None
    for name in names:
        if name not in noted:
            continue
        path, (size, time, total) = directory / name, noted[name]
        at = path.stat()
        if at.st_size != size:
            raise ValueError(f"{path}: {at.st_size} bytes instead of {size}")
        if at.st_mtime_ns == time or _right.get(path) == (at.st_ino, at.st_mtime_ns):
            continue
        later = _times(directory) if later is None else later
        if later.get(name) != at.st_mtime_ns:
            if _sum(path) != total:
                raise ValueError(f"{path}: not what was written")
            later[name] = at.st_mtime_ns
            with suppress(OSError):  # where one may only read, this process at least knows
                part = directory / f"{_TIMES}.{os.getpid()}"
                part.write_bytes(orjson.dumps(later))
                part.replace(directory / _TIMES)
        _right[path] = at.st_ino, at.st_mtime_ns


def _times(directory: Path) -> dict[str, int]:
    """Times of files that were found to be right."""
    try:
        found: Any = orjson.loads((directory / _TIMES).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sum(path: Path) -> int:
    """A checksum of what a file holds: the CRC of sums of its words, along the rows and columns of a megabyte. CRC alone takes several times as long."""
    found = 0
    block = bytearray(2**20)
    words = np.frombuffer(block, np.uint64).reshape(128, 1024)
    with path.open("rb") as file:
        while count := file.readinto(block):
            block[count:] = bytes(len(block) - count)
            for axis in (0, 1):
                found = zlib.crc32(words.sum(axis=axis, dtype=np.uint64).tobytes(), found)
    return found
