"""Reduction: a corpus brought down to so many documents, those dropped that resemble a kept one most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from embell.engine.closeness import closeness, nearest
from embell.engine.duplicates import Dropped, Duplicates
from embell.engine.rules import decide
from embell.engine.search_parts import Progress
from embell.errors import UsageError
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]

REDUCED = "reduced"
"""The kind of a document that was dropped to reach the number asked for, or whose kept document was."""

_BLOCK = 1024
"""Rows that are compared with those kept so far, and then with each other."""
_NEIGHBOURS, _SAMPLE = 10, 50_000
"""Neighbours that say how many rows one stands for, and rows that they are looked for among."""
_PARTNERED, _ASKED, _MOST_PAIRS = 2.5, 2000, 20_000_000
"""Pairs are listed down to the cosine that so many rows reach, for each that is to go; the rows that this is estimated from; the longest list."""
_STEPS = 16
_LOOKED_AT = 10
"""Rows that are looked at for each that is to stay besides."""
_NEAR = 0.01
"""Share of the rows wanted that may be missing when the search for the cosine ends."""


def reduce_to(found: Duplicates, count: int, index: ExactIndex, progress: Progress | None = None) -> Duplicates:
    """Keep at most `count` documents: of those that are kept, drop the ones that resemble another most.

    `index` holds the vectors of the documents `found` is about, in their order. The result is a greedy cover, as at a
    threshold: the highest cosine at which no more than `count` stay, looked for by bisection. Where it leaves fewer, the documents
    that resemble their kept ones least stay too, so that there are `count`. The order is that of the keep policy; with "first" and "central", documents
    with nearer neighbours are preferred, for they stand for more. Each document that is dropped here names the nearest
    kept one, whose cosine is its score; so does, then, a duplicate whose kept document goes. If the duplicates alone leave no more
    than `count`, nothing is changed. Groups that documents were compared in count no more.

    Raises UsageError for a count that is no number above 0, and for a result that compared two corpora.
    """
    check_count(count)
    if found.found.split is not None:
        raise UsageError("reduce to: two corpora were compared; reduce what is kept in a second step")
    if len(found.kept) <= count:
        return found
    order = found.kept_positions[np.argsort(found.rank[found.kept_positions])]
    rows = index.part(order)
    if found.keep in ("first", "central"):
        sample = np.zeros(len(rows), bool)
        sample[np.random.default_rng(0).permutation(len(rows))[:_SAMPLE]] = True
        order = order[np.argsort(-closeness(rows, _NEIGHBOURS, sample, progress), kind="stable")]
        rows = index.part(order)
    kept = _filled(rows, _cover_of(rows, count, progress), count)

    stays = np.zeros(len(found.rows.ids), bool)
    stays[order[kept]] = True
    ids = found.rows.ids
    known = {row.id: row for row in found.dropped}
    gone = {ids[at] for at in order[~kept].tolist()}
    fresh = np.array([at for at in np.flatnonzero(~stays).tolist() if (row := known.get(ids[at])) is None or row.kept_id in gone])
    scores, places = nearest(rows, index, fresh, kept)
    for at, score, place in zip(fresh.tolist(), scores.tolist(), places.tolist(), strict=True):
        known[ids[at]] = Dropped(ids[at], ids[order[place]], score, REDUCED)
    positions = np.flatnonzero(stays)
    dropped = [known[ids[at]] for at in np.flatnonzero(~stays).tolist()]
    return replace(
        found,
        kept=[ids[at] for at in positions.tolist()],
        dropped=dropped,
        kept_positions=positions,
        reduced=min(row.score for row in dropped if row.kind == REDUCED),
    )


def check_count(count: int) -> None:
    """Raises UsageError for what is no number of documents to keep."""
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"reduce to: keep at least 1 document, not {count!r}")


def _cover_of(rows: ExactIndex, count: int, progress: Progress | None) -> Array:
    """A greedy cover of no more than `count` rows, at a cosine that is as high as that allows: a bool array."""
    low, high = -1.0, 1.0  # at -1 the first row covers all, at 1 there are too many
    kept = np.zeros(len(rows), bool)
    kept[0] = True
    floor, pairs = _pairs(rows, count)
    if pairs is not None:
        found = _cover_by(pairs, len(rows), floor, count)
        low, high, kept = (low, floor, kept) if found is None else (floor, high, found)
    for step in range(_STEPS):
        if progress is not None:
            progress("looking for a cosine", step / _STEPS)
        middle = (low + high) / 2
        if pairs is not None and middle >= floor:
            found = _cover_by(pairs, len(rows), middle, count)
        else:
            found = _cover(rows, middle, count)
        if found is None:
            high = middle
            continue
        low, kept = middle, found
        if kept.sum() >= (1 - _NEAR) * count:
            break
    return kept


def _pairs(rows: ExactIndex, count: int) -> tuple[float, tuple[Array, Array, Array] | None]:
    """A cosine, and all pairs of rows that reach it, `(earlier, later, scores)`; None where that would be too many.

    Where few rows are to go, a cover at every higher cosine is known at once from this list. Without it, every row is compared with all that are kept, each time.
    """
    share = _PARTNERED * (len(rows) - count) / len(rows)
    if share >= 1:
        return 1.0, None
    sample = np.random.default_rng(0).permutation(len(rows))[:_ASKED]
    floor = float(np.quantile(rows.search(rows.vectors(sample), 2)[0][:, -1], 1 - share))
    parts, held = [], 0
    for later, earlier, scores, _ in rows.join(floor):
        parts.append((earlier, later, scores))
        held += len(scores)
        if held > _MOST_PAIRS:
            return floor, None
    earlier, later, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    return floor, (earlier, later, scores)


def _cover_by(pairs: tuple[Array, Array, Array], rows: int, threshold: float, most: int) -> Array | None:
    """`_cover`, from a list of pairs."""
    first, second, scores = (part[pairs[2] >= threshold] for part in pairs)
    kept: Array = decide("cover", np.arange(rows), first, second, scores).pair < 0
    return None if kept.sum() > most else kept


def _cover(rows: ExactIndex, threshold: float, most: int) -> Array | None:
    """In their order, rows stay that have no kept one at `threshold` or above; None if those are more than `most`."""
    kept = np.zeros(len(rows), bool)
    for begin in range(0, len(rows), _BLOCK):
        block = np.arange(begin, min(begin + _BLOCK, len(rows)))
        vectors = rows.vectors(block)
        if begin:
            apart = rows.search(vectors, 1, kept)[0][:, 0] < threshold
            block, vectors = block[apart], vectors[apart]
        near = vectors @ vectors.T >= threshold
        stays = np.ones(len(block), bool)
        for at in range(len(block)):
            if stays[at]:
                stays[at + 1 :] &= ~near[at, at + 1 :]
        kept[block[stays]] = True
        if kept.sum() > most:
            return None
    return kept


def _filled(rows: ExactIndex, kept: Array, count: int) -> Array:
    """`kept` and, up to `count`, the rows that resemble those least, such as resemble each other first after all others."""
    others = np.flatnonzero(~kept)
    missing = count - int(kept.sum())
    found: Array = kept.copy()
    if not missing:
        return found
    scores, _ = nearest(rows, rows, others, kept)
    order = np.argsort(scores, kind="stable")[: _LOOKED_AT * missing]
    vectors = rows.vectors(others[order])
    chosen = np.zeros(len(order), bool)
    alike = scores[order]  # with what is kept, and what was chosen before
    for _ in range(missing):
        place = int(np.argmin(np.where(chosen, np.inf, alike)))
        chosen[place] = True
        np.maximum(alike, vectors @ vectors[place], out=alike)
    found[others[order[chosen]]] = True
    return found
