"""Outliers and representatives, against brute force and on texts whose subjects are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Ran, topic_rows, write_jsonl
from embell import Collection, Document, UsageError
from embell.engine import closeness as module
from embell.engine.closeness import closeness
from embell.engine.overview import outliers, representatives
from embell.indexers.codes import renormalise
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]
Run = Callable[..., Ran]


def index_of(vectors: Array, keys: Array | None = None) -> ExactIndex:
    index = ExactIndex(vectors.shape[1])
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    index.add(np.arange(len(vectors)) if keys is None else keys, unit)
    return index


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.sampled_from([3, 4096]))
@settings(max_examples=60)
def test_closeness_is_the_mean_of_the_nearest_others(seed: int, n: int, neighbours: int, some: bool, block: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, 5))[rng.integers(0, n, n)]  # some stand twice
    index = index_of(vectors, np.sort(rng.permutation(200)[:n]))
    among = rng.random(n) < 0.5 if some else None
    wide = index.vectors(np.arange(n)).astype(np.float64)
    near = wide @ wide.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TOGETHER", block)
        found = closeness(index, neighbours, among)
    for row in range(n):
        others = [near[row, at] for at in range(n) if at != row and (among is None or among[at])]
        best = sorted(others, reverse=True)[:neighbours]
        assert found[row] == pytest.approx(np.mean(best) if best else 0, abs=1e-6)


def test_what_lies_apart_is_an_outlier() -> None:
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((4, 40))
    vectors = centres[rng.integers(0, 4, 600)] + 0.3 * rng.standard_normal((600, 40))
    alone = rng.permutation(600)[:12]
    vectors[alone] = 2 * rng.standard_normal((12, 40))
    positions, scores = outliers(index_of(vectors), 12)
    assert set(positions.tolist()) == set(alone.tolist())
    assert (np.diff(scores) >= 0).all()


def test_representatives_are_one_of_each_subject_with_its_share() -> None:
    rng = np.random.default_rng(5)
    sizes = [400, 250, 200, 100, 50]
    subject = rng.permutation(np.repeat(np.arange(5), sizes))
    vectors = np.eye(16)[subject] + 0.1 * rng.standard_normal((1000, 16))
    index = index_of(vectors)
    positions, shares = representatives(index, 5)
    assert subject[positions].tolist() == [0, 1, 2, 3, 4]
    assert shares.tolist() == pytest.approx([0.4, 0.25, 0.2, 0.1, 0.05], abs=0.01)
    for position in positions:  # one from the middle of its subject
        own = index.vectors(np.flatnonzero(subject == subject[position])).mean(axis=0)
        assert (
            np.quantile(index.vectors(np.flatnonzero(subject == subject[position])) @ own, 0.9)
            < index.vectors(position[None]) @ own
        )


@pytest.mark.parametrize(("rows", "asked"), [(0, 3), (1, 1), (5, 9), (60, 60), (60, 59), (300, 40)])
def test_there_are_as_many_representatives_as_asked_for_and_none_stands_twice(rows: int, asked: int) -> None:
    vectors = np.random.default_rng(rows).standard_normal((rows, 4))
    for index in (index_of(vectors), index_of(np.repeat(vectors, 3, axis=0))):
        positions, shares = representatives(index, asked)
        assert len(positions) == min(rows, asked)
        assert len(np.unique(index.stored(positions), axis=0)) == len(positions), "copies are one"
        assert shares.sum() == pytest.approx(1 if rows else 0)


@pytest.mark.parametrize("subjects", [5, 10])
def test_no_subject_is_left_out_where_subjects_are_apart(subjects: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        subject = np.repeat(np.arange(subjects), 50)
        vectors = np.eye(24)[subject] + 0.1 * rng.standard_normal((len(subject), 24))
        assert set(subject[representatives(index_of(vectors), subjects)[0]].tolist()) == set(range(subjects))


def test_a_collection_without_its_deleted_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    vectors = renormalise(np.eye(8)[rng.integers(0, 2, 80)] + 0.1 * rng.standard_normal((80, 8)))
    vectors[[10, 20]] = np.eye(8)[[6, 7]]
    collection = Collection.create(tmp_path / "c", None, dim=8)
    assert collection.outliers(3) == []
    assert collection.representatives(3) == []
    collection.add(Document(f"row {at}", f"text {at}", {"at": at}, vector=vector) for at, vector in enumerate(vectors))
    assert {hit.id for hit in collection.outliers(2)} == {"row 10", "row 20"}
    collection.delete(["row 10"])
    first = collection.outliers(1)[0]
    assert (first.id, first.text, first.metadata) == ("row 20", "text 20", {"at": 20})
    assert sum(hit.score for hit in collection.representatives(2)) == pytest.approx(1)
    for call in (collection.outliers, collection.representatives):
        with pytest.raises(UsageError, match="at least 1"):
            call(0)


def test_the_commands_tell_of_sources_and_collections(inside: Run, tmp_path: Path) -> None:
    rows = [{**row, "id": f"{row['id']}-{copy}"} for row in topic_rows() if row["topic"] != "space" for copy in range(3)]
    rows.append({"id": "odd", "text": "0x7ffe 0x0012 0xdead 0xbeef", "topic": "dump"})
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    (first,) = inside("outliers", source, "-k", "1", "--json").lines
    assert (first["id"], first["metadata"]) == ("odd", {"topic": "dump"})
    collection = tmp_path / "rows.embell"
    assert inside("index", source, "--to", collection).status == 0
    told = inside("outliers", collection, "-k", "1", "--json").lines[0]
    assert (told["rank"], told["id"], told["metadata"]["topic"]) == (1, "odd", "dump")
    stand = inside("representatives", collection, "-k", "4", "--json").lines
    assert len(stand) == 4
    assert sum(hit["score"] for hit in stand) == pytest.approx(1)
    shown = inside("representatives", collection, "-k", "2")
    assert shown.status == 0
    assert "share" in shown.err
    assert len(shown.out.splitlines()) >= 4
    inside("outliers", tmp_path / "none.jsonl").fails(1, "none.jsonl")
    inside("outliers", collection, "--model", "another").fails(2, "--model", "made already")
