"""Contrastive training: what belongs together is drawn together, everything else in the batch is pushed away.

BeLLM's own objective (Li & Li, NAACL 2024): triplets as from NLI, LoRA on all linear layers, a prompt, in-batch and hard
negatives. Works for any pairs: question and answer, title and text, two wordings of one thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from embell.engine import Encoder
from embell.engine.tokens import Kind
from embell.errors import CorpusError, UsageError
from embell.training import losses
from embell.training.batches import Batches, Examples, plan_batches
from embell.training.nesting import NestingOptions
from embell.training.pairs import read_nli, read_triplets
from embell.training.recipe import refuse, to_toml
from embell.training.run import RunOptions, train
from embell.training.run_directory import begin, finish, mark_of
from embell.training.scores import require, scorer
from embell.training.student import EncoderOptions, LoraOptions, Student
from embell.training.texts import TokenisedTexts


def contrastive(
    data: tuple[Path, ...],
    output: Path,
    model: str | None = None,
    query: str | None = None,
    positive: str | None = None,
    negative: str | None = None,
    nli: bool = False,
    temperature: float = 0.05,
    guide: str | None = None,
    mask_above: float | None = None,
    evaluate: tuple[Path, ...] = (),
    encoder: EncoderOptions = EncoderOptions(),  # noqa: B008
    lora: LoraOptions = LoraOptions(),  # noqa: B008
    nesting: NestingOptions = NestingOptions(),  # noqa: B008
    run: RunOptions = RunOptions(),  # noqa: B008
) -> Path:
    """Train on pairs or triplets: a query, what belongs to it, and optionally what seems to and does not.

    The loss is the cross-entropy of finding the positive among all positives and negatives of the batch (SimCSE, Gao et al. 2021,
    supervised). Texts that equal each other never meet in a batch.

    Args:
        data: files with a column of queries and one of positives, perhaps one of negatives; JSONL, CSV, TSV or Parquet
        output: directory of the run
        model: directory or hub id of a decoder, an encoder or an adapter; default: the embedded model
        query: column of the queries; default: query, anchor, question, premise, sentence1, text1 or text
        positive: column of the positives; default: positive, answer, document, passage, entailment, sentence2 or text2
        negative: column of the hard negatives; default: negative, negatives, hard_negative, contradiction or sentence3, if there is one
        nli: the data are premise, hypothesis and label: entailments become positives, contradictions of the same premise negatives
        temperature: cosines are divided by it
        guide: an encoder whose cosines tell false negatives (MultiCSR); needs mask_above
        mask_above: what the guide finds this close to the query is no negative of it
        evaluate: TSV files of scored pairs, and retrieval folders, to be measured while it trains
        encoder: how the model encodes
        lora: the adapter, if there is to be one
        nesting: which smaller vectors are trained too
        run: how long and how fast

    Raises UsageError for settings that contradict each other, CorpusError for data that cannot be used, EncoderError for a
    model that cannot.
    """
    if (guide is None) != (mask_above is None):
        raise UsageError("--guide and --mask-above belong together: an encoder, and the cosine above which nothing is a negative")
    if mask_above is not None and not -1 < mask_above < 1:
        raise UsageError(f"mask_above is a cosine, from above -1 to below 1, not {mask_above}")
    if temperature <= 0:
        raise UsageError(f"temperature must be more than 0, not {temperature}")
    if run.batch < 2:
        raise UsageError("batch must be at least 2: a query needs the positives of others to be told from")
    if nli:
        refuse(
            contrastive,
            locals(),
            ("query", "positive", "negative"),
            "with --nli, whose columns are premise, hypothesis and label",
        )
    lora.check(run)
    require(evaluate, run)
    run.start(encoder.device)
    with begin(output, to_toml(contrastive, locals()), data) as finished:
        if finished:
            return finished
        triplets = read_nli(data) if nli else read_triplets(data, query, positive, negative)
        if len(triplets) < 2:
            raise CorpusError(f"{data[0]}: one pair is not enough, a query needs the positives of others to be told from")
        student = Student(encoder.load(model), nesting.depths, lora)
        nesting.check(student.encoder.dim)
        guard = None if guide is None else Encoder.load(guide, dtype=run.frozen_dtype, device=run.frozen_device)
        tokens = TokenisedTexts(student.encoder)

        def make(rows: Sequence[int]) -> Examples:
            chosen = [triplets[row] for row in rows]
            shared = list(dict.fromkeys(negative for row in chosen for negative in row.negatives))
            columns = [[row.query for row in chosen], [row.positive for row in chosen], shared]
            columns = columns if columns[2] else columns[:2]
            kinds: tuple[Kind, ...] = ("query", "document", "document")
            targets = {}
            if guard is not None and mask_above is not None:
                vectors = [torch.from_numpy(guard.encode(c, k)) for c, k in zip(columns, kinds, strict=False)]
                negatives = vectors[2] if len(vectors) > 2 else None
                targets["masked"] = losses.false_negatives(vectors[0], vectors[1], negatives, mask_above)
            return Examples([tokens(c, k) for c, k in zip(columns, kinds, strict=False)], targets)

        def loss(deep: list[Tensor], shallow: dict[int, list[Tensor]], targets: dict[str, Tensor]) -> Tensor:
            def one(vectors: list[Tensor]) -> Tensor:
                negatives = vectors[2] if len(vectors) > 2 else None
                return losses.contrastive(vectors[0], vectors[1], negatives, temperature, targets.get("masked"))

            return losses.nested(one, deep, shallow, nesting.widths)

        pairs, negatives = [(row.query, row.positive) for row in triplets], [row.negatives for row in triplets]
        plan = plan_batches(pairs, run.batch, run.epochs, run.seed, negatives)
        if all(len(rows) == 1 and not triplets[rows[0]].negatives for rows in plan):
            raise CorpusError(
                f"{data[0]}: all rows share a text, so none can be another's negative; give rows of different texts"
            )
        made_of = {"model": mark_of(student.encoder)}
        if guard is not None:
            made_of["guide"] = mark_of(guard)
        train(student, Batches(plan, make), loss, output, run, made_of, scorer(student, evaluate))
        return finish(output, student.finish)
