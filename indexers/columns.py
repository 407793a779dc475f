"""Typed metadata columns: which Arrow type each metadata field has, and how Python values fit it."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
import pyarrow as pa

from embell.document import Document
from embell.errors import CorpusError

RESERVED = ("key", "id", "document", "start", "end", "text", "text_hash", "metadata_hash", "vector")
"""Columns of the table itself; a metadata field of the same name gets an underscore behind it."""

INNER = ("key", "text_hash", "metadata_hash", "vector")
"""Those of them that no condition may name."""

WIDENED = "__as_float"
"""Ends the name of a column that is on its way from whole numbers to fractions."""

_LANCE = ("_rowid", "_rowaddr", "_rowoffset", "")

_SCALARS: tuple[tuple[type, pa.DataType], ...] = (
    (bool, pa.bool_()),
    (int, pa.int64()),
    (float, pa.float64()),
    (str, pa.string()),
    (datetime.datetime, pa.timestamp("us")),
    (datetime.date, pa.date32()),
    (bytes, pa.binary()),
)


def column_name(field: str) -> str:
    """The column that holds a metadata field: its own name, made free of what LanceDB and the table keep for themselves."""
    name = field.replace(".", "_").replace("`", "_")
    return f"{name}_" if name in RESERVED or name in _LANCE or name.endswith(WIDENED) else name


def plain(value: Any) -> Any:
    """The value as a type that a column can hold; objects and mixed lists become JSON text."""
    if value is None or isinstance(value, (bool, float, str, bytes, datetime.date)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, (datetime.time, datetime.timedelta)):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        return plain(value.item())
    if isinstance(value, (list, tuple)):
        if not value:
            return None
        items = [plain(item) for item in value]
        kinds = {type(item) for item in items}
        if len(kinds) == 1 and kinds <= {bool, int, float, str}:
            return items
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # deeper, or with larger integers, than orjson writes
        return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":"))


def type_of(value: Any) -> pa.DataType:
    """The Arrow type of a plain value that is not None."""
    if isinstance(value, list):
        return pa.list_(type_of(value[0]))
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        return pa.timestamp("us", tz="UTC")
    return next(kind for python, kind in _SCALARS if isinstance(value, python))


class MetadataTypes:
    """The column types of a collection, grown document by document.

    An integer column that meets a fraction becomes a float column (`widened`); any other
    disagreement is an error.
    """

    def __init__(self, types: Mapping[str, pa.DataType]) -> None:
        self.types = dict(types)
        self.added: dict[str, pa.DataType] = {}
        self.widened: set[str] = set()

    def take(self, document: Document) -> dict[str, Any]:
        """The document's metadata as column values.

        Raises CorpusError if a value does not fit its column.
        """
        values: dict[str, Any] = {}
        news: dict[str, pa.DataType] = {}
        where = document.place or f"document {document.id!r}"
        for field, given in document.metadata.items():
            name = column_name(field)
            value = plain(given)
            if value is None:
                continue
            kind = type_of(value)
            if name in values:
                raise CorpusError(f"{where}: field {field!r} and another one would share the column {name!r}; rename one of them")
            known = self.types.get(name)
            if known is None or (known == pa.int64() and kind == pa.float64()):
                news[name] = kind
            elif known != kind and not (known == pa.float64() and kind == pa.int64()):
                raise CorpusError(
                    f"{where}: field {field!r} holds {_spoken(kind)} ({str(value)[:40]!r}), but the column holds {_spoken(known)}; "
                    f"make them one type, or index into a new collection with --string-field {field}"
                )
            values[name] = value
        # Only now: a document that is refused leaves no column behind.
        for name, kind in news.items():
            if name not in self.types or name in self.added:
                self.added[name] = kind
            else:
                self.widened.add(name)
            self.types[name] = kind
        return values

    def applied(self) -> None:
        """Forget what was added and widened: the table has it now."""
        self.added.clear()
        self.widened.clear()


def _spoken(kind: pa.DataType) -> str:
    names = {pa.string(): "text", pa.int64(): "integers", pa.float64(): "numbers", pa.bool_(): "true/false"}
    return names.get(kind, str(kind))


def arrow_column(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    """Plain values as a column of `kind`; whole numbers enter a float column as floats."""
    if kind == pa.float64():
        return pa.array([None if value is None else float(value) for value in values], kind)
    return pa.array(list(values), kind)
