"""Vectors of one's own: a NumPy file beside a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from embell.document import Document
from embell.errors import CorpusError
from embell.indexers.corpora import CorpusReport


def check_rows(path: str, rows: int) -> None:
    """Raises CorpusError unless the file has a row for each of `rows` rows of the source."""
    matrix = _matrix(path)
    if len(matrix) != rows:
        raise CorpusError(f"{path}: has {len(matrix)} rows, the source {rows}; they must line up, skipped rows included")


def _matrix(path: str) -> np.ndarray[Any, Any]:
    try:
        matrix: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(f"{path}: cannot be read as a NumPy file ({error})") from error
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise CorpusError(f"{path}: holds {matrix.dtype} of shape {matrix.shape}; a row of numbers for each document is needed")
    return matrix


def with_vectors(documents: Iterator[Document], path: str, report: CorpusReport) -> Iterator[Document]:
    """Each document with its row of the file: the row of its own number in the source, skipped rows included.

    Raises CorpusError if the file is not a two-dimensional array of numbers, or has more or fewer rows
    than the source.
    """
    matrix = _matrix(path)
    for document in documents:
        if document.ordinal >= len(matrix):
            raise CorpusError(
                f"{path}: has {len(matrix)} rows, but the source has more: {document.place} is row {document.ordinal + 1}"
            )
        row = np.asarray(matrix[document.ordinal], np.float32)
        if not np.isfinite(row).all():
            raise CorpusError(
                f"{path}: row {document.ordinal + 1} (for {document.place}) holds NaN or infinity; correct it, or leave out that document"
            )
        if not row.any():
            raise CorpusError(
                f"{path}: row {document.ordinal + 1} (for {document.place}) is all zeros and has no direction; correct it"
            )
        yield replace(document, vector=row)  # type: ignore[arg-type]
    if report.rows != len(matrix):
        raise CorpusError(f"{path}: has {len(matrix)} rows, the source {report.rows}; they must line up")
