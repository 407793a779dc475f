"""`embell outliers` and `embell representatives`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embell.cli.compared_corpus import opened
from embell.cli.console import compared, hit_record, note, print_hits, write_json
from embell.cli.options import PATH, ModelOptions, corpus_options, json_option, model_options

if TYPE_CHECKING:
    from embell.engine import Collection, Hit
    from embell.indexers.corpora import CorpusOptions


@click.command(no_args_is_help=True)
@click.argument("sources", metavar="SOURCE_OR_DIR...", type=PATH, nargs=-1, required=True)
@click.option("-k", "k", type=click.IntRange(1), default=10, show_default=True, help="Number of documents.")
@corpus_options
@model_options
@json_option
def outliers(sources: tuple[str, ...], k: int, corpus: CorpusOptions, model: ModelOptions, as_json: bool) -> None:
    """Show the documents that resemble others least: what does not belong, is broken, or is rare.

    The score is the mean cosine with the 50 nearest other documents.

    \b
    embell outliers notes.embell
    embell outliers corpus.jsonl -k 100 --json
    """
    with ExitStack() as stack:
        collection = _opened(stack, sources, corpus, model)
        with compared("Comparing") as step:
            found = collection.outliers(k, progress=step)
        _show(found, as_json)
    if not as_json:
        note("score: mean cosine with the 50 nearest others")


@click.command(no_args_is_help=True)
@click.argument("sources", metavar="SOURCE_OR_DIR...", type=PATH, nargs=-1, required=True)
@click.option("-k", "k", type=click.IntRange(1), default=10, show_default=True, help="Number of documents.")
@corpus_options
@model_options
@json_option
def representatives(sources: tuple[str, ...], k: int, corpus: CorpusOptions, model: ModelOptions, as_json: bool) -> None:
    """Show a few documents that stand for the whole corpus: each from the middle of one of its subjects.

    The score is the share of all documents that are nearer to this one than to the others shown.

    \b
    embell representatives notes.embell -k 20
    embell representatives corpus.jsonl --json
    """
    from embell.indexers.faiss_index import load_faiss

    load_faiss()  # what is missing is told before anything is encoded
    with ExitStack() as stack:
        _show(_opened(stack, sources, corpus, model).representatives(k), as_json)
    if not as_json:
        note("score: share of the documents that it stands for")


def _opened(stack: ExitStack, sources: tuple[str, ...], corpus: CorpusOptions, model: ModelOptions) -> Collection:
    from embell.indexers.corpora import CorpusReport

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embell-")))
    return opened(stack, folder / "corpus.embell", sources, corpus, model, model.load, CorpusReport(), None, {})[0]


def _show(found: list[Hit], as_json: bool) -> None:
    if not as_json:
        print_hits(found)
    for rank, hit in enumerate(found, 1):
        if as_json:
            write_json({"rank": rank, **hit_record(hit)})
