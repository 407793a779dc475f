"""A list of duplicate pairs: what a search found, and what can be decided from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embell.errors import UsageError

Array = np.ndarray[Any, Any]

KINDS = ("exact", "lexical", "contained", "semantic", "reviewed")
"""Kinds of duplicates, in the order in which they are looked for; the last is not looked for: people have said so."""
LOOKED_FOR = KINDS[:-1]
OVERLAP = "overlap"
"""Beside the kinds: the containment that a semantic pair must have too, where that is asked for."""
THRESHOLDS = {"lexical": 0.9, "contained": 0.9, "semantic": 0.8, OVERLAP: 0.7}
PARTNERS = 1000
"""Earlier partners of one row that are listed as pairs; with more, only its links to the first few of them are."""
PAIR = np.dtype([("first", np.int64), ("second", np.int64), ("score", np.float64), ("overlap", np.float64), ("kind", np.int8)])
"""A pair: positions `first` < `second`, the score, the containment that a semantic pair was asked for (else NaN), a place in `KINDS`."""


@dataclass(frozen=True)
class PairList:
    """What was found among `rows` rows: `pairs` of the type `PAIR`, by the second and then the first position.

    `original` `(rows,)` names for each row the first one with its text. Pairs are of such first rows only. `floors` are the thresholds
    by kind below which nothing was looked for. `capped` are rows of which not all partners are listed: what is listed suffices for the policy
    `keep`, with the order `rank` `(rows,)` (None: as they stand). Of two corpora, the first `split` rows
    are those compared against.
    """

    rows: int
    original: Array
    pairs: Array
    floors: dict[str, float]
    capped: Array
    split: int | None = None
    keep: str = "first"
    rank: Array | None = None

    def at(self, thresholds: Mapping[str, float]) -> Array:
        """The pairs that reach these thresholds, of the kinds that are named."""
        kept = np.zeros(len(self.pairs), bool)
        for kind, threshold in thresholds.items():
            if kind in KINDS:
                kept |= (self.pairs["kind"] == KINDS.index(kind)) & (self.pairs["score"] >= reach(threshold))
        if OVERLAP in thresholds:
            kept &= (self.pairs["kind"] != KINDS.index("semantic")) | (self.pairs["overlap"] >= thresholds[OVERLAP])
        return self.pairs[kept]

    def lacks(self, thresholds: Mapping[str, float], keep: str) -> str:
        """Why these thresholds and this keep policy cannot be decided on from this list; "" if they can."""
        for kind, threshold in thresholds.items():
            if kind == "reviewed":
                continue
            if kind not in self.floors:
                return f"{kind} duplicates were not looked for"
            if threshold < self.floors[kind]:
                return f"the {kind} threshold {threshold:g} is below {self.floors[kind]:g}, the floor of the list of pairs"
        if "semantic" in thresholds and OVERLAP in self.floors and OVERLAP not in thresholds:
            return "semantic duplicates were looked for only where words overlap too"
        if len(self.capped) and (keep != self.keep or {**thresholds, "reviewed": 1.0} != {**self.floors, "reviewed": 1.0}):
            return f"of {len(self.capped):,} rows with more than {PARTNERS:,} partners not all pairs are listed"
        return ""

    def renumbered(self, order: Array, keep: str) -> PairList:
        """The list of the rows whose position was `order[p]` before they were put in the order of a keep policy."""
        rank = np.empty(self.rows, np.int64)
        rank[order] = np.arange(self.rows)
        original = np.empty(self.rows, np.int64)
        original[order] = order[self.original]
        pairs = self.pairs.copy()
        one, other = order[pairs["first"]], order[pairs["second"]]
        pairs["first"], pairs["second"] = np.minimum(one, other), np.maximum(one, other)
        return replace(self, original=original, pairs=in_order(pairs), capped=np.sort(order[self.capped]), keep=keep, rank=rank)


def in_order(pairs: Array) -> Array:
    found: Array = pairs[np.lexsort((pairs["kind"], pairs["first"], pairs["second"]))]
    return found


def check_thresholds(thresholds: Mapping[str, float]) -> dict[str, float]:
    """Raises UsageError for a kind that does not exist, or a threshold that is not above 0 and at most 1."""
    for kind, threshold in thresholds.items():
        if kind not in KINDS and kind != OVERLAP:
            raise UsageError(f"kind {kind!r} is not known; there are {', '.join(LOOKED_FOR)}")
        if not 0.0 < threshold <= 1.0:
            raise UsageError(f"the {kind} threshold must lie above 0 and be at most 1, not {threshold}")
    return dict(thresholds)


def reach(threshold: float) -> float:
    """Rounding leaves the cosine of equal vectors up to 1.2e-7 below 1."""
    return min(threshold, 1 - 2**-22)
