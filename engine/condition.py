"""Which rows of a snapshot a condition lets through: those that are asked about, or all of them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from embell.engine.snapshot import Snapshot

Array = np.ndarray[Any, Any]


class Condition:
    """One condition on the rows of one snapshot.

    Raises UsageError, here or when rows are asked about, if it is not valid for the columns.
    """

    def __init__(self, snapshot: Snapshot, where: str) -> None:
        self._snapshot, self._where = snapshot, where
        documents = snapshot.documents
        self._fits = None if documents is None else documents.plain(where)
        if self._fits is None:
            snapshot.store.check_condition(where)
            self._fits = None if documents is None else documents.comparison(where)
        self.surplus = 1.5
        """How many times as many of a query's best rows are to be looked at as would do if those that fit were among them evenly."""

    @cached_property
    def share(self) -> float:
        """About how many of the rows fit, by a sample of those copied; 0 if rows cannot be looked up one by one."""
        documents = self._snapshot.documents
        if self._fits is None or documents is None or not len(documents.keys) or (self._copies_are_old and self._newer is None):
            return 0.0
        return documents.share(self._fits)

    def at(self, positions: Array) -> Array:
        """Whether the rows at these positions fit, bool; where `share` is not 0. Rows that are gone may, too."""
        snapshot = self._snapshot
        assert self._fits is not None
        assert snapshot.documents is not None
        if not self._copies_are_old:
            return snapshot.documents.fitting(self._fits, positions)
        assert self._newer is not None
        found = np.empty(len(positions), bool)
        copied = positions < snapshot.covered
        found[copied] = snapshot.documents.fitting(self._fits, positions[copied])
        keys = snapshot.keys[positions]
        copied &= ~np.isin(keys, snapshot.changed)
        found[~copied] = np.isin(keys[~copied], self._newer)
        return found

    @cached_property
    def all(self) -> Array:
        """Whether each row fits, and is not gone: bool, by position."""
        snapshot = self._snapshot
        found = self._by_copies()
        if found is None:
            found = np.zeros(len(snapshot.keys), bool)
            found[snapshot.places(snapshot.store.keys(self._where))] = True
        return found

    def _by_copies(self) -> Array | None:
        """`all`, by what the copies say; None if they cannot tell."""
        snapshot = self._snapshot
        if snapshot.documents is None or (fits := snapshot.documents.matches(self._where)) is None:
            return None
        found = fits
        if self._copies_are_old:
            if self._newer is None:
                return None
            found = np.zeros(len(snapshot.keys), bool)
            found[: snapshot.covered] = fits
            found[snapshot.places(np.array(snapshot.changed, np.int64))] = False
            found[snapshot.places(self._newer)] = True
        if snapshot.alive is not None:
            found &= snapshot.alive
        return found

    @property
    def _copies_are_old(self) -> bool:
        return bool(self._snapshot.changed) or self._snapshot.covered < len(self._snapshot.keys)

    @cached_property
    def _newer(self) -> Array | None:
        """Keys of the fitting rows that the copies do not know as they are now; None if only LanceDB can tell."""
        newer = self._snapshot.newer
        fits = newer.matches(self._where)
        return None if fits is None else newer.keys[fits]
