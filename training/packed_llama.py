"""The Llama family on packed batches, with gradients: what `engine/fast_llama.py` is for encoding, for training.

A padded batch of sentences is half padding, and the graph of a padded batch pays for it forwards and backwards. Here the
tokens of a batch stand in one row without padding, and only attention works text by text. The modules are the model's own, so that adapters
and whatever else was put into them take part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from embell.engine.fast_llama import LlamaShape
from embell.engine.packed import Packing


class PackedLlama:
    """Runs a LlamaModel, MistralModel, Qwen2Model or Qwen3Model whose layers from `start` on look both ways."""

    def __init__(self, network: Any, shape: LlamaShape, start: int) -> None:
        """`network` is transformers' module, `shape` what its configuration says."""
        self._network, self._shape, self._start = network, shape, start
        self._before, self._after, self._norm = _before, _after, _norm
        rates = 1.0 / shape.theta ** (torch.arange(0, shape.width, 2, dtype=torch.int64).float() / shape.width)
        self._rates = rates.to(next(network.parameters()).device)

    def compile(self) -> None:
        """Fuse what stands around products and attention into kernels (torch.compile): on a CPU with matrix units most of a step is that.

        Needs a C++ compiler on a CPU. Kernels are compiled with the first batches.
        """
        self._before = torch.compile(_before, dynamic=True)
        self._after = torch.compile(_after, dynamic=True)
        self._norm = torch.compile(_norm, dynamic=True)

    def states(self, ids: Tensor, packing: Packing) -> Iterator[Tensor]:
        """The states `(tokens, hidden)` after the embeddings and after each layer, none of them normed by the final norm."""
        shape = self._shape
        angles = packing.positions.unsqueeze(1) * self._rates
        cosine, sine = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        states = self._network.embed_tokens(ids)
        yield states
        for index, layer in enumerate(self._network.layers):
            queries, keys, values = self._before(layer, states, cosine, sine, shape)
            states = self._after(layer, states, _attend(queries, keys, values, packing, index < self._start))
            yield states

    def normed(self, states: Tensor) -> Tensor:
        """States of any depth as the network would return them if it ended there."""
        return self._norm(self._network.norm, states)


def _before(layer: Any, states: Tensor, cosine: Tensor, sine: Tensor, shape: LlamaShape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(tokens, heads, width)` of a layer; on a CPU in float32, in which attention works there."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    queries, keys, values = (
        project(normed).unflatten(1, (-1, shape.width)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if shape.norm_heads:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries, keys = _turned(queries, cosine, sine), _turned(keys, cosine, sine)
    if values.is_cuda:
        return queries, keys, values
    # For bfloat16, oneDNN compiles a kernel for each shape, and those of attention hardly come twice.
    exact = torch.promote_types(values.dtype, torch.float32)
    return queries.to(exact), keys.to(exact), values.to(exact)


def _after(layer: Any, states: Tensor, read: Tensor) -> Tensor:
    """The states after a layer, from those before it and what its attention read."""
    states = states + layer.self_attn.o_proj(read.to(states.dtype))
    return states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[no-any-return]


def _norm(norm: Any, states: Tensor) -> Tensor:
    return norm(states)  # type: ignore[no-any-return]


def _turned(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (RoFormer, section 3.2.2), components i and i + width/2 turning together."""
    one, other = heads.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1).to(heads.dtype)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, causal: bool) -> Tensor:
    """Attention of each text to itself, `(tokens, heads, width)` each, to `(tokens, heads * width)`.

    Split once and not run by run: the gradient of a slice is a whole row of zeros, that of a split is one copy.
    """
    sizes = [run.texts * run.length for run in packing.runs]
    on_cpu = not values.is_cuda  # there the fused kernel's backward pass is several times slower than two products
    parts = []
    with torch.autocast("cpu", enabled=False):
        for run, *heads in zip(packing.runs, queries.split(sizes), keys.split(sizes), values.split(sizes), strict=True):
            query, key, value = (part.unflatten(0, (run.texts, run.length)).transpose(1, 2) for part in heads)
            if query.shape[1] > key.shape[1]:
                each = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(each, dim=1), value.repeat_interleave(each, dim=1)
            if on_cpu:
                scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
                if causal:
                    scores = scores + scores.new_full((run.length, run.length), float("-inf")).triu(1)
                read = scores.softmax(dim=-1) @ value
            else:
                read = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
            parts.append(read.transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(parts)
