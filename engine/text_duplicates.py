"""Near-duplicates of a list of texts: the search and the decision in one call."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.engine import reduction
from embell.engine.duplicates import Duplicates, Rows, chosen_thresholds, found_in_order, judge
from embell.engine.normalise import text_mark
from embell.engine.pair_list import PairList
from embell.engine.pair_search import find_pairs
from embell.engine.rules import check_keep, check_rule
from embell.engine.search_parts import Progress
from embell.errors import UsageError

if TYPE_CHECKING:
    from embell.engine.encoder import Encoder

Array = np.ndarray[Any, Any]


def deduplicate(
    texts: Any,
    *,
    ids: Sequence[str] | None = None,
    vectors: Array | None = None,
    encoder: Encoder | None = None,
    against: Sequence[str] | None = None,
    against_vectors: Array | None = None,
    threshold: float | None = None,
    lexical: float | None = None,
    contained: float | None = None,
    overlap: float | None = None,
    kinds: Sequence[str] | None = None,
    keep: str = "first",
    rule: str = "cover",
    reduce_to: int | None = None,
    group_by: Sequence[Any] | None = None,
    values: Mapping[str, Sequence[Any]] | None = None,
    text_field: str = "text",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Duplicates:
    """Near-duplicates among texts: a list, or a Hugging Face dataset with the column `text_field`.

    `threshold`, `lexical`, `contained`, `overlap` and `kinds` as for `chosen_thresholds`. Vectors `(n, dim)` may be
    given; else `encoder`, or the embedded model, makes them. `ids` are the texts' places, unless given. With `against`, texts are
    compared with those instead of among themselves. `group_by` names for each text the group it is compared in; `values` are columns
    for the keep policies "FIELD:max" and "FIELD:min" (the columns of a dataset are known). With `reduce_to`, rows that are no duplicates are
    dropped too, until no more than so many are left (`reduction.reduce_to`). With `folder`, a search that was killed goes on.

    Raises UsageError for options that do not exist, and for columns of another length.
    """
    from embell.indexers.exact import ExactIndex

    check_keep(keep)
    check_rule(rule)
    thresholds = chosen_thresholds(threshold, lexical=lexical, contained=contained, overlap=overlap, kinds=kinds)
    values = dict(values or {})
    if hasattr(texts, "column_names"):
        if text_field not in texts.column_names:
            raise UsageError(f"the dataset has no column {text_field!r}; there are {', '.join(texts.column_names)}")
        name = keep.rpartition(":")[0]
        if name in texts.column_names:
            values.setdefault(name, list(texts[name]))
        texts = texts[text_field]
    texts = list(texts)
    for name, some in (("texts", texts), ("against", against or ())):
        for at, text in enumerate(some):
            if not isinstance(text, str):
                raise UsageError(f"{name}: number {at} is {text!r}, not a text")
    lengths = np.array([len(text) for text in texts], np.int64)
    rows = Rows([str(at) for at in range(len(texts))] if ids is None else list(ids), lengths, values)
    for what, column in (("ids", rows.ids), ("group_by", group_by), ("vectors", vectors), *values.items()):
        if column is not None and len(column) != len(texts):
            raise UsageError(f"{what}: {len(column):,} for {len(texts):,} texts")

    if len(set(rows.ids)) < len(texts):
        raise UsageError("ids: some stand twice")
    if reduce_to is not None:
        reduction.check_count(reduce_to)
    if reduce_to is not None and (against is not None or group_by is not None):
        raise UsageError("reduce_to compares all texts with each other: leave out against and group_by")

    def stored(name: str, some: Sequence[str], given: Array | None) -> Array:
        nonlocal encoder
        if given is None:
            if encoder is None:
                from embell.engine.encoder import Encoder

                encoder = Encoder.load()
            given = encoder.encode(some)
        try:
            rows = np.asarray(given, np.float32)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name}: not an array of numbers ({error})") from error
        if rows.ndim != 2 or len(rows) != len(some):
            raise UsageError(f"{name}: {len(rows):,} for {len(some):,} texts; the array must be (texts, dim)")
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise UsageError("a vector holds NaN, or nothing but zeros")
        return np.asarray(rows / norms, np.float16)

    reference = list(against) if against is not None else []
    matrix = None
    if ("semantic" in thresholds or reduce_to is not None) and (len(texts) or len(reference)):
        matrix = stored("vectors", texts, vectors)
        if reference:
            other = stored("against_vectors", reference, against_vectors)
            if other.shape[1] != matrix.shape[1]:
                raise UsageError(f"vectors are {matrix.shape[1]} wide, against_vectors {other.shape[1]}: they cannot be compared")
            matrix = np.concatenate([other, matrix])
    groups = None
    if group_by is not None:
        known: dict[Any, int] = {}
        if not all(isinstance(value, Hashable) for value in group_by):
            raise UsageError("group_by: values must be numbers or texts")
        groups = np.array([known.setdefault(value, len(known)) for value in group_by], np.int64)
    if against is not None:
        rows = replace(
            rows, ids=[*(f"against#{at}" for at in range(len(reference))), *rows.ids],
            lengths=np.concatenate([np.array([len(text) for text in reference], np.int64), lengths]),
            values={name: [*[None] * len(reference), *column] for name, column in values.items()},
        )  # fmt: skip
        if groups is not None:
            raise UsageError("group_by and against cannot be used together")
        texts = reference + texts

    def search(order: Array | None) -> PairList:
        index = ExactIndex(1 if matrix is None else matrix.shape[1])
        if matrix is not None:
            index.add(np.arange(len(matrix)), matrix if order is None else matrix[order])
        ordered = texts if order is None else [texts[at] for at in order]
        return find_pairs(
            [text_mark(text) for text in ordered], index, lambda: ordered, thresholds, folder=folder, progress=progress,
            groups=groups if groups is None or order is None else groups[order], split=None if against is None else len(reference),
        )  # fmt: skip

    found = search(None) if against is not None else found_in_order(search, rows, thresholds, keep)
    judged = judge(found, rows, thresholds, keep, rule)
    if reduce_to is None or matrix is None:
        return judged
    index = ExactIndex(matrix.shape[1])
    index.add(np.arange(len(matrix)), matrix)
    return reduction.reduce_to(judged, reduce_to, index, progress)
