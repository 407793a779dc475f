"""What is in a corpus: the documents that stand for it, and those that stand apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from embell.engine.closeness import closeness
from embell.engine.search_parts import Progress
from embell.errors import UsageError
from embell.indexers.exact import ExactIndex
from embell.indexers.faiss_index import load_faiss

Array = np.ndarray[Any, Any]

NEIGHBOURS = 50
"""Neighbours that say whether a document stands apart."""
_ROUNDS = 25
_TOGETHER = 4096
_LOOKED_AT = 256
"""Rows to a cluster that its centre is found from."""


def outliers(
    index: ExactIndex, count: int, neighbours: int = NEIGHBOURS, progress: Progress | None = None
) -> tuple[Array, Array]:
    """The `count` rows that resemble their `neighbours` nearest least: `(positions, closeness)`, the furthest first."""
    _check(count, neighbours)
    found = closeness(index, neighbours, progress=progress)
    order = np.argsort(found, kind="stable")[:count]
    return order, found[order]


def representatives(index: ExactIndex, count: int) -> tuple[Array, Array]:
    """`count` rows that stand for all: `(positions, shares)`, the largest share first.

    They are the rows nearest to the centres of spherical k-means (Dhillon and Modha, 2001). The share of one is that of the rows that are
    nearer to it than to the others.

    Raises UsageError for a count below 1, MissingExtraError without FAISS.
    """
    _check(count)
    chosen = np.arange(len(index)) if count >= len(index) else _medoids(index, count)
    stand = ExactIndex(index.dim)
    stand.add(np.arange(len(chosen)), index.stored(chosen))
    counts = np.zeros(len(chosen))
    for begin in range(0, len(index), _TOGETHER):
        rows = np.arange(begin, min(begin + _TOGETHER, len(index)))
        counts += np.bincount(stand.search(index.vectors(rows), 1)[1][:, 0], minlength=len(chosen))
    shares = counts / max(1, len(index))
    order = np.argsort(-shares, kind="stable")
    return chosen[order], shares[order]


def _medoids(index: ExactIndex, count: int) -> Array:
    """For each centre the row nearest to it that is not another's already: as many as there are centres."""
    faiss = load_faiss()
    means = faiss.Kmeans(
        index.dim, count, niter=_ROUNDS, spherical=True, seed=1, min_points_per_centroid=1, max_points_per_centroid=_LOOKED_AT
    )
    sample = np.sort(np.random.default_rng(1).permutation(len(index))[: _LOOKED_AT * count])
    means.train(index.vectors(sample))
    positions = np.full(count, -1)
    reach = 8
    while True:
        _, keys = index.search(means.centroids, min(reach, len(index)))
        near = np.searchsorted(index.keys, keys)
        taken: set[int] = set()
        for centre, row in enumerate(near.tolist()):
            positions[centre] = next((at for at in row if at not in taken), -1)
            taken.add(int(positions[centre]))
        if (positions >= 0).all():
            return positions
        reach *= 4


def _check(*numbers: int) -> None:
    if min(numbers) < 1:
        raise UsageError(f"at least 1 is needed, not {min(numbers)}")
