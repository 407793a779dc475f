"""The documents of an index generation, copied beside its vectors: rows by position and conditions without asking LanceDB.

The table stays the truth; the copy spares a search the several milliseconds that a look-up in it takes. It is an Arrow file,
memory-mapped. Conditions are evaluated where it lies: looked up, or by DataFusion, the engine that LanceDB parses them with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from embell.indexers.columns import INNER
from embell.indexers.comparisons import Columns, Fits, comparison, known_true, plain_comparison

Array = np.ndarray[Any, Any]
Read = TypeVar("Read")

_ROWS, _BYTES = 2**20, 2**28
"""At most so much in one batch: a look-up costs some time for each."""
_TOGETHER = 2**16
"""Rows that DataFusion works on at a time."""
_SAMPLED = 256
_SHARED = 2**19
"""Rows for each core; fewer are looked through before another core has begun."""
_STRING = re.compile(r"'[^']*'")
_UNSURE = re.compile(r'"|/\*|--|-\s*(?:0+\.?0*|\.0+)(?![\d.])|\bover\s*\(|\(\s*select\b', re.IGNORECASE)
"""What DataFusion and LanceDB may take differently: names and strings in double quotes, -0.0 in lists of whole numbers. And what is no condition on
a row alone, and would tell of rows in another order: windows, and queries within; and comments, which may hide these."""


class DocumentsFile:
    """Rows of a table, by their position in ascending order of keys."""

    FILES = ("documents.arrow",)

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        keys = [batch.column("key").to_numpy() for batch in batches]
        self._batches = list(batches)
        self._starts = np.cumsum([0, *map(len, keys)])
        self.keys: Array = np.concatenate(keys) if keys else np.empty(0, np.int64)
        self._row: Array | None = None  # by position, where that is another one
        if (np.diff(self.keys) < 0).any():
            self._row = np.argsort(self.keys)
            self.keys = self.keys[self._row]
        self._table: Any = None
        self._types: dict[str, pa.DataType] = {}
        self._columns = [Columns(batch.column) for batch in self._batches]
        self._sample = Columns(partial(_sampled, self._batches))

    @staticmethod
    def write(directory: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
        """Write rows, in whatever order they come, in large batches."""
        with pa.OSFile(str(directory / DocumentsFile.FILES[0]), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            held: list[pa.RecordBatch] = []
            for batch in batches:
                held.append(batch)
                if sum(map(len, held)) >= _ROWS or sum(part.nbytes for part in held) >= _BYTES:
                    writer.write_table(pa.Table.from_batches(held).combine_chunks())
                    held = []
            if held:
                writer.write_table(pa.Table.from_batches(held).combine_chunks())

    @classmethod
    def load(cls, directory: Path, schema: pa.Schema) -> DocumentsFile:
        """Open what `write` wrote, with the columns that the table has by now.

        Raises OSError or ValueError if it is missing or damaged.
        """
        reader = pa.ipc.open_file(pa.memory_map(str(directory / DocumentsFile.FILES[0])))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        if reader.schema.equals(schema):
            return cls(batches)
        return cls([pa.record_batch([_column(batch, field) for field in schema], schema=schema) for batch in batches])

    def rows(self, positions: Array, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows at these positions, a dictionary each."""
        numbers = positions if self._row is None else self._row[positions]
        found: list[dict[str, Any]] = [{}] * len(positions)
        for number, at, places in self._by_batch(numbers):
            batch = self._batches[number]
            some = batch if columns is None else batch.select(columns)
            for place, row in zip(at.tolist(), some.take(pa.array(places)).to_pylist(), strict=True):
                found[place] = row
        return found

    def plain(self, where: str) -> Fits | None:
        """What a condition says, for `fitting`, if it compares columns with whole numbers and strings, joined by AND, and says no more; else None.

        Of such there is nothing to check.
        """
        return plain_comparison(where, self._type_of)

    def comparison(self, where: str) -> Fits | None:
        """What a condition says, for `fitting`, if it compares columns with values and says no more; else None."""
        if not self._batches:
            return None
        schema = self._batches[0].schema
        return self.plain(where) or self._read(where, lambda condition: comparison(condition, schema))

    def fitting(self, fits: Fits, positions: Array | None = None) -> Array:
        """Whether the row at each position fits what `comparison` read, or that at each of these positions: bool."""
        if positions is None:
            found = np.concatenate([np.zeros(0, bool), *(fits(columns, None) for columns in self._columns)])
            return found if self._row is None else found[self._row]
        numbers = positions if self._row is None else self._row[positions]
        found = np.empty(len(numbers), bool)
        for number, at, places in self._by_batch(numbers):
            found[at] = fits(self._columns[number], places)
        return found

    def _by_batch(self, numbers: Array) -> Iterator[tuple[int, Array, Array]]:
        """Batches that hold rows of these numbers, which of the numbers, and where in the batch."""
        if len(self._batches) == 1:
            yield 0, np.arange(len(numbers)), numbers
            return
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        for batch in np.unique(which).tolist():
            at = np.flatnonzero(which == batch)
            yield batch, at, numbers[at] - self._starts[batch]

    def share(self, fits: Fits) -> float:
        """About which share of the rows fits, by a sample of them."""
        found = fits(self._sample, None)
        return np.count_nonzero(found) / len(found)

    def matches(self, where: str) -> Array | None:
        """Whether the row at each position fits a condition: bool; None if only LanceDB can tell."""
        if not len(self.keys):
            return np.zeros(0, bool)
        if (fits := self.comparison(where)) is not None:
            return self.fitting(fits)
        parts = self._read(where, lambda condition: self._asked().select(condition).collect_partitioned())
        if parts is None:
            return None
        columns = [batch.column(0) for part in parts for batch in part]
        if any(column.type != pa.bool_() for column in columns):
            return None
        found = np.concatenate([known_true(column) for column in columns])
        if len(found) != len(self.keys):  # no condition on rows
            return None
        return found if self._row is None else found[self._row]

    def _read(self, where: str, use: Callable[[Any], Read]) -> Read | None:
        """What is made of the condition as DataFusion reads it; None where it does not, or fails later."""
        if _UNSURE.search(_STRING.sub("''", where)):
            return None
        try:
            return use(self._asked().parse_sql_expr(f"({where})"))
        except Exception:  # DataFusion raises nothing more particular; LanceDB says what is wrong, or knows better
            return None

    def _type_of(self, word: str) -> pa.DataType | None:
        """The type of the column that a word stands for, if it may be asked about: `true` and `key` do not."""
        found = self._types.get(word)
        if found is None and self._batches and word in self._batches[0].schema.names and word not in INNER:
            read = self._read(word, lambda read: read.to_variant().name() if read.variant_name() == "Column" else None)
            if read == word:
                found = self._types[word] = self._batches[0].schema.field(word).type
        return found

    def _asked(self) -> Any:
        """The rows as a table of DataFusion's, whose answers keep their order: a share of the batches for each core."""
        if self._table is None:
            from datafusion import SessionConfig, SessionContext

            cores = max(1, min(torch.get_num_threads(), len(self.keys) // _SHARED))
            settings = SessionConfig().with_target_partitions(cores).with_batch_size(_TOGETHER)
            settings = settings.set("datafusion.sql_parser.enable_ident_normalization", "false")
            settings = settings.set("datafusion.optimizer.enable_round_robin_repartition", "false")
            session = SessionContext(settings)
            parts = [batch.slice(begin, _TOGETHER) for batch in self._batches for begin in range(0, len(batch), _TOGETHER)]
            share = -(-len(parts) // cores)
            session.register_record_batches("documents", [parts[begin : begin + share] for begin in range(0, len(parts), share)])
            self._table = session.table("documents")
        return self._table


def _sampled(batches: Sequence[pa.RecordBatch], name: str) -> pa.Array:
    """Some values of a column, evenly spaced in each batch."""
    step = -(-sum(map(len, batches)) // _SAMPLED)
    return pa.concat_arrays([batch.column(name).take(pa.array(range(0, len(batch), step))) for batch in batches])


def _column(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    """A column as the table has it now: whole numbers may have become fractions, and columns may have come."""
    if field.name not in batch.schema.names:
        return pa.nulls(len(batch), field.type)
    return batch.column(field.name).cast(field.type, safe=False)
