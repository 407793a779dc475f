"""The documents that a command compares with each other: a collection's, or sources' that are encoded for as long as it takes."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from embell.cli.console import counted, json_value, note, progress
from embell.cli.options import ModelOptions

if TYPE_CHECKING:
    from embell.engine import Collection, Encoder
    from embell.indexers.corpora import CorpusOptions, CorpusReport


def opened(
    stack: ExitStack,
    folder: Path,
    sources: tuple[str, ...],
    corpus: CorpusOptions,
    model: ModelOptions,
    load: Callable[[], Encoder],
    report: CorpusReport,
    fields: set[str] | None,
    weighing: dict[str, float],
    then: str = "",
) -> tuple[Collection, Callable[[], Iterable[tuple[str, bytes]]]]:
    """A collection, or one of these sources, with these fields as metadata (None: all); and its rows as they are to be written.

    Sources are encoded with what `load` loads.
    `then` says what becomes of rows that cannot be compared.
    """
    from embell.engine.manifest import FILE

    if any(Path(source, FILE).is_file() for source in sources):
        if len(sources) > 1:
            raise click.UsageError("a collection is looked at alone; give one directory, or only sources")
        if weighing:
            raise click.UsageError(f"--weight needs a source: the vectors of {sources[0]} are made already")
        if model.given:
            raise click.UsageError(
                f"the vectors of {sources[0]} are made already: leave out --model and its settings, or name a source"
            )
        from embell.engine.collection import Collection

        collection = Collection.open(sources[0])
        return collection, partial(_collection_rows, collection)
    stdin = _spooled(stack) if "-" in sources else None
    return _encoded(folder, sources, corpus, load, report, stdin, fields, weighing, then), partial(
        _source_rows, sources, corpus, stdin
    )


def _encoded(
    folder: Path,
    sources: tuple[str, ...],
    corpus: CorpusOptions,
    load: Callable[[], Encoder],
    report: CorpusReport,
    stdin: BinaryIO | None,
    fields: set[str] | None,
    weighing: dict[str, float],
    then: str,
) -> Collection:
    """The sources as a collection that goes away at the end: so a large corpus need not fit into memory, and nothing is encoded twice."""
    from embell.engine.collection import Collection
    from embell.engine.weighted_fields import weighted_vectors
    from embell.errors import CollectionError, CorpusError
    from embell.indexers.columns import column_name
    from embell.indexers.corpora import read_corpus

    wanted = None if fields is None else {column_name(name) for name in fields}
    corpus = replace(corpus, fields_beside=(*corpus.fields_beside, *(fields or ())))
    documents = read_corpus(sources, corpus, report, stdin=stdin)
    first = next(documents, None)
    if first is None:
        raise CorpusError(
            f"{', '.join(sources)}: no text in it" + (f" (the first row without is {report.first_empty})" if report.empty else "")
        )
    encoder = load()
    if weighing:  # other weights make other vectors
        folder = folder.with_suffix(
            f".{'+'.join(f'{name}={weight:g}' for name, weight in sorted(weighing.items()))}".replace("/", "_")
        )
        made: Callable[[], Collection] = partial(Collection.create, folder, None, dim=len(weighing) * encoder.dim, exist_ok=True)
    else:
        made = partial(Collection.create, folder, encoder, exist_ok=True)
    try:
        collection = made()
        if len(collection):
            note("going on where the last run was stopped")
    except CollectionError:  # of another model
        shutil.rmtree(folder)
        collection = made()

    def bare() -> Iterator[Any]:
        everything = chain([first], documents)
        while some := list(islice(everything, 1000 if weighing else 1)):
            records = [{name: str(document.metadata.get(name) or "") for name in weighing} for document in some]
            vectors = weighted_vectors(encoder, records, weighing) if weighing else [None]
            for document, vector in zip(some, vectors, strict=True):
                kept = {name: value for name, value in document.metadata.items() if wanted is None or column_name(name) in wanted}
                yield replace(document, metadata=kept, vector=vector)

    with progress("Encoding") as step:
        done = collection.add(bare(), prune=True, progress=step, on_warning=note)
    if report.empty:
        note(f"without text, so not compared{then}: {counted(report.empty, 'row')}, the first is {report.first_empty}")
    if report.rejected:
        note(f"cannot be read, so not compared{then}: {counted(report.rejected, 'row')}, the first: {report.first_rejected}")
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
