"""The search for pairs of duplicates: texts that are the same, that share shingles, and whose vectors are near.

Texts that agree after normalisation are one text to the other stages: the first of them stands for all. Stages may be cut short at any point;
with a folder, the next call goes on from what is in it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import filelock
import numpy as np
import orjson

from embell.engine.lexical import LexicalSets, Pairs, Shingles, contained_pairs, lexical_pairs
from embell.engine.rules import decide
from embell.errors import UsageError
from embell.indexers.exact import QUERIES, ExactIndex

Array = np.ndarray[Any, Any]

KINDS = ("exact", "lexical", "contained", "semantic", "reviewed")
"""Kinds of duplicates, in the order in which they are looked for; the last is not looked for: people have said so."""
LOOKED_FOR = KINDS[:-1]
OVERLAP = "overlap"
"""Beside the kinds: the containment that a semantic pair must have too, where that is asked for."""
THRESHOLDS = {"lexical": 0.9, "contained": 0.9, "semantic": 0.8, OVERLAP: 0.7}
PARTNERS = 1000
"""Earlier partners of one row that are listed as pairs; with more, only its links to the first few of them are."""
SHINGLES = Shingles()
_SAVED_SECONDS = 20.0

Progress = Callable[[str, float], None]
"""Told the stage and the share of it that is done."""


PAIR = np.dtype([("first", np.int64), ("second", np.int64), ("score", np.float64), ("overlap", np.float64), ("kind", np.int8)])
"""A pair: positions `first` < `second`, the score, the containment that a semantic pair was asked for (else NaN), a place in `KINDS`."""


@dataclass(frozen=True)
class PairList:
    """What was found among `rows` rows: `pairs` of the type `PAIR`, by the second and then the first position.

    `original` `(rows,)` names for each row the first one with its text. Pairs are of such first rows only. `floors` are the thresholds
    by kind below which nothing was looked for. `capped` are rows of which not all partners are listed: what is listed suffices for the policy
    `keep`, with the order `rank` `(rows,)` (None: as they stand). Of two corpora, the first `split` rows
    are those compared against.
    """

    rows: int
    original: Array
    pairs: Array
    floors: dict[str, float]
    capped: Array
    split: int | None = None
    keep: str = "first"
    rank: Array | None = None

    def at(self, thresholds: Mapping[str, float]) -> Array:
        """The pairs that reach these thresholds, of the kinds that are named."""
        kept = np.zeros(len(self.pairs), bool)
        for kind, threshold in thresholds.items():
            if kind in KINDS:
                kept |= (self.pairs["kind"] == KINDS.index(kind)) & (self.pairs["score"] >= _reach(threshold))
        if OVERLAP in thresholds:
            kept &= (self.pairs["kind"] != KINDS.index("semantic")) | (self.pairs["overlap"] >= thresholds[OVERLAP])
        return self.pairs[kept]

    def lacks(self, thresholds: Mapping[str, float], keep: str) -> str:
        """Why these thresholds and this keep policy cannot be decided on from this list; "" if they can."""
        for kind, threshold in thresholds.items():
            if kind == "reviewed":
                continue
            if kind not in self.floors:
                return f"{kind} duplicates were not looked for"
            if threshold < self.floors[kind]:
                return f"the {kind} threshold {threshold:g} is below {self.floors[kind]:g}, the floor of the list of pairs"
        if "semantic" in thresholds and OVERLAP in self.floors and OVERLAP not in thresholds:
            return "semantic duplicates were looked for only where words overlap too"
        if len(self.capped) and (keep != self.keep or {**thresholds, "reviewed": 1.0} != {**self.floors, "reviewed": 1.0}):
            return f"of {len(self.capped):,} rows with more than {PARTNERS:,} partners not all pairs are listed"
        return ""

    def renumbered(self, order: Array, keep: str) -> PairList:
        """The list of the rows whose position was `order[p]` before they were put in the order of a keep policy."""
        rank = np.empty(self.rows, np.int64)
        rank[order] = np.arange(self.rows)
        original = np.empty(self.rows, np.int64)
        original[order] = order[self.original]
        pairs = self.pairs.copy()
        one, other = order[pairs["first"]], order[pairs["second"]]
        pairs["first"], pairs["second"] = np.minimum(one, other), np.maximum(one, other)
        return replace(self, original=original, pairs=_sorted(pairs), capped=np.sort(order[self.capped]), keep=keep, rank=rank)


def _sorted(pairs: Array) -> Array:
    found: Array = pairs[np.lexsort((pairs["kind"], pairs["first"], pairs["second"]))]
    return found


def check_thresholds(thresholds: Mapping[str, float]) -> dict[str, float]:
    """Raises UsageError for a kind that does not exist, or a threshold that is not above 0 and at most 1."""
    for kind, threshold in thresholds.items():
        if kind not in KINDS and kind != OVERLAP:
            raise UsageError(f"kind {kind!r} is not known; there are {', '.join(LOOKED_FOR)}")
        if not 0.0 < threshold <= 1.0:
            raise UsageError(f"the {kind} threshold must lie above 0 and be at most 1, not {threshold}")
    return dict(thresholds)


def _reach(threshold: float) -> float:
    """Rounding leaves the cosine of equal vectors up to 1.2e-7 below 1."""
    return min(threshold, 1 - 2**-22)


def find_pairs(
    marks: Sequence[bytes],
    index: ExactIndex | None,
    texts: Callable[[], Iterable[str]],
    floors: Mapping[str, float],
    *,
    groups: Array | None = None,
    split: int | None = None,
    known: PairList | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> PairList:
    """All pairs at or above the floors of the kinds that are named there; "exact" is always looked for.

    `marks` (from `text_mark`), the positions of `index` and what `texts` gives line up, the preferred rows first. `index` is not needed without
    "semantic", `texts` is not called without "lexical" and "contained". Pairs are looked for within rows of the same value of `groups` `(n,)`.
    With `split`, only between the first `split` rows and the others. `known` is the list of the first `known.rows` of these rows,
    found with the same floors: only what is new is looked for. With `folder`, what is finished is kept there until all is.

    A row with more than 1 000 earlier partners is capped: its pairs with the first few are listed, and of the
    semantic ones that with a kept row where there is one.
    """
    floors = check_thresholds(floors)
    begin = 0 if known is None else known.rows
    if known is not None and known.floors != floors:
        raise ValueError("the known pairs have other floors")
    with closing(_Unfinished(folder, marks, index, floors, groups, split, begin)) as work:
        return _search(work, marks, index, texts, floors, groups, split, known, begin, progress)


def _search(
    work: _Unfinished,
    marks: Sequence[bytes],
    index: ExactIndex | None,
    texts: Callable[[], Iterable[str]],
    floors: dict[str, float],
    groups: Array | None,
    split: int | None,
    known: PairList | None,
    begin: int,
    progress: Progress | None,
) -> PairList:
    original = _originals(marks, groups)
    unique = np.flatnonzero(original == np.arange(len(marks)))
    sets = cache(lambda: _sets(texts, unique, groups))
    finders: dict[str, Callable[[], Iterator[_Part]]] = {
        "lexical": lambda: _by_shingles(lexical_pairs, sets(), floors["lexical"], unique, split, begin),
        "contained": lambda: _by_shingles(contained_pairs, sets(), floors["contained"], unique, split, begin),
        "semantic": lambda: _by_vectors(index, unique, _reach(floors["semantic"]), groups, split, begin, work.done("semantic")),
    }
    found = [np.empty(0, PAIR) if known is None else known.pairs]
    capped = [np.empty(0, np.int64) if known is None else known.capped]

    def paired(kind: str, later: Array, earlier: Array, scores: Array) -> Array:
        pairs = np.empty(len(later), PAIR)
        pairs["first"], pairs["second"], pairs["score"] = earlier, later, scores
        pairs["overlap"], pairs["kind"] = np.nan, KINDS.index(kind)
        if kind != "semantic" or OVERLAP not in floors:
            return pairs
        pairs["overlap"] = sets().containment(np.searchsorted(unique, later), np.searchsorted(unique, earlier))
        enough: Array = pairs[pairs["overlap"] >= floors[OVERLAP]]
        return enough

    for kind in [kind for kind in KINDS if kind in floors and kind in finders]:
        for part in work.through(kind, finders[kind], progress):
            found.append(paired(kind, part.later, part.earlier, part.scores))
            capped.append(part.capped)
    pairs = PairList(len(marks), original, np.concatenate(found), floors, np.unique(np.concatenate(capped)), split)
    if "semantic" in floors and len(pairs.capped) and index is not None:
        # Capped rows that nothing listed drops are compared with all kept rows before them, until that changes nothing.
        rank = np.arange(pairs.rows)
        while True:
            listed = pairs.pairs
            kept = decide("cover", rank, listed["first"], listed["second"], listed["score"]).kept_by == rank
            doubtful = pairs.capped[kept[pairs.capped] & (pairs.capped >= begin)]
            allowed = kept & (original == rank)
            allowed[len(rank) if split is None else split :] = False
            found = [listed]
            for group in [None] if groups is None else np.unique(groups[doubtful]).tolist():
                some = doubtful if groups is None else doubtful[groups[doubtful] == group]
                among = allowed if groups is None else allowed & (groups == group)
                # Of those that are near, the few that come first may not share words.
                most = None if OVERLAP in floors else PARTNERS
                for asked, near, scores, _ in index.partners(
                    index.vectors(some), _reach(floors["semantic"]), allowed=among, most=most
                ):
                    before = near < some[asked]
                    found.append(paired("semantic", some[asked[before]], near[before], scores[before]))
            every = _sorted(np.concatenate(found))
            twice = np.zeros(len(every), bool)
            twice[1:] = (np.diff(every["second"]) == 0) & (np.diff(every["first"]) == 0) & (np.diff(every["kind"]) == 0)
            pairs = replace(pairs, pairs=every[~twice])
            if len(pairs.pairs) == len(listed):
                break
    return replace(pairs, pairs=_sorted(pairs.pairs))


@dataclass(frozen=True)
class _Part:
    """Pairs of positions, the positions that were capped, the share of the stage that is done, and where the next part begins."""

    later: Array
    earlier: Array
    scores: Array
    capped: Array
    share: float
    next: tuple[int, int] = (0, 0)


def _originals(marks: Sequence[bytes], groups: Array | None) -> Array:
    """For each row the first with its mark, of its group."""
    seen: dict[Any, int] = {}
    keys: Iterable[Any] = marks if groups is None else zip(marks, groups.tolist(), strict=True)
    return np.fromiter((seen.setdefault(key, at) for at, key in enumerate(keys)), np.int64, len(marks))


def _sets(texts: Callable[[], Iterable[str]], unique: Array, groups: Array | None) -> LexicalSets:
    """Shingles of the first rows of each text; those of different groups have none in common."""
    chosen = np.zeros(int(unique[-1]) + 1 if len(unique) else 0, bool)
    chosen[unique] = True
    sets = LexicalSets.of((text for text, there in zip(texts(), chosen, strict=False) if there), SHINGLES)
    if groups is None:
        return sets
    salt = np.random.default_rng(0).integers(0, 2**62, int(groups.max(initial=0)) + 1)[groups[unique]]
    salted = sets.hashes ^ np.repeat(salt, sets.sizes)
    rows = np.repeat(np.arange(len(sets)), sets.sizes)
    return LexicalSets(sets.starts, salted[np.lexsort((salted, rows))])


def _by_shingles(
    find: Callable[..., Iterator[Pairs]], sets: LexicalSets, threshold: float, unique: Array, split: int | None, begin: int
) -> Iterator[_Part]:
    between = None if split is None else int(np.searchsorted(unique, split))
    for found in find(sets, threshold, first_of_second=between, most=PARTNERS):
        later, earlier, capped = unique[found.later], unique[found.earlier], unique[found.capped]
        new = later >= begin
        share = float(found.later[-1]) / len(sets) if len(found.later) else 0.0
        yield _Part(later[new], earlier[new], found.scores[new], capped[capped >= begin], share)


def _by_vectors(
    index: ExactIndex | None,
    unique: Array,
    threshold: float,
    groups: Array | None,
    split: int | None,
    begin: int,
    done: tuple[int, int],
) -> Iterator[_Part]:
    """The threshold join of all rows, or of each group; goes on from the group and the place in it that `done` says."""
    if index is None:
        raise UsageError("semantic duplicates need vectors")
    if groups is None:
        tasks = [unique]
    else:
        order = unique[np.argsort(groups[unique], kind="stable")]
        tasks = [some for some in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(some) > 1]
    total = sum(len(some) ** 2 for some in tasks) or 1
    gone = 0
    for number, rows in enumerate(tasks):
        if number >= done[0]:
            place = done[1] if number == done[0] else 0
            if split is not None:
                cut = int(np.searchsorted(rows, split))
                reference = _part(index, rows[:cut])
                for at in range(cut + place, len(rows), 16 * QUERIES):
                    asked = rows[at : at + 16 * QUERIES]
                    found = reference.partners(index.vectors(asked), threshold, most=PARTNERS)
                    for block, (queries, near, scores, crowded) in enumerate(found, 1):
                        end = at - cut + min(block * QUERIES, len(asked))
                        share = (gone + (cut + end) * len(rows)) / total
                        yield _Part(asked[queries], rows[near], scores, asked[crowded], share, (number, end))
            else:
                from_place = max(place, int(np.searchsorted(rows, begin)))
                joined = index if len(rows) == len(index) else _part(index, rows)
                for block, (later, earlier, scores, crowded) in enumerate(
                    joined.join(threshold, begin=from_place, most=PARTNERS), 1
                ):
                    at = min(from_place + block * QUERIES, len(rows))
                    yield _Part(rows[later], rows[earlier], scores, rows[crowded], (gone + at**2) / total, (number, at))
        gone += len(rows) ** 2


def _part(index: ExactIndex, rows: Array) -> ExactIndex:
    found = ExactIndex(index.dim)
    found.add(np.arange(len(rows)), index.stored(rows))
    return found


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


class _Unfinished:
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
        of.update(orjson.dumps([sorted(floors.items()), split, begin, str(SHINGLES)]))
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

    def through(self, kind: str, find: Callable[[], Iterator[_Part]], progress: Progress | None) -> Iterator[_Part]:
        """The parts that are there, then those that are found; these are kept every 20 seconds."""
        files = self._files(kind)
        for file in files:
            with np.load(file) as there:
                yield _Part(there["later"], there["earlier"], there["scores"], there["capped"], 1.0)
                last = bool(there["last"])
            if last:
                return
        held: list[_Part] = []
        saved = time.monotonic()
        for part in find():
            held.append(part)
            if progress is not None:
                progress(kind, part.share)
            if self._folder is not None and kind == "semantic" and time.monotonic() - saved > _SAVED_SECONDS:
                yield self._keep(kind, len(files), held, False)
                files.append(Path())
                held, saved = [], time.monotonic()
        yield self._keep(kind, len(files), held, True)
        if progress is not None:
            progress(kind, 1.0)

    def _keep(self, kind: str, number: int, parts: Sequence[_Part], last: bool) -> _Part:
        """These parts as one, written down."""
        empty = _Part(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), 1.0)
        parts = [empty, *parts]
        later, earlier, scores, capped = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("later", "earlier", "scores", "capped")
        )
        whole = _Part(later, earlier, scores, capped, parts[-1].share, parts[-1].next)
        if self._folder is not None:
            written = self._folder / "part"
            with written.open("wb") as file:
                np.savez(
                    file, later=whole.later, earlier=whole.earlier, scores=whole.scores, capped=whole.capped,
                    next=np.array(whole.next), last=np.array(last),
                )  # fmt: skip
            written.rename(self._folder / f"{kind}-{number:06}.npz")
        return whole
