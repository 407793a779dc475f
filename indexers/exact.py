"""Exact search: a blocked matrix product finds candidates, float64 scores of the stored rows decide.

The product runs in bf16 where the CPU computes in it, else in float32. It is off by at most `error`,
so every row whose coarse score lies within twice that of the k-th best is scored again: the answer is
the reference's, in values and in order.

The vector of a row is its stored float16 row, renormalised in float32. A score is the float64 inner
product of that with the query; equal scores are ordered by key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from embell.indexers.vector_index import Array

BLOCK = 16_384
"""Rows of the matrix that are in work at a time."""
QUERIES = 256
_MOST_CANDIDATES = 2_000_000


class ExactIndex:
    """Float16 rows in memory or memory-mapped, searched exactly. Implements `VectorIndex`."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._keys: list[Array] = []
        self._rows: list[Array] = []
        capabilities = torch.cpu.get_capabilities()
        self._bf16 = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))

    def __len__(self) -> int:
        return sum(map(len, self._keys))

    def add(self, keys: Array, rows: Array) -> None:
        """Add float16 rows `(n, dim)`, made from rows of length 1, under ascending keys."""
        if len(keys):
            self._keys.append(np.asarray(keys, np.int64))
            self._rows.append(rows)

    @property
    def keys(self) -> Array:
        """The key of each position, ascending."""
        return np.concatenate(self._keys) if self._keys else np.empty(0, np.int64)

    @property
    def error(self) -> float:
        """How far a coarse score may lie from the exact one.

        Rounding of both inputs, of the output, float32 accumulation, and the rows' own lengths, which
        float16 moves by at most 2^-11 and a little for components too small for it.
        """
        length = 2**-11 + math.sqrt(self.dim) * 2**-24
        accumulation = 2 * self.dim * 2**-24
        rounding = 2 * 2**-9 + 2**-18 + 2**-8 if self._bf16 else 0.0
        return (rounding + accumulation) * 1.01 + length

    def search(self, queries: Array, k: int, allowed: Array | None = None) -> tuple[Array, Array]:
        """The best `k` rows of each query: `(scores float64, keys)`, `(q, k)`, key -1 where there are fewer.

        `allowed` is a bool array over positions; rows outside it do not take part.
        """
        scores = np.full((len(queries), k), -np.inf)
        keys = np.full((len(queries), k), -1, np.int64)
        all_keys = self.keys
        for begin in range(0, len(queries), QUERIES):
            some = np.ascontiguousarray(queries[begin : begin + QUERIES], np.float32)
            for offset, (found, positions) in enumerate(self._best(some, k, allowed)):
                scores[begin + offset, : len(found)] = found
                keys[begin + offset, : len(found)] = all_keys[positions]
        return scores, keys

    def range_search(self, queries: Array, threshold: float, allowed: Array | None = None) -> list[tuple[Array, Array]]:
        """For each query, `(scores float64, keys)` of the rows that score at least `threshold`, best first."""
        answers: list[tuple[Array, Array]] = []
        all_keys = self.keys
        for begin in range(0, len(queries), QUERIES):
            some = np.ascontiguousarray(queries[begin : begin + QUERIES], np.float32)
            found: list[list[Array]] = [[] for _ in some]
            for start, coarse in self._coarse(some, allowed):
                rows, columns = np.nonzero(coarse.numpy() >= threshold - self.error)
                for query, positions in _by_query(rows, columns + start, len(some)):
                    found[query].append(positions)
            for query, parts in enumerate(found):
                positions = np.concatenate(parts) if parts else np.empty(0, np.int64)
                scores = self.score(some[query], positions)
                keep = scores >= threshold
                order = _ranking(scores[keep], positions[keep])
                answers.append((scores[keep][order], all_keys[positions[keep][order]]))
        return answers

    def pairs(self, threshold: float) -> Iterator[tuple[int, Array, Array]]:
        """For each position, in order: the earlier positions that score at least `threshold` with it, and the scores.

        Every unordered pair of rows is looked at once.
        """
        total = len(self)
        for begin in range(0, total, QUERIES):
            positions = np.arange(begin, min(begin + QUERIES, total))
            queries = self.vectors(positions)
            found: list[list[Array]] = [[] for _ in positions]
            for start, coarse in self._coarse(queries, None, until=begin + len(positions)):
                rows, columns = np.nonzero(coarse.numpy() >= threshold - self.error)
                columns = columns + start
                earlier = columns < positions[rows]
                for query, others in _by_query(rows[earlier], columns[earlier], len(positions)):
                    found[query].append(others)
            for query, parts in enumerate(found):
                others = np.concatenate(parts) if parts else np.empty(0, np.int64)
                scores = self.score(queries[query], others)
                keep = scores >= threshold
                yield begin + query, others[keep], scores[keep]

    def vectors(self, positions: Array) -> Array:
        """The vectors at these positions: stored rows, renormalised in float32, `(n, dim)`."""
        return renormalise(self.stored(positions))

    def stored(self, positions: Array) -> Array:
        """The float16 rows at these positions, as they are stored, `(n, dim)`."""
        rows = np.empty((len(positions), self.dim), np.float16)
        start = 0
        for block in self._rows:
            inside = (positions >= start) & (positions < start + len(block))
            if inside.any():
                rows[inside] = block[positions[inside] - start]
            start += len(block)
        return rows

    def score(self, query: Array, positions: Array) -> Array:
        """Exact float64 scores `(n,)` of one query `(dim,)` with the rows at these positions."""
        scores = np.empty(len(positions))
        for begin in range(0, len(positions), BLOCK):
            some = positions[begin : begin + BLOCK]
            # Not a BLAS product: its rounding depends on how many rows there are, and equal rows must tie.
            scores[begin : begin + len(some)] = np.einsum(
                "ij,j->i", self.vectors(some).astype(np.float64), query.astype(np.float64)
            )
        return scores

    def save(self, directory: Path) -> None:
        """Write `keys.npy` and `vectors.npy`."""
        np.save(directory / "keys.npy", self.keys)
        total = len(self)
        out = np.lib.format.open_memmap(directory / "vectors.npy", mode="w+", dtype=np.float16, shape=(total, self.dim))
        start = 0
        for block in self._rows:
            out[start : start + len(block)] = block
            start += len(block)
        out.flush()

    @classmethod
    def load(cls, directory: Path) -> ExactIndex:
        """Open what `save` wrote; the matrix stays on disk and is memory-mapped."""
        keys = np.load(directory / "keys.npy", allow_pickle=False)
        # An empty array cannot be mapped.
        rows = np.load(directory / "vectors.npy", mmap_mode="r" if len(keys) else None, allow_pickle=False)
        index = cls(rows.shape[1])
        index.add(keys, rows)
        return index

    def _coarse(self, queries: Array, allowed: Array | None, until: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of coarse scores `(start position, float32 (q, rows))`; rows not allowed score -inf."""
        kind = torch.bfloat16 if self._bf16 else torch.float32
        left = torch.from_numpy(queries).to(kind)
        offset = 0
        for rows in self._rows:
            for begin in range(0, len(rows), BLOCK):
                start = offset + begin
                if until is not None and start >= until:
                    return
                mask = None if allowed is None else allowed[start : start + len(rows[begin : begin + BLOCK])]
                if mask is not None and not mask.any():
                    continue
                block = np.array(rows[begin : begin + BLOCK])
                scores = (left @ torch.from_numpy(block).to(kind).T).float()
                if mask is not None:
                    scores[:, torch.from_numpy(~mask)] = -torch.inf
                yield start, scores
            offset += len(rows)

    def _best(self, queries: Array, k: int, allowed: Array | None) -> list[tuple[Array, Array]]:
        """For each query the exact best `k`: `(scores, positions)`."""
        floor = torch.full((len(queries), k), -torch.inf)  # best coarse scores so far
        rows: list[Array] = []
        positions: list[Array] = []
        held = 0
        kept: list[tuple[Array, Array]] = [(np.empty(0), np.empty(0, np.int64)) for _ in queries]
        for start, coarse in self._coarse(queries, allowed):
            floor = torch.cat([floor, coarse.topk(min(k, coarse.shape[1]), dim=1).values], dim=1).topk(k, dim=1).values
            reach = torch.nan_to_num(floor[:, -1:] - 2 * self.error, nan=-torch.inf, neginf=-torch.inf)
            some_rows, columns = np.nonzero(((coarse >= reach) & (coarse > -torch.inf)).numpy())
            rows.append(some_rows)
            positions.append(columns + start)
            held += len(columns)
            if held > _MOST_CANDIDATES:  # many near ties: settle them now rather than hold them all
                kept = self._settle(queries, k, rows, positions, kept)
                rows, positions, held = [], [], 0
        return self._settle(queries, k, rows, positions, kept)

    def _settle(
        self, queries: Array, k: int, rows: list[Array], positions: list[Array], kept: list[tuple[Array, Array]]
    ) -> list[tuple[Array, Array]]:
        """Score candidates exactly and keep the best `k` of each query, earlier ones included."""
        if not rows:
            return kept
        settled = list(kept)
        for query, some in _by_query(np.concatenate(rows), np.concatenate(positions), len(queries)):
            scores = np.concatenate([kept[query][0], self.score(queries[query], some)])
            where = np.concatenate([kept[query][1], some])
            order = _ranking(scores, where)[:k]
            settled[query] = (scores[order], where[order])
        return settled


def renormalise(rows: Array) -> Array:
    """Float32 rows of length 1."""
    rows = np.asarray(rows, np.float32)
    unit: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _ranking(scores: Array, positions: Array) -> Array:
    """Best score first, equal scores by position, which is the order of keys."""
    return np.lexsort((positions, -scores))


def _by_query(rows: Array, columns: Array, queries: int) -> Iterator[tuple[int, Array]]:
    """The columns of each query that has any."""
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], np.arange(queries + 1))
    for query in range(queries):
        if ends[query] < ends[query + 1]:
            yield query, columns[order[ends[query] : ends[query + 1]]]
