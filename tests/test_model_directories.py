"""Model directories that are damaged, mixed up, or bring code: one line, and never other vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from conftest import Ran, write_jsonl
from embell import Collection, Document, Encoder, EncoderError, TextError
from test_adapter import write_adapter
from tiny_models import tiny_encoder_directory

TEXTS = ["A cat.", "The river rose over night and took the old bridge with it."]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_directory(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {"format": 1}
    path.write_text(json.dumps({**content, **values}))


# --- code of the model's own


def test_code_that_a_model_brings_is_never_run_whatever_stands_on_stdin(copy: Path, tmp_path: Path, embell: Any) -> None:
    ran = tmp_path / "ran"
    (copy / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    change(copy / "config.json", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}, model_type="mine")
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Model", "mine.Model"]})
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": "1", "text": "a text"}])
    for source, typed in ((corpus, "y\n" * 9), ("-", "y\n" * 9)):
        result: Ran = embell("encode", source, "--output", tmp_path / "o.npy", "--model", copy, input=typed)
        assert result.status == 1
        assert result.out == ""
    assert not ran.exists()


def test_code_of_its_own_for_a_known_type_is_told_or_refused(copy: Path) -> None:
    """Transformers takes its own class for a type that it knows, without a word: of an embedding model that means other vectors."""
    change(copy / "config.json", auto_map={"AutoModel": "modeling_mine.MineModel"})
    assert any("modeling_mine.MineModel), which is not run" in note for note in Encoder.load(copy).notes)
    (copy / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}])
    )  # fmt: skip
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}')
    with pytest.raises(EncoderError, match=r"code of its own \(modeling_mine\.MineModel\), which is never run"):
        Encoder.load(copy)


# --- a model and an adapter in one place


def test_a_directory_with_a_model_and_an_adapter_is_refused(base: Path, copy: Path, tmp_path: Path) -> None:
    write_adapter(base, copy)
    with pytest.raises(EncoderError, match="holds a model and an adapter"):
        Encoder.load(copy)
    adapter = write_adapter(base, tmp_path / "adapter")
    with pytest.raises(EncoderError, match="holds a model already"):
        Encoder.load(base, adapter=adapter).save(copy)
    with pytest.raises(EncoderError, match="holds an adapter"):
        Encoder.load(base, adapter=adapter, merge_adapter=True).save(adapter)


def test_what_decides_an_adapters_vectors_is_in_the_fingerprint(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "adapter")
    before = Encoder.load(base, adapter=adapter).spec
    change(adapter / "adapter_config.json", base_model_name_or_path="elsewhere/model")
    assert not before.differences(Encoder.load(base, adapter=adapter).spec)
    change(adapter / "adapter_config.json", lora_alpha=80)
    assert before.differences(Encoder.load(base, adapter=adapter).spec) == ["fingerprint"]
    change(adapter / "adapter_config.json", lora_alpha=8)
    shutil.copy(base / "tokenizer.json", adapter)
    shutil.copy(base / "tokenizer_config.json", adapter)
    change(adapter / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert before.differences(Encoder.load(base, adapter=adapter).spec) == ["fingerprint"]


def test_sentence_transformers_with_an_adapter_keeps_its_pooling_and_prompts(base: Path, tmp_path: Path) -> None:
    transformer = Transformer(str(base), max_seq_length=20)
    theirs = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "weightedmean"), Normalize()],
        prompts={"query": "find: "}, device="cpu",
    )  # fmt: skip
    theirs.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    theirs.save(str(tmp_path))
    encoder = Encoder.load(tmp_path, dtype="float32")
    assert (encoder.spec.pooling, encoder.spec.max_length) == ("weighted-mean", 20)
    np.testing.assert_allclose(encoder.encode([*TEXTS, TEXTS[1] * 9]), theirs.encode([*TEXTS, TEXTS[1] * 9]), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS, "query"), theirs.encode_query(TEXTS), atol=1e-5)
    encoder.save(tmp_path / "again")
    np.testing.assert_allclose(Encoder.load(tmp_path / "again", dtype="float32").encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)


# --- files that hold something else


@pytest.mark.parametrize(
    "values",
    [
        {"pooling": 5}, {"pooling": None}, {"max_length": "512"}, {"max_length": 5.5}, {"max_length": True}, {"dim": "3"},
        {"start_layer": "none"}, {"start_layer": True}, {"query_prompt": 5}, {"query_prompt": [5]}, {"document_prompt": []},
        {"layers": 2.0}, {"token_prepending": ["a", "b"]}, {"token_prepending": [1]}, {"head": "x"}, {"head": [5]},
        {"head": [{"kind": ["x"]}]}, {"head": None}, {"cleanup": None}, {"on_long": 3}, {"languages": "en"},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_of_the_wrong_type_is_named(copy: Path, values: dict[str, Any]) -> None:
    change(copy / "embell.json", **values)
    with pytest.raises(EncoderError) as caught:
        Encoder.load(copy)
    assert next(iter(values)).removesuffix("_prompt") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_token_that_the_model_has_no_vector_for_harms_only_texts_that_hold_it(copy: Path) -> None:
    tokens = json.loads((copy / "tokenizer.json").read_text())
    size = json.loads((copy / "config.json").read_text())["vocab_size"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    extra = [{"id": size - 1, "content": "<last>", **plain}, {"id": size, "content": "<image>", **plain}]
    change(copy / "tokenizer.json", added_tokens=[*tokens["added_tokens"], *extra])
    encoder = Encoder.load(copy, dtype="float32")
    assert encoder.encode(TEXTS).shape == (2, encoder.dim)
    with pytest.raises(TextError, match="text 2 holds a token that the tokenizer knows and the model does not"):
        encoder.encode(["a", "an <image> of it"])


def test_options_that_would_do_nothing_are_refused(base: Path, tmp_path: Path, embell: Any) -> None:
    for options, message in (({"merge_adapter": True}, "no adapter to merge"), ({"revision": "main"}, "for models of the hub")):
        with pytest.raises(EncoderError, match=message):
            Encoder.load(base, **options)  # type: ignore[arg-type]
    with pytest.raises(EncoderError, match="device 'meta'"):
        Encoder.load(base, device="meta")
    given = Collection.create(tmp_path / "given.embell", None, dim=2)
    given.add([Document("1", "a text", vector=[1.0, 0.0])])
    embell("search", tmp_path / "given.embell", "x", "--layers", "2").fails(2, "--layers", "--model")
