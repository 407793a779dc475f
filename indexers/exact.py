"""Exact search: a coarse product finds candidates, float64 scores of the stored rows decide.

The coarse product multiplies int8 codes where the CPU has instructions for it, else the stored rows in float32; for a few queries int8 codes
with bfloat16 where it has AVX2; for many int8 codes on a graphics card, if there is one. How far it can be wrong is known for each query, so every row that may still be among the best k is scored again: the answer is the reference's, in values and in order.

The vector of a row is its stored float16 row, renormalised in float32. A score is the float64 inner product of that with the query;
equal scores are ordered by key.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from embell.errors import EmbellWarning
from embell.indexers.codes import (
    FEW_QUERIES,
    Codes,
    QueryCodes,
    card_products,
    int8_products,
    mixed_products,
    renormalise,
)
from embell.indexers.cut_rows import CutRows, sketch_for
from embell.indexers.shortlist import GROUP, LOWEST, Block, Shortlist, maxima, ranks
from embell.indexers.vector_index import Array
from embell.indexers.workers import each_on_a_core

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")

QUERIES = 512
"""Queries that are answered together."""
_FEWEST_QUERIES = 128
"""Queries for each core from which on each answers its own share."""
_PRODUCTS = 2**20
"""Products that are in work at a time: they stay in the cache until they have been looked at."""
_FEWEST_ROWS, _MOST_ROWS = 4096, 2**18
CARD_QUERIES = 32
"""Queries from which on a graphics card makes the products; fewer are answered before it has been asked."""
_CARD_PRODUCTS, _CARD_ROWS = 2**26, 2**20
_STRIP = 2048
"""Stored rows that are unpacked to float32 at a time: they are multiplied while they are in the cache."""
_COPIED = 8192
"""Codes of rows that a filter lets through, copied at a time: they are multiplied while they are in the cache."""
_MOST_CANDIDATES = 2_000_000
_MERGED = 8
"""Candidates of a query after which the k-th best so far is looked for anew, on the average."""
_GATHERED_SHARE, _GATHERED_SHARE_MIXED, _GATHERED_QUERIES = 0.4, 0.2, 32
"""Rows that a filter lets through are copied together where they are at most this share, or there are this many queries at least."""
_SCORED = 2**18
"""Components of the pairs that are scored at a time: they stay in the cache, and few steps of Python are left for the cores to wait for each other in."""
_SHARED = 1024
"""Pairs from which on every core scores a share of them."""
FEW = 32
"""Partners that come with a row that has too many of them."""
_CUT_QUERIES, _CUT_PAIRS, _CUT_SQUARES = 8192, 2**28, 2**8
"""Queries, and pairs of one and a row, from which on cutting the rows first is worth its time; of the latter, so many times the squared width at least."""
_CUT_SAMPLE = 8192


@dataclass
class _Segment:
    """Rows that were added at once, and their codes once they are needed."""

    keys: Array
    rows: Array
    codes: Codes | None = None
    on_card: Tensor | None = None


def _or_without_card(
    answer: Callable[Concatenate[ExactIndex, Asked], Answer],
) -> Callable[Concatenate[ExactIndex, Asked], Answer]:
    """A method that begins again without the graphics card where that has no memory left."""

    @wraps(answer)
    def answered(self: ExactIndex, *asked: Asked.args, **more: Asked.kwargs) -> Answer:
        try:
            return answer(self, *asked, **more)
        except torch.OutOfMemoryError:
            if self._cardless:
                raise
            self._cardless = True
            for segment in self._segments:
                segment.on_card = None
            warnings.warn(
                "the graphics card has no memory left to search with: the processor does it", EmbellWarning, stacklevel=2
            )
            return answer(self, *asked, **more)

    return answered  # type: ignore[return-value]  # the first parameter has a name now


class ExactIndex:
    """Float16 rows in memory or memory-mapped, searched exactly. Implements `VectorIndex`."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._segments: list[_Segment] = []
        self._int8, self._mixed = int8_products(), mixed_products(dim)
        self._cardless = False
        self._cut: tuple[float, CutRows | None] | None = None  # for this threshold

    def __len__(self) -> int:
        return sum(len(segment.keys) for segment in self._segments)

    def add(self, keys: Array, rows: Array) -> None:
        """Add float16 rows `(n, dim)`, made from rows of length 1, under ascending keys."""
        if len(keys):
            self._segments.append(_Segment(np.asarray(keys, np.int64), rows))
            self._cut = None

    @property
    def keys(self) -> Array:
        """The key of each position, ascending."""
        if len(self._segments) == 1:
            return self._segments[0].keys
        return np.concatenate([segment.keys for segment in self._segments]) if self._segments else np.empty(0, np.int64)

    def search(self, queries: Array, k: int, allowed: Array | None = None) -> tuple[Array, Array]:
        """The best `k` rows of each query: `(scores float64, keys)`, `(q, k)`, key -1 where there are fewer.

        `allowed` is a bool array over positions; rows outside it do not take part.
        """
        scores = np.full((len(queries), k), -np.inf)
        keys = np.full((len(queries), k), -1, np.int64)
        all_keys = self.keys
        queries = np.ascontiguousarray(queries, np.float32)

        def answer(begin: int) -> tuple[Array, Array, Array]:
            return self._best(queries[begin : begin + size], k, allowed)

        self._code(len(queries))
        size = self._together(len(queries))
        for begin, (asked, found, positions) in each_on_a_core(answer, range(0, len(queries), size)):
            place = begin + asked, ranks(asked)
            scores[place], keys[place] = found, all_keys[positions]
        return scores, keys

    def range_search(self, queries: Array, threshold: float, allowed: Array | None = None) -> list[tuple[Array, Array]]:
        """For each query, `(scores float64, keys)` of the rows that score at least `threshold`, best first."""
        answers: list[tuple[Array, Array]] = []
        all_keys = self.keys
        queries = np.ascontiguousarray(queries, np.float32)

        def answer(begin: int) -> tuple[Array, Array, Array]:
            return self._within(queries[begin : begin + size], threshold, allowed, None, cut)[:3]

        cut = self._cut_for(len(queries), threshold, allowed)
        size = self._together(len(queries))
        for begin, (asked, scores, positions) in each_on_a_core(answer, range(0, len(queries), size)):
            order = np.lexsort((positions, -scores, asked))
            ends = np.searchsorted(asked, np.arange(1, min(size, len(queries) - begin)))
            answers += zip(np.split(scores[order], ends), np.split(all_keys[positions[order]], ends), strict=True)
        return answers

    def join(self, threshold: float, *, begin: int = 0, most: int | None = None) -> Iterator[tuple[Array, Array, Array, Array]]:
        """All pairs of rows that score at least `threshold`, each once: `(later, earlier, scores, crowded)`, positions, by the later one.

        They come in parts, each of `QUERIES` later rows, from position `begin` on, with all before them. With `most`, a row that has
        more earlier partners is one of the part's `crowded`, and comes with the first few of them only.
        """

        def partners(start: int) -> tuple[Array, Array, Array, Array]:
            positions = np.arange(start, min(start + QUERIES, len(self)))
            asked, scores, others, crowded = self._within(self.vectors(positions), threshold, None, start, cut, most)
            return positions[asked], others, scores, positions[crowded]

        cut = self._cut_for(len(self) - begin, threshold, None)
        yield from (found for _, found in each_on_a_core(partners, range(begin, len(self), QUERIES)))
        self._cut = None

    def partners(
        self, queries: Array, threshold: float, *, allowed: Array | None = None, most: int | None = None
    ) -> Iterator[tuple[Array, Array, Array, Array]]:
        """All pairs of a query and a row that score at least `threshold`: `(queries, positions, scores, crowded)`, by query.

        They come in parts, each of `QUERIES` queries. `allowed` as in `search`, `most` as in `join`.
        """
        queries = np.ascontiguousarray(queries, np.float32)

        def answer(start: int) -> tuple[Array, Array, Array, Array]:
            some = queries[start : start + QUERIES]
            asked, scores, positions, crowded = self._within(some, threshold, allowed, None, cut, most)
            return start + asked, positions, scores, start + crowded

        cut = self._cut_for(len(queries), threshold, allowed)
        yield from (found for _, found in each_on_a_core(answer, range(0, len(queries), QUERIES)))

    def vectors(self, positions: Array) -> Array:
        """The vectors at these positions: stored rows, renormalised in float32, `(n, dim)`."""
        return renormalise(self.stored(positions))

    def stored(self, positions: Array, out: Array | None = None) -> Array:
        """The float16 rows at these positions, as they are stored, `(n, dim)`; in `out`, where that is given."""
        rows: Array = np.empty((len(positions), self.dim), np.float16) if out is None else out
        if len(self._segments) == 1:
            return np.take(self._segments[0].rows, positions, axis=0, out=rows, mode="clip")
        start = 0
        for segment in self._segments:
            inside = (positions >= start) & (positions < start + len(segment.rows))
            if inside.any():
                rows[inside] = segment.rows[positions[inside] - start]
            start += len(segment.rows)
        return rows

    def part(self, positions: Array) -> ExactIndex:
        """The rows at these positions as an index of their own, whose keys are 0, 1, …"""
        found = ExactIndex(self.dim)
        found.add(np.arange(len(positions)), self.stored(positions))
        return found

    def score(self, query: Array, positions: Array) -> Array:
        """Exact float64 scores `(n,)` of one query `(dim,)` with the rows at these positions."""
        return self._scores(query[None], np.zeros(len(positions), np.int64), positions)

    def best_of(self, queries: Array, k: int, asked: Array, positions: Array) -> tuple[Array, Array, Array]:
        """The best `k` of each query among candidates: `(queries, scores, positions)`, by query and best first.

        `asked`, ascending, and `positions` are the pairs. float32 scores sort out most; float64 decides between the rest.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        cores = torch.get_num_threads()
        if cores == 1 or len(asked) < _SHARED:
            return self._decide(queries, k, asked, positions)
        cuts = np.linspace(0, len(queries), cores + 1).astype(np.int64)
        ends = np.searchsorted(asked, cuts)

        def share(core: int) -> tuple[Array, Array, Array]:
            first, pairs = cuts[core], slice(*ends[core : core + 2])
            best, scores, chosen = self._decide(queries[first : cuts[core + 1]], k, asked[pairs] - first, positions[pairs])
            return best + first, scores, chosen

        found = [answer for _, answer in each_on_a_core(share, range(cores))]
        best, scores, chosen = (np.concatenate(part) for part in zip(*found, strict=True))
        return best, scores, chosen

    def _decide(self, queries: Array, k: int, asked: Array, positions: Array) -> tuple[Array, Array, Array]:
        """`best_of`, by this thread alone."""
        if len(asked) > 4 * k * len(queries):
            rough = self._rough(queries, asked, positions)
            order = np.lexsort((-rough, asked))
            kth = np.full(len(queries), -np.inf)
            last = order[ranks(asked) == k - 1]
            kth[asked[last]] = rough[last]
            kept = rough >= kth[asked] - 2 * _rough_error(self.dim)
            asked, positions = asked[kept], positions[kept]
        scores = self._scores(queries, asked, positions)
        if each := _each(asked, len(queries)):  # short rows are sorted many times as fast as one long one
            inside = np.lexsort((positions.reshape(-1, each), -scores.reshape(-1, each)), axis=-1)
            order = (inside + np.arange(0, len(asked), each)[:, None])[:, :k].ravel()
        else:
            order = np.lexsort((positions, -scores, asked))
            order = order[ranks(asked) < k]
        return asked[order], scores[order], positions[order]

    def save(self, directory: Path) -> None:
        """Write keys, rows and codes."""
        rows = mapped(directory / "vectors.npy", np.float16, (len(self), self.dim))
        start = 0
        for segment in self._segments:
            rows[start : start + len(segment.rows)] = segment.rows
            start += len(segment.rows)
        rows.flush()
        self.write_beside(directory, self.keys, rows)

    @staticmethod
    def write_beside(directory: Path, keys: Array, rows: Array) -> None:
        """Write keys and codes into the directory in which `rows` lie already."""
        np.save(directory / "keys.npy", keys)
        if (int8_products() or mixed_products(rows.shape[1])) and len(keys):
            out = mapped(directory / "codes.npy", np.int8, rows.shape)
            Codes.of(rows, out).save(directory)
            out.flush()

    @classmethod
    def load(cls, directory: Path) -> ExactIndex:
        """Open what `save` wrote; the matrices stay on disk and are memory-mapped.

        Raises ValueError if the files do not belong together.
        """
        keys = np.load(directory / "keys.npy", allow_pickle=False)
        # An empty array cannot be mapped. "c": torch wants arrays that it may write to.
        rows = np.load(directory / "vectors.npy", mmap_mode="c" if len(keys) else None, allow_pickle=False)
        index = cls(rows.shape[1])
        codes = Codes.load(directory) if (index._int8 or index._mixed) and len(keys) else None
        if len(keys) != len(rows) or (codes is not None and codes.codes.shape != rows.shape):
            raise ValueError(f"{directory}: files of different lengths")
        index.add(keys, rows)
        if codes is not None:
            index._segments[0].codes = codes
        return index

    def _card_for(self, queries: int) -> torch.device | None:
        """The graphics card, where it is to make the products of so many queries."""
        return card_products(self.dim) if queries >= CARD_QUERIES and not self._cardless else None

    @_or_without_card
    def _code(self, queries: int) -> None:
        """Make the codes that are missing: once, and not by every core. Where they serve few queries only, they are not worth it."""
        card = self._card_for(queries)
        for segment in self._segments if self._int8 or card is not None else ():
            segment.codes = segment.codes or Codes.of(segment.rows)
            if card is not None and segment.on_card is None:
                segment.on_card = segment.codes.held_by(card)

    def _cut_for(self, queries: int, threshold: float, allowed: Array | None) -> CutRows | None:
        """The rows cut for so many queries that ask for a threshold; None, with codes of whole rows, where that is no faster.

        Made here, before several cores ask for it, and kept: the same may be asked again.
        """
        held = self._cut
        enough = (
            self._card_for(queries) is None
            and queries >= _CUT_QUERIES
            and queries * len(self) >= max(_CUT_PAIRS, _CUT_SQUARES * self.dim**2)
        )
        if allowed is None and enough and (held is None or held[0] != threshold):
            some = np.random.default_rng(len(self)).choice(len(self), min(len(self), _CUT_SAMPLE), replace=False)
            sketch = sketch_for(self.vectors(some), threshold, FEW / len(self))
            cut = None if sketch is None else CutRows(sketch, len(self), self.vectors, self._int8)
            held = self._cut = threshold, cut
        if allowed is None and held is not None and held[0] == threshold and held[1] is not None:
            return held[1]
        self._code(queries)
        return None

    def _together(self, queries: int) -> int:
        """How many queries are answered together: a share of them for each core, if those are not too few to fill it."""
        cores = torch.get_num_threads()
        shares = cores * -(-queries // (cores * QUERIES))
        return -(-queries // shares) if queries >= cores * _FEWEST_QUERIES else QUERIES

    def _blocks(self, queries: Array, allowed: Array | None, until: int | None) -> Iterator[Block]:
        """Coarse products of the queries with all rows, some rows at a time; only with those allowed, and before `until`.

        The products of a block are overwritten by those of the next.
        """
        card = self._card_for(len(queries))
        most_products, most_rows = (_PRODUCTS, _MOST_ROWS) if card is None else (_CARD_PRODUCTS, _CARD_ROWS)
        size = int(np.clip(most_products // len(queries) // 8 * 8, _FEWEST_ROWS, most_rows))
        left = torch.from_numpy(queries)
        mixed = card is None and self._multiplies_mixed(len(queries))
        gathered = _GATHERED_SHARE_MIXED if mixed else _GATHERED_SHARE
        coding = card is not None or self._int8 or mixed
        whole = coding and not mixed
        count = len(queries) * -(-min(size, len(self)) // 8) * 8  # see `multiply_there`
        room = torch.empty(count, dtype=torch.int32 if whole else torch.float32, device=card)
        start = 0
        for segment in self._segments:
            end = len(segment.rows) if until is None else min(len(segment.rows), until - start)
            if end <= 0:
                return
            loose = np.zeros(0, np.int64)
            chosen = most = None
            if allowed is not None:
                mask = allowed[start : start + end]
                count = int(np.count_nonzero(mask))
                if count <= gathered * end or len(queries) >= _GATHERED_QUERIES:
                    chosen, end = np.flatnonzero(mask), count
                else:  # products of rows that take no part become LOWEST: a minimum is many times as fast as filling in
                    most = torch.from_numpy(mask).to(room.device, room.dtype).mul_(-2 * int(LOWEST)).add_(int(LOWEST))
            codes, coded = segment.codes if coding else None, None
            if codes is not None:
                coded = codes.query(queries, mixed)
                loose = codes.loose
            for begin in range(0, end, size):
                some: Any = slice(begin, min(begin + size, end)) if chosen is None else chosen[begin : begin + size]
                if coded is not None and codes is not None:
                    products = room[: len(queries) * min(size, end - begin)].view(len(queries), -1)
                    if card is not None:
                        products = coded.multiply_there(_codes_there(segment, some, card), room)
                    elif chosen is None:
                        coded.multiply(codes.codes[some], products)
                    else:
                        _multiply_chosen(coded, codes.codes, torch.from_numpy(some), products)
                    numbers = products, coded.scale, coded.offset, coded.error
                else:
                    rows = torch.from_numpy(segment.rows[some])
                    products = room[: len(queries) * len(rows)].view(len(queries), -1)
                    _multiply(left, rows, products)
                    none = np.zeros(len(queries))
                    numbers = products, none + 1, none, none + _rough_error(self.dim)
                if most is not None:
                    torch.minimum(products, most[begin : begin + size], out=products)
                if len(loose) and chosen is None:
                    out = loose[np.searchsorted(loose, begin) : np.searchsorted(loose, begin + products.shape[1])]
                    products[:, torch.from_numpy(out - begin).to(room.device)] = int(LOWEST)
                elif len(loose):
                    products[:, torch.from_numpy(np.isin(some, loose)).to(room.device)] = int(LOWEST)
                yield Block(start + begin, None, *numbers) if chosen is None else Block(start, some, *numbers)
            start += len(segment.rows)

    def _multiplies_mixed(self, queries: int) -> bool:
        return self._mixed and queries <= FEW_QUERIES

    def _loose(self, queries: int, allowed: Array | None, until: int | None) -> Array:
        """Positions whose codes say nothing: candidates whatever these queries, so many, ask."""
        found = [np.empty(0, np.int64)]
        start = 0
        for segment in self._segments:
            coded = self._int8 or self._multiplies_mixed(queries) or self._card_for(queries) is not None
            if segment.codes is not None and coded:
                found.append(segment.codes.loose + start)
            start += len(segment.rows)
        positions = np.concatenate(found)
        if until is not None:
            positions = positions[positions < until]
        return positions if allowed is None else positions[allowed[positions]]

    @_or_without_card
    def _best(self, queries: Array, k: int, allowed: Array | None) -> tuple[Array, Array, Array]:
        """The exact best `k` of each query: `(queries, scores, positions)`, by query and best first."""
        best = torch.full((len(queries), k), -torch.inf, dtype=torch.float64)  # the largest lows of candidates
        reach = np.full(len(queries), -np.inf)  # what the k-th best score is at least
        candidates, merged, counted = Shortlist(), 0, 0
        for block in self._blocks(queries, allowed, None):
            if (reach < -1.5).any():  # nothing is known yet: the largest products of k groups are those of k rows
                lows = block.lows(block.products if k > block.products.shape[1] // GROUP else maxima(block.products))
                if k <= lows.shape[1]:
                    reach = np.maximum(reach, lows.topk(k, dim=1).values[:, -1].numpy())
            candidates.take(block, block.least(reach))
            if candidates.held - counted > _MERGED * len(queries):
                best, merged, counted = candidates.kth(best, merged), len(candidates.queries), candidates.held
                reach = np.maximum(reach, best[:, -1].numpy())
            if candidates.held > _MOST_CANDIDATES:  # many near ties: settle them now rather than hold them all
                asked, scores, positions = self.best_of(queries, k, *candidates.among(reach))
                candidates = Shortlist()
                candidates.add(asked, positions, scores, scores)
                best, merged, counted = candidates.kth(torch.full_like(best, -torch.inf), 0), 1, candidates.held
                reach = np.maximum(reach, best[:, -1].numpy())
        candidates.everywhere(len(queries), self._loose(len(queries), allowed, None))
        reach = np.maximum(reach, candidates.kth(best, merged)[:, -1].numpy())
        return self.best_of(queries, k, *candidates.among(reach))

    @_or_without_card
    def _within(
        self,
        queries: Array,
        threshold: float,
        allowed: Array | None,
        first: int | None,
        cut: CutRows | None,
        most: int | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        """All pairs that score `threshold` or more: `(queries, scores, positions, crowded)`, by query.

        With `first`, the queries are the rows from that position on, and positions come before their query's. With `most`, a query
        that has more of them is crowded: it comes with the first `FEW` that are certain.
        """
        if cut is not None:
            return self._within_by(cut, queries, threshold, first, most)
        until = None if first is None else first + len(queries)
        floor = np.full(len(queries), threshold)
        wanted = floor.copy()
        certain = np.zeros(len(queries), np.int64)
        given = np.zeros(len(queries), np.int64)
        found: list[tuple[Array, Array, Array]] = []

        def earlier(asked: Array, positions: Array) -> Array:
            return positions < asked + first if first is not None else np.ones(len(asked), bool)

        def settle() -> None:
            asked, positions = candidates.among(floor)
            kept = earlier(asked, positions)
            asked, positions = asked[kept], positions[kept]
            if crowded.any():
                order = np.lexsort((positions, asked))
                asked, positions = asked[order], positions[order]
                kept = ~crowded[asked] | (ranks(asked) + given[asked] < FEW)
                asked, positions = asked[kept], positions[kept]
            scores = self._scores(queries, asked, positions)
            enough = scores >= threshold
            found.append((asked[enough], scores[enough], positions[enough]))
            np.add.at(given, asked[enough], 1)

        candidates = Shortlist()
        crowded = np.zeros(len(queries), bool)
        for block in self._blocks(queries, allowed, until):
            candidates.take(block, block.least(wanted))
            if most is not None:
                asked, positions = candidates.queries[-1], candidates.positions[-1]
                sure = (candidates.lows[-1] >= threshold) & earlier(asked, positions)
                certain += np.bincount(asked[sure], minlength=len(queries))
                newly, crowded = (certain > most) & ~crowded, certain > most
                for part in range(len(candidates.queries) - 1 if newly.any() else 0):  # what is not certain would take the places
                    asked, positions = candidates.queries[part], candidates.positions[part]
                    candidates.thin(part, newly, (candidates.lows[part] >= threshold) & earlier(asked, positions), FEW)
                if crowded.any():
                    wanted[crowded] = np.inf  # what it has is enough
                    candidates.thin(-1, crowded, sure, FEW)
            if candidates.held > _MOST_CANDIDATES:
                settle()
                candidates = Shortlist()
        candidates.everywhere(len(queries), self._loose(len(queries), allowed, until))
        candidates.thin(-1, crowded, np.zeros(len(candidates.queries[-1]), bool), FEW)
        settle()
        asked, scores, positions = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.argsort(asked, kind="stable")
        return asked[order], scores[order], positions[order], np.flatnonzero(crowded)

    def _within_by(
        self, cut: CutRows, queries: Array, threshold: float, first: int | None, most: int | None
    ) -> tuple[Array, Array, Array, Array]:
        """`_within`, by cut rows, of all rows."""
        asked, positions = cut.reaching(queries, threshold, None if first is None else first + len(queries))
        if first is not None:
            kept = positions < asked + first
            asked, positions = asked[kept], positions[kept]
        scores = np.full(len(asked), -np.inf)
        crowded = np.zeros(len(queries), bool)
        if most is None or len(asked) <= 2 * max(most, FEW):
            scores[:] = self._scores(queries, asked, positions)
        else:  # whose first candidates are partners enough needs no more
            soon = ranks(asked) < 2 * max(most, FEW)
            scores[soon] = self._scores(queries, asked[soon], positions[soon])
            crowded = np.bincount(asked[scores >= threshold], minlength=len(queries)) > max(most, FEW)
            late = ~soon & ~crowded[asked]
            scores[late] = self._scores(queries, asked[late], positions[late])
        enough = scores >= threshold
        asked, scores, positions = asked[enough], scores[enough], positions[enough]
        if most is not None:
            crowded |= np.bincount(asked, minlength=len(queries)) > most
            kept = ~crowded[asked] | (ranks(asked) < FEW)
            asked, scores, positions = asked[kept], scores[kept], positions[kept]
        return asked, scores, positions, np.flatnonzero(crowded)

    def _scores(self, queries: Array, asked: Array, positions: Array) -> Array:
        """Exact float64 scores of pairs of a query and a position."""
        scores = np.empty(len(positions))
        most = max(1, _SCORED // self.dim)
        each = _each(asked, len(queries))  # then no query's vector need be copied for each of its rows
        each = each if each <= most else 0
        size = most // each * each if each else most
        # Fresh arrays are handed out by the system each time, which costs more than the arithmetic.
        size = max(1, min(size, len(positions)))
        stored, unit = np.empty((size, self.dim), np.float16), np.empty((size, self.dim), np.float32)
        left, right = np.empty((2, size, self.dim))
        for begin in range(0, len(positions), size):
            some = slice(begin, min(begin + size, len(positions)))
            count = some.stop - begin
            row, query = left[:count], right[:count]
            row[:] = renormalise(self.stored(positions[some], stored[:count]), unit[:count])
            # Not a BLAS product: its rounding depends on how many rows there are and where they lie, and equal rows must tie.
            if each:
                some_queries = queries[begin // each : some.stop // each].astype(np.float64)
                np.einsum("qrd,qd->qr", row.reshape(-1, each, self.dim), some_queries, out=scores[some].reshape(-1, each))
            else:
                # "raise" would take a copy first
                query[:] = np.take(queries, asked[some], axis=0, out=unit[:count], mode="clip")
                np.einsum("ij,ij->i", row, query, out=scores[some])
        return scores

    def _rough(self, queries: Array, asked: Array, positions: Array) -> Array:
        """Scores of pairs, by query, from the rows as they are stored, off by `_rough_error` at most."""
        scores = np.empty(len(positions), np.float32)
        size = max(1, _SCORED // self.dim)
        for begin in range(0, len(positions), size):
            rows = torch.from_numpy(self.stored(positions[begin : begin + size])).float().numpy()
            some = asked[begin : begin + size]
            starts = np.flatnonzero(np.diff(some, prepend=-1))
            for start, end in zip(starts, np.append(starts[1:], len(some)), strict=True):
                np.dot(rows[start:end], queries[some[start]], out=scores[begin + start : begin + end])
        return scores


def mapped(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A new `.npy` file, mapped to be written to; its blocks are there already.

    Raises OSError where the disk has no room for it: writing into a map of a file with holes would kill the process.
    """
    found: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return found


def _multiply(queries: Tensor, rows: Tensor, out: Tensor) -> None:
    """Float32 products `(q, n)` of queries with rows as they are stored, `_STRIP` of which are unpacked at a time."""
    unpacked = torch.empty((min(_STRIP, len(rows)), rows.shape[1]))
    for begin in range(0, len(rows), _STRIP):
        strip = rows[begin : begin + _STRIP]
        torch.mm(queries, unpacked[: len(strip)].copy_(strip).T, out=out[:, begin : begin + _STRIP])


def _codes_there(segment: _Segment, some: slice | Array, card: torch.device) -> Tensor:
    """The codes of some rows on the card; brought there, where it does not hold all of them."""
    assert segment.codes is not None
    codes = segment.codes.codes if segment.on_card is None else segment.on_card
    rows = codes[some] if isinstance(some, slice) else torch.index_select(codes, 0, torch.from_numpy(some).to(codes.device))
    return rows.to(card)


def _multiply_chosen(queries: QueryCodes, codes: Tensor, chosen: Tensor, out: Tensor) -> None:
    """Products `(q, n)` of queries with the codes of the chosen rows."""
    copied = torch.empty((min(_COPIED, len(chosen)), codes.shape[1]), dtype=codes.dtype)
    for begin in range(0, len(chosen), _COPIED):
        strip = chosen[begin : begin + _COPIED]
        rows = torch.index_select(codes, 0, strip, out=copied[: len(strip)])  # not codes[strip]: that copies byte by byte
        queries.multiply(rows, out[:, begin : begin + len(strip)])


def _rough_error(dim: int) -> float:
    """More than the float32 inner product of a unit vector with a row as it is stored is off from that with the row's vector.

    What float32 loses, in whatever order it is summed (Higham, 2002, section 3.1), and what float16 changes of a row's length: 2^-11 of it, and
    a little for components too small for it.
    """
    return float(2 * (dim + 8) * 2**-24 + 2**-11 + dim**0.5 * 2**-24)


def _each(asked: Array, queries: int) -> int:
    """How many pairs every query has, where that is the same number for all, above one, and they come in order; else 0."""
    each = len(asked) // max(1, queries)
    if each < 2 or len(asked) != each * queries:
        return 0
    return each if (asked.reshape(-1, each) == np.arange(queries)[:, None]).all() else 0
