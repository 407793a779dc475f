"""`embell dedup`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from embell.cli.console import counted, json_value, note, progress, snippet, write_json
from embell.cli.options import ModelOptions, corpus_options, json_option, model_options
from embell.cli.outputs import check_outputs, whole_file

if TYPE_CHECKING:
    from embell.engine import Collection, Duplicates
    from embell.engine.duplicates import Dropped
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
    """Find near-duplicates: texts that agree but for case and spacing, and texts whose vectors nearly do.

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
    check_outputs(output=output, removed=removed, pairs=pairs)
    for path in (output, removed, pairs):
        if path not in (None, "-") and any(os.path.realpath(source) == os.path.realpath(path) for source in sources):
            raise click.UsageError(f"{path} is the source and would be overwritten; name another file")
    if pairs == "-":
        raise click.UsageError("--pairs needs a file: Parquet does not go to stdout")
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
        _write(found, records, collection, output, removed, pairs)
        shown = [] if as_json or output or removed or pairs else found.dropped[:10]
        _tell(found, report, shown, _texts(collection, shown), time.monotonic() - began, as_json, "-" in (output, removed))


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
        done = collection.add(bare(), progress=step, on_warning=note)
    if report.empty:
        note(f"without text, so not compared but kept: {counted(report.empty, 'row')}, the first is {report.first_empty}")
    if report.rejected:
        note(f"cannot be read, so not compared but kept: {counted(report.rejected, 'row')}, the first: {report.first_rejected}")
    if done.truncated:
        note(
            f"{counted(done.truncated, 'document')} longer than {collection.encoder.spec.max_length} tokens: compared by the beginning"
        )
    if done.chunked:
        note(
            f"{counted(done.chunked, 'document')} longer than {collection.encoder.spec.max_length} tokens: compared by the mean of their pieces"
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
    """Each row of the source as `(id, line)`; those that cannot be compared (without text, rejected) have the id ""."""
    import orjson

    from embell.errors import CorpusError
    from embell.indexers.corpora import CorpusReport, read_rows, to_document

    if stdin is not None:
        stdin.seek(0)
    rejected: list[bytes] = []

    def keep(message: str, raw: bytes | None) -> None:
        if raw is not None:
            rejected.append(raw)

    for row in read_rows(sources, corpus, CorpusReport(), keep, stdin=stdin):
        for line in rejected:
            yield "", line
        rejected.clear()
        line = row.raw if row.raw is not None else orjson.dumps(row.fields, default=json_value)
        try:
            document = to_document(row, corpus)
        except CorpusError:
            if not corpus.keep_going:
                raise
            document = None
        yield "" if document is None else document.id, line
    for line in rejected:
        yield "", line


def _collection_rows(collection: Collection) -> Iterator[tuple[str, bytes]]:
    import orjson

    names = ["id", "text", *collection.store.metadata_types]
    for row in collection.store.scan(names):
        yield row["id"], orjson.dumps({name: value for name, value in row.items() if value is not None}, default=json_value)


def _texts(collection: Collection, dropped: Sequence[Dropped]) -> dict[str, str]:
    """Texts of these dropped rows and of those they were dropped for."""
    ids = {row.id for row in dropped} | {row.kept_id for row in dropped}
    return {row["id"]: row["text"] for row in collection.store.rows_of(sorted(ids), ["id", "text"])}


def _write(
    found: Duplicates,
    records: Callable[[], Iterable[tuple[str, bytes]]],
    collection: Collection,
    output: str | None,
    removed: str | None,
    pairs: str | None,
) -> None:
    """Write what was asked for."""
    if output:
        dropped = {row.id for row in found.dropped}
        with whole_file(output) as file:
            for identity, line in records():
                if not identity or identity not in dropped:
                    file.write(line.decode("utf-8", "replace") + "\n")
    if removed:
        with whole_file(removed) as file:
            for begin in range(0, len(found.dropped), 2000):
                some = found.dropped[begin : begin + 2000]
                texts = _texts(collection, some)
                for row in some:
                    write_json({**asdict(row), "text": texts[row.id]}, file)
    if pairs:
        import pyarrow.parquet

        # The threshold is the list's floor: below it nothing was looked for.
        table = found.pairs.replace_schema_metadata({"embell.threshold": str(found.threshold)})
        with whole_file(pairs, "wb") as file:
            pyarrow.parquet.write_table(table, file)


def _tell(
    found: Duplicates,
    report: CorpusReport,
    shown: Sequence[Dropped],
    texts: dict[str, str],
    seconds: float,
    as_json: bool,
    stdout_taken: bool,
) -> None:
    exact = sum(row.kind == "exact" for row in found.dropped)
    semantic = len(found.dropped) - exact
    documents = len(found.kept) + len(found.dropped)
    if found.capped:
        note(f"{counted(found.capped, 'row')} with more than 1,000 partners: only the link to the kept row is in the pair list")
    if as_json:
        summary = {
            "documents": documents,
            "kept": len(found.kept),
            "dropped": len(found.dropped),
            "exact": exact,
            "semantic": semantic,
            "pairs": found.pairs.num_rows,
            "capped": found.capped,
            "threshold": found.threshold,
            "empty": report.empty,
            "rejected": report.rejected,
            "seconds": round(seconds, 3),
        }
        write_json(summary, sys.stderr if stdout_taken else None)
        return
    for row in shown:
        click.echo(f"{row.score:.3f} {row.kind:<9}{row.id}: {snippet(texts[row.id], 90)}")
        click.echo(f"      kept     {row.kept_id}: {snippet(texts[row.kept_id], 90)}")
    if shown and len(found.dropped) > len(shown):
        click.echo(f"… and {len(found.dropped) - len(shown):,} more; --removed FILE.jsonl writes them all")
    note(
        f"{counted(documents, 'document')}: {len(found.kept):,} kept, {len(found.dropped):,} dropped "
        f"({exact:,} exact, {semantic:,} at cosine {found.threshold} or more; {seconds:.1f} s)"
    )
