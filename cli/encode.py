"""`embell encode`."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from embell.cli.console import counted, note, progress, write_json
from embell.cli.options import PATH, ModelOptions, corpus_options, json_option, model_options
from embell.cli.outputs import check_outputs
from embell.errors import CorpusError, EmbellError, TextError

if TYPE_CHECKING:
    from embell.cli.unfinished import Unfinished
    from embell.document import Document
    from embell.engine import Encoder
    from embell.indexers.corpora import CorpusOptions

SUFFIXES = (".npy", ".parquet", ".arrow", ".feather")


@click.command(no_args_is_help=True)
@click.argument("sources", metavar="SOURCE...", type=PATH, nargs=-1, required=True)
@click.option(
    "--output",
    metavar="FILE",
    type=PATH,
    required=True,
    help="Where to write the vectors: FILE.npy, .parquet, or .arrow (.feather).",
)
@click.option("--ids", "ids_file", metavar="FILE", type=PATH, help="Write the id of each row here, a line each.")
@click.option(
    "--kind", type=click.Choice(["document", "query"]), default="document", show_default=True, help="Which prompt to use."
)
@click.option("--restart", is_flag=True, help="Begin anew: drop the rows that an earlier run left in FILE.part.")
@corpus_options
@model_options
@json_option
def encode(
    sources: tuple[str, ...],
    output: str,
    ids_file: str | None,
    kind: Literal["document", "query"],
    restart: bool,
    corpus: CorpusOptions,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Encode a corpus to a file of unit vectors, float32, a row a document: NumPy, Parquet or Arrow.

    Parquet and Arrow have columns `id` and `vector`. Rows are kept in FILE.part until all are there:
    stopped or killed at any point, the same command goes on from them.

    \b
    embell encode corpus.jsonl --output corpus.npy --ids corpus.ids
    embell encode corpus.jsonl --output corpus.parquet
    """
    target, suffix = _target(output, ids_file, sources)

    from embell.cli.unfinished import Record, unfinished
    from embell.engine.language import LanguageSample
    from embell.indexers.corpora import CorpusReport, read_corpus

    began = time.monotonic()
    report = CorpusReport()
    with unfinished(target) as part:
        encoder = model.load()
        if corpus.keep_going and encoder.spec.on_long == "error":
            raise click.UsageError(
                "--on-long error stops at the first text that is too long; leave out --keep-going, or cut texts"
            )
        part.begin(Record(encoder.spec, kind, corpus.id_field, corpus.text_fields), restart)
        resumed = part.rows
        if resumed:
            note(f"going on after {counted(resumed, 'row')} in {part.folder}")
        languages = LanguageSample(encoder.spec.languages)

        def read() -> Iterator[Document]:
            for document in read_corpus(sources, corpus, report):
                languages.see(document.text)
                yield document

        documents = read()
        with _kept(part):
            same = part.skip(documents)
        if not same:
            raise CorpusError(
                f"{', '.join(sources)}: no longer begins with the {counted(resumed, 'document')} whose rows are in {part.folder}; "
                "give the same source again, or begin anew with --restart"
            )
        with _kept(part):
            with progress("Encoding") as step:
                step(resumed)
                _encode(documents, encoder, kind, part, step)
            if not part.rows:
                raise CorpusError(f"{', '.join(sources)}: no text to encode")
            part.finish(target, suffix, ids_file)
    seconds = time.monotonic() - began
    done = part.record
    if report.empty:
        hint = "; --ids tells which row is which" if suffix == ".npy" and ids_file is None else ""
        note(f"{counted(report.empty, 'row')} without text skipped, the first is {report.first_empty}{hint}")
    if report.rejected:
        note(f"{counted(report.rejected, 'row')} rejected, the first: {report.first_rejected}")
    if done.truncated:
        note(f"{counted(done.truncated, 'document')} cut at {encoder.spec.max_length} tokens")
    if done.chunked:
        note(f"{counted(done.chunked, 'document')} longer than {encoder.spec.max_length} tokens: encoded in pieces, averaged")
    if warning := languages.warning():
        note(warning)
    if as_json:
        write_json(
            {"documents": done.rows, "resumed": resumed, "tokens": done.tokens, "dim": encoder.dim, "empty": report.empty,
             "rejected": report.rejected, "truncated": done.truncated, "chunked": done.chunked, "seconds": round(seconds, 3)}
        )  # fmt: skip
    else:
        before = f"{resumed:,} of them from before, " if resumed else ""
        click.echo(f"{counted(done.rows, 'document')} in {output}, {encoder.dim} wide ({before}{seconds:.1f} s)")


def _target(output: str, ids_file: str | None, sources: Iterable[str]) -> tuple[Path, str]:
    """The file to write, links followed, and its suffix; a UsageError says what is wrong with it."""
    from embell.indexers.corpora import is_read

    suffix = Path(output).suffix.lower()
    if output == "-":
        raise click.UsageError("--output -: vectors do not go to stdout; name a file")
    if suffix not in SUFFIXES:
        raise click.UsageError(f"--output {output}: the file must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    check_outputs(output=output, ids=ids_file)
    target = Path(os.path.realpath(output) if os.path.islink(output) else output)
    if target.exists() and not target.is_file():
        raise click.UsageError(
            f"--output {output}: a device or a pipe cannot be written again where a run was stopped; name a file"
        )
    for path in (path for path in (output, ids_file) if path is not None and path != "-"):
        for source in (source for source in sources if source != "-" and is_read(path, source)):
            if os.path.realpath(source) == os.path.realpath(path):
                raise click.UsageError(f"{path} is the source and would be overwritten; name another file")
            raise click.UsageError(f"{path}: lies in {source} and would be read as a part of it; name a file elsewhere")
    return target, suffix


def _encode(
    documents: Iterator[Document],
    encoder: Encoder,
    kind: Literal["document", "query"],
    part: Unfinished,
    step: Callable[[int], None],
) -> None:
    """Encode the documents, and make their rows safe every ten seconds or so, however quick the model is."""
    import numpy as np

    from embell.engine.encoder import EncodeReport

    size = 64
    while True:
        began, counts = time.monotonic(), EncodeReport()
        pending: deque[Document] = deque()  # handed to the encoder, without a row yet

        def texts(size: int = size, pending: deque[Document] = pending) -> Iterator[str]:
            for document in islice(documents, size):
                pending.append(document)
                yield document.text

        rows = 0
        try:
            for block in encoder.encode_stream(texts(), kind, report=counts, progress=step):
                odd = np.flatnonzero(~np.isfinite(block).all(axis=1) | ~block.any(axis=1))
                if len(odd):
                    document = pending[odd[0]]
                    raise CorpusError(
                        f"{document.place or f'document {document.id!r}'}: the model gave a vector with NaN or without direction; try --dtype float32"
                    )
                part.append([pending.popleft() for _ in range(len(block))], block)
                rows += len(block)
        except EmbellError as error:
            if rows:  # what came before the fault is safe too
                part.commit(rows, counts)
            if not isinstance(error, TextError):
                raise
            document = pending[error.positions[0] - rows]
            raise CorpusError(f"{document.place or f'document {document.id!r}'}: {error.reason}") from error
        if not rows:
            return
        part.commit(rows, counts)
        taken = time.monotonic() - began
        if taken < 8:
            size *= 2
        elif taken > 24:
            size = max(64, size // 2)


@contextmanager
def _kept(part: Unfinished) -> Iterator[None]:
    """Whatever stops the work, the message says what is kept."""
    try:
        yield
    except BaseException as error:
        kept = f"{counted(part.rows, 'row')} kept in {part.folder}, the same command goes on from there"
        if not part.rows:
            raise
        if isinstance(error, EmbellError):
            raise type(error)(f"{error}; {kept}") from error
        if isinstance(error, KeyboardInterrupt):
            stopped = EmbellError(f"interrupted; {kept}")
            stopped.exit_status = 130
            raise stopped from None
        note(kept)
        raise
