"""Scores of an encoder in training, on labelled pairs and on judged queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from embell.engine.evaluation import evaluate_retrieval, evaluate_sts
from embell.errors import CorpusError, UsageError
from embell.training.run import RunOptions
from embell.training.student import Student


def require(sets: Sequence[Path], run: RunOptions) -> None:
    """Raises CorpusError for a set that does not exist, UsageError if there is none and it is to be measured on every so many steps."""
    if run.evaluate_every and not sets:
        raise UsageError("--evaluate-every has no effect without --evaluate; leave it out, or name a set")
    for path in sets:
        if not path.exists():
            raise CorpusError(f"{path}: no such file or folder to evaluate on")


def scorer(student: Student, sets: Sequence[Path]) -> Callable[[], dict[str, float]] | None:
    """A function that measures the student as it is: Spearman × 100 on TSV files, nDCG@10 × 100 on retrieval folders.

    None without `sets`.
    """
    if not sets:
        return None

    def measure() -> dict[str, float]:
        training = student.network.training
        student.network.eval()
        found: dict[str, float] = {}
        for path in sets:
            if path.is_dir():
                retrieval = evaluate_retrieval(student.encoder, path)
                name, score = retrieval.dataset, 100 * retrieval.ndcg_at_10
            else:
                sts = evaluate_sts(student.encoder, path)
                name, score = sts.dataset, sts.spearman
            found[str(path) if name in found else name] = score
        student.network.train(training)
        return found

    return measure
