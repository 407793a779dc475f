"""Closeness: how near a document's nearest neighbours are. What few others resemble is an outlier."""

from __future__ import annotations

from typing import Any

import numpy as np

from embell.engine.search_parts import Progress
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]

_TOGETHER = 4096


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
