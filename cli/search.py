"""`embell search` and `embell similar`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embell.cli.console import counted, hit_record, note, print_hits, write_json
from embell.cli.options import PATH, ModelOptions, is_text, json_option, model_options

if TYPE_CHECKING:
    from embell.engine import Collection, Hit

_BATCH = 256
"""Questions from stdin that are answered together."""


@click.command(no_args_is_help=True)
@click.argument("directory", metavar="DIR", type=PATH)
@click.argument("question", metavar="[QUESTION]", required=False)
@click.option("-k", "k", type=click.IntRange(1), default=10, show_default=True, help="Number of hits.")
@click.option("--where", metavar="EXPR", help="Condition on metadata, in SQL: \"year > 2000 AND topic = 'x'\".")
@click.option("--offset", type=click.IntRange(0), default=0, help="Skip the first hits.")
@click.option("--min-score", type=float, help="Leave out hits below this cosine.")
@click.option("--chunks", is_flag=True, help="Show every chunk that matches, not only each document's best.")
@model_options
@json_option
def search(
    directory: str,
    question: str | None,
    k: int,
    where: str | None,
    offset: int,
    min_score: float | None,
    chunks: bool,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Search a collection by meaning.

    Without a question, asks for one after the other; with -, reads a question a line from stdin.

    \b
    embell search notes.embell "what did we decide about backups"
    embell search papers.embell "heat transfer" -k 3 --where "year > 2000" --json
    """
    from embell.engine.manifest import Manifest

    Manifest.read(Path(directory))  # before torch is loaded: a wrong path is told at once
    from embell.engine.collection import Collection
    from embell.engine.encoder import EncodeReport

    collection = Collection.open(directory, model.for_collection(directory))

    def answer(questions: list[str]) -> None:
        counts = EncodeReport()
        vectors = collection.encoder.encode(questions, "query", report=counts)
        if counts.truncated:
            note(f"{counted(counts.truncated, 'question')} cut at {collection.encoder.spec.max_length} tokens")
        found = collection.search(vectors, k, where=where, offset=offset, min_score=min_score, chunks=chunks)
        for asked, hits in zip(questions, found, strict=True):
            _show(asked, hits, as_json, offset, several=question == "-")

    if question == "-":
        batch: list[str] = []
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                asked = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise click.UsageError(f"line {number} of stdin is not UTF-8") from error
            if asked.strip():
                batch.append(asked)
            if len(batch) == _BATCH:
                answer(batch)
                batch = []
        if batch:
            answer(batch)
    elif question is None:
        _converse(collection, answer)
    else:
        if not question.strip():
            raise click.UsageError("the question is empty")
        if not is_text(question):
            raise click.UsageError(f"the question is not UTF-8: {question!r}")
        answer([question])


def _converse(collection: Collection, answer: Any) -> None:
    """Ask for questions until the end of input."""
    from embell.errors import UsageError

    note(f"{len(collection):,} rows in {collection.path}. Ask away; an empty line or Ctrl-D ends.")
    _ = collection.encoder  # load it before the first question, not after
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input)
    while True:
        try:
            asked = input("? " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not asked:
            break
        try:
            answer([asked])
        except UsageError as error:
            note(str(error))


def _show(asked: str, hits: list[Hit], as_json: bool, offset: int, several: bool) -> None:
    if as_json:
        for rank, hit in enumerate(hits, offset + 1):
            write_json({"query": asked, "rank": rank, **hit_record(hit)})
        return
    if several:
        click.echo(f"\n{asked}")
    print_hits(hits, offset)


@click.command(no_args_is_help=True)
@click.argument("directory", metavar="DIR", type=PATH)
@click.argument("identity", metavar="ID")
@click.option("-k", "k", type=click.IntRange(1), default=10, show_default=True, help="Number of hits.")
@click.option("--where", metavar="EXPR", help="Condition on metadata, in SQL.")
@click.option("--min-score", type=float, help="Leave out hits below this cosine.")
@json_option
def similar(directory: str, identity: str, k: int, where: str | None, min_score: float | None, as_json: bool) -> None:
    """Find the documents nearest to one of the collection.

    \b
    embell similar corpus.embell doc-17 -k 5
    """
    from embell.engine.collection import Collection

    hits = Collection.open(directory).similar(identity, k, where=where, min_score=min_score)
    if as_json:
        for rank, hit in enumerate(hits, 1):
            write_json({"query": identity, "rank": rank, **hit_record(hit)})
    else:
        print_hits(hits, 0)
