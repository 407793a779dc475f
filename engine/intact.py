"""Whether the files of an index generation are still what was written.

The manifest knows their sizes, times and checksums. A file whose time is another one, since it was copied or written to, is read and summed; if
its sum is right, it gets its time back. A disk that loses bits without a trace is not noticed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np


def noted_files(directory: Path) -> dict[str, list[int]]:
    """What the files in a directory are, by name: bytes, time of the last change in nanoseconds, checksum."""
    found = {}
    for path in sorted(directory.iterdir()):
        at = path.stat()
        found[path.name] = [at.st_size, at.st_mtime_ns, _sum(path)]
    return found


def check_files(directory: Path, names: Sequence[str], noted: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError if one of these files, of those that were noted, is not what was written, OSError if it is gone or cannot be read."""
    for name in names:
        if name not in noted:
            continue
        path, (size, time, total) = directory / name, noted[name]
        at = path.stat()
        if at.st_size != size:
            raise ValueError(f"{path}: {at.st_size} bytes instead of {size}")
        if at.st_mtime_ns != time:
            if _sum(path) != total:
                raise ValueError(f"{path}: not what was written")
            with suppress(OSError):  # where one may only read, the next will sum it again
                os.utime(path, ns=(at.st_atime_ns, time))


def _sum(path: Path) -> int:
    """A checksum of what a file holds: the CRC of the sums of its words, a megabyte each. CRC alone takes ten times as long."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            words = np.frombuffer(block + bytes(-len(block) % 8), np.uint64)
            found = zlib.crc32(words.sum(dtype=np.uint64).tobytes(), found)
    return found
