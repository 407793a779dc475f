"""The Llama family without transformers: Llama, Mistral, Qwen2, Qwen3, on packed batches.

The same arithmetic as transformers' modules, with BeLLM's start layer built in: layers below it are causal, the others look
both ways. The transformers path is the reference that this is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from embell.engine.linear import Linear
from embell.engine.packed import Packing, attend

Get = Callable[[str, tuple[int, ...]], Tensor]
"""Hands out the weight of a name and shape."""


@dataclass(frozen=True)
class LlamaShape:
    """What the configuration says. `shared` is the number of key-value heads, `window` how far attention reaches, if limited."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    shared: int
    width: int
    inner: int
    epsilon: float
    theta: float
    positions: int
    activation: str
    bias_in: bool = False
    bias_out: bool = False
    bias_mlp: bool = False
    norm_heads: bool = False
    window: int | None = None


class _Layer:
    def __init__(self, shape: LlamaShape, get: Get, prefix: str) -> None:
        hidden, inner = shape.hidden, shape.inner
        sizes = [shape.heads * shape.width, shape.shared * shape.width, shape.shared * shape.width]
        names = [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
        heads = [shape.heads, shape.shared, 0]
        weights = [get(f"{name}.weight", (size, hidden)) for name, size in zip(names, sizes, strict=True)]
        joined = torch.cat([_paired(weight, count) for weight, count in zip(weights, heads, strict=True)])
        bias = None
        if shape.bias_in:
            biases = [get(f"{name}.bias", (size,)) for name, size in zip(names, sizes, strict=True)]
            bias = torch.cat([_paired(part, count) for part, count in zip(biases, heads, strict=True)])
        self.qkv = Linear(joined, bias)
        self.out = _linear(get, f"{prefix}self_attn.o_proj", hidden, sizes[0], shape.bias_out)
        self.gate = _linear(get, f"{prefix}mlp.gate_proj", inner, hidden, shape.bias_mlp)
        self.up = _linear(get, f"{prefix}mlp.up_proj", inner, hidden, shape.bias_mlp)
        self.down = _linear(get, f"{prefix}mlp.down_proj", hidden, inner, shape.bias_mlp)
        self.before_attention = get(f"{prefix}input_layernorm.weight", (hidden,))
        self.before_mlp = get(f"{prefix}post_attention_layernorm.weight", (hidden,))
        self.norms: tuple[Tensor, Tensor] | None = None
        if shape.norm_heads:
            query, key = (_paired(get(f"{prefix}self_attn.{name}_norm.weight", (shape.width,)), 1) for name in "qk")
            self.norms = (query, key)


class FastLlama:
    """A decoder of the family. `start` is the first layer that looks both ways; `start == layers` means none."""

    decoder = True

    def __init__(self, shape: LlamaShape, get: Get, start: int) -> None:
        self.shape, self.start = shape, start
        self._tokens = get("embed_tokens.weight", (shape.vocabulary, shape.hidden))
        self.hidden, self.layers, self.vocabulary = shape.hidden, shape.layers, shape.vocabulary
        self.positions, self.device = shape.positions, self._tokens.device
        self.longest = shape.window
        """The longest text, in tokens, that this computes as the model does: up to the window each token sees all others."""
        self._layers = [_Layer(shape, get, f"layers.{index}.") for index in range(shape.layers)]
        self._norm = get("norm.weight", (shape.hidden,))
        self._rates = shape.theta ** (-torch.arange(0, shape.width, 2, dtype=torch.int64).float() / shape.width)
        self._rates = self._rates.to(self._tokens.device)

    def states(self, ids: Tensor, packing: Packing) -> Iterator[Tensor]:
        """The states `(tokens, hidden)` after the embeddings and after each layer, the last one after the final norm."""
        shape = self.shape
        angles = packing.positions.unsqueeze(1) * self._rates
        turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        states = self._tokens[ids]
        for index, layer in enumerate(self._layers):
            yield states
            qkv = layer.qkv(_rms_norm(states, layer.before_attention, shape.epsilon))
            self._turn(qkv, layer, turns)
            states = layer.out.plus(attend(qkv, shape.heads, shape.shared, packing, index < self.start), states)
            normed = _rms_norm(states, layer.before_mlp, shape.epsilon)
            states = layer.down.plus(layer.up.times(normed, layer.gate.activated(normed, shape.activation)), states)
        yield _rms_norm(states, self._norm, shape.epsilon)

    def _turn(self, qkv: Tensor, layer: _Layer, turns: Tensor) -> None:
        """Rotary positions (RoFormer, section 3.2.2) for queries and keys, in place, as products of complex numbers."""
        shape = self.shape
        heads = qkv.view(len(qkv), -1, shape.width)[:, : shape.heads + shape.shared]
        if layer.norms is not None:
            queries, keys = heads.split([shape.heads, shape.shared], dim=1)
            queries.copy_(_rms_norm(queries, layer.norms[0], shape.epsilon))
            keys.copy_(_rms_norm(keys, layer.norms[1], shape.epsilon))
        exact = heads.float()  # itself in float32
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(turns)
        if exact.dtype != heads.dtype:
            heads.copy_(exact)


def _linear(get: Get, name: str, outside: int, inside: int, bias: bool) -> Linear:
    return Linear(get(f"{name}.weight", (outside, inside)), get(f"{name}.bias", (outside,)) if bias else None)


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Put components i and i + width/2 of each head, which turn together, side by side; scores stay the same."""
    if not heads:
        return rows
    turned: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return turned


def _rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    normed: Tensor = functional.rms_norm(states, weight.shape, weight, epsilon)
    return normed
