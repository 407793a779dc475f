"""Which rows a list of duplicate pairs drops, and for which kept row each.

Rules work on a graph: rows are joined where they are a pair of duplicates. `rank` says which of two is preferred; it comes from a
keep policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embell.errors import UsageError

Array = np.ndarray[Any, Any]

RULES = ("cover", "components", "complete")
KEEP = ("first", "last", "longest", "shortest", "central")
_DENSE = 5000
"""Rows of the largest connected part whose distances are laid out at once, for complete linkage."""


@dataclass(frozen=True)
class Decision:
    """For each row, int64 `(n,)`: the kept row it goes with, itself if it is kept, and the number of the pair that says why, else -1."""

    kept_by: Array
    pair: Array


def ranks(
    keep: str, rows: int, *, lengths: Array | None = None, values: Sequence[Any] | None = None, partners: Array | None = None
) -> Array:
    """The place of each row, `(n,)`, in the order in which a policy prefers them; ties go to the earlier row.

    "longest" and "shortest" go by `lengths`, "central" by `partners` (the sum of a row's scores), "FIELD:max" and "FIELD:min" by
    `values`; a row without a value comes last.

    Raises UsageError for a policy that does not exist, or values that have no order.
    """
    check_keep(keep)
    if keep == "first":
        return np.arange(rows)
    if keep == "last":
        return np.arange(rows - 1, -1, -1)
    if ":" in keep:
        order = _by_value(keep, [None] * rows if values is None else list(values))
    else:
        worth = {"longest": lengths, "shortest": lengths, "central": partners}[keep]
        worth = np.zeros(rows) if worth is None else worth
        order = np.argsort(worth if keep == "shortest" else -worth, kind="stable")
    found = np.empty(rows, np.int64)
    found[order] = np.arange(rows)
    return found


def check_keep(keep: str) -> str:
    """Raises UsageError for a policy that does not exist."""
    field, _, end = keep.rpartition(":")
    if keep not in KEEP and not (field and end in ("max", "min")):
        raise UsageError(f"keep {keep!r} is not known; there are {', '.join(KEEP)}, FIELD:max and FIELD:min")
    return keep


def check_rule(rule: str) -> str:
    """Raises UsageError for a rule that does not exist."""
    if rule not in RULES:
        raise UsageError(f"rule {rule!r} is not known; there are {', '.join(RULES)}")
    return rule


def _by_value(keep: str, values: list[Any]) -> Array:
    there = [row for row, value in enumerate(values) if value is not None and value == value]
    try:
        there.sort(key=lambda row: values[row])
        if keep.endswith(":max"):
            there = sorted(there, key=lambda row: values[row], reverse=True)
    except TypeError as error:
        raise UsageError(f"keep {keep!r}: the values of this field have no order ({error})") from error
    order: Array = np.concatenate([np.array(there, np.int64), np.setdiff1d(np.arange(len(values)), np.array(there, np.int64))])
    return order


def decide(rule: str, rank: Array, first: Array, second: Array, score: Array) -> Decision:
    """Apply a rule to pairs of rows `first`, `second` `(p,)` with scores `(p,)`; `rank` `(n,)` says which row is preferred.

    - "cover": in the order of preference, a row is kept unless a kept one is its duplicate. No two kept rows are duplicates, and
      every dropped row is a duplicate of the kept row it names.
    - "components": of each connected part the most preferred row is kept. On chains a dropped row may not resemble the kept one;
      the pair that says why is then with another row.
    - "complete": groups by complete linkage, in which every two rows are duplicates. Rows kept for two groups may be duplicates.

    Raises UsageError where complete linkage has more connected rows than can be laid out.
    """
    check_rule(rule)
    if rule == "cover":
        return _cover(rank, first, second, score)
    groups = _components(len(rank), first, second)
    if rule == "complete":
        groups = _complete(groups, first, second, score)
    order = np.lexsort((rank, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    kept_by = np.empty(len(rank), np.int64)
    kept_by[order] = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    pair = np.full(len(rank), -1)
    inside = np.flatnonzero(groups[first] == groups[second])
    row, other, which = (
        np.concatenate(part) for part in ((first[inside], second[inside]), (second[inside], first[inside]), (inside,) * 2)
    )
    order = np.lexsort((score[which], other == kept_by[row], row))
    pair[row[order]] = which[order]  # what is written last stays: a pair with the kept row, else any, and the best of them
    pair[kept_by == np.arange(len(rank))] = -1
    return Decision(kept_by, pair)


def _cover(rank: Array, first: Array, second: Array, score: Array) -> Decision:
    """The greedy walk, from the kept rows to what they drop."""
    rows = len(rank)
    forward = rank[first] < rank[second]
    preferred, other = np.where(forward, first, second), np.where(forward, second, first)
    order = np.lexsort((score, rank[preferred]))
    preferred, other, value = preferred[order], other[order], score[order]
    starts = np.flatnonzero(np.diff(preferred, prepend=-1))
    ends = np.append(starts, len(order))[1:]
    pair, best = np.full(rows, -1), np.full(rows, -np.inf)
    dropped = np.zeros(rows, bool)
    for row, start, end in zip(preferred[starts].tolist(), starts.tolist(), ends.tolist(), strict=True):
        if dropped[row]:
            continue
        others = other[start:end]
        dropped[others] = True
        better = value[start:end] > best[others]
        best[others[better]] = value[start:end][better]  # of the same row twice, the larger comes last
        pair[others[better]] = order[start:end][better]
    kept_by = np.arange(rows)
    there = np.flatnonzero(pair >= 0)
    kept_by[there] = first[pair[there]] + second[pair[there]] - there
    return Decision(kept_by, pair)


def _components(rows: int, first: Array, second: Array) -> Array:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(rows, rows))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _complete(groups: Array, first: Array, second: Array, score: Array) -> Array:
    """Split connected parts so that every two rows of a group are a pair."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    sizes = np.bincount(groups)
    if sizes.max(initial=0) > _DENSE:
        raise UsageError(
            f"rule 'complete': {sizes.max():,} rows hang together, more than the {_DENSE:,} it can take; "
            "raise the threshold, or use the rule 'cover'"
        )
    members = np.argsort(groups, kind="stable")
    begins = np.concatenate([[0], np.cumsum(sizes)])
    place = np.empty(len(groups), np.int64)
    place[members] = np.arange(len(groups)) - np.repeat(begins[:-1], sizes)
    pairs = np.argsort(groups[first], kind="stable")
    bounds = np.searchsorted(groups[first][pairs], np.arange(len(sizes) + 1))
    found: Array = groups.copy()
    free = len(sizes)
    for group in np.flatnonzero(sizes > 2).tolist():
        some = pairs[bounds[group] : bounds[group + 1]]
        apart = np.full((sizes[group], sizes[group]), 2.0)  # further than any pair
        one, other = place[first[some]], place[second[some]]
        np.minimum.at(apart, (one, other), 1 - score[some])
        apart = np.minimum(apart, apart.T)
        np.fill_diagonal(apart, 0)
        labels = fcluster(linkage(squareform(apart, checks=False), "complete"), 1.5, "distance")
        found[members[begins[group] : begins[group + 1]]] = free + labels - 1
        free += int(labels.max())
    return found
