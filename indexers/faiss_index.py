"""FAISS behind the contract of `VectorIndex`: any index that its factory can make."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embell.errors import CollectionError, MissingExtraError, UsageError
from embell.indexers.codes import turned
from embell.indexers.vector_index import Array

_TRAIN = 200_000
_TRIED = 4000
_NUMBER = 8
"""Bytes of a row's number in a list."""
_BLOCK = 65_536

Progress = Callable[[str, float], None]
"""Told the stage and the share of it that is done."""
Settings = dict[str, int]
"""FAISS's search parameters by their names there: nprobe, efSearch."""


def load_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("FAISS is needed: pip install 'embell[cpu]' (or 'embell[gpu]' for CUDA)") from error
    return faiss


def check_factory(factory: str, dim: int) -> None:
    """Raises UsageError if FAISS cannot make an index from this description."""
    faiss = load_faiss()
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

    FILES = ("index.faiss", "faiss_keys.npy")

    def __init__(self, dim: int, factory: str) -> None:
        faiss = load_faiss()
        self._index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        self._keys: list[Array] = []

    def add(self, keys: Array, rows: Array, progress: Progress | None = None) -> None:
        """Add float16 rows `(n, dim)`; the first call trains the index on a sample of what it is given.

        Raises UsageError if there are too few rows to train the index on, CollectionError for an index that rows cannot be added to
        in blocks.
        """
        if not len(keys):
            return
        if not self._index.is_trained:
            if progress is not None:
                progress("training", 0.0)
            step = max(1, len(rows) // _TRAIN)
            try:
                _train(self._index, _turned(rows[::step]))
            except RuntimeError as error:
                raise UsageError(
                    f"{len(rows)} rows are too few to train this FAISS index on; use exact, or a smaller index"
                ) from error
        for begin in range(0, len(rows), _BLOCK):
            try:
                self._index.add(_turned(rows[begin : begin + _BLOCK]))
            except RuntimeError as error:
                kind = type(load_faiss().downcast_index(self._index)).__name__
                raise CollectionError(f"FAISS cannot add these rows to an {kind}; choose another index") from error
            if progress is not None:
                progress("adding rows", min(1.0, (begin + _BLOCK) / len(rows)))
        self._keys.append(np.asarray(keys, np.int64))

    def seconds(self, rows: Array) -> float:
        """About how long `add` will take for these rows, from products and insertions that are tried now; 0 where that cannot be tried."""
        faiss = load_faiss()
        index = _innermost(self._index)
        some = _turned(rows[:: max(1, len(rows) // _TRIED)][:_TRIED])
        if isinstance(index, faiss.IndexIVF):  # k-means compares the sample with each list, ten times; adding does so once
            flat = faiss.IndexFlatIP(some.shape[1])
            flat.add(np.resize(some, (index.nlist, some.shape[1])))
            began = time.perf_counter()
            flat.search(some, 1)
            each = (time.perf_counter() - began) / len(some)
            trained = min(len(rows), _TRAIN, index.cp.max_points_per_centroid * index.nlist)
            return float(each * (index.cp.niter * trained + len(rows)))
        tried = faiss.clone_index(self._index)
        began = time.perf_counter()
        try:
            if not tried.is_trained:
                tried.train(some)
            tried.add(some)
        except RuntimeError:  # it needs more rows, or takes none
            return 0.0
        longer = 1.0
        if isinstance(index, faiss.IndexHNSW):  # measured: a graph beyond the cache takes some 2.5 times as long
            longer = 2.5 * float(np.log2(max(2, len(rows))) / np.log2(max(2, len(some))))
        return float((time.perf_counter() - began) / max(1, len(some)) * len(rows) * longer)

    @property
    def keys(self) -> Array:
        """The key of each row."""
        return np.concatenate(self._keys) if self._keys else np.empty(0, np.int64)

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """Candidates `(scores, keys)`, `(q, k)`, best first by FAISS's own score; key -1 where there are fewer."""
        scores, positions = self._found(queries, k, self._usual(k))
        keys = self.keys
        return scores, np.where(positions >= 0, keys[np.maximum(positions, 0)], -1) if len(keys) else positions

    def positions(self, queries: Array, k: int, depth: float, settings: Settings | None = None) -> Array:
        """Candidates `(q, n)`, numbered as they were added; -1 where there are fewer.

        Of `depth` * `k` rows found, an index that keeps a finer form of them ("…,Refine(SQfp16)") picks the best `k`; others return all.
        """
        settings = self._usual(k) if settings is None else settings
        total = self._index.ntotal
        if self._refined:
            return self._found(queries, min(k, total), settings, (round(depth * k) + 0.5) / k)[1]  # FAISS rounds down
        return self._found(queries, min(round(depth * k), total), settings)[1]

    def _found(self, queries: Array, k: int, settings: Settings, depth: float = 1) -> tuple[Array, Array]:
        """Scores and positions."""
        faiss = load_faiss()
        faiss.omp_set_num_threads(torch.get_num_threads())  # of this thread only, which may be one of several
        found: tuple[Array, Array] = self._index.search(_turned(queries), k, params=_parameters(self._index, settings, depth))
        return found

    @property
    def _refined(self) -> bool:
        return isinstance(self._index, load_faiss().IndexRefine)

    @property
    def bytes(self) -> int:
        """Memory of the index, as it is written: to nowhere, for a second copy may be too much for memory or disk."""
        faiss = load_faiss()
        sizes: list[int] = []
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(lambda part: sizes.append(len(part)), 2**20))
        return sum(sizes)

    def choices(self) -> list[Settings]:
        """Settings worth trying, the fastest first."""
        faiss = load_faiss()
        index = _innermost(self._index)
        if isinstance(index, faiss.IndexHNSW):
            return [{"efSearch": 2**power} for power in range(4, 11)]
        if isinstance(index, faiss.IndexIVF):
            most = min(index.nlist, 1024)
            return [
                {"nprobe": count}
                for count in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)
                if count <= most
            ]
        return [{}]

    def range_search(self, queries: Array, threshold: float) -> list[tuple[Array, Array]]:
        """For each query, `(scores, keys)` that FAISS finds at or above `threshold`."""
        queries = _turned(queries)
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
        load_faiss().write_index(self._index, str(directory / self.FILES[0]))
        np.save(directory / FaissIndex.FILES[1], self.keys)

    @classmethod
    def load(cls, directory: Path) -> FaissIndex:
        """Open what `save` wrote; the file stays on disk and is memory-mapped."""
        index = cls.__new__(cls)
        index._keys = [np.load(directory / FaissIndex.FILES[1], allow_pickle=False)]
        faiss = load_faiss()
        index._index = faiss.read_index(str(directory / cls.FILES[0]), faiss.IO_FLAG_MMAP_IFC)
        return index

    def _usual(self, k: int) -> Settings:
        """Wide enough to be useful where nothing was tuned: FAISS's own defaults look at one list, or at 16 neighbours."""
        faiss = load_faiss()
        index = _innermost(self._index)
        if isinstance(index, faiss.IndexHNSW):
            return {"efSearch": max(128, 4 * k)}
        return {"nprobe": max(8, index.nlist // 8)} if isinstance(index, faiss.IndexIVF) else {}


def _train(index: Any, rows: Array) -> None:
    """Train an index; graphics cards that FAISS sees (it does in the wheel faiss-gpu) compare the rows with the centres of lists."""
    faiss = load_faiss()
    inner = _innermost(index)
    if not isinstance(inner, faiss.IndexIVF) or not faiss.get_num_gpus():
        index.train(rows)
        return
    try:
        cards = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(inner.d))
        inner.clustering_index = cards
        cards.this.own(True)  # the assignment took it away, and an index does not free this part of it
        index.train(rows)
        inner.clustering_index = None
    except RuntimeError:  # the cards' memory may be full of other things
        inner.clustering_index = None
        index.train(rows)


def _innermost(index: Any) -> Any:
    """The index that settings are for, inside those that turn rows or refine what it finds."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _innermost(index.base_index)
    return _innermost(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _parameters(index: Any, settings: Settings, depth: float) -> Any:
    """The parameters of one call, wrapped as the index is."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return faiss.IndexRefineSearchParameters(k_factor=depth, base_index_params=_parameters(index.base_index, settings, depth))
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(index.index, settings, depth))
    if "efSearch" in settings:
        return faiss.SearchParametersHNSW(**settings)
    return faiss.SearchParametersIVF(**settings) if settings else None


def _turned(rows: Array) -> Array:
    """Product codes and scalar codes lose least where all components are alike."""
    return np.ascontiguousarray(turned(np.asarray(rows, np.float32)), np.float32)


def factory_for(rows: int, dim: int, memory: int | None = None) -> str | None:
    """The description of an index for that many rows: inverted lists, four-bit product codes where the width allows them.

    What these find is ordered anew by half-precision rows, which FAISS reads faster than we could. Without room for those in
    `memory` bytes, the stored rows are read instead; None if there is no room for the codes either.
    """
    lists = 2 ** int(np.log2(4 * np.sqrt(rows)))
    coarse, size = (f"IVF{lists},PQ{dim // 4}x4fs", dim // 8) if dim % 4 == 0 else (f"IVF{lists},SQ8", dim)
    finer = f"{coarse},Refine(SQfp16)"
    for factory, each in ((finer, size + 2 * dim), (coarse, size)):
        needed = rows * (each + _NUMBER) + 4 * lists * dim
        if (factory == coarse or dim % 4 == 0) and (memory is None or needed <= memory):
            return factory
    return None
