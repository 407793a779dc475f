"""LanceDB's vector indices under a collection, held against brute force in float64 over what the collection should hold."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from conftest import Ran, write_jsonl
from embell import Collection, Document, UsageError
from embell.engine import tuning
from embell.errors import EmbellWarning
from embell.indexers.codes import renormalise
from embell.indexers.lance_index import FEWEST, LanceIndex
from embell.indexers.vector_index import check_kind

Array = np.ndarray[Any, Any]
Run = Callable[..., Ran]
DIM, ROWS = 32, 1500
KINDS = ["lance", "lance:IVF_HNSW_SQ"]
WIDE = {"nprobes": 64, "ef": 256}


def rows_and_queries(seed: int, rows: int, queries: int, dim: int = DIM) -> tuple[Array, Array]:
    """Stored rows around 150 centres, and queries around the same."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((150, dim))
    both = renormalise(centres[rng.integers(0, 150, rows + queries)] + 0.6 * rng.standard_normal((rows + queries, dim)))
    return both[:rows].astype(np.float16), both[rows:]


def document(name: str, vector: Array, number: int = 0) -> Document:
    return Document(name, f"text {name}", {"n": number}, vector)


def best(held: dict[str, Array], queries: Array, k: int) -> tuple[list[list[str]], dict[tuple[int, str], float]]:
    """The nearest `k` of these stored rows for each query, and all scores, by float64 products."""
    names = list(held)
    unit = queries / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    scores = unit.astype(np.float32).astype(np.float64) @ renormalise(np.stack(list(held.values()))).astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    every = {(at, name): float(score) for at, row in enumerate(scores) for name, score in zip(names, row, strict=True)}
    return [[names[place] for place in row] for row in order], every


def check(collection: Collection, held: dict[str, Array], queries: Array, recall: float = 0.9, k: int = 10) -> None:
    """Hits are held rows, with their exact scores, best first, and enough of the true ones are among them."""
    truth, scores = best(held, queries, k)
    shares = []
    for at, hits in enumerate(collection.search(queries, k)):
        assert len(hits) == min(k, len(held))
        np.testing.assert_allclose([hit.score for hit in hits], [scores[at, hit.id] for hit in hits], rtol=0, atol=1e-12)
        assert all(a.score >= b.score for a, b in pairwise(hits))
        shares.append(len({hit.id for hit in hits} & set(truth[at])) / len(hits))
    assert np.mean(shares) >= recall


def files(collection: Collection) -> list[Path]:
    """Folders of vector indices in the table."""
    return [path.parent for path in (collection.path / "documents.lance" / "_indices").glob("*/auxiliary.idx")]


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lance") / "c"
    collection = Collection.create(path, None, dim=DIM, index=request.param)
    rows, _ = rows_and_queries(0, ROWS, 0)
    collection.add(document(f"d{at}", row) for at, row in enumerate(rows))
    return path


@pytest.fixture
def collection(made: Path, tmp_path: Path) -> Collection:
    return Collection.open(shutil.copytree(made, tmp_path / "c"))


@pytest.fixture
def held() -> dict[str, Array]:
    return {f"d{at}": row for at, row in enumerate(rows_and_queries(0, ROWS, 0)[0])}


QUERIES = rows_and_queries(0, ROWS, 70)[1]


def test_kinds_have_names() -> None:
    for kind in ("lance", "lance:IVF_PQ", "lance:IVF_HNSW_SQ"):
        assert check_kind(kind) == kind
    for wrong in ("lance:", "lance:PQ", "lance:ivf_pq", "lance:IVF_PQ:8"):
        with pytest.raises(UsageError, match=r"LanceDB cannot make .* known are lance:IVF_PQ, .* lance:IVF_HNSW_SQ"):
            check_kind(wrong)
    with pytest.raises(UsageError, match=r"unknown index 'lancet'; known are .*lance:IVF_PQ"):
        check_kind("lancet")


def test_scores_are_those_of_exact_search(collection: Collection, held: dict[str, Array]) -> None:
    assert collection.manifest.approximate
    assert collection.manifest.recall is None
    snapshot = collection._look()
    assert isinstance(snapshot.candidates, LanceIndex)
    assert snapshot.candidates.bytes > ROWS
    check(collection, held, QUERIES)
    found = collection.search(QUERIES)
    alone = [collection.search(query[None])[0] for query in QUERIES[:5]]
    assert alone == found[:5]
    collection.optimize("exact")
    exact = {(at, hit.id): hit.score for at, hits in enumerate(collection.search(QUERIES, ROWS)) for hit in hits}
    assert all(exact[at, hit.id] == hit.score for at, hits in enumerate(found) for hit in hits)


def test_positions_count_in_the_keys(collection: Collection, held: dict[str, Array]) -> None:
    index = collection._look().candidates
    assert index is not None
    truth, _ = best(held, QUERIES, 10)
    found = index.positions(QUERIES, 10, 4, WIDE)
    assert found.shape == (len(QUERIES), 40)
    wanted = [[int(name[1:]) for name in names] for names in truth]  # d7 has the key 7, at place 7
    assert np.mean([np.isin(names, row).mean() for names, row in zip(wanted, found, strict=True)]) >= 0.95
    assert all(len(set(row)) == 40 for row in found.tolist())
    few = LanceIndex(collection.store, np.arange(0, ROWS, 2))
    half = few.positions(QUERIES, 10, 4, WIDE)
    np.testing.assert_array_equal(half, np.where(found % 2, -1, found // 2))


def test_newer_rows_are_found_and_those_that_are_gone_are_not(collection: Collection, held: dict[str, Array]) -> None:
    generation = collection.manifest.generation
    added = {f"new{at}": row for at, row in enumerate(QUERIES[:40].astype(np.float16))}
    collection.add(document(name, row) for name, row in added.items())
    held |= added
    check(collection, held, QUERIES, recall=0.95)
    assert [hits[0].id for hits in collection.search(QUERIES[:40], 1)] == list(added)
    gone = {hits[1].id for hits in collection.search(QUERIES[:20], 2)} | {"new3", "new4"}
    collection.delete(sorted(gone))
    held = {name: row for name, row in held.items() if name not in gone}
    check(collection, held, QUERIES)
    assert not gone & {hit.id for hits in collection.search(QUERIES, 100) for hit in hits}
    check(collection, held, QUERIES[:2], recall=1, k=ROWS + 100)
    assert collection.manifest.generation == generation


def test_rows_written_again_for_other_metadata_are_found(collection: Collection, held: dict[str, Array]) -> None:
    """They lie outside LanceDB's index from then on, under keys that the generation covers."""
    some = list(range(0, 600, 6))
    collection.add(document(f"d{at}", held[f"d{at}"], number=1) for at in some)
    index = collection._look().candidates
    assert index is not None
    assert collection.store.vector_index.num_unindexed_rows == len(some)
    assert collection._look().covered == len(collection)
    queries = renormalise(np.stack([held[f"d{at}"] for at in some]))
    assert index.positions(queries, 1, 1, WIDE).tolist() == [[at] for at in some]
    hits = collection.search(queries, 1)
    assert [(found[0].id, found[0].metadata["n"]) for found in hits] == [(f"d{at}", 1) for at in some]
    check(collection, held, QUERIES)
    collection.optimize()
    assert collection.store.vector_index.num_unindexed_rows == 0
    check(collection, held, QUERIES)


def test_filters_stay_exact(collection: Collection, held: dict[str, Array]) -> None:
    collection.add(document(f"d{at}", held[f"d{at}"], number=1) for at in range(0, ROWS, 30))
    truth, _ = best({f"d{at}": held[f"d{at}"] for at in range(0, ROWS, 30)}, QUERIES, 10)
    assert [[hit.id for hit in hits] for hits in collection.search(QUERIES, where="n = 1")] == truth


def test_another_kind_leaves_nothing_behind_and_readers_go_on(collection: Collection, held: dict[str, Array]) -> None:
    truth, _ = best(held, QUERIES, 10)
    reader = Collection.open(collection.path)
    check(reader, held, QUERIES)
    before = Collection.open(collection.path)._look()
    first = files(collection)
    assert len(first) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collection.optimize()
        assert len(files(collection)) == 1
        assert files(collection) != first
        check(reader, held, QUERIES)
        collection.optimize("exact")
        assert collection.store.vector_index is None
        assert files(collection) == []
        assert reader.search(QUERIES) == collection.search(QUERIES)
    assert [[hit.id for hit in hits] for hits in reader.search(QUERIES)] == truth
    assert collection.manifest.recall == 1
    assert orjson.loads((collection.path / "manifest.json").read_bytes())["table_version"] == reader.store.version
    # A search that began before all that.
    with pytest.warns(EmbellWarning, match="searched exactly.*embell optimize"):
        _, keys = before.search(QUERIES, 10, None)
    assert [[f"d{key}" for key in row] for row in keys] == truth


@pytest.mark.parametrize("damage", ["dropped", "files"])
def test_a_lost_index_costs_time_and_nothing_else(collection: Collection, held: dict[str, Array], damage: str) -> None:
    truth, _ = best(held, QUERIES, 10)
    if damage == "dropped":
        collection.store._table.drop_index(collection.store.vector_index.name)
    else:
        for path in files(collection):
            shutil.rmtree(path)
    again = Collection.open(collection.path)
    with pytest.warns(EmbellWarning, match="embell optimize") as told:
        found = again.search(QUERIES)
    assert len(told) == 1
    assert [[hit.id for hit in hits] for hits in found] == truth
    again.optimize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Collection.open(collection.path), held, QUERIES)
    assert isinstance(Collection.open(collection.path)._look().candidates, LanceIndex)


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_rows_stay_exact_until_there_are_more(kind: str, tmp_path: Path) -> None:
    rows, queries = rows_and_queries(1, FEWEST, 10)
    held = {f"d{at}": row for at, row in enumerate(rows)}
    collection = Collection.create(tmp_path / "c", None, dim=DIM, index=kind)
    collection.optimize()
    collection.add(document(name, held[name]) for name in list(held)[:-1])
    assert not collection.manifest.approximate
    assert collection.manifest.recall == 1
    assert collection.store.vector_index is None
    check(collection, dict(list(held.items())[:-1]), queries, recall=1)
    collection.add([document(name, held[name]) for name in list(held)[-1:]])
    collection.optimize()
    assert collection.manifest.approximate
    check(collection, held, queries)
    collection.delete([f"d{at}" for at in range(FEWEST // 2)])
    collection.optimize()
    assert collection.store.vector_index is None
    check(collection, dict(list(held.items())[FEWEST // 2 :]), queries, recall=1)


@pytest.mark.parametrize("dim", [6, 9, 12])
def test_any_width_can_be_indexed(dim: int, tmp_path: Path) -> None:
    rows, queries = rows_and_queries(2, FEWEST, 10, dim)
    collection = Collection.create(tmp_path / "c", None, dim=dim, index="lance")
    collection.add(document(f"d{at}", row) for at, row in enumerate(rows))
    assert collection.manifest.approximate
    stored = {row["id"]: np.array(row["vector"], np.float16) for row in collection.store.scan(["id", "vector"])}
    check(collection, stored, queries, recall=0.8)


def test_a_lance_index_is_tuned(collection: Collection, held: dict[str, Array], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_TIMED", 2)
    monkeypatch.setattr(tuning, "_DEPTHS", (4, 16))
    kind = collection.manifest.index
    collection.tune(0.8, QUERIES[:60])
    manifest = collection.manifest
    assert manifest.approximate
    tuned = manifest.tuned
    assert tuned is not None
    assert (manifest.index, tuned["index"], tuned["target"]) == (kind, kind, 0.8)
    assert manifest.recall == tuned["recall"] >= tuned["low"] >= 0.8
    assert tuned["bytes_per_vector"] == pytest.approx(sum(path.stat().st_size for path in files(collection)[0].iterdir()) / ROWS)
    assert ("ef" in tuned["settings"]) == (kind != "lance")
    assert orjson.loads((collection.path / "index" / str(manifest.generation) / "curve.json").read_bytes())["points"]
    check(Collection.open(collection.path), held, QUERIES, recall=0.75)


def test_on_the_command_line(inside: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "QUERIES", 60)
    target = tmp_path / "c.embell"
    rows = [
        {"id": f"d{at}", "text": f"text {at}", "vector": row.tolist()}
        for at, row in enumerate(rows_and_queries(3, FEWEST, 0, 8)[0].astype(float))
    ]
    source = write_jsonl(tmp_path / "c.jsonl", rows)
    inside("index", source, "--to", target, "--vector-field", "vector", "--index", "lance:IVF").fails(2, "lance:IVF_HNSW_SQ")
    assert inside("index", source, "--to", target, "--vector-field", "vector", "--index", "lance").status == 0
    inside("optimize", target, "--index", "lance:hnsw").fails(2, "'hnsw'", "lance:IVF_HNSW_SQ")
    done = inside("optimize", target, "--index", "lance:IVF_HNSW_SQ")
    assert done.out == "lance:IVF_HNSW_SQ: recall not measured; embell tune measures it\n"
    tuned = inside("tune", target, "--recall", "0.5", "--json")
    assert tuned.status == 0, tuned
    assert tuned.lines[0]["index"] == "lance:IVF_HNSW_SQ"
    assert inside("similar", target, "d1", "--json").lines[0]["id"] != "d1"
    assert inside("optimize", target, "--index", "exact").out == "searched exactly: recall@10 1.000\n"
