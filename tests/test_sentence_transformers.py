"""Encoders in the format of sentence-transformers give the vectors that its own library gives, or are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dropout, Normalize
from torch import nn
from transformers import BertTokenizer

from embell import Encoder, EncoderError
from sentence_models import HIDDEN, KINDS, MINILM, POSITIONS, dense, layer_norm, plain_directory, qwen3, save

TEXTS = [
    "The river rose over night and took the old bridge with it.",
    "",
    "x",
    "  Two spaces  inside,\nand a line\t",
    "Café owners in Zürich pay MORE rent than those in Łódź. é 漢字 🙂",
    "A decoder reads its text from left to right, one token after another. " * 3,
    "vectors keep the meaning " * 120,
]
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: plain_directory(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def assert_same(directory: Path, theirs: SentenceTransformer, texts: list[str] = TEXTS) -> Encoder:
    """Raw vectors and those of length 1; of queries too, where they get another prompt."""
    encoder = Encoder.load(directory, dtype="float32", device="cpu")
    kinds = ("document", "query") if any(theirs.prompts.values()) else ("document",)
    for kind in kinds:
        encode = theirs.encode_query if kind == "query" else theirs.encode_document
        expected = encode(texts, batch_size=3, show_progress_bar=False)
        assert expected.shape[1] == encoder.dim == theirs.get_embedding_dimension()
        np.testing.assert_allclose(encoder.encode(texts, kind, normalize=False), expected, atol=1e-5, rtol=1e-5)
        unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(encoder.encode(texts, kind), unit, atol=1e-5)
    return encoder


def test_all_minilm_l6_v2_gives_the_vectors_of_sentence_transformers() -> None:
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    encoder = assert_same(MINILM, theirs, [*TEXTS, TEXTS[4] * 20])
    assert (encoder.dim, encoder.spec.max_length, encoder.spec.start_layer) == (384, 256, 0)
    np.testing.assert_allclose(encoder.encode(TEXTS[:3], "query"), theirs.encode_query(TEXTS[:3]), atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_pooling(plain: dict[str, Path], tmp_path: Path, pooling: str) -> None:
    assert_same(tmp_path, save(tmp_path, plain["bert"], pooling=pooling))


@pytest.mark.parametrize("kind", KINDS)
def test_each_architecture_with_all_poolings_side_by_side(plain: dict[str, Path], tmp_path: Path, kind: str) -> None:
    theirs = save(tmp_path, plain[kind], pooling=POOLINGS)
    assert assert_same(tmp_path, theirs).dim == len(POOLINGS) * HIDDEN


def test_the_first_token_of_a_causal_model_is_refused(plain: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path, plain["qwen3"], pooling="cls")
    with pytest.raises(EncoderError, match="first token"):
        Encoder.load(tmp_path)


def test_a_qwen3_embedding_model_with_its_prompts(plain: dict[str, Path], tmp_path: Path) -> None:
    theirs = qwen3(tmp_path, plain["qwen3"])
    assert theirs.tokenizer.padding_side == "left"
    encoder = assert_same(tmp_path, theirs)
    assert encoder.spec.start_layer is None
    texts = TEXTS[:1]
    assert np.abs(encoder.encode(texts) - encoder.encode(texts, "query")).max() > 1e-2


def test_an_encoder_that_says_so_can_be_made_bidirectional(plain: dict[str, Path], tmp_path: Path) -> None:
    theirs = qwen3(tmp_path, plain["qwen3"])
    expected = theirs.encode(TEXTS, show_progress_bar=False)
    assert np.abs(Encoder.load(tmp_path, start_layer=1, dtype="float32").encode(TEXTS) - expected).max() > 1e-2


PROMPTS = {"query": "Ask: ", "document": "Read this text here: "}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_pooling_leaves_out(plain: dict[str, Path], tmp_path: Path, kind: str) -> None:
    theirs = save(tmp_path, plain[kind], pooling=POOLINGS, include_prompt=False, prompts=PROMPTS)
    without = assert_same(tmp_path, theirs)
    with_it = Encoder.load(tmp_path, pooled_tokens="all", dtype="float32")
    for at, pooling in enumerate(POOLINGS):
        part = slice(at * HIDDEN, (at + 1) * HIDDEN)
        one, two = (encoder.encode(TEXTS[:1], "query", normalize=False)[:, part] for encoder in (without, with_it))
        assert (np.abs(one - two).max() > 1e-3) == (pooling != "lasttoken"), pooling


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        (PROMPTS, None),
        ({"query": "q: ", "passage": "p: "}, None),
        ({"query": "q: ", "corpus": "c: "}, None),
        ({"classify": "Sort this: "}, "classify"),
        ({"query": "q: ", "classify": "Sort this: "}, "classify"),
        ({"query": "q: ", "document": "d: "}, "query"),
        ({}, None),
    ],
)
@pytest.mark.parametrize("all_written", [True, False])
def test_prompts_are_chosen_as_the_library_chooses_them(
    plain: dict[str, Path], tmp_path: Path, prompts: dict[str, str], default: str | None, all_written: bool
) -> None:
    save(tmp_path, plain["bert"], prompts=prompts, default_prompt_name=default)
    if not all_written:  # as versions before 5 wrote them: without those that are empty
        change(tmp_path / "config_sentence_transformers.json", lambda card: card.update(prompts=prompts))
    encoder = assert_same(tmp_path, SentenceTransformer(str(tmp_path), device="cpu"), TEXTS[:2])
    unused = [name for name in ("passage", "corpus", "classify") if name in prompts]
    assert [name in note for name in unused for note in encoder.notes] == [True] * len(unused)


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "normalise": lambda: [Normalize()],
    "tanh": lambda: [dense()],
    "identity": lambda: [dense(outputs=8, activation_function=nn.Identity()), Normalize()],
    "no activation": lambda: [dense(activation_function=None, bias=False)],
    "gelu": lambda: [dense(outputs=48, activation_function=nn.GELU())],
    "residual": lambda: [dense(use_residual=True), Normalize()],
    "residual, projected": lambda: [dense(outputs=12, use_residual=True)],
    "layer norm": lambda: [layer_norm(), Normalize()],
    "all": lambda: [dense(outputs=24), layer_norm(24), Dropout(0.5), dense(24, 16, activation_function=nn.ReLU()), Normalize()],
}


@pytest.mark.parametrize("head", HEADS)
def test_what_follows_pooling(plain: dict[str, Path], tmp_path: Path, head: str) -> None:
    assert_same(tmp_path, save(tmp_path, plain["bert"], *HEADS[head]()), TEXTS[:5])


def test_normalising_does_not_change_what_a_search_reads(plain: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path / "raw", plain["bert"])
    save(tmp_path / "unit", plain["bert"], Normalize())
    raw, unit = (Encoder.load(tmp_path / name, dtype="float32") for name in ("raw", "unit"))
    np.testing.assert_allclose(raw.encode(TEXTS), unit.encode(TEXTS), atol=1e-6)
    assert np.linalg.norm(raw.encode(TEXTS, normalize=False), axis=1).min() > 1.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [None, 9])
def test_long_texts_are_cut_where_the_library_cuts_them(
    plain: dict[str, Path], tmp_path: Path, kind: str, longest: int | None
) -> None:
    prompts = {"query": "Ask: "}
    theirs = save(tmp_path, plain[kind], prompts=prompts, transformer={"max_seq_length": longest})
    assert assert_same(tmp_path, theirs).spec.max_length == (longest or POSITIONS)


def test_the_tokenizer_s_own_length_holds_if_nothing_else_does(plain: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path, plain["bert"])
    change(tmp_path / "tokenizer_config.json", lambda config: config.update(model_max_length=11))
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    assert assert_same(tmp_path, theirs).spec.max_length == theirs.max_seq_length == 11


def test_positions_that_the_model_keeps_for_itself_are_not_given_to_texts(plain: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path, plain["xlm-r"])
    change(tmp_path / "tokenizer_config.json", lambda config: config.pop("model_max_length"))
    change(tmp_path / "sentence_bert_config.json", lambda config: config.pop("max_seq_length", None))
    encoder = Encoder.load(tmp_path, dtype="float32")
    assert encoder.spec.max_length == POSITIONS
    assert np.isfinite(encoder.encode(TEXTS)).all()


def test_a_model_that_cuts_at_the_left_keeps_the_end_of_a_text_but_not_at_the_cost_of_its_prompt(
    plain: dict[str, Path], tmp_path: Path
) -> None:
    save(tmp_path, plain["bert"])
    change(tmp_path / "tokenizer_config.json", lambda config: config.update(truncation_side="left"))
    encoder = Encoder.load(tmp_path, dtype="float32")
    assert "lose their beginning" in encoder.notes[0]
    texts = ["one two three four five six seven eight nine ten " * 30, "short"]
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)
    change(tmp_path / "config_sentence_transformers.json", lambda config: config.update(prompts={"document": "passage: "}))
    assert "lose their end, or the tokenizer would cut off the prompt" in Encoder.load(tmp_path).notes[0]


def test_text_is_lower_cased_if_the_model_says_so(plain: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path, plain["bert"])
    options(do_lower_case=True)(tmp_path)  # as older versions wrote it; newer ones write it into the tokenizer
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    encoder = assert_same(tmp_path, theirs, ["A RIVER in Łódź", "a river in łódź"])
    one, two = encoder.encode(["A RIVER", "a river"])
    np.testing.assert_array_equal(one, two)


def test_lower_case_is_saved_whatever_the_class_of_the_tokenizer(plain: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path / "model", plain["bert"])
    words = {
        word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "river", "River", "a", "A"])
    }
    BertTokenizer(vocab=words, do_lower_case=False).save_pretrained(tmp_path / "model")  # makes its own normalizer at each start
    options(do_lower_case=True)(tmp_path / "model")
    encoder = Encoder.load(tmp_path / "model", dtype="float32")
    texts = ["A River", "a river", "RIVER"]
    expected = encoder.encode(texts)
    np.testing.assert_array_equal(expected[0], expected[1])
    encoder.save(tmp_path / "saved")
    np.testing.assert_allclose(Encoder.load(tmp_path / "saved", dtype="float32").encode(texts), expected, atol=1e-6)


def test_a_model_cut_to_fewer_components(plain: dict[str, Path], tmp_path: Path) -> None:
    theirs = save(tmp_path, plain["bert"], Normalize(), truncate_dim=10)
    assert theirs.truncate_dim == 10
    assert assert_same(tmp_path, theirs).dim == 10


def test_files_of_older_versions(plain: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path, plain["bert"], pooling=("cls", "mean"))
    switches = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN, **switches}))
    names = {"Transformer": "sentence_transformers.models.Transformer", "Pooling": "sentence_transformers.models.Pooling"}
    change(tmp_path / "modules.json", lambda modules: [m.update(type=names[m["type"].split(".")[-1]]) for m in modules])
    folder = tmp_path / "0_Transformer"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(folder / name)
    (tmp_path / "sentence_bert_config.json").unlink()
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    change(tmp_path / "modules.json", lambda modules: modules[0].update(path="0_Transformer"))
    (tmp_path / "config_sentence_transformers.json").unlink()
    assert assert_same(tmp_path, SentenceTransformer(str(tmp_path), device="cpu")).spec.pooling == "cls+mean"


@pytest.mark.parametrize("kind", [*KINDS, "minilm"])
def test_order_batch_neighbours_and_padding_side_do_not_change_a_vector(
    plain: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    directory = MINILM
    if kind != "minilm":
        qwen3(tmp_path, plain[kind]) if kind == "qwen3" else save(tmp_path, plain[kind], pooling=("mean", "max"))
        directory = tmp_path
    encoder = Encoder.load(directory, dtype="float32")
    together = encoder.encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(encoder.encode([TEXTS[i] for i in order]), together[order], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([encoder.encode(text) for text in TEXTS]), together, atol=1e-5)
    small = Encoder.load(directory, dtype="float32", batch_tokens=20)
    np.testing.assert_allclose(small.encode(TEXTS), together, atol=1e-5)
    for side in ("left", "right"):  # absolute positions would move with the padding
        encoder.tokenizer.padding_side = side
        np.testing.assert_allclose(encoder.encode(TEXTS), together, atol=1e-5)


def change(path: Path, how: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def retype(number: int, name: str) -> Callable[[Path], None]:
    return lambda directory: change(directory / "modules.json", lambda modules: modules[number].update(type=name))


def options(**values: Any) -> Callable[[Path], None]:
    return lambda directory: change(directory / "sentence_bert_config.json", lambda config: config.update(values))


def in_dense(**values: Any) -> Callable[[Path], None]:
    return lambda directory: change(directory / "2_Dense/config.json", lambda config: config.update(values))


def in_pooling(**values: Any) -> Callable[[Path], None]:
    return lambda directory: change(directory / "1_Pooling/config.json", lambda config: config.update(values))


def card(**values: Any) -> Callable[[Path], None]:
    return lambda directory: change(directory / "config_sentence_transformers.json", lambda config: config.update(values))


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content)


def modules(how: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: change(directory / "modules.json", how)


CHAT = {"message": {"method": "forward", "method_output_name": "last_hidden_state", "format": "flat"}}
POOLER = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
UNKNOWN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "CLIP": (retype(0, "sentence_transformers.models.CLIPModel"), "CLIPModel"),
    "router": (retype(0, "sentence_transformers.base.modules.router.Router"), "Router"),
    "word embeddings": (retype(0, "sentence_transformers.models.WordEmbeddings"), "WordEmbeddings"),
    "another module": (retype(2, "sentence_transformers.models.CNN"), "CNN"),
    "the model's own code": (retype(0, "custom_st.Transformer"), "custom_st.Transformer"),
    "the model's own pooling": (retype(1, "custom_st.Pooling"), "custom_st.Pooling"),
    "no pooling": (modules(lambda listed: listed.pop(1)), "Pooling"),
    "two poolings": (modules(lambda listed: listed.insert(1, listed[1])), "Pooling"),
    "pooling last": (modules(lambda listed: listed.append(listed.pop(1))), "Pooling"),
    "activation": (in_dense(activation_function="mine.Activation"), "mine.Activation"),
    "no such activation": (in_dense(activation_function="torch.nn.modules.activation.Nothing"), "Nothing"),
    "an activation that takes arguments": (in_dense(activation_function="torch.nn.modules.activation.Threshold"), "Threshold"),
    "no layer": (in_dense(activation_function="torch.nn.modules.activation.torch"), "'torch'"),
    "an activation without a name": (in_dense(activation_function=None), "None"),
    "another place for the result": (in_dense(module_output_name="other"), "other"),
    "tokens, not sentences": (in_dense(module_input_name="token_embeddings"), "token_embeddings"),
    "normalised tokens": (write("3_Normalize/config.json", '{"module_input_name": "token_embeddings"}'), "token_embeddings"),
    "widths that do not fit": (in_dense(in_features=7), "2_Dense"),
    "an unknown pooling": (in_pooling(pooling_mode="attention"), "attention"),
    "an option of pooling": (in_pooling(pooling_mode_magic=True), "pooling_mode_magic"),
    "chat template": (options(modality_config=CHAT), "chat template"),
    "another output": (options(modality_config=POOLER, module_output_name="sentence_embedding"), "pooler_output"),
    "another output of the model": (options(modality_config=POOLER), "pooler_output"),
    "another task": (options(transformer_task="fill-mask"), "fill-mask"),
    "query expansion": (options(query_expansion={"length": 32}), "query_expansion"),
    "lengths for queries": (options(query_length=12), "query_length"),
    "tokenizer options": (options(processor_kwargs={"truncation_side": "left"}), "truncation_side"),
    "prompt": (card(default_prompt_name="missing"), "missing"),
    "a slot in a prompt": (card(prompts={"query": "{text} is:"}), "is:"),
    "head weights": (lambda directory: (directory / "2_Dense/model.safetensors").unlink(), "2_Dense"),
    "damaged head weights": (write("2_Dense/model.safetensors", "no"), "2_Dense"),
    "no configuration": (lambda directory: (directory / "2_Dense/config.json").unlink(), "2_Dense"),
    "damaged modules.json": (write("modules.json", '[{"idx": 0,'), "modules.json"),
    "no modules": (write("modules.json", "[]"), "modules.json"),
    "no list": (write("modules.json", '{"type": 3}'), "modules.json"),
    "no path": (modules(lambda listed: listed[1].pop("path")), "modules.json"),
    "damaged options": (write("sentence_bert_config.json", "{"), "sentence_bert_config.json"),
    "damaged pooling": (write("1_Pooling/config.json", "{"), "1_Pooling"),
    "damaged prompts": (write("config_sentence_transformers.json", "[]"), "config_sentence_transformers.json"),
    "prompts that are none": (card(prompts=["query"]), "prompts"),
}


@pytest.fixture(scope="module")
def saved(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    save(path, plain["bert"], dense(), Normalize())
    return path


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_embell_cannot_do_is_refused_in_one_line(saved: Path, tmp_path: Path, what: str) -> None:
    break_it, named = UNKNOWN[what]
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    break_it(directory)
    with pytest.raises(EncoderError) as caught:
        Encoder.load(directory, dtype="float32")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
