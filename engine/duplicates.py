"""What makes two texts duplicates, and which of them is kept.

Two kinds: *exact*, the texts agree after normalisation of Unicode, case and white space; and
*semantic*, the cosine of their vectors reaches the threshold. Greedy cover decides: in the order
of the documents, one is kept unless a kept one before it is its duplicate. So no two kept documents
are duplicates of each other, and every dropped one names a kept one that it duplicates.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from embell.errors import UsageError
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]

PARTNERS = 1000
"""Earlier partners of one document that are listed as pairs; with more, only its link to the kept one is."""


def normalise(text: str) -> str:
    """The text without differences of Unicode form, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_mark(text: str) -> bytes:
    """A 128-bit hash of the normalised text."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Dropped:
    """A dropped document: the kept one it duplicates, the cosine of the two, and the kind of duplicate."""

    id: str
    kept_id: str
    score: float
    kind: str


@dataclass(frozen=True)
class Duplicates:
    """The result of near-duplicate detection, ids in the order of the documents.

    `pairs` has the columns `id_a` (the earlier document), `id_b`, `score` and `kind`: every semantic
    pair at or above the threshold, and for each exact copy its link to the first of its kind.
    `capped` counts documents with more than 1 000 earlier partners, of which only the link to the kept
    document is listed.
    """

    threshold: float
    kept: list[str]
    dropped: list[Dropped]
    pairs: pa.Table
    capped: int = 0

    @property
    def groups(self) -> list[list[str]]:
        """Each kept document that has duplicates, with those dropped for it."""
        found: dict[str, list[str]] = {}
        for row in self.dropped:
            found.setdefault(row.kept_id, [row.kept_id]).append(row.id)
        return list(found.values())


@dataclass
class _Cover:
    """The state of the greedy walk: for each position its kept position (itself if kept) and the score."""

    kept_by: Array
    score: Array
    first: list[Array] = field(default_factory=list)
    second: list[Array] = field(default_factory=list)
    scores: list[Array] = field(default_factory=list)
    capped: int = 0


def check_threshold(threshold: float) -> float:
    """Raises UsageError for a threshold that is not a cosine above 0."""
    if not 0.0 < threshold <= 1.0:
        raise UsageError(f"threshold must lie above 0 and be at most 1, not {threshold}")
    return threshold


def greedy_cover(index: ExactIndex, threshold: float) -> _Cover:
    """Walk the rows in order; a row with a kept earlier partner is dropped for the best of them.

    Whether a row is kept depends on earlier rows only, so one pass over the join decides.
    """
    total = len(index)
    cover = _Cover(kept_by=np.arange(total), score=np.ones(total))
    kept = np.zeros(total, bool)
    for position, others, scores in index.pairs(threshold):
        candidates = np.flatnonzero(kept[others])
        if not len(candidates):
            kept[position] = True
        else:
            best = candidates[np.lexsort((others[candidates], -scores[candidates]))[0]]
            cover.kept_by[position], cover.score[position] = others[best], scores[best]
        if len(others) > PARTNERS:
            cover.capped += 1
            link = [] if kept[position] else [int(cover.kept_by[position])]
            scores, others = scores[np.isin(others, link)], np.array(link, np.int64)
        if len(others):
            order = np.argsort(others)
            cover.first.append(others[order])
            cover.second.append(np.full(len(others), position))
            cover.scores.append(scores[order])
    return cover


def find_duplicates(ids: Sequence[str], marks: Sequence[bytes], index: ExactIndex, threshold: float) -> Duplicates:
    """Exact copies first, then the semantic join over what is left, then greedy cover.

    `ids`, `marks` (from `text_mark`) and the positions of `index` line up, in the order in which
    documents are to be preferred.
    """
    check_threshold(threshold)
    # Rounding leaves the cosine of equal vectors up to 1.2e-7 below 1.
    reach = min(threshold, 1 - 2**-22)
    first_with: dict[bytes, int] = {}
    original = np.array([first_with.setdefault(mark, position) for position, mark in enumerate(marks)], np.int64)
    unique = np.flatnonzero(original == np.arange(len(ids)))
    if len(unique) < len(ids):
        joined = ExactIndex(index.dim)
        joined.add(unique, index.stored(unique))
    else:
        joined = index
    cover = greedy_cover(joined, reach)

    kept_by = np.full(len(ids), -1, np.int64)
    score = np.ones(len(ids))
    kept_by[unique], score[unique] = unique[cover.kept_by], cover.score
    kept: list[str] = []
    dropped: list[Dropped] = []
    for position in range(len(ids)):
        source = int(original[position])
        target = int(kept_by[source])
        if target == position:
            kept.append(ids[position])
        elif source != position and target == source:
            dropped.append(Dropped(ids[position], ids[source], 1.0, "exact"))
        else:
            value = float(score[source])
            if source != position:  # a copy of a dropped text: its own vector decides, if it still reaches
                value = max(value, float(index.score(index.vectors(np.array([position]))[0], np.array([target]))[0]))
            dropped.append(Dropped(ids[position], ids[target], value, "semantic"))

    names = np.array(ids, dtype=object)
    copies = np.flatnonzero(original != np.arange(len(ids)))
    first = np.concatenate([original[copies], unique[np.concatenate(cover.first)] if cover.first else []]).astype(np.int64)
    second = np.concatenate([copies, unique[np.concatenate(cover.second)] if cover.second else []]).astype(np.int64)
    scores = np.concatenate([np.ones(len(copies)), *cover.scores])
    kinds = np.array(["exact"] * len(copies) + ["semantic"] * (len(first) - len(copies)), dtype=object)
    order = np.lexsort((first, second))
    pairs = pa.table(
        {
            "id_a": pa.array(names[first[order]], pa.string()),
            "id_b": pa.array(names[second[order]], pa.string()),
            "score": pa.array(scores[order], pa.float64()),
            "kind": pa.array(kinds[order], pa.string()),
        }
    )
    return Duplicates(threshold, kept, dropped, pairs, cover.capped)
