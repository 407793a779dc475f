"""How near a document's nearest neighbours are. What few others resemble is an outlier."""

from __future__ import annotations

from typing import Any

import numpy as np

from embell.engine.search_parts import Progress
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]

_TOGETHER = 4096


def nearest(index: ExactIndex, others: ExactIndex, positions: Array, among: Array | None = None) -> tuple[Array, Array]:
    """For rows of `others`, at these positions, the nearest row of `index`: its score and its key, `(n,)` each; few are unpacked at a time."""
    scores, keys = np.empty(len(positions)), np.empty(len(positions), np.int64)
    for begin in range(0, len(positions), _TOGETHER):
        some = slice(begin, begin + _TOGETHER)
        found, key = index.search(others.vectors(positions[some]), 1, among)
        scores[some], keys[some] = found[:, 0], key[:, 0]
    return scores, keys


def closeness(index: ExactIndex, neighbours: int, among: Array | None = None, progress: Progress | None = None) -> Array:
    """The mean cosine of each row with its `neighbours` nearest other rows, float64 `(n,)`; with all, if they are fewer, and 0 if there is none.

    Its complement is the mean distance to the k nearest neighbours (Angiulli and Pizzuti, 2002: the weight of a point).
    With `among`, a bool array over positions, only neighbours of those are looked for.
    """
    found = np.zeros(len(index))
    keys = index.keys
    for begin in range(0, len(index), _TOGETHER):
        if progress is not None:
            progress("looking at neighbours", begin / len(index))
        rows = np.arange(begin, min(begin + _TOGETHER, len(index)))
        scores, others = index.search(index.vectors(rows), min(neighbours + 1, len(index)), among)
        there = (others >= 0) & (others != keys[rows, None])
        there &= np.cumsum(there, axis=1) <= neighbours
        found[rows] = np.where(there, scores, 0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return found
