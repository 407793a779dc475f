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


def compared(expression: Any, batch: pa.RecordBatch) -> Array | None:
    """Where a DataFusion expression is true, and not unknown: bool by row.

    None if it holds anything but AND, OR, IN and comparisons of a column with a value of its own type.
    """
    kind = expression.variant_name()  # to_variant() does not know all of them
    if kind == "BinaryExpr":
        node = expression.to_variant()
        sign = node.op()
        if sign not in ("AND", "OR"):
            return _compared(sign, node.left(), node.right(), batch)
        one, other = (compared(side, batch) for side in (node.left(), node.right()))
        if one is None or other is None:
            return None
        return one & other if sign == "AND" else one | other
    if kind == "InList" and not (node := expression.to_variant()).negated():
        return _among(node.expr(), node.list(), batch)
    return None


def _compared(sign: str, left: Any, right: Any, batch: pa.RecordBatch) -> Array | None:
    if sign not in _OPERATIONS:
        return None
    if left.variant_name() == "Literal":
        left, right, sign = right, left, _OPERATIONS[sign][2]
    if left.variant_name() != "Column" or right.variant_name() != "Literal":
        return None
    column, value = batch.column(left.to_variant().name()), right.python_value()
    if column.type not in _TYPES or value.type != column.type:
        return None
    if column.type != pa.int64():
        return known_true(_OPERATIONS[sign][1](column, value))
    known, numbers = column.buffers()
    found: Array = _OPERATIONS[sign][0](
        np.frombuffer(numbers, np.int64)[column.offset : column.offset + len(column)], value.as_py()
    )
    return found & _bits(known, column) if column.null_count else found


def _among(left: Any, items: Sequence[Any], batch: pa.RecordBatch) -> Array | None:
    if left.variant_name() != "Column" or any(item.variant_name() != "Literal" for item in items):
        return None
    column, values = batch.column(left.to_variant().name()), [item.python_value() for item in items]
    if column.type not in _TYPES or any(value.type != column.type for value in values):
        return None
    return known_true(pc.is_in(column, value_set=pa.array([value.as_py() for value in values], column.type)))


def known_true(column: pa.BooleanArray) -> Array:
    """Where a column is true, and not unknown, as NumPy has it: Arrow's own way is several times as slow."""
    known, true = column.buffers()
    found = _bits(true, column)
    return found & _bits(known, column) if known is not None else found


def _bits(buffer: pa.Buffer, column: pa.Array) -> Array:
    found: Array = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")[column.offset : column.offset + len(column)]
    return found.view(bool)
