"""`embell index`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from embell.cli.console import compared, counted, note, progress, waiting, write_json
from embell.cli.options import PATH, ModelOptions, corpus_options, json_option, model_options
from embell.cli.tune import MEMORY_HELP, RECALL_HELP, in_bytes, in_words

if TYPE_CHECKING:
    from embell.document import Document
    from embell.engine import Collection
    from embell.errors import CorpusError, EmbellError
    from embell.indexers.corpora import CorpusOptions, CorpusReport


@click.command(no_args_is_help=True)
@click.argument("sources", metavar="SOURCE...", type=PATH, nargs=-1, required=True)
@click.option("--to", "target", metavar="DIR", type=PATH, required=True, help="The collection; made if it is not there.")
@corpus_options
@click.option(
    "--chunk", metavar="TOKENS", type=click.IntRange(8), help="Split documents into chunks of at most this many tokens."
)
@click.option("--vector-field", metavar="F", help="Field that holds each document's own vector.")
@click.option(
    "--vectors",
    metavar="FILE.npy",
    type=PATH,
    help="The documents' own vectors: a row for each row of the source, or for each with text.",
)
@click.option(
    "--index",
    "kind",
    metavar="KIND",
    help="exact, auto, faiss:FACTORY such as faiss:HNSW32, or lance for more than memory holds.  [default: exact; auto with --recall]",
)
@click.option("--recall", type=float, help=f"{RECALL_HELP} The index is tuned to it, as by embell tune.")
@click.option("--memory", metavar="SIZE", callback=in_bytes, help=f"{MEMORY_HELP} Goes with --recall.")
@click.option("--prune", is_flag=True, help="Delete documents that are no longer in the source.")
@click.option("--rejects", metavar="FILE", type=PATH, help="Write rows that cannot be used to this file (with --keep-going).")
@click.option(
    "--commit-rows", type=click.IntRange(1), default=50_000, show_default=True, help="Commit after this many rows, or a minute."
)
@model_options
@json_option
def index(
    sources: tuple[str, ...],
    target: str,
    corpus: CorpusOptions,
    chunk: int | None,
    vector_field: str | None,
    vectors: str | None,
    kind: str | None,
    recall: float | None,
    memory: int | None,
    prune: bool,
    rejects: str | None,
    commit_rows: int,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Index files, folders, or JSON Lines on stdin (-).

    Reads .jsonl .ndjson .csv .tsv .parquet .txt .md .rst, each also with .gz .xz .zst. Run it again, and only what is
    new or changed is encoded.

    \b
    embell index corpus.jsonl --to corpus.embell
    embell index notes/ reports/ --to notes.embell --chunk 200
    embell index corpus.parquet --to corpus.embell --recall 0.95 --memory 2GB
    """
    from dataclasses import replace

    from embell.errors import CollectionError, UsageError
    from embell.indexers.corpora import CorpusReport, read_corpus
    from embell.indexers.own_vectors import lines_up, with_vectors

    if vectors is not None and vector_field is not None:
        raise UsageError("--vectors and --vector-field exclude each other: the vectors come from one place")
    if rejects is not None and not corpus.keep_going:
        raise UsageError("--rejects goes with --keep-going: without it the first such row stops the command")
    if memory is not None and recall is None:
        raise UsageError("--memory goes with --recall: an index is chosen to be fast at a recall, within a memory")
    if recall is not None and kind == "exact":
        raise UsageError("--index exact finds everything; leave out --recall, or choose --index auto")
    corpus = replace(corpus, vector_field=vector_field)
    own = vectors is not None or vector_field is not None
    report = CorpusReport()
    by_row = True
    if vectors is not None and "-" not in sources:
        counted_rows = CorpusReport()
        with_text = sum(1 for _ in read_corpus(sources, replace(corpus, keep_going=True), counted_rows))
        by_row = lines_up(vectors, counted_rows.rows, with_text)
    with ExitStack() as stack:
        on_reject = None
        if rejects is not None:
            out = stack.enter_context(open(rejects, "w", encoding="utf-8"))

            def on_reject(message: str, raw: bytes | None) -> None:
                write_json({"error": message, "row": None if raw is None else raw.decode("utf-8", "replace")}, out)

        def left_out(error: EmbellError, document: Document) -> None:
            report.rejected += 1
            report.first_rejected = report.first_rejected or str(error)
            if on_reject is not None:
                on_reject(str(error), orjson.dumps({"id": document.id, "text": document.text, **document.metadata}, default=str))

        documents: Iterator[Document] = read_corpus(sources, corpus, report, on_reject)
        if vectors is not None:
            documents = with_vectors(documents, vectors, report, by_row)
        # The first document is read before anything is made, so that a wrong path or field leaves nothing behind.
        first = next(documents, None)
        if first is None:
            raise _nothing(sources, report)
        documents = _again(first, documents)
        from embell.engine.collection import Collection  # now: it loads torch, which the errors above need not wait for
        from embell.engine.manifest import check_promise

        check_promise(recall, memory)
        if Path(target, "manifest.json").is_file():
            collection = Collection.open(target, model.for_collection(target))
            _check_made_so(collection, chunk, own)
            if kind is not None and kind != collection.manifest.index:
                with compared("Building the index") as working:
                    collection.optimize(kind, progress=working, on_note=note)
        else:
            if kind is not None:
                from embell.indexers.vector_index import check_kind

                check_kind(kind)
            encoder = model.load() if not own or model.given else None
            dim = len(first.vector) if first.vector is not None else None
            kind = kind or ("exact" if recall is None else "auto")
            collection = Collection.create(
                target, encoder, dim=dim, chunk=chunk, index=kind, recall=recall, memory=memory, exist_ok=True
            )
        with ExitStack() as bar:
            done = collection.add(
                documents,
                prune=lambda: prune and not report.rejected,
                commit_rows=commit_rows,
                progress=bar.enter_context(progress("Indexing")),
                on_wait=waiting,
                on_warning=note,
                on_note=note,
                on_reject=left_out if corpus.keep_going else None,
                building=_one_after_the_other(bar),
            )
        promised = collection.manifest
        memory = promised.memory if memory is None else memory
        if recall is not None and (recall, memory) != (promised.target, promised.memory):
            with compared("Building the index") as working:
                collection.tune(recall, memory=memory, progress=working, on_note=note)
    if recall is not None:
        note(in_words(collection.manifest))
    if prune and report.rejected:
        raise CollectionError("nothing was pruned, because some rows could not be read; see the rejects")
    _tell(done, report, collection, target, as_json)


def _one_after_the_other(bar: ExitStack) -> Callable[[str, float], None]:
    """What tells of the building of the index: with a bar of its own, which takes the place of the one that is there."""
    steps: list[Callable[[str, float], None]] = []

    def step(stage: str, share: float) -> None:
        if not steps:
            bar.close()
            steps.append(bar.enter_context(compared("Building the index")))
        steps[0](stage, share)

    return step


def _again(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest


def _nothing(sources: tuple[str, ...], report: CorpusReport) -> CorpusError:
    from embell.errors import CorpusError

    named = ", ".join(sources)
    if report.empty:
        return CorpusError(
            f"{named}: no text in any of {counted(report.rows, 'row')} (the first is {report.first_empty}); is --text-field right?"
        )
    if report.rejected:
        return CorpusError(f"{named}: no row can be used; the first: {report.first_rejected}")
    return CorpusError(f"{named}: empty, there is nothing to index")


def _check_made_so(collection: Collection, chunk: int | None, own: bool) -> None:
    from embell.errors import CollectionError

    manifest = collection.manifest
    if chunk is not None and chunk != manifest.chunk:
        made = "whole documents" if manifest.chunk is None else f"chunks of {manifest.chunk} tokens"
        raise CollectionError(f"{collection.path}: holds {made}; leave out --chunk, or index into a new directory")
    if own != manifest.own_vectors:
        raise CollectionError(
            f"{collection.path}: its vectors were given; give them again with --vector-field or --vectors"
            if manifest.own_vectors
            else f"{collection.path}: its vectors come from a model; leave out --vector-field and --vectors, or index into a new directory"
        )


def _tell(done: Any, report: Any, collection: Collection, target: str, as_json: bool) -> None:
    if report.empty:
        note(f"{counted(report.empty, 'row')} without text skipped, the first is {report.first_empty}")
    if report.rejected:
        note(f"{counted(report.rejected, 'row')} rejected, the first: {report.first_rejected}")
    if done.truncated:
        chunked = collection.manifest.chunk is not None
        hint = "" if chunked else "; --chunk 256 indexes all of them"
        longest = collection.encoder.spec.max_length
        note(
            f"{counted(done.truncated, 'chunk' if chunked else 'document')} longer than {longest} tokens: the end is not indexed{hint}"
        )
    if done.chunked:
        note(
            f"{counted(done.chunked, 'document')} longer than {collection.encoder.spec.max_length} tokens: encoded in pieces, averaged"
        )
    if as_json:
        write_json(
            {
                "documents": done.documents, "encoded": done.encoded, "updated": done.updated, "unchanged": done.unchanged,
                "missing": done.missing, "pruned": done.pruned, "empty": report.empty, "rejected": report.rejected,
                "truncated": done.truncated, "chunked": done.chunked, "rows": len(collection), "seconds": round(done.seconds, 3),
            }
        )  # fmt: skip
        return
    parts = [f"{done.encoded:,} {'stored' if collection.manifest.own_vectors else 'encoded'}", f"{done.unchanged:,} unchanged"]
    parts += [f"{done.updated:,} with new metadata"] * bool(done.updated)
    if done.missing:
        parts.append(
            f"{done.pruned:,} pruned"
            if done.pruned
            else f"{done.missing:,} in the collection but not in this source (--prune deletes them)"
        )
    click.echo(f"{counted(done.documents, 'document')} in {target}: {', '.join(parts)} ({done.seconds:.1f} s)")
