"""Training on graded pairs: cosines are to stand in the order of human scores (CoSENT, AnglE)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from embell.errors import UsageError
from embell.training import losses
from embell.training.batches import Batches, Examples, plan_batches
from embell.training.nesting import NestingOptions
from embell.training.pairs import read_scored
from embell.training.recipe import to_toml
from embell.training.run import RunOptions, train
from embell.training.run_directory import begin, finish, mark_of
from embell.training.scores import require, scorer
from embell.training.student import EncoderOptions, LoraOptions, Student
from embell.training.texts import TokenisedTexts


def graded(
    data: tuple[Path, ...],
    output: Path,
    model: str | None = None,
    first: str | None = None,
    second: str | None = None,
    score: str | None = None,
    tau: float = 20.0,
    angle_weight: float = 0.0,
    evaluate: tuple[Path, ...] = (),
    encoder: EncoderOptions = EncoderOptions(),  # noqa: B008
    lora: LoraOptions = LoraOptions(),  # noqa: B008
    nesting: NestingOptions = NestingOptions(),  # noqa: B008
    run: RunOptions = RunOptions(),  # noqa: B008
) -> Path:
    """Train on pairs of sentences with a score of how alike they are.

    The loss is CoSENT's: for any two pairs of a batch, the one with the higher score is to have the higher cosine. AnglE's
    term in complex space can be added (Li and Li, AnglE, ACL 2024).

    Args:
        data: files with two columns of sentences and one of scores in any unit; JSONL, CSV, TSV or Parquet
        output: directory of the run
        model: directory or hub id of a decoder, an encoder or an adapter; default: the embedded model
        first: column of the first sentences; default: sentence1, text1, premise or query
        second: column of the second sentences; default: sentence2, text2, hypothesis or document
        score: column of the scores; default: score, relatedness, similarity or label
        tau: factor of the differences of cosines
        angle_weight: weight of AnglE's term
        evaluate: TSV files of scored pairs, and retrieval folders, to be measured while it trains
        encoder: how the model encodes
        lora: the adapter, if there is to be one
        nesting: which smaller vectors are trained too
        run: how long and how fast

    Raises UsageError for settings that contradict each other, CorpusError for data that cannot be used, EncoderError for a
    model that cannot.
    """
    if tau <= 0:
        raise UsageError(f"tau must be more than 0, not {tau}")
    if angle_weight < 0:
        raise UsageError(f"angle_weight cannot be negative, as {angle_weight} is")
    if run.batch < 2:
        raise UsageError("batch must be at least 2: pairs are compared with each other")
    lora.check(run)
    require(evaluate, run)
    run.start(encoder.device)
    with begin(output, to_toml(graded, locals()), data) as finished:
        if finished:
            return finished
        pairs = read_scored(data, first, second, score)
        student = Student(encoder.load(model), nesting.depths, lora)
        nesting.check(student.encoder.dim)
        tokens = TokenisedTexts(student.encoder)

        def make(rows: Sequence[int]) -> Examples:
            columns = [tokens([part[row] for row in rows], "document") for part in (pairs.first, pairs.second)]
            return Examples(columns, {"scores": torch.tensor([pairs.scores[row] for row in rows])})

        def loss(deep: list[Tensor], shallow: dict[int, list[Tensor]], targets: dict[str, Tensor]) -> Tensor:
            def one(vectors: list[Tensor]) -> Tensor:
                return losses.graded(vectors[0], vectors[1], targets["scores"], tau, angle_weight)

            return losses.nested(one, deep, shallow, nesting.widths)

        # A sentence may stand in several pairs of a batch: they are compared by their scores, nothing is a negative.
        plan = plan_batches([()] * len(pairs.scores), run.batch, run.epochs, run.seed)
        made_of = {"model": mark_of(student.encoder)}
        train(student, Batches(plan, make), loss, output, run, made_of, scorer(student, evaluate))
        return finish(output, student.finish)
