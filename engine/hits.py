"""Answers: the best rows of a snapshot as the documents that they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.errors import UsageError

if TYPE_CHECKING:
    from embell.engine.snapshot import Snapshot

Array = np.ndarray[Any, Any]

_INTERNAL = ("key", "id", "document", "start", "end", "text", "text_hash", "metadata_hash", "vector")


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer: the document's id, the exact cosine, its text and metadata.

    In a collection of chunks `text` is the best chunk, and `start` and `end` are its character offsets
    in the document.
    """

    id: str
    score: float
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    start: int | None = None
    end: int | None = None


def nearest_hits(
    look: Callable[[], Snapshot],
    chunked: bool,
    queries: Array,
    k: int,
    where: str | None = None,
    *,
    offset: int = 0,
    min_score: float | None = None,
    chunks: bool = False,
    without: str | None = None,
) -> list[list[Hit]]:
    """The `k` best documents for each query, but for one document; the others as for `Collection.search`.

    `look` gives the collection as it is now, and `chunked` says whether its rows are chunks.

    Raises UsageError for a score that is no cosine, and for a condition that does not fit the columns.
    """
    if min_score is not None and not np.isfinite(min_score):
        raise UsageError(f"min_score is a cosine, and {min_score} is none")
    name = "document" if chunked else "id"
    grouped = chunked and not chunks
    wanted = k + offset
    snapshot = look()
    while True:
        picks, scores = _picks(snapshot, name, queries, wanted, where, min_score, grouped, without)
        picks = [pick[offset:wanted] for pick in picks]
        keys = {key for pick in picks for key in pick}
        rows = snapshot.documents_of(sorted(keys))
        # The table may have moved on, in another thread, to where a row is gone: others take its place.
        if len(rows) == len(keys) or (now := look()) is snapshot:
            break
        snapshot = now
    return [
        [_hit(rows[key], score[key], chunked) for key in pick if key in rows] for pick, score in zip(picks, scores, strict=True)
    ]


def _picks(
    snapshot: Snapshot,
    name: str,
    queries: Array,
    wanted: int,
    where: str | None,
    min_score: float | None,
    grouped: bool,
    without: str | None,
) -> tuple[list[list[int]], list[dict[int, float]]]:
    """For each query, the keys of the best rows in order, and the scores of these and of others; `name` is the column of a document's id."""
    condition = None if where is None else snapshot.condition(where)
    reach = wanted + (without is not None)
    if grouped:
        reach *= 4  # several chunks of one document come together
    while True:
        scores, keys = snapshot.search(queries, min(reach, max(1, len(snapshot.keys))), condition)
        if min_score is not None:
            keys[scores < min_score] = -1
        known = [dict(zip(*row, strict=True)) for row in zip(keys.tolist(), scores.tolist(), strict=True)]
        if not grouped and without is None:
            return [[key for key in row if key >= 0] for row in keys.tolist()], known
        exhausted = (keys[:, -1] < 0) | (keys.shape[1] < reach)
        ids = snapshot.documents_of(sorted(set(keys[keys >= 0].tolist())), [name])
        picks = [_first_of_each([(key, ids[key][name]) for key in row if key in ids], grouped, without) for row in keys.tolist()]
        if all(len(pick) >= wanted or done for pick, done in zip(picks, exhausted, strict=True)):
            return picks, known
        reach *= 2


def hits_at(snapshot: Snapshot, chunked: bool, keys: Array, scores: Array) -> list[Hit]:
    """The rows of these keys `(n,)` as hits with these scores `(n,)`, but for those that are gone."""
    rows = snapshot.documents_of(sorted(keys.tolist()))
    return [_hit(rows[key], score, chunked) for key, score in zip(keys.tolist(), scores.tolist(), strict=True) if key in rows]


def _first_of_each(keyed: list[tuple[int, str]], grouped: bool, without: str | None) -> list[int]:
    """Keys in order, without those of one document, and of each document only the first if grouped."""
    seen: set[str] = set()
    keys = []
    for key, name in keyed:
        if name == without or (grouped and name in seen):
            continue
        seen.add(name)
        keys.append(key)
    return keys


def _hit(row: dict[str, Any], score: float, chunked: bool) -> Hit:
    metadata = {name: value for name, value in row.items() if name not in _INTERNAL and value is not None}
    if chunked:
        return Hit(row["document"], score, row["text"], metadata, row["start"], row["end"])
    return Hit(row["id"], score, row["text"], metadata)
