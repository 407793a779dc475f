"""Parts of a search for pairs, kept in a folder while it goes on: killed, the same search goes on from them."""

from __future__ import annotations

import hashlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import filelock
import numpy as np
import orjson

from embell.engine.pair_list import LOOKED_FOR
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]

SAVED_SECONDS = 20.0

Progress = Callable[[str, float], None]
"""Told the stage and the share of it that is done."""


@dataclass(frozen=True)
class Part:
    """Pairs of positions, the positions that were capped, the share of the stage that is done, and where the next part begins."""

    later: Array
    earlier: Array
    scores: Array
    capped: Array
    share: float
    next: tuple[int, int] = (0, 0)


def forget(folder: Path) -> None:
    """Remove what an unfinished search left in a folder, unless another process is at it."""
    if not folder.is_dir():
        return
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def _readable(path: Path) -> bool:
    """Whether a part is whole: a full disk or a loss of power may have cut it."""
    try:
        with np.load(path) as there:
            return (
                all(len(there[name]) >= 0 for name in ("later", "earlier", "scores", "capped", "next"))
                and there["last"] is not None
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return False


class Unfinished:
    """Parts of a search that are found, in a folder if there is one: the same search goes on from them."""

    def __init__(
        self,
        folder: Path | None,
        marks: Sequence[bytes],
        index: ExactIndex | None,
        floors: Mapping[str, float],
        groups: Array | None,
        split: int | None,
        begin: int,
        about: str,
    ) -> None:
        self._folder = folder
        self._lock: filelock.BaseFileLock | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:  # another process searches: parts of the two must not be mixed
            self._folder = None
            return
        of = hashlib.blake2b(b"".join(marks), digest_size=16)
        if index is not None:
            for at in range(0, len(index), 2**16):
                of.update(index.stored(np.arange(at, min(at + 2**16, len(index)))).tobytes())
        of.update(orjson.dumps([sorted(floors.items()), split, begin, about]))
        if groups is not None:
            of.update(groups.astype(np.int64).tobytes())
        name = folder / "of"
        if not name.is_file() or name.read_text() != of.hexdigest():
            for path in folder.iterdir():
                if path.name != "lock":
                    path.unlink()
            name.write_text(of.hexdigest())
        for kind in LOOKED_FOR:
            unread = False
            for path in self._files(kind):
                unread = unread or not _readable(path)
                if unread:  # and what was found after it
                    path.unlink()

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            self._lock.release()

    def _files(self, kind: str) -> list[Path]:
        return sorted(self._folder.glob(f"{kind}-*.npz")) if self._folder is not None else []

    def done(self, kind: str) -> tuple[int, int]:
        """Where the stage goes on."""
        files = self._files(kind)
        if not files:
            return 0, 0
        task, place = np.load(files[-1])["next"].tolist()
        return task, place

    def through(self, kind: str, find: Callable[[], Iterator[Part]], progress: Progress | None) -> Iterator[Part]:
        """The parts that are there, then those that are found; these are kept every 20 seconds."""
        files = self._files(kind)
        for file in files:
            with np.load(file) as there:
                yield Part(there["later"], there["earlier"], there["scores"], there["capped"], 1.0)
                last = bool(there["last"])
            if last:
                return
        held: list[Part] = []
        saved = time.monotonic()
        for part in find():
            held.append(part)
            if progress is not None:
                progress(kind, part.share)
            if self._folder is not None and kind == "semantic" and time.monotonic() - saved > SAVED_SECONDS:
                yield self._keep(kind, len(files), held, False)
                files.append(Path())
                held, saved = [], time.monotonic()
        yield self._keep(kind, len(files), held, True)
        if progress is not None:
            progress(kind, 1.0)

    def _keep(self, kind: str, number: int, parts: Sequence[Part], last: bool) -> Part:
        """These parts as one, written down."""
        empty = Part(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), 1.0)
        parts = [empty, *parts]
        later, earlier, scores, capped = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("later", "earlier", "scores", "capped")
        )
        whole = Part(later, earlier, scores, capped, parts[-1].share, parts[-1].next)
        if self._folder is not None:
            written = self._folder / "part"
            with written.open("wb") as file:
                np.savez(
                    file, later=whole.later, earlier=whole.earlier, scores=whole.scores, capped=whole.capped,
                    next=np.array(whole.next), last=np.array(last),
                )  # fmt: skip
            written.rename(self._folder / f"{kind}-{number:06}.npz")
        return whole
