"""Measuring how well duplicates are told from other pairs: precision, recall, F1 and average precision on labelled pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.engine.evaluation import read_pairs
from embell.engine.normalise import normalise
from embell.engine.pair_list import OVERLAP, THRESHOLDS
from embell.engine.pair_search import SHINGLES
from embell.engine.shingles import LexicalSets
from embell.engine.threshold_choice import Scores, best_threshold, measured
from embell.errors import CorpusError

if TYPE_CHECKING:
    from embell.engine.encoder import Encoder

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LabelledScores:
    """Pairs of a file, whether they are duplicates, and what each kind of search scores them; all `(n,)`."""

    dataset: str
    labels: Array
    exact: Array
    scores: dict[str, Array]

    @classmethod
    def of(cls, encoder: Encoder, path: Path, label_field: str | None = None) -> LabelledScores:
        """Score the pairs of a TSV file with `sentence1`, `sentence2` and a label, 1 or 0.

        Raises CorpusError for a file that is something else.
        """
        pairs = read_pairs(path, label_field)
        for line, label in zip(pairs.lines, pairs.gold, strict=True):
            if label not in (0, 1):
                raise CorpusError(f"{path}:{line}: the label is {label:g}; 1 says duplicate, 0 says not")
        texts = pairs.first + pairs.second
        vectors = np.asarray(encoder.encode(texts, "document"), np.float64)
        count = len(pairs.gold)
        sets = LexicalSets.of(texts, SHINGLES)
        one, other = np.arange(count), np.arange(count, 2 * count)
        scores = {
            "semantic": np.einsum("ij,ij->i", vectors[:count], vectors[count:]),
            "lexical": sets.jaccard(one, other),
            "contained": sets.containment(one, other),
        }
        exact = np.array([normalise(a) == normalise(b) for a, b in zip(pairs.first, pairs.second, strict=True)])
        return cls(pairs.dataset, np.array(pairs.gold) > 0, exact, scores)

    def together(self, thresholds: Mapping[str, float]) -> Array:
        """Which pairs count as duplicates with these thresholds, as `deduplicate` decides."""
        found: Array = self.exact.copy()
        for kind in ("lexical", "contained"):
            if kind in thresholds:
                found |= self.scores[kind] >= thresholds[kind]
        if "semantic" in thresholds:
            near = self.scores["semantic"] >= thresholds["semantic"]
            found |= near & (self.scores["contained"] >= thresholds.get(OVERLAP, 0.0))
        return found


def choose(on: LabelledScores) -> dict[str, float]:
    """The thresholds of the three kinds together with the best F1 on labelled pairs, in steps of a hundredth; the larger of equals.

    Found by turns, from cosine and overlap alone and from Jaccard alone: the better of the two.
    """
    steps = np.arange(0.0, 1.0, 0.01)
    duplicates = int(on.labels.sum())

    def f1(found: Array) -> float:
        return 2 * int((found & on.labels).sum()) / max(1, int(found.sum()) + duplicates)

    best, chosen = -1.0, dict(THRESHOLDS)
    for start in (1.0, best_threshold(on.scores["lexical"].tolist(), on.labels.tolist())):
        lexical = start
        for _ in range(2):
            sure = on.exact | (on.scores["lexical"] >= lexical)
            value, semantic, overlap = max(
                (f1(sure | ((on.scores["semantic"] >= one) & (on.scores["contained"] >= other))), one, other)
                for one in steps[40:] for other in steps
            )  # fmt: skip
            both = on.exact | ((on.scores["semantic"] >= semantic) & (on.scores["contained"] >= overlap))
            value, lexical = max((f1(both | (on.scores["lexical"] >= one)), one) for one in [*steps[20:], 1.0])
        if value > best:
            best = value
            chosen = {
                "lexical": round(float(lexical), 2),
                "semantic": round(float(semantic), 2),
                OVERLAP: round(float(overlap), 2),
            }
    return chosen


def evaluate_duplicates(
    on: LabelledScores, thresholds: Mapping[str, float], chosen_on: LabelledScores | None = None
) -> dict[str, Scores]:
    """Scores of each kind alone, and of all together at `thresholds`; average precision of these is not defined, hence NaN.

    Kinds alone are measured at `thresholds` too, or at those that are best on other labelled pairs, `chosen_on`.
    """
    results = {}
    for kind, scores in on.scores.items():
        limit = thresholds.get(kind, THRESHOLDS[kind])
        if chosen_on is not None:
            limit = best_threshold(chosen_on.scores[kind].tolist(), chosen_on.labels.tolist())
        results[kind] = measured(scores.tolist(), on.labels.tolist(), limit)
    together = on.together(thresholds)
    at = measured(together.astype(float).tolist(), on.labels.tolist(), 0.5)
    results["together"] = Scores(float("nan"), at.precision, at.recall, at.f1, float("nan"))
    return results
