"""What the tests of training share: a small world of texts with topics, tiny models, and runs that are cut off."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel

from conftest import write_jsonl
from embell.training.progress import Progress, read_metrics
from embell.training.run import RunOptions
from tiny_models import tiny_model, tiny_tokenizer

LETTERS = string.ascii_uppercase + string.digits
TOPICS = [LETTERS[at : at + 4] for at in range(0, 36, 4)]
"""Each topic has four letters, each a token of its own; a text holds four letters of a topic, and three that say nothing."""


def text_of(topic: int, rng: random.Random) -> str:
    letters = [rng.choice(TOPICS[topic]) for _ in range(4)] + [rng.choice(string.ascii_lowercase) for _ in range(3)]
    rng.shuffle(letters)
    return " ".join(letters)


class World:
    """Tables of the small world, for each recipe, and held-out pairs that are scored 1 where they share their topic."""

    def __init__(self, folder: Path) -> None:
        rng = random.Random(0)
        some = [(rng.randrange(9), rng.randrange(1, 9)) for _ in range(1200)]
        triplets = [(text_of(a, rng), text_of(a, rng), text_of((a + b) % 9, rng)) for a, b in some]
        self.rows = [dict(zip(("query", "positive", "negative"), row, strict=True)) for row in triplets]
        self.triplets = write_jsonl(folder / "triplets.jsonl", self.rows)
        self.pairs = write_jsonl(folder / "pairs.jsonl", [{"query": a, "positive": b} for a, b, _ in triplets])
        self.few = write_jsonl(folder / "few.jsonl", self.rows[:40])
        scored = [(a, c, 0) if at % 2 else (a, b, 1) for at, (a, b, c) in enumerate(triplets)]
        self.scored_rows = [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in scored]
        self.scored = write_jsonl(folder / "scored.jsonl", self.scored_rows)
        self.groups = [[a, b] for a, b, _ in triplets]
        self.texts = write_jsonl(folder / "texts.jsonl", [{"texts": group} for group in self.groups])
        self.held_out = folder / "held.tsv"
        lines = ["sentence1\tsentence2\tscore"]
        for at in range(120):
            a = rng.randrange(9)
            lines.append(f"{text_of(a, rng)}\t{text_of((a + at % 2 * rng.randrange(1, 9)) % 9, rng)}\t{1 - at % 2}")
        self.held_out.write_text("\n".join(lines) + "\n")
        self.model = tiny_directory(folder / "model")
        self.bert = bert_directory(folder / "bert")
        self.judge = judge_directory(folder / "judge")


def tiny_directory(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny model whose weights are those of a fresh one, so that it still has something to learn."""
    tokenizer = tiny_tokenizer()
    vocabulary = len(tokenizer) + 1  # AutoTokenizer gives Qwen2's a token of its own
    tiny_model(family, None, vocabulary=vocabulary, pad_token_id=0, **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _bert_config(**changes: Any) -> BertConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertConfig(vocab_size=len(tiny_tokenizer()), pad_token_id=0, initializer_range=0.2, **shape, **changes)


def bert_directory(path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertModel(_bert_config(), add_pooling_layer=False).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def judge_directory(path: Path, outputs: int = 1) -> Path:
    """A cross-encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        BertForSequenceClassification(_bert_config(num_labels=outputs)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run_options(**changes: Any) -> RunOptions:
    defaults: dict[str, Any] = {"batch": 16, "epochs": 9.0, "steps": 12, "precision": "float32", "report_every": 1}
    return RunOptions(**{**defaults, "learning_rate": 3e-3, **changes})


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def scores(run: Path, name: str = "held") -> list[float]:
    return [line["scores"][name] for line in read_metrics(run / "metrics.jsonl") if "scores" in line]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in lines]


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(
        next(model / name for name in ("model.safetensors", "adapter_model.safetensors") if (model / name).is_file())
    )


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def cut_off(start: Callable[[], Any], batches: int) -> None:
    """Begin a run and end it, as Ctrl-C would, when it has seen so many batches."""
    seen = 0
    original = Progress.count

    def count(self: Progress, texts: int, tokens: int) -> None:
        nonlocal seen
        seen += 1
        if seen > batches:
            raise KeyboardInterrupt
        original(self, texts, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "count", count)
        with pytest.raises(KeyboardInterrupt):
            start()
