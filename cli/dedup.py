"""`embell dedup`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click

from embell.cli.console import counted, note, progress, snippet, write_json
from embell.cli.options import ModelOptions, corpus_options, json_option, model_options

if TYPE_CHECKING:
    from embell.engine import Collection, Duplicates
    from embell.indexers.corpora import CorpusOptions, CorpusReport


@click.command(no_args_is_help=True)
@click.argument("sources", metavar="SOURCE_OR_DIR...", nargs=-1, required=True)
@click.option("--threshold", type=float, default=0.9, show_default=True, help="Cosine at which two texts are duplicates.")
@click.option("--output", metavar="FILE.jsonl", help="Write the rows that are kept.")
@click.option("--removed", metavar="FILE.jsonl", help="Write the rows that are dropped, each with the kept one and the score.")
@click.option("--pairs", metavar="FILE.parquet", help="Write every pair of duplicates.")
@corpus_options
@model_options
@json_option
def dedup(
    sources: tuple[str, ...],
    threshold: float,
    output: str | None,
    removed: str | None,
    pairs: str | None,
    corpus: CorpusOptions,
    model: ModelOptions,
    as_json: bool,
) -> None:
    r"""Find near-duplicates: texts that agree but for case and spacing, and texts whose vectors nearly do.

    The first of each kind is kept. No two kept rows are duplicates of each other, and every dropped row names
    a kept one. JSON Lines are written out as they stood; nothing in the source or the collection is changed.

    \b
    embell dedup corpus.jsonl --threshold 0.95 --output kept.jsonl --removed removed.jsonl
    embell dedup notes.embell --pairs pairs.parquet
    """
    import time

    from embell.engine.duplicates import check_threshold
    from embell.engine.manifest import FILE
    from embell.indexers.corpora import CorpusReport

    check_threshold(threshold)
    began = time.monotonic()
    report = CorpusReport()
    with ExitStack() as stack:
        if any(Path(source, FILE).is_file() for source in sources):
            if len(sources) > 1:
                raise click.UsageError("a collection is looked at alone; give one directory, or only sources")
            from embell.engine.collection import Collection

            collection = Collection.open(sources[0])
            records: Callable[[], Iterable[tuple[str, bytes]]] = partial(_collection_rows, collection)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embell-")))
            stdin = _spooled(stack) if "-" in sources else None
            collection = _temporary(folder, sources, corpus, model, report, stdin)
            records = partial(_source_rows, sources, corpus, stdin)
        with progress("Comparing"):
            found = collection.duplicates(threshold)
        texts = {row.id: "" for row in found.dropped}
        if removed or (not as_json and not output):
            texts = _texts(collection, found)
        _write(found, records, texts, output, removed, pairs)
        _tell(found, report, texts, time.monotonic() - began, as_json, quiet=bool(output or removed or pairs))


def _temporary(
    folder: Path,
    sources: tuple[str, ...],
    corpus: CorpusOptions,
    model: ModelOptions,
    report: CorpusReport,
    stdin: BinaryIO | None,
) -> Collection:
    """The sources as a collection that goes away at the end: so a large corpus need not fit into memory."""
    from embell.engine.collection import Collection
    from embell.errors import CorpusError
    from embell.indexers.corpora import read_corpus

    documents = read_corpus(sources, corpus, report, stdin=stdin)
    first = next(documents, None)
    if first is None:
        raise CorpusError(
            f"{', '.join(sources)}: no text in it" + (f" (the first row without is {report.first_empty})" if report.empty else "")
        )
    collection = Collection.create(folder / "dedup.embell", model.load())

    def bare() -> Iterator[Any]:
        from dataclasses import replace

        yield replace(first, metadata={})
        for document in documents:
            yield replace(document, metadata={})

    with progress("Encoding") as step:
        done = collection.add(bare(), progress=step)
    if report.empty:
        note(f"{counted(report.empty, 'row')} without text cannot be compared and stay, the first is {report.first_empty}")
    if report.rejected:
        note(f"{counted(report.rejected, 'row')} rejected, the first: {report.first_rejected}")
    if done.truncated:
        note(
            f"{counted(done.truncated, 'document')} longer than {collection.encoder.spec.max_length} tokens: compared by the beginning"
        )
    return collection


def _spooled(stack: ExitStack) -> BinaryIO:
    """Stdin in a file, because it is read twice."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (the stack closes it)
    stack.enter_context(file)
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.seek(0)
    return file


def _source_rows(sources: tuple[str, ...], corpus: CorpusOptions, stdin: BinaryIO | None) -> Iterator[tuple[str, bytes]]:
    """Each row of the source as `(id, line)`; rows without text have the id ""."""
    import orjson

    from embell.errors import CorpusError
    from embell.indexers.corpora import CorpusReport, read_rows, to_document

    if stdin is not None:
        stdin.seek(0)
    for row in read_rows(sources, corpus, CorpusReport(), stdin=stdin):
        try:
            document = to_document(row, corpus)
        except CorpusError:
            if corpus.keep_going:  # it was reported when it was read first
                continue
            raise
        line = row.raw if row.raw is not None else orjson.dumps(row.fields, default=str)
        yield "" if document is None else document.id, line


def _collection_rows(collection: Collection) -> Iterator[tuple[str, bytes]]:
    import orjson

    names = ["id", "text", *collection.store.metadata_types]
    for row in collection.store.scan(names):
        yield row["id"], orjson.dumps({name: value for name, value in row.items() if value is not None}, default=str)


def _texts(collection: Collection, found: Duplicates) -> dict[str, str]:
    """Texts of the dropped rows and of those they were dropped for."""
    ids = {row.id for row in found.dropped} | {row.kept_id for row in found.dropped}
    return {row["id"]: row["text"] for row in collection.store.rows_of(sorted(ids), ["id", "text"])}


def _write(
    found: Duplicates, records: Callable[[], Iterable[tuple[str, bytes]]], texts: dict[str, str], output: str | None, removed: str | None,
    pairs: str | None,
) -> None:  # fmt: skip
    """Write what was asked for; a file is complete or not there."""
    if output:
        dropped = {row.id for row in found.dropped}
        with _whole(output) as file:
            for identity, line in records():
                if not identity or identity not in dropped:
                    file.write(line.decode() + "\n")
    if removed:
        with _whole(removed) as file:
            for row in found.dropped:
                write_json(
                    {"id": row.id, "kept_id": row.kept_id, "score": row.score, "kind": row.kind, "text": texts[row.id]}, file
                )
    if pairs:
        import pyarrow.parquet

        part = Path(f"{pairs}.part")
        # The threshold is the list's floor: below it nothing was looked for.
        table = found.pairs.replace_schema_metadata({"embell.threshold": str(found.threshold)})
        try:
            pyarrow.parquet.write_table(table, part)
            part.replace(pairs)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _whole(path: str) -> Iterator[TextIO]:
    """A text file that appears under its name only when it is complete; `-` is stdout."""
    if path == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    part = Path(f"{path}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _tell(found: Duplicates, report: CorpusReport, texts: dict[str, str], seconds: float, as_json: bool, quiet: bool) -> None:
    exact = sum(row.kind == "exact" for row in found.dropped)
    if found.capped:
        note(f"{counted(found.capped, 'row')} with more than 1,000 partners: only the link to the kept row is in the pair list")
    summary = {
        "documents": len(found.kept) + len(found.dropped), "kept": len(found.kept), "dropped": len(found.dropped), "exact": exact,
        "semantic": len(found.dropped) - exact, "pairs": found.pairs.num_rows, "capped": found.capped, "threshold": found.threshold,
        "empty": report.empty, "rejected": report.rejected, "seconds": round(seconds, 3),
    }  # fmt: skip
    if as_json:
        write_json(summary)
        return
    if not quiet:
        for row in found.dropped[:10]:
            click.echo(f"{row.score:.3f} {row.kind:<9}{row.id}: {snippet(texts[row.id], 90)}")
            click.echo(f"      kept     {row.kept_id}: {snippet(texts[row.kept_id], 90)}")
        if len(found.dropped) > 10:
            click.echo(f"… and {len(found.dropped) - 10:,} more; --removed FILE.jsonl writes them all")
    note(
        f"{counted(len(found.kept) + len(found.dropped), 'document')}: {len(found.kept):,} kept, {len(found.dropped):,} dropped "
        f"({exact:,} exact, {len(found.dropped) - exact:,} at cosine {found.threshold} or more; {seconds:.1f} s)"
    )
