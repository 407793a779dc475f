"""The LanceDB table of a collection: documents, metadata and vectors. The one source of truth."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import orjson
import pyarrow as pa

from embell.errors import CollectionError, UsageError
from embell.indexers.columns import INNER, RESERVED, WIDENED, MetadataTypes, arrow_column

TABLE = "documents"
_LOOKUP = 2000
"""Keys or ids that one filter expression names at most."""
_SMALL = 8192
_NARROW = frozenset(("key", "id", "document", "text_hash", "metadata_hash", "vector"))
"""Rows that are read at a time where these columns alone are wanted, which are short; LanceDB's own 1024 take four times as long."""
_VECTOR_INDEX = "vector_idx"
_VECTORS_ONLY = "auxiliary.idx"
"""A file that LanceDB writes for vector indices and for no others: their codes."""


@contextmanager
def writer_lock(directory: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the collection's writer lock; waits for another writer, calling `on_wait` once before.

    The operating system frees the lock when its process dies, however it dies.
    """
    lock = filelock.FileLock(directory / "writer.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def hash64(text: str) -> int:
    """A signed 64-bit hash of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


def hashes64(texts: Iterable[str]) -> np.ndarray[Any, Any]:
    """`hash64` of each text, `(n,)`."""
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


def metadata_hash(metadata: Mapping[str, Any]) -> int:
    """A hash of a row's column values that does not depend on their order."""
    return hash64(orjson.dumps(dict(metadata), default=repr, option=orjson.OPT_SORT_KEYS).decode())


@dataclass(slots=True)
class StoredRow:
    """A row to be written. `document`, `start` and `end` are used by collections of chunks only."""

    key: int
    id: str
    text: str
    text_hash: int
    metadata_hash: int
    vector: np.ndarray[Any, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    document: str = ""
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class KnownDocuments:
    """What the table holds, for telling new documents from known ones: arrays sorted by `id_hash`."""

    id_hash: np.ndarray[Any, Any]
    text_hash: np.ndarray[Any, Any]
    metadata_hash: np.ndarray[Any, Any]

    def find(self, id_hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The position of each id hash, -1 where it is not known."""
        if not len(self.id_hash):
            return np.full(len(id_hashes), -1)
        at = np.minimum(np.searchsorted(self.id_hash, id_hashes), len(self.id_hash) - 1)
        return np.where(self.id_hash[at] == id_hashes, at, -1)


class Store:
    """Reads and writes the table. Writers hold `writer_lock`; readers need no lock."""

    def __init__(self, table: Any, directory: Path, chunked: bool) -> None:
        self._table = table
        self._chunked = chunked
        self._versions = directory / f"{TABLE}.lance" / "_versions"
        self._looked: tuple[list[str], int] | None = None
        """The files of all versions when the table was last asked for its latest one, and its number."""

    @classmethod
    def create(cls, directory: Path, dim: int, chunked: bool) -> Store:
        """Make an empty table, in place of one whose creation was interrupted."""
        fields = [pa.field("key", pa.int64(), False), pa.field("id", pa.string(), False)]
        if chunked:
            fields += [
                pa.field("document", pa.string(), False),
                pa.field("start", pa.int64(), False),
                pa.field("end", pa.int64(), False),
            ]
        fields += [
            pa.field("text", pa.string(), False),
            pa.field("text_hash", pa.int64(), False),
            pa.field("metadata_hash", pa.int64(), False),
            pa.field("vector", pa.list_(pa.float16(), dim), False),
        ]
        shutil.rmtree(directory / f"{TABLE}.lance", ignore_errors=True)
        table = _connect(directory).create_table(TABLE, schema=pa.schema(fields))
        # Without a declared key, concurrent merges of the same new ids insert them twice.
        table.set_unenforced_primary_key("id")
        return cls(table, directory, chunked)

    @classmethod
    def open(cls, directory: Path, chunked: bool) -> Store:
        """Open the table at its latest version.

        Raises CollectionError if there is none or it cannot be read.
        """
        try:
            return cls(_connect(directory).open_table(TABLE), directory, chunked)
        except Exception as error:  # LanceDB raises bare errors of many types here
            raise CollectionError(f"{directory}: its table cannot be opened ({_first_line(error)})") from error

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self._table.count_rows())

    @property
    def documents(self) -> int:
        """Number of documents, which in a collection of chunks is smaller than `count`."""
        return len(self.known_documents().id_hash) if self._chunked else self.count

    @property
    def version(self) -> int:
        """LanceDB's version number of the table."""
        return int(self._table.version)

    @property
    def metadata_types(self) -> dict[str, pa.DataType]:
        """Arrow type of each metadata column."""
        return {f.name: f.type for f in self._table.schema if f.name not in RESERVED}

    def refresh(self) -> int:
        """See what other processes have committed; the version of the table that is seen now.

        A commit is a new file in the table's folder of versions. Looking there takes a few microseconds, asking LanceDB as long as some searches.
        """
        try:
            files = sorted(os.listdir(self._versions))
        except OSError:  # LanceDB says what is wrong
            files = []
        if self._looked is None or not files or files != self._looked[0]:
            self._table.checkout_latest()
            self._looked = files, self.version
        return self._looked[1]

    def known_documents(self) -> KnownDocuments:
        """Hashes of every document: 24 bytes each, however long the texts are."""
        name = "document" if self._chunked else "id"
        parts: list[tuple[np.ndarray[Any, Any], ...]] = []
        for batch in self._batches([name, "text_hash", "metadata_hash"]):
            ids = hashes64(batch.column(name).to_pylist())
            parts.append((ids, batch.column("text_hash").to_numpy(), batch.column("metadata_hash").to_numpy()))
        if not parts:
            empty = np.empty(0, np.int64)
            return KnownDocuments(empty, empty, empty)
        ids, texts, metadata = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(ids, kind="stable")
        if self._chunked:  # every chunk of a document carries the document's hashes
            order = order[np.unique(ids[order], return_index=True)[1]]
        return KnownDocuments(ids[order], texts[order], metadata[order])

    def largest_key(self) -> int:
        """The largest key in the table, -1 if it is empty."""
        return max((int(batch.column("key").to_numpy().max()) for batch in self._batches(["key"]) if len(batch)), default=-1)

    def keys(self, where: str | None = None) -> np.ndarray[Any, Any]:
        """Keys of the rows that match, ascending.

        Raises UsageError if the expression is not valid for these columns.
        """
        if where is not None:
            self.check_condition(where)
        try:
            condition = f"({where})" if where is not None else ""
            parts = [batch.column("key").to_numpy() for batch in self._batches(["key"], condition)]
        except UsageError as error:
            raise self._refused(str(where), error) from error
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def index_columns(self) -> None:
        """Build scalar indices on the key and on all plain metadata columns anew: conditions on them then read no rows."""
        from lancedb.index import BTree

        columns = ["key", *(name for name, kind in self.metadata_types.items() if _ordered(kind))]
        for name in columns if self.count else ():
            self._table.create_index(name, config=BTree(), replace=True)

    @property
    def vector_index(self) -> Any:
        """LanceDB's description of the index on the vectors, None if there is none."""
        return next((index for index in self._table.list_indices() if index.columns == ["vector"]), None)

    def build_vector_index(self, config: Any) -> None:
        """Build an index on the vectors of all rows, in place of another one.

        Raises CollectionError if LanceDB does not get it done.
        """
        try:
            self._table.create_index("vector", config=config, replace=True, name=_VECTOR_INDEX)
        except (ValueError, RuntimeError, OSError) as error:
            raise CollectionError(f"LanceDB cannot build the index on the vectors ({_first_line(error)})") from error

    def tidy_vector_index(self, keep: bool) -> bool:
        """Drop the index on the vectors unless `keep`, and remove the files of earlier ones; whether one was dropped."""
        index = self.vector_index
        if index is not None and not keep:
            self._table.drop_index(index.name)
        # LanceDB leaves the files to older versions of the table. A reader of one searches exactly when they are gone.
        if index is None or not keep or index.num_segments == 1:
            used = index.index_uuid if index is not None and keep else ""
            for path in (Path(self._table.uri) / "_indices").glob(f"*/{_VECTORS_ONLY}"):
                if path.parent.name != used:
                    shutil.rmtree(path.parent, ignore_errors=True)
        return index is not None and not keep

    def nearest(self, queries: np.ndarray[Any, Any], k: int, nprobes: int, ef: int = 0) -> tuple[np.ndarray[Any, Any], ...]:
        """About the nearest `k` rows of each query, by the index on the vectors: `(queries, keys)`, by query.

        Raises CollectionError if the index cannot be read.
        """
        search = self._table.search(list(queries), "vector", "vector").select(["key", "_distance"]).limit(k).nprobes(nprobes)
        try:
            found = (search.ef(max(ef, k)) if ef else search).to_arrow()
        except (ValueError, RuntimeError, OSError) as error:
            raise CollectionError(f"the index on the vectors cannot be read ({_first_line(error)})") from error
        keys = found["key"].to_numpy()
        return (found["query_index"].to_numpy() if len(queries) > 1 else np.zeros(len(keys), np.int64)), keys

    def vectors(self, above: int = -1) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Blocks of `(keys, float16 rows)` of all rows with a key above the given one."""
        for batch in self._batches(["key", "vector"], f"key > {above}" if above >= 0 else ""):
            column = batch.column("vector")
            yield batch.column("key").to_numpy(), column.flatten().to_numpy().reshape(len(batch), -1)

    @property
    def readable(self) -> pa.Schema:
        """The columns that are not inner ones, and the key."""
        return pa.schema([f for f in self._table.schema if f.name not in ("vector", "text_hash", "metadata_hash")])

    def batches(self, above: int = -1, among: Sequence[int] = ()) -> Iterator[pa.RecordBatch]:
        """Rows with the columns of `readable`: those above one key, and `among` some others."""
        also = f" OR key IN ({','.join(map(str, among))})" if among else ""
        return self._batches(self.readable.names, f"key > {above}{also}" if above >= 0 else "")

    def rows(self, keys: Sequence[int], columns: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
        """Rows by key, without the vector unless it is named; keys that are gone are missing from the answer."""
        wanted = ["key", *(c for c in columns if c != "key")] if columns is not None else self.readable.names
        found: dict[int, dict[str, Any]] = {}
        for begin in range(0, len(keys), _LOOKUP):
            some = ",".join(str(int(key)) for key in keys[begin : begin + _LOOKUP])
            for batch in self._batches(wanted, f"key IN ({some})"):
                for row in batch.to_pylist():
                    found[row["key"]] = row
        return found

    def rows_of(self, ids: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of these document ids; a document in chunks has several."""
        name = "document" if self._chunked else "id"
        found: list[dict[str, Any]] = []
        for begin in range(0, len(ids), _LOOKUP):
            some = ",".join(_quoted(value) for value in ids[begin : begin + _LOOKUP])
            for batch in self._batches(list(columns), f"{name} IN ({some})"):
                found.extend(batch.to_pylist())
        return found

    def scan(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every row, a dictionary each, in the table's own order."""
        for batch in self._batches(list(columns)):
            yield from batch.to_pylist()

    def upsert(self, rows: Sequence[StoredRow], types: MetadataTypes) -> None:
        """Write rows in one commit: new ids are inserted, known ones replaced."""
        self._grow(types)
        names = [f.name for f in self._table.schema]
        columns: dict[str, Any] = {
            "key": [row.key for row in rows],
            "id": [row.id for row in rows],
            "text": [row.text for row in rows],
            "text_hash": [row.text_hash for row in rows],
            "metadata_hash": [row.metadata_hash for row in rows],
        }
        if self._chunked:
            columns["document"] = [row.document for row in rows]
            columns["start"] = [row.start for row in rows]
            columns["end"] = [row.end for row in rows]
        arrays = []
        for f in self._table.schema:
            if f.name == "vector":
                flat = np.concatenate([row.vector for row in rows]).astype(np.float16, copy=False)
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), f.type.list_size))
            elif f.name in columns:
                arrays.append(pa.array(columns[f.name], f.type))
            else:
                arrays.append(arrow_column((row.metadata.get(f.name) for row in rows), f.type))
        fields = [pa.field(f.name, f.type, f.nullable) for f in self._table.schema]
        data = pa.table(dict(zip(names, arrays, strict=True)), schema=pa.schema(fields))
        self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(data)

    def delete(self, where: str) -> int:
        """Delete the rows that match; the number deleted.

        Raises UsageError if the expression is not valid for these columns.
        """
        before = self.count
        try:
            self.check_condition(where)
            self._table.delete(f"({where})")
        except UsageError:
            raise
        except Exception as error:
            raise self._refused(where, error) from error
        return before - self.count

    def delete_keys(self, keys: Sequence[int]) -> None:
        """Delete rows by key."""
        for begin in range(0, len(keys), _LOOKUP):
            self._table.delete(f"key IN ({','.join(str(int(key)) for key in keys[begin : begin + _LOOKUP])})")

    @staticmethod
    def check_condition(where: str) -> None:
        """Refuse an empty condition, what would not stay within parentheses, and the table's inner columns: a field of such a name is stored under another.

        What stands after a closing parenthesis too many is no error to LanceDB: it would be forgotten, and the rest be searched, or deleted.

        Raises UsageError.
        """
        if not where.strip():
            raise UsageError("--where is empty; give a condition on the metadata columns")
        if any("\ud800" <= sign <= "\udfff" for sign in where):
            raise UsageError(f"--where {where!r}: not UTF-8")
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "", where)
        depth = 0
        for mark in re.findall(r"[()]", bare):
            depth += 1 if mark == "(" else -1
            if depth < 0:
                break
        if depth:
            raise UsageError(f"--where {where!r}: a parenthesis is not closed, or closed without being open")
        if re.search(r"\?|\$\d", bare):
            raise UsageError(f"--where {where!r}: ? and $1 would be placeholders, which nothing fills; write the value itself")
        words = re.findall(r"\w+", re.sub(r"'[^']*'", "", where))
        for inner in INNER:
            if inner in words:
                raise UsageError(
                    f"--where {where!r}: {inner} is an inner column; a metadata field of that name is called {inner}_"
                )

    def _refused(self, where: str, error: Exception) -> UsageError:
        said = str(error) if isinstance(error, UsageError) else _filter_error(error)
        return UsageError(f"--where {where!r}: {said}; columns are {', '.join(self._filter_columns())}")

    def _filter_columns(self) -> list[str]:
        return [f.name for f in self._table.schema if f.name not in INNER]

    def _grow(self, types: MetadataTypes) -> None:
        """Add the columns that these rows need, and widen integer columns that now hold fractions."""
        if types.added:
            self._table.add_columns([pa.field(name, kind) for name, kind in types.added.items()])
        for name in sorted(types.widened):
            # LanceDB does not cast integers to floats in place.
            self._table.add_columns({name + WIDENED: f"CAST({_identifier(name)} AS DOUBLE)"})
            self._table.drop_columns([name])
            self._table.alter_columns({"path": name + WIDENED, "rename": name})
        types.applied()

    def repair(self) -> None:
        """Finish a change of columns that was cut short; called by a writer before it looks at the columns."""
        names = set(self._table.schema.names)
        for name in sorted(names):
            if name.endswith(WIDENED):
                if name.removesuffix(WIDENED) in names:
                    self._table.drop_columns([name])
                else:
                    self._table.alter_columns({"path": name, "rename": name.removesuffix(WIDENED)})

    def _batches(self, columns: list[str], where: str = "") -> Iterator[pa.RecordBatch]:
        query = self._table.search().select(columns)
        if where:
            query = query.where(where)
        try:
            yield from query.to_batches(_SMALL if _NARROW.issuperset(columns) else None)
        except (ValueError, RuntimeError, OSError) as error:
            if where:
                raise UsageError(_filter_error(error)) from error
            raise CollectionError(f"the table cannot be read ({_first_line(error)})") from error


def _ordered(kind: pa.DataType) -> bool:
    """Whether a scalar index is built on a column of this type.

    Not on booleans: LanceDB answers NOT (flag IS FALSE) by one without the rows that have no value.
    """
    return any((pa.types.is_integer(kind), pa.types.is_floating(kind), pa.types.is_string(kind),
                pa.types.is_date(kind), pa.types.is_timestamp(kind)))  # fmt: skip


def _connect(directory: Path) -> Any:
    import lancedb

    return lancedb.connect(directory)


def _identifier(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _filter_error(error: Exception) -> str:
    """The useful part of a LanceDB filter error: no prefixes, no Rust source positions, nothing of its own that the user did not write."""
    text = " ".join(str(error).split())
    text = re.sub(
        r"Invalid (user )?input[,:]? ?|Schema error: |Error during planning: |Error parsing function: |Error resolving filter expression .*?: "
        r"|invalid SQL predicate: |, \S*\.rs:\S*",
        "",
        text,
    )
    if name := re.match(r"No field named \"?(.+?)\"?\. .*?(?:Did you mean '(.+)'\?)?\.?$", text):
        return f"there is no column {name[1]}" + (f"; did you mean {name[2]}?" if name[2] else "")
    if parsed := re.match(r"Error parsing statement: SELECT .* \(sql parser error: (.*)\)$", text):
        # The condition stands in parentheses there.
        return re.sub(r"found: \)$", "found: ) or the end", parsed[1])
    if "Not supported" in text:
        return "not supported in a condition"
    return text[:200]
