"""What a search reads: the current index generation, rows that are newer than it, and which are gone.

An index generation is a directory of derived files. It covers the keys that it lists; newer rows are
read from the table and searched exactly, and keys that the table no longer has are left out.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embell.engine.manifest import Manifest
from embell.errors import UsageError
from embell.indexers.exact import ExactIndex
from embell.indexers.store import Store

Array = np.ndarray[Any, Any]

INDEX = "index"


@dataclass(frozen=True)
class Snapshot:
    """All rows of one table version in key order, searchable.

    `rows` holds the generation's rows and then the newer ones; `covered` says how many are the generation's.
    `alive` is None if every position is, else a bool array. `candidates` is the approximate index over the
    generation's rows, None for exact search.
    """

    version: int
    rows: ExactIndex
    keys: Array
    covered: int
    alive: Array | None
    candidates: Any | None

    @classmethod
    def take(cls, directory: Path, manifest: Manifest, store: Store) -> Snapshot:
        """Read the collection as the table has it now."""
        version = store.version
        rows = ExactIndex(manifest.dim)
        candidates = None
        generation = directory / INDEX / str(manifest.generation)
        covered = 0
        if manifest.generation:
            try:
                rows = ExactIndex.load(generation)
                if manifest.index.startswith("faiss:") and manifest.recall is None:
                    from embell.indexers.faiss_index import FaissIndex

                    candidates = FaissIndex.load(generation)
                covered = len(rows)
            except (OSError, ValueError, EOFError, RuntimeError):  # deleted, damaged, or just replaced: the table has everything
                rows, candidates = ExactIndex(manifest.dim), None
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
        return cls(version, rows, keys, covered, alive, candidates)

    @property
    def outside(self) -> int:
        """Rows that the index does not cover, and rows of the index that are gone."""
        return len(self.keys) - self.covered + (0 if self.alive is None else int((~self.alive).sum()))

    def allowed(self, keys: Array | None) -> Array | None:
        """Positions that a search may return: bool, or None for all; `keys` are those that a filter lets through."""
        if keys is None:
            return self.alive
        matching = np.isin(self.keys, keys, assume_unique=True)
        return matching if self.alive is None else matching & self.alive

    def search(self, queries: Array, k: int, allowed: Array | None) -> tuple[Array, Array]:
        """The best `k` rows of each query with exact scores: `(scores, keys)`, key -1 where there are fewer.

        Filtered searches are exact. An approximate index gives candidates, which are scored again here; a
        query for which it finds too few is searched exactly.
        """
        if self.candidates is None or (allowed is not None and allowed is not self.alive):
            return self.rows.search(queries, k, allowed)
        _, found = self.candidates.search(queries, min(2 * k + 16, max(1, self.covered)))
        fresh = np.full((len(queries), 0), -1, np.int64)
        if self.covered < len(self.keys):
            newer = np.arange(len(self.keys)) >= self.covered
            _, fresh = self.rows.search(queries, k, newer if self.alive is None else newer & self.alive)
        living = len(self.keys) if self.alive is None else int(self.alive.sum())
        scores = np.full((len(queries), k), -np.inf)
        keys = np.full((len(queries), k), -1, np.int64)
        short = []
        for query in range(len(queries)):
            near = np.concatenate([found[query], fresh[query]])
            positions = np.searchsorted(self.keys, np.unique(near[near >= 0]))
            if self.alive is not None:
                positions = positions[self.alive[positions]]
            if len(positions) < min(k, living):
                short.append(query)
                continue
            exact = self.rows.score(queries[query], positions)
            order = np.lexsort((positions, -exact))[:k]
            scores[query, : len(order)], keys[query, : len(order)] = exact[order], self.keys[positions[order]]
        if short:
            scores[short], keys[short] = self.rows.search(queries[short], k, self.alive)
        return scores, keys

    @staticmethod
    def drop_generations(directory: Path, keep: int) -> None:
        """Remove generations other than the current one; they are derived."""
        for path in (directory / INDEX).iterdir():
            if path.name != str(keep):
                shutil.rmtree(path, ignore_errors=True)


def build_generation(directory: Path, manifest: Manifest, store: Store) -> tuple[int, bool]:
    """Build a new index generation from the table: `(number, exact)`. It counts once the manifest names it.

    A FAISS index that has too few rows to be trained on is left out; search is exact until there are more.
    """
    number = manifest.generation + 1
    part = directory / INDEX / f"{number}.part"
    final = directory / INDEX / str(number)
    for path in (part, final):  # left behind by a run that was killed
        shutil.rmtree(path, ignore_errors=True)
    part.mkdir(parents=True)
    exact = True
    keys = store.keys()
    matrix = np.empty((0, manifest.dim), np.float16)
    if len(keys):
        matrix = np.lib.format.open_memmap(part / "vectors.npy", mode="w+", dtype=np.float16, shape=(len(keys), manifest.dim))
        for some, rows in store.vectors():
            matrix[np.searchsorted(keys, some)] = rows
        matrix.flush()
    else:
        np.save(part / "vectors.npy", matrix)
    np.save(part / "keys.npy", keys)
    if manifest.index.startswith("faiss:"):
        from embell.indexers.faiss_index import FaissIndex

        try:
            index = FaissIndex(manifest.dim, manifest.index.removeprefix("faiss:"))
            index.add(keys, matrix)
            index.save(part)
            exact = False
        except UsageError:
            pass
    part.rename(final)
    return number, exact
