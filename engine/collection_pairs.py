"""Near-duplicates of a collection: what the search for pairs needs to know of its rows, and the list that is kept beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.engine.duplicates import Duplicates, Rows, found_in_order, judge
from embell.engine.normalise import text_mark
from embell.engine.pair_list import PairList
from embell.engine.pair_search import find_pairs
from embell.engine.saved_pairs import FOLDER, SavedPairs
from embell.engine.search_parts import Progress, forget
from embell.errors import UsageError
from embell.indexers.columns import column_name
from embell.indexers.exact import ExactIndex
from embell.indexers.store import writer_lock

if TYPE_CHECKING:
    from embell.engine.collection import Collection
    from embell.engine.snapshot import Snapshot

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Read:
    """The living rows of a collection, in the order of their keys. Marks and lengths are empty unless texts were read."""

    keys: Array
    index: ExactIndex
    ids: list[str]
    marks: list[bytes]
    lengths: Array | None
    values: dict[str, list[Any]]

    @classmethod
    def of(cls, collection: Collection, index: ExactIndex, fields: set[str], texts: bool = True) -> _Read:
        known = collection.store.metadata_types
        columns = {name: name if name in known else column_name(name) for name in fields}
        for name in sorted(name for name, column in columns.items() if column not in known):
            raise UsageError(f"no document has the field {name!r}" + (f"; there are {', '.join(sorted(known))}" if known else ""))
        keys = index.keys
        ids, marks, lengths = [""] * len(keys), [b""] * len(keys), np.zeros(len(keys), np.int64)
        values: dict[str, list[Any]] = {name: [None] * len(keys) for name in fields}
        for row in collection.store.scan(["key", "id", *(["text"] if texts else []), *columns.values()]):
            at = int(np.searchsorted(keys, row["key"]))
            if at < len(keys) and keys[at] == row["key"]:
                ids[at] = row["id"]
                if texts:
                    marks[at], lengths[at] = text_mark(row["text"]), len(row["text"])
                for name, column in columns.items():
                    values[name][at] = row[column]
        return cls(keys, index, ids, marks, lengths if texts else None, values)


def living(snapshot: Snapshot) -> ExactIndex:
    """The rows that are not deleted, in the order of their keys."""
    if snapshot.alive is None:
        return snapshot.rows
    living = np.flatnonzero(snapshot.alive)
    index = ExactIndex(snapshot.rows.dim)
    index.add(snapshot.keys[living], snapshot.rows.stored(living))
    return index


def living_ids(collection: Collection, snapshot: Snapshot) -> tuple[ExactIndex, list[str]]:
    """The rows that are not deleted, and their ids."""
    read = _Read.of(collection, living(snapshot), set(), texts=False)
    return read.index, read.ids


def _texts(collection: Collection, keys: Array) -> Iterator[str]:
    """The texts of these rows, in the order of the keys; few are held where the table has about the same order."""
    waiting: dict[int, str] = {}
    at = 0
    for row in collection.store.scan(["key", "text"]):
        waiting[row["key"]] = row["text"]
        while at < len(keys) and int(keys[at]) in waiting:
            yield waiting.pop(int(keys[at]))
            at += 1


def collection_duplicates(
    collection: Collection,
    snapshot: Snapshot,
    thresholds: Mapping[str, float],
    keep: str,
    rule: str,
    group_by: str | None,
    progress: Progress | None,
    on_note: Callable[[str], None] | None,
) -> Duplicates:
    """`Collection.duplicates`, of a snapshot."""
    fields = {name for name in (keep.rpartition(":")[0], group_by) if name}
    index = living(snapshot)
    before = SavedPairs.read(collection.path) if group_by is None else None
    saved = None if before is None else before.now(index.keys)
    reason = "rows were deleted" if before is not None else ""
    if saved is not None:
        reason = saved.pairs.lacks(thresholds, keep)
    again = saved is not None and not reason and len(saved.keys) == len(index)
    again = again and (keep == "first" or saved is None or not _copies_differ(index, saved.pairs))
    read = _Read.of(collection, index, fields, texts=not again or keep in ("longest", "shortest"))
    rows = Rows(read.ids, read.lengths, read.values)
    if group_by is not None:
        numbers: dict[Any, int] = {}
        if any(isinstance(value, (list, dict)) for value in read.values[group_by]):
            raise UsageError(f"the field {group_by!r} holds lists; documents are grouped by one value each")
        groups = np.array([numbers.setdefault(value, len(numbers)) for value in read.values[group_by]], np.int64)
        return judge(_searched(collection, read, thresholds, keep, groups, progress), rows, thresholds, keep, rule)
    if saved is not None and again:
        return judge(saved.pairs, rows, thresholds, keep, rule)
    if saved is not None and len(saved.keys) == len(index) and not saved.pairs.lacks(thresholds, saved.pairs.keep):
        # The list itself stays as it is, for another policy lacks links of capped rows and those of other copies.
        return judge(_searched(collection, read, thresholds, keep, None, progress), rows, thresholds, keep, rule)
    known = saved.pairs if saved is not None and not reason else None
    if reason and on_note is not None:
        on_note(f"looking for pairs anew: {reason}")
    floors = thresholds if known is None else known.floors
    kept = os.access(collection.path, os.W_OK)  # of a collection that may only be read, pairs are found anew each time
    folder = collection.path / FOLDER / "unfinished" if kept else None
    found = find_pairs(
        read.marks, read.index, lambda: _texts(collection, read.keys), floors, known=known, folder=folder, progress=progress
    )
    if folder is not None:
        with writer_lock(collection.path):
            SavedPairs(read.keys, read.marks, found).write(collection.path)
        forget(folder)
    # Capped rows were linked to the first ones, and the vectors compared are the first copies', not those that are preferred here.
    if found.lacks(thresholds, keep) or (keep != "first" and _copies_differ(index, found)):
        found = _searched(collection, read, thresholds, keep, None, progress)
    return judge(found, rows, thresholds, keep, rule)


def _copies_differ(index: ExactIndex, found: PairList) -> bool:
    """Whether texts that are equal but for case and spacing have different vectors."""
    copies = np.flatnonzero(found.original != np.arange(len(found.original)))
    return not np.array_equal(index.stored(copies), index.stored(found.original[copies]))


def _searched(
    collection: Collection,
    read: _Read,
    thresholds: Mapping[str, float],
    keep: str,
    groups: Array | None,
    progress: Progress | None,
) -> PairList:
    """A list for this call only, with the rows in the order of preference."""

    def search(order: Array | None) -> PairList:
        chosen = np.arange(len(read.ids)) if order is None else order
        index = ExactIndex(read.index.dim)
        index.add(np.arange(len(chosen)), read.index.stored(chosen))

        def texts() -> Iterator[str]:
            everything = list(_texts(collection, read.keys))
            return (everything[at] for at in chosen)

        marks = [read.marks[at] for at in chosen]
        return find_pairs(marks, index, texts, thresholds, groups=None if groups is None else groups[chosen], progress=progress)

    return found_in_order(search, Rows(read.ids, read.lengths, read.values), thresholds, keep)


def collection_leaks(
    one: Collection,
    snapshot: Snapshot,
    other: Collection,
    theirs: Snapshot,
    thresholds: Mapping[str, float],
    progress: Progress | None,
) -> Duplicates:
    """`Collection.leaks`, of two snapshots."""
    mine, reference = _Read.of(one, living(snapshot), set()), _Read.of(other, living(theirs), set())
    index = ExactIndex(mine.index.dim)
    for at, read in ((0, reference), (len(reference.ids), mine)):
        index.add(np.arange(at, at + len(read.ids)), read.index.stored(np.arange(len(read.ids))))

    def texts() -> Iterator[str]:
        yield from _texts(other, reference.keys)
        yield from _texts(one, mine.keys)

    found = find_pairs(reference.marks + mine.marks, index, texts, thresholds, split=len(reference.ids), progress=progress)
    rows = Rows(reference.ids + mine.ids)
    return judge(found, rows, thresholds)
