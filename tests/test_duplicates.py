"""Near-duplicates of a list of texts, against brute force over sets of words and float64 products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embell import UsageError
from embell.engine import pair_search, search_parts
from embell.engine.duplicates import Duplicates, chosen_thresholds
from embell.engine.lexical import FEWEST, lexical_pairs
from embell.engine.normalise import normalise, text_mark
from embell.engine.pair_search import find_pairs
from embell.engine.text_duplicates import deduplicate
from embell.engine.threshold_choice import Decision
from embell.indexers import coded_rows, exact
from embell.indexers.codes import renormalise
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def every_lexical_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """With these bands no pair is missed: MinHash as it is used finds 99 of 100 pairs right at the threshold."""
    monkeypatch.setattr(pair_search, "lexical_pairs", partial(lexical_pairs, permutations=512, recall=1 - 1e-9))


# Brute force.


def words(text: str) -> set[str]:
    return set(normalise(text).split())


def cosines(vectors: Array) -> Array:
    """Those of the rows as they are stored: float16, renormalised."""
    rows = np.asarray(vectors, np.float32)
    stored = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
    stored /= np.sqrt((stored**2).sum(axis=1, keepdims=True))
    return np.einsum("id,jd->ij", stored, stored)


class Truth(NamedTuple):
    """What must come out: the rows that are kept, and for each dropped one the kept row, the score and the kinds of such a pair."""

    kept: list[int]
    dropped: dict[int, tuple[int, float, set[str]]]


def scores_of(
    one: int, other: int, texts: Sequence[str], near: Array | None, thresholds: Mapping[str, float]
) -> dict[str, float]:
    """The scores of a pair of different texts, by kind, that reach the thresholds; for overlap too."""
    left, right = words(texts[one]), words(texts[other])
    shared = len(left & right)
    found = {"lexical": shared / max(len(left | right), 1)}
    containment = shared / max(min(len(left), len(right)), 1)
    if min(len(left), len(right)) >= FEWEST:
        found["contained"] = containment
    if near is not None and containment >= thresholds.get("overlap", 0.0):
        found["semantic"] = float(near[one, other])
    return {kind: score for kind, score in found.items() if kind in thresholds and score >= thresholds[kind]}


def truth(
    texts: Sequence[str],
    thresholds: Mapping[str, float],
    vectors: Array | None = None,
    keep: str = "first",
    groups: Sequence[Any] | None = None,
    values: Sequence[Any] = (),
    split: int = 0,
) -> Truth:
    """The greedy walk over all pairs. Copies of a text go with the preferred one; of two sides, the first `split` rows all stay."""
    n = len(texts)
    near = None if vectors is None else cosines(vectors)
    names = [(normalise(text), None if groups is None else groups[at]) for at, text in enumerate(texts)]
    if split:  # rows of the same side are not compared, copies neither
        names = [(name, None if at < split or name in names[:split] else at) for at, name in enumerate(names)]
    texts_at = {name: at for at, name in reversed([*enumerate(names)])}  # the first row of each
    pairs = {}
    for later in texts_at.values():
        for earlier in texts_at.values():
            apart = groups is not None and groups[earlier] != groups[later]
            if earlier < later and not apart and (not split or earlier < split <= later):
                found = scores_of(earlier, later, texts, near, thresholds)
                if found:
                    pairs[earlier, later] = pairs[later, earlier] = found
    partners = {at: sum(sum(found.values()) for (one, _), found in pairs.items() if one == at) for at in texts_at.values()}
    order = {
        "first": lambda at: 0,
        "last": lambda at: -at,
        "longest": lambda at: -len(texts[at]),
        "shortest": lambda at: len(texts[at]),
        "central": lambda at: -round(partners[texts_at[names[at]]], 9),
        "n:max": lambda at: math.inf if values[at] is None else -values[at],
        "n:min": lambda at: math.inf if values[at] is None else values[at],
    }[keep]
    kept: list[int] = []
    dropped: dict[int, tuple[int, float, set[str]]] = {}
    leader: dict[Any, int] = {}
    for row in sorted(range(n), key=lambda at: (at >= split, order(at), at)):
        name, text = names[row], texts_at[names[row]]
        first = leader.setdefault(name, row)
        if first != row:  # where its text went
            dropped[row] = dropped.get(first, (first, 1.0, {"exact"}))
            continue
        best = max(
            (
                (max(found.values()), -place, by)
                for place, by in enumerate(kept)
                if (found := pairs.get((text, texts_at[names[by]])))
            ),
            default=None,
        )
        if best is None:
            kept.append(row)
        else:
            found = pairs[text, texts_at[names[best[2]]]]
            dropped[row] = (best[2], best[0], {kind for kind, score in found.items() if score >= best[0] - 1e-6})
    return Truth(sorted(kept), dropped)


def check(found: Duplicates, expected: Truth, split: int = 0) -> None:
    """The result is what was expected; ids are the places of the texts. `split` texts come before them in what was expected."""

    def place(name: str) -> int:
        return int(name.removeprefix("against#")) if name.startswith("against#") else int(name) + split

    assert [place(name) for name in found.kept] == [row for row in expected.kept if row >= split]
    assert [place(row.id) for row in found.dropped] == sorted(row for row in expected.dropped if row >= split)
    for row in found.dropped:
        by, score, kinds = expected.dropped[place(row.id)]
        assert place(row.kept_id) == by
        assert row.score == pytest.approx(score, abs=1e-6)
        assert row.kind in kinds
        assert row.via is None
    assert found.kept_positions.tolist() == [int(name) for name in found.kept]
    agrees(found)


def agrees(found: Duplicates) -> None:
    """Its kept and dropped rows, pairs, groups and table say the same."""
    dropped = {row.id: row for row in found.dropped}
    table = found.to_arrow()
    assert table.column_names == ["id", "kept_id", "score", "kind", "via"]
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (row.id, row.kept_id, row.score, row.kind, row.via) for row in found.dropped
    ]
    assert not dropped.keys() & set(found.kept)
    assert dropped.keys() | set(found.kept) | {name for name in found.rows.ids if name.startswith("against#")} == set(
        found.rows.ids
    )
    assert sorted(name for group in found.groups for name in group[1:]) == sorted(dropped)
    for group in found.groups:
        assert {dropped[name].kept_id for name in group[1:]} == {group[0]}
    assert found.pairs.column_names == ["id_a", "id_b", "score", "kind"]
    at = {name: place for place, name in enumerate(found.rows.ids)}
    listed = [(at[row["id_a"]], at[row["id_b"]], row["score"], row["kind"]) for row in found.pairs.to_pylist()]
    assert [row[1::-1] for row in listed] == sorted(row[1::-1] for row in listed)
    assert len({(*row[:2], row[3]) for row in listed}) == len(listed)
    for first, second, score, kind in listed:
        assert first < second
        assert score >= min(found.thresholds[kind], 1 - 2**-22)
    original = found.found.original.tolist()
    said = {(*row[:2], row[3]): row[2] for row in listed}
    for row in found.dropped:
        if row.kind == "exact":
            assert original[at[row.id]] == original[at[row.kept_id]]
        else:
            pair = sorted(original[at[name]] for name in (row.id, row.via or row.kept_id))
            assert said[(*pair, row.kind)] == row.score


# Texts, vectors and thresholds.

KINDS = st.sampled_from(
    [
        {"exact": 1.0},
        {"exact": 1.0, "lexical": 0.6},
        {"exact": 1.0, "contained": 0.8},
        {"exact": 1.0, "semantic": 0.8},
        {"exact": 1.0, "semantic": 0.7, "overlap": 0.5},
        {"exact": 1.0, "lexical": 0.75, "contained": 0.9, "semantic": 0.9},
        {"exact": 1.0, "lexical": 0.7, "semantic": 0.6, "overlap": 0.6},
    ]
)
POLICIES = ["first", "last", "longest", "shortest", "central", "n:max", "n:min"]


class Corpus(NamedTuple):
    """Texts with many near-duplicates and copies; copies have the same vector, whatever their case and spaces."""

    texts: list[str]
    vectors: Array
    values: list[int | None]
    groups: list[str]


def corpus(seed: int, n: int, dim: int = 12) -> Corpus:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((4, dim))
    texts: list[str] = []
    rows: dict[str, Array] = {}
    for _ in range(n):
        if texts and rng.random() < 0.25:
            text = str(rng.choice(texts))
            text = str(rng.choice([text, text.upper(), f"  {text} ", text.replace(" ", " \t")]))
        elif texts and rng.random() < 0.5:
            some = normalise(str(rng.choice(texts))).split()
            some = some[: rng.integers(1, len(some) + 1)] + [f"w{word}" for word in rng.integers(0, 20, rng.integers(0, 3))]
            text = " ".join(some)
        else:
            text = " ".join(f"w{word}" for word in rng.integers(0, 20, rng.integers(1, 12)))
        texts.append(text)
        rows.setdefault(normalise(text), centres[rng.integers(4)] + rng.uniform(0.1, 0.6) * rng.standard_normal(dim))
    vectors = np.array([rows[normalise(text)] for text in texts], np.float32).reshape(n, dim)
    values = [None if rng.random() < 0.2 else int(rng.integers(5)) for _ in range(n)]
    return Corpus(texts, vectors, values, [str(group) for group in rng.integers(0, 3, n)])


def clear(vectors: Array, threshold: float) -> bool:
    """No cosine is so near to the threshold that rounding decides."""
    return bool((np.abs(cosines(vectors) - threshold) > 1e-6).all())


def options(thresholds: Mapping[str, float]) -> dict[str, Any]:
    given = {"threshold" if kind == "semantic" else kind: value for kind, value in thresholds.items() if kind != "exact"}
    return {**given, "kinds": [kind for kind in thresholds if kind != "overlap"]}


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), KINDS, st.sampled_from(POLICIES), st.booleans())
@settings(max_examples=50)
def test_every_kind_and_policy_is_brute_forces(seed: int, n: int, thresholds: dict[str, float], keep: str, grouped: bool) -> None:
    texts, vectors, values, groups = corpus(seed, n)
    assume(clear(vectors, thresholds.get("semantic", 2.0)))
    found = deduplicate(
        texts, vectors=vectors, keep=keep, values={"n": values}, group_by=groups if grouped else None, **options(thresholds)
    )
    assert found.thresholds == thresholds
    assert found.capped == 0
    check(found, truth(texts, thresholds, vectors, keep, groups if grouped else None, values))


@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.integers(1, 25), KINDS, st.sampled_from(POLICIES))
@settings(max_examples=40)
def test_against_others_only_the_two_sides_are_compared(
    seed: int, n: int, split: int, thresholds: dict[str, float], keep: str
) -> None:
    texts, vectors, values, _ = corpus(seed, split + n)
    assume(clear(vectors, thresholds.get("semantic", 2.0)))
    found = deduplicate(
        texts[split:], vectors=vectors[split:], against=texts[:split], against_vectors=vectors[:split],
        keep=keep if keep != "central" else "first", values={"n": values[split:]}, **options(thresholds),
    )  # fmt: skip
    known = [None] * split + values[split:]
    check(found, truth(texts, thresholds, vectors, keep if keep != "central" else "first", None, known, split), split)
    sides = {
        tuple(name.startswith("against#") for name in row.values()) for row in found.pairs.select(["id_a", "id_b"]).to_pylist()
    }
    assert sides <= {(True, False)}


def test_against_leaves_copies_of_one_side_alone() -> None:
    found = deduplicate(["a b c", "A b c", "d e f"], against=["d e f", "D E F", "x"], kinds=["exact"])
    assert found.kept == ["0", "1"]
    assert [(row.id, row.kept_id) for row in found.dropped] == [("2", "against#0")]
    assert found.kept_positions.tolist() == [0, 1]


def test_against_nothing_nothing_is_dropped() -> None:
    texts = ["a b c", "A b c", "a b c d e f g h i j", "a b c d e f g h i k"]
    found = deduplicate(texts, against=[], kinds=["exact", "lexical"], lexical=0.5)
    assert (found.kept, found.dropped) == (["0", "1", "2", "3"], [])
    found = deduplicate([], vectors=np.empty((0, 4)), against=texts, against_vectors=np.ones((4, 4)), threshold=0.9)
    assert (found.kept, found.dropped) == ([], [])


def test_against_others_complete_linkage_drops_what_is_there() -> None:
    # Rows of one side are no pairs of each other, so complete linkage could group only one of them with the reference.
    near = [f"a b c d e f g {word}" for word in "xyz"]
    try:
        found = deduplicate(near, against=["a b c d e f g h"], kinds=["lexical"], lexical=0.7, rule="complete")
    except UsageError:
        return
    assert [row.kept_id for row in found.dropped] == ["against#0"] * 3


@given(st.integers(0, 2**32 - 1), KINDS, st.sampled_from(POLICIES))
@settings(max_examples=20)
def test_deciding_again_is_a_new_search(seed: int, thresholds: dict[str, float], keep: str) -> None:
    texts, vectors, values, _ = corpus(seed, 30)
    higher = {kind: round(1 - (1 - value) * 0.6, 3) for kind, value in thresholds.items()}
    assume(clear(vectors, thresholds.get("semantic", 2.0)) and clear(vectors, higher.get("semantic", 2.0)))
    first = deduplicate(texts, vectors=vectors, values={"n": values}, **options(thresholds))
    again = first.rethreshold(thresholds=higher, keep=keep)
    fresh = deduplicate(texts, vectors=vectors, values={"n": values}, keep=keep, **options(higher))
    assert (again.thresholds, again.keep, again.rule) == (higher, keep, "cover")
    check(again, truth(texts, higher, vectors, keep, None, values))
    assert (again.kept, again.dropped) == (fresh.kept, fresh.dropped)
    assert again.pairs.sort_by("score").equals(fresh.pairs.sort_by("score")) or keep not in ("first", "central")
    assert first.rethreshold().dropped == first.dropped
    for rule in ("components", "complete"):
        agrees(again.rethreshold(rule=rule))


def test_deciding_again_is_refused_where_pairs_were_not_looked_for() -> None:
    texts, vectors, _, _ = corpus(0, 20)
    found = deduplicate(texts, vectors=vectors, threshold=0.8, lexical=0.7)
    assert found.rethreshold(0.9).thresholds == {"exact": 1.0, "lexical": 0.7, "semantic": 0.9}
    for wanted, said in (
        ({"threshold": 0.79}, r"the semantic threshold 0\.79 is below 0\.8, the floor .*; look for duplicates anew"),
        ({"thresholds": {"lexical": 0.6}}, r"the lexical threshold 0\.6 is below 0\.7, the floor"),
        ({"thresholds": {"contained": 0.9}}, "contained duplicates were not looked for"),
        ({"thresholds": {"overlap": 0.9}}, "overlap duplicates were not looked for"),
        ({"threshold": 1.01}, "the semantic threshold must lie above 0 and be at most 1"),
        ({"threshold": math.nan}, "the semantic threshold must lie above 0 and be at most 1"),
        ({"rule": "any"}, "rule 'any' is not known"),
        ({"keep": "any"}, "keep 'any' is not known"),
        ({"keep": "n:max"}, "there is no field 'n'"),
    ):
        with pytest.raises(UsageError, match=said):
            found.rethreshold(**wanted)  # type: ignore[arg-type]
    assert found.rethreshold(keep="longest", rule="components").keep == "longest"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_the_order_of_the_texts_does_not_matter_to_what_they_are_kept_by(seed: int) -> None:
    texts, vectors, _, _ = corpus(seed, 25)
    texts = [text + " " * (200 + at - len(text)) for at, text in enumerate(texts)]  # all lengths differ
    kept = []
    for order in (np.arange(25), np.random.default_rng(seed).permutation(25)):
        found = deduplicate(
            [texts[at] for at in order],
            vectors=vectors[order],
            threshold=0.8,
            lexical=0.6,
            kinds=["lexical", "semantic"],
            keep="longest",
        )
        kept.append({texts[order[at]] for at in found.kept_positions})
    assert kept[0] == kept[1]


def test_rules_differ_on_a_chain() -> None:
    texts = ["a b c d e f g h", "b c d e f g h i", "c d e f g h i j", "x y z", "X  Y z"]  # neighbours: 7/9, ends: 6/10
    by = {rule: deduplicate(texts, kinds=["lexical"], lexical=0.7, rule=rule) for rule in ("cover", "components", "complete")}
    assert by["cover"].kept == ["0", "2", "3"]
    assert by["components"].kept == ["0", "3"]
    assert [(row.id, row.kept_id, row.via) for row in by["components"].dropped] == [
        ("1", "0", None),
        ("2", "0", "1"),
        ("4", "3", None),
    ]
    assert by["components"].groups == [["0", "1", "2"], ["3", "4"]]
    assert len(by["complete"].kept) == 3
    for found in by.values():
        agrees(found)


# Rows with too many partners.


def crowd(seed: int, n: int = 150, dim: int = 8) -> tuple[list[str], Array]:
    """Rows of a few wide clouds, so that many rows have many partners that are not partners of each other."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3, dim))[rng.integers(0, 3, n)] * 1.6 + rng.standard_normal((n, dim)) * 0.7
    return [f"t{at} only" for at in range(n)], rows.astype(np.float32)


@pytest.fixture
def few_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_search, "PARTNERS", 6)
    monkeypatch.setattr(exact, "FEW", 2)


def no_two_kept_are_near(found: Duplicates, vectors: Array, threshold: float) -> None:
    near = cosines(vectors)[np.ix_(found.kept_positions, found.kept_positions)]
    np.fill_diagonal(near, -1)
    assert near.max(initial=-1) < threshold
    scores = cosines(vectors)
    for row in found.dropped:
        assert scores[int(row.id), int(row.kept_id)] >= threshold
        assert row.score == pytest.approx(scores[int(row.id), int(row.kept_id)], abs=1e-6)


@pytest.mark.usefixtures("few_partners")
@pytest.mark.parametrize("keep", ["first", "last", "longest", "n:max"])
@pytest.mark.parametrize("seed", range(3))
def test_capped_rows_are_kept_only_if_no_kept_row_is_near(seed: int, keep: str) -> None:
    texts, vectors = crowd(seed)
    texts = [text + " x" * (at * 7 % 150) for at, text in enumerate(texts)]
    values = [at * 11 % 150 for at in range(150)]
    found = deduplicate(texts, vectors=vectors, threshold=0.8, keep=keep, values={"n": values})
    assert found.capped > 20
    no_two_kept_are_near(found, vectors, 0.8)
    assert set(found.kept) == {str(row) for row in truth(texts, {"semantic": 0.8}, vectors, keep, None, values).kept}
    agrees(found)


@pytest.mark.usefixtures("few_partners")
@pytest.mark.parametrize("keep", ["first", "last"])
def test_capped_rows_of_groups_are_kept_only_if_no_kept_row_of_the_group_is_near(keep: str) -> None:
    for seed in range(3):
        texts, vectors = crowd(seed)
        groups = [at % 2 for at in range(150)]
        found = deduplicate(texts, vectors=vectors, threshold=0.8, keep=keep, group_by=groups)
        assert found.capped > 10
        assert set(found.kept) == {str(row) for row in truth(texts, {"semantic": 0.8}, vectors, keep, groups).kept}


@pytest.mark.usefixtures("few_partners")
def test_capped_rows_whose_first_partners_share_no_words_find_those_that_do() -> None:
    # All vectors are near each other; each text shares its words with one other only, far behind.
    rng = np.random.default_rng(0)
    vectors = (np.ones((60, 8)) + 0.05 * rng.standard_normal((60, 8))).astype(np.float32)
    texts = [f"a{at % 30} b{at % 30} c{at % 30} d{at}" for at in range(60)]
    found = deduplicate(texts, vectors=vectors, threshold=0.8, overlap=0.75, kinds=["semantic"])
    assert found.capped > 20
    assert found.kept == [str(at) for at in range(30)]
    leaked = deduplicate(
        texts[30:], vectors=vectors[30:], against=texts[:30], against_vectors=vectors[:30],
        threshold=0.8, overlap=0.75, kinds=["semantic"],
    )  # fmt: skip
    assert leaked.kept == []


@pytest.mark.usefixtures("few_partners")
@pytest.mark.parametrize("options", [{"kinds": ["lexical"], "lexical": 0.3}, {"kinds": ["contained"], "contained": 0.45}])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_capped_row_is_dropped_for_a_kept_row_far_behind_the_first_it_shares_words_with(
    options: dict[str, Any], grouped: bool
) -> None:
    def several(letter: str) -> str:
        return " ".join(f"{letter}{at}" for at in range(8))

    # The last row shares words with forty that the first one drops, and then with one that is kept.
    between = [f"{several('m')} {several('x')} u{at}" for at in range(40)]
    texts = [f"{several('a')} {several('m')}", *between, f"{several('b')} {several('c')}", f"{several('x')} {several('b')}"]
    more: dict[str, Any] = {"group_by": ["one"] * len(texts)} if grouped else {}
    found = deduplicate(texts, **options, **more)
    assert found.capped > 0
    assert found.kept == ["0", "41"]
    assert found.dropped[-1].kept_id == "41"
    leaked = deduplicate(texts[-1:], against=texts[:-1], **options)
    assert leaked.kept == []


@pytest.mark.parametrize("kinds", [["lexical"], ["semantic"]])
def test_the_list_stays_short_where_capped_rows_lose_their_partners(kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A form in two variants: forty rows resemble both, and what those drop would otherwise be paired with each other."""
    monkeypatch.setattr(pair_search, "PARTNERS", 20)
    monkeypatch.setattr(pair_search, "FEW", 3)
    words = [f"w{at}" for at in range(20)]
    first, between, other = " ".join(words), " ".join(["x", *words[1:]]), " ".join(["x", *words[2:]])
    rng = np.random.default_rng(0)
    texts = [
        first,
        *(f"{between} {' '.join(rng.permutation(words[1:]))}" for _ in range(40)),
        *(f"{other} y{at}" for at in range(400)),
    ]
    angles = np.concatenate([[0], 0.4 + 0.001 * np.arange(40), 0.8 + 0.0001 * np.arange(400)])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    chosen: dict[str, Any] = {"lexical": 0.85} if kinds == ["lexical"] else {"threshold": float(np.cos(0.5))}
    found = deduplicate(texts, vectors=vectors, kinds=kinds, **chosen)
    assert found.capped > 300
    assert len(found.kept) == 2
    assert found.pairs.num_rows < 40 * len(texts)


@pytest.mark.usefixtures("few_partners")
@pytest.mark.parametrize("keep", ["first", "last"])
def test_deciding_again_from_capped_rows_is_refused_or_right(keep: str) -> None:
    for seed in range(3):
        texts, vectors = crowd(seed)
        found = deduplicate(texts, vectors=vectors, threshold=0.8, keep=keep)
        for other in ("first", "last", "longest", "shortest"):
            for threshold in (0.8, 0.9):
                try:
                    again = found.rethreshold(threshold, keep=other)
                except UsageError:
                    continue
                no_two_kept_are_near(again, vectors, threshold)


@pytest.mark.usefixtures("few_partners")
def test_deciding_again_from_capped_rows_with_fewer_kinds_is_refused_or_right() -> None:
    for seed in range(6):
        texts, vectors = crowd(seed)
        # Words drop half of the rows, those that others are linked to among them.
        texts = [f"{'abcdefghij'[at % 10]} same words for all of ten" for at, _ in enumerate(texts)]
        texts = [f"{text} {at}" for at, text in enumerate(texts)]
        found = deduplicate(texts, vectors=vectors, threshold=0.8, lexical=0.7, kinds=["lexical", "semantic"])
        less = {kind: value for kind, value in found.thresholds.items() if kind != "lexical"}
        if not found.found.lacks(less, "first"):
            from embell.engine.duplicates import judge

            no_two_kept_are_near(judge(found.found, found.rows, less), vectors, 0.8)


def test_texts_with_very_many_near_texts_are_linked_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_search, "PARTNERS", 5)
    rng = np.random.default_rng(0)
    rows = np.ones((100, 8)) + 0.01 * rng.standard_normal((100, 8))
    found = deduplicate([f"t{n}" for n in range(100)], vectors=rows, threshold=0.9)
    assert found.kept == ["0"]
    assert {row.kept_id for row in found.dropped} == {"0"}
    assert found.capped == 94
    assert found.pairs.num_rows < 100 * 40
    agrees(found)
    same = [f"{'same words all over again and again so that they are many ' * 2} {n}" for n in range(100)]
    found = deduplicate(same, kinds=["lexical"], lexical=0.7)
    assert found.kept == ["0"]
    assert found.capped == 94


@pytest.mark.usefixtures("few_partners")
def test_a_capped_row_has_links_though_many_rows_before_those_nearly_reach_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_FEWEST_ROWS", 64), ("_MOST_ROWS", 64), ("_PRODUCTS", 1)):
        monkeypatch.setattr(coded_rows, name, value)
    rng = np.random.default_rng(0)

    def around(cosine: float, count: int) -> Array:
        rows = rng.standard_normal((count, 32))
        rows[:, 0] = 0
        rows *= np.sqrt(1 - cosine**2) / np.linalg.norm(rows, axis=1, keepdims=True)
        rows[:, 0] = cosine
        return rows

    rows = np.concatenate([around(0.7985, 64), around(0.95, 20), around(0.1, 100), np.eye(32)[:1]])
    index = ExactIndex(32)
    index.add(np.arange(len(rows)), rows.astype(np.float16))
    links, crowded = [], []
    for later, earlier, _, more in index.join(0.8, most=6):
        links += earlier[later == len(rows) - 1].tolist()
        crowded += more.tolist()
    assert len(rows) - 1 in crowded
    assert links == [64, 65]


# How the work is done does not matter.


def small_batches(monkeypatch: pytest.MonkeyPatch, queries: int = 4) -> None:
    for module in (pair_search, exact):
        monkeypatch.setattr(module, "QUERIES", queries)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(found: Duplicates) -> tuple[Any, ...]:
    return found.kept, found.dropped, found.pairs.to_pylist(), found.capped, found.kept_positions.tolist()


MODES: dict[str, dict[str, Any]] = {"plain": {}, "groups": {"group_by": [at * 7 % 3 for at in range(150)]}, "against": {}}


def searched(mode: str, **more: Any) -> Duplicates:
    data = corpus(5, 150)
    if mode == "against":
        return deduplicate(
            data.texts[20:], vectors=data.vectors[20:], against=data.texts[:20], against_vectors=data.vectors[:20],
            threshold=0.7, lexical=0.6, kinds=["lexical", "semantic"], **more,
        )  # fmt: skip
    return deduplicate(
        data.texts, vectors=data.vectors, threshold=0.7, lexical=0.6, kinds=["lexical", "semantic"], **MODES[mode], **more
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", MODES)
def test_the_split_of_the_work_does_not_matter(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = everything(searched(mode))
    assert len(expected[1]) > 20
    add = ExactIndex.add

    def in_pieces(index: ExactIndex, keys: Array, rows: Array) -> None:
        for some in np.array_split(np.arange(len(keys)), 3):
            add(index, keys[some], rows[some])

    for queries in (3, 256):
        for number in (1, 2):
            for pieces in (False, True):
                torch.set_num_threads(number)
                small_batches(monkeypatch, queries)
                monkeypatch.setattr(ExactIndex, "add", in_pieces if pieces else add)
                assert everything(searched(mode)) == expected, (queries, number, pieces)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("at", [1, 2, 5, 9])
@pytest.mark.parametrize("mode", MODES)
def test_a_search_that_is_cut_short_goes_on(mode: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    small_batches(monkeypatch)
    monkeypatch.setattr(search_parts, "SAVED_SECONDS", 0)
    expected = everything(searched(mode))
    parts: list[float] = []
    searched(mode, progress=lambda kind, share: parts.append(share) if kind == "semantic" else None)

    class KilledError(Exception):
        pass

    told: list[tuple[str, float]] = []

    def stop(kind: str, share: float) -> None:
        told.append((kind, share))
        if sum(kind == "semantic" for kind, _ in told) == at:
            raise KilledError

    folder = tmp_path / "unfinished"
    with pytest.raises(KilledError):
        searched(mode, folder=folder, progress=stop)
    assert ("lexical", 1.0) in told
    again: list[tuple[str, float]] = []
    found = searched(mode, folder=folder, progress=lambda kind, share: again.append((kind, share)))
    assert everything(found) == expected
    assert "lexical" not in {kind for kind, _ in again}
    assert len(again) <= len(parts) - at + 1  # only the part that was under way is done once more
    assert again == sorted(again)


def test_what_is_kept_of_a_search_is_of_use_to_the_same_search_only(tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    texts = ["a", "b", "c"]
    one, other = np.eye(3)[[0, 0, 1]], np.eye(3)[[0, 1, 1]]
    for _ in range(2):
        assert deduplicate(texts, vectors=one, threshold=0.9, folder=folder).kept == ["0", "2"]
    assert deduplicate(texts, vectors=other, threshold=0.9, folder=folder).kept == ["0", "1"]
    slanted = np.array([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1]])
    assert deduplicate(texts, vectors=slanted, threshold=0.9, folder=folder).kept == ["0", "1", "2"]
    assert deduplicate(texts, vectors=slanted, threshold=0.7, folder=folder).kept == ["0", "2"]
    assert deduplicate(["a", "a", "c"], vectors=one, threshold=0.9, folder=folder).kept == ["0", "2"]
    assert deduplicate(texts, vectors=one, threshold=0.9, group_by=[0, 1, 1], folder=folder).kept == ["0", "1", "2"]
    assert deduplicate(texts, vectors=one, threshold=0.9, folder=folder, keep="last").kept == ["1", "2"]


def test_new_rows_are_compared_with_known_ones_only_once() -> None:
    for seed in range(4):
        texts, vectors, _, _ = corpus(seed, 80)
        floors = {"exact": 1.0, "lexical": 0.6, "contained": 0.8, "semantic": 0.7}
        marks = [text_mark(text) for text in texts]

        def search(
            n: int, known: Any = None, *, texts: Any = texts, vectors: Any = vectors, marks: Any = marks, floors: Any = floors
        ) -> Any:
            index = ExactIndex(vectors.shape[1])
            index.add(np.arange(n), renormalise(vectors[:n]).astype(np.float16))
            return find_pairs(marks[:n], index, lambda: texts[:n], floors, known=known)

        fresh, grown = search(80), None
        for n in (0, 1, 30, 31, 80, 80):
            grown = search(n, grown)
        assert grown.rows == 80
        np.testing.assert_array_equal(grown.original, fresh.original)
        for name in fresh.pairs.dtype.names:
            np.testing.assert_array_equal(grown.pairs[name], fresh.pairs[name])
        np.testing.assert_array_equal(grown.capped, fresh.capped)


# Edges.


def test_no_text_and_one_text() -> None:
    for more in ({}, {"rule": "components"}, {"rule": "complete"}, {"keep": "last"}, {"keep": "central"}, {"group_by": []}):
        found = deduplicate([], vectors=np.empty((0, 4), np.float32), **more)  # type: ignore[arg-type]
        assert (found.kept, found.dropped, found.groups, found.pairs.num_rows) == ([], [], [], 0)
        agrees(found)
    assert deduplicate([]).kept == []
    for keep in POLICIES:
        found = deduplicate(["one"], vectors=np.ones((1, 4)), keep=keep, values={"n": [3]})
        assert (found.kept, found.dropped) == (["0"], [])
        agrees(found)


@pytest.mark.parametrize("rule", ["cover", "components", "complete"])
@pytest.mark.parametrize(
    ("keep", "kept"), [("first", 0), ("last", 49), ("longest", 49), ("shortest", 0), ("n:max", 25), ("central", 0)]
)
def test_all_texts_equal(keep: str, kept: int, rule: str) -> None:
    texts = ["same " + " " * at for at in range(50)]
    found = deduplicate(texts, vectors=np.ones((50, 4)), keep=keep, rule=rule, values={"n": [-abs(at - 25) for at in range(50)]})
    assert found.kept == [str(kept)]
    assert {(row.kept_id, row.kind, row.score) for row in found.dropped} == {(str(kept), "exact", 1.0)}
    assert found.pairs.num_rows == 49
    agrees(found)


def test_at_threshold_one_equal_vectors_are_duplicates() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 32))
    found = deduplicate([f"t{n}" for n in range(100)], vectors=np.concatenate([rows, rows]), threshold=1.0)
    assert found.kept_positions.tolist() == list(range(50))


def test_short_and_long_and_foreign_texts() -> None:
    texts = [
        "a", "A", "b", "!", "-", "", "  ", "é", "e\u0301", "猫", "犬", "ｆｕｌｌ", "full",
        "word " * 20_000, "word  " * 20_000, " ".join(f"w{at}" for at in range(17_000)), " ".join(f"w{at}" for at in range(17_001)),
        "日本語の文章はここにあります。", "日本語の文章はここにあります", "Съешь ещё этих мягких булок", "СЪЕШЬ ЕЩЁ ЭТИХ МЯГКИХ БУЛОК",
        "नमस्ते दुनिया", "สวัสดีชาวโลก", "🎉", "🎉🎉", "\ud800", "straße", "STRASSE",
    ]  # fmt: skip
    found = deduplicate(texts, kinds=["exact", "lexical"])
    kinds = {(int(row.id), int(row.kept_id)): row.kind for row in found.dropped}
    assert kinds == {
        (1, 0): "exact", (6, 5): "exact", (8, 7): "exact", (12, 11): "exact", (14, 13): "exact", (16, 15): "lexical",
        (18, 17): "lexical", (20, 19): "exact", (27, 26): "exact",
    }  # fmt: skip
    agrees(found)


def test_normalisation_sees_through_unicode_case_and_space() -> None:
    assert normalise("  Ｆull\u00a0WIDTH\n\ttext ﬁn STRASSE ") == normalise("full width text fin straße")
    assert normalise("a b") != normalise("ab")
    assert len({text_mark(text) for text in ("a b", "A\n B ", "ab", "")}) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep": "best"}, "keep 'best' is not known"),
        ({"keep": "year:max"}, "there is no field 'year'"),
        ({"keep": "n:max", "values": {"n": ["a", 1, 2]}}, "values of this field have no order"),
        ({"rule": "greedy"}, "rule 'greedy' is not known"),
        ({"kinds": ["fuzzy"]}, "kind 'fuzzy' is not known; there are exact, lexical, contained, semantic"),
        ({"kinds": ["overlap"]}, "kind 'overlap' is not known"),
        ({"kinds": ["lexical"]}, "a semantic threshold is given, but"),
        ({"threshold": 0.0}, "the semantic threshold must lie above 0 and be at most 1"),
        ({"threshold": -0.5}, "the semantic threshold must"),
        ({"threshold": 1.01}, "the semantic threshold must"),
        ({"threshold": math.nan}, "the semantic threshold must"),
        ({"lexical": 0.0}, "the lexical threshold must"),
        ({"contained": 2.0}, "the contained threshold must"),
        ({"overlap": math.nan}, "the overlap threshold must"),
        ({"ids": ["a"]}, "ids: 1 for 3 texts"),
        ({"group_by": [1, 2, 3, 4]}, "group_by: 4 for 3 texts"),
        ({"values": {"n": [1]}}, "n: 1 for 3 texts"),
        ({"vectors": np.eye(4)}, "vectors: 4 for 3 texts"),
        ({"vectors": np.eye(3) * [1, 1, 0]}, "a vector holds NaN, or nothing but zeros"),
        ({"vectors": np.eye(3) * [1, 1, math.nan]}, "a vector holds NaN"),
        ({"vectors": np.diag([1, 1, math.inf])}, "a vector holds NaN"),
        ({"vectors": np.ones(3)}, "vectors"),
        ({"vectors": np.ones((3, 2, 2))}, "vectors"),
        ({"against": ["x"], "against_vectors": np.ones((2, 3))}, "against_vectors: 2 for 1"),
        ({"against": ["x"], "against_vectors": np.ones((1, 4))}, "wide"),
        ({"against": ["x"], "against_vectors": np.zeros((1, 3))}, "a vector holds NaN"),
        ({"against": ["x"], "against_vectors": np.ones((1, 3)), "group_by": [1, 2, 3]}, "group_by and against"),
    ],
)
def test_wrong_options_give_one_clear_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        deduplicate(["x", "y", "z"], **{"vectors": np.eye(3), "threshold": 0.9, **given})
    assert "\n" not in str(caught.value)


def test_columns_may_be_arrays() -> None:
    texts = ["a", "A", "b"]
    found = deduplicate(texts, kinds=["exact"], keep="n:max", values={"n": np.array([1, 2, 3])})  # type: ignore[dict-item]
    assert found.kept == ["1", "2"]
    assert deduplicate(texts, kinds=["exact"], group_by=np.array([1, 2, 2])).kept == ["0", "1", "2"]  # type: ignore[arg-type]


def test_the_length_of_given_vectors_does_not_matter() -> None:
    texts, vectors, _, _ = corpus(1, 30)
    lengths = np.geomspace(1e-3, 1e3, 30, dtype=np.float32)[:, None]
    expected = deduplicate(texts, vectors=vectors, threshold=0.8)
    found = deduplicate(texts, vectors=vectors * lengths, threshold=0.8)
    assert found.kept == expected.kept
    assert deduplicate(texts, vectors=vectors.tolist(), threshold=0.8).kept == expected.kept  # type: ignore[arg-type]


def test_thresholds_that_are_chosen_for_one() -> None:
    assert chosen_thresholds() == {"exact": 1.0, "lexical": 0.9, "semantic": 0.8, "overlap": 0.7}
    assert chosen_thresholds(0.9) == {"exact": 1.0, "semantic": 0.9}
    assert chosen_thresholds(0.9, overlap=0.5) == {"exact": 1.0, "semantic": 0.9, "overlap": 0.5}
    assert chosen_thresholds(0.9, lexical=0.8) == {"exact": 1.0, "lexical": 0.8, "semantic": 0.9}
    assert chosen_thresholds(kinds=["semantic"]) == {"exact": 1.0, "semantic": 0.8, "overlap": 0.7}
    assert chosen_thresholds(overlap=0.0, kinds=["semantic"]) == {"exact": 1.0, "semantic": 0.8}
    assert chosen_thresholds(contained=0.8) == {"exact": 1.0, "lexical": 0.9, "contained": 0.8, "semantic": 0.8, "overlap": 0.7}
    assert chosen_thresholds(kinds=[]) == {"exact": 1.0}


def test_a_hugging_face_dataset_is_a_list_with_columns() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["a b", "A b", "c"], "year": [2000, 2002, None], "text_": ["x"] * 3})
    found = deduplicate(rows, kinds=["exact"], keep="year:max", text_field="body")
    assert found.kept == ["1", "2"]
    assert rows.select(found.kept_positions)["body"][:] == ["A b", "c"]
    with pytest.raises(UsageError, match="the dataset has no column 'text'; there are body, year, text_"):
        deduplicate(rows, kinds=["exact"])
    with pytest.raises(UsageError, match="there is no field 'month'"):
        deduplicate(rows, kinds=["exact"], keep="month:max", text_field="body")


def test_decisions_are_followed_and_can_be_decided_on_again() -> None:
    vectors = np.eye(4)[[0, 0, 1, 2]] + 0.01
    found = deduplicate(["a", "b", "c", "A "], vectors=vectors, threshold=0.8)
    assert [row.id for row in found.dropped] == ["1", "3"]
    judged = found.decided([Decision("0", "1", False), Decision("2", "1", True), Decision("0", "3", False)])
    assert [(row.id, row.kept_id, row.kind) for row in judged.dropped] == [("2", "1", "reviewed"), ("3", "0", "exact")]
    assert judged.rethreshold(0.9).kept == judged.kept
    with pytest.raises(UsageError, match="'9'"):
        found.decided([Decision("0", "9", True)])


def test_a_damaged_part_of_an_unfinished_search_is_found_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((20, 8)), 2, axis=0)
    texts = [f"t{n}" for n in range(40)]
    options: dict[str, Any] = {"vectors": vectors, "threshold": 0.9, "folder": tmp_path / "f"}
    right = deduplicate(texts, **options)
    (part,) = (tmp_path / "f").glob("semantic-*.npz")
    part.write_bytes(part.read_bytes()[:100])
    assert deduplicate(texts, **options).dropped == right.dropped
    assert len(right.dropped) == 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"texts": ["a", None]}, "number 1 is None"),
        ({"texts": ["a", "b"], "against": ["c", 3], "kinds": ["exact"]}, "against: number 1 is 3"),
        ({"texts": ["a", "b"], "ids": ["x", "x"]}, "ids: some stand twice"),
        ({"texts": ["a", "b"], "group_by": [[], []], "kinds": ["exact"]}, "group_by"),
    ],
)
def test_what_is_no_text_or_no_name_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        deduplicate(options.pop("texts"), **options)
