"""Collection: a directory of documents, vectors and an index, that can be asked by meaning."""

from __future__ import annotations

import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from embell.document import Document
from embell.engine.generation import build_generation, drop_generations, kept_queries
from embell.engine.hits import Hit, hits_at, nearest_hits
from embell.engine.manifest import FILE, Manifest, check_promise, same_identity
from embell.engine.snapshot import Snapshot
from embell.errors import CollectionError, EmbellError, UsageError
from embell.indexers.store import TABLE, Store, writer_lock
from embell.indexers.vector_index import check_kind

if TYPE_CHECKING:
    from embell.engine.duplicates import Duplicates
    from embell.engine.encoder import Encoder
    from embell.engine.ingest import AddReport

Array = np.ndarray[Any, Any]

_CHANGED = 1000
"""Rows with newer metadata than the index's copy of them, beyond which the copy is not read any more until the index is built anew."""
_YOUNG = 2 * 10**9
"""Nanoseconds; clocks of files tick more slowly than manifests may be written."""
_REBUILD_SHARE = 0.1
"""The index is rebuilt when this share of the rows is not in it any more or not yet; until then those are searched exactly."""


class Collection:
    """A collection on disk. Make one with `Collection.create`, open one with `Collection.open`."""

    def __init__(self, path: Path, manifest: Manifest, encoder: Encoder | None) -> None:
        self.path = path
        self._manifest = manifest
        self._store = Store.open(path, manifest.chunk is not None)
        self._encoder = encoder
        self._snapshot: Snapshot | None = None
        self._read: tuple[tuple[int, int, int] | None, Manifest] | None = None  # which file it was, and what stood there

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        encoder: Encoder | None,
        *,
        dim: int | None = None,
        chunk: int | None = None,
        index: str = "exact",
        recall: float | None = None,
        memory: int | None = None,
        exist_ok: bool = False,
    ) -> Collection:
        """Make an empty collection.

        With `dim`, documents bring their own vectors of that width, and `encoder`, if there is one, serves
        queries. `chunk` splits documents into chunks of at most that many tokens. `index` is "exact" or
        "faiss:FACTORY" or "lance", or with `recall` "auto": whenever it is built, it is tuned to that recall and within that
        `memory`, as by `tune`. With `exist_ok`, a collection that is there already is opened instead, as it is.

        Raises CollectionError if the path holds something else, or a collection and not `exist_ok`; UsageError as `tune` does.
        """
        directory = Path(path)
        check_promise(recall, memory)
        if memory is not None and recall is None:
            raise UsageError("a memory goes with a recall: an index is chosen to be fast at a recall, within a memory")
        if recall is not None and index == "exact":
            raise UsageError("the index exact finds everything; leave out the recall, or choose the index auto")
        if encoder is None and dim is None:
            raise UsageError("a collection needs an encoder, or the width (dim) of the vectors that documents bring")
        if encoder is not None and dim is not None and encoder.dim != dim:
            raise CollectionError(
                f"the vectors are {dim} wide, those of the model for queries {encoder.dim}: they cannot be compared"
            )
        if chunk is not None and dim is not None:
            raise UsageError("documents that bring their own vectors cannot be split into chunks")
        width = dim if dim is not None else encoder.dim  # type: ignore[union-attr]
        check_kind(index, width)
        if directory.exists() and not directory.is_dir():
            raise CollectionError(f"{directory}: not a collection but a file")
        if not (directory / FILE).is_file():
            # A killed creation leaves only these; anything else is somebody's folder.
            strange = sorted(p.name for p in directory.iterdir() if p.name not in _OURS) if directory.is_dir() else []
            if strange:
                raise CollectionError(
                    f"{directory}: not a collection, and not empty (it holds {strange[0]}); choose a new directory"
                )
            directory.mkdir(parents=True, exist_ok=True)
            with writer_lock(directory):
                if not (directory / FILE).is_file():
                    Store.create(directory, width, chunk is not None)
                    spec = None if encoder is None else encoder.spec
                    made = Manifest(
                        spec, dim is not None, width, chunk, index, target=recall, memory=memory, identity=secrets.token_hex(8)
                    )
                    made.write(directory)
                    return cls(directory, Manifest.read(directory), encoder)
        if not exist_ok:
            raise CollectionError(f"{directory}: there is a collection already; open it, or choose another directory")
        return cls.open(directory, encoder)

    @classmethod
    def open(cls, path: str | os.PathLike[str], encoder: Encoder | None = None) -> Collection:
        """Open a collection; its encoder is loaded when it is first needed, unless one is given.

        Raises CollectionError if there is no collection, or if it was made with another model than `encoder`.
        """
        directory = Path(path)
        manifest = Manifest.read(directory)
        if encoder is not None:
            _check_encoder(directory, manifest, encoder)
        return cls(directory, manifest, encoder)

    @property
    def manifest(self) -> Manifest:
        """What the collection is made with, as last read."""
        return self._manifest

    @property
    def store(self) -> Store:
        """The table of documents and vectors."""
        return self._store

    def __len__(self) -> int:
        """Number of rows now: documents, or chunks."""
        self._store.refresh()
        return self._store.count

    @property
    def encoder(self) -> Encoder:
        """The encoder of this collection, loaded now if it was not yet.

        Raises CollectionError if the vectors were given and no model is known, or if the model that is found
        is not the one that the collection was made with.
        """
        if self._encoder is None:
            spec = self._manifest.encoder
            if spec is None:
                raise CollectionError(
                    f"{self.path}: its vectors were given, so text queries need the model they came from: --model"
                )
            from embell.engine.encoder import Encoder

            loaded = Encoder.from_spec(spec)
            _check_encoder(self.path, self._manifest, loaded)
            self._encoder = loaded
        return self._encoder

    def add(
        self,
        documents: Iterable[Document],
        *,
        prune: bool | Callable[[], bool] = False,
        commit_rows: int = 50_000,
        commit_seconds: float = 60.0,
        progress: Callable[[int], None] | None = None,
        on_wait: Callable[[], None] | None = None,
        on_reject: Callable[[EmbellError, Document], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
        on_note: Callable[[str], None] | None = None,
        building: Callable[[str, float], None] | None = None,
    ) -> AddReport:
        """Bring documents in; only those that are new or whose text changed are encoded.

        Rows are committed in groups of `commit_rows` or every `commit_seconds`: killed at any point, the same
        call again finishes the job. `prune` deletes what the collection holds and `documents` does not (a
        function is asked once all have been read). Another writer is waited for. `progress` is called with the
        number of documents done since the last call. With `on_reject`, a document that cannot be used is handed
        to it and left out, instead of stopping. `on_warning` is told, once, if most documents are in a language
        that the model was not trained on (default: a Python warning). `on_note` is told beforehand about how long the
        index will take that is built when all documents are in, where that is long; `building` its stages, and the share that is done.

        Raises CorpusError for an id that stands twice or a field that does not fit its column, after committing
        what came before it; CollectionError for vectors of another width, with NaN, or of length zero.
        """
        from embell.engine.ingest import ingest

        with writer_lock(self.path, on_wait):
            self._reload()
            report = ingest(self, documents, prune, commit_rows, commit_seconds, progress, on_reject, on_warning or warnings.warn)
            self._refresh_index(building, on_note)
        return report

    @overload
    def search(  # type: ignore[overload-overlap]  # a string is a sequence of strings too
        self,
        queries: str,
        k: int = ...,
        *,
        where: str | None = ...,
        offset: int = ...,
        min_score: float | None = ...,
        chunks: bool = ...,
    ) -> list[Hit]: ...

    @overload
    def search(
        self, queries: Sequence[str] | Array, k: int = ..., *, where: str | None = ..., offset: int = ...,
        min_score: float | None = ..., chunks: bool = ...,
    ) -> list[list[Hit]]: ...  # fmt: skip

    def search(
        self,
        queries: str | Sequence[str] | Array,
        k: int = 10,
        *,
        where: str | None = None,
        offset: int = 0,
        min_score: float | None = None,
        chunks: bool = False,
    ) -> list[Hit] | list[list[Hit]]:
        """The `k` documents nearest in meaning to each query, best first.

        A string gives one list of hits; a list of strings, or an array of vectors `(q, dim)`, a list of
        such lists. `where` is an SQL condition on the metadata columns; `offset` skips the best hits;
        `min_score` leaves out hits below that cosine. In a collection of chunks each document stands once,
        with its best chunk, unless `chunks` asks for all of them.

        Raises UsageError for a condition that does not fit the columns, or a `k` below 1.
        """
        if k < 1 or offset < 0:
            raise UsageError(f"k must be at least 1 and offset at least 0, not {k} and {offset}")
        if isinstance(queries, str):
            if not queries.strip():
                raise UsageError("the question is empty")
            vectors = self.encoder.encode([queries], "query")
        elif isinstance(queries, np.ndarray):
            vectors = self._checked(queries)
        elif len(queries):
            vectors = self.encoder.encode(list(queries), "query")
        else:
            return []
        chunked = self._manifest.chunk is not None
        found = nearest_hits(self._look, chunked, vectors, k, where, offset=offset, min_score=min_score, chunks=chunks)
        return found[0] if isinstance(queries, str) else found

    def similar(self, id: str, k: int = 10, *, where: str | None = None, min_score: float | None = None) -> list[Hit]:
        """The documents nearest to one of the collection, itself left out.

        In a collection of chunks the document's vector is the mean of its chunks'.

        Raises CollectionError if there is no document of that id.
        """
        self._look()
        found = self._store.rows_of([id], ["key", "vector"])
        if not found:
            raise CollectionError(f"{self.path}: there is no document with the id {id!r}")
        from embell.indexers.codes import renormalise

        rows = renormalise(np.array([row["vector"] for row in found], np.float16))
        chunked = self._manifest.chunk is not None
        middle = renormalise(rows.mean(axis=0, keepdims=True))
        return nearest_hits(self._look, chunked, middle, k, where, min_score=min_score, without=id)[0]

    def duplicates(
        self,
        threshold: float | None = None,
        *,
        lexical: float | None = None,
        contained: float | None = None,
        overlap: float | None = None,
        kinds: Sequence[str] | None = None,
        keep: str = "first",
        rule: str = "cover",
        group_by: str | None = None,
        progress: Callable[[str, float], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Duplicates:
        """Documents that stand twice: exact copies and those whose cosine reaches `threshold`; without one, by words and meaning together.

        `lexical`, `contained`, `overlap` and `kinds` as for `duplicates.chosen_thresholds`; `keep` and `rule` as for `rules.ranks` and
        `rules.decide`; `group_by` is a metadata column: documents are compared with those of the same value. The pairs are kept beside the collection:
        the next call compares only what is new, and decides at once at another threshold that is not lower. Killed, it goes on.
        `on_note` is told when pairs are looked for anew.

        Raises UsageError for a threshold outside (0, 1] and for options that do not exist, CollectionError for a collection of chunks.
        """
        from embell.engine.collection_pairs import collection_duplicates
        from embell.engine.duplicates import chosen_thresholds
        from embell.engine.rules import check_keep, check_rule

        if self._manifest.chunk is not None:
            raise CollectionError(f"{self.path}: holds chunks, not whole documents; look for duplicates in the source instead")
        check_keep(keep)
        check_rule(rule)
        thresholds = chosen_thresholds(threshold, lexical=lexical, contained=contained, overlap=overlap, kinds=kinds)
        return collection_duplicates(self, self._look(), thresholds, keep, rule, group_by, progress, on_note)

    def reduce(self, found: Duplicates, count: int, progress: Callable[[str, float], None] | None = None) -> Duplicates:
        """Go on from what `duplicates` found until no more than `count` documents are kept, as `reduction.reduce_to` says.

        Raises UsageError for a count below 1, a result of `leaks`, and if the collection has changed since.
        """
        from embell.engine.collection_pairs import living_ids
        from embell.engine.reduction import reduce_to

        index, ids = living_ids(self, self._look())
        if found.found.split is None and ids != list(found.rows.ids):
            raise UsageError(f"{self.path}: has changed since it was looked through; look for duplicates anew")
        return reduce_to(found, count, index, progress)

    def outliers(self, k: int = 10, *, progress: Callable[[str, float], None] | None = None) -> list[Hit]:
        """The `k` documents that resemble others least, the furthest first; the score is the mean cosine with the 50 nearest others.

        Of a collection of chunks, the chunks. Raises UsageError for a `k` below 1.
        """
        from embell.engine.collection_pairs import living
        from embell.engine.overview import outliers

        snapshot = self._look()
        index = living(snapshot)
        positions, scores = outliers(index, k, progress=progress)
        return hits_at(snapshot, self._manifest.chunk is not None, index.keys[positions], scores)

    def representatives(self, k: int = 10) -> list[Hit]:
        """`k` documents that stand for the whole corpus; the score is the share of documents that are nearest to each.

        Of a collection of chunks, the chunks. Raises UsageError for a `k` below 1, MissingExtraError without FAISS.
        """
        from embell.engine.collection_pairs import living
        from embell.engine.overview import representatives

        snapshot = self._look()
        index = living(snapshot)
        positions, scores = representatives(index, k)
        return hits_at(snapshot, self._manifest.chunk is not None, index.keys[positions], scores)

    def leaks(
        self,
        against: Collection,
        threshold: float | None = None,
        *,
        lexical: float | None = None,
        contained: float | None = None,
        overlap: float | None = None,
        kinds: Sequence[str] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> Duplicates:
        """Documents of this collection that another one has too, such as test items in training data; options as for `duplicates`.

        Each dropped document names the nearest of the other collection's. Documents of the same collection are not compared.

        Raises CollectionError if the vectors of the two cannot be compared.
        """
        from embell.engine.collection_pairs import collection_leaks
        from embell.engine.duplicates import chosen_thresholds

        for one in (self, against):
            if one._manifest.chunk is not None:
                raise CollectionError(f"{one.path}: holds chunks, not whole documents; look for duplicates in the source instead")
        mine, theirs = self._manifest.encoder, against._manifest.encoder
        same = mine is theirs if mine is None or theirs is None else not mine.differences(theirs)
        if against._manifest.dim != self._manifest.dim or not same:
            raise CollectionError(
                f"{self.path} and {against.path} were made with different models: their vectors cannot be compared"
            )
        thresholds = chosen_thresholds(threshold, lexical=lexical, contained=contained, overlap=overlap, kinds=kinds)
        return collection_leaks(self, self._look(), against, against._look(), thresholds, progress)

    def delete(self, ids: Sequence[str] = (), *, where: str | None = None) -> int:
        """Delete documents by id, or those that match a condition; the number of rows deleted.

        Raises CollectionError for an id that is not there (then nothing is deleted), UsageError for a condition
        that does not fit the columns.
        """
        with writer_lock(self.path):
            self._reload()
            deleted = 0
            if ids:
                name = "document" if self._manifest.chunk is not None else "id"
                found = self._store.rows_of(ids, ["key", name])
                there = {row[name] for row in found}
                lost = [value for value in ids if value not in there]
                if lost:
                    raise CollectionError(f"{self.path}: there is no document with the id {lost[0]!r}; nothing was deleted")
                self._store.delete_keys([row["key"] for row in found])
                deleted += len(found)
            if where is not None:
                deleted += self._delete_fitting(where)
            self._write_manifest()
        return deleted

    def _delete_fitting(self, where: str) -> int:
        try:
            return self._store.delete(where)
        except UsageError as refused:  # what a search takes, a deletion takes
            if not isinstance(refused.__cause__, ValueError):  # a disk that is full, another writer
                raise
            snapshot = Snapshot.take(self.path, self._manifest, self._store)
            keys = snapshot.keys[snapshot.condition(where).all()]
            self._store.delete_keys(keys.tolist())
            return len(keys)

    def optimize(
        self,
        index: str | None = None,
        *,
        progress: Callable[[str, float], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """Build the index anew from the table, of another kind if one is given.

        `progress` is told the stage of the work and the share of it that is done, `on_note` beforehand about how long it will take
        where that is long.

        Raises UsageError for a kind that does not exist.
        """
        with writer_lock(self.path):
            self._reload()
            manifest = self._manifest
            if index is not None:
                manifest = replace(manifest, index=check_kind(index, manifest.dim))
            self._build_index(manifest, kept_queries(self.path, manifest), progress, on_note)

    def tune(
        self,
        recall: float,
        queries: Sequence[str] | Array | None = None,
        *,
        memory: int | None = None,
        progress: Callable[[str, float], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """Build the index anew so that it finds that share of the nearest ten, and record what it really finds.

        A collection that is searched exactly gets the index "auto": approximate where that is faster. `queries` are texts or
        vectors like those that will be asked; without them, it is tuned on those that were given last, and where there were none,
        rows of the collection stand in. `memory` limits the bytes that an index "auto"
        holds beside the stored rows: what does not fit is left on disk. What was found stands in
        `manifest.tuned`, and the curve of recall and speed in `index/<generation>/curve.json`. `progress` and `on_note` as for
        `optimize`.

        Raises UsageError for a recall that is not between 0 and 1, for a limit below 1, or for fewer queries than can certify the recall.
        """
        from embell.engine.tuning import fewest

        check_promise(recall, memory)
        if queries is not None and len(queries) < (wanted := fewest(recall)):
            raise UsageError(f"{len(queries)} queries are too few to certify a recall of {recall:g}; give {wanted} or more")
        vectors = None
        if queries is not None:
            vectors = self._checked(queries) if isinstance(queries, np.ndarray) else self.encoder.encode(list(queries), "query")
        with writer_lock(self.path):
            self._reload()
            manifest = self._manifest
            if vectors is None:
                vectors = kept_queries(self.path, manifest)
            kind = "auto" if manifest.index == "exact" else manifest.index
            manifest = replace(manifest, index=check_kind(kind, manifest.dim), target=recall, memory=memory)
            self._build_index(manifest, vectors, progress, on_note)

    def commit_manifest(self, next_key: int) -> None:
        """Record what has been committed to the table; called by the writer that holds the lock."""
        self._manifest = replace(self._manifest, next_key=next_key)
        self._write_manifest()

    def note_changed(self, keys: Sequence[int]) -> None:
        """Record that the index's copy of these rows is about to be out of date; called by the writer that holds the lock."""
        changed = self._manifest.changed
        if changed is not None:
            changed = sorted({*changed, *keys})
            self._manifest = replace(self._manifest, changed=changed if len(changed) <= _CHANGED else None)
            self._write_manifest()

    def _write_manifest(self) -> None:
        self._manifest = replace(self._manifest, rows=self._store.count, table_version=self._store.version)
        self._manifest.write(self.path)

    def _reload(self) -> None:
        """See what was committed before; for a writer, who holds the lock. What a killed writer left half done is put right."""
        manifest = Manifest.read(self.path)
        same_identity(self.path, self._manifest, manifest)
        self._store.refresh()
        self._store.repair()
        # Rows that were committed without the manifest have keys that must not be given again, even when they are deleted.
        self._manifest = replace(manifest, next_key=max(manifest.next_key, self._store.largest_key() + 1))

    def _look(self) -> Snapshot:
        """The collection as it is now; what other processes committed is seen."""
        # The manifest first: the table is then at least as new as the index that the manifest names.
        manifest = self._manifest_there()
        same_identity(self.path, self._manifest, manifest)
        version = self._store.refresh()
        known = (self._manifest.generation, self._manifest.changed)
        if self._snapshot is None or self._snapshot.version != version or (manifest.generation, manifest.changed) != known:
            self._manifest = manifest
            self._snapshot = Snapshot.take(self.path, self._manifest, self._store)
        return self._snapshot

    def _manifest_there(self) -> Manifest:
        """The manifest as it is on disk; read where it is another file than the last time, or so young that another may look like it."""
        file = None
        with suppress(OSError):  # reading says what is wrong
            at = os.stat(self.path / FILE)
            if time.time_ns() - at.st_mtime_ns > _YOUNG:
                file = at.st_ino, at.st_mtime_ns, at.st_size
        if file is None or self._read is None or self._read[0] != file:
            self._read = file, Manifest.read(self.path)
        return self._read[1]

    def _refresh_index(self, progress: Callable[[str, float], None] | None, on_note: Callable[[str], None] | None) -> None:
        """Rebuild the index if too much of the collection lies outside it."""
        snapshot = self._look()
        if snapshot.outside > _REBUILD_SHARE * len(self) or (self._manifest.generation == 0 and len(self)):
            self._build_index(self._manifest, kept_queries(self.path, self._manifest), progress, on_note)

    def _build_index(
        self,
        manifest: Manifest,
        queries: Array | None,
        progress: Callable[[str, float], None] | None,
        on_note: Callable[[str], None] | None,
    ) -> None:
        """Build the index that a manifest asks for; not `self._manifest`, which a search in another thread reads anew."""
        self._store.index_columns()
        self._manifest = build_generation(self.path, manifest, self._store, queries, progress, on_note)
        self._write_manifest()
        self._snapshot = None
        drop_generations(self.path, keep=self._manifest.generation)
        if self._store.tidy_vector_index(keep=self._manifest.kind.startswith("lance")):
            self._write_manifest()

    def _checked(self, vectors: Array) -> Array:
        rows = np.atleast_2d(np.asarray(vectors, np.float64))
        if rows.ndim != 2 or rows.shape[1] != self._manifest.dim:
            raise CollectionError(f"query vectors are {rows.shape[-1]} wide, those of the collection {self._manifest.dim}")
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not (lengths > 0).all():
            raise CollectionError("a query vector holds NaN, or nothing but zeros")
        unit: Array = (rows / lengths).astype(np.float32)
        return unit


_OURS = ("writer.lock", f"{TABLE}.lance", "index", "duplicates", f"{FILE}.part")


def _check_encoder(directory: Path, manifest: Manifest, encoder: Encoder) -> None:
    if manifest.encoder is None:
        if encoder.dim != manifest.dim:
            raise CollectionError(f"{directory}: its vectors are {manifest.dim} wide, those of the model {encoder.dim}")
        return
    differences = manifest.encoder.differences(encoder.spec)
    if differences:
        what = differences[0]
        before, now = getattr(manifest.encoder, what), getattr(encoder.spec, what)
        raise CollectionError(
            f"{directory}: made with another model ({manifest.encoder.backbone}; {what} is {before} there, {now} here): "
            "vectors of different models cannot be compared; use that model, or index into a new directory"
        )
