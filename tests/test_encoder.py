"""The encoder: what it computes, what must not change a vector, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embell import Encoder, EncoderError
from embell.engine import bellm
from embell.engine.backbone import EMBEDDED_MODEL
from embell.engine.encoder import EncodeReport, batches_by_length
from embell.engine.pooling import pool
from tiny_models import tiny_encoder_directory

FAMILIES = ("llama", "qwen3", "mistral", "gpt2")
PROMPT = 'The representative word for sentence {text} is:"'
TEXTS = [
    "A cat.",
    "The river rose over night and took the old bridge with it.",
    "é 漢字 🙂",
    "x",
    "two  spaces\nand a line",
    "A cat.",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        tiny_encoder_directory(made[family], family)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "pooling"), [(None, "mean"), (-1, "mean"), (1, "last"), (0, "mean")])
def test_vectors_are_those_of_the_model_run_one_text_at_a_time(
    directory: dict[str, Path], family: str, start: int | None, pooling: str
) -> None:
    encoder = Encoder.load(directory[family], start_layer=start, pooling=pooling, dtype="float32")
    vectors = encoder.encode(TEXTS)
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(directory[family], dtype=torch.float32).eval()
    bellm.make_bidirectional(model, bellm.resolve_start(start, 4))
    tokenizer = AutoTokenizer.from_pretrained(directory[family])
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False).last_hidden_state[0]
        expected = (states.mean(dim=0) if pooling == "mean" else states[-1]).numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.fixture(scope="module")
def tiny(directory: dict[str, Path]) -> Encoder:
    return Encoder.load(directory["llama"], start_layer=-2, dtype="float32")


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_order_and_batch_composition_do_not_change_a_vector(tiny: Encoder, texts: list[str], seed: int) -> None:
    together = tiny.encode(texts)
    order = np.random.default_rng(seed).permutation(len(texts))
    np.testing.assert_allclose(tiny.encode([texts[i] for i in order]), together[order], atol=1e-5)
    alone = np.concatenate([tiny.encode(text) for text in texts])
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_the_embedded_model_in_bf16_agrees_with_float32() -> None:
    texts = [*TEXTS, *(text * 20 for text in TEXTS)]
    full = Encoder.load(dtype="float32").encode(texts)
    half = Encoder.load(dtype="bfloat16").encode(texts)
    assert (full * half).sum(axis=1).min() > 0.999


def test_a_stream_is_encoded_window_by_window(tiny: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embell.engine.encoder.WINDOW", 4)
    read = []

    def texts():  # type: ignore[no-untyped-def]
        for number in range(11):
            read.append(number)
            yield f"text number {number}"

    stream = tiny.encode_stream(texts())
    first = next(stream)
    assert (len(first), len(read)) == (4, 8)  # the next window is read ahead, and no more
    rest = np.concatenate(list(stream))
    np.testing.assert_allclose(np.concatenate([first, rest]), tiny.encode([f"text number {n}" for n in range(11)]), atol=1e-5)


def test_equal_texts_are_encoded_once_and_counted_each(tiny: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    original = tiny._encode_batch
    monkeypatch.setattr(tiny, "_encode_batch", lambda ids: batches.append(len(ids)) or original(ids))
    report = EncodeReport()
    vectors = tiny.encode(["a", "b", "a", "a"], report=report)
    assert sum(batches) == 2
    assert report.texts == 4
    assert (vectors[0] == vectors[2]).all()


def test_a_long_text_is_cut_and_the_prompt_around_it_is_not(directory: dict[str, Path]) -> None:
    encoder = Encoder.load(
        directory["llama"], start_layer=1, pooling="last", document_prompt=PROMPT, max_length=60, dtype="float32"
    )
    report = EncodeReport()
    long = "river bridge night " * 40
    vector = encoder.encode([long, "short"], report=report)[0]
    assert report.truncated == 1
    tail = encoder.tokenizer(' is:"', add_special_tokens=False)["input_ids"]
    tokenised = encoder.tokens([long, "short"], "document")
    ids = [row.ids for row in tokenised.rows]
    assert tokenised.long == [0]
    assert len(ids[0]) <= 60
    assert ids[0][-len(tail) + 1 :] == tail[1:]  # the first may have merged with the text before it
    kept = encoder.tokenizer.decode(ids[0]).split("sentence ")[1].split(' is:"')[0]
    assert long.startswith(kept)
    np.testing.assert_allclose(encoder.encode(kept)[0], vector, atol=1e-5)
    with pytest.raises(EncoderError, match="prompt alone"):
        Encoder.load(directory["llama"], document_prompt=PROMPT, max_length=10).encode(long)


def test_queries_have_their_own_prompt(directory: dict[str, Path]) -> None:
    plain = Encoder.load(directory["llama"], dtype="float32")
    asking = Encoder.load(directory["llama"], query_prompt="query: {text}", dtype="float32")
    np.testing.assert_array_equal(asking.encode("cats"), plain.encode("cats"))
    np.testing.assert_array_equal(asking.encode("cats", "query"), plain.encode("query: cats"))


def test_saved_and_loaded_again_it_is_the_same_encoder(directory: dict[str, Path], tmp_path: Path) -> None:
    encoder = Encoder.load(
        directory["qwen3"], start_layer=1, pooling="last", query_prompt="q: {text}", max_length=77, dtype="float32"
    )
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved", dtype="float32")
    assert again.spec.start_layer == 1
    assert not [name for name in encoder.spec.differences(again.spec) if name != "fingerprint"]
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    causal = Encoder.load(tmp_path / "saved", start_layer=None, dtype="float32").encode(TEXTS)
    assert np.abs(causal - encoder.encode(TEXTS)).max() > 1e-3
    (tmp_path / "saved" / "embell.json").write_text('{"format": 1, "start_layr": 1}')
    with pytest.raises(EncoderError, match="unknown key 'start_layr', did you mean 'start_layer'"):
        Encoder.load(tmp_path / "saved")


def test_other_weights_have_another_fingerprint(directory: dict[str, Path], tmp_path: Path) -> None:
    first = Encoder.load(directory["llama"])
    tiny_encoder_directory(tmp_path, "llama", seed=1)
    assert first.spec.differences(Encoder.load(tmp_path).spec) == ["fingerprint"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [-1, 3])
def test_the_last_layer_with_last_token_pooling_is_refused(directory: dict[str, Path], family: str, start: int) -> None:
    with pytest.raises(EncoderError, match="equals the causal model"):
        Encoder.load(directory[family], start_layer=start, pooling="last")


def test_what_cannot_be_loaded_is_refused_in_one_line(directory: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        "no such model directory": tmp_path / "nowhere",
        "no config.json": tmp_path,
    }
    for message, path in cases.items():
        with pytest.raises(EncoderError, match=message):
            Encoder.load(path)
    pickled = tmp_path / "pickled"
    shutil.copytree(directory["llama"], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="never loaded"):
        Encoder.load(pickled)
    lacking = tmp_path / "lacking"
    shutil.copytree(directory["llama"], lacking)
    from safetensors.torch import load_file, save_file

    tensors = load_file(lacking / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"weights lack .*q_proj"):
        Encoder.load(lacking)
    for options, message in (
        ({"pooling": "maxi"}, "unknown pooling 'maxi', did you mean 'max'"),
        ({"start_layer": 4}, "outside the model"),
        ({"query_prompt": "no place"}, "exactly once"),
        ({"dtype": "int3"}, "unknown dtype"),
        ({"device": "abacus"}, "cannot be used"),
        ({"max_length": 0}, "at least 1"),
    ):
        with pytest.raises(EncoderError, match=message):
            Encoder.load(directory["llama"], **options)  # type: ignore[arg-type]


def test_a_text_without_tokens_is_named(tiny: Encoder) -> None:
    with pytest.raises(EncoderError, match="text 2 is empty"):
        tiny.encode(["a", "", "b"])


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), budget=st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


@given(data=st.data())
def test_pooling_reads_real_tokens_only(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    real = [data.draw(st.integers(1, length)) for _ in range(rows)]
    left = [data.draw(st.booleans()) for _ in range(rows)]
    mask = torch.tensor(
        [
            ([False] * (length - n) + [True] * n) if at_left else ([True] * n + [False] * (length - n))
            for n, at_left in zip(real, left, strict=True)
        ]
    )
    states = torch.randn(rows, length, 3)
    states[~mask] = float("nan")
    for row in range(rows):
        seen = states[row][mask[row]]
        torch.testing.assert_close(pool(states, mask, "mean")[row], seen.mean(dim=0))
        torch.testing.assert_close(pool(states, mask, "last")[row], seen[-1])


def test_the_embedded_model_is_small_and_bidirectional() -> None:
    files = [path for path in EMBEDDED_MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 36_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    encoder = Encoder.load()
    assert sum(parameter.numel() for parameter in encoder.network.parameters()) <= 20_000_000
    assert (encoder.spec.start_layer, encoder.spec.layers, encoder.dim, encoder.spec.pooling) == (1, 2, 320, "mean")
    assert json.loads((EMBEDDED_MODEL / "config.json").read_text())["model_type"] == "llama"


def test_the_embedded_model_knows_what_texts_are_about(mini: Encoder) -> None:
    documents = mini.encode(["The cat sleeps on the sofa.", "Shares fell on the stock market.", "Bake the bread for an hour."])
    queries = mini.encode(["a tired kitten", "economic news", "cooking instructions"], "query")
    assert (queries @ documents.T).argmax(axis=1).tolist() == [0, 1, 2]


def test_loading_leaves_the_progress_bars_of_transformers_as_they_were(directory: dict[str, Path]) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    Encoder.load(directory["llama"])
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    Encoder.load(directory["llama"])
    assert not logging.is_progress_bar_enabled()


def test_a_spec_leads_back_to_its_encoder(directory: dict[str, Path]) -> None:
    encoder = Encoder.load(directory["mistral"], start_layer=1, pooling="last", query_prompt="q: {text}", dtype="float32")
    again = Encoder.from_spec(encoder.spec, dtype="float32")
    assert again.spec == encoder.spec
    np.testing.assert_array_equal(again.encode(TEXTS, "query"), encoder.encode(TEXTS, "query"))
