"""One contract for all vector indices, held against brute force in float64."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embell import CollectionError, MissingExtraError, UsageError
from embell.errors import EmbellWarning
from embell.indexers import coded_rows as rows_module
from embell.indexers import codes as codes_module
from embell.indexers import exact as exact_module
from embell.indexers.codes import Codes, int8_products, mixed_products, renormalise
from embell.indexers.exact import ExactIndex
from embell.indexers.faiss_index import FaissIndex
from embell.indexers.vector_index import check_kind

Array = np.ndarray[Any, Any]
MAKERS: dict[str, Callable[[int], Any]] = {"exact": ExactIndex, "faiss:Flat": lambda dim: FaissIndex(dim, "Flat")}


def unit_rows(seed: int, n: int, dim: int, clusters: int = 5, spread: float = 0.3) -> Array:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim))
    return renormalise(centres[rng.integers(0, clusters, n)] + spread * rng.standard_normal((n, dim)))


def reference(queries: Array, rows: Array) -> Array:
    """Scores of the stored rows in float64, `(q, n)`."""
    return np.einsum("qd,nd->qn", queries.astype(np.float64), renormalise(rows).astype(np.float64))


def as_if_on_a_card(patch: pytest.MonkeyPatch, held: bool = True) -> None:
    """The products that a graphics card would make are made by the way that leads there, on the processor, if its own are exact.

    Without `held`, the codes are brought there block by block.
    """
    patch.setattr(rows_module, "card_products", lambda dim: torch.device("cpu") if int8_products() else None)
    patch.setattr(rows_module, "CARD_QUERIES", 1)
    if not held:
        patch.setattr(Codes, "held_by", lambda codes, card: None)


def ranked(scores: Array, k: int) -> Array:
    return np.lexsort((np.broadcast_to(np.arange(scores.shape[1]), scores.shape), -scores))[:, :k]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("n", [0, 1, 7, 3000])
def test_search_and_range_search_agree_with_brute_force(kind: str, n: int, tmp_path: Path) -> None:
    rows, queries = unit_rows(0, n, 24).astype(np.float16), unit_rows(1, 9, 24)
    index = MAKERS[kind](24)
    keys = np.arange(n) * 3 + 5
    index.add(keys[: n // 2], rows[: n // 2])
    index.add(keys[n // 2 :], rows[n // 2 :])
    index.save(tmp_path)
    for one in (index, type(index).load(tmp_path)):
        scores, found = one.search(queries, 10)
        truth = reference(queries, rows)
        best = ranked(truth, 10)
        assert found.shape == scores.shape == (9, 10)
        assert (found[:, n:] == -1).all()
        np.testing.assert_array_equal(found[:, : min(10, n)], keys[best])
        np.testing.assert_allclose(scores[:, : min(10, n)], np.take_along_axis(truth, best, 1), atol=1e-3)
        for query, (values, hits) in enumerate(one.range_search(queries, 0.5)):
            sure = set(keys[truth[query] >= 0.501].tolist())
            assert sure <= set(hits.tolist()) <= set(keys[truth[query] >= 0.499].tolist())
            assert (np.diff(values) <= 0).all()


@given(data=st.data())
@settings(max_examples=60)
def test_exact_search_is_the_reference_in_values_and_order(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 320))
    dim = data.draw(st.integers(2, 48) | st.sampled_from([32, 64]))
    rows = unit_rows(
        data.draw(st.integers(0, 2**32 - 1)),
        n,
        dim,
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from([0.0, 1e-3, 0.02, 0.5])),
    )
    stored = rows.astype(np.float16)
    queries = np.concatenate([rows[:3], unit_rows(data.draw(st.integers(0, 2**32 - 1)), 3, dim)])
    queries = queries[-data.draw(st.integers(1, 6)) :]
    index = ExactIndex(dim)
    index._int8 = data.draw(st.sampled_from([int8_products(), False]))
    index._mixed = data.draw(st.sampled_from([mixed_products(dim), False]))
    cut = data.draw(st.integers(0, n))
    index.add(np.arange(cut), stored[:cut])
    index.add(np.arange(cut, n), stored[cut:])
    for segment in index._segments:
        segment.codes = Codes.of(segment.rows) if data.draw(st.booleans()) else None  # as if they came from files
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) if data.draw(st.booleans()) else None
    truth = reference(queries, stored)
    if allowed is not None:
        truth[:, ~allowed] = -np.inf
    exist = min(k, n if allowed is None else int(allowed.sum()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_STRIP", data.draw(st.sampled_from([7, 2048])))
        patch.setattr(rows_module, "_COPIED", data.draw(st.sampled_from([7, 8192])))
        patch.setattr(rows_module, "_PRODUCTS", data.draw(st.sampled_from([1, 2**20])))  # blocks of a few rows, or one of all
        patch.setattr(rows_module, "_FEWEST_ROWS", data.draw(st.sampled_from([16, 64, 4096])))
        if data.draw(st.booleans()):
            as_if_on_a_card(patch, data.draw(st.booleans()))
            patch.setattr(rows_module, "_FEWEST_ROWS", data.draw(st.sampled_from([13, 64, 4096])))
            patch.setattr(rows_module, "_CARD_ROWS", data.draw(st.sampled_from([64, 2**20])))
        if data.draw(st.booleans()):
            index.code(len(queries))
        chosen = index.chosen(allowed) if allowed is not None and data.draw(st.booleans()) else allowed
        scores, keys = index.search(queries, k, chosen)
        threshold = data.draw(st.floats(-1, 1))
        within = index.range_search(queries, threshold, allowed)
    np.testing.assert_array_equal(keys[:, :exist], ranked(truth, exist))
    assert (keys[:, exist:] == -1).all()
    np.testing.assert_allclose(scores[:, :exist], np.take_along_axis(truth, ranked(truth, exist), 1), rtol=0, atol=1e-12)
    for query, (values, hits) in enumerate(within):
        sure = np.flatnonzero(truth[query] >= threshold + 1e-12)
        assert set(sure.tolist()) <= set(hits.tolist())
        assert (truth[query][hits] >= threshold - 1e-12).all()
        assert (np.diff(values) <= 0).all()


@given(data=st.data())
@settings(max_examples=60)
def test_codes_are_within_the_error_they_state(data: st.DataObject) -> None:
    """Inner products of queries and coded rows, loose ones apart, against float64, whatever the rows are like."""
    dim, n = data.draw(st.sampled_from([2, 8, 64, 384])), data.draw(st.integers(1, 300))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((n, dim)) * data.draw(st.sampled_from([1e-3, 0.1, 1.0])) + data.draw(st.sampled_from([0.0, 1.0]))
    rows[:, 0] *= data.draw(st.sampled_from([1.0, 30.0]))
    spikes = rng.random(n) < data.draw(st.sampled_from([0.0, 0.01, 0.5]))
    rows[spikes] = np.eye(dim)[rng.integers(0, dim, int(spikes.sum()))]
    stored = renormalise(rows + 1e-9).astype(np.float16)
    codes = Codes.of(stored)
    assert len(codes.loose) <= 1e-4 * n
    queries = renormalise(np.concatenate([stored[:5], rng.standard_normal((5, dim))]))
    for mixed in {mixed_products(dim), False}:
        coded = codes.query(queries, mixed)
        products = torch.empty(len(queries), n)
        if mixed:
            coded.multiply(codes.codes, products)
        else:
            products = coded.codes.long() @ codes.codes.long().T
        coarse = products.numpy() * coded.scale[:, None] + coded.offset[:, None]
        off = np.abs(coarse - reference(queries, stored)) - coded.error[:, None]
        off[:, codes.loose] = -1
        assert off.max() <= 0


@given(dim=st.sampled_from([32, 64, 320, 4096]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_mixed_products_are_within_the_error_they_state_where_coding_loses_nothing(dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = rng.integers(-127, 128, (50, dim)).astype(np.int8)
    scale = 1 / float(np.linalg.norm(whole.astype(np.float64), axis=1).max())
    codes = Codes(torch.from_numpy(whole), np.zeros(dim, np.float32), scale, 0.0, 1.0, np.empty(0, np.int64))
    rows = whole * scale
    queries = codes_module.turned(renormalise(np.concatenate([rows, rng.standard_normal((50, dim))])))
    coded = codes.query(queries, mixed=True)
    products = torch.empty(100, 50)
    if mixed_products(dim):
        coded.multiply(codes.codes, products)
    else:
        products = (coded.codes.double() @ codes.codes.double().T).bfloat16()
    off = np.abs(products.double().numpy() * coded.scale[:, None] - codes_module.turned(queries).astype(np.float64) @ rows.T)
    assert (off <= coded.error[:, None]).all()
    assert coded.error.max() < 0.01


@given(data=st.data())
@settings(max_examples=40)
def test_products_of_stored_rows_are_within_the_error_they_state(data: st.DataObject) -> None:
    """As above for processors without int8: rows whose components may be too small for float16, of any length that rounding leaves."""
    dim, n = data.draw(st.sampled_from([2, 8, 384, 4096])), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((n, dim)) * data.draw(st.sampled_from([1.0, 1e-5, 1e-7]))
    rows[np.arange(n), rng.integers(0, dim, n)] += data.draw(st.sampled_from([0.0, 1.0]))
    stored = renormalise(rows).astype(np.float16)
    queries = renormalise(np.concatenate([stored[:5], rng.standard_normal((5, dim))]))
    found = torch.empty(len(queries), n)
    rows_module._multiply(torch.from_numpy(queries), torch.from_numpy(stored), found)
    assert np.abs(found.numpy() - reference(queries, stored)).max() <= rows_module.rough_error(dim)


@pytest.mark.parametrize("rows_of_a_block", [64, 4096])
def test_rows_unlike_the_sample_are_loose_and_still_found(rows_of_a_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_PRODUCTS", 1)
    monkeypatch.setattr(rows_module, "_FEWEST_ROWS", rows_of_a_block)
    monkeypatch.setattr(codes_module, "SAMPLE", 100)
    monkeypatch.setattr(codes_module, "_LOOSE_SHARE", 0.01)
    rows = renormalise(np.random.default_rng(8).uniform(-1, 1, (2000, 64)))
    spikes = codes_module.turned(np.eye(64, dtype=np.float32)).T[[3, 4, 5]]  # once turned, one component each
    rows[[1, 777, 1999]] = spikes
    stored = rows.astype(np.float16)
    codes = Codes.of(stored)
    assert {1, 777, 1999} <= set(codes.loose.tolist())
    for int8, mixed, card in product({int8_products(), False}, {mixed_products(64), False}, {int8_products(), False}):
        monkeypatch.setattr(rows_module, "card_products", lambda dim, card=card: torch.device("cpu") if card else None)
        monkeypatch.setattr(rows_module, "CARD_QUERIES", 3)
        index = ExactIndex(64)
        index._int8, index._mixed = int8, mixed
        index.add(np.arange(2000), stored)
        queries = renormalise(spikes)
        for allowed in (None, np.arange(2000) != 777, np.arange(2000) % 50 == 1):
            truth = reference(queries, stored)
            asked: list[Any] = [allowed]
            if allowed is not None:
                truth[:, ~allowed] = -np.inf
                index._segments[0].codes = None
                asked.append(index.chosen(allowed))
                index._segments[0].codes = codes
                asked.append(index.chosen(allowed))
            index._segments[0].codes = codes
            for those in asked:
                np.testing.assert_array_equal(index.search(queries, 5, those)[1], ranked(truth, 5))
            assert [set(hits.tolist()) for _, hits in index.range_search(queries, 0.99, allowed)] == [
                set(np.flatnonzero(row >= 0.99).tolist()) for row in truth
            ]


@pytest.mark.parametrize(("int8", "mixed"), [(True, False), (False, True), (False, False)])
def test_rows_held_together_are_searched_in_blocks(int8: bool, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_PRODUCTS", 1)
    monkeypatch.setattr(rows_module, "_FEWEST_ROWS", 64)
    rows, queries = unit_rows(21, 1000, 32).astype(np.float16), unit_rows(22, 10, 32)
    index = ExactIndex(32)
    index._int8, index._mixed = int8 and int8_products(), mixed and mixed_products(32)
    index.add(np.arange(700), rows[:700])
    index.add(np.arange(700, 1000), rows[700:])
    for segment in index._segments:
        segment.codes = Codes.of(segment.rows)
    mask = np.random.default_rng(0).random(1000) < 0.5
    truth = reference(queries, rows)
    truth[:, ~mask] = -np.inf
    for count in (1, 3, 10):
        np.testing.assert_array_equal(index.search(queries[:count], 20, index.chosen(mask))[1], ranked(truth[:count], 20))


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize(
    ("int8", "mixed", "card"), [(True, False, False), (False, True, False), (False, False, False), (True, False, True)]
)
def test_rows_that_take_no_part_may_be_nearer_than_all_others(
    int8: bool, mixed: bool, card: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a few of them are in the way, which are left out of what is found, or thousands, which are barred first."""
    monkeypatch.setattr(rows_module, "_PRODUCTS", 1)
    monkeypatch.setattr(rows_module, "_FEWEST_ROWS", 4096)
    if card:
        as_if_on_a_card(monkeypatch)
    rng = np.random.default_rng(23)
    middle, away = np.linalg.qr(rng.standard_normal((32, 2)))[0].T
    queries = renormalise(middle + 0.02 * rng.standard_normal((count, 32)))
    near = renormalise(middle + 0.1 * rng.standard_normal((9000, 32)))
    far = renormalise(0.3 * middle + away + 0.1 * rng.standard_normal((11_000, 32)))
    rows = np.concatenate([near, far])[rng.permutation(20_000)].astype(np.float16)
    index = ExactIndex(32)
    index._int8, index._mixed = int8 and int8_products(), mixed and mixed_products(32)
    index.add(np.arange(20_000), rows)
    index._segments[0].codes = Codes.of(rows)
    truth = reference(queries, rows)
    order = np.argsort(-truth.mean(axis=0))
    for barred in (order[:30], order[:5500]):
        allowed = np.ones(20_000, bool)
        allowed[barred] = False
        right = np.where(allowed, truth, -np.inf)
        np.testing.assert_array_equal(index.search(queries, 10, allowed)[1], ranked(right, 10))
        least = float(np.sort(right, axis=None)[-50])
        for found, row in zip(index.range_search(queries, least, allowed), right, strict=True):
            assert found[1].tolist() == sorted(np.flatnonzero(row >= least), key=lambda at: (-row[at], at))


def test_ten_thousand_equal_rows_are_ordered_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.repeat(unit_rows(3, 1, 32).astype(np.float16), 10_000, axis=0)
    others = unit_rows(4, 500, 32).astype(np.float16)
    index = ExactIndex(32)
    index.add(np.arange(10_500), np.concatenate([others[:250], rows, others[250:]]))
    query = renormalise(rows[:1])
    for most in (2_000_000, 500):  # settled at the end, and block by block
        monkeypatch.setattr(exact_module, "_MOST_CANDIDATES", most)
        scores, keys = index.search(query, 50)
        assert keys[0].tolist() == list(range(250, 300))
        assert len(set(scores[0].tolist())) == 1


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF8,SQ8"])
def test_faiss_finds_for_many_queries_what_it_finds_for_each(factory: str) -> None:
    import faiss

    rows, queries = unit_rows(11, 2000, 24).astype(np.float16), unit_rows(12, 501, 24)
    index = FaissIndex(24, factory)
    index.add(np.arange(2000), rows)
    threads = faiss.omp_get_max_threads()
    found = index.positions(queries, 10, 2)
    assert found.shape == (501, 20)
    np.testing.assert_array_equal(found, np.concatenate([index.positions(query[None], 10, 2) for query in queries]))
    assert faiss.omp_get_max_threads() == threads


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("int8", [True, False])
def test_an_index_from_files_and_newer_rows_are_the_reference_to_few_queries_and_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, int8: bool, mixed: bool
) -> None:
    """What each processor writes and reads; the last rows of a join are few queries."""
    monkeypatch.setattr(rows_module, "int8_products", lambda: int8 and int8_products())
    monkeypatch.setattr(rows_module, "mixed_products", lambda dim: mixed and mixed_products(dim))
    rows = unit_rows(6, 515, 32, clusters=60, spread=0.05).astype(np.float16)
    made = ExactIndex(32)
    made.add(np.arange(500), rows[:500])
    made.save(tmp_path)
    assert (tmp_path / "codes.npy").exists() == ((int8 and int8_products()) or (mixed and mixed_products(32)))
    index = ExactIndex.load(tmp_path)
    index.add(np.arange(500, 515), rows[500:])
    truth = reference(renormalise(rows), rows)
    for queries in (1, 3, 4, 5, 100):
        np.testing.assert_array_equal(index.search(renormalise(rows[:queries]), 12)[1], ranked(truth[:queries], 12))
    pairs = [(int(a), int(b)) for later, earlier, *_ in index.join(0.9) for a, b in zip(later, earlier, strict=True)]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == set(zip(*map(np.ndarray.tolist, np.nonzero(np.tril(truth, -1) >= 0.9)), strict=True))
    assert any(a >= 512 for a, _ in pairs)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_rows_that_take_no_part_keep_no_other_out(spread: float, int8: bool, mixed: bool) -> None:
    """As many rows as are asked for, nearly equal and some of them barred, beside a segment with what is left of the answer."""
    others = unit_rows(0, 100, 32).astype(np.float16)
    alike = unit_rows(1, 12, 32, clusters=1, spread=spread).astype(np.float16)
    query = renormalise(alike[:1])
    for rows, barred in (([others, alike], slice(100, 103)), ([alike, others], slice(0, 3))):
        index = ExactIndex(32)
        index._int8, index._mixed = int8 and int8_products(), mixed and mixed_products(32)
        start = 0
        for part in rows:
            index.add(np.arange(start, start + len(part)), part)
            start += len(part)
        index._segments[0].codes = Codes.of(rows[0])
        allowed = np.ones(112, bool)
        allowed[barred] = False
        truth = reference(query, np.concatenate(rows))
        truth[:, ~allowed] = -np.inf
        for k in (5, 9, 10, 11, 12, 40):
            np.testing.assert_array_equal(index.search(query, k, allowed)[1], ranked(truth, k), err_msg=str(k))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-3, 0.03, 0.3]), st.integers(1, 3), st.integers(1, 8), st.booleans())
def test_the_best_that_fit_are_told_only_where_they_are_certain(seed: int, spread: float, k: int, among: int, hard: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = unit_rows(seed, 500, 32, clusters=1, spread=spread).astype(np.float16)
    queries = unit_rows(seed, 2, 32, clusters=1, spread=spread)
    fitting = rng.random(500) < rng.choice([0.3, 0.6, 0.9])
    if hard:  # those that fit begin about where what may belong to the best ends
        fitting = np.ones(500, bool)
        fitting[ranked(reference(queries[:1], rows), among + int(rng.integers(0, 60)))] = False
        queries = queries[:1]
    index = ExactIndex(32)
    index.add(np.arange(500), rows)
    found = index.search_fitting(queries, k, lambda positions: fitting[positions], among)
    scores = reference(queries, rows)
    scores[:, ~fitting] = -np.inf
    if found is not None:
        assert found[1].tolist() == ranked(scores, k).tolist()
        assert found[0] == pytest.approx(np.take_along_axis(scores, found[1], axis=1), abs=1e-12)
    best = ranked(reference(queries, rows), among)
    if (fitting[best].sum(axis=1) >= k).all():
        assert found is not None


@pytest.mark.parametrize("before", [0, 20])
def test_ties_that_were_settled_are_not_sure_to_be_the_best(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal rows, more than are held, the first that fit are wanted, and the first are all that is left."""
    monkeypatch.setattr(exact_module, "_MOST_CANDIDATES", 5000)
    monkeypatch.setattr(rows_module, "_PRODUCTS", 1)
    row = unit_rows(0, 1, 32)
    index = ExactIndex(32)
    index.add(np.arange(9000), np.repeat(row, 9000, axis=0).astype(np.float16))
    fitting = np.arange(9000) > 30
    fitting[:before:2] = True
    found = index.search_fitting(row, 3, lambda positions: fitting[positions], 25)
    assert found is None or found[1].tolist() == [np.flatnonzero(fitting)[:3].tolist()]


def test_one_question_with_many_ties_needs_little_memory() -> None:
    rows = np.repeat(unit_rows(3, 1, 64).astype(np.float16), 50_000, axis=0)
    index = ExactIndex(64)
    index.add(np.arange(len(rows)), rows)
    query = renormalise(rows[:1])
    index.search(query, 10)
    tracemalloc.start()
    assert index.search(query, 10)[1].tolist() == [list(range(10))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # all of them unpacked at once, to float64 and back, are 90 MB


def test_the_size_of_an_index_is_that_of_its_file(tmp_path: Path) -> None:
    rows = unit_rows(0, 3000, 16).astype(np.float16)
    for factory in ("Flat", "HNSW16", "IVF16,PQ4x4fs,Refine(SQfp16)"):
        index = FaissIndex(16, factory)
        index.add(np.arange(3000), rows)
        index.save(tmp_path)
        assert index.bytes == (tmp_path / FaissIndex.FILES[0]).stat().st_size


def test_an_index_that_takes_no_rows_says_so() -> None:
    index = FaissIndex(16, "IDMap,Flat")
    rows = unit_rows(0, 100, 16).astype(np.float16)
    assert index.seconds(rows) == 0
    with pytest.raises(CollectionError, match="IndexIDMap"):
        index.add(np.arange(100), rows)


def test_a_matrix_that_is_mapped_has_its_place_on_the_disk(tmp_path: Path) -> None:
    matrix = rows_module.mapped(tmp_path / "m.npy", np.float16, (1000, 64))
    assert (tmp_path / "m.npy").stat().st_blocks * 512 >= matrix.nbytes
    matrix[:] = 3
    matrix.flush()
    assert (np.load(tmp_path / "m.npy") == 3).all()


def test_a_card_is_given_the_shapes_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 16 queries, and whole eights of components and rows."""
    multiply, shapes = torch._int_mm, []

    def watched(left: torch.Tensor, right: torch.Tensor, **out: Any) -> torch.Tensor:
        shapes.append((len(left) > 16, left.shape[1] % 8, right.shape[1] % 8))
        return multiply(left, right, **out)

    rows, queries = unit_rows(5, 301, 16).astype(np.float16), unit_rows(6, 40, 16)
    index = ExactIndex(16)
    index.add(np.arange(301), rows)
    index._int8 = index._mixed = False
    as_if_on_a_card(monkeypatch)
    monkeypatch.setattr(rows_module, "CARD_QUERIES", 32)
    monkeypatch.setattr(torch, "_int_mm", watched)
    for allowed in (None, np.arange(301) % 7 == 0):
        truth = reference(queries, rows)
        if allowed is not None:
            truth[:, ~allowed] = -np.inf
        np.testing.assert_array_equal(index.search(queries, 5, allowed)[1], ranked(truth, 5))
    index.search(queries[:31], 5)  # too few for a card
    assert set(shapes) == ({(True, 0, 0)} if int8_products() else set())


def test_a_card_without_memory_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit_rows(5, 300, 16, clusters=40, spread=0.1).astype(np.float16)
    truth = reference(renormalise(rows), rows)
    pairs = set(zip(*map(np.ndarray.tolist, np.nonzero(np.tril(truth, -1) >= 0.9)), strict=True))
    for asked in ("search", "join"):
        as_if_on_a_card(monkeypatch)
        monkeypatch.setattr(rows_module.QueryCodes, "multiply_there", _full)
        index = ExactIndex(16)
        index.add(np.arange(300), rows)
        with pytest.warns(EmbellWarning, match="card has no memory left") if int8_products() else nullcontext():
            if asked == "search":
                np.testing.assert_array_equal(index.search(renormalise(rows), 7)[1], ranked(truth, 7))
            else:
                found = index.join(0.9)
                assert {(int(a), int(b)) for later, earlier, *_ in found for a, b in zip(later, earlier, strict=True)} == pairs
        np.testing.assert_array_equal(index.search(renormalise(rows), 7)[1], ranked(truth, 7))  # and is not asked again


def _full(*args: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize("most", [2_000_000, 100])
@pytest.mark.parametrize("threshold", [0.2, 0.9, 0.97])
def test_pairs_are_all_pairs_at_or_above_the_threshold_once(
    threshold: float, most: int, card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if card:
        as_if_on_a_card(monkeypatch)
    monkeypatch.setattr(exact_module, "QUERIES", 37)
    monkeypatch.setattr(rows_module, "_FEWEST_ROWS", 50)
    monkeypatch.setattr(rows_module, "_PRODUCTS", 50)
    monkeypatch.setattr(exact_module, "_MOST_CANDIDATES", most)
    rows = unit_rows(5, 400, 16, clusters=40, spread=0.1).astype(np.float16)
    index = ExactIndex(16)
    index.add(np.arange(150), rows[:150])
    index.add(np.arange(150, 400), rows[150:])
    found = {
        (int(one), int(other)): score
        for later, earlier, scores, _ in index.join(threshold)
        for one, other, score in zip(later, earlier, scores, strict=True)
    }
    truth = reference(renormalise(rows), rows)
    expected = {(i, j) for i in range(400) for j in range(i) if truth[i, j] >= threshold}
    assert set(found) == expected
    assert expected
    for (i, j), score in found.items():
        assert abs(score - truth[i, j]) < 1e-12


@pytest.mark.parametrize("factory", ["HNSW16", "IVF8,Flat", "IVF8,SQ8", "PQ16x4fs"])
def test_faiss_factories_find_most_neighbours(factory: str, tmp_path: Path) -> None:
    rows, queries = unit_rows(6, 4000, 32, clusters=60).astype(np.float16), unit_rows(7, 50, 32, clusters=60)
    index = FaissIndex(32, factory)
    index.add(np.arange(4000), rows)
    index.save(tmp_path)
    _, found = FaissIndex.load(tmp_path).search(queries, 50)
    best = ranked(reference(queries, rows), 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), best.tolist(), strict=True)]) > 0.6


def test_kinds_are_checked_by_name() -> None:
    assert check_kind("exact") == "exact"
    assert check_kind("faiss:HNSW32") == "faiss:HNSW32"
    for wrong in ("exakt", "faiss:", "faiss:NoSuchThing9", "lance:", "lancet"):
        with pytest.raises(UsageError):
            check_kind(wrong)


def test_without_faiss_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'embell\[cpu\]'"):
        check_kind("faiss:Flat")
