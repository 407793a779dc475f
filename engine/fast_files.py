"""Reading a model of a known family straight from its files, without transformers.

Only what is understood completely is read: an unknown key in the configuration, a weight too many or too few, and the answer
is None, so that the reference path loads the model or says what is wrong with it.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embell.engine.bellm import resolve_start
from embell.engine.fast_bert import BertShape, FastBert
from embell.engine.fast_llama import FastLlama, LlamaShape
from embell.engine.linear import ACTIVATIONS
from embell.engine.packed import Packing
from embell.engine.spec import read_json
from embell.errors import EncoderError

_NO_MATTER = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob",
    "bos_token_id", "classifier_dropout", "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing",
    "hidden_dropout_prob", "id2label", "initializer_range", "label2id", "max_window_layers", "model_type", "pad_token_id",
    "pretraining_tp", "problem_type", "tie_word_embeddings", "torch_dtype", "transformers.js_config", "transformers_version",
    "use_cache",
}  # fmt: skip
"""Keys of a configuration that do not change what the network computes for a text."""

_NOT_READ = ("lm_head.", "pooler.", "cls.", "rotary_emb.", "embeddings.position_ids", "embeddings.token_type_ids")
"""Weights that stand in such files and that no embedding depends on."""

_PREFIXES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "model."),
    **dict.fromkeys(("roberta", "xlm-roberta"), "roberta."),
    "bert": "bert.",
}
_LAYER = re.compile(r"^(?:encoder\.layer|layers)\.(\d+)\.")

FastNetwork = FastLlama | FastBert
_Shape = TypeVar("_Shape", BertShape, LlamaShape)


class _NotUnderstoodError(Exception):
    """The files hold something that only transformers knows."""


def read_network(
    directory: Path, dtype: torch.dtype, device: torch.device, layers: int | None, start: int | None
) -> FastNetwork | None:
    """The network of a model directory, or None if only transformers can tell what it is.

    `layers` keeps the first ones alone; `start` is the start layer of a decoder, as the settings give it.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and dtype == torch.float16):
        return None
    try:
        config = _Config(read_json(directory / "config.json"))
        kind = config.take("model_type", str)
        if kind not in _PREFIXES:
            return None
        with _Weights(directory, dtype, device, _PREFIXES[kind]) as weights:
            if kind in ("bert", "roberta", "xlm-roberta"):
                network: FastNetwork = FastBert(_kept(_bert_shape(config, kind), layers), weights.get)
            else:
                shape = _kept(_llama_shape(config, kind), layers)
                network = FastLlama(shape, weights.get, resolve_start(start, shape.layers))
            weights.check_all_read(network.layers)
    except (_NotUnderstoodError, EncoderError, SafetensorError, OSError):
        return None
    return network


@torch.inference_mode()
def probe(network: FastNetwork) -> None:
    """Check that the layers below the start layer see no later token, and that those from it on do, as `bellm.probe` does.

    Raises EncoderError if not.
    """
    first = torch.arange(6, device=network.device) % network.vocabulary
    second = first.clone()
    second[-1] = (second[-1] + network.vocabulary // 2) % network.vocabulary
    packing = Packing((6, 6), network.device)
    pairs = [list(network.states(torch.cat(pair), packing)) for pair in ((first, second), (second, first))]
    for layer, (one, other) in enumerate(zip(*pairs, strict=True), -1):
        sees_later = not torch.equal(one[4], other[4])
        if sees_later != (layer >= network.start):
            wrong = "looks ahead" if sees_later else "is causal"
            raise EncoderError(f"probe failed: layer {layer} of {network.layers} {wrong}, but the start layer is {network.start}")


def _kept(shape: _Shape, layers: int | None) -> _Shape:
    if layers is not None and not 1 <= layers <= shape.layers:
        raise _NotUnderstoodError("layers")
    return shape if layers is None else replace(shape, layers=layers)


class _Weights:
    """The tensors of a model's safetensors files, handed out by the names that the bare network gives them."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, prefix: str) -> None:
        """`prefix` is what stands before the names where the bare network is part of a model with a head."""
        self._dtype, self._device = dtype, device
        self._open = ExitStack()
        files = ["model.safetensors"]
        if not (directory / files[0]).is_file():
            places = read_json(directory / "model.safetensors.index.json").get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
                raise _NotUnderstoodError("weight_map")
            files = sorted(set(places.values()))
        self._found: dict[str, tuple[Any, str]] = {}
        for file in files:
            tensors = self._open.enter_context(safe_open(directory / file, framework="pt"))
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                bare = name.removeprefix(prefix)
                if bare in self._found:
                    raise _NotUnderstoodError(name)
                self._found[bare] = (tensors, name)
        self._read: set[str] = set()

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises _NotUnderstoodError if there is no such weight, or one of another shape or kind."""
        tensors, stored = self._found.get(name, (None, name))
        if tensors is None:
            raise _NotUnderstoodError(name)
        weight: Tensor = tensors.get_tensor(stored)
        if weight.shape != shape or not weight.is_floating_point():
            raise _NotUnderstoodError(name)
        self._read.add(name)
        return weight.to(self._device, self._dtype)

    def check_all_read(self, layers: int) -> None:
        """Raises _NotUnderstoodError if there are weights that nobody asked for, but for those of layers that are left out."""
        for name in self._found.keys() - self._read:
            layer = _LAYER.match(name)
            unread = name.startswith(_NOT_READ) or name.endswith(".rotary_emb.inv_freq")
            if not unread and not (layer and int(layer[1]) >= layers):
                raise _NotUnderstoodError(name)


class _Config:
    """A configuration whose keys are taken one by one; what nobody takes is not understood."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.padding = values.get("pad_token_id", 1)
        """RoBERTa counts positions from this token on."""
        self._left = {name: value for name, value in values.items() if name == "model_type" or name not in _NO_MATTER}

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of this type, or the default if the key is not there.

        Raises _NotUnderstoodError for another type, or if there is neither value nor default.
        """
        value = self._left.pop(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise _NotUnderstoodError(name)
        return value

    def size(self, name: str, default: Any = None) -> int:
        """A whole number from 1 on, or the default. Raises _NotUnderstoodError for anything else."""
        return _positive(self._left.pop(name, default))

    def either(self, name: str, default: Any) -> Any:
        """Whatever stands there, None included, or the default."""
        return self._left.pop(name, default)

    def must_be(self, name: str, *values: Any) -> None:
        """Raises _NotUnderstoodError for a value that is given and none of these; None always passes."""
        if self._left.pop(name, None) not in (None, *values):
            raise _NotUnderstoodError(name)

    def check_all_taken(self) -> None:
        if self._left:
            raise _NotUnderstoodError(next(iter(self._left)))


def _bert_shape(config: _Config, kind: str) -> BertShape:
    shape = BertShape(
        family=kind,
        vocabulary=config.size("vocab_size"),
        positions=config.size("max_position_embeddings", 512),
        kinds=config.size("type_vocab_size", 2),
        hidden=config.size("hidden_size"),
        layers=config.size("num_hidden_layers"),
        heads=config.size("num_attention_heads"),
        inner=config.size("intermediate_size"),
        epsilon=config.take("layer_norm_eps", float, 1e-12),
        activation=config.take("hidden_act", str, "gelu"),
        padding=None if kind == "bert" else _padding(config.padding),
    )
    config.must_be("position_embedding_type", "absolute")
    for name in ("is_decoder", "add_cross_attention"):
        config.must_be(name, False)
    config.check_all_taken()
    if shape.activation not in ACTIVATIONS or shape.hidden % shape.heads:
        raise _NotUnderstoodError("hidden_act")
    return shape


def _llama_shape(config: _Config, kind: str) -> LlamaShape:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    shared = config.either("num_key_value_heads", {"llama": None, "mistral": 8}.get(kind, 32))
    shared = heads if shared is None else _positive(shared)
    width = config.either("head_dim", {"qwen3": 128, "qwen2": hidden // heads}.get(kind))
    width = hidden // heads if width is None and kind != "qwen2" else _positive(width)
    biased = config.take("attention_bias", bool, False) if kind in ("llama", "qwen3") else False
    rope = config.either("rope_parameters", None)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise _NotUnderstoodError("rope_parameters")
    theta = rope.pop("rope_theta", None)
    if theta is None:
        theta = config.take("rope_theta", float, 10_000.0)
    if rope not in ({}, {"rope_type": "default"}) or type(theta) not in (int, float) or theta <= 0:
        raise _NotUnderstoodError("rope_parameters")
    config.must_be("rope_theta", theta)
    config.must_be("rope_scaling")
    window = config.either("sliding_window", 4096) if kind == "mistral" else None
    shape = LlamaShape(
        vocabulary=config.size("vocab_size"),
        hidden=hidden,
        layers=config.size("num_hidden_layers"),
        heads=heads,
        shared=shared,
        width=width,
        inner=config.size("intermediate_size"),
        epsilon=config.take("rms_norm_eps", float, 1e-6),
        theta=float(theta),
        positions=config.size("max_position_embeddings", {"llama": 2048, "mistral": 131_072}.get(kind, 32_768)),
        activation=config.take("hidden_act", str, "silu"),
        bias_in=biased or kind == "qwen2",
        bias_out=biased,
        bias_mlp=config.take("mlp_bias", bool, False) if kind == "llama" else False,
        norm_heads=kind == "qwen3",
        window=None if window is None else _positive(window),
    )
    if kind in ("qwen2", "qwen3"):
        config.must_be("use_sliding_window", False)
        config.either("sliding_window", None)
        config.must_be("layer_types", ["full_attention"] * shape.layers)
    config.check_all_taken()
    if shape.activation not in ACTIVATIONS or shape.heads % shape.shared or shape.width % 2:
        raise _NotUnderstoodError("hidden_act")
    return shape


def _padding(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _NotUnderstoodError("pad_token_id")
    return value


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _NotUnderstoodError(str(value))
    return value
