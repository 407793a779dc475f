"""The distillation recipe: what it may read, that it learns, and that a stopped run goes on as if it had not stopped."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from embell import CorpusError, Encoder, UsageError
from embell.training import distill as module
from embell.training import sources
from embell.training.distill import Recipe, distill, distillation_loss, plan_batches
from tiny_models import tiny_tokenizer

RECIPE = Recipe(
    layers=2, hidden=32, inner=48, heads=2, vocabulary=400, start_layer=1, batch=32, longest=64, learning_rate=3e-3, compile=False
)
NOUNS = [
    "river",
    "bridge",
    "engine",
    "vector",
    "sentence",
    "bank",
    "galaxy",
    "soup",
    "kitten",
    "market",
    "teacher",
    "window",
    "garden",
    "doctor",
    "letter",
    "summer",
]
VERBS = ["crosses", "builds", "reads", "follows", "paints", "forgets", "measures", "opens", "carries", "answers"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    sentences = [f"The {a} {verb} the {b} near a {c}." for a in NOUNS for verb in VERBS for b in NOUNS[:5] for c in NOUNS[9:11]]
    rows = [
        {"id": str(n), "title": f"About {n}", "text": " ".join(sentences[n * 40 : n * 40 + 40])}
        for n in range(len(sentences) // 40)
    ]
    (folder / "text" / "factbook.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sts").mkdir()
    (folder / "sts" / "test.tsv").write_text(f"score\tsentence1\tsentence2\n1\t{sentences[7].upper()}\tunrelated words\n")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_only_sources_on_the_list_are_read() -> None:
    assert [source.path for source in sources.select(["text/factbook.jsonl"])] == ["text/factbook.jsonl"]
    for refused in ("text/reuters21578.jsonl.xz", "dup/mrpc-train.tsv.xz", "sts/stsb-train.tsv", "pairs/banking77-test.tsv"):
        with pytest.raises(UsageError, match="may not be trained on"):
            sources.select([refused])
    assert all(source.licence for source in sources.SHIPPABLE)


def test_held_out_sentences_are_left_out_whatever_their_case(data: Path) -> None:
    chosen = sources.select(["text/factbook.jsonl"])
    sentences, paragraphs, counts = sources.collect(data, chosen, 1.0, 0)
    assert counts == {"text/factbook.jsonl": (len(sentences), len(paragraphs))}
    marks = [sources.fingerprint(text) for text in sentences]
    assert len(set(marks)) == len(marks) > 500
    assert not set(marks) & sources.held_out(data)
    whole = (data / "text" / "factbook.jsonl").read_text()
    left_out = sources.fingerprint((data / "sts" / "test.tsv").read_text().split("\t")[3])
    assert left_out in sources.fingerprint(whole)
    assert sources.collect(data, chosen, 1.0, 0)[0] == sentences
    with pytest.raises(CorpusError, match="no such file"):
        sources.collect(data, sources.select(["dict/wordset.tsv.xz"]), 1.0, 0)


def test_rows_of_compressed_tables_are_read_without_quoting(tmp_path: Path) -> None:
    with lzma.open(tmp_path / "a.tsv.xz", "wt", encoding="utf-8") as file:
        file.write('one\ttwo\n"open\tand 5" more\n')
    assert list(sources.read_rows(tmp_path / "a.tsv.xz")) == [{"one": '"open', "two": 'and 5" more'}]


@given(st.lists(st.integers(1, 256), min_size=1, max_size=400), st.integers(0, 9))
def test_batches_hold_each_row_at_most_once_within_their_bounds(lengths: list[int], seed: int) -> None:
    recipe = Recipe(batch=64, batch_tokens=8192, seed=seed)
    batches = plan_batches(np.array(lengths), recipe)
    rows = np.concatenate(batches) if batches else np.empty(0)
    assert len(set(rows.tolist())) == len(rows) >= len(lengths) - 15  # a last batch may be too small to be of use
    for batch in batches:
        assert 16 <= len(batch) <= 64
        assert len(batch) * max(lengths[row] for row in batch) <= 8192


def test_the_loss_is_zero_at_the_teacher_and_positive_elsewhere() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(20, 8), dim=-1)
    loss, cosine = distillation_loss(vectors, vectors, RECIPE)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert cosine.item() == pytest.approx(1)
    assert distillation_loss(vectors, vectors.roll(1, 0), RECIPE)[0].item() > 1


def test_a_run_that_was_stopped_ends_where_an_undisturbed_one_does(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["text/factbook.jsonl"]
    calm = distill(data, teacher, tmp_path / "calm", RECIPE, only)
    original = module.learning_rate

    def stops(step: int, steps: int, recipe: Recipe) -> float:
        if step == steps // 2:
            raise KeyboardInterrupt
        return original(step, steps, recipe)

    monkeypatch.setattr(module, "learning_rate", stops)
    with pytest.raises(KeyboardInterrupt):
        distill(data, teacher, tmp_path / "stopped", RECIPE, only, checkpoint_seconds=0)
    monkeypatch.undo()
    resumed = distill(data, teacher, tmp_path / "stopped", RECIPE, only)
    one, other = load_file(calm / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].float(), other[name].float(), rtol=0, atol=0.02)
    metrics = [json.loads(line) for line in (tmp_path / "calm" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([m["cosine"] for m in metrics[-5:]]) > np.mean([m["cosine"] for m in metrics[:5]]) + 0.02
    encoder = Encoder.load(calm)
    assert (encoder.spec.start_layer, encoder.spec.pooling) == (1, "mean")
    np.testing.assert_array_equal(encoder.encode("a  river\n near"), encoder.encode(" A river near "))
