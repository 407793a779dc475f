"""The search for pairs of duplicates: texts that are the same, that share shingles, and whose vectors are near.

Texts that agree after normalisation are one text to the other stages: the first of them stands for all. Stages may be cut short at any point;
with a folder, the next call goes on from what is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from embell.engine.lexical import Pairs, contained_pairs, every_pair_of, lexical_pairs
from embell.engine.pair_list import KINDS, OVERLAP, PAIR, PARTNERS, PairList, check_thresholds, in_order, reach
from embell.engine.rules import decide
from embell.engine.search_parts import Part, Progress, Unfinished
from embell.engine.shingles import LexicalSets, Shingles
from embell.errors import UsageError
from embell.indexers.exact import FEW, QUERIES, ExactIndex

Array = np.ndarray[Any, Any]

SHINGLES = Shingles()


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

    A row with more than 1 000 earlier partners is capped: its pairs with the first few are listed, and those with kept rows where
    there are any.
    """
    floors = check_thresholds(floors)
    begin = 0 if known is None else known.rows
    if known is not None and known.floors != floors:
        raise ValueError("the known pairs have other floors")
    with closing(Unfinished(folder, marks, index, floors, groups, split, begin, str(SHINGLES))) as work:
        return _search(work, marks, index, texts, floors, groups, split, known, begin, progress)


def _search(
    work: Unfinished,
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
    finders: dict[str, Callable[[], Iterator[Part]]] = {
        "lexical": lambda: _by_shingles(lexical_pairs, sets(), floors["lexical"], unique, split, begin),
        "contained": lambda: _by_shingles(contained_pairs, sets(), floors["contained"], unique, split, begin),
        "semantic": lambda: _by_vectors(index, unique, reach(floors["semantic"]), groups, split, begin, work.done("semantic")),
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

    def met(doubtful: Array, allowed: Array) -> Iterator[Array]:
        """Pairs of these capped rows with rows before them that are allowed."""
        for kind in ("lexical", "contained"):
            if kind in floors and len(doubtful):
                rows = np.union1d(np.flatnonzero(allowed), doubtful)
                between = None if split is None else int(np.searchsorted(rows, split))
                some = sets().of_texts(np.searchsorted(unique, rows))
                for part in every_pair_of(some, np.isin(rows, doubtful), kind, floors[kind], between):
                    yield paired(kind, rows[part.later], rows[part.earlier], part.scores)
        if "semantic" in floors and index is not None:
            for group in [None] if groups is None else np.unique(groups[doubtful]).tolist():
                asking = doubtful if groups is None else doubtful[groups[doubtful] == group]
                among = allowed if groups is None else allowed & (groups == group)
                # Of those that are near, the few that come first may not share words.
                most = None if OVERLAP in floors else PARTNERS
                vectors = index.vectors(asking)
                for asked, near, scores, _ in index.partners(vectors, reach(floors["semantic"]), allowed=among, most=most):
                    before = near < asking[asked]
                    yield paired("semantic", asking[asked[before]], near[before], scores[before])

    while len(pairs.capped):
        # Capped rows that nothing listed drops are compared with all kept rows before them, until that changes nothing.
        rank = np.arange(pairs.rows)
        listed = pairs.pairs
        kept = decide("cover", rank, listed["first"], listed["second"], listed["score"]).kept_by == rank
        doubtful = pairs.capped[kept[pairs.capped] & (pairs.capped >= begin)]
        allowed = kept & (original == rank)
        allowed[len(rank) if split is None else split :] = False
        every = in_order(np.concatenate([listed, *(_first_few(more) for more in met(doubtful, allowed))]))
        twice = np.zeros(len(every), bool)
        twice[1:] = (np.diff(every["second"]) == 0) & (np.diff(every["first"]) == 0) & (np.diff(every["kind"]) == 0)
        pairs = replace(pairs, pairs=every[~twice])
        if len(pairs.pairs) == len(listed):
            break
    return replace(pairs, pairs=in_order(pairs.pairs))


def _first_few(pairs: Array) -> Array:
    """Of each row, its pairs with the first few: if those are dropped after all, it is compared again."""
    ordered = in_order(pairs)
    rank = np.arange(len(ordered)) - np.searchsorted(ordered["second"], ordered["second"])
    return ordered[rank < FEW]


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
) -> Iterator[Part]:
    between = None if split is None else int(np.searchsorted(unique, split))
    for found in find(sets, threshold, first_of_second=between, most=PARTNERS):
        later, earlier, capped = unique[found.later], unique[found.earlier], unique[found.capped]
        new = later >= begin
        share = float(found.later[-1]) / len(sets) if len(found.later) else 0.0
        yield Part(later[new], earlier[new], found.scores[new], capped[capped >= begin], share)


def _by_vectors(
    index: ExactIndex | None,
    unique: Array,
    threshold: float,
    groups: Array | None,
    split: int | None,
    begin: int,
    done: tuple[int, int],
) -> Iterator[Part]:
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
                reference = index.part(rows[:cut])
                for at in range(cut + place, len(rows), 32 * QUERIES):
                    asked = rows[at : at + 32 * QUERIES]
                    found = reference.partners(index.vectors(asked), threshold, most=PARTNERS)
                    for block, (queries, near, scores, crowded) in enumerate(found, 1):
                        end = at - cut + min(block * QUERIES, len(asked))
                        share = (gone + (cut + end) * len(rows)) / total
                        yield Part(asked[queries], rows[near], scores, asked[crowded], share, (number, end))
            else:
                from_place = max(place, int(np.searchsorted(rows, begin)))
                joined = index if len(rows) == len(index) else index.part(rows)
                for block, (later, earlier, scores, crowded) in enumerate(
                    joined.join(threshold, begin=from_place, most=PARTNERS), 1
                ):
                    at = min(from_place + block * QUERIES, len(rows))
                    yield Part(rows[later], rows[earlier], scores, rows[crowded], (gone + at**2) / total, (number, at))
        gone += len(rows) ** 2
