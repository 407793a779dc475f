"""Which ids a run has seen, and where: 16 bytes an id, so that ten million fit in 160 MB."""

from __future__ import annotations

from typing import Any

import numpy as np

from embell.document import Document

Array = np.ndarray[Any, Any]


class Places:
    """Where documents stand, as ascending 64-bit numbers: the file's number and the line in it."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {"document": 0}

    def number(self, document: Document, count: int) -> int:
        """The number of a document's place; one without a place stands at `count` of those given."""
        path, _, line = document.place.rpartition(":")
        if not document.place:
            path, line = "document", str(count)
        elif not line.isdecimal():
            path, line = document.place, "0"
        return (self._files.setdefault(path, len(self._files)) << 40) + int(line)

    def name(self, number: int) -> str:
        """The place as it was given, or "document N"."""
        file, line = number >> 40, number & ((1 << 40) - 1)
        path = list(self._files)[file]
        if file == 0:
            return f"document {line}"
        return f"{path}:{line}" if line else path


class SeenIds:
    """64-bit id hashes with the number of their place, in sorted runs that are merged now and then."""

    def __init__(self) -> None:
        self._runs: list[tuple[Array, Array]] = []

    def add(self, hashes: Array, places: Array) -> list[tuple[int, int]]:
        """Take in a batch; returns `(row of the batch, place of the earlier one)` of each id that was there already."""
        repeats: list[tuple[int, int]] = []
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], places[order]
        for at in np.flatnonzero(hashes[1:] == hashes[:-1]):
            repeats.append((int(order[at + 1]), int(places[at])))
        for run_hashes, run_places in self._runs:
            where = np.minimum(np.searchsorted(run_hashes, hashes), len(run_hashes) - 1)
            repeats += [(int(order[row]), int(run_places[where[row]])) for row in np.flatnonzero(run_hashes[where] == hashes)]
        self._runs.append((hashes, places))
        # Runs grow geometrically, so there are few of them and each id is merged seldom.
        while len(self._runs) > 1 and len(self._runs[-1][0]) * 2 > len(self._runs[-2][0]):
            (a, b), (c, d) = self._runs.pop(), self._runs.pop()
            merged, where = np.concatenate([a, c]), np.concatenate([b, d])
            order = np.argsort(merged, kind="stable")
            self._runs.append((merged[order], where[order]))
        return sorted(repeats)

    def __contains__(self, value: int) -> bool:
        return any(bool(hashes[min(int(np.searchsorted(hashes, value)), len(hashes) - 1)] == value) for hashes, _ in self._runs)
