"""What a search reads: the current index generation, rows that are newer than it, and which are gone.

An index generation is a directory of derived files. It covers the keys that it lists; newer rows are
read from the table and searched exactly, and keys that the table no longer has are left out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.engine.condition import Condition
from embell.engine.intact import check_files
from embell.engine.manifest import Manifest
from embell.errors import CollectionError, EmbellWarning, MissingExtraError
from embell.indexers.codes import FEW_QUERIES
from embell.indexers.documents_file import DocumentsFile
from embell.indexers.exact import ExactIndex
from embell.indexers.store import Store
from embell.indexers.workers import in_shares

if TYPE_CHECKING:
    from embell.indexers.coded_rows import Chosen
    from embell.indexers.vector_index import Candidates

Array = np.ndarray[Any, Any]

INDEX = "index"
MEASURED_AT = 10
"""Recall is promised for so many rows; with fewer there are as many candidates."""
_CONDITIONS = 8
_CHANGING = re.compile(r"\b(now|random|uuid|current_\w+)\b", re.IGNORECASE)
"""In a condition that may mean something else the next time."""
SHARE = 32
"""Queries for each core from which on each looks for the candidates of its own, and scores them."""
_OFTEN, _HELD = 3, 2**27
"""Searches with a condition that half of the rows fit from which on these are held together, and bytes that such rows of all conditions take at most."""
_MANY_FIT, _SPARE, _FARTHEST = 0.3, 8, 1024
"""The share of fitting rows from which on a few queries look at the best of all rows first, how many more of these than should do, and at most how many."""


@dataclass(frozen=True)
class Snapshot:
    """All rows of one table version in key order, searchable.

    `rows` holds the generation's rows and then the newer ones; `covered` says how many are the generation's.
    `alive` is None if every position is, else a bool array. `candidates` is the approximate index over the
    generation's rows, None for exact search; it is asked with `settings` for candidates `depth` times as many as rows are wanted.
    `documents` is the generation's copy of its rows, None if the table itself must be asked; rows whose keys are `changed` are not
    what it says any more.
    """

    version: int
    rows: ExactIndex
    keys: Array
    covered: int
    alive: Array | None
    candidates: Candidates | None
    settings: dict[str, int] | None
    depth: int
    store: Store
    documents: DocumentsFile | None
    changed: list[int]
    conditions: dict[str, Condition] = field(default_factory=dict)
    """The last that were asked for."""

    @classmethod
    def take(cls, directory: Path, manifest: Manifest, store: Store) -> Snapshot:
        """Read the collection as the table has it now."""
        version = store.version
        rows = ExactIndex(manifest.dim)
        candidates: Candidates | None = None
        documents = None
        generation = directory / INDEX / str(manifest.generation)
        covered = 0
        if manifest.generation:
            unread: tuple[type[Exception], ...] = (OSError, ValueError, EOFError, RuntimeError)
            lost = ""
            try:
                check_files(generation, ExactIndex.FILES, manifest.files)
                rows = ExactIndex.load(generation)
                covered = len(rows)
            except unread:  # the table has everything
                lost = "is missing or damaged: searching the table itself, exactly but slower"
            if covered and manifest.approximate:
                try:
                    candidates = _candidates(manifest, generation, store, rows.keys)
                except MissingExtraError as error:
                    warnings.warn(f"searched exactly: {error}", EmbellWarning, stacklevel=2)
                except unread:
                    candidates, lost = None, "is damaged: searching exactly, which may be slower"
            if covered and manifest.changed is not None:
                try:
                    check_files(generation, DocumentsFile.FILES, manifest.files)
                    documents = DocumentsFile.load(generation, store.readable)
                    if not np.array_equal(documents.keys, rows.keys):
                        raise ValueError("other rows")
                except unread:
                    documents, lost = None, "has no documents, or damaged ones: reading the table instead, which is slower"
            # A writer may just have replaced the generation that was to be read: nothing is wrong then.
            if lost and Manifest.read(directory).generation == manifest.generation:
                warnings.warn(
                    f"{generation}: the index {lost}; put it right with: embell optimize {directory}", EmbellWarning, stacklevel=2
                )
        newest = int(rows.keys[-1]) if covered else -1
        newer = list(store.vectors(above=newest))
        if newer:
            keys = np.concatenate([part for part, _ in newer])
            order = np.argsort(keys)
            rows.add(keys[order], np.concatenate([part for _, part in newer])[order])
        keys = rows.keys
        alive = None
        if len(keys) != store.count:
            alive = np.isin(keys, store.keys(), assume_unique=True)
        settings, depth = (tuned["settings"], tuned["depth"]) if (tuned := manifest.tuned) else (None, 4)
        changed = manifest.changed or []
        return cls(version, rows, keys, covered, alive, candidates, settings, depth, store, documents, changed)

    @property
    def outside(self) -> int:
        """Rows that the index does not cover, and rows of the index that are gone."""
        return len(self.keys) - self.covered + (0 if self.alive is None else int((~self.alive).sum()))

    def condition(self, where: str) -> Condition:
        """A condition on the rows; kept for the next search with it.

        Raises UsageError if it is not valid for the columns, or later, when rows are searched with it.
        """
        condition = self.conditions.pop(where, None) or Condition(self, where)
        if not _CHANGING.search(where):
            self.conditions[where] = condition
            for oldest in list(self.conditions)[:-_CONDITIONS]:
                self.conditions.pop(oldest, None)
        return condition

    @cached_property
    def newer(self) -> DocumentsFile:
        """The rows that `documents` does not know as they are now, read when a condition is first asked for."""
        return DocumentsFile(list(self.store.batches(int(self.keys[self.covered - 1]), self.changed)))

    def places(self, keys: Array) -> Array:
        """The positions of those of these keys, ascending, that are there."""
        at = np.searchsorted(self.keys, keys)
        at = at[at < len(self.keys)]
        there: Array = at[self.keys[at] == keys[: len(at)]]
        return there

    def documents_of(self, keys: Sequence[int], columns: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
        """Rows by key, without the vector, with all columns or with these; keys that are gone may be missing from the answer."""
        if self.documents is None:
            return self.store.rows(keys, columns)
        wanted = np.asarray(keys, np.int64)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        copied = (at < self.covered) & (self.keys[at] == wanted)
        if self.changed:
            copied &= ~np.isin(wanted, self.changed)
        try:
            copies = self.documents.rows(at[copied], columns)
        except ValueError as error:  # of Arrow, or of bytes that are no text
            warnings.warn(
                f"the index's copy of the documents is damaged ({error}): reading the table instead; put it right with: embell optimize",
                EmbellWarning,
                stacklevel=2,
            )
            return self.store.rows(keys, columns)
        found = dict(zip(wanted[copied].tolist(), copies, strict=True))
        return found if copied.all() else found | self.store.rows(wanted[~copied].tolist(), columns)

    def search(self, queries: Array, k: int, condition: Condition | None = None) -> tuple[Array, Array]:
        """The best `k` rows of each query with exact scores: `(scores, keys)`, key -1 where there are fewer.

        Searches with a condition are exact. An approximate index gives candidates, which are scored again here; a
        query for which it finds too few is searched exactly.
        """
        if condition is not None:
            if (held := self._held(condition)) is not None:
                return self.rows.search(queries, k, held)
            those = self._among_the_best(queries, k, condition)
            return self.rows.search(queries, k, condition.all()) if those is None else those
        if self.candidates is None:
            return self.rows.search(queries, k, self.alive)
        # FAISS would share queries out itself, by OpenMP, whose idle threads then wait awake for some milliseconds: a core would be missing to
        # the exact scores that come next.
        if self.covered < len(self.keys):
            self.rows.code(len(queries))  # once, not in each share
        try:
            found = in_shares(lambda some: self._of_candidates(some, k), queries, SHARE)
        except CollectionError as error:  # its files are damaged, or a writer is just replacing it
            warnings.warn(f"searched exactly: {error}; put it right with: embell optimize", EmbellWarning, stacklevel=2)
            return self.rows.search(queries, k, self.alive)
        scores, keys = (np.concatenate(part) for part in zip(*found, strict=True))
        return scores, keys

    def _of_candidates(self, queries: Array, k: int) -> tuple[Array, Array]:
        """`search` by the approximate index; raises CollectionError where that cannot be asked."""
        assert self.candidates is not None
        scores = np.full((len(queries), k), -np.inf)
        keys = np.full((len(queries), k), -1, np.int64)
        gone = 0 if self.alive is None else int((~self.alive).sum())
        wanted = max(k, MEASURED_AT)  # the first of ten is not the first of fewer candidates
        found = self.candidates.positions(queries, wanted + min(gone, wanted), self.depth, self.settings)
        asked, place = np.nonzero(found >= 0)
        positions = found[asked, place]
        if self.alive is not None:
            living = self.alive[positions]
            asked, positions = asked[living], positions[living]
        if self.covered < len(self.keys):
            newer = np.arange(len(self.keys)) >= self.covered
            _, fresh = self.rows.search(queries, k, newer if self.alive is None else newer & self.alive)
            more, place = np.nonzero(fresh >= 0)
            asked = np.concatenate([asked, more])
            positions = np.concatenate([positions, np.searchsorted(self.keys, fresh[more, place])])
            order = np.argsort(asked, kind="stable")
            asked, positions = asked[order], positions[order]
        best, exact, places = self.rows.best_of(queries, k, asked, positions)
        rank = np.arange(len(best)) - np.searchsorted(best, best)
        scores[best, rank], keys[best, rank] = exact, self.keys[places]
        there = min(k, len(self.keys) if self.alive is None else int(self.alive.sum()))
        short = np.flatnonzero((keys >= 0).sum(axis=1) < there)
        if len(short):
            scores[short], keys[short] = self.rows.search(queries[short], k, self.alive)
        return scores, keys

    def _held(self, condition: Condition) -> Chosen | None:
        """The rows that fit a condition, together, if it is asked often: then searching these takes less than searching all.

        Copying the rows that fit takes time, and the others are what is spared: the more fit, the later it pays.
        """
        condition.asked += 1
        again = condition.asked > 1 and condition.asked * (1 - condition.share) >= _OFTEN * condition.share
        if again and not condition.tried and self.rows.coded:
            condition.tried = True
            fits = condition.all()
            free = _HELD - len(fits) - int(np.count_nonzero(fits)) * (self.rows.dim + 8)  # codes and places
            others = [one for one in list(self.conditions.values()) if one is not condition]
            while free >= 0 and others and sum(one.held.bytes for one in others if one.held is not None) > free:
                others.pop(0).held = None
            if free >= 0:
                condition.held = self.rows.chosen(fits)
        return condition.held

    def _among_the_best(self, queries: Array, k: int, condition: Condition) -> tuple[Array, Array] | None:
        """The best `k` that fit, looked for among the best of all rows; None where they may not be found there soon.

        Where many rows fit, this spares looking at all of them with the condition, and again with what it said of them.
        """
        if not 0 < len(queries) <= FEW_QUERIES or condition.share < _MANY_FIT:
            return None
        reach = int(condition.surplus * k / condition.share) + _SPARE
        if reach > min(_FARTHEST, len(self.keys) // _SPARE):
            return None
        found = self.rows.search_fitting(queries, k, condition.at, reach, self.alive)
        if found is None:  # those that fit are not what these queries ask for
            condition.surplus *= 2
        else:
            condition.surplus = max(condition.SURPLUS, 0.95 * condition.surplus)
        return found


def _candidates(manifest: Manifest, generation: Path, store: Store, keys: Array) -> Candidates:
    """The approximate index of a generation, over the rows of these keys. Raises one of many errors if it cannot be read."""
    if manifest.kind.startswith("lance"):
        from embell.indexers.lance_index import LanceIndex

        return LanceIndex(store, keys)
    from embell.indexers.faiss_index import FaissIndex

    check_files(generation, FaissIndex.FILES, manifest.files)
    index = FaissIndex.load(generation)
    if len(index.keys) != len(keys):
        raise ValueError("another number of rows")
    return index
