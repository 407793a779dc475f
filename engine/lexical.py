"""Near-duplicates by the shingles that two texts share.

A text is the set of its shingles. Two scores compare sets: *Jaccard*,
`|A∩B| / |A∪B|`, which is 1 for equal sets, and *containment*, `|A∩B| / min(|A|, |B|)`, which is 1 where one text is part of
another. Both are of the real sets; nothing that is yielded is an estimate.

- `lexical_pairs` looks for Jaccard among the candidates of MinHash with banding (Leskovec, Rajaraman, Ullman, *Mining of
  Massive Datasets*, sections 3.3 and 3.4). It finds a pair at the threshold with at least the probability asked for, a pair
  above it with a greater one.
- `contained_pairs` looks for containment by prefix filtering (Chaudhuri, Ganti, Kaushik, *A Primitive Operator for Similarity
  Joins in Data Cleaning*, 2006; Bayardo, Ma, Srikant, *Scaling Up All Pairs Similarity Search*, 2007). It finds every pair:
  MinHash would miss those of a short and a long text, for their Jaccard is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from embell.engine.pair_list import PARTNERS
from embell.engine.shingles import LexicalSets, chained, containment, jaccard, spans, within
from embell.errors import UsageError

Array = np.ndarray[Any, Any]

FEW = 32
"""Links that are listed of a document with more partners than are listed."""
PERMUTATIONS = 128
RECALL = 0.99
FEWEST = 5
"""Shingles of the smallest set that is looked for in others."""
_SIGNED = 1024
"""Rows that are signed together: their signatures come as Python integers, which should stay in the cache."""
_CODES = 2**21
"""Candidate pairs in work at a time."""


@dataclass(frozen=True)
class Banding:
    """How signatures are cut: `bands` of them, each of `rows` values; texts that agree in a whole band are candidates."""

    bands: int
    rows: int

    def chance(self, jaccard: float) -> float:
        """The probability that two sets of this Jaccard become candidates: `1 - (1 - s^r)^b`."""
        alike = jaccard**self.rows
        return 1.0 if alike >= 1 else -math.expm1(self.bands * math.log1p(-alike))


def banding(threshold: float, permutations: int = PERMUTATIONS, recall: float = RECALL) -> Banding:
    """The bands with the most rows, hence the fewest false candidates, that find a pair at the threshold with at least `recall`.

    Of as many rows, the fewest bands that suffice. The probability is that of Leskovec, Rajaraman, Ullman, *Mining of Massive
    Datasets*, section 3.4.2: `1 - (1 - s^r)^b`; `bands * rows` is at most `permutations`.
    """
    _check(threshold)
    if not 0 < recall < 1:
        raise UsageError(f"recall must lie between 0 and 1, not {recall}")
    if permutations < 1:
        raise UsageError(f"permutations must be at least 1, not {permutations}")
    for rows in range(permutations, 0, -1):
        most = permutations // rows
        if Banding(most, rows).chance(threshold) >= recall:
            return next(found for bands in range(1, most + 1) if (found := Banding(bands, rows)).chance(threshold) >= recall)
    raise UsageError(f"{permutations} permutations cannot find pairs at {threshold} with a recall of {recall}: use more of them")


class Pairs(NamedTuple):
    """Pairs of positions and their scores, by the later and then the earlier of the two, and the positions that were capped."""

    later: Array
    earlier: Array
    scores: Array
    capped: Array


def lexical_pairs(
    sets: LexicalSets,
    threshold: float,
    *,
    first_of_second: int | None = None,
    most: int = PARTNERS,
    few: int = FEW,
    permutations: int = PERMUTATIONS,
    recall: float = RECALL,
) -> Iterator[Pairs]:
    """The pairs whose Jaccard reaches the threshold, in parts; the later positions ascend, over all parts.

    With `first_of_second`, only pairs of a position before it and one from it on. A text without shingles has no partner.

    Of a text with more than `most` earlier partners only the pairs with the earliest `few` are yielded, and it is named in `capped`.
    So is one that agrees with more than `most` earlier texts in a single band, for looking at them all would take as many
    comparisons as there are pairs: of each of its bands only the earliest `most / bands` are compared with it.
    """
    cut = banding(threshold, permutations, recall)
    lists = _banded(sets, cut, first_of_second)
    longest = np.zeros(len(sets), np.int64)
    for found in lists:
        np.maximum(longest, found.counts, out=longest)
    crowded = longest > most
    limits = np.where(crowded, max(1, most // cut.bands), len(sets))
    for begin, end in spans(_work(lists, limits), _CODES):
        pairs = _reaching(sets, _candidates(lists, begin, end, limits), begin, threshold, jaccard)
        yield from _capped(pairs, begin, end, most, few, crowded)


def contained_pairs(
    sets: LexicalSets,
    threshold: float,
    *,
    fewest: int = FEWEST,
    first_of_second: int | None = None,
    most: int = PARTNERS,
    few: int = FEW,
) -> Iterator[Pairs]:
    """The pairs whose containment reaches the threshold, in parts; the later positions ascend, over all parts.

    Every pair is found of which neither text has fewer than `fewest` shingles: nearly every text contains the word "the".
    With `first_of_second`, only pairs of a position before it and one from it on.

    Of a text with more than `most` earlier partners only the pairs with the earliest `few` are yielded, and it is named in `capped`.
    So is one with a shingle that more than `most` earlier texts have, if among the `4 * few` earliest of these, or of those in
    which it is among the rarest, `3 * few` are partners; then its `few` links are with the earliest of these. What is found of a
    text that is not capped is everything.

    The time goes with the number of texts in which the rarest words of a text occur: it is long where texts are short, words
    common and the threshold low.
    """
    _check(threshold)
    n = len(sets)
    lists = _prefixes(sets, threshold, fewest, first_of_second)
    # Texts with very many partners would take as many comparisons as there are pairs. A look at some of them tells.
    first_look = [found.shortest_above(most) for found in lists]
    limits = np.full(n, 4 * few)
    crowded = np.zeros(n, bool)
    links = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for begin, end in spans(_work(first_look, limits), _CODES):
        later, earlier, scores = _reaching(sets, _candidates(first_look, begin, end, limits), begin, threshold, containment)
        crowded[begin:end] = np.bincount(later - begin, minlength=end - begin) >= 3 * few
        chosen = np.flatnonzero(crowded[later] & (_ranks(later) < few))
        links.append((later[chosen], earlier[chosen], scores[chosen]))
    known = [np.concatenate(part) for part in zip(*links, strict=True)]

    limits = np.where(crowded, 0, n)
    for begin, end in spans(_work(lists, limits) + few * np.cumsum(crowded), _CODES):
        found = _reaching(sets, _candidates(lists, begin, end, limits), begin, threshold, containment)
        some = slice(*np.searchsorted(known[0], [begin, end]))
        later, earlier, scores = (np.concatenate([old[some], new]) for old, new in zip(known, found, strict=True))
        order = np.lexsort((earlier, later))
        yield from _capped((later[order], earlier[order], scores[order]), begin, end, most, few, crowded)


def every_pair_of(
    sets: LexicalSets, chosen: Array, kind: str, threshold: float, first_of_second: int | None = None
) -> Iterator[Pairs]:
    """The pairs of the chosen texts (a bool array) with earlier ones, as `lexical_pairs` or `contained_pairs` (the `kind`), but however many."""
    if kind == "lexical":
        lists, score = _banded(sets, banding(threshold), first_of_second), jaccard
    else:
        lists, score = _prefixes(sets, threshold, FEWEST, first_of_second), containment
    limits = np.where(chosen, len(sets), 0)
    for begin, end in spans(_work(lists, limits), _CODES):
        found = _reaching(sets, _candidates(lists, begin, end, limits), begin, threshold, score)
        yield Pairs(*found, np.empty(0, np.int64))


def _check(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold must lie above 0 and be at most 1, not {threshold}")


# Sets to candidates.


@dataclass(frozen=True)
class _Lists:
    """For each row, stretches of lists of rows that come before it.

    Row i has the entries `starts[i]` to `starts[i + 1]`; entry e is the stretch of `counts[e]` from `firsts[e]` on in `members`,
    in which positions ascend.
    """

    starts: Array
    firsts: Array
    counts: Array
    members: Array

    def shortest_above(self, count: int) -> _Lists:
        """Only the shortest stretch of each row, of those longer than `count`: it says most about the row."""
        owners = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        entries = np.flatnonzero(self.counts > count)
        entries = entries[np.lexsort((self.counts[entries], owners[entries]))]
        entries = entries[np.diff(owners[entries], prepend=-1) != 0]
        starts = np.concatenate([[0], np.cumsum(np.bincount(owners[entries], minlength=len(self.starts) - 1))])
        return _Lists(starts, self.firsts[entries], self.counts[entries], self.members)

    def expanded(self, begin: int, end: int, limits: Array) -> tuple[Array, Array]:
        """Rows from `begin` to `end`, less `begin`, and their candidates, at most `limits` (n,) of a stretch: int64 (m,) each."""
        some = slice(self.starts[begin], self.starts[end])
        owners = np.repeat(np.arange(end - begin), np.diff(self.starts[begin : end + 1]))
        counts = np.minimum(self.counts[some], limits[begin:end][owners])
        return np.repeat(owners, counts), self.members[np.repeat(self.firsts[some], counts) + within(counts)]


def _banded(sets: LexicalSets, cut: Banding, first_of_second: int | None) -> list[_Lists]:
    """A list of buckets for each band: the rows that agree in it."""
    n = len(sets)
    keys = np.empty((cut.bands, n), np.uint64)
    for begin in range(0, n, _SIGNED):
        end = min(begin + _SIGNED, n)
        signed = sets.signatures(cut.bands * cut.rows, begin, end).reshape(end - begin, cut.bands, cut.rows).astype(np.uint64)
        key = signed[:, :, 0]
        for row in range(1, cut.rows):
            key = chained(key, signed[:, :, row])
        keys[:, begin:end] = key.T
    filled = np.flatnonzero(sets.sizes)
    lists, own = [], np.arange(n + 1)
    for key in keys:
        order = filled[np.argsort(key[filled], kind="stable")]
        run, ends = _runs(key[order])
        place = np.arange(len(order)) if first_of_second is None else ends
        firsts, counts = np.zeros(n, np.int32), np.zeros(n, np.int32)
        firsts[order] = run
        counts[order] = _before(order, run, place, None, first_of_second)
        lists.append(_Lists(own, firsts, counts, order.astype(np.int32)))
    return lists


def _prefixes(sets: LexicalSets, threshold: float, fewest: int, first_of_second: int | None) -> list[_Lists]:
    """Two lists of the rows that have a shingle: all rows, for those of a row's prefix; rows with it in their prefix, for all.

    If a set shares `c` of its shingles with another, then of any `|A| - c + 1` of them at least one: that is its prefix. The
    rarest ones make it, for they are in the fewest other sets. Nothing of the kind holds for the larger set, hence two lists.
    """
    n = len(sets)
    sizes = np.where(sets.sizes >= fewest, sets.sizes, 0)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    owners = np.repeat(np.arange(n, dtype=np.int32), sizes)
    hashes = sets.hashes[np.repeat(sizes > 0, sets.sizes)]
    order = np.argsort(hashes, kind="stable")
    run, end = _runs(hashes[order])
    members = owners[order]
    del hashes

    rarity = np.empty(len(order), np.int64)
    rarity[order] = end - run
    # Rounding may make the number of shared shingles one too small, never too large: the prefix is then longer than it need be.
    length = sizes - np.ceil(threshold * sizes - 1e-6).astype(np.int64).clip(1) + 1
    by_rarity = np.argsort((owners.astype(np.int64) << 32) | rarity)
    prefix = np.empty(len(order), bool)
    prefix[by_rarity] = within(sizes) < np.repeat(length, sizes)
    del rarity, by_rarity

    place: Array = np.arange(len(order)) if first_of_second is None else end
    firsts, counts = np.empty(len(order), np.int64), np.empty(len(order), np.int32)
    firsts[order] = run
    counts[order] = _before(members, run, place, None, first_of_second)
    of_prefix = np.concatenate([[0], np.cumsum(prefix)])[starts]
    everywhere = _Lists(of_prefix, firsts[prefix], counts[prefix], members)

    chosen = prefix[order]
    seen = np.concatenate([[0], np.cumsum(chosen)])
    firsts[order] = seen[run]
    counts[order] = _before(members, run, place, chosen, first_of_second)
    return [everywhere, _Lists(starts, firsts, counts, members[chosen])]


def _before(members: Array, run: Array, place: Array, chosen: Array | None, first_of_second: int | None) -> Array:
    """How many of each member's list come before it, or with `first_of_second` in the first part if it is in the second itself.

    `run` is where the list of each begins, `place` up to where it is looked at; with `chosen`, only members in that mask count.
    """
    if first_of_second is None and chosen is None:
        return place - run
    wanted = np.ones(len(members), bool) if chosen is None else chosen
    if first_of_second is not None:
        wanted = wanted & (members < first_of_second)
    seen = np.concatenate([[0], np.cumsum(wanted)])
    counts = seen[place] - seen[run]
    return counts if first_of_second is None else np.where(members < first_of_second, 0, counts)


def _runs(values: Array) -> tuple[Array, Array]:
    """Where the run of equal values begins in which each stands, and where it ends: int64 (m,) each."""
    edges = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]])) if len(values) else np.zeros(1, np.int64)
    lengths = np.diff(edges)
    return np.repeat(edges[:-1], lengths), np.repeat(edges[1:], lengths)


def _work(lists: list[_Lists], limits: Array) -> Array:
    """How many candidates, with repetitions, each row and those before it have when at most `limits` (n,) of a stretch are taken."""
    work = np.zeros(len(limits), np.int64)
    for part in lists:
        counts = np.minimum(part.counts, np.repeat(limits, np.diff(part.starts)))
        work += np.diff(np.concatenate([[0], np.cumsum(counts)])[part.starts])
    return np.cumsum(work)


def _candidates(lists: list[_Lists], begin: int, end: int, limits: Array) -> Array:
    """The distinct candidates of the rows from `begin` to `end`, as `(row - begin) * n + candidate`, ascending."""
    n = len(lists[0].starts) - 1
    codes = np.concatenate([owners * n + found for owners, found in (part.expanded(begin, end, limits) for part in lists)])
    codes.sort()
    return codes[np.concatenate([[True], codes[1:] != codes[:-1]])] if len(codes) else codes


# Candidates to pairs.


def _reaching(
    sets: LexicalSets, codes: Array, begin: int, threshold: float, score: Callable[[Array, Array, Array], Array]
) -> tuple[Array, Array, Array]:
    """Those candidates that reach the threshold: the later, the earlier and their scores."""
    rows, earlier = np.divmod(codes, len(sets))
    later = rows + begin
    possible = np.flatnonzero(score(sets.at_most_shared(later, earlier), sets.sizes[later], sets.sizes[earlier]) >= threshold)
    later, earlier = later[possible], earlier[possible]
    scores = score(sets.shared(later, earlier), sets.sizes[later], sets.sizes[earlier])
    enough = np.flatnonzero(scores >= threshold)
    return later[enough], earlier[enough], scores[enough]


def _capped(pairs: tuple[Array, Array, Array], begin: int, end: int, most: int, few: int, crowded: Array) -> Iterator[Pairs]:
    """The pairs of the rows from `begin` to `end`, only the first few of those that are crowded or have too many; if there are any."""
    later, earlier, scores = pairs
    capped = crowded[begin:end] | (np.bincount(later - begin, minlength=end - begin) > most)
    kept = np.flatnonzero(~capped[later - begin] | (_ranks(later) < few))
    if len(kept) or capped.any():
        yield Pairs(later[kept], earlier[kept], scores[kept], np.flatnonzero(capped) + begin)


def _ranks(ascending: Array) -> Array:
    """How many equal values stand before each."""
    before: Array = np.arange(len(ascending)) - np.searchsorted(ascending, ascending)
    return before
