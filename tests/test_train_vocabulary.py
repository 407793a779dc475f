"""Tokens that join neighbours, and the table that is fitted to a teacher: against brute force."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from embell.engine import Encoder
from embell.training import table
from embell.training.fresh import ShapeOptions, fresh_student
from embell.training.table import Bags, fit, normed, worth_joining
from embell.training.teacher import Teacher
from embell.training.vocabulary import join, train_tokenizer
from training_parts import World

WORDS = ("the", "cat", "sat", "on", "a", "mat", "not", "asleep", "x-ray", "c3po", "naïve", "東京", "don't", "…", "a.b", "1990")
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    rng = random.Random(0)
    return train_tokenizer([" ".join(rng.choices(WORDS, k=10)) for _ in range(500)], 320, 64)


def parts_of(ids: list[int], pairs: list[tuple[int, int]], base: int) -> list[int]:
    """Token ids with every joined token taken apart again."""
    found: list[int] = []
    for token in ids:
        found += parts_of(list(pairs[token - base]), pairs, base) if token >= base else [token]
    return found


@given(st.data())
def test_joined_tokens_stand_for_their_parts_and_no_pair_is_left(words: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    plain, _ = join(words, [], 0)
    text = data.draw(st.one_of(SENTENCES, st.text(max_size=40)))
    before = plain(text)["input_ids"]
    base = len(words)
    seen = sorted({pair for sentence in (text, "the cat sat on a mat") for pair in pairwise(plain(sentence)["input_ids"])})
    wanted = data.draw(st.lists(st.sampled_from(seen), max_size=6, unique=True))
    joined, taken = join(words, wanted, 5)
    assert len(taken) <= 5
    assert set(taken) <= set(wanted)
    assert len(joined) == base + len(taken)
    after = joined(text)["input_ids"]
    assert parts_of(after, taken, base) == before
    assert not set(taken) & set(pairwise(after))
    assert joined.decode(after) == plain.decode(before)


def test_a_phrase_grows_over_words_and_survives_saving(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = words("not asleep")["input_ids"]
    assert len(first) == 2
    once, _ = join(words, [(first[0], first[1])], 1)
    second = once("not asleep on")["input_ids"]
    assert second[0] == len(words)
    assert len(second) == 2
    twice, taken = join(once, [(second[0], second[1]), (first[0], first[1])], 5)
    assert taken == [(second[0], second[1])]  # the other is a token already
    twice.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("not asleep on", "a cat not asleep on a mat", "Not  ASLEEP\non"):
        assert again(text)["input_ids"] == twice(text)["input_ids"]
    assert len(again("not asleep on")["input_ids"]) == 1
    assert again.decode(again("Not asleep on.")["input_ids"]).strip() == "not asleep on."


@pytest.mark.parametrize("epsilon", [1e-6, 4.0])
def test_pairs_worth_joining_are_those_of_brute_force(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epsilon: float
) -> None:
    monkeypatch.setattr(table, "LEAST", 3)
    texts = [text for group in world.groups[:60] for text in group]
    source = Teacher(str(world.model), None, tmp_path / "kept", texts, False)
    words = train_tokenizer(texts, 300, 64)
    torch.manual_seed(0)
    rows = torch.randn(300, 32)
    bags = Bags(words, texts, 8)
    ids = [words(text, truncation=True, max_length=8)["input_ids"] for text in texts]
    assert [len(one) for one in ids] == bags.lengths.tolist()
    scaled = normed(rows, epsilon).double().numpy()
    want = source(range(len(texts))).double().numpy()
    top: dict[tuple[int, int], np.ndarray] = {}
    below: dict[tuple[int, int], float] = {}
    count: dict[tuple[int, int], int] = {}
    for one, target in zip(ids, want, strict=True):
        mean = scaled[one].mean(axis=0)
        mean /= np.linalg.norm(mean)
        missed = target / np.linalg.norm(target)
        missed = missed - (missed @ mean) * mean
        for pair in set(pairwise(one)):
            times = sum(other == pair for other in pairwise(one))
            top[pair] = top.get(pair, 0) + times / len(one) * missed
            below[pair] = below.get(pair, 0.0) + (times / len(one)) ** 2
            count[pair] = count.get(pair, 0) + times
    worth = {pair: (top[pair] ** 2).sum() / (below[pair] * (1 + table.PRIOR / count[pair])) for pair in top if count[pair] >= 3}
    best = sorted(worth, key=lambda pair: -worth[pair])
    assert len(best) > 20
    found = worth_joining(rows, bags, source, epsilon, 20)
    assert [worth[pair] for pair in found] == pytest.approx([worth[pair] for pair in best[:20]], rel=1e-4)


def test_a_mean_of_rows_is_the_mean_of_a_text_s_rows(world: World) -> None:
    texts = [text for group in world.groups[:20] for text in group]
    words = train_tokenizer(texts, 300, 64)
    rows = torch.randn(300, 8)
    bags = Bags(words, texts, 6)
    chosen = [7, 3, 30]
    wanted = [rows[words(texts[at])["input_ids"][:6]].mean(dim=0) for at in chosen]
    torch.testing.assert_close(bags.means(rows, chosen), torch.stack(wanted))


def test_phrases_bring_a_fresh_student_nearer_and_are_its_tokens(world: World, tmp_path: Path) -> None:
    """The teacher reads pairs as one: a fitted table with rows for pairs comes nearer to it than one without."""
    texts = [text for group in world.groups for text in group][:800]
    source = Teacher(str(world.model), None, tmp_path / "kept", texts, True)
    found = {}
    for phrases in (0, 60):
        shape = ShapeOptions(new_layers=2, hidden=32, inner=48, heads=2, vocabulary=300 + phrases, positions=64, epsilon=4.0)
        directory = fresh_student(shape, source, texts, tmp_path / str(phrases), 0, 60, phrases)
        student = Encoder.load(directory, start_layer=1, dtype="float32")
        near = torch.cosine_similarity(torch.from_numpy(student.encode(texts[:200])), source(range(200)))
        found[phrases] = float(near.mean())
        assert len(student.tokenizer) <= 300 + phrases
        assert json.loads((tmp_path / str(phrases) / "tokenizer.json").read_text())["truncation"] is None
    assert found[60] > found[0] + 0.01
    joined = AutoTokenizer.from_pretrained(tmp_path / "60")
    plain = AutoTokenizer.from_pretrained(tmp_path / "0")
    assert sum(len(joined(text)["input_ids"]) for text in texts) < 0.95 * sum(len(plain(text)["input_ids"]) for text in texts)


def test_the_fit_ends_where_no_step_gains(world: World, tmp_path: Path) -> None:
    """Rows of a width of their own: every text one token, so the best table is the teacher's vectors themselves."""
    texts = ["A", "B", "C", "D"]
    source = Teacher(str(world.model), None, tmp_path / "kept", texts, False)
    words = train_tokenizer(texts, 300, 8)
    rows = fit(torch.randn(300, 32), Bags(words, texts, 8), source, 4.0, 300, 0)
    near = torch.cosine_similarity(Bags(words, texts, 8).means(normed(rows, 4.0), [0, 1, 2, 3]), source(range(4)))
    assert float(near.min()) > 0.99
