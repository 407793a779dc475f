"""Bringing documents into a collection: tell new from known, encode, commit in groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.document import Document
from embell.engine.language import LanguageSample
from embell.engine.seen import Places, SeenIds
from embell.errors import CollectionError, CorpusError, EmbellError, TextError
from embell.indexers.columns import MetadataTypes
from embell.indexers.store import KnownDocuments, StoredRow, hash64, hashes64, metadata_hash

if TYPE_CHECKING:
    from embell.engine.collection import Collection
    from embell.engine.manifest import Manifest
    from embell.indexers.chunking import Chunker

Array = np.ndarray[Any, Any]

_READ = 1024
"""Documents that are read and compared with the table at a time."""
_WINDOW = 8192
"""Texts that are encoded together at most; fewer with a slow model, so that a commit is never far."""


@dataclass
class AddReport:
    """What one `add` did, in documents; `rows` counts what was written (chunks, in a collection of chunks).

    `updated` documents have new metadata and their old vector. `missing` ones are in the collection and
    were not among the documents given; `pruned` says how many of those were deleted.
    """

    documents: int = 0
    encoded: int = 0
    updated: int = 0
    unchanged: int = 0
    missing: int = 0
    pruned: int = 0
    truncated: int = 0
    chunked: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Pending:
    """A document that is to be encoded, with its metadata as column values and its text's hash."""

    document: Document
    metadata: dict[str, Any]
    text_hash: int
    metadata_hash: int
    known: bool


_Piece = tuple[_Pending, str, str, int, int]
"""A document or a chunk of it: its row's id and text, and where it begins and ends in the document."""


class _Writer:
    """The state of one `ingest`."""

    def __init__(
        self,
        collection: Collection,
        commit_rows: int,
        commit_seconds: float,
        progress: Callable[[int], None] | None,
        on_reject: Callable[[EmbellError, Document], None] | None,
        on_warning: Callable[[str], None],
    ) -> None:
        self.collection = collection
        self.store = collection.store
        self.manifest = collection.manifest
        self.commit_rows = commit_rows
        self.commit_seconds = commit_seconds
        self.progress = progress
        self.on_reject = on_reject
        self.on_warning = on_warning
        encoder = self.manifest.encoder
        languages = () if encoder is None or self.manifest.own_vectors else encoder.languages
        self.sample: LanguageSample | None = LanguageSample(languages) if languages else None
        self.report = AddReport()
        self.types = MetadataTypes(self.store.metadata_types)
        self.next_key = self.manifest.next_key
        self.pending: list[_Pending] = []
        self.rows: list[StoredRow] = []
        self.replaced: list[str] = []
        self.changed: dict[str, tuple[dict[str, Any], int]] = {}
        self.window = 256
        self.committed = time.monotonic()
        self.chunker: Chunker | None = None
        if self.manifest.chunk is not None:
            from embell.indexers.chunking import Chunker

            self.chunker = Chunker(collection.encoder.tokens.tokenizer.backend_tokenizer, self.manifest.chunk)

    def take(self, pending: _Pending) -> None:
        self.pending.append(pending)
        if self.sample is not None:
            self.sample.see(pending.document.text)
        if len(self.pending) >= self.window:
            self.encode()

    def heed_language(self) -> None:
        """Warn, once, if most texts are in a language that the model does not know."""
        if self.sample is not None and (warning := self.sample.warning()):
            self.on_warning(warning)
            self.sample = None

    def encode(self) -> None:
        """Encode what is pending; commit if enough has come together."""
        pending, self.pending = self.pending, []
        if self.report.encoded == 0 and len(pending) == self.window:  # early, so that a long job can be stopped
            self.heed_language()
        began = time.monotonic()
        if pending and self.manifest.own_vectors:
            for item in pending:
                self._row(item, item.document.id, item.document.text, np.asarray(item.document.vector, np.float32))
            self._step(len(pending))
        elif pending:
            self._encode_texts(pending)
        self.report.encoded += len(pending)
        self.replaced += [item.document.id for item in pending if item.known and self.chunker]
        taken = time.monotonic() - began
        self.window = min(_WINDOW, self.window * 2) if taken < 8 else max(64, self.window // 2)
        waiting = len(self.rows) + len(self.changed)
        if waiting >= self.commit_rows or (waiting and time.monotonic() - self.committed >= self.commit_seconds):
            self.commit()

    def _encode_texts(self, pending: list[_Pending]) -> None:
        from embell.engine.encoder import EncodeReport

        pieces: list[_Piece] = []
        for item in pending:
            document = item.document
            if self.chunker is None:
                pieces.append((item, document.id, document.text, 0, 0))
                continue
            markdown = str(document.metadata.get("path", "")).lower().split(".gz")[0].endswith((".md", ".markdown"))
            for number, chunk in enumerate(self.chunker.split(document.text, markdown)):
                pieces.append((item, f"{document.id}#{number}", chunk.text, chunk.start, chunk.end))
        counts = EncodeReport()
        share = len(pending) / len(pieces)
        told = 0.0

        def step(done: int) -> None:
            nonlocal told
            told += done * share
            self._step(int(told))
            told -= int(told)

        while True:
            try:
                vectors = self.collection.encoder.encode([text for _, _, text, _, _ in pieces], report=counts, progress=step)
                break
            except TextError as error:
                pieces = self._without(pieces, error)
        self.report.truncated += counts.truncated
        self.report.chunked += counts.chunked
        for (item, name, text, start, end), vector in zip(pieces, vectors, strict=True):
            self._row(item, name, text, vector, start, end)

    def _without(self, pieces: list[_Piece], error: TextError) -> list[_Piece]:
        """The pieces without the documents that cannot be encoded; raises unless those may be left out."""
        refused = {id(pieces[at][0]): pieces[at][0] for at in error.positions}
        for item in refused.values():
            named = CorpusError(f"{item.document.place or f'document {item.document.id!r}'}: {error.reason}")
            if self.on_reject is None:
                raise named from error
            self.on_reject(named, item.document)
            self.report.documents -= 1
            self.report.encoded -= 1
            item.known = False  # what the collection holds of it stays
        return [piece for piece in pieces if id(piece[0]) not in refused]

    def _row(self, item: _Pending, name: str, text: str, vector: Array, start: int = 0, end: int = 0) -> None:
        if not np.isfinite(vector).all() or not vector.any():
            where = item.document.place or f"document {item.document.id!r}"
            raise CollectionError(f"{where}: the model gave a vector with NaN or without direction; try --dtype float32")
        self.rows.append(
            StoredRow(
                self.next_key, name, text, item.text_hash, item.metadata_hash, vector.astype(np.float16),
                item.metadata, item.document.id, start, end,
            )
        )  # fmt: skip
        self.next_key += 1

    def _step(self, done: int) -> None:
        if self.progress is not None and done:
            self.progress(done)

    def commit(self) -> None:
        """Write the rows and the new metadata, then the manifest."""
        self._update_metadata()
        if self.rows:
            if self.replaced:
                # First away with the old chunks: a changed document may have fewer, and one that is
                # missing is simply encoded again if this process dies here.
                old = self.store.rows_of(self.replaced, ["key"])
                self.store.delete_keys([row["key"] for row in old])
            self.store.upsert(self.rows, self.types)
            self.report.rows += len(self.rows)
            self.rows, self.replaced = [], []
        self.collection.commit_manifest(self.next_key)
        self.committed = time.monotonic()

    def _update_metadata(self) -> None:
        """Write new metadata to rows whose text is as before; keys and vectors stay, the index's copy of the documents does not."""
        changed, self.changed = self.changed, {}
        if not changed:
            return
        columns = ["key", "id", "text", "text_hash", "vector"] + (["document", "start", "end"] if self.chunker else [])
        rows = []
        for row in self.store.rows_of(list(changed), columns):
            name = row.get("document", row["id"])
            metadata, digest = changed[name]
            vector = np.array(row["vector"], np.float16)
            rows.append(
                StoredRow(
                    row["key"],
                    row["id"],
                    row["text"],
                    row["text_hash"],
                    digest,
                    vector,
                    metadata,
                    name,
                    row.get("start", 0),
                    row.get("end", 0),
                )
            )
        self.collection.note_changed([row.key for row in rows])
        self.store.upsert(rows, self.types)


def ingest(
    collection: Collection,
    documents: Iterable[Document],
    prune: bool | Callable[[], bool],
    commit_rows: int,
    commit_seconds: float,
    progress: Callable[[int], None] | None,
    on_reject: Callable[[EmbellError, Document], None] | None,
    on_warning: Callable[[str], None],
) -> AddReport:
    """Bring documents in; the caller holds the writer lock. See `Collection.add`."""
    began = time.monotonic()
    writer = _Writer(collection, commit_rows, commit_seconds, progress, on_reject, on_warning)
    known = collection.store.known_documents()
    present = np.zeros(len(known.id_hash), bool)
    seen, places = SeenIds(), Places()
    failure: EmbellError | None = None
    stream = iter(documents)
    while True:
        batch: list[Document] = []
        try:
            for document in stream:
                batch.append(document)
                if len(batch) == _READ:
                    break
        except EmbellError as error:  # what was read before it still goes in
            failure = error
        if not batch:
            break
        try:
            _compare(writer, batch, known, present, seen, places, on_reject)
        except EmbellError as error:
            failure = error  # it stands before the one that ended the reading
        if failure is not None:
            break
    try:
        writer.encode()
    finally:
        writer.commit()
    if failure is not None:
        raise failure
    writer.heed_language()
    report = writer.report
    report.missing = int((~present).sum())
    if report.missing and (prune() if callable(prune) else prune):
        report.pruned = _prune(collection, seen)
    collection.commit_manifest(writer.next_key)
    report.seconds = time.monotonic() - began
    return report


def _compare(
    writer: _Writer,
    batch: list[Document],
    known: KnownDocuments,
    present: Array,
    seen: SeenIds,
    places: Places,
    on_reject: Callable[[EmbellError, Document], None] | None,
) -> None:
    """Sort a batch into new, changed and unchanged documents, and hand on what needs work."""
    base = writer.report.documents + 1
    hashes = hashes64(document.id for document in batch)
    numbers = np.array([places.number(document, base + at) for at, document in enumerate(batch)])
    repeats = dict(reversed(seen.add(hashes, numbers)))
    positions = known.find(hashes)
    for row, (document, at) in enumerate(zip(batch, positions.tolist(), strict=True)):
        try:
            if row in repeats:
                again, first = places.name(int(numbers[row])), places.name(repeats[row])
                raise CorpusError(
                    f"{again}: the id {document.id!r} stands here a second time, first at {first}; ids must be unique"
                )
            document = _checked(document, writer.manifest)
            metadata = writer.types.take(document)
        except EmbellError as error:
            if on_reject is None:
                raise
            on_reject(error, document)
            if at >= 0:
                present[at] = True  # it is in the source, if not fit to be used
            continue
        given = "" if document.vector is None else np.asarray(document.vector, np.float32).tobytes().hex()
        text_hash = hash64(f"{document.text}\0{given}" if given else document.text)
        digest = metadata_hash(metadata)
        writer.report.documents += 1
        if at >= 0:
            present[at] = True
            if known.text_hash[at] == text_hash:
                if known.metadata_hash[at] == digest:
                    writer.report.unchanged += 1
                else:
                    writer.changed[document.id] = (metadata, digest)
                    writer.report.updated += 1
                writer._step(1)
                continue
        writer.take(_Pending(document, metadata, text_hash, digest, at >= 0))
    if len(writer.changed) >= writer.commit_rows:
        writer.commit()


def _checked(document: Document, manifest: Manifest) -> Document:
    """The document if it can be stored, with its given vector at length 1."""
    if not document.text.strip():
        raise CorpusError(f"{document.place or f'document {document.id!r}'}: has no text")
    if not manifest.own_vectors:
        return document
    return replace(document, vector=given_vector(document, manifest.dim))  # type: ignore[arg-type]


def _prune(collection: Collection, seen: SeenIds) -> int:
    """Delete documents that this run did not see."""
    name = "document" if collection.manifest.chunk is not None else "id"
    gone: list[int] = []
    names: set[str] = set()
    for row in collection.store.scan(["key", name]):
        if hash64(row[name]) not in seen:
            gone.append(row["key"])
            names.add(row[name])
    collection.store.delete_keys(gone)
    return len(names)


def given_vector(document: Document, dim: int) -> Array:
    """The vector that a document brings, as a float32 row of length 1.

    Raises CollectionError if there is none, or if it has another width, NaN, or length zero.
    """
    where = document.place or f"document {document.id!r}"
    if document.vector is None:
        raise CollectionError(f"{where}: has no vector, but this collection is made of given vectors (--vector-field, --vectors)")
    row = np.asarray(document.vector, np.float64)
    if row.shape != (dim,):
        raise CollectionError(f"{where}: its vector is {row.shape[-1] if row.ndim else 0} wide, the collection's are {dim}")
    if not np.isfinite(row).all():
        raise CollectionError(f"{where}: its vector holds NaN or infinity; correct or leave out that row")
    length = float(np.linalg.norm(row))
    if length == 0:
        raise CollectionError(f"{where}: its vector is all zeros and has no direction; correct or leave out that row")
    unit: Array = (row / length).astype(np.float32)
    return unit
