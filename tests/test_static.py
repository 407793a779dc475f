"""Static models of model2vec, and of sentence-transformers, give the vectors of their own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model2vec import StaticModel
from model2vec.distill import distill
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from embell import Encoder, EncoderError
from embell.engine.encoder import EncodeReport
from sentence_models import MINILM, dense
from tiny_models import SENTENCES

UNKNOWN = "漢字 🙂"
TEXTS = [*SENTENCES, "x", "Two  spaces\nand a line", f"known and {UNKNOWN} together", "the the the"]


@pytest.fixture(scope="module")
def model() -> StaticModel:
    """Distilled from all-MiniLM-L6-v2, for tokens of one letter or two and a few more."""
    few = r"^(?!(?:##[a-z]|[a-z]{1,2}|[.,!?'])$).*"
    return distill(str(MINILM), pca_dims=16, device="cpu", token_remove_pattern=few, quantize_to="float32")


def saved(model: StaticModel, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def loaded(path: Path, **options: Any) -> Encoder:
    return Encoder.load(path, dtype="float32", device="cpu", **options)


def assert_same(encoder: Encoder, theirs: StaticModel, texts: list[str] = TEXTS, tolerance: float = 1e-5) -> None:
    raw, unit = theirs.encode(texts, normalize=False), theirs.encode(texts, normalize=True)
    np.testing.assert_allclose(encoder.encode(texts), unit, atol=tolerance)
    expected = unit if theirs.normalize else raw
    np.testing.assert_allclose(encoder.encode(texts, normalize=False), expected, atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(encoder.encode(texts, "query"), encoder.encode(texts))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_distilled_model_gives_the_vectors_of_model2vec(model: StaticModel, tmp_path: Path, normalize: bool) -> None:
    theirs = StaticModel.from_pretrained(saved(model, tmp_path / "first"), normalize=normalize)
    encoder = loaded(saved(theirs, tmp_path / "model"))
    assert_same(encoder, theirs)
    assert (encoder.dim, encoder.spec.layers, encoder.spec.start_layer, encoder.spec.max_length) == (16, 0, None, 512)
    (tmp_path / "model/modules.json").unlink()  # as the first versions of model2vec wrote them
    assert_same(loaded(tmp_path / "model"), theirs)


@pytest.mark.parametrize(("quantize_to", "tolerance"), [("float16", 2e-3), ("int8", 1e-5)])
def test_narrow_tables(model: StaticModel, tmp_path: Path, quantize_to: str, tolerance: float) -> None:
    theirs = StaticModel.from_pretrained(saved(model, tmp_path / "first"), quantize_to=quantize_to)
    assert theirs.embedding.dtype == quantize_to
    encoder = loaded(saved(theirs, tmp_path / "model"))
    assert_same(encoder, theirs, tolerance=tolerance)  # model2vec rounds each vector to float16, embell does not
    theirs.embedding = theirs.embedding.astype(np.float32)
    assert_same(encoder, theirs)


@pytest.mark.parametrize("quantize_to", [None, "int8"])
def test_a_table_with_fewer_rows_than_tokens(model: StaticModel, tmp_path: Path, quantize_to: str | None) -> None:
    options = {"vocabulary_quantization": 20, "quantize_to": quantize_to}
    theirs = StaticModel.from_pretrained(saved(model, tmp_path / "first"), **options)
    assert len(theirs.embedding) == 20 < len(theirs.tokens) == len(theirs.weights)
    encoder = loaded(saved(theirs, tmp_path / "model"))
    assert_same(encoder, theirs)
    encoder.save(tmp_path / "again")
    np.testing.assert_array_equal(loaded(tmp_path / "again").encode(TEXTS), encoder.encode(TEXTS))


def test_unknown_words_are_left_out(model: StaticModel, tmp_path: Path) -> None:
    encoder = loaded(saved(model, tmp_path))
    one, two, three = encoder.encode(["known and", f"known and {UNKNOWN}", f"{UNKNOWN} known {UNKNOWN} and"])
    np.testing.assert_allclose(two, one, atol=1e-6)
    np.testing.assert_allclose(three, one, atol=1e-6)


def test_a_text_of_unknown_words_alone_has_the_vector_of_the_unknown_token(model: StaticModel, tmp_path: Path) -> None:
    """model2vec gives zeros, which have no direction to search by."""
    encoder = loaded(saved(model, tmp_path))
    assert not model.encode([UNKNOWN]).any()
    row = model.embedding[model.unk_token_id]
    np.testing.assert_allclose(encoder.encode([UNKNOWN])[0], row / np.linalg.norm(row), atol=1e-5)
    with pytest.raises(EncoderError, match="text 2 is empty"):
        encoder.encode(["a", " "])


def test_long_texts_are_cut_where_model2vec_cuts_them(model: StaticModel, tmp_path: Path) -> None:
    long = ["abc def " * 40, SENTENCES[0]]
    theirs = StaticModel.from_pretrained(saved(model, tmp_path / "first"), max_length=9)
    encoder = loaded(saved(theirs, tmp_path / "model"))
    report = EncodeReport()
    encoder.encode(long, report=report)
    assert (encoder.spec.max_length, report.truncated) == (9, 2)
    assert_same(encoder, theirs, long)
    whole = StaticModel.from_pretrained(tmp_path / "first", max_length=None)
    encoder = loaded(saved(whole, tmp_path / "whole"))
    assert_same(encoder, whole, ["abc " * 200 + "xyz " * 200])


def unigram(path: Path) -> StaticModel:
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz."), ("▁the", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.normalizer = normalizers.Lowercase()
    table = np.random.default_rng(0).normal(size=(len(pieces), 8)).astype(np.float32)
    theirs = StaticModel(table, tokenizer, normalize=True)
    theirs.save_pretrained(path)
    return theirs


def test_the_unknown_token_of_a_unigram_tokenizer(tmp_path: Path) -> None:
    theirs = unigram(tmp_path)
    assert theirs.unk_token_id == 0
    assert_same(loaded(tmp_path), theirs)


def sentence_model(path: Path, theirs: StaticModel, *after: torch.nn.Module) -> SentenceTransformer:
    module = StaticEmbedding(theirs.tokenizer, torch.from_numpy(theirs.embedding))
    saved = SentenceTransformer(modules=[module, *after], device="cpu")
    saved.save(str(path), create_model_card=False)
    return saved


@pytest.mark.parametrize("after", [[], [Normalize()], [dense(16, 8), Normalize()]], ids=["plain", "normalised", "dense"])
def test_a_static_embedding_of_sentence_transformers(model: StaticModel, tmp_path: Path, after: list[Any]) -> None:
    theirs = sentence_model(tmp_path, model, *after)
    encoder = loaded(tmp_path)
    texts = [*TEXTS, "abc " * 400 + "xyz " * 400]  # longer than the 512 tokens at which the tokenizer's own file cuts
    expected = theirs.encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(encoder.encode(texts, normalize=False), expected, atol=1e-5)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(texts), unit, atol=1e-5)


def test_an_encoder_saved_and_loaded_is_the_same(model: StaticModel, tmp_path: Path) -> None:
    saved(model, tmp_path / "model2vec")
    sentence_model(tmp_path / "sentence", model, dense(16, 8))
    for name in ("model2vec", "sentence"):
        encoder = loaded(tmp_path / name, dim=6, query_prompt="ask {text}")
        encoder.save(tmp_path / "saved" / name)
        again = loaded(tmp_path / "saved" / name)
        for kind in ("document", "query"):
            np.testing.assert_array_equal(again.encode(TEXTS, kind), encoder.encode(TEXTS, kind))
        assert again.spec.differences(encoder.spec) in ([], ["fingerprint"])
        from_spec = Encoder.from_spec(again.spec, device="cpu")
        np.testing.assert_array_equal(from_spec.encode(TEXTS), encoder.encode(TEXTS))


def test_order_batch_and_neighbours_do_not_change_a_vector(model: StaticModel, tmp_path: Path) -> None:
    encoder = loaded(saved(model, tmp_path))
    together = encoder.encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1]), together[::-1], atol=1e-6)
    np.testing.assert_allclose(np.concatenate([encoder.encode(text) for text in TEXTS]), together, atol=1e-6)
    np.testing.assert_allclose(loaded(tmp_path, batch_tokens=15).encode(TEXTS), together, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"start_layer": -1},
        {"start_layer": 0},
        {"layers": 1},
        {"pooling": "last"},
        {"pooling": "mean+max"},
        {"token_prepending": (0, 1), "document_prompt": "<PST> {text}", "query_prompt": "<PST> {text}"},
        {"preset": "bellm"},
    ],
    ids=str,
)
def test_options_that_need_layers_are_refused(model: StaticModel, tmp_path: Path, options: dict[str, Any]) -> None:
    saved(model, tmp_path)
    with pytest.raises(EncoderError, match="static model has no layers") as caught:
        loaded(tmp_path, **options)
    assert "\n" not in str(caught.value)


def reweigh(**tensors: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        stored = load_file(path / "model.safetensors") | tensors
        save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path / "model.safetensors")

    return change


def no_tokens(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**content, "model": {"type": "WordPiece"}}))


@pytest.mark.parametrize(
    "damage",
    [
        reweigh(embeddings=torch.zeros(5, 16)),
        reweigh(mapping=torch.arange(10_000)),
        reweigh(weights=torch.ones(3)),
        reweigh(embeddings=None, other=torch.zeros(2)),
        lambda path: (path / "model.safetensors").write_bytes(b"no"),
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: (path / "tokenizer.json").unlink(),
        lambda path: (path / "config.json").write_text("{"),
        no_tokens,
    ],
    ids=["rows", "mapping", "weights", "no table", "damaged", "missing", "no tokenizer", "config", "tokenizer"],
)
def test_files_that_do_not_fit_are_refused_in_one_line(model: StaticModel, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    saved(model, tmp_path)
    damage(tmp_path)
    with pytest.raises(EncoderError) as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
