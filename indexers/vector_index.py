"""The one contract that every vector index keeps, and how an index is named and made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from embell.errors import UsageError

Array = np.ndarray[Any, Any]


class VectorIndex(Protocol):
    """Rows of unit length by key, searched by inner product.

    Keys are int64, ascending in the order in which rows are added. Rows are float16, queries float32
    and of length 1. What an approximate index returns are candidates: their scores are not shown to
    anybody, the collection scores them again from the stored rows.
    """

    def add(self, keys: Array, rows: Array) -> None:
        """Add rows `(n, dim)` under keys `(n,)`."""

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """The best rows of each query: `(scores, keys)`, both `(q, k)`, best first; key -1 where there are fewer."""

    def range_search(self, queries: Array, threshold: float) -> list[tuple[Array, Array]]:
        """For each query, `(scores, keys)` of the rows that score at least `threshold`, best first."""

    def save(self, directory: Path) -> None:
        """Write the index into a directory."""

    @classmethod
    def load(cls, directory: Path) -> VectorIndex:
        """Open an index that was saved, memory-mapped where that is possible."""


class Candidates(Protocol):
    """An approximate index as a search and its tuning see it: what it finds are places in the ascending keys of its rows."""

    def positions(self, queries: Array, k: int, depth: float, settings: dict[str, int] | None = None) -> Array:
        """`depth` * `k` candidates of each query `(q, n)`, or the best `k` of them by a finer look; -1 where there are fewer."""

    def choices(self) -> list[dict[str, int]]:
        """Settings worth trying, the fastest first."""

    @property
    def bytes(self) -> int:
        """Size of the index."""

    def save(self, directory: Path) -> None:
        """Write the index into the directory of a generation, if that is where it belongs."""


def check_kind(kind: str, dim: int = 64) -> str:
    """The kind of index, if there is one of that name for vectors of that width: exact, auto, faiss:FACTORY, lance or lance:TYPE.

    Raises UsageError for any other name, MissingExtraError if FAISS is needed and not installed.
    """
    if kind in ("exact", "auto"):
        return kind
    if kind.startswith("faiss:") and len(kind) > len("faiss:"):
        from embell.indexers.faiss_index import check_factory

        check_factory(kind.removeprefix("faiss:"), dim)
        return kind
    if kind == "lance" or kind.startswith("lance:"):
        from embell.indexers.lance_index import check_type

        check_type(kind)
        return kind
    raise UsageError(
        f"unknown index {kind!r}; known are exact, auto, faiss:FACTORY (for example faiss:HNSW32 or faiss:IVF256,Flat), lance:IVF_PQ "
        "(or just lance) and lance:IVF_HNSW_SQ"
    )
