"""CSV and TSV: rows read line by line, with a type for each column."""

from __future__ import annotations

import csv
import math
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, BinaryIO

from embell.errors import CorpusError

SAMPLE_ROWS = 10_000
"""The types of the columns are decided from so many rows, …"""
SAMPLE_CHARACTERS = 1 << 26
"""… or from as many as stand in so many characters: the rows wait in memory."""
CELL_CHARACTERS = 1 << 26
"""The longest cell. Without a limit, a quote that is never closed would swallow the rest of the file."""

BOM = b"\xef\xbb\xbf"
_OR_SKIP = ", or skip such rows with --keep-going"
FIX = f"correct it{_OR_SKIP}"

_Line = tuple[int, list[str], str]
"""The line on which a row starts, its cells, and what is wrong with it."""


def table_rows(
    stream: BinaryIO, delimiter: str, place: str, as_text: Collection[str]
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The rows below the header: line, fields, and what is wrong with the row ("" if nothing is).

    The columns in `as_text` keep their cells as they are written; an empty cell is None.
    Raises CorpusError if there is no header line, or if it lacks a name or has one twice.
    """
    lines = _lines(stream, delimiter)
    line, names, fault = next(lines, (1, [], "no header line; the first line must name the columns"))
    if fault:
        raise CorpusError(f"{place}:{line}: {fault.removesuffix(_OR_SKIP)}")
    check_names(names, f"{place}:{line}")
    sample: deque[_Line] = deque()
    characters = 0
    for row in islice(lines, SAMPLE_ROWS):
        sample.append(row)
        characters += sum(map(len, row[1]))
        if characters >= SAMPLE_CHARACTERS:
            break
    types = [
        _text if name in as_text else _type_of(cells[at] for _, cells, fault in sample if not fault)
        for at, name in enumerate(names)
    ]
    for line, cells, fault in chain(_drained(sample), lines):
        fields: dict[str, Any] = dict(zip(names, cells, strict=False))
        if fault:
            if cells[len(names) :]:
                fields[""] = cells[len(names) :]
            yield line, fields, fault
            continue
        for name, convert, cell in zip(names, types, cells, strict=True):
            try:
                fields[name] = convert(cell) if cell else None
            except ValueError:
                fault = (
                    f"column {name!r} holds {shortened(cell)}, but its first rows hold {_TYPES[convert]}; "
                    f"correct it, or keep the column as text with --string-field {name}"
                )
                fields = dict(zip(names, cells, strict=True))
                break
        yield line, fields, fault


def check_names(names: Sequence[str], place: str) -> None:
    """Raises CorpusError if a column has no name or two have the same."""
    for at, name in enumerate(names):
        if not name.strip():
            raise CorpusError(f"{place}: column {at + 1} has no name; give every column one")
        if name in names[:at]:
            raise CorpusError(f"{place}: two columns are named {name!r}; rename one of them")


def utf8_fault(data: bytes) -> str:
    """What is wrong with bytes that should be UTF-8, and where; "" if nothing is."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})"
    return ""


def shortened(value: Any) -> str:
    """The value as one short piece of a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:58] + "…" + shown[0]


def _drained(rows: deque[_Line]) -> Iterator[_Line]:
    while rows:
        yield rows.popleft()


# Lines and cells


class _Source:
    """Decoded lines for the csv module, which can be taken back when they turn out not to belong to one row."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.read = 0  # lines handed out, those taken back not counted
        self.row: list[str] = []  # the lines of the row at hand
        self.row_fault = ""
        self.waiting: deque[str] = deque()
        self.faults: dict[int, str] = {}

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> str:
        if self.waiting:
            line = self.waiting.popleft()
            self.read += 1
        else:
            data = next(self.stream)
            self.read += 1
            if self.read == 1:
                data = data.removeprefix(BOM)
            if fault := utf8_fault(data):
                self.faults[self.read] = fault
            line = data.decode(errors="replace")
        self.row.append(line)
        return line

    def keep_first(self) -> str:
        """Take back every line of the row but its first, and return that."""
        self.waiting.extendleft(reversed(self.row[1:]))
        self.read -= len(self.row) - 1
        del self.row[1:]
        return self.row[0]


def _lines(stream: BinaryIO, delimiter: str) -> Iterator[_Line]:
    """Every row that is not blank, the header first."""
    csv.field_size_limit(max(csv.field_size_limit(), CELL_CHARACTERS))
    source = _Source(stream)
    # Strict: otherwise a row with a misplaced quote would be joined with its neighbours and nobody told.
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    width = 0
    while True:
        source.row.clear()
        line, cells, fault = source.read + 1, [""], ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = f"cells cannot be told apart ({error}); put quotes around the cell and double those in it; {FIX}"
        rows = len(source.row) > 1 and all(row.count(delimiter) == width - 1 for row in source.row)
        if width and (fault or len(cells) != width or (rows and delimiter == "\t")):
            # Many writers of TSV know no quoting: there, a cell that begins with a quote stands as it is, and lines that are rows are not joined.
            literal = source.row[0].rstrip("\r\n").split("\t") if delimiter == "\t" else []
            if len(literal) == width:
                source.keep_first()
                cells, fault = literal, ""
            elif fault:
                cells = [source.keep_first().rstrip("\r\n")]
        undecoded = [number for number in source.faults if number <= source.read]
        for number in undecoded:
            at = "" if number == line else f" on line {number}"
            fault = f"{source.faults.pop(number)}{at}; save the file as UTF-8{_OR_SKIP}"
        if not fault and (not cells or (len(cells) == 1 < width and not cells[0].strip())):
            continue
        width = width or len(cells)
        if not fault and len(cells) != width:
            fault = f"{len(cells)} cells where the header has {width}; put quotes around cells that hold a delimiter; {FIX}"
        yield line, cells, fault


# Types of columns


def _text(cell: str) -> Any:
    return cell


def _integer(cell: str) -> Any:
    # A leading zero tells a code (007, a postal code) from a number.
    if not re.fullmatch(r"0|-?[1-9][0-9]{0,18}", cell) or not -(2**63) <= int(cell) < 2**63:
        raise ValueError
    return int(cell)


def _number(cell: str) -> Any:
    if not re.fullmatch(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", cell):
        raise ValueError
    value = float(cell)
    # Long whole numbers are names of things; a float would round them.
    if not math.isfinite(value) or (cell.lstrip("-").isdigit() and abs(int(cell)) > 2**53):
        raise ValueError
    return value


def _boolean(cell: str) -> Any:
    if cell.lower() not in ("true", "false"):
        raise ValueError
    return cell.lower() == "true"


_TYPES: dict[Callable[[str], Any], str] = {_integer: "integers", _number: "numbers", _boolean: "true or false"}


def _type_of(cells: Iterable[str]) -> Callable[[str], Any]:
    """The narrowest type that holds every cell."""
    filled = [cell for cell in cells if cell]
    for convert in _TYPES if filled else ():
        try:
            for cell in filled:
                convert(cell)
        except ValueError:
            continue
        return convert
    return _text
