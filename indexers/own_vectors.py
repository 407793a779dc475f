"""Vectors of one's own: a NumPy file beside a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from embell.document import Document
from embell.errors import CorpusError
from embell.indexers.corpora import CorpusReport


def lines_up(path: str, rows: int, with_text: int) -> bool:
    """Whether the file has a row for each row of the source; False if only for each row with text, as `embell encode` writes.

    Raises CorpusError if it has neither number of rows.
    """
    matrix = _matrix(path)
    if len(matrix) not in (rows, with_text):
        texts = "" if with_text == rows else f" ({with_text} with text)"
        raise CorpusError(f"{path}: has {len(matrix)} rows, the source {rows}{texts}; they must line up")
    return len(matrix) == rows


def _matrix(path: str) -> np.ndarray[Any, Any]:
    try:
        matrix: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(f"{path}: cannot be read as a NumPy file ({error})") from error
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise CorpusError(f"{path}: holds {matrix.dtype} of shape {matrix.shape}; a row of numbers for each document is needed")
    return matrix


def with_vectors(documents: Iterator[Document], path: str, report: CorpusReport, by_row: bool) -> Iterator[Document]:
    """Each document with its row of the file: that of its number in the source, or among the documents if not `by_row`.

    Raises CorpusError if the file is not a two-dimensional array of numbers, holds NaN or a row of zeros,
    or has more or fewer rows than there are.
    """
    matrix = _matrix(path)
    for count, document in enumerate(documents):
        number = document.ordinal if by_row else count
        if number >= len(matrix):
            raise CorpusError(f"{path}: has {len(matrix)} rows, but the source has more: {document.place} is row {number + 1}")
        row = np.asarray(matrix[number], np.float32)
        if not np.isfinite(row).all():
            raise CorpusError(
                f"{path}: row {number + 1} (for {document.place}) holds NaN or infinity; correct it, or leave out that document"
            )
        if not row.any():
            raise CorpusError(f"{path}: row {number + 1} (for {document.place}) is all zeros and has no direction; correct it")
        yield replace(document, vector=row)  # type: ignore[arg-type]
    if by_row and report.rows != len(matrix):
        raise CorpusError(f"{path}: has {len(matrix)} rows, the source {report.rows}; they must line up")
