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
        rates = 1.0 / shape.theta ** (torch.arange(0, shape.width, 2, dtype=torch.int64).float() / shape.width)
        self._rates = rates.to(next(network.parameters()).device)

    def states(self, ids: Tensor, packing: Packing) -> Iterator[Tensor]:
        """The states `(tokens, hidden)` after the embeddings and after each layer, none of them normed by the final norm."""
        shape = self._shape
        angles = packing.positions.unsqueeze(1) * self._rates
        cosine, sine = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        states = self._network.embed_tokens(ids)
        yield states
        for index, layer in enumerate(self._network.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(states)
            queries, keys, values = (
                project(normed).unflatten(1, (-1, shape.width))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if shape.norm_heads:
                queries, keys = attention.q_norm(queries), attention.k_norm(keys)
            queries, keys = _turned(queries, cosine, sine), _turned(keys, cosine, sine)
            states = states + attention.o_proj(_attend(queries, keys, values, packing, index < self._start))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
            yield states

    def normed(self, states: Tensor) -> Tensor:
        """States of any depth as the network would return them if it ended there."""
        return self._network.norm(states)  # type: ignore[no-any-return]


def _turned(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (RoFormer, section 3.2.2), components i and i + width/2 turning together."""
    one, other = heads.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1).to(heads.dtype)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, causal: bool) -> Tensor:
    """Attention of each text to itself, `(tokens, heads, width)` each, to `(tokens, heads * width)`.

    Split once and not run by run: the gradient of a slice is a whole row of zeros, that of a split is one copy. On a CPU in float32
    at least: for bfloat16, oneDNN compiles a kernel for each shape, and these shapes hardly come twice.
    """
    sizes = [run.texts * run.length for run in packing.runs]
    dtype = values.dtype
    on_cpu = not values.is_cuda  # there the fused kernel's backward pass is several times slower than two products
    if on_cpu:
        queries, keys, values = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (queries, keys, values))
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
    return torch.cat(parts).to(dtype)
