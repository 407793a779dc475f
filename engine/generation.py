"""An index generation, built anew from the table: rows, codes, documents, and an approximate index where one is wanted."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from embell.engine.intact import check_files, noted_files
from embell.engine.manifest import Manifest
from embell.engine.snapshot import INDEX
from embell.errors import EmbellWarning, MissingExtraError, UsageError
from embell.indexers.coded_rows import mapped
from embell.indexers.documents_file import DocumentsFile
from embell.indexers.exact import ExactIndex
from embell.indexers.store import Store

if TYPE_CHECKING:
    from embell.indexers.vector_index import Candidates

Array = np.ndarray[Any, Any]

_LONG = 10.0
"""Seconds of work that are told of beforehand."""
QUERIES = "queries.npy"
"""In a generation: the queries that it was tuned on, float32 `(q, dim)`, where rows did not stand in for them."""
AUTO_ROWS = 50_000
"""Rows from which on an index "auto" looks for something faster than exact search."""


def build_generation(
    directory: Path,
    manifest: Manifest,
    store: Store,
    queries: Array | None,
    progress: Callable[[str, float], None] | None,
    on_note: Callable[[str], None] | None,
) -> Manifest:
    """Build a new index generation from the table; returns the manifest that names it, which is not written yet.

    An index that has too few rows to be trained on is left out; search is exact until there are more. With a target, the
    index is tuned to it, on `queries`, which are kept with it, or on rows of its own. An index "auto" stays exact while that is quick enough, where
    no settings reach the target, and where exact search is as fast. `progress` and `on_note` as for `Collection.optimize`.
    """
    number = manifest.generation + 1
    part = directory / INDEX / f"{number}.part"
    final = directory / INDEX / str(number)
    for path in (part, final):  # left behind by a run that was killed
        shutil.rmtree(path, ignore_errors=True)
    part.mkdir(parents=True)
    keys = store.keys()
    matrix: Array = np.empty((0, manifest.dim), np.float16)
    if len(keys):
        matrix = written = mapped(part / "vectors.npy", np.float16, (len(keys), manifest.dim))
        done = 0
        for some, rows in store.vectors():
            matrix[np.searchsorted(keys, some)] = rows
            done += len(some)
            if progress is not None:
                progress("reading rows", done / len(keys))
        written.flush()
    else:
        np.save(part / "vectors.npy", matrix)
    ExactIndex.write_beside(part, keys, matrix)
    DocumentsFile.write(part, store.readable, store.batches())
    if queries is not None:
        np.save(part / QUERIES, queries)
    tuned = None
    kind = manifest.index
    if kind == "auto" and manifest.target is not None and len(keys) >= AUTO_ROWS:
        from embell.indexers.faiss_index import check_factory, factory_for

        factory = factory_for(len(keys), manifest.dim, manifest.memory)
        try:
            if factory is not None:
                check_factory(factory, manifest.dim)
            kind = "lance" if factory is None else f"faiss:{factory}"
        except MissingExtraError as error:
            warnings.warn(f"searched exactly: {error}", EmbellWarning, stacklevel=2)
    try:
        index = _approximate(kind, store, keys, matrix, progress, on_note)
    except MissingExtraError as error:
        index = None
        warnings.warn(f"searched exactly: {error}", EmbellWarning, stacklevel=2)
    approximate = index is not None
    if index is not None and manifest.target is not None:
        from embell.engine.tuning import exact_qps, tune

        exact = ExactIndex.load(part)
        tuned, curve = tune(exact, index, kind, manifest.target, queries, progress)
        best = exact_qps(exact, queries)
        (part / "curve.json").write_bytes(orjson.dumps({"exact": best, "points": [asdict(point) for point in curve]}))
        if manifest.index == "auto":
            crowded = manifest.memory is not None and len(keys) * manifest.dim > manifest.memory  # exact search holds a byte each
            approximate = tuned is not None and (crowded or tuned.qps > best)
        elif tuned is None:
            warnings.warn(
                f"{kind}: no search settings are certain to find {manifest.target:.0%} of the nearest ten; "
                "it is searched with its usual ones",
                EmbellWarning,
                stacklevel=2,
            )
    if index is not None and approximate:
        index.save(part)
    files = noted_files(part)
    part.rename(final)
    recall = (tuned.recall if tuned is not None else None) if approximate else 1.0
    return replace(
        manifest, generation=number, approximate=approximate, recall=recall,
        tuned=asdict(tuned) if tuned is not None and approximate else None, changed=[], files=files,
    )  # fmt: skip


def kept_queries(directory: Path, manifest: Manifest) -> Array | None:
    """The queries that the current generation was tuned on; None if rows stood in for them.

    Warns if there were queries and they cannot be read: rows will stand in from now on.
    """
    from embell.engine.tuning import GIVEN

    path = directory / INDEX / str(manifest.generation) / QUERIES
    try:
        check_files(path.parent, [QUERIES], manifest.files)
        found: Array = np.load(path, allow_pickle=False)
        if found.dtype == np.float32 and found.ndim == 2 and found.shape[1] == manifest.dim:
            return found
    except (OSError, ValueError, EOFError):
        pass
    if path.exists() or (manifest.tuned is not None and manifest.tuned["of"] == GIVEN):
        warnings.warn(
            f"{path}: the queries that the index was tuned on are missing or damaged; rows of the collection stand in for them "
            f"until it is tuned again: embell tune {directory} --queries FILE",
            EmbellWarning,
            stacklevel=2,
        )
    return None


def _approximate(
    kind: str,
    store: Store,
    keys: Array,
    matrix: Array,
    progress: Callable[[str, float], None] | None,
    on_note: Callable[[str], None] | None,
) -> Candidates | None:
    """The approximate index of that kind over all rows; None for exact search, and for too few rows to train one on."""
    what = f"building the index {kind} over {len(keys):,} rows"
    try:
        if kind.startswith("faiss:"):
            from embell.indexers.faiss_index import FaissIndex

            index = FaissIndex(matrix.shape[1], kind.removeprefix("faiss:"))
            if on_note is not None and len(keys) >= AUTO_ROWS and (about := index.seconds(matrix)) > _LONG:
                on_note(f"{what}: about {timedelta(seconds=round(about))} (h:mm:ss)")
            index.add(keys, matrix, progress)
            return index if len(keys) else None
        if kind.startswith("lance"):
            from embell.indexers.lance_index import LanceIndex

            if on_note is not None and len(keys) >= AUTO_ROWS:
                on_note(f"{what}: takes minutes, and LanceDB does not say how far it is")
            if progress is not None:
                progress("training", 0.0)
            return LanceIndex.build(store, keys, matrix.shape[1], kind)
    except UsageError:
        pass
    return None


def drop_generations(directory: Path, keep: int) -> None:
    """Remove generations other than the current one; they are derived."""
    for path in (directory / INDEX).iterdir():
        if path.name != str(keep):
            shutil.rmtree(path, ignore_errors=True)
