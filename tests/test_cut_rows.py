"""Threshold search by cut rows, held against brute force in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embell.indexers import codes as codes_module
from embell.indexers import cut_rows as cut_module
from embell.indexers import exact as exact_module
from embell.indexers.codes import int8_products, renormalise
from embell.indexers.cut_rows import CutRows, Sketch, sketch_for
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]
BOTH = sorted({int8_products(), False})


def corpus(seed: int, n: int, dim: int, copies: int) -> Array:
    """Stored rows that extend along few axes more than along others; of the first ten, `copies` more that are nearly the same."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, dim)) * np.geomspace(1, 0.1, dim)
    rows = np.concatenate([rows, rows[rng.integers(0, 10, copies)] + 0.01 * rng.standard_normal((copies, dim))])
    return renormalise(rng.permutation(rows)).astype(np.float16)


def scores_of(queries: Array, stored: Array) -> Array:
    return np.einsum("qd,nd->qn", queries.astype(np.float64), renormalise(stored).astype(np.float64))


@given(data=st.data())
@settings(max_examples=60)
def test_products_of_cut_vectors_are_no_less_than_scores(data: st.DataObject) -> None:
    """Vectors of any kind along any axes: in them, at right angles to them, equal, far from the others."""
    dim = data.draw(st.sampled_from([3, 20, 384]))
    width = data.draw(st.integers(2, dim))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    axes = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    along = rng.standard_normal((8, width - 1)) @ axes[:, : width - 1].T
    across = rng.standard_normal((8, dim - width + 1)) @ axes[:, width - 1 :].T
    share = np.array(data.draw(st.lists(st.sampled_from([0.0, 1e-7, 1e-4, 0.5, 1.0]), min_size=8, max_size=8)))[:, None]
    vectors = renormalise((1 - share) * along + share * across + 1e-30)
    sketch = Sketch(torch.from_numpy(np.ascontiguousarray(axes[:, : width - 1])))
    cut = sketch.cut(vectors).astype(np.float64)
    wide = vectors.astype(np.float64)
    assert cut.shape == (8, width)
    assert (wide @ wide.T - cut @ cut.T).max() <= sketch.error
    whole = (share == 0).ravel()  # nothing is cut off these, and little is added
    assert np.abs(wide @ wide.T - cut @ cut.T)[np.ix_(whole, whole)].max(initial=0) < 1e-4


@pytest.mark.parametrize("int8", BOTH)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1e-4]))
@settings(max_examples=20)
def test_a_pair_is_found_that_scores_just_the_threshold(int8: bool, seed: int, spread: float) -> None:
    """Rows that lie along the axes wholly, or nearly: nothing that was cut off makes room for what rounding loses."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((120, 24))
    rows[:, 6:] *= spread
    stored = renormalise(rows).astype(np.float16)
    vectors = renormalise(stored)
    cut = CutRows(Sketch(torch.eye(24, dtype=torch.float64)[:, :6].contiguous()), len(stored), lambda at: vectors[at], int8)
    truth = scores_of(vectors, stored)
    for query in range(0, 120, 7):
        for threshold in np.sort(truth[query])[-12:]:
            positions = cut.reaching(vectors[query : query + 1], float(threshold), None)[1]
            assert set(np.flatnonzero(truth[query] >= threshold).tolist()) <= set(positions.tolist())


@pytest.mark.parametrize("int8", BOTH)
@pytest.mark.parametrize("loose_share", [1e-4, 0.05])
@given(seed=st.integers(0, 1000), threshold=st.sampled_from([0.3, 0.9, 0.999]), until=st.sampled_from([None, 1, 64, 190]))
@settings(max_examples=10)
def test_no_pair_that_reaches_the_threshold_is_left_out(
    int8: bool, loose_share: float, seed: int, threshold: float, until: int | None
) -> None:
    stored = corpus(seed, 180, 40, 23)
    vectors = renormalise(stored)
    axes = torch.linalg.svd(torch.from_numpy(vectors).double().T, full_matrices=False)[0][:, :15]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codes_module, "SAMPLE", 20)
        patched.setattr(codes_module, "_LOOSE_SHARE", loose_share)
        patched.setattr(cut_module, "_BLOCK", 128)
        cut = CutRows(Sketch(axes.contiguous()), len(stored), lambda at: vectors[at], int8)
        asked, positions = cut.reaching(vectors[:50], threshold, until)
    assert (np.diff(asked * len(stored) + positions) > 0).all()
    assert positions.max(initial=0) < (until or len(stored))
    truth = scores_of(vectors[:50], stored)[:, :until] >= threshold
    found = np.zeros_like(truth)
    found[asked, positions] = True
    assert (found | ~truth).all()
    if threshold == 0.999 and until is None and loose_share < 0.01:
        assert found.sum() < 0.2 * found.size  # or cutting would say nothing


@pytest.fixture
def cutting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are cut for any search, however small."""
    monkeypatch.setattr(exact_module, "_CUT_QUERIES", 1)
    monkeypatch.setattr(exact_module, "_CUT_PAIRS", 1)
    monkeypatch.setattr(exact_module, "_CUT_SQUARES", 0)
    monkeypatch.setattr(exact_module, "QUERIES", 100)
    monkeypatch.setattr(cut_module, "WIDTHS", (8, 12))
    monkeypatch.setattr(cut_module, "_ASKED", 60)
    monkeypatch.setattr(cut_module, "_PAIR", 100)
    monkeypatch.setattr(cut_module, "_BLOCK", 64)


def index_of(stored: Array, int8: bool) -> ExactIndex:
    index = ExactIndex(stored.shape[1])
    index._int8 = int8
    index.add(np.arange(100), stored[:100])
    index.add(np.arange(100, len(stored)), stored[100:])
    return index


@pytest.mark.parametrize("int8", BOTH)
@pytest.mark.parametrize("most", [None, 2, 20])
@pytest.mark.usefixtures("cutting")
def test_join_and_partners_by_cut_rows_are_those_of_brute_force(int8: bool, most: int | None) -> None:
    stored = corpus(3, 200, 32, 400)
    index = index_of(stored, int8)
    truth = scores_of(renormalise(stored), stored)
    for kind in ("join", "partners"):
        if kind == "join":
            parts = list(index.join(0.95, most=most))
            near = np.tril(truth, -1) >= 0.95
        else:
            parts = list(index.partners(renormalise(stored), 0.95, most=most))
            near = truth >= 0.95
            assert index._cut is not None
            assert index._cut[1] is not None
        asked, others, scores, crowded = (np.concatenate(part) for part in zip(*parts, strict=True))
        counts = near.sum(axis=1)
        many = np.flatnonzero(counts > (len(stored) if most is None else most))
        assert crowded.tolist() == many.tolist()
        assert (len(many) > 0) == (most is not None)
        expected = [
            (row, at) for row in range(len(stored)) for at in np.flatnonzero(near[row])[: 32 if row in many else None].tolist()
        ]
        assert list(zip(asked.tolist(), others.tolist(), strict=True)) == expected
        np.testing.assert_allclose(scores, truth[asked, others], atol=1e-12)


@pytest.mark.usefixtures("cutting")
def test_rows_are_cut_anew_for_another_threshold_and_for_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = corpus(4, 300, 32, 40)
    index = index_of(stored[:250], BOTH[-1])
    before = None
    for threshold, rows in ((0.95, 250), (0.95, 340), (0.9, 340)):
        if rows > len(index):
            index.add(np.arange(250, rows), stored[250:rows])
        truth = scores_of(renormalise(stored[:rows]), stored[:rows])
        found = index.range_search(renormalise(stored[:rows]), threshold)
        assert [sorted(keys.tolist()) for _, keys in found] == [np.flatnonzero(row >= threshold).tolist() for row in truth]
        assert index._cut is not None
        assert index._cut[0] == threshold
        assert index._cut[1] is not None
        assert index._cut is not before
        before = index._cut
    monkeypatch.setattr(exact_module, "_CUT_QUERIES", 1000)
    held = index._cut[1]
    assert index._cut_for(1, 0.9, None) is held  # what is there serves few queries too
    assert index._cut_for(1, 0.8, None) is None
    assert index._cut_for(5000, 0.9, np.ones(340, bool)) is None  # those that are barred would be multiplied in vain


@pytest.mark.usefixtures("cutting")
def test_equal_rows_without_number_are_scored_in_part_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that the sample does not show: whose rows have partners enough soon is not compared with all."""
    others = corpus(5, 500, 32, 0)
    stored = np.concatenate([others, np.repeat(others[:1], 900, axis=0)])
    monkeypatch.setattr(exact_module, "sketch_for", lambda *_: Sketch(torch.eye(32, dtype=torch.float64)[:, :11].contiguous()))
    monkeypatch.setattr(cut_module, "_HELD", 3)
    index = index_of(stored, BOTH[-1])
    scored = []
    scores = index._scores
    monkeypatch.setattr(index, "_scores", lambda *given: (scored.append(len(given[1])), scores(*given))[1])
    parts = list(index.join(0.99, most=50))
    asked, others_of, _, crowded = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert crowded.tolist() == list(range(550, 1400))
    assert np.bincount(asked, minlength=1400)[550:].tolist() == [32] * 850
    assert others_of[asked == 1399].tolist() == [0, *range(500, 531)]
    assert sum(scored) < 850 * 101 + 51**2


def test_rows_are_cut_where_that_saves_work_only() -> None:
    rng = np.random.default_rng(0)
    flat = renormalise(rng.standard_normal((3000, 256)))  # no axis is more than another
    steep = renormalise(rng.standard_normal((3000, 256)) * np.geomspace(1, 0.1, 256))
    assert sketch_for(flat, 0.2, 1.0) is None
    narrow, wide = sketch_for(steep, 0.9, 1e-3), sketch_for(steep, 0.6, 1e-3)
    assert narrow is not None
    assert narrow.width == 64
    assert wide is not None
    assert wide.width > narrow.width
    assert sketch_for(steep, -1.0, 1e-3) is None  # all pairs reach it
    assert sketch_for(steep[:, :64], 0.9, 1e-3) is None  # too narrow
