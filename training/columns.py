"""Tables to train on: which column is the query, which the positive, and what stands in them, file by file."""

from __future__ import annotations

import decimal
import difflib
import lzma
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embell.errors import CorpusError, UsageError
from embell.indexers.corpora import CorpusOptions, FoundRow, TableFile, source_files, unpacked
from embell.indexers.csv_rows import BOM, FIX, check_names, shortened, utf8_fault

_SKIPPING = FIX.removeprefix("correct it")  # the corpus reader can skip bad rows; a training set is put right instead
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of all files in order: a list for each role, all of the same length.

    An optional role that no file has a column for is left out. Where some rows have it and others not, those have "",
    NaN or (); no other value is any of these.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    lists: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Where a row comes from, for messages: its file and the line on which it starts (Parquet: its number, from 1)."""
        return f"{self.paths[row]}:{self.lines[row]}"


def read_columns(
    paths: Sequence[Path],
    wanted: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]] | None = None,
    *,
    numbers: Collection[str] = (),
    lists: Collection[str] = (),
    classes: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> Table:
    """Read the columns for some roles from `.jsonl .ndjson .csv .tsv .parquet`, each also `.gz .xz .zst`, and folders of them.

    Args:
        paths: the files and folders, read in this order
        wanted: the columns that are taken for each role, the best first; a column serves one role only
        optional: the same for roles that a file or a row may lack
        numbers: the roles whose values are numbers; all others are texts
        lists: the roles whose values are lists of texts; a single text counts as a list of one
        classes: the roles whose texts may be written as whole numbers
        names: the column of a role, in place of those it usually has

    Raises UsageError if there are no paths or `names` holds a role that does not exist; CorpusError for a file that cannot be read or has no rows,
    a column that is missing, and a row that cannot be parsed or has a value that is empty or of the wrong type.
    """
    names = names or {}
    optional = optional or {}
    roles = {**wanted, **optional}
    for role in names:
        if role not in roles:
            near = difflib.get_close_matches(role, roles, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(roles)}"
            raise UsageError(f"no column {role!r} is read here; {hint}")
    table = Table()
    for role in roles:
        values: dict[str, list[Any]] = table.numbers if role in numbers else table.lists if role in lists else table.texts
        values[role] = []
    if not paths:
        raise UsageError("no data: give --data FILE")
    files = [file for path in paths for file in tables(path)]
    met: set[str] = set()
    for file in files:
        met |= _Columns(file, wanted, optional, names, classes, table).read()
    for role in set(optional) - met:
        for of_kind in (table.texts, table.numbers, table.lists):
            of_kind.pop(role, None)
    return table


# Files and rows


def tables(path: Path) -> list[TableFile]:
    """The files of a path. Raises CorpusError if it does not exist or holds no table."""
    if str(path) == "-":
        raise CorpusError("-: training reads files, not stdin; write the rows to a file")
    found = [file for file in source_files(str(path)) if file.kind != "text"]
    if not found:
        what = "no table in this folder" if path.is_dir() else "a text file is no table"
        raise CorpusError(f"{path}: {what}; rows are read from .jsonl, .csv, .tsv and .parquet")
    return found


def _rows(file: TableFile) -> Iterator[FoundRow]:
    if file.kind == "tsv":
        return _tab_separated(file)
    options = CorpusOptions()
    if file.kind == "csv":
        first = next(file.read(options, None), None)
        options = CorpusOptions(string_fields=tuple(first.fields) if first else ())  # a text may be all digits
    return file.read(options, None)


def _tab_separated(file: TableFile) -> Iterator[FoundRow]:
    """The rows of TSV as everything else in training and evaluation reads it: a line each, and quotes mean nothing."""
    header: list[str] = []
    try:
        with open(file.path, "rb") as raw, unpacked(raw, file.compression) as stream:
            for number, line in enumerate(stream, 1):
                line = (line.removeprefix(BOM) if number == 1 else line).rstrip(b"\r\n")
                fault = utf8_fault(line)
                cells = line.decode(errors="replace").split("\t")
                if not header:
                    if fault:
                        raise CorpusError(f"{file.label}:{number}: {fault}; save the file as UTF-8")
                    check_names(cells, f"{file.label}:{number}")
                    header = cells
                    continue
                if not line.strip() and len(header) > 1:
                    continue
                if fault:
                    fault += "; save the file as UTF-8"
                elif len(cells) != len(header):
                    fault = f"{len(cells)} cells where the header has {len(header)}; a cell cannot hold a tab or a line break"
                yield FoundRow(number, number, {name: cell or None for name, cell in zip(header, cells, strict=False)}, fault)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CorpusError(
            f"{file.label}: cannot be read ({getattr(error, 'strerror', None) or error}); check the file"
        ) from error


# Columns


class _Columns:
    """The columns of one file, added to a table."""

    def __init__(
        self,
        file: TableFile,
        wanted: Mapping[str, Sequence[str]],
        optional: Mapping[str, Sequence[str]],
        names: Mapping[str, str],
        classes: Collection[str],
        table: Table,
    ) -> None:
        self._file, self._wanted, self._optional, self._names, self._table = file, wanted, optional, names, table
        self._classes = classes
        self._columns: dict[str, str] = {}

    def read(self) -> set[str]:
        """Add all rows; the roles that were met are returned. Raises CorpusError."""
        path, table, found = Path(self._file.path), self._table, None
        for found in _rows(self._file):
            place = f"{self._file.label}:{found.line}"
            if found.fault:
                raise CorpusError(f"{place}: {found.fault.replace(_SKIPPING, '')}")
            self._choose(found.fields)
            for role in (*self._wanted, *self._optional):
                value = found.fields.get(self._columns.get(role, ""))
                if role in table.texts:
                    table.texts[role].append("" if self._absent(role, value) else self._text(role, value, place))
                elif role in table.numbers:
                    table.numbers[role].append(math.nan if self._absent(role, value) else self._number(role, value, place))
                else:
                    table.lists[role].append(() if self._absent(role, value) else self._list(role, value, place))
            table.paths.append(path)
            table.lines.append(found.line)
        if found is None:
            raise CorpusError(f"{self._file.label}: no rows; check the file")
        for role, name in self._names.items():
            if role not in self._columns:
                raise self._missing(role, [name], found.fields)
        return set(self._columns)

    def _choose(self, fields: Mapping[str, Any]) -> None:
        """Find the columns of roles that have none yet: all that are wanted in the first row, optional ones when they appear."""
        if len(self._columns) == len(self._wanted) + len(self._optional):
            return
        for role, name in self._names.items():
            if name in fields:
                self._columns[role] = name
        taken = {*self._columns.values(), *self._names.values()}
        for role, usual in (*self._wanted.items(), *self._optional.items()):
            if role in self._columns:
                continue
            usual = () if role in self._names else usual
            column = next((name for name in usual if name in fields and name not in taken), None)
            if column is not None:
                self._columns[role] = column
                taken.add(column)
            elif role in self._wanted:
                raise self._missing(role, usual or [self._names[role]], fields)

    def _missing(self, role: str, accepted: Sequence[str], fields: Mapping[str, Any]) -> CorpusError:
        near = [match for name in accepted for match in difflib.get_close_matches(name, fields, 1)]
        hint = f"; did you mean {near[0]!r}?" if near and role in self._names else ""
        if taken := next((name for name in accepted if name in fields), None):
            other = next(other for other, name in {**self._names, **self._columns}.items() if name == taken)
            hint = f"; {taken!r} is taken for the {other}, name another one for one of the two"
        elif len(fields) == 1 and self._file.kind == "tsv" and "," in next(iter(fields)):
            hint = "; cells of a .tsv file are parted by tabs: with commas it is .csv"
        return CorpusError(
            f"{self._file.label}: no column for the {role}: accepted {'is' if len(accepted) == 1 else 'are'} "
            f"{', '.join(map(shortened, accepted))}; the columns here: {', '.join(map(shortened, fields)) or 'none'}{hint}"
        )

    # Values

    def _absent(self, role: str, value: Any) -> bool:
        return value is None and role in self._optional

    def _fault(self, role: str, place: str, value: Any, needed: str) -> CorpusError:
        held = "nothing" if value is None else shortened(value)
        if isinstance(value, (list, dict)):
            held = "an object" if isinstance(value, dict) else "a list" if value else "an empty list"
        return CorpusError(f"{place}: the {role}, column {self._columns[role]!r}, holds {held}; {needed} is needed")

    def _text(self, role: str, value: Any, place: str) -> str:
        if role in self._classes and type(value) is int:
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self._fault(role, place, value, "text")
        return value

    def _list(self, role: str, value: Any, place: str) -> tuple[str, ...]:
        items = value if isinstance(value, list) else [value]
        if not items and role not in self._optional:
            raise self._fault(role, place, value, "text, or a list of texts,")
        for item in items:
            if not isinstance(item, str) or not item.strip():
                raise self._fault(role, place, item, "text, or a list of texts,")
        return tuple(items)

    def _number(self, role: str, value: Any, place: str) -> float:
        written = self._file.kind in ("csv", "tsv") and isinstance(value, str) and _NUMBER.fullmatch(value.strip())
        if written or (isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool)):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
        raise self._fault(role, place, value, "a finite number")
