"""Conditions that compare columns with values, answered without planning a query: year < 1960 AND language IN ('en', 'de').

DataFusion takes a millisecond to optimise and plan a condition, and a tenth of one to read it after a search has emptied the caches. Where
it says no more than this, what it reads is looked up here; the plainest conditions are read here, too.
"""

from __future__ import annotations

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
"""Not fractions: engines differ about NaN and the sign of 0."""
_PLAIN = re.compile(r"([^\W\d]\w*)\s*(<=|>=|!=|<>|<|>|=)\s*(-?\d{1,18}|'[^']*')")
_AND = re.compile(r"\s+AND\s+", re.IGNORECASE)

Fits = Callable[[pa.RecordBatch, Array | None], Array]
"""Tells which rows of a batch fit, or which of those at some places in it: bool."""


def plain_comparison(where: str, schema: pa.Schema, named: Callable[[str], bool]) -> Fits | None:
    """What a condition says that is no more than comparisons with whole numbers and strings, joined by AND; None if it is more.

    `named` tells whether a word stands for the column of that name, and not for something of SQL's own.
    """
    found: list[Fits] = []
    for part in _AND.split(where.strip()):
        read = _PLAIN.fullmatch(part)
        if read is None:
            return None
        name, sign, written = read.groups()
        value = pa.scalar(written[1:-1]) if written[0] == "'" else pa.scalar(int(written), pa.int64())
        if schema.get_field_index(name) < 0 or schema.field(name).type != value.type or not named(name):
            return None
        found.append(_fits(name, "!=" if sign == "<>" else sign, value))
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
    asked = _asked(left, [right], schema)
    if asked is None:
        return None
    name, (value,) = asked
    return _fits(name, sign, value)


def _fits(name: str, sign: str, value: pa.Scalar) -> Fits:
    ours, arrows, _ = _OPERATIONS[sign]
    if value.type != pa.int64():
        return lambda *rows: known_true(arrows(_column(name, *rows), value))
    number = value.as_py()

    def fits(batch: pa.RecordBatch, places: Array | None = None) -> Array:
        column = batch.column(name)
        if column.null_count:
            column, places = _column(name, batch, places), None
        known, buffer = column.buffers()
        numbers = np.frombuffer(buffer, np.int64)[column.offset : column.offset + len(column)]
        found: Array = ours(numbers if places is None else numbers[places], number)
        return found & _bits(known, column) if column.null_count else found

    return fits


def _among(left: Any, items: Sequence[Any], schema: pa.Schema) -> Fits | None:
    asked = _asked(left, items, schema)
    if asked is None:
        return None
    name, values = asked
    listed = pa.array([value.as_py() for value in values], values[0].type)
    return lambda *rows: known_true(pc.is_in(_column(name, *rows), value_set=listed))


def _column(name: str, batch: pa.RecordBatch, places: Array | None = None) -> pa.Array:
    column = batch.column(name)
    return column if places is None else column.take(pa.array(places))


def _asked(left: Any, right: Sequence[Any], schema: pa.Schema) -> tuple[str, list[Any]] | None:
    """The name of a column and values of its type, if that is what stands there."""
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
