"""FAISS behind the contract of `VectorIndex`: any index that its factory can make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from embell.errors import MissingExtraError, UsageError
from embell.indexers.vector_index import Array

_TRAIN = 200_000
_BLOCK = 65_536


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("this index needs FAISS: pip install 'embell[cpu]' (or 'embell[gpu]' for CUDA)") from error
    return faiss


def check_factory(factory: str, dim: int) -> None:
    """Raises UsageError if FAISS cannot make an index from this description."""
    faiss = _faiss()
    try:
        faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(
            f"FAISS cannot make the index {factory!r} for vectors {dim} wide (known are for example HNSW32 and IVF256,Flat)"
        ) from error


class FaissIndex:
    """An index of FAISS, with rows added in blocks. Implements `VectorIndex`.

    Search parameters travel with each call and are never set on the index, so that concurrent
    searches do not disturb each other.
    """

    FILE = "index.faiss"

    def __init__(self, dim: int, factory: str) -> None:
        faiss = _faiss()
        self._index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        self._keys: list[Array] = []

    def add(self, keys: Array, rows: Array) -> None:
        """Add float16 rows `(n, dim)`; the first call trains the index on a sample of what it is given.

        Raises UsageError if there are too few rows to train the index on.
        """
        if not len(keys):
            return
        if not self._index.is_trained:
            step = max(1, len(rows) // _TRAIN)
            try:
                self._index.train(np.ascontiguousarray(rows[::step], np.float32))
            except RuntimeError as error:
                raise UsageError(
                    f"{len(rows)} rows are too few to train this FAISS index on; use exact, or a smaller index"
                ) from error
        for begin in range(0, len(rows), _BLOCK):
            self._index.add(np.ascontiguousarray(rows[begin : begin + _BLOCK], np.float32))
        self._keys.append(np.asarray(keys, np.int64))

    @property
    def keys(self) -> Array:
        """The key of each row."""
        return np.concatenate(self._keys) if self._keys else np.empty(0, np.int64)

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """Candidates `(scores, keys)`, `(q, k)`, best first by FAISS's own score; key -1 where there are fewer."""
        scores, positions = self._index.search(np.ascontiguousarray(queries, np.float32), k, params=self._parameters(k))
        keys = self.keys
        return scores, np.where(positions >= 0, keys[np.maximum(positions, 0)], -1) if len(keys) else positions

    def range_search(self, queries: Array, threshold: float) -> list[tuple[Array, Array]]:
        """For each query, `(scores, keys)` that FAISS finds at or above `threshold`."""
        queries = np.ascontiguousarray(queries, np.float32)
        # FAISS keeps what is strictly above.
        limits, scores, positions = self._index.range_search(queries, float(np.nextafter(np.float32(threshold), np.float32(-2))))
        keys = self.keys
        answers = []
        for query in range(len(queries)):
            part = slice(int(limits[query]), int(limits[query + 1]))
            order = np.lexsort((positions[part], -scores[part]))
            answers.append((scores[part][order], keys[positions[part][order]]))
        return answers

    def save(self, directory: Path) -> None:
        """Write the index and its keys."""
        _faiss().write_index(self._index, str(directory / self.FILE))
        np.save(directory / "faiss_keys.npy", self.keys)

    @classmethod
    def load(cls, directory: Path) -> FaissIndex:
        """Open what `save` wrote."""
        index = cls.__new__(cls)
        index._keys = [np.load(directory / "faiss_keys.npy", allow_pickle=False)]
        index._index = _faiss().read_index(str(directory / cls.FILE))
        return index

    def _parameters(self, k: int) -> Any:
        """Wide enough to be useful: FAISS's own defaults look at one list, or at 16 neighbours."""
        faiss = _faiss()
        index = faiss.downcast_index(self._index)
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=max(128, 4 * k))
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=max(8, index.nlist // 8))
        return None
