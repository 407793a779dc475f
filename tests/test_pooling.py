"""From token states to one vector, against each pooling written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embell import Encoder
from embell.engine.pooling import pool
from plain_path import last_states, tokens_of, unit
from tiny_models import HIDDEN, SENTENCES, tiny_encoder_directory

TEXTS = ["A cat", *SENTENCES[:3], "漢字 🙂", "x"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_directory(tmp_path_factory.mktemp("gpt2"), "gpt2")


def pooled_by_hand(states: np.ndarray, pooling: str, places: np.ndarray) -> np.ndarray:
    """One text's vector from the states that are read; `places` count from 1 at the text's first token."""
    if "+" in pooling:
        return np.concatenate([pooled_by_hand(states, one, places) for one in pooling.split("+")])
    result: np.ndarray = {
        "mean": lambda: states.sum(axis=0) / len(states),
        "last": lambda: states[-1],
        "cls": lambda: states[0],
        "max": lambda: np.array([max(column) for column in states.T]),
        "weighted-mean": lambda: sum(w * s for w, s in zip(places, states, strict=True)) / places.sum(),
        "mean-sqrt-length": lambda: states.sum(axis=0) / len(states) ** 0.5,
    }[pooling]()
    return result


POOLINGS = ("mean", "last", "cls", "max", "weighted-mean", "mean-sqrt-length", "cls+mean", "last+max+weighted-mean")


@pytest.mark.parametrize("pooling", POOLINGS)
@given(data=st.data())
@settings(max_examples=40)
def test_a_pooling_reads_the_marked_tokens_alone(pooling: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 7))
    spans = data.draw(st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, length)), min_size=1, max_size=4))
    spans = [(first, max(first + 1, last)) for first, last in spans]
    columns = torch.arange(length)
    mask = torch.stack([(columns >= first) & (columns < last) for first, last in spans])
    states = torch.randn(len(spans), length, 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    states[~mask] = float("nan")
    vectors = pool(states, mask, pooling)
    counted = pool(states, mask, pooling, torch.zeros(len(spans), dtype=torch.long))
    for row, (first, last) in enumerate(spans):
        seen = states[row, first:last].numpy()
        places = np.arange(1, last - first + 1)
        np.testing.assert_allclose(vectors[row], pooled_by_hand(seen, pooling, places), atol=1e-5)
        np.testing.assert_allclose(counted[row], pooled_by_hand(seen, pooling, places + first), atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_encoder_pools_as_done_by_hand(directory: Path, pooling: str) -> None:
    start = 2 if "cls" in pooling or "last" in pooling else 3
    encoder = Encoder.load(directory, pooling=pooling, start_layer=start, document_prompt="of {text} it", dtype="float32")
    vectors = encoder.encode(TEXTS)
    assert vectors.shape[1] == HIDDEN * len(pooling.split("+")) == encoder.dim
    for text, vector in zip(TEXTS, vectors, strict=True):
        states = last_states(directory, tokens_of(encoder, f"of {text} it"), start).numpy()
        expected = pooled_by_hand(states, pooling, np.arange(1, len(states) + 1))
        np.testing.assert_allclose(vector, unit(expected), atol=1e-5)
