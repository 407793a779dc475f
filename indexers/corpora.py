"""Corpora, read row by row: JSON Lines, CSV, TSV, Parquet and text files, compressed or not, folders of them, stdin."""

from __future__ import annotations

import datetime
import decimal
import difflib
import gzip
import io
import json
import lzma
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import orjson

from embell.document import Document
from embell.errors import CorpusError, UsageError
from embell.indexers.csv_rows import BOM, FIX, check_names, shortened, table_rows, utf8_fault

_KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
}
_COMPRESSIONS = (".gz", ".xz", ".zst")
_KNOWN = f"{' '.join(_KINDS)}, each also with {' '.join(_COMPRESSIONS)}"

_LONG_NUMBER = re.compile(rb"\d{19}")

OnReject = Callable[[str, "bytes | None"], None]
"""Is called with the message and the row: its line (JSONL), its fields as JSON, or None."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, before it becomes a Document.

    `place` is the path and the line on which the row starts ("corpus.jsonl:7"; Parquet: the row; text
    files: the path alone). `default_id` is the path and the number of the row ("corpus.jsonl#7"; JSONL:
    the line; text files: the path alone). `ordinal` counts the rows before it over all sources, and
    `raw` is the line as it stood (JSONL only).
    """

    place: str
    default_id: str
    fields: dict[str, Any]
    ordinal: int
    raw: bytes | None


UNFINISHED = ".unfinished"
"""How the names of folders end in which a command that was stopped finds what it had done."""


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """Which fields mean what; `string_fields` are metadata kept as text, whatever they hold, `fields_beside` stay metadata also if they are the text."""

    id_field: str | None = None
    text_fields: tuple[str, ...] = ()
    vector_field: str | None = None
    string_fields: tuple[str, ...] = ()
    keep_going: bool = False
    fields_beside: tuple[str, ...] = ()


@dataclass
class CorpusReport:
    """What was met, filled while reading: all rows, those without text, those that could not be used."""

    rows: int = 0
    empty: int = 0
    first_empty: str = ""
    rejected: int = 0
    first_rejected: str = ""


def read_corpus(
    sources: Sequence[str],
    options: CorpusOptions,
    report: CorpusReport,
    on_reject: OnReject | None = None,
    stdin: BinaryIO | None = None,
) -> Iterator[Document]:
    """The documents of all sources, in order; rows without text are counted and left out.

    Raises what `read_rows` and, unless `keep_going`, `to_document` raise.
    """
    for row in read_rows(sources, options, report, on_reject, stdin):
        try:
            document = to_document(row, options)
        except CorpusError as error:
            _reject(str(error), row.raw or _dumped(row.fields), options, report, on_reject)
            continue
        if document is not None:
            yield document
        else:
            report.empty += 1
            report.first_empty = report.first_empty or row.place


def read_rows(
    sources: Sequence[str],
    options: CorpusOptions,
    report: CorpusReport,
    on_reject: OnReject | None = None,
    stdin: BinaryIO | None = None,
) -> Iterator[Row]:
    """The rows of all sources, in order.

    Raises UsageError if stdin is named twice; CorpusError for a source that cannot be read, for a first
    row of a source that lacks a field named in the options and, unless `keep_going`, for a row that
    cannot be parsed.
    """
    if list(sources).count("-") > 1:
        raise UsageError("- (stdin) is given twice, but can be read only once; name it once")
    for source in sources:
        next(source_files(source))  # a wrong path is told now, not after hours with the sources before it
    ordinal = -1
    for source in sources:
        first = True
        for file in source_files(source):
            for found in file.read(options, stdin):
                ordinal += 1
                report.rows += 1
                place = file.label if file.kind == "text" else f"{file.label}:{found.line}"
                if found.fault:
                    raw = found.raw or (_dumped(found.fields) if found.fields else None)
                    _reject(f"{place}: {found.fault}", raw, options, report, on_reject)
                    continue
                identity = file.label if file.kind == "text" else f"{file.label}#{found.number}"
                row = Row(place, identity, found.fields, ordinal, found.raw)
                if first and file.kind != "text":
                    _check_first(row, options)
                    first = False
                yield row


def _reject(message: str, raw: bytes | None, options: CorpusOptions, report: CorpusReport, on_reject: OnReject | None) -> None:
    if not options.keep_going:
        raise CorpusError(message) from None
    report.rejected += 1
    report.first_rejected = report.first_rejected or message
    if on_reject is not None:
        on_reject(message, raw)


# Files


@dataclass(frozen=True, slots=True)
class FoundRow:
    """A row as its file gives it: the line on which it starts, its number, its fields, and what is wrong with it."""

    line: int
    number: int
    fields: dict[str, Any]
    fault: str = ""
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file of rows: its path, how messages name it, its kind (jsonl, csv, tsv, parquet, text), and its compression."""

    path: str
    label: str
    kind: str
    compression: str = ""

    def read(self, options: CorpusOptions, stdin: BinaryIO | None) -> Iterator[FoundRow]:
        """The rows of this file. Raises CorpusError if the file as a whole is at fault."""
        if self.path == "-":
            yield from _json_lines(sys.stdin.buffer if stdin is None else stdin)
            return
        try:
            with open(self.path, "rb") as file, unpacked(file, self.compression) as stream:
                if self.kind == "jsonl":
                    yield from _json_lines(stream)
                elif self.kind == "text":
                    yield _whole_text(stream, self.label)
                elif self.kind == "parquet":
                    yield from _parquet(stream, self.label, bool(self.compression))
                else:
                    as_text = {*options.string_fields, *(options.text_fields or ("text", "title")), options.vector_field or ""}
                    as_text |= {options.id_field} if options.id_field is not None else {"id", "_id"}
                    rows = table_rows(stream, "\t" if self.kind == "tsv" else ",", self.label, as_text)
                    for number, (line, fields, fault) in enumerate(rows, 1):
                        yield FoundRow(line, number, fields, fault)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                message = f"cannot be read ({error.strerror}); check the file and its permissions"
            elif self.compression:
                message = f"broken {self.compression} compression ({_one_line(error)}); fetch or compress the file anew"
            else:
                message = f"cannot be read ({_one_line(error)}); check the file"
            raise CorpusError(f"{self.label}: {message}") from error


def source_files(source: str) -> Iterator[TableFile]:
    """The files of one source, at least one. Raises CorpusError if there is none."""
    if source == "-":
        yield TableFile("-", "-", "jsonl")
        return
    label = _label(source) if source else "''"
    try:
        os.stat(source)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{label}: {getattr(error, 'strerror', None) or error}; check the path") from error
    if os.path.isdir(source):
        empty = True
        for file in _walked(source, os.path.join(os.path.realpath(source), "")):
            empty = False
            yield file
        if empty:
            raise CorpusError(f"{label}: no file to read in this folder; embell reads {_KNOWN}")
        return
    only = _recognised(source)
    if only is None:
        plain_json = os.path.splitext(label.lower().removesuffix(".gz").removesuffix(".xz").removesuffix(".zst"))[1] == ".json"
        hint = "; if it is JSON Lines, one object a line, rename it to .jsonl" if plain_json else ""
        raise CorpusError(f"{label}: unknown kind of file; embell reads {_KNOWN}{hint}")
    yield only


def _walked(folder: str, root: str) -> Iterator[TableFile]:
    """The usable files below a folder, sorted by path; a link counts only if it leads to a file below `root`."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise CorpusError(f"{_label(folder)}: cannot be read ({error.strerror}); check the folder's permissions") from error
    folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    # With its slash a folder's name sorts as the paths below it do.
    for entry in sorted(entries, key=lambda entry: entry.name + "/" * (entry.name in folders)):
        if entry.name in folders:
            if not _ours(entry.path):
                yield from _walked(entry.path, root)
        elif os.path.isfile(entry.path) and (not entry.is_symlink() or os.path.realpath(entry.path).startswith(root)):
            file = _recognised(entry.path)
            if file is not None:
                yield file


def _ours(folder: str) -> bool:
    """Whether a folder is a collection, or what a command that was stopped goes on from: neither is a source."""
    return folder.endswith(UNFINISHED) or all(
        os.path.exists(os.path.join(folder, name)) for name in ("manifest.json", "documents.lance")
    )


def is_read(path: str, source: str) -> bool:
    """Whether a file, there or not yet, is one that reading this source would read, itself or in the folder."""
    file, root = os.path.realpath(path), os.path.realpath(source)
    if file == root:
        return True
    inside = os.path.relpath(file, root).split(os.sep)
    return os.path.isdir(root) and not any(part.startswith(".") for part in inside) and _recognised(file) is not None


def _recognised(path: str) -> TableFile | None:
    stem, suffix = os.path.splitext(path.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = _KINDS.get(suffix)
    return None if kind is None else TableFile(path, _label(path), kind, compression)


def _label(path: str) -> str:
    """The path as messages and ids show it: in normal form, with forward slashes, and valid as UTF-8."""
    return os.fsencode(os.path.normpath(path)).decode(errors="backslashreplace").replace(os.sep, "/")


@contextmanager
def unpacked(file: BinaryIO, compression: str) -> Iterator[BinaryIO]:
    """The content of a file that may be compressed."""
    if compression == ".gz":
        with gzip.open(file) as stream:
            yield cast(BinaryIO, stream)
    elif compression == ".xz":
        with lzma.open(file) as stream:
            yield cast(BinaryIO, stream)
    elif compression == ".zst":
        import pyarrow  # only where it is needed: it takes longer to load than a small corpus to read

        with pyarrow.CompressedInputStream(file, "zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream))
    else:
        yield file


# Rows of each kind of file


def _json_lines(stream: BinaryIO) -> Iterator[FoundRow]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        line = line.rstrip(b"\r\n")
        if not line.strip():
            continue
        fields: Any = {}
        fault = ""
        try:
            fields = orjson.loads(line)
            if not isinstance(fields, dict):
                fields, fault = {}, f"a JSON value but not an object; each line must hold one JSON object; {FIX}"
            elif _LONG_NUMBER.search(line):
                fields = json.loads(line)  # orjson rounds integers of more than 64 bits
        except RecursionError:
            fields, fault = {}, f"nested too deeply to be read; {FIX}"
        except orjson.JSONDecodeError as error:
            fault = utf8_fault(line) or f"not valid JSON ({error.msg} at column {error.colno})"
            fault += f"; each line must hold one JSON object in UTF-8; {FIX}"
        yield FoundRow(number, number, fields, fault, line)


def _whole_text(stream: BinaryIO, label: str) -> FoundRow:
    content = stream.read()
    if fault := utf8_fault(content):
        said = {"text": content.decode("utf-8", "replace"), "path": label}
        return FoundRow(1, 1, said, f"{fault}; save the file as UTF-8, or skip such files with --keep-going")
    return FoundRow(1, 1, {"text": content.removeprefix(BOM).decode(), "path": label})


def _parquet(stream: BinaryIO, label: str, compressed: bool) -> Iterator[FoundRow]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() if compressed else nullcontext(stream) as file:
        if compressed:
            shutil.copyfileobj(stream, file, 1 << 20)
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)  # else it holds row groups whole
            check_names(table.schema_arrow.names, label)
            for batch in table.iter_batches(batch_size=256):
                columns = [_microseconds(column).to_pylist() for column in batch.columns]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield FoundRow(number, number, dict(zip(batch.schema.names, values, strict=True)))
        except (pyarrow.ArrowException, ValueError, KeyError, OverflowError) as error:
            after = f" after row {number}" if number else ""
            raise CorpusError(f"{label}: not a sound Parquet file{after} ({_one_line(error)}); write the file anew") from error


def _microseconds(column: Any) -> Any:
    """The column, with nanoseconds cut off: Python's own times hold none."""
    import pyarrow

    if pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
    return column


# From rows to documents


def to_document(row: Row, options: CorpusOptions) -> Document | None:
    """The row as a Document, or None if it has no text. A text file has its own id and text, whatever the options name.

    Raises CorpusError if the row lacks a field that it needs, or if a field holds what it cannot.
    """
    fields = row.fields
    id_name = None if _is_text_file(row) else options.id_field
    if id_name is None:
        id_name = next((name for name in ("id", "_id") if name in fields), None)
    elif id_name not in fields:
        raise _missing(row, [id_name], "id")
    wanted = ("text",) if _is_text_file(row) else options.text_fields or ("text",)
    text_names = [name for name in wanted if name in fields]
    if not text_names:
        raise _missing(row, wanted, "text")
    # A title that is no text was not asked for, and stays metadata.
    if not options.text_fields and not isinstance(fields.get("title", []), (list, dict, bool, bytes)):
        text_names.insert(0, "title")
    text = "\n".join(part for part in (_text(row, name) for name in text_names) if part.strip())
    if not text:
        return None
    return Document(
        id=row.default_id if id_name is None else _identity(row, id_name),
        text=text,
        metadata={
            name: _as_text(value) if name in options.string_fields else value
            for name, value in fields.items()
            if (name not in text_names or name in options.fields_beside) and name not in (id_name, options.vector_field)
        },
        vector=None if options.vector_field is None else _vector(row, options.vector_field),
        place=row.place,
        ordinal=row.ordinal,
    )


def _is_text_file(row: Row) -> bool:
    return row.place == row.default_id


def _check_first(row: Row, options: CorpusOptions) -> None:
    """Raises CorpusError if a source's first row lacks a named field: a typo must not reject or empty the whole corpus."""
    for name in options.text_fields or ("text",):
        if name not in row.fields:
            raise _missing(row, [name], "text")
    for named, role in ((options.id_field, "id"), (options.vector_field, "vector")):
        if named is not None and named not in row.fields:
            raise _missing(row, [named], role)


def _missing(row: Row, wanted: Sequence[str], role: str) -> CorpusError:
    spelling = {name.lower(): name for name in row.fields}
    near = [match for name in wanted for match in difflib.get_close_matches(name.lower(), spelling, 1)]
    guess = f"did you mean {spelling[near[0]]!r}? " if near else ""
    listed = ", ".join(map(shortened, list(row.fields)[:20])) + ", …" * (len(row.fields) > 20) or "none"
    return CorpusError(
        f"{row.place}: no field {' or '.join(map(shortened, wanted))}; the fields here: {listed}; "
        f"{guess}name the field that holds the {role} with --{role}-field"
    )


def _identity(row: Row, name: str) -> str:
    value = row.fields[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise CorpusError(f"{row.place}: id field {name!r} holds {_spoken(value)}; an id is text or an integer; {FIX}")


def _text(row: Row, name: str) -> str:
    value = row.fields[name]
    if isinstance(value, str):
        return value
    if value is None or value != value:  # NaN is how pandas writes null
        return ""
    if isinstance(value, (int, float, decimal.Decimal, datetime.date, datetime.time)) and not isinstance(value, bool):
        return str(value)
    raise CorpusError(f"{row.place}: text field {name!r} holds {_spoken(value)}; text or a number is needed; {FIX}")


def _vector(row: Row, name: str) -> list[float]:
    if name not in row.fields:
        raise _missing(row, [name], "vector")
    value = row.fields[name]
    fault = ""
    if isinstance(value, str):  # a cell of a CSV file
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            fault = "not a list of numbers"
    if fault or not isinstance(value, list) or not value or any(type(item) not in (int, float) for item in value):
        fault = f"{_spoken(value)}, not a list of numbers"
    elif not all(map(math.isfinite, value)):
        fault = "NaN or infinity"
    elif not any(value):
        fault = "only zeros, which point nowhere"
    if fault:
        raise CorpusError(f"{row.place}: vector field {name!r} holds {fault}; {FIX}")
    return [float(item) for item in value]


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, list, tuple, dict)):
        dumped = _dumped(value)
        return str(value) if dumped is None else dumped.decode()
    return str(value)


def _dumped(value: Any) -> bytes | None:
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # nested too deeply, or integers of more than 64 bits
        return None


def _spoken(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "an object"
    return shortened(value)


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
