"""`embell demo`: the main job, on text that every machine has."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embell.cli.console import counted, note, print_hits, progress, snippet, waiting
from embell.cli.options import PATH, ModelOptions, model_options

if TYPE_CHECKING:
    from embell.engine import Collection

QUESTIONS = (
    "how do I read a CSV file",
    "run a command and get its output",
    "make a copy of an object and everything inside it",
)
_THRESHOLD = 0.95


@click.command()
@click.option("--to", "target", metavar="DIR", type=PATH, help="Where to keep the collection.  [default: demo.embell, here]")
@model_options
def demo(target: str | None, model: ModelOptions) -> None:
    """See it work on the documentation of this machine's own Python.

    Indexes the documentation strings of the standard library, asks three questions, and shows near-duplicates.
    """
    from embell.engine.collection import Collection
    from embell.engine.docstrings import standard_library

    if target is None:
        target = "demo.embell" if os.access(".", os.W_OK) else str(Path(tempfile.gettempdir(), "demo.embell"))
    documents = list(standard_library())
    click.secho(f"Indexing {counted(len(documents), 'documentation string')} of Python's standard library", bold=True)
    encoder = model.load()
    began = time.monotonic()
    collection = Collection.create(target, encoder, exist_ok=True)
    with progress("Encoding") as step:
        done = collection.add(documents, prune=True, progress=step, on_wait=waiting, on_warning=note)
    seconds = time.monotonic() - began
    click.echo(
        f"{done.encoded:,} encoded, {done.unchanged:,} known from an earlier run, in {seconds:.1f} s, with {encoder.spec.backbone}."
    )
    for question in QUESTIONS:
        click.secho(f"\n{question}?", bold=True)
        print_hits(collection.search(question, 6))
    _show_duplicates(collection)
    here = "embell" if os.environ.get("VIRTUAL_ENV") or not Path(".venv/bin/embell").exists() else ".venv/bin/embell"
    click.secho("\nThe same with your own files", bold=True)
    for command, what in (
        (f'{here} search {target} "parse command line arguments"', "ask this collection more"),
        (f"{here} index FOLDER_OR_FILE --to mine.embell", "text, Markdown, CSV, JSON Lines, Parquet"),
        (f'{here} search mine.embell "…"', "by meaning; without a question, a prompt"),
        (f"{here} dedup FILE.jsonl --output kept.jsonl", "drop near-duplicates"),
    ):
        click.echo(f"  {command}")
        click.secho(f"      {what}", dim=True)


def _show_duplicates(collection: Collection) -> None:
    found = collection.duplicates(_THRESHOLD)
    exact = sum(row.kind == "exact" for row in found.dropped)
    click.secho(
        f"\nNear-duplicates: {len(found.dropped):,} of {counted(len(found.kept) + len(found.dropped), 'text')} repeat another "
        f"({exact:,} to the letter, {len(found.dropped) - exact:,} at cosine {_THRESHOLD} or more)", bold=True,
    )  # fmt: skip
    one_a_module = {row.id.split(".")[0]: row for row in sorted(found.dropped, key=lambda row: row.score)}
    shown = sorted(one_a_module.values(), key=lambda row: -row.score)[:4]
    ids = sorted({row.id for row in shown} | {row.kept_id for row in shown})
    texts: dict[str, Any] = {row["id"]: row["text"] for row in collection.store.rows_of(ids, ["id", "text"])}
    for row in shown:
        click.echo(f"  {row.score:.3f}  {snippet(texts[row.kept_id], 70)}")
        click.echo(f"         {snippet(texts[row.id], 70)}")
