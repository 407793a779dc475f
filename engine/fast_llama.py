"""The Llama family without transformers: Llama, Mistral, Qwen2, Qwen3, on packed batches.

The same arithmetic as transformers' modules, with BeLLM's start layer built in: layers below it are causal, the others look
both ways. The transformers path is the reference that this is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embell.engine.linear import Get, Linear
from embell.engine.packed import Packing, attend


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
        before_attention = get(f"{prefix}input_layernorm.weight", (hidden,))
        before_mlp = get(f"{prefix}post_attention_layernorm.weight", (hidden,))
        bias = None
        if shape.bias_in:
            biases = [get(f"{name}.bias", (size,)) for name, size in zip(names, sizes, strict=True)]
            bias = torch.cat([_paired(part, count) for part, count in zip(biases, heads, strict=True)])
        self.qkv = Linear(_scaled(joined, before_attention), bias)
        self.out = _linear(get, f"{prefix}self_attn.o_proj", hidden, sizes[0], shape.bias_out)
        self.gate = _linear(get, f"{prefix}mlp.gate_proj", inner, hidden, shape.bias_mlp, before_mlp)
        self.up = _linear(get, f"{prefix}mlp.up_proj", inner, hidden, shape.bias_mlp, before_mlp)
        self.down = _linear(get, f"{prefix}mlp.down_proj", hidden, inner, shape.bias_mlp)
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
        self.layers, self.vocabulary = shape.layers, shape.vocabulary
        self.positions, self.device = shape.positions, self._tokens.device
        self.longest = shape.window
        """The longest text, in tokens, that this computes as the model does: up to the window each token sees all others."""
        self._layers = [_Layer(shape, get, f"layers.{index}.") for index in range(shape.layers)]
        self._norm = get("norm.weight", (shape.hidden,))
        # as transformers computes them: another rounding would be felt at the far end of long texts
        rates = 1.0 / shape.theta ** (torch.arange(0, shape.width, 2, dtype=torch.int64, device="cpu").float() / shape.width)
        self._rates = rates.to(self.device)

    def states(self, ids: Tensor, packing: Packing) -> Iterator[Tensor]:
        """The states `(tokens, hidden)` after the embeddings and after each layer, the last one after the final norm."""
        shape = self.shape
        angles = packing.positions.unsqueeze(1) * self._rates
        turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        states = self._tokens[ids]
        for index, layer in enumerate(self._layers):
            yield states
            qkv = layer.qkv(_unit(states, shape.epsilon)).unflatten(1, (-1, shape.width))
            queries, keys, values = qkv.split([shape.heads, shape.shared, shape.shared], dim=1)
            if layer.norms is not None:
                queries, keys = (
                    _unit(part, shape.epsilon) * norm for part, norm in zip((queries, keys), layer.norms, strict=True)
                )
            read = attend(_turned(queries, turns), _turned(keys, turns), values, packing, index < self.start)
            states = layer.out.plus(read, states)
            normed = _unit(states, shape.epsilon)
            states = layer.down.plus(layer.up.times(normed, layer.gate.activated(normed, shape.activation)), states)
        yield _unit(states, shape.epsilon) * self._norm


def _turned(heads: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions (RoFormer, section 3.2.2) as products of complex numbers, in float32; may overwrite `heads`."""
    exact = heads.float()
    torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(turns)
    return exact


def _linear(get: Get, name: str, outside: int, inside: int, bias: bool, scale: Tensor | None = None) -> Linear:
    weight = get(f"{name}.weight", (outside, inside))
    return Linear(weight if scale is None else _scaled(weight, scale), get(f"{name}.bias", (outside,)) if bias else None)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight of a linear layer that takes the scale of the norm before it along."""
    return (weight.float() * scale.float()).to(weight.dtype)


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Put components i and i + width/2 of each head, which turn together, side by side; scores stay the same."""
    if not heads:
        return rows
    turned: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return turned


def _unit(states: Tensor, epsilon: float) -> Tensor:
    """Rows divided by their root mean square (RMSNorm, Zhang and Sennrich 2019, equation 4), without the scale."""
    exact = states.float()
    squares: Tensor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_()
    unit: Tensor = (exact * squares.div_(states.shape[-1]).add_(epsilon).rsqrt_()).to(states.dtype)
    return unit
