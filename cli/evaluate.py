"""`embell evaluate sts`, `embell evaluate retrieval` and `embell evaluate duplicates`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from embell.cli.console import write_json
from embell.cli.options import PATH, ModelOptions, json_option, model_options


@click.group(no_args_is_help=True)
def evaluate() -> None:
    """Measure an encoder on labelled data.

    \b
    embell evaluate sts stsb-test.tsv
    embell evaluate retrieval cranfield/
    embell evaluate duplicates mrpc-test.tsv --choose-on mrpc-train.tsv
    """


@evaluate.command(no_args_is_help=True)
@click.argument("files", metavar="FILE.tsv...", type=PATH, nargs=-1, required=True)
@click.option("--score-field", metavar="F", help="Column of the score.  [default: score, or relatedness]")
@model_options
@json_option
def sts(files: tuple[str, ...], score_field: str | None, model: ModelOptions, as_json: bool) -> None:
    """Spearman correlation (times 100) of cosine and human score.

    Each file is TSV with the columns sentence1, sentence2 and score (or relatedness).
    """
    from embell.engine.evaluation import evaluate_sts

    encoder = model.load()
    results = []
    for file in files:
        result = evaluate_sts(encoder, Path(file), score_field)
        results.append(result)
        if as_json:
            write_json({"dataset": result.dataset, "pairs": result.pairs, "spearman": round(result.spearman, 3)})
        else:
            click.echo(f"{result.dataset:<24}{result.pairs:>7,} pairs   spearman {result.spearman:6.2f}")
    if len(results) > 1 and not as_json:
        click.echo(f"{'mean':<24}{'':>13}   spearman {sum(r.spearman for r in results) / len(results):6.2f}")


@evaluate.command(no_args_is_help=True)
@click.argument("folders", metavar="DIR...", type=PATH, nargs=-1, required=True)
@model_options
@json_option
def retrieval(folders: tuple[str, ...], model: ModelOptions, as_json: bool) -> None:
    """nDCG@10 (linear gain) and recall@100.

    Each folder holds corpus.jsonl, queries.jsonl and qrels.tsv (query-id, corpus-id, score).
    """
    from embell.engine.evaluation import evaluate_retrieval

    encoder = model.load()
    for folder in folders:
        r = evaluate_retrieval(encoder, Path(folder))
        if as_json:
            write_json(
                {"dataset": r.dataset, "documents": r.documents, "queries": r.queries, "ndcg@10": round(r.ndcg_at_10, 4),
                 "recall@100": round(r.recall_at_100, 4), "empty": r.empty}
            )  # fmt: skip
        else:
            click.echo(
                f"{r.dataset:<16}{r.documents:>8,} documents {r.queries:>6,} queries   nDCG@10 {r.ndcg_at_10:.3f}   recall@100 {r.recall_at_100:.3f}"
            )


@evaluate.command(no_args_is_help=True)
@click.argument("files", metavar="FILE.tsv...", type=PATH, nargs=-1, required=True)
@click.option("--choose-on", metavar="FILE.tsv", type=PATH, help="Labelled pairs on which the thresholds are chosen, by F1.")
@click.option("--label-field", metavar="F", help="Column of the label, 1 or 0.  [default: label, or is_duplicate]")
@model_options
@json_option
def duplicates(
    files: tuple[str, ...], choose_on: str | None, label_field: str | None, model: ModelOptions, as_json: bool
) -> None:
    """Precision, recall, F1 and average precision on pairs that are labelled as duplicates or not.

    Each file is TSV with the columns sentence1, sentence2 (or question1, question2) and label. Cosine, Jaccard and containment are measured
    alone, and together as `embell dedup` combines them, with its usual thresholds unless --choose-on finds others.
    """
    from embell.engine.duplicate_evaluation import LabelledScores, choose, evaluate_duplicates
    from embell.engine.pair_list import THRESHOLDS

    encoder = model.load()
    train = LabelledScores.of(encoder, Path(choose_on), label_field) if choose_on else None
    usual = {kind: value for kind, value in THRESHOLDS.items() if kind != "contained"}
    chosen = usual if train is None else choose(train)
    for file in files:
        pairs = LabelledScores.of(encoder, Path(file), label_field)
        results = evaluate_duplicates(pairs, chosen, train)
        if not as_json:
            click.echo(f"{pairs.dataset}: {len(pairs.labels):,} pairs, {int(pairs.labels.sum()):,} of them duplicates")
            click.echo(f"{'':<11}precision  recall     F1   avg. p.   at")
        for kind, at in results.items():
            told: dict[str, Any] = {"thresholds": chosen}
            how = f"     —   {', '.join(f'{name} {value:g}' for name, value in chosen.items())}"
            if kind != "together":
                told = {"threshold": round(at.threshold, 4), "average_precision": round(at.average_precision, 4)}
                how = f"{at.average_precision:>6.3f}   {at.threshold:.3f}"
            if as_json:
                write_json(
                    {"dataset": pairs.dataset, "pairs": len(pairs.labels), "duplicates": int(pairs.labels.sum()), "kind": kind,
                     "precision": round(at.precision, 4), "recall": round(at.recall, 4), "f1": round(at.f1, 4), **told}
                )  # fmt: skip
            else:
                click.echo(f"{kind:<11}{at.precision:>9.3f}{at.recall:>8.3f}{at.f1:>7.3f}   {how}")
