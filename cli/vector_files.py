"""The files that vectors end in: NumPy, Parquet, Arrow. Each is made from rows on disk, a block at a time."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.cli.outputs import sync

if TYPE_CHECKING:
    from embell.engine.encoder import Vectors

BLOCK_BYTES = 32 << 20
"""Of vectors that are in memory at a time; such a block is a row group of Parquet, a record batch of Arrow."""


def npy_header(rows: int, dim: int) -> bytes:
    """The header of an .npy file of float32 rows. It has the same length for any number of rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)})
    return header.getvalue()


def write_vector_file(suffix: str, path: Path, vectors: Path, ids: Iterable[str], dim: int, metadata: dict[str, bytes]) -> None:
    """Write `path` in the format of the suffix, from the .npy file `vectors` and the id of each row; it has reached the disk then.

    Parquet and Arrow get the columns `id` and `vector`, and `metadata` in their schema; .npy has place for neither.
    """
    path.unlink(missing_ok=True)  # left behind by a run that was killed
    if suffix == ".npy":
        try:
            os.link(vectors, path)
        except OSError:  # a file system without hard links
            shutil.copyfile(vectors, path)
    else:
        _write_table(suffix, path, _blocks(vectors, ids, dim), dim, metadata)
    sync(path)


def _blocks(vectors: Path, ids: Iterable[str], dim: int) -> Iterator[tuple[list[str], Vectors]]:
    rows = max(1, BLOCK_BYTES // (4 * dim))
    names = iter(ids)
    with vectors.open("rb") as file:
        file.seek(len(npy_header(0, dim)))
        while len(block := np.fromfile(file, "<f4", count=rows * dim)):
            yield list(islice(names, len(block) // dim)), block.reshape(-1, dim)


def _write_table(
    suffix: str, path: Path, blocks: Iterable[tuple[list[str], Vectors]], dim: int, metadata: dict[str, bytes]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), dim))], metadata=metadata)
    writer: Any
    if suffix == ".parquet":  # the bits of vectors are as good as random: packing them costs time and gains nothing
        packed = {"id": "zstd", "vector.list.element": "none"}
        writer = pyarrow.parquet.ParquetWriter(path, schema, compression=packed, use_dictionary=False, write_statistics=["id"])
    else:
        writer = pa.ipc.new_file(str(path), schema)
    with writer:
        for ids, vectors in blocks:
            columns = [pa.array(ids, pa.string()), pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
