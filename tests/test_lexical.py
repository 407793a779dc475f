"""Lexical near-duplicates, against sets of Python strings and all pairs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embell.engine.lexical import (
    Banding,
    Pairs,
    banding,
    contained_pairs,
    every_pair_of,
    lexical_pairs,
)
from embell.engine.shingles import LexicalSets, Shingles
from embell.errors import UsageError

FOX, FOX_SIGNED = 3995627566366449938, [1976056402, 40462916, 2654106262]
"""The shingle of a text and its signature, as they came out when this was written."""
ALPHABET = "abcdefghij"
TEXTS = st.lists(st.text(ALPHABET, max_size=9).map(" ".join), max_size=25)
THRESHOLDS = st.sampled_from([0.2, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0])


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def containment(one: set[str], other: set[str]) -> float:
    return len(one & other) / min(len(one), len(other)) if one and other else 0.0


def oracle(
    sets: list[set[str]],
    threshold: float,
    score: Callable[[set[str], set[str]], float],
    split: int | None = None,
) -> dict[tuple[int, int], float]:
    found = {}
    for later in range(len(sets)):
        for earlier in range(later):
            if split is None or earlier < split <= later:
                value = score(sets[later], sets[earlier])
                if value >= threshold:
                    found[later, earlier] = value
    return found


def gathered(parts: Iterable[Pairs]) -> tuple[dict[tuple[int, int], float], list[int]]:
    """The pairs and the capped positions; checks that they come in order, and each once."""
    found: dict[tuple[int, int], float] = {}
    capped: list[int] = []
    before = (-1, -1)
    for part in parts:
        assert len(part.later) or len(part.capped)
        for later, earlier, value in zip(part.later.tolist(), part.earlier.tolist(), part.scores.tolist(), strict=True):
            assert later > earlier >= 0
            assert (later, earlier) > before
            before = (later, earlier)
            found[later, earlier] = value
        assert part.later.dtype == part.earlier.dtype == part.capped.dtype == np.int64
        capped += part.capped.tolist()
    assert capped == sorted(set(capped))
    return found, capped


@settings(max_examples=60, deadline=None)
@given(TEXTS, THRESHOLDS, st.none() | st.integers(0, 25))
def test_pairs_have_their_true_jaccard(texts: list[str], threshold: float, split: int | None) -> None:
    # Single values as bands, and many: a pair at 0.2 is missed with a chance of 0.8^512.
    expected = oracle([set(text.split()) for text in texts], threshold, jaccard, split)
    found, capped = gathered(
        lexical_pairs(LexicalSets.of(texts), threshold, first_of_second=split, permutations=512, recall=1 - 1e-9)
    )
    assert found == expected
    assert not capped


@settings(max_examples=60, deadline=None)
@given(TEXTS, THRESHOLDS)
def test_no_pair_is_invented(texts: list[str], threshold: float) -> None:
    expected = oracle([set(text.split()) for text in texts], threshold, jaccard)
    found, _ = gathered(lexical_pairs(LexicalSets.of(texts), threshold))
    assert found.items() <= expected.items()
    assert {pair for pair, value in expected.items() if value == 1} <= found.keys()


@settings(max_examples=100, deadline=None)
@given(TEXTS, THRESHOLDS, st.none() | st.integers(0, 25), st.integers(1, 4))
def test_containment_is_found_exactly(texts: list[str], threshold: float, split: int | None, fewest: int) -> None:
    sets = [words if len(words := set(text.split())) >= fewest else set() for text in texts]
    found, capped = gathered(contained_pairs(LexicalSets.of(texts), threshold, fewest=fewest, first_of_second=split))
    assert found == oracle(sets, threshold, containment, split)
    assert not capped


@settings(max_examples=60, deadline=None)
@given(TEXTS, THRESHOLDS, st.none() | st.integers(0, 25), st.lists(st.booleans(), min_size=25, max_size=25))
def test_every_pair_of_some_texts(texts: list[str], threshold: float, split: int | None, some: list[bool]) -> None:
    """As without a limit to partners, of the chosen texts; the sets are those of a part of more texts."""
    chosen = np.array(some[: len(texts)], bool)
    sets = LexicalSets.of([*texts, "a b c", *texts]).of_texts(np.arange(len(texts)) + len(texts) + 1)
    for kind, find in (("lexical", lexical_pairs), ("contained", contained_pairs)):
        found = {}
        for part in every_pair_of(sets, chosen, kind, threshold, split):
            found |= {(a, b): c for a, b, c in zip(part.later.tolist(), part.earlier.tolist(), part.scores.tolist(), strict=True)}
        every, _ = gathered(find(LexicalSets.of(texts), threshold, first_of_second=split))
        assert found == {pair: score for pair, score in every.items() if chosen[pair[0]]}


def test_containment_is_exact_when_candidates_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many rows are looked at first, few of them have too many partners, and parts are small.
    monkeypatch.setattr("embell.engine.lexical._CODES", 300)
    monkeypatch.setattr("embell.engine.shingles._ELEMENTS", 100)
    rng = np.random.default_rng(3)
    texts = [" ".join(f"w{word}" for word in rng.zipf(1.5, rng.integers(1, 12))) for _ in range(400)]
    sets = [words if len(words := set(text.split())) >= 3 else set() for text in texts]
    expected = oracle(sets, 0.6, containment)
    partners = np.bincount([later for later, _ in expected], minlength=400)
    most = int(np.quantile(partners, 0.9))
    found, capped = gathered(contained_pairs(LexicalSets.of(texts), 0.6, fewest=3, most=most, few=2))
    assert set(np.flatnonzero(partners > most)) <= set(capped)
    assert 10 < len(capped) < 200
    free = {pair: value for pair, value in expected.items() if pair[0] not in capped}
    assert free.items() <= found.items() <= expected.items()
    assert len(found) == len(free) + 2 * len(capped)


@pytest.mark.parametrize("kind", ["words", "characters"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shingles_are_those_of_the_text(kind: str, size: int) -> None:
    rng = np.random.default_rng(size)
    texts = ["".join(rng.choice(list("abc   "), rng.integers(0, 30))) for _ in range(60)]
    sets = []
    for text in texts:
        tokens = text.split() if kind == "words" else list(" ".join(text.split()))
        runs = [tuple(tokens[i : i + size]) for i in range(max(len(tokens) - size + 1, 1))]
        sets.append({repr(run) for run in runs if run})
    built = LexicalSets.of(texts, Shingles(kind, size))
    assert built.sizes.tolist() == [len(one) for one in sets]
    one, other = (index.ravel() for index in np.indices((60, 60)))
    assert built.shared(one, other).tolist() == [len(sets[i] & sets[j]) for i, j in zip(one, other, strict=True)]
    assert (built.at_most_shared(one, other) >= built.shared(one, other)).all()
    assert built.jaccard(one, other).tolist() == [jaccard(sets[i], sets[j]) for i, j in zip(one, other, strict=True)]
    assert built.containment(one, other).tolist() == [containment(sets[i], sets[j]) for i, j in zip(one, other, strict=True)]


def test_sets_do_not_depend_on_what_is_built_together(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {i} of {i % 7} kinds, 文字列{i}" for i in range(300)] + [""]
    for kind in ("words", "characters"):
        whole = LexicalSets.of(texts, Shingles(kind, 2))
        with monkeypatch.context() as patched:
            patched.setattr("embell.engine.shingles._HASHED", 50)
            patched.setattr("embell.engine.shingles._REMEMBERED", 10)
            parts = LexicalSets.of(iter(texts), Shingles(kind, 2))
        assert (whole.starts == parts.starts).all()
        assert (whole.hashes == parts.hashes).all()
        assert (Shingles(kind, 2).hashes(texts[5]) == whole.hashes[whole.starts[5] : whole.starts[6]]).all()
    assert whole.sizes[-1] == 0


def test_signatures_are_the_same_in_every_process() -> None:
    sets = LexicalSets.of(["the quick brown fox", "素早い茶色の狐", "", "x"])
    program = (
        "from embell.engine.shingles import LexicalSets\n"
        "sets = LexicalSets.of(['the quick brown fox', '素早い茶色の狐', '', 'x'])\n"
        "print(sets.hashes.tolist(), sets.signatures(16).tolist())"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True).stdout
    assert output == f"{sets.hashes.tolist()} {sets.signatures(16).tolist()}\n"
    # Of one machine and release; another must give the same.
    assert Shingles().hashes("fox").tolist() == [FOX]
    assert LexicalSets.of(["fox"]).signatures(3).tolist() == [FOX_SIGNED]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don’t  STOP_me, ﬁrst 3.5", ["don", "t", "stop_me", "first", "3", "5"]),
        ("我们在学习", ["我们", "们在", "在学", "学习"]),
        ("iPhone手机、好", ["iphone", "手机", "好"]),
        ("スーパーコンピューター", ["スー", "ーパ", "パー", "ーコ", "コン", "ンピ", "ピュ", "ュー", "ータ", "ター"]),
        ("ไปบ้าน", ["ไป", "ปบ", "บ้", "้า", "าน"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("Größe naïve", ["grösse", "naïve"]),
        ("𠀀𠀁𠀂", ["𠀀𠀁", "𠀁𠀂"]),
    ],
)
def test_words_of_scripts(text: str, words: list[str]) -> None:
    def set_of(tokens: list[str]) -> set[int]:
        return {int(Shingles().hashes(token)[0]) for token in tokens}

    assert all(len(Shingles().hashes(word)) == 1 for word in words)
    assert set(Shingles().hashes(text).tolist()) == set_of(words)
    assert len(Shingles("words", 2).hashes(text)) == max(len(words) - 1, 1)


def test_texts_without_words() -> None:
    texts = ["", " \n", "!", "---", "😀😀", "x", "X ", "\ud800", "---"]
    sets = LexicalSets.of(texts)
    assert sets.sizes.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    expected = {(6, 5): 1.0, (8, 3): 1.0}
    assert gathered(lexical_pairs(sets, 0.5))[0] == expected
    assert gathered(contained_pairs(sets, 0.5, fewest=1))[0] == expected
    none = LexicalSets.of([""] * 20)
    assert gathered(lexical_pairs(none, 0.5, most=5)) == gathered(contained_pairs(none, 0.5, fewest=0, most=5)) == ({}, [])
    nothing = np.array([0]), np.array([1])
    assert sets.jaccard(*nothing) == sets.containment(*nothing) == sets.shared(*nothing) == 0


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["one"]])
def test_no_pairs_of_nothing(texts: list[str]) -> None:
    sets = LexicalSets.of(texts)
    assert len(sets) == len(texts)
    assert gathered(lexical_pairs(sets, 0.5)) == gathered(contained_pairs(sets, 0.5, fewest=1)) == ({}, [])


def test_surrogates_and_long_texts() -> None:
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in rng.integers(0, 5000, 12_000)]
    long = " ".join(words)
    assert len(long) > 100_000
    changed = " ".join(["other", *words[1:]])
    part = " ".join(words[:300])
    texts = [long, "\ud800 x", changed, part, "\ud800 X", "长" * 50_000 + "文" * 50_000, "a" * 100_000]
    sets = LexicalSets.of(texts)
    assert sets.sizes[5:].tolist() == [3, 1]
    expected = oracle([set(text.split()) for text in (long, changed)], 0.9, jaccard)
    assert gathered(lexical_pairs(sets, 0.9))[0] == {(2, 0): expected[1, 0], (4, 1): 1.0}
    assert set(gathered(contained_pairs(sets, 0.95))[0]) == {(2, 0), (3, 0), (3, 2)}
    by_characters = LexicalSets.of([long, changed], Shingles("characters", 5))
    assert set(gathered(lexical_pairs(by_characters, 0.9))[0]) == {(1, 0)}


@pytest.mark.parametrize("permutations", [1, 16, 31, 128])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("recall", [0.5, 0.9, 0.99])
def test_banding_is_the_best_of_all(permutations: int, threshold: float, recall: float) -> None:
    enough = [
        (-rows, bands)
        for rows in range(1, permutations + 1)
        for bands in range(1, permutations // rows + 1)
        if 1 - (1 - threshold**rows) ** bands >= recall
    ]
    if not enough:
        with pytest.raises(UsageError, match="use more of them"):
            banding(threshold, permutations, recall)
        return
    rows, bands = min(enough)
    found = banding(threshold, permutations, recall)
    assert found == Banding(bands, -rows)
    assert found.chance(threshold) == pytest.approx(1 - (1 - threshold**-rows) ** bands)


@pytest.mark.parametrize(
    ("threshold", "permutations", "recall"), [(0, 128, 0.9), (1.1, 128, 0.9), (0.5, 0, 0.9), (0.5, 128, 1), (0.5, 128, 0)]
)
def test_banding_refuses(threshold: float, permutations: int, recall: float) -> None:
    with pytest.raises(UsageError):
        banding(threshold, permutations, recall)


@pytest.mark.parametrize(("common", "own"), [(8, 1), (40, 5), (10, 5), (3, 1)])
def test_recall_at_the_threshold_is_that_promised(common: int, own: int) -> None:
    """Planted pairs, each of words of its own, so that chance alone decides whether they meet in a band."""
    pairs, threshold, recall = 3000, common / (common + 2 * own), 0.95
    texts = []
    for pair in range(pairs):
        shared = [f"{pair}c{i}" for i in range(common)]
        texts += [" ".join([*shared, *(f"{pair}{side}{i}" for i in range(own))]) for side in "ab"]
    found, _ = gathered(lexical_pairs(LexicalSets.of(texts), threshold, recall=recall))
    assert set(found.values()) == {threshold}
    promised = banding(threshold, recall=recall).chance(threshold)
    # Four standard deviations; the least that `banding` may promise is 0.95, and more than 0.998 here in no case.
    assert len(found) / pairs == pytest.approx(promised, abs=4 * (promised * (1 - promised) / pairs) ** 0.5 + 0.002)


@pytest.mark.parametrize("find", [lexical_pairs, contained_pairs])
def test_many_nearly_equal_texts_are_capped(find: Callable[..., Iterable[Pairs]], monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    lone = [" ".join(f"{i}x{j}" for j in range(8)) for i in range(20)]
    texts = [*lone, *(f"{words} {i}" for i in range(3000)), *(f"{text} also" for text in lone)]
    most, few = 100, 5
    compared = []
    shared = LexicalSets.shared
    monkeypatch.setattr(LexicalSets, "shared", lambda *given: (compared.append(len(given[1])), shared(*given))[1])
    found, capped = gathered(find(LexicalSets.of(texts), 0.85, most=most, few=few))
    assert sum(compared) < most * 3000 * 1.1  # of 4.5 million pairs
    assert capped == list(range(20 + most + 1, 3020))
    links: dict[int, list[int]] = {}
    for later, earlier in found:
        links.setdefault(later, []).append(earlier)
    for later in range(20, 20 + most + 1):
        assert links.get(later, []) == list(range(20, later))
    for later in capped:
        assert len(links[later]) == few
        assert max(links[later]) < 20 + most
        assert links[later][0] < 40
    assert [links[3020 + i] for i in range(20)] == [[i] for i in range(20)]


def test_capping_counts_partners_not_candidates() -> None:
    # All agree in some band, for a low threshold has short ones; hardly any is a partner.
    texts = [f"a b c d {i}a {i}b {i}c {i}d {i}e {i}f" for i in range(200)] + [f"a b c d 7a 7b 7c 7d 7e {i}" for i in range(3)]
    sets = LexicalSets.of(texts)
    expected = oracle([set(text.split()) for text in texts], 0.6, jaccard)
    found, capped = gathered(lexical_pairs(sets, 0.6, most=150, permutations=512, recall=0.999999))
    assert found == expected
    assert not capped


def test_parts_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(list(ALPHABET), 6)) for _ in range(150)]
    sets = LexicalSets.of(texts)
    for split in (None, 50):
        for find in (lexical_pairs, contained_pairs):
            whole = gathered(find(sets, 0.6, first_of_second=split))
            with monkeypatch.context() as patched:
                patched.setattr("embell.engine.lexical._CODES", 2000)
                patched.setattr("embell.engine.shingles._ELEMENTS", 1000)
                patched.setattr("embell.engine.lexical._SIGNED", 7)
                parts = list(find(sets, 0.6, first_of_second=split))
            assert len(parts) > 2
            assert gathered(parts) == whole
            assert whole[0]


def test_shingles_refuse() -> None:
    for kind, size in (("letters", 1), ("words", 0)):
        with pytest.raises(UsageError):
            Shingles(kind, size)
