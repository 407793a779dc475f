"""LanceDB's own vector indices, in the table of a collection: index and vectors stay on disk.

The column is float16, which LanceDB 0.40 computes with slowly: its k-means learns from few rows here, and product codes have four
bits, for which it compares a row with 16 centroids instead of 256.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from embell.errors import UsageError
from embell.indexers.store import Store
from embell.indexers.vector_index import Array

IVF_PQ, IVF_HNSW_SQ = "IVF_PQ", "IVF_HNSW_SQ"
_METRIC: Final = "cosine"
_TOGETHER = 64
"""Queries that LanceDB is given in one call."""
_SAMPLE, _ROUNDS = 64, 10
"""k-means: rows for each centroid, and how often they are assigned anew; LanceDB takes 256 and 50, and hours."""
FEWEST = 16 * _SAMPLE
"""Rows without which there is too little to train codes of four bits on."""
_GRAPH = 2**20
"""Rows in one graph: more take too much memory while it is built."""

Settings = dict[str, int]
"""LanceDB's search parameters by their names there: nprobes, ef."""


def check_type(kind: str) -> str:
    """The type of the index that `kind` stands for: IVF_PQ for "lance", otherwise what stands behind "lance:".

    Raises UsageError for a type that is not known.
    """
    name = kind.partition(":")[2] if ":" in kind else IVF_PQ
    if name not in (IVF_PQ, IVF_HNSW_SQ):
        raise UsageError(
            f"LanceDB cannot make the index {name!r} here; known are lance:{IVF_PQ}, which is lance, and lance:{IVF_HNSW_SQ}"
        )
    return name


class LanceIndex:
    """The vector index in a table, over the rows of these keys; implements `Candidates`.

    LanceDB compares rows that the index does not cover (newer ones, and those written again for other metadata) one by one, and
    leaves out rows that are gone. Search parameters travel with each call.
    """

    def __init__(self, store: Store, keys: Array) -> None:
        """`keys`, ascending: the rows that positions are counted in. Raises ValueError if the table has no such index."""
        kind = store.vector_index
        if kind is None:
            raise ValueError("the table has no vector index")
        self._store = store
        self._keys = keys
        self._graphs = "hnsw" in kind.index_type.lower()
        self._lists = _lists(IVF_HNSW_SQ if self._graphs else IVF_PQ, len(keys))

    @classmethod
    def build(cls, store: Store, keys: Array, dim: int, kind: str) -> LanceIndex:
        """Build the index in the table, over all its rows, in place of another one.

        Raises UsageError if there are too few rows to train it on.
        """
        if len(keys) < FEWEST:
            raise UsageError(f"{len(keys)} rows are too few to train a LanceDB index on; use exact")
        store.build_vector_index(_config(check_type(kind), len(keys), dim))
        return cls(store, keys)

    def positions(self, queries: Array, k: int, depth: float, settings: Settings | None = None) -> Array:
        """Candidates `(q, n)`, `depth` * `k` of them, as places in the keys; -1 where there are fewer, and for other rows."""
        settings = self._usual(k) if settings is None else settings
        most = min(round(depth * k), len(self._keys))
        found = np.full((len(queries), most), -1, np.int64)
        for begin in range(0, len(queries), _TOGETHER):
            asked, keys = self._store.nearest(queries[begin : begin + _TOGETHER], most, **settings)
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            place = np.arange(len(asked)) - np.searchsorted(asked, asked)
            found[begin + asked, place] = np.where(self._keys[at] == keys, at, -1)
        return found

    def choices(self) -> list[Settings]:
        """Settings worth trying, the fastest first."""
        if self._graphs:  # a graph is not left with less than `ef` candidates, so few partitions are enough
            probes = sorted({min(count, self._lists) for count in (1, 2, 4, self._lists)})
            return [{"nprobes": count, "ef": width} for count in probes for width in (64, 128, 256, 512)]
        return [{"nprobes": count} for count in (1, 2, 4, 8, 16, 32, 64, 128, 256) if count < self._lists] + [
            {"nprobes": min(self._lists, 512)}
        ]

    @property
    def bytes(self) -> int:
        """Size of the index on disk, without the vectors."""
        kind = self._store.vector_index
        return int(kind.size_bytes or 0) if kind is not None else 0

    def save(self, directory: Path) -> None:
        """Nothing: the table holds the index."""

    def _usual(self, k: int) -> Settings:
        """Wide enough to be useful where nothing was tuned."""
        if self._graphs:
            return {"nprobes": self._lists, "ef": max(128, 4 * k)}
        return {"nprobes": max(8, self._lists // 8)}


def _lists(name: str, rows: int) -> int:
    return max(1, rows // _GRAPH if name == IVF_HNSW_SQ else min(int(np.sqrt(rows) / 2), rows // _SAMPLE))


def _config(name: str, rows: int, dim: int) -> Any:
    from lancedb.index import HnswSq, IvfPq

    lists = _lists(name, rows)
    if name == IVF_HNSW_SQ:
        return HnswSq(_METRIC, lists, max_iterations=_ROUNDS, sample_rate=_SAMPLE)
    # LanceDB writes two codes of four bits into a byte, so it wants an even number of them.
    pieces = next((dim // width for width in (4, 2, 1) if dim % (2 * width) == 0), None)
    bits = 8 if pieces is None else 4
    return IvfPq(_METRIC, lists, pieces or dim, bits, max_iterations=_ROUNDS, sample_rate=_SAMPLE)
