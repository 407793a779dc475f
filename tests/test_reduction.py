"""A corpus brought down to so many documents, against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embell import Collection, Document, UsageError, deduplicate
from embell.engine import reduction
from embell.engine.duplicates import Duplicates
from embell.indexers.codes import renormalise
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]


def cosines(vectors: Array) -> Array:
    """Of vectors as they are stored."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # in float32, as given: other roundings are other vectors
    wide = renormalise(unit.astype(np.float16)).astype(np.float64)
    found: Array = wide @ wide.T
    return found


def crowd(seed: int, n: int, dim: int = 6) -> Array:
    """Vectors of which many are near each other, some equal."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, n // 6), dim))
    rows = centres[rng.integers(0, len(centres), n)] + rng.choice([0, 0.1, 0.6], n)[:, None] * rng.standard_normal((n, dim))
    return rows.astype(np.float32)


def check(found: Duplicates, near: Array, count: int) -> None:
    """What must hold of every reduction to `count`."""
    kept = [int(name) for name in found.kept]
    dropped = [int(row.id) for row in found.dropped]
    assert sorted(kept + dropped) == list(range(len(near)))
    assert kept == found.kept_positions.tolist()
    assert len(kept) == count
    lowest = 1.1
    for row in found.dropped:
        at, other = int(row.id), int(row.kept_id)
        assert other in kept
        if row.kind == reduction.REDUCED:
            assert row.score == pytest.approx(near[at, other], abs=1e-6)
            assert row.score >= near[at, kept].max() - 1e-6  # the nearest
            lowest = min(lowest, row.score)
    assert found.reduced == lowest


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.sampled_from(["first", "last", "longest", "central"]), st.data())
@settings(max_examples=60, deadline=None)
def test_so_many_are_kept_and_each_dropped_text_names_the_nearest(seed: int, n: int, keep: str, data: st.DataObject) -> None:
    vectors = crowd(seed, n)
    texts = [f"{'word ' * (at % 7)}{at}" for at in range(n)]
    whole = deduplicate(texts, vectors=vectors, threshold=0.995, keep=keep)
    count = data.draw(st.integers(1, n))
    found = deduplicate(texts, vectors=vectors, threshold=0.995, keep=keep, reduce_to=count)
    if count >= len(whole.kept):
        assert found.kept == whole.kept
        assert found.reduced is None
        return
    check(found, cosines(vectors), count)
    assert set(found.kept) <= set(whole.kept)
    if keep in ("last", "longest"):
        first = min(whole.kept_positions.tolist(), key=lambda at: whole.rank[at])
        assert str(first) in found.kept, "what the policy prefers most stays"
    stayed = {row.id: row for row in whole.dropped if row.kept_id in found.kept}
    assert {row.id: row for row in found.dropped if row.id in stayed} == stayed


@pytest.mark.parametrize("most", [20_000_000, 3])
@pytest.mark.parametrize("share", [2.5, 0.5, 0.01])
def test_few_rows_that_go_are_found_from_a_list_of_pairs_as_without(
    share: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = crowd(11, 300)
    monkeypatch.setattr(reduction, "_PARTNERED", 1e9)
    texts = [f"text {at}" for at in range(300)]
    without = [deduplicate(texts, vectors=vectors, kinds=["exact"], reduce_to=count) for count in (299, 250, 200)]
    monkeypatch.setattr(reduction, "_PARTNERED", share)
    monkeypatch.setattr(reduction, "_MOST_PAIRS", most)
    for count, other in zip((299, 250, 200), without, strict=True):
        found = deduplicate(texts, vectors=vectors, kinds=["exact"], reduce_to=count)
        check(found, cosines(vectors), count)
        assert found.reduced == pytest.approx(other.reduced, abs=0.02)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(-0.2, 0.99), st.integers(1, 40), st.sampled_from([1, 3, 16]))
@settings(max_examples=80, deadline=None)
def test_a_cover_is_the_greedy_walk(seed: int, n: int, threshold: float, most: int, block: int) -> None:
    vectors = crowd(seed, n)
    near = cosines(vectors)
    if (np.abs(near - threshold) < 1e-6).any():
        return  # rounding decides
    kept: list[int] = []
    for row in range(n):
        if not (near[row, kept] >= threshold).any():
            kept.append(row)
    rows = ExactIndex(vectors.shape[1])
    rows.add(np.arange(n), (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "_BLOCK", block)
        found = reduction._cover(rows, threshold, most)
    if len(kept) > most:
        assert found is None
    else:
        assert found is not None
        assert np.flatnonzero(found).tolist() == kept


def test_of_separate_clusters_one_row_each_is_kept() -> None:
    rng = np.random.default_rng(4)
    centres = np.eye(30)[:20]
    cluster = rng.permutation(np.repeat(np.arange(20), 50))
    vectors = centres[cluster] + 0.02 * rng.standard_normal((1000, 30))
    found = deduplicate([f"number {at}" for at in range(1000)], vectors=vectors, threshold=0.99999, reduce_to=20)
    assert sorted(cluster[found.kept_positions]) == list(range(20))
    assert {cluster[int(row.id)] == cluster[int(row.kept_id)] for row in found.dropped} == {True}
    check(found, cosines(vectors), 20)


def test_where_the_cover_leaves_too_few_those_least_like_the_kept_stay() -> None:
    angle = np.radians([0, 0.5, 1, 1.5, 90])  # at any cosine below, the first four are one
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    found = deduplicate(list("abcde"), vectors=vectors, kinds=["exact"], reduce_to=3)
    assert found.kept == ["0", "2", "4"] or found.kept == ["0", "3", "4"]
    check(found, cosines(vectors), 3)


def test_where_all_are_equally_far_copies_stay_last() -> None:
    vectors = np.repeat(np.eye(10, dtype=np.float32), 2, axis=0)
    found = deduplicate([f"text {at}" for at in range(20)], vectors=vectors, kinds=["exact"], reduce_to=8)
    assert len({at // 2 for at in found.kept_positions.tolist()}) == 8


def test_equal_vectors_can_be_reduced() -> None:
    found = deduplicate([f"text {at}" for at in range(50)], vectors=np.ones((50, 4)), kinds=["exact"], reduce_to=7)
    check(found, np.ones((50, 50)), 7)


@pytest.mark.parametrize(("options", "said"), [
    ({"reduce_to": 0}, "at least 1"),
    ({"reduce_to": 2.5}, "at least 1 document, not 2.5"),
    ({"reduce_to": 2, "against": ["a"], "against_vectors": np.ones((1, 3))}, "against"),
    ({"reduce_to": 2, "group_by": ["a"] * 5}, "group_by"),
])  # fmt: skip
def test_what_cannot_be_reduced_is_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        deduplicate(list("abcde"), vectors=np.eye(5, 3) + 0.1, **options)


def test_nothing_is_reduced_to_something() -> None:
    assert deduplicate([], reduce_to=5, vectors=np.empty((0, 3))).kept == []


def test_a_collection_is_reduced_as_a_list_is(tmp_path: Path) -> None:
    vectors = crowd(9, 120)
    collection = Collection.create(tmp_path / "c", None, dim=6)
    collection.add(Document(f"row {at}", f"text {at}", vector=vector) for at, vector in enumerate(vectors))
    collection.delete(["row 3", "row 40"])
    left = np.setdiff1d(np.arange(120), [3, 40])
    found = collection.reduce(collection.duplicates(0.99), 20)
    same = deduplicate(
        [f"text {at}" for at in left], vectors=vectors[left], ids=[f"row {at}" for at in left], threshold=0.99, reduce_to=20
    )
    assert found.kept == same.kept
    assert found.dropped == same.dropped
    assert found.rethreshold(0.999).reduced is None
    collection.delete(["row 5"])
    with pytest.raises(UsageError, match="changed"):
        collection.reduce(found, 10)
    collection.add([Document("new", "text", vector=vectors[5])])  # as many rows as before
    with pytest.raises(UsageError, match="changed"):
        collection.reduce(found, 10)
    with pytest.raises(UsageError, match="two corpora"):
        collection.reduce(collection.leaks(collection), 10)
    again = collection.reduce(collection.reduce(collection.duplicates(0.99), 20), 12)
    assert again.reduced == min(row.score for row in again.dropped if row.kind == "reduced")
    assert {row.kept_id for row in again.dropped} <= set(again.kept)
