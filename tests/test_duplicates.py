"""Duplicate logic against brute force, and its invariants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embell import UsageError
from embell.engine import duplicates as module
from embell.engine.duplicates import Duplicates, find_duplicates, normalise, text_mark
from embell.indexers.codes import renormalise
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]


def run(rows: Array, texts: list[str], threshold: float) -> Duplicates:
    index = ExactIndex(rows.shape[1])
    index.add(np.arange(len(rows)), rows.astype(np.float16))
    return find_duplicates([f"d{n}" for n in range(len(rows))], [text_mark(text) for text in texts], index, threshold)


def scores_of(rows: Array) -> Array:
    stored = renormalise(rows.astype(np.float16)).astype(np.float64)
    return np.einsum("id,jd->ij", stored, stored)


@given(data=st.data())
@settings(max_examples=60)
def test_greedy_cover_is_brute_forces_and_keeps_its_promises(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    centres = rng.standard_normal((6, 8))
    labels = rng.integers(0, 6, n)
    rows = renormalise(centres[labels] + 0.25 * rng.standard_normal((n, 8)))
    texts = [f"text {n}" for n in range(n)]
    threshold = data.draw(st.sampled_from([0.5, 0.8, 0.9, 0.97]))
    found = run(rows, texts, threshold)

    scores = scores_of(rows)
    kept: list[int] = []
    dropped: dict[int, int] = {}
    for i in range(n):
        near = [j for j in kept if scores[i, j] >= threshold]
        if near:
            dropped[i] = max(near, key=lambda j: (scores[i, j], -j))
        else:
            kept.append(i)
    assert found.kept == [f"d{i}" for i in kept]
    assert {(row.id, row.kept_id) for row in found.dropped} == {(f"d{i}", f"d{j}") for i, j in dropped.items()}
    for row in found.dropped:
        assert row.kind == "semantic"
        assert row.score == pytest.approx(scores[int(row.id[1:]), int(row.kept_id[1:])], abs=1e-12)
        assert row.score >= threshold
    pairs = {(a, b) for a, b in zip(found.pairs["id_a"].to_pylist(), found.pairs["id_b"].to_pylist(), strict=True)}
    assert pairs == {(f"d{j}", f"d{i}") for i in range(n) for j in range(i) if scores[i, j] >= threshold}
    assert sorted(found.kept + [row.id for row in found.dropped]) == sorted(f"d{i}" for i in range(n))


@given(data=st.data())
@settings(max_examples=40)
def test_copies_go_to_a_kept_row(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n = data.draw(st.integers(2, 40))
    which = rng.integers(0, 8, n)
    rows = renormalise(rng.standard_normal((8, 6)))[which]
    texts = [f"Text  {w}" if rng.random() < 0.5 else f"text {w} " for w in which]
    found = run(rows, texts, 0.8)
    kept = set(found.kept)
    assert len({texts[int(name[1:])].lower().split()[1] for name in kept}) == len(kept)
    for row in found.dropped:
        assert row.kept_id in kept
        same = which[int(row.id[1:])] == which[int(row.kept_id[1:])]
        assert row.kind == ("exact" if same else "semantic")
        assert row.score == 1.0 if same else row.score >= 0.8
    assert sum(len(group) - 1 for group in found.groups) == len(found.dropped)


def test_normalisation_sees_through_unicode_case_and_space() -> None:
    assert normalise("  Ｆull\u00a0WIDTH\n\ttext ﬁn STRASSE ") == normalise("full width text fin straße")
    assert normalise("a b") != normalise("ab")


def test_rows_with_very_many_partners_are_capped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTNERS", 5)
    rng = np.random.default_rng(0)
    rows = renormalise(np.ones((30, 8)) + 0.01 * rng.standard_normal((30, 8)))
    found = run(rows, [f"t{n}" for n in range(30)], 0.9)
    assert found.kept == ["d0"]
    assert {row.kept_id for row in found.dropped} == {"d0"}
    assert found.capped == 24
    links = found.pairs.filter(np.array([int(b[1:]) > 5 for b in found.pairs["id_b"].to_pylist()]))
    assert set(links["id_a"].to_pylist()) == {"d0"}
    assert links.num_rows == 24


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold"):
        run(np.eye(2), ["a", "b"], threshold)


def test_at_threshold_one_equal_vectors_are_duplicates() -> None:
    rows = renormalise(np.random.default_rng(0).standard_normal((50, 32)))
    found = run(np.concatenate([rows, rows]), [f"t{n}" for n in range(100)], 1.0)
    assert found.kept == [f"d{n}" for n in range(50)]
