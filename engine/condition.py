"""Which rows of a snapshot a condition lets through: those that are asked about, or all of them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from embell.errors import UsageError
from embell.indexers.documents_file import DocumentsFile

if TYPE_CHECKING:
    from embell.engine.snapshot import Snapshot
    from embell.indexers.coded_rows import Chosen

Array = np.ndarray[Any, Any]


class Condition:
    """One condition on the rows of one snapshot, which keeps it and which it does not keep.

    Raises UsageError, here or when rows are asked about, if it is not valid for the columns.
    """

    SURPLUS = 1.5

    def __init__(self, snapshot: Snapshot, where: str) -> None:
        self._snapshot: Snapshot = weakref.proxy(snapshot)
        self._where = where
        documents = snapshot.documents
        self._fits = None if documents is None else documents.plain(where)
        if self._fits is None:
            snapshot.store.check_condition(where)
            self._fits = None if documents is None else documents.comparison(where)
        # Not cached_property: one that is slow would keep all others waiting (Python 3.11).
        self._share: float | None = None
        self._all: Array | None = None
        self._newer: Array | None = None
        self.asked = 0
        """Searches that were made with it."""
        self.held: Chosen | None = None
        """The rows that fit, for more of them; None before, where they are too many, and when later conditions needed the room."""
        self.tried = False
        self.surplus = self.SURPLUS
        """How many times as many of a query's best rows are to be looked at as would do if those that fit were among them evenly."""

    @property
    def share(self) -> float:
        """About how many of the rows fit, by a sample of those copied, or by all once these were looked at; 0 if no row can be looked up before."""
        if self._share is None:
            documents = self._snapshot.documents
            known = self._fits is not None and documents is not None and len(documents.keys)
            if not known or (self._copies_are_old and self._fitting_newer() is None):
                self._share = 0.0
            else:
                self._share = documents.share(self._fits)  # type: ignore[union-attr, arg-type]
        return self._share

    def at(self, positions: Array) -> Array:
        """Whether the rows at these positions fit, bool; where `share` is not 0. Rows that are gone may, too."""
        snapshot = self._snapshot
        if self._all is not None:
            return self._all[positions]
        assert self._fits is not None
        assert snapshot.documents is not None
        if not self._copies_are_old:
            return snapshot.documents.fitting(self._fits, positions)
        found = np.empty(len(positions), bool)
        copied = positions < snapshot.covered
        found[copied] = snapshot.documents.fitting(self._fits, positions[copied])
        keys = snapshot.keys[positions]
        copied &= ~np.isin(keys, snapshot.changed)
        newer = self._fitting_newer()
        assert newer is not None
        found[~copied] = np.isin(keys[~copied], newer)
        return found

    def all(self) -> Array:
        """Whether each row fits, and is not gone: bool, by position."""
        if self._all is None:
            found = self._by_copies()
            if found is None:
                found = np.zeros(len(self._snapshot.keys), bool)
                found[self._snapshot.places(self._in_table())] = True
            self._all = found
            self._share = np.count_nonzero(found) / max(1, len(found))  # afterwards: who knows it may ask `at`
        return self._all

    def _in_table(self) -> Array:
        """Keys of the rows of the table that fit."""
        snapshot = self._snapshot
        try:
            return snapshot.store.keys(self._where)
        except UsageError:  # LanceDB takes less than DataFusion, such as no fractions for whole numbers
            if snapshot.documents is not None:
                raise
            found: list[Array] = []
            for batch in snapshot.store.batches():
                rows = DocumentsFile([batch])
                if (fits := rows.matches(self._where)) is None:
                    raise
                found.append(rows.keys[fits])
            if not found:
                raise
            return np.sort(np.concatenate(found))

    def _by_copies(self) -> Array | None:
        """`all`, by what the copies say; None if they cannot tell."""
        snapshot = self._snapshot
        documents = snapshot.documents
        if documents is None:
            return None
        fits = documents.fitting(self._fits) if self._fits is not None else documents.matches(self._where)
        if fits is None:
            return None
        found = fits
        if self._copies_are_old:
            newer = self._fitting_newer()
            if newer is None:
                return None
            found = np.zeros(len(snapshot.keys), bool)
            found[: snapshot.covered] = fits
            found[snapshot.places(np.array(snapshot.changed, np.int64))] = False
            found[snapshot.places(newer)] = True
        if snapshot.alive is not None:
            found &= snapshot.alive
        return found

    @property
    def _copies_are_old(self) -> bool:
        return bool(self._snapshot.changed) or self._snapshot.covered < len(self._snapshot.keys)

    def _fitting_newer(self) -> Array | None:
        """Keys of the fitting rows that the copies do not know as they are now; None if only LanceDB can tell."""
        if self._newer is None:
            newer = self._snapshot.newer
            fits = newer.matches(self._where)
            self._newer = None if fits is None else newer.keys[fits]
        return self._newer
