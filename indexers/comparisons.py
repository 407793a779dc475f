"""Conditions that compare columns with values, answered without planning a query: year < 1960 AND language IN ('en', 'de').

DataFusion reads a condition in a hundredth of a millisecond and takes one to optimise and plan it. Where it says no more than
this, what it reads is looked up here.
"""

from __future__ import annotations

import operator
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


Fits = Callable[[pa.RecordBatch], Array]


def comparison(expression: Any, schema: pa.Schema) -> Fits | None:
    """What tells where a DataFusion expression is true, and not unknown: bool by row of a batch.

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
        return lambda batch: both(one(batch), other(batch))
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
    ours, arrows, _ = _OPERATIONS[sign]
    if value.type != pa.int64():
        return lambda batch: known_true(arrows(batch.column(name), value))
    number = value.as_py()

    def fits(batch: pa.RecordBatch) -> Array:
        column = batch.column(name)
        known, numbers = column.buffers()
        found: Array = ours(np.frombuffer(numbers, np.int64)[column.offset : column.offset + len(column)], number)
        return found & _bits(known, column) if column.null_count else found

    return fits


def _among(left: Any, items: Sequence[Any], schema: pa.Schema) -> Fits | None:
    asked = _asked(left, items, schema)
    if asked is None:
        return None
    name, values = asked
    listed = pa.array([value.as_py() for value in values], values[0].type)
    return lambda batch: known_true(pc.is_in(batch.column(name), value_set=listed))


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
