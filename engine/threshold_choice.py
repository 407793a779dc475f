"""Choosing thresholds from pairs that people have judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.errors import UsageError

if TYPE_CHECKING:
    from embell.engine.duplicates import Duplicates

Array = np.ndarray[Any, Any]

FEWEST = 10
"""Decided pairs without which a threshold is a guess."""
_LEVELS = 10


@dataclass(frozen=True)
class Decision:
    """A person's judgement of a pair."""

    id_a: str
    id_b: str
    duplicate: bool


@dataclass(frozen=True)
class Level:
    """What a threshold is worth: precision with the half-width of its 95 % interval, recall, and how many pairs reach it."""

    threshold: float
    precision: float
    margin: float
    recall: float
    pairs: int


@dataclass(frozen=True)
class Choice:
    """The threshold of a kind with the best F1 over the decided pairs of that kind."""

    kind: str
    threshold: float
    precision: float
    recall: float
    f1: float
    decided: int
    levels: list[Level]


@dataclass(frozen=True)
class Scores:
    """Precision, recall, F1 at a threshold, and the average precision over all thresholds."""

    threshold: float
    precision: float
    recall: float
    f1: float
    average_precision: float


def measured(scores: Sequence[float], labels: Sequence[bool], threshold: float) -> Scores:
    """How well "score >= threshold" tells duplicates; `scores` and `labels` line up.

    Average precision is the mean, over the duplicates, of the precision at their rank; equal scores share a rank.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(labels, bool)
    found = values >= threshold
    right = int((found & truth).sum())
    precision = right / int(found.sum()) if found.any() else 0.0
    recall = right / int(truth.sum()) if truth.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    levels, hits, seen = _ranked(values, truth)
    average = float(np.sum(np.diff(hits, prepend=0) * hits / seen) / max(1, truth.sum())) if len(levels) else 0.0
    return Scores(threshold, precision, recall, f1, average)


def best_threshold(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The threshold with the largest F1: halfway between the last score that counts and the next, the larger of equals."""
    values, truth = np.asarray(scores, np.float64), np.asarray(labels, bool)
    levels, hits, seen = _ranked(values, truth)
    if not truth.any():
        return 1.0
    f1 = 2 * hits / (seen + truth.sum())
    at = int(np.argmax(f1))
    return float((levels[at] + levels[at + 1]) / 2) if at + 1 < len(levels) else float(levels[at])


def _ranked(values: Array, truth: Array) -> tuple[Array, Array, Array]:
    """Distinct scores from the largest on, and of the pairs that reach each: the duplicates, and all."""
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order], append=-np.inf))
    return values[order][ends], np.cumsum(truth[order])[ends], ends + 1


def suggest(found: Duplicates, decisions: Sequence[Decision]) -> list[Choice]:
    """For each kind, the threshold that fits the decisions on its pairs best.

    Raises UsageError if fewer than ten of the decided pairs are in the list, or all were decided alike.
    """
    said = {frozenset((one.id_a, one.id_b)): one.duplicate for one in decisions}
    table = found.pairs
    rows = list(zip(*(table[name].to_pylist() for name in ("id_a", "id_b", "score", "kind")), strict=True))
    choices = []
    for kind in (kind for kind in found.thresholds if kind not in ("exact", "overlap")):
        of_kind = [(score, said.get(frozenset((a, b)))) for a, b, score, which in rows if which == kind]
        judged = [(score, label) for score, label in of_kind if label is not None]
        if len(judged) < FEWEST or len({label for _, label in judged}) < 2:
            continue
        scores, labels = [score for score, _ in judged], [bool(label) for _, label in judged]
        best = measured(scores, labels, best_threshold(scores, labels))
        levels = []
        for threshold in np.linspace(found.thresholds[kind], 1.0, _LEVELS, endpoint=False):
            at = measured(scores, labels, float(threshold))
            reached = sum(score >= threshold for score in scores)
            margin = 1.96 * (at.precision * (1 - at.precision) / reached) ** 0.5 if reached else 1.0
            levels.append(
                Level(float(threshold), at.precision, margin, at.recall, sum(score >= threshold for score, _ in of_kind))
            )
        choices.append(Choice(kind, best.threshold, best.precision, best.recall, best.f1, len(judged), levels))
    if not choices:
        raise UsageError(
            f"too few decisions: for a kind's threshold, {FEWEST} of its pairs must be decided, some as duplicates and some not; "
            "look with a lower threshold, and review pairs of all scores"
        )
    return choices
