"""Conditions that compare columns with values, answered without planning a query: year < 1960 AND language IN ('en', 'de').

DataFusion takes a millisecond to optimise and plan a condition, and a tenth of one to read it after a search has emptied the caches. Where
it says no more than this, what it reads is looked up here; the plainest conditions are read here, too.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Array = np.ndarray[Any, Any]

_OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "=": (operator.eq, pc.equal, "="),
    "!=": (operator.ne, pc.not_equal, "!="),
    "<": (operator.lt, pc.less, ">"),
    "<=": (operator.le, pc.less_equal, ">="),
    ">": (operator.gt, pc.greater, "<"),
    ">=": (operator.ge, pc.greater_equal, "<="),
}
"""NumPy's comparison, Arrow's, and the sign with its sides exchanged."""
_TYPES = (pa.int64(), pa.string(), pa.bool_())
_EXACT = 2**53
"""Whole numbers below it are numbers of float64."""
_PLAIN = re.compile(r"([^\W\d]\w*)[ \t\r\n]*(<=|>=|!=|<>|<|>|=)[ \t\r\n]*(-?[0-9]{1,18}(?:\.[0-9]{1,18})?|'[^'\ud800-\udfff]*')")
_AND = re.compile(r"(?<![ \t\r\n])[ \t\r\n]+AND[ \t\r\n]+", re.IGNORECASE)


class Columns:
    """Columns of some rows, each taken out once: after a search has emptied the caches, that takes longer than to compare some values."""

    def __init__(self, column: Callable[[str], pa.Array]) -> None:
        self._take = column
        self._columns: dict[str, pa.Array] = {}
        self._numbers: dict[str, Array] = {}

    def column(self, name: str) -> pa.Array:
        """A column."""
        if name not in self._columns:
            self._columns[name] = self._take(name)
        return self._columns[name]

    def numbers(self, name: str) -> Array | None:
        """A column of float64 or int64; None if it has gaps."""
        if name not in self._numbers:
            column = self.column(name)
            if column.null_count:
                return None
            self._numbers[name] = _numbers(column)
        return self._numbers[name]


Fits = Callable[[Columns, Array | None], Array]
"""Tells which rows fit, or which of those at some places: bool."""


def plain_comparison(where: str, type_of: Callable[[str], pa.DataType | None]) -> Fits | None:
    """What a condition says that is no more than comparisons with numbers and strings, joined by AND; None if it is more.

    `type_of` tells the type of the column that a word stands for, None if it stands for none, but for something of SQL's own.
    """
    found: list[Fits] = []
    for part in _AND.split(where.strip(" \t\r\n")):
        read = _PLAIN.fullmatch(part)
        if read is None:
            return None
        name, sign, written = read.groups()
        value = written[1:-1] if written[0] == "'" else float(written) if "." in written else int(written)
        asked = _as(type_of(name), "!=" if sign == "<>" else sign, value)
        if asked is None:
            return None
        found.append(_fits(name, *asked))
    return found[0] if len(found) == 1 else lambda *rows: np.logical_and.reduce([fits(*rows) for fits in found])


def comparison(expression: Any, schema: pa.Schema) -> Fits | None:
    """What tells where a DataFusion expression is true, and not unknown.

    None if the expression holds anything but AND, OR, IN and comparisons of a column with a value of its own type.
    """
    kind = expression.variant_name()  # to_variant() does not know all of them
    if kind == "BinaryExpr":
        node = expression.to_variant()
        sign = node.op()
        if sign not in ("AND", "OR"):
            return _compared(sign, node.left(), node.right(), schema)
        one, other = (comparison(side, schema) for side in (node.left(), node.right()))
        if one is None or other is None:
            return None
        both = np.logical_and if sign == "AND" else np.logical_or
        return lambda *rows: both(one(*rows), other(*rows))
    if kind == "InList" and not (node := expression.to_variant()).negated():
        return _among(node.expr(), node.list(), schema)
    return None


def _compared(sign: str, left: Any, right: Any, schema: pa.Schema) -> Fits | None:
    if sign not in _OPERATIONS:
        return None
    if left.variant_name() == "Literal":
        left, right, sign = right, left, _OPERATIONS[sign][2]
    if left.variant_name() != "Column" or right.variant_name() != "Literal":
        return None
    name, literal = left.to_variant().name(), right.python_value()
    if literal.type not in (*_TYPES, pa.float64()):
        return None
    asked = _as(schema.field(name).type, sign, literal.as_py())
    return None if asked is None else _fits(name, *asked)


Value = int | str | bool | float


def _as(kind: pa.DataType | None, sign: str, value: Value) -> tuple[str, Value] | None:
    """The comparison as one with a value of a column's type; None for one of another type: how that is taken, DataFusion knows."""
    if kind == pa.float64() and type(value) is int:
        return (sign, float(value)) if abs(value) < _EXACT else None
    if kind == pa.int64() and isinstance(value, float):
        return _among_whole(sign, value)
    wanted = {pa.int64(): int, pa.float64(): float, pa.string(): str, pa.bool_(): bool}
    return (sign, value) if kind in wanted and type(value) is wanted[kind] else None


def _fits(name: str, sign: str, value: Value) -> Fits:
    """What tells where a column, of the type of `value`, compares with it like that."""
    ours, arrows, _ = _OPERATIONS[sign]
    if isinstance(value, (str, bool)):
        return lambda *rows: known_true(arrows(_column(name, *rows), value))

    def fits(rows: Columns, places: Array | None = None) -> Array:
        numbers, column = rows.numbers(name), None
        if numbers is None:
            column = _column(name, rows, places)
            numbers = _numbers(column)
        elif places is not None:
            numbers = numbers[places]
        found: Array = ours(numbers, value)
        if isinstance(value, float) and (odd := np.isnan(numbers)).any():
            found[odd] = ours(_order(numbers[odd]), _order(np.float64(value)))
        known = None if column is None else column.buffers()[0]
        return found if known is None else found & _bits(known, column)

    return fits


def _numbers(column: pa.Array) -> Array:
    kind = np.float64 if column.type == pa.float64() else np.int64
    found: Array = np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column)]
    return found


def _among_whole(sign: str, value: float) -> tuple[str, int]:
    """The comparison of a whole number of 64 bits with a fraction as one with another such number: exact, beyond 2^53 too."""
    least, most = -(2**63), 2**63 - 1
    all_of_them, none_of_them = (">=", least), ("<", least)
    if value.is_integer() and least <= value <= most:
        return sign, int(value)
    if sign in ("=", "!="):
        return none_of_them if sign == "=" else all_of_them
    if value > most or value < least:
        return all_of_them if (value > 0) == (sign in ("<", "<=")) else none_of_them
    return ("<=", math.floor(value)) if sign in ("<", "<=") else (">=", math.ceil(value))


def _order(numbers: Any) -> Any:
    """Whole numbers in the order of these fractions as DataFusion has it: NaN is larger than all others, or smaller, by its sign."""
    bits = numbers.view(np.int64)
    return bits ^ ((bits >> 63) & np.int64(2**63 - 1))


def _among(left: Any, items: Sequence[Any], schema: pa.Schema) -> Fits | None:
    asked = _asked(left, items, schema)
    if asked is None:
        return None
    name, values = asked
    listed = pa.array([value.as_py() for value in values], values[0].type)
    return lambda *rows: known_true(pc.is_in(_column(name, *rows), value_set=listed))


def _column(name: str, rows: Columns, places: Array | None = None) -> pa.Array:
    column = rows.column(name)
    return column if places is None else column.take(pa.array(places))


def _asked(left: Any, right: Sequence[Any], schema: pa.Schema) -> tuple[str, list[Any]] | None:
    """The name of a column and values of its type, no fractions, if that is what stands there."""
    if left.variant_name() != "Column" or any(value.variant_name() != "Literal" for value in right):
        return None
    name, values = left.to_variant().name(), [value.python_value() for value in right]
    kind = schema.field(name).type
    return (name, values) if kind in _TYPES and all(value.type == kind for value in values) else None


def known_true(column: pa.BooleanArray) -> Array:
    """Where a column is true, and not unknown, as NumPy has it: Arrow's own way is several times as slow."""
    known, true = column.buffers()
    found = _bits(true, column)
    return found & _bits(known, column) if known is not None else found


def _bits(buffer: pa.Buffer, column: pa.Array) -> Array:
    found: Array = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")[column.offset : column.offset + len(column)]
    return found.view(bool)
