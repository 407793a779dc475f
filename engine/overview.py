"""What is in a corpus: the documents that stand for it, and those that stand apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from embell.engine.closeness import closeness, nearest
from embell.engine.search_parts import Progress
from embell.errors import UsageError
from embell.indexers.exact import ExactIndex
from embell.indexers.faiss_index import load_faiss

Array = np.ndarray[Any, Any]

_NEIGHBOURS = 50
"""Neighbours that say whether a document stands apart."""
_ROUNDS, _STARTS = 25, 10
_TOGETHER = 4096
_LOOKED_AT = 256
"""Rows to a cluster that its centre is found from."""


def outliers(index: ExactIndex, count: int, progress: Progress | None = None) -> tuple[Array, Array]:
    """The `count` rows that resemble their nearest neighbours least: `(positions, closeness)`, the furthest first."""
    _check(count)
    found = closeness(index, _NEIGHBOURS, progress=progress)
    order = np.argsort(found, kind="stable")[:count]
    return order, found[order]


def representatives(index: ExactIndex, count: int) -> tuple[Array, Array]:
    """`count` rows that stand for all, fewer if there are fewer different ones: `(positions, shares)`, the largest share first.

    They are the rows nearest to the centres of spherical k-means (Dhillon and Modha, 2001). The share of one is that of the rows that are
    nearer to it than to the others.

    Raises UsageError for a count below 1, MissingExtraError without FAISS.
    """
    _check(count)
    different = _different(index)
    chosen = np.flatnonzero(different) if count >= different.sum() else _medoids(index, different, count)
    stand = index.part(chosen)
    _, nearest_one = nearest(stand, index, np.arange(len(index)))
    shares = np.bincount(nearest_one, minlength=len(chosen)) / max(1, len(index))
    order = np.argsort(-shares, kind="stable")
    return chosen[order], shares[order]


def _different(index: ExactIndex) -> Array:
    """The first of each vector: a bool array."""
    marks = np.empty(len(index), np.int64)
    for begin in range(0, len(index), _TOGETHER):
        rows = index.stored(np.arange(begin, min(begin + _TOGETHER, len(index))))
        marks[begin : begin + len(rows)] = [hash(row.tobytes()) for row in rows]
    found = np.zeros(len(index), bool)
    found[np.unique(marks, return_index=True)[1]] = True
    return found


def _medoids(index: ExactIndex, different: Array, count: int) -> Array:
    """For each centre the row nearest to it that is not another's already: as many as there are centres."""
    faiss = load_faiss()
    means = faiss.Kmeans(
        index.dim, count, niter=_ROUNDS, spherical=True, seed=1, nredo=max(1, min(_STARTS, _STARTS * 100 // count)),
        min_points_per_centroid=1, max_points_per_centroid=_LOOKED_AT,
    )  # fmt: skip
    sample = np.sort(np.random.default_rng(1).permutation(len(index))[: _LOOKED_AT * count])
    means.train(index.vectors(sample))
    positions = np.full(count, -1)
    taken: set[int] = set()
    reach = 8
    while (left := np.flatnonzero(positions < 0)).size:
        _, keys = index.search(means.centroids[left], min(reach, len(index)), different)
        near = np.where(keys >= 0, np.searchsorted(index.keys, keys), -1)
        for centre, row in zip(left.tolist(), near.tolist(), strict=True):
            positions[centre] = next((at for at in row if at not in taken and at >= 0), -1)
            taken.add(int(positions[centre]))
        reach *= 4
    return positions


def _check(count: int) -> None:
    if count < 1:
        raise UsageError(f"ask for at least 1 document, not {count}")
