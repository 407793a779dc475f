"""What embell saves opens in sentence-transformers, with the same vectors, and can be trained there."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from embell import Encoder, EncoderError
from embell.engine import bellm
from sentence_models import dense, plain_directory, save
from tiny_models import SENTENCES, tiny_encoder_directory

TEXTS = [*SENTENCES[:5], "x", "The river rose. " * 12]
QWEN = {"start_layer": -2, "pooling": "last", "query_prompt": "Find: {text}", "document_prompt": 'Text: {text} is:"'}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "a decoder with prompts": ("qwen3", QWEN),
    "prompteol with token prepending": ("llama", {"preset": "prompteol", "token_prepending": (0, 2)}),
    "metaeol": ("llama", {"preset": "metaeol", "max_length": 90}),
    "echo": ("gpt2", {"preset": "echo"}),
    "long texts in pieces, fewer components": ("mistral", {"start_layer": 1, "on_long": "chunk", "max_length": 9, "dim": 12}),
    "fewer layers, several poolings": ("llama", {"start_layer": 0, "layers": 3, "pooling": "mean+last"}),
    "bert with a head": ("bert", {"query_prompt": "Ask: {text}"}),
    "static": ("static", {}),
}


def static_directory(path: Path) -> Path:
    words = sorted({word for text in SENTENCES for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    table = torch.randn(len(words) + 1, 16, generator=torch.Generator().manual_seed(1))
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, table)], device="cpu").save(str(path), create_model_card=False)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            if family == "static":
                static_directory(made[family])
            elif family == "bert":
                save(made[family], plain_directory(tmp_path_factory.mktemp("plain"), "bert"), dense(outputs=20))
            else:
                tiny_encoder_directory(made[family], family)
        return made[family]

    return make


def opened(path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(path), device="cpu", trust_remote_code=True)


def assert_same(model: SentenceTransformer, encoder: Encoder) -> None:
    for kind, encode in (("document", model.encode_document), ("query", model.encode_query), ("document", model.encode)):
        expected = encoder.encode(TEXTS, kind)
        np.testing.assert_allclose(encode(TEXTS, batch_size=3, show_progress_bar=False), expected, atol=1e-5)
    assert model.get_embedding_dimension() == encoder.dim


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_encoder_gives_the_same_vectors_in_sentence_transformers(
    directory: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    family, options = KINDS[kind]
    encoder = Encoder.load(directory(family), dtype="float32", device="cpu", **options)
    assert_same(encoder.to_sentence_transformers(), encoder)
    encoder.save(tmp_path / "ours")
    theirs = opened(tmp_path / "ours")
    assert_same(theirs, encoder)
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    assert_same(opened(tmp_path / "theirs"), encoder)
    back = Encoder.load(tmp_path / "theirs", dtype="float32", device="cpu")
    np.testing.assert_allclose(back.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    assert encoder.spec.differences(back.spec) in ([], ["fingerprint"])


@pytest.mark.parametrize("start", [0, 2])
def test_a_model_saved_twice_still_looks_both_ways(directory: Callable[[str], Path], tmp_path: Path, start: int) -> None:
    encoder = Encoder.load(directory("qwen3"), dtype="float32", start_layer=start)
    encoder.to_sentence_transformers().save(str(tmp_path / "one"), create_model_card=False)
    opened(tmp_path / "one").save(str(tmp_path / "two"), create_model_card=False)
    model = opened(tmp_path / "two")
    assert model[0].encoder.spec.start_layer == start
    bellm.probe(model[0].network, start)
    causal = Encoder.load(directory("qwen3"), dtype="float32", start_layer=None)
    texts = [text for text in TEXTS if len(text) > 1]
    difference = np.abs(model.encode(texts, show_progress_bar=False) - causal.encode(texts))
    assert difference.max(axis=1).min() > 1e-3


def test_it_is_not_opened_without_trust(directory: Callable[[str], Path], tmp_path: Path) -> None:
    Encoder.load(directory("llama"), dtype="float32").save(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path), device="cpu")


@pytest.mark.parametrize("family", ["qwen3", "bert", "static"])
def test_gradients_reach_every_part_and_change_the_encoder_too(directory: Callable[[str], Path], family: str) -> None:
    encoder = Encoder.load(directory(family), dtype="float32", **({"start_layer": -2} if family == "qwen3" else {}))
    model = encoder.to_sentence_transformers()
    before = encoder.encode(TEXTS)
    model.train()
    features = model.preprocess(TEXTS[:4])
    vectors = model(features)["sentence_embedding"]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    (vectors[0] @ vectors[1] - vectors[2] @ vectors[3]).backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert [name for name in still if "pooler" not in name and not name.endswith(("key.bias", "embeddings.weight"))] == []
    optimiser.step()
    model.eval()
    after = encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(model.encode(TEXTS, show_progress_bar=False), after, atol=1e-5)


def test_a_prompt_of_the_library_stands_before_the_text(directory: Callable[[str], Path]) -> None:
    encoder = Encoder.load(directory("llama"), dtype="float32", document_prompt="[{text}]")
    vectors = encoder.to_sentence_transformers().encode(TEXTS, prompt="Say: ", show_progress_bar=False)
    np.testing.assert_allclose(vectors, encoder.encode(["Say: " + text for text in TEXTS]), atol=1e-5)


def test_no_texts_and_texts_without_tokens(directory: Callable[[str], Path]) -> None:
    model = Encoder.load(directory("llama"), dtype="float32").to_sentence_transformers()
    assert len(model.encode([], show_progress_bar=False)) == 0
    with pytest.raises(EncoderError, match="no tokens"):
        model.encode(["a", ""], show_progress_bar=False)


def test_a_copy_of_the_model_stands_on_its_own(directory: Callable[[str], Path]) -> None:
    encoder = Encoder.load(directory("llama"), dtype="float32", start_layer=-2)
    model = encoder.to_sentence_transformers()
    expected = encoder.encode(TEXTS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    np.testing.assert_allclose(other.encode(TEXTS, show_progress_bar=False), expected, atol=1e-5)


def add_dense(path: Path) -> None:
    model = opened(path)
    model.append(dense(model.get_embedding_dimension(), 8))
    model.save(str(path), create_model_card=False)


def add_prompts(path: Path) -> None:
    model = opened(path)
    model.prompts = {"query": "Ask: ", "document": ""}
    model.save(str(path), create_model_card=False)


def cut(path: Path) -> None:
    card = json.loads((path / "config_sentence_transformers.json").read_text())
    (path / "config_sentence_transformers.json").write_text(json.dumps({**card, "truncate_dim": 4}))


@pytest.mark.parametrize(("add", "named"), [(add_dense, "Dense"), (add_prompts, "Ask"), (cut, "truncate_dim")])
def test_what_the_library_has_added_to_an_encoder_is_not_passed_over(
    directory: Callable[[str], Path], tmp_path: Path, add: Callable[[Path], None], named: str
) -> None:
    Encoder.load(directory("llama"), dtype="float32").save(tmp_path)
    add(tmp_path)
    with pytest.raises(EncoderError, match=named) as caught:
        Encoder.load(tmp_path)
    assert "\n" not in str(caught.value)
