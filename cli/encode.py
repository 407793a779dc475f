"""`embell encode`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from embell.cli.console import counted, note, progress, write_json
from embell.cli.options import ModelOptions, corpus_options, json_option, model_options
from embell.cli.outputs import check_outputs, whole_file

if TYPE_CHECKING:
    from embell.indexers.corpora import CorpusOptions


@click.command(no_args_is_help=True)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--output", metavar="FILE.npy", required=True, help="Where to write the vectors: float32, a row a document.")
@click.option("--ids", "ids_file", metavar="FILE", help="Write the id of each row here, a line each.")
@click.option(
    "--kind", type=click.Choice(["document", "query"]), default="document", show_default=True, help="Which prompt to use."
)
@corpus_options
@model_options
@json_option
def encode(
    sources: tuple[str, ...],
    output: str,
    ids_file: str | None,
    kind: str,
    corpus: CorpusOptions,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Encode a corpus to a NumPy file of unit vectors.

    \b
    embell encode corpus.jsonl --output corpus.npy --ids corpus.ids
    """
    import time

    import numpy as np

    from embell.engine.encoder import WINDOW, EncodeReport
    from embell.engine.language import LanguageSample
    from embell.errors import CorpusError, TextError
    from embell.indexers.corpora import CorpusReport, read_corpus

    if not output.endswith(".npy"):
        raise click.UsageError(f"--output {output}: the file must end in .npy")
    report, counts = CorpusReport(), EncodeReport()
    check_outputs(output=output, ids=ids_file)
    encoder = model.load()
    if corpus.keep_going and encoder.spec.on_long == "error":
        raise click.UsageError("--on-long error stops at the first text that is too long; leave out --keep-going, or cut texts")
    languages = LanguageSample(encoder.spec.languages)
    places: deque[str] = deque(maxlen=WINDOW)  # of the texts that are being encoded
    began = time.monotonic()
    header = {"descr": "<f4", "fortran_order": False}
    with ExitStack() as stack:
        file = stack.enter_context(whole_file(output, "wb"))
        names = stack.enter_context(whole_file(ids_file)) if ids_file else None
        step = stack.enter_context(progress("Encoding"))

        def texts() -> Iterator[str]:
            for document in read_corpus(sources, corpus, report):
                if names is not None:
                    names.write(document.id.replace("\n", " ") + "\n")
                languages.see(document.text)
                places.append(document.place or f"document {document.id!r}")
                yield document.text

        # The number of rows stands in the header and is known last; the header's length does not change.
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, encoder.dim)})
        length = file.tell()
        try:
            for block in encoder.encode_stream(texts(), kind, report=counts, progress=step):  # type: ignore[arg-type]
                file.write(block.astype("<f4", copy=False).tobytes())
        except TextError as error:
            raise CorpusError(f"{places[error.positions[0] - counts.texts]}: {error.reason}") from error
        if not counts.texts:
            raise CorpusError(f"{', '.join(sources)}: no text to encode")
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (counts.texts, encoder.dim)})
        assert file.tell() == length
    seconds = time.monotonic() - began
    if report.empty:
        note(
            f"{counted(report.empty, 'row')} without text skipped, the first is {report.first_empty}; --ids tells which row is which"
        )
    if report.rejected:
        note(f"{counted(report.rejected, 'row')} rejected, the first: {report.first_rejected}")
    if counts.truncated:
        note(f"{counted(counts.truncated, 'document')} cut at {encoder.spec.max_length} tokens")
    if counts.chunked:
        note(f"{counted(counts.chunked, 'document')} longer than {encoder.spec.max_length} tokens: encoded in pieces, averaged")
    if warning := languages.warning():
        note(warning)
    if as_json:
        write_json(
            {"documents": counts.texts, "tokens": counts.tokens, "dim": encoder.dim, "empty": report.empty,
             "rejected": report.rejected, "truncated": counts.truncated, "chunked": counts.chunked, "seconds": round(seconds, 3)}
        )  # fmt: skip
    else:
        click.echo(f"{counted(counts.texts, 'document')} in {output}, {encoder.dim} wide ({seconds:.1f} s)")
