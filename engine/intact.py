"""Whether the files of an index generation are still what was written.

Their sizes, times and checksums stand beside them. A file whose time is another one, since it was copied or written to, is read and summed; if
its sum is right, it gets its time back. A disk that loses bits without a trace is not noticed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import orjson

FILE = "files.json"


def note_files(directory: Path) -> None:
    """Write down what the files in a directory are."""
    found = {}
    for path in sorted(directory.iterdir()):
        at = path.stat()
        found[path.name] = {"bytes": at.st_size, "time": at.st_mtime_ns, "sum": _sum(path)}
    (directory / FILE).write_bytes(orjson.dumps(found))


def check_files(directory: Path, names: Sequence[str]) -> None:
    """Raises ValueError if one of these files, of those that were noted, is not what was written, OSError if it is gone or cannot be read.

    Nothing is known of generations that were written before files were noted.
    """
    listed = directory / FILE
    noted = orjson.loads(listed.read_bytes()) if listed.is_file() else {}
    for name in names:
        if name not in noted:
            continue
        path, known = directory / name, noted[name]
        at = path.stat()
        if at.st_size != known["bytes"]:
            raise ValueError(f"{path}: {at.st_size} bytes instead of {known['bytes']}")
        if at.st_mtime_ns != known["time"]:
            if _sum(path) != known["sum"]:
                raise ValueError(f"{path}: not what was written")
            with suppress(OSError):  # where one may only read, the next will sum it again
                os.utime(path, ns=(at.st_atime_ns, known["time"]))


def _sum(path: Path) -> int:
    """A checksum of what a file holds: the CRC of the sums of its words, a megabyte each. CRC alone takes ten times as long."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            words = np.frombuffer(block + bytes(-len(block) % 8), np.uint64)
            found = zlib.crc32(words.sum(dtype=np.uint64).tobytes(), found)
    return found
