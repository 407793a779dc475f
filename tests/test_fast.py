"""The fast path against transformers: every family that it knows, any lengths, any start layer; and where it must stand back."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from embell import EncoderError
from embell.engine import bellm, fast_files, fast_llama, packed
from embell.engine.backbone import EMBEDDED_MODEL, load_tokenizer
from embell.engine.fast_files import probe, read_network
from embell.engine.packed import SHORT, Packing, attend
from embell.engine.tokenizer import read_tokenizer
from sentence_models import _tokenizer
from tiny_models import SENTENCES, tiny_encoder_directory, tiny_model

VOCABULARY = 97


DECODERS = ("llama", "llama-biased", "mistral-full", "mistral-window", "qwen2", "qwen3", "llama-one-head")


ENCODERS = ("bert", "bert-tanh", "bert-relu", "roberta", "xlm-roberta")


CPU = torch.device("cpu")


def model_of(kind: str) -> PreTrainedModel:
    """A tiny random model whose every weight matters."""
    if kind in ENCODERS:
        shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        shape |= {"vocab_size": VOCABULARY, "max_position_embeddings": 130, "initializer_range": 0.2}
        if kind == "bert-tanh":
            shape["hidden_act"] = "gelu_new"
        if kind == "bert-relu":
            shape["hidden_act"] = "relu"
        config = {"roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig}.get(kind, BertConfig)(**shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModel.from_config(config)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight) * 0.1)
        return model.eval()
    changes: dict[str, Any] = {}
    if kind == "llama-biased":
        changes = {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    if kind == "llama-one-head":
        changes = {"num_key_value_heads": 1, "head_dim": 6}
    if kind == "mistral-window":
        changes = {"sliding_window": 60}
    return tiny_model("mistral" if kind == "mistral-window" else kind.split("-")[0] if "llama" in kind else kind, **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    found = {}
    for kind in (*DECODERS, *ENCODERS):
        directory = tmp_path_factory.mktemp(kind)
        model = model_of(kind)
        model.save_pretrained(directory)
        found[kind] = (directory, model)
    return found


def reference(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """The last states of each row by itself."""
    with torch.inference_mode():
        return [model(input_ids=row.unsqueeze(0)).last_hidden_state[0] for row in rows]


def fast(network: fast_files.FastNetwork, rows: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        states = list(network.states(torch.cat(rows), Packing(tuple(map(len, rows)), CPU)))
    assert len(states) == network.layers + 1
    return list(states[-1].float().split([len(row) for row in rows]))


def rows_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


LENGTHS = [60, 60, SHORT + 1, SHORT, SHORT, 17, 17, 17, 2, 1, 1]


@pytest.mark.parametrize("start", [None, 0, 2, -1])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_give_the_states_of_transformers(models: Any, kind: str, start: int | None) -> None:
    directory, model = models[kind]
    network = read_network(directory, torch.float32, CPU, None, start)
    assert network is not None
    probe(network)
    undo = bellm.make_bidirectional(model, network.start)
    rows = rows_of(LENGTHS)
    try:
        expected = reference(model, rows)
    finally:
        undo()
    for one, other in zip(fast(network, rows), expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_give_the_states_of_transformers(models: Any, kind: str) -> None:
    directory, model = models[kind]
    network = read_network(directory, torch.float32, CPU, None, None)
    assert network is not None
    probe(network)
    rows = rows_of(LENGTHS)
    rows[0][3:5] = rows[5][0] = 1  # RoBERTa's padding token in the middle of a text gets no position
    for one, other in zip(fast(network, rows), reference(model, rows), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.sampled_from(DECODERS), st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=25)
def test_a_text_s_states_do_not_depend_on_its_neighbours(
    models: Any, lengths: list[int], kind: str, start: int, seed: int
) -> None:
    network = read_network(models[kind][0], torch.float32, CPU, None, start if start < 4 else None)
    assert network is not None
    rows = rows_of(sorted(lengths, reverse=True), seed)
    for row, together in zip(rows, fast(network, rows), strict=True):
        torch.testing.assert_close(fast(network, [row])[0], together, atol=1e-5, rtol=1e-5)


@given(
    lengths=st.lists(st.integers(1, SHORT + 30), min_size=1, max_size=9),
    shared=st.integers(1, 3),
    each=st.integers(1, 3),
    width=st.sampled_from([2, 8, 20]),
    causal=st.booleans(),
    size=st.sampled_from([1.0, 30.0]),
)
@settings(max_examples=60)
def test_attention_is_softmax_of_products_within_each_text(
    lengths: list[int], shared: int, each: int, width: int, causal: bool, size: float
) -> None:
    lengths = sorted(lengths, reverse=True)
    generator = torch.Generator().manual_seed(sum(lengths))
    heads = shared * each
    q, k, v = (torch.randn(sum(lengths), count, width, generator=generator) for count in (heads, shared, shared))
    found = attend(q * size, k, v, Packing(tuple(lengths), CPU), causal).view(-1, heads, width)
    begin = 0
    for length in lengths:
        here = slice(begin, begin + length)
        for head in range(heads):
            scores = (q[here, head].double() * size) @ k[here, head // each].double().T / width**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
            expected = scores.softmax(-1) @ v[here, head // each].double()
            torch.testing.assert_close(found[here, head].double(), expected, atol=2e-4, rtol=1e-4)
        begin += length


@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert"])
def test_bf16_stays_close_to_float32(models: Any, kind: str) -> None:
    directory, _ = models[kind]
    exact, rounded = (read_network(directory, dtype, CPU, None, None) for dtype in (torch.float32, torch.bfloat16))
    assert exact is not None
    assert rounded is not None
    rows = rows_of(LENGTHS)
    for one, other in zip(fast(exact, rows), fast(rounded, rows), strict=True):
        assert torch.nn.functional.cosine_similarity(one.mean(0), other.mean(0), dim=0) > 0.999


def test_the_first_layers_alone(models: Any) -> None:
    directory, model = models["llama"]
    network = read_network(directory, torch.float32, CPU, 2, None)
    assert network is not None
    assert network.layers == 2
    (row,) = rows = rows_of([9])
    with torch.inference_mode():
        second = model(input_ids=row.unsqueeze(0), output_hidden_states=True).hidden_states[2]
        expected = model.norm(second)[0]
    torch.testing.assert_close(fast(network, rows)[0], expected, atol=2e-5, rtol=1e-5)


def test_shards_and_the_names_within_a_whole_language_model(models: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, model = models["llama"]
    whole = AutoModelForCausalLM.from_config(model.config)
    whole.model.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    network = read_network(tmp_path, torch.float32, CPU, None, None)
    assert network is not None
    rows = rows_of([7, 3])
    for one, other in zip(fast(network, rows), reference(model, rows), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def configuration_changes() -> list[dict[str, Any]]:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    return [
        {"rope_parameters": scaled},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"hidden_act": "tanh"},
        {"attention_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"logit_cap": 5.0},
        {"num_hidden_layers": 5},
        {"hidden_size": 64},
        {"vocab_size": VOCABULARY + 1},
        {"head_dim": 16},
        {"model_type": "gemma"},
        {"num_key_value_heads": "2"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"max_position_embeddings": -1},
        {"rope_theta": 0.0, "rope_parameters": None},
        {"rope_parameters": ["default"]},
    ]


@pytest.mark.parametrize("change", configuration_changes(), ids=str)
def test_what_is_not_understood_is_left_to_transformers(models: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    directory, _ = models["llama"]
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_network(tmp_path, torch.float32, CPU, None, None) is not None
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert read_network(tmp_path, torch.float32, CPU, None, None) is None


def test_damaged_and_missing_files_are_left_to_transformers(models: Any, tmp_path: Path) -> None:
    directory, _ = models["llama"]
    assert read_network(tmp_path, torch.float32, CPU, None, None) is None
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    assert read_network(tmp_path, torch.float32, CPU, None, None) is None
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:5000])
    assert read_network(tmp_path, torch.float32, CPU, None, None) is None


@pytest.mark.parametrize(
    ("kind", "made"),
    [("llama", LlamaConfig), ("mistral", MistralConfig), ("qwen2", Qwen2Config), ("qwen3", Qwen3Config)],
)
def test_what_a_configuration_leaves_out_is_what_transformers_takes(kind: str, made: Any) -> None:
    needed = {"hidden_size": 256, "intermediate_size": 48, "num_attention_heads": 32, "num_hidden_layers": 3, "vocab_size": 97}
    theirs = made(**needed)
    shape = fast_files._llama_shape(fast_files._Config(needed), kind)
    assert shape.shared == theirs.num_key_value_heads
    assert shape.width == (getattr(theirs, "head_dim", None) or 8)
    assert shape.epsilon == theirs.rms_norm_eps
    assert shape.theta == theirs.rope_parameters["rope_theta"]
    assert shape.positions == theirs.max_position_embeddings
    assert shape.activation == theirs.hidden_act
    assert shape.bias_in == (kind == "qwen2" or getattr(theirs, "attention_bias", False))
    assert shape.window == (theirs.sliding_window if kind == "mistral" else None)


def test_the_short_way_is_taken_and_the_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("_attend_short", "_attend_long"):
        inner = getattr(packed, name)
        monkeypatch.setattr(packed, name, lambda *args, name=name, inner=inner: taken.append(name) or inner(*args))
    heads = torch.randn(SHORT + 1 + SHORT, 2, 4)
    attend(heads, heads, heads, Packing((SHORT + 1, SHORT), CPU), True)
    assert taken == ["_attend_long", "_attend_short"]


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer puts a token of its own at the end of each text."""
    directory = tiny_encoder_directory(tmp_path_factory.mktemp("tokenizer"), "llama")
    _tokenizer("qwen3").save_pretrained(directory)
    return directory


@functools.cache
def _both_tokenizers(directory: Path) -> tuple[Any, Any]:
    """Ours and that of transformers, which agree in all but the ids of a text, which are yet to be compared."""
    ours, theirs = read_tokenizer(directory), load_tokenizer(directory)
    assert ours is not None
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    assert (ours.pad_token_id, ours.truncation_side) == (theirs.pad_token_id, theirs.truncation_side)
    assert ours.model_max_length == theirs.model_max_length
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    return ours, theirs


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(SENTENCES), max_size=5))
@settings(max_examples=60)
def test_tokens_from_files_are_those_of_transformers(llama_directory: Path, parts: list[str]) -> None:
    text = "<pad>".join(parts)
    for directory in (EMBEDDED_MODEL, llama_directory):
        ours, theirs = _both_tokenizers(directory)
        assert ours.backend_tokenizer.encode(text).ids == theirs(text, verbose=False)["input_ids"]


@pytest.mark.parametrize(
    "change",
    [
        {"add_bos_token": True}, {"add_eos_token": True}, {"tokenizer_class": "LlamaTokenizer"}, {"unk_token": "<never>"},
        {"extra_special_tokens": ["<one>"]}, {"pad_token": {"content": "<pad>"}}, {"split_special_tokens": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_that_says_more_is_left_to_transformers(
    llama_directory: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((llama_directory / name).read_bytes())
    assert read_tokenizer(tmp_path) is not None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
    assert read_tokenizer(tmp_path) is None


def saved_as(directory: Path, model: PreTrainedModel, names: dict[str, str] | None = None, **changes: Any) -> Path:
    """The model with other keys in its configuration, and weights under further names."""
    directory.mkdir()
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")
    save_file(weights | {new: weights[old] * 2 for new, old in (names or {}).items()}, directory / "model.safetensors")
    return directory


def test_what_transformers_reads_otherwise_or_not_at_all(models: Any, tmp_path: Path) -> None:
    llama, bert, roberta, qwen = (models[kind][1] for kind in ("llama", "bert", "roberta", "qwen2"))
    embeddings = "embeddings.word_embeddings.weight"
    cases = [
        saved_as(tmp_path / "twice", llama, {"model.embed_tokens.weight": "embed_tokens.weight"}),
        saved_as(tmp_path / "other", bert, {f"roberta.{embeddings}": embeddings}),
        saved_as(tmp_path / "null", qwen, head_dim=None),
        *(saved_as(tmp_path / f"pad {pad}", roberta, pad_token_id=pad) for pad in (None, -1, "1")),
    ]
    for directory in cases:
        assert read_network(directory, torch.float32, CPU, None, None) is None, directory
    for shards in ([], None, {"norm.weight": 3}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        (tmp_path / "config.json").write_bytes((cases[0] / "config.json").read_bytes())
        assert read_network(tmp_path, torch.float32, CPU, None, None) is None


def test_positions_at_the_end_of_a_long_text(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
    }
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**shape, max_position_embeddings=4096, rope_parameters=rope, initializer_range=0.2)
        model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    network = read_network(tmp_path, torch.float32, CPU, None, None)
    assert network is not None
    rows = rows_of([3000])
    torch.testing.assert_close(fast(network, rows)[0], reference(model, rows)[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("always", [True, False])
def test_the_probe_notices_a_layer_that_looks_the_wrong_way(models: Any, monkeypatch: pytest.MonkeyPatch, always: bool) -> None:
    network = read_network(models["llama"][0], torch.float32, CPU, None, 2)
    assert network is not None
    probe(network)
    monkeypatch.setattr(fast_llama, "attend", lambda q, k, v, packing, causal: attend(q, k, v, packing, always))
    with pytest.raises(EncoderError, match="layer 2 of 4 is causal" if always else "layer 0 of 4 looks ahead"):
        probe(network)
