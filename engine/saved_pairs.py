"""The pair list of a collection, kept beside it: what was compared, and every pair that was found."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from embell.engine.pair_list import KINDS, PAIR, PairList
from embell.engine.pair_search import SHINGLES

Array = np.ndarray[Any, Any]

FOLDER = "duplicates"
_MARK = 16


@dataclass(frozen=True)
class SavedPairs:
    """A pair list, and the rows that it is about: their keys `(n,)`, ascending, and the marks of their texts."""

    keys: Array
    marks: list[bytes]
    pairs: PairList

    @classmethod
    def read(cls, directory: Path) -> SavedPairs | None:
        """The list beside a collection; None if there is none that can be read, for it can be made anew."""
        try:
            table = pyarrow.parquet.read_table(directory / FOLDER / "pairs.parquet")
            about = orjson.loads(table.schema.metadata[b"embell"])
            with np.load(directory / FOLDER / "rows.npz") as rows:
                keys, marks, original, capped = rows["keys"], rows["marks"], rows["original"], rows["capped"]
            if about["rows"] != rows_digest(keys, original, capped) or about["shingles"] != str(SHINGLES):
                return None
            pairs = np.empty(len(table), PAIR)
            pairs["kind"] = pc.index_in(table["kind"], pa.array(KINDS)).to_numpy()
            for name in ("first", "second", "score", "overlap"):
                pairs[name] = table[name].to_numpy()
            if not all(((pairs[name] >= 0) & (pairs[name] < len(keys))).all() for name in ("first", "second")):
                return None
            found = PairList(len(keys), original, pairs, about["floors"], capped)
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, pa.ArrowException):
            return None
        return cls(keys, [bytes(mark) for mark in marks], found)

    @staticmethod
    def told(directory: Path) -> dict[str, Any] | None:
        """What there is beside a collection, without reading it all: `pairs`, `rows` compared, of which `capped`, and the `thresholds`; None if nothing."""
        try:
            found = pyarrow.parquet.read_metadata(directory / FOLDER / "pairs.parquet")
            floors = orjson.loads(found.metadata[b"embell"])["floors"]
            with np.load(directory / FOLDER / "rows.npz") as rows:
                return {"pairs": found.num_rows, "rows": len(rows["keys"]), "capped": len(rows["capped"]), "thresholds": floors}
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, pa.ArrowException):
            return None

    def write(self, directory: Path) -> None:
        """Write the list, in place of another."""
        part = directory / FOLDER / "new"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        marks = np.frombuffer(b"".join(self.marks), np.uint8).reshape(-1, _MARK)
        with (part / "rows.npz").open("wb") as file:
            np.savez(file, keys=self.keys, marks=marks, original=self.pairs.original, capped=self.pairs.capped)
        columns = {name: pa.array(self.pairs.pairs[name]) for name in ("first", "second", "score", "overlap")}
        kinds = pa.DictionaryArray.from_arrays(pa.array(self.pairs.pairs["kind"]), pa.array(KINDS))
        table = pa.table({**columns, "kind": kinds.cast(pa.string())})
        about = {
            "floors": self.pairs.floors,
            "rows": rows_digest(self.keys, self.pairs.original, self.pairs.capped),
            "shingles": str(SHINGLES),
        }
        pyarrow.parquet.write_table(table.replace_schema_metadata({"embell": orjson.dumps(about)}), part / "pairs.parquet")
        # The rows first: a list with the rows of another is not read.
        for name in ("rows.npz", "pairs.parquet"):
            (part / name).replace(directory / FOLDER / name)
        part.rmdir()

    def now(self, keys: Array) -> SavedPairs | None:
        """The list without the rows that are gone; None if others hang on these, so that it has to be made anew."""
        there = np.isin(self.keys, keys, assume_unique=True)
        if there.all():
            return self
        if len(self.pairs.capped) or (~there[self.pairs.original[there]]).any():
            return None
        place = np.cumsum(there) - 1
        pairs = self.pairs.pairs[there[self.pairs.pairs["first"]] & there[self.pairs.pairs["second"]]].copy()
        for name in ("first", "second"):
            pairs[name] = place[pairs[name]]
        found = replace(self.pairs, rows=int(there.sum()), original=place[self.pairs.original[there]], pairs=pairs)
        return SavedPairs(self.keys[there], [mark for mark, still in zip(self.marks, there, strict=True) if still], found)


def rows_digest(*arrays: Array) -> str:
    """What tells the rows of one list from those of another."""
    of = hashlib.blake2b(digest_size=16)
    for array in arrays:
        of.update(np.ascontiguousarray(array, np.int64).tobytes())
    return of.hexdigest()
