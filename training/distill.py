"""Distillation: a student learns the vectors of a larger encoder, or the pair scores of a cross-encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import LlamaModel

from embell.engine import backbone
from embell.errors import UsageError
from embell.training import losses
from embell.training.batches import Batches, Examples, plan_batches
from embell.training.fresh import ShapeOptions, fresh_student
from embell.training.nesting import NestingOptions
from embell.training.pairs import read_groups, read_scored, read_sentence_pairs
from embell.training.recipe import refuse, to_toml
from embell.training.run import RunOptions, train
from embell.training.run_directory import begin, finish, last_checkpoint, mark_of
from embell.training.scores import require, scorer
from embell.training.student import EncoderOptions, LoraOptions, Student
from embell.training.teacher import CrossEncoder, Teacher
from embell.training.texts import TokenisedTexts
from embell.training.vocabulary import train_tokenizer

NEW = "new"
_WEIGHTS = ("cosine_weight", "similarity_weight", "near_weight")
DEPTH_WEIGHT, WIDTH_WEIGHT = 0.4, 0.3
"""What an early exit, and a narrower vector, count beside the whole one."""


def distill(
    data: tuple[Path, ...],
    output: Path,
    model: str | None = None,
    teacher: str | None = None,
    teacher_length: int | None = None,
    principal: bool = False,
    aligned: bool = False,
    text: str | None = None,
    cosine_weight: float = 5.0,
    similarity_weight: float = 1.0,
    near_weight: float = 0.0,
    fit_steps: int = 300,
    phrases: int = 0,
    temperature: float = 0.05,
    cross_encoder: str | None = None,
    first: str | None = None,
    second: str | None = None,
    score: str | None = None,
    evaluate: tuple[Path, ...] = (),
    encoder: EncoderOptions = EncoderOptions(),  # noqa: B008
    shape: ShapeOptions = ShapeOptions(),  # noqa: B008
    lora: LoraOptions = LoraOptions(),  # noqa: B008
    nesting: NestingOptions = NestingOptions(),  # noqa: B008
    run: RunOptions = RunOptions(),  # noqa: B008
) -> Path:
    """Teach a student what a teacher knows.

    With a teacher, an encoder: cosine_weight × (1 − cosine to the teacher's vector) + similarity_weight × the divergence between
    the two views of the batch, the rows of in-batch similarities, + near_weight × the mean squared error of the cosines of texts that the
    teacher finds near each other. A row of the data may hold several texts ("texts": a
    list) that are to meet in a batch, such as a title and its article: relations between texts are learnt where the texts meet.

    With a cross-encoder, or a column of scores from one: the squared error of cosines to its scores (DSE, AAAI 2020,
    with the cosine as head), which are brought to 0 … 1.

    Args:
        data: files with a column of texts, or with pairs of sentences for a cross-encoder; JSONL, CSV, TSV or Parquet
        output: directory of the run
        model: directory or hub id of a decoder, an encoder or an adapter; "new" makes a small decoder; default: the embedded model
        teacher: directory or hub id of the encoder to learn from
        teacher_length: tokens that the teacher reads at a time; it averages the pieces of longer texts; default: it cuts them
        principal: learn the teacher's vectors turned to their principal axes: leading components then carry the most, and a narrower
            student learns those
        aligned: learn the teacher's vectors turned to where the student's are already; for a student that has learnt with `principal` before
        text: column of the texts; default: text, texts, sentence or content
        cosine_weight: weight of the cosine to the teacher's vector; 0 where the widths differ
        similarity_weight: weight of the divergence between in-batch similarities
        near_weight: weight of the squared error of cosines between texts that the teacher finds near
        fit_steps: steps in which the token table of a "new" model is fitted to the teacher before its layers are trained
        phrases: tokens of a "new" model's vocabulary that join neighbouring tokens, across words too
        temperature: in-batch cosines are divided by it
        cross_encoder: directory or hub id of a sequence classifier with one output, to score the pairs
        first: column of the first sentences; default: sentence1, text1, premise or query
        second: column of the second sentences; default: sentence2, text2, hypothesis or document
        score: column of the cross-encoder's scores, where they are there already
        evaluate: TSV files of scored pairs, and retrieval folders, to be measured while it trains
        encoder: how the model encodes
        shape: the shape of a new decoder
        lora: the adapter, if there is to be one
        nesting: which smaller vectors are trained too
        run: how long and how fast

    Raises UsageError for settings that contradict each other, CorpusError for data that cannot be used, EncoderError for a
    model that cannot.
    """
    if teacher is None and cross_encoder is None and score is None:
        raise UsageError("give what to learn from: --teacher, --cross-encoder, or the --score column of one")
    if teacher is not None and (cross_encoder is not None or score is not None):
        raise UsageError("give a teacher or a cross-encoder (or its scores), not both")
    if temperature <= 0:
        raise UsageError(f"temperature must be more than 0, not {temperature}")
    for name, weight in zip(_WEIGHTS, (cosine_weight, similarity_weight, near_weight), strict=True):
        if weight < 0:
            raise UsageError(f"{name} cannot be negative, as {weight} is")
    if not cosine_weight + similarity_weight + near_weight:
        raise UsageError(f"nothing would be learnt: one of {', '.join(_WEIGHTS)} must be more than 0")
    if model == NEW and teacher is None:
        raise UsageError('a "new" model starts from a teacher\'s vectors of its tokens; give a --teacher')
    if aligned and (principal or model == NEW):
        raise UsageError("--aligned is for a student that has its axes already: without --principal, and not for --model new")
    if not 0 <= phrases <= max(0, shape.vocabulary - 258):
        raise UsageError(
            f"phrases must be from 0 to {max(0, shape.vocabulary - 258)}, the --vocabulary less 258 other tokens, not {phrases}"
        )
    if phrases and not fit_steps:
        raise UsageError("--phrases are chosen by a fitted token table; give --fit-steps more than 0")
    if fit_steps < 0:
        raise UsageError(f"fit_steps cannot be negative, as {fit_steps} is")
    if model != NEW:
        refuse(
            distill, locals(), [*(field.name for field in fields(ShapeOptions)), "fit_steps", "phrases"], "without --model new"
        )
    if teacher is None:
        refuse(
            distill, locals(), (*_WEIGHTS, "teacher_length", "principal", "aligned", "text", "temperature"), "without --teacher"
        )
    else:
        refuse(distill, locals(), ("first", "second"), "with --teacher, whose texts are in one column")
    if cross_encoder is not None:
        refuse(distill, locals(), ("score",), "with --cross-encoder, which gives the scores")
    lora.check(run)
    require(evaluate, run)
    run.start(encoder.device)
    with begin(output, to_toml(distill, locals()), data) as finished:
        if finished:
            return finished
        if teacher is None:
            return _from_scores(data, output, model, cross_encoder, first, second, score, evaluate, encoder, lora, nesting, run)

        width = _tried(shape, encoder, nesting, lora) if model == NEW and PartialState().is_main_process else None
        groups = read_groups(data, text)
        texts = [one for group in groups for one in group]
        begins = torch.tensor([0, *map(len, groups)]).cumsum(0).tolist()
        numbers: dict[str, int] = {}  # a text that comes again has the same vector
        places = [numbers.setdefault(one, len(numbers)) for one in texts]
        distinct = list(numbers)
        begun = last_checkpoint(output) is not None
        alone = PartialState().main_process_first  # the others find what the first has made
        with alone():
            source = Teacher(
                teacher, teacher_length, output / "teacher", distinct, principal, run.frozen_dtype, begun, run.frozen_device
            )

        def check(dim: int) -> None:
            if cosine_weight and dim != source.dim and not ((principal or aligned) and dim < source.dim):
                raise UsageError(
                    f"the student's vectors have {dim} components and the teacher's {source.dim}: only their similarities can be learnt; "
                    "give --cosine-weight 0"
                    + (
                        ", --principal to learn the teacher's leading components, or --aligned for a student that has learnt them before, as embell-mini has"
                        if dim < source.dim
                        else ""
                    )
                )

        if width is not None:
            check(width)
        start = model
        if model == NEW:
            with alone():
                start = fresh_student(shape, source, distinct, output / "student", run.seed, fit_steps, phrases)
        student = Student(encoder.load(start), nesting.depths, lora)
        nesting.check(student.encoder.dim)
        dim = student.encoder.dim
        check(dim)
        if aligned:
            with alone():
                source.turn_towards(student.encoder)
        tokens = TokenisedTexts(student.encoder)

        def make(rows: Sequence[int]) -> Examples:
            chosen = [at for row in rows for at in range(begins[row], begins[row + 1])]
            return Examples(
                [tokens([texts[at] for at in chosen], "document")], {"teacher": source([places[at] for at in chosen])}
            )

        def loss(deep: list[Tensor], shallow: dict[int, list[Tensor]], targets: dict[str, Tensor]) -> Tensor:
            """Slices learn similarities alone: their cosine to the teacher's slice is part of that of the whole."""
            view = losses.batch_view(targets["teacher"], temperature)

            def one(vectors: Tensor, whole: bool) -> Tensor:
                found = similarity_weight * losses.to_similarities(vectors, view, temperature)
                if whole and cosine_weight:
                    found = found + cosine_weight * losses.to_teacher(vectors, targets["teacher"][:, :dim])
                if near_weight:
                    found = found + near_weight * losses.to_near_cosines(vectors, targets["teacher"])
                return found

            at_depths = [deep[0], *(vectors[0] for vectors in shallow.values())]
            total = one(deep[0], True)
            for vectors in at_depths[1:]:
                total = total + DEPTH_WEIGHT * one(vectors, True)
            for width in nesting.widths:
                total = total + WIDTH_WEIGHT * one(deep[0][:, :width], False)
            return total

        plan = plan_batches(groups, run.batch, run.epochs, run.seed)
        made_of = {"model": mark_of(student.encoder), "teacher": source.made_of}
        train(student, Batches(plan, make), loss, output, run, made_of, scorer(student, evaluate))
        return finish(output, student.finish)


def _tried(shape: ShapeOptions, encoder: EncoderOptions, nesting: NestingOptions, lora: LoraOptions) -> int:
    """The width of a new student's vectors, from a thin one of as many layers: a wrong setting is told now, and not after the table is fitted.

    Raises UsageError or EncoderError as the student itself would.
    """
    shape.config()
    thin = replace(shape, hidden=2 * shape.heads, inner=2, vocabulary=300)
    with TemporaryDirectory() as folder, backbone.quietly(), torch.random.fork_rng(devices=[]):
        train_tokenizer(["a"], thin.vocabulary, thin.positions).save_pretrained(folder)
        LlamaModel(thin.config()).save_pretrained(folder)
        student = Student(encoder.load(folder), nesting.depths, lora)
    width = student.encoder.dim // thin.hidden * shape.hidden
    nesting.check(width)
    return width


def _from_scores(
    data: tuple[Path, ...], output: Path, model: str | None, cross_encoder: str | None, first: str | None, second: str | None,
    score: str | None, evaluate: tuple[Path, ...], encoder: EncoderOptions, lora: LoraOptions, nesting: NestingOptions, run: RunOptions,
) -> Path:  # fmt: skip
    if cross_encoder is None:
        pairs = read_scored(data, first, second, score)
        low, high = min(pairs.scores), max(pairs.scores)
        scores = [(value - low) / (high - low) for value in pairs.scores]
        judge = None
    else:
        pairs, scores, judge = read_sentence_pairs(data, first, second), [], CrossEncoder(cross_encoder)
    student = Student(encoder.load(model), nesting.depths, lora)
    nesting.check(student.encoder.dim)
    tokens = TokenisedTexts(student.encoder)

    def make(rows: Sequence[int]) -> Examples:
        one, other = ([part[row] for row in rows] for part in (pairs.first, pairs.second))
        judged = torch.tensor([scores[row] for row in rows]) if judge is None else judge(one, other)
        return Examples([tokens(one, "document"), tokens(other, "document")], {"scores": judged})

    def loss(deep: list[Tensor], shallow: dict[int, list[Tensor]], targets: dict[str, Tensor]) -> Tensor:
        def one(vectors: list[Tensor]) -> Tensor:
            return losses.to_scores(torch.cosine_similarity(vectors[0], vectors[1]), targets["scores"])

        return losses.nested(one, deep, shallow, nesting.widths)

    plan = plan_batches([()] * len(pairs.first), run.batch, run.epochs, run.seed)
    made_of = {"model": mark_of(student.encoder)}
    if judge is not None:
        made_of["cross-encoder"] = judge.mark
    train(student, Batches(plan, make), loss, output, run, made_of, scorer(student, evaluate))
    return finish(output, student.finish)
