"""The BERT family without transformers: BERT, RoBERTa, XLM-RoBERTa, on packed batches.

The same arithmetic as transformers' modules, which are the reference that this is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from embell.engine.linear import Get, Linear
from embell.engine.packed import Packing, attend


@dataclass(frozen=True)
class BertShape:
    """What the configuration says. `padding` is the token from which RoBERTa counts positions, None for BERT's from 0."""

    family: str
    vocabulary: int
    positions: int
    kinds: int
    hidden: int
    layers: int
    heads: int
    inner: int
    epsilon: float
    activation: str
    padding: int | None = None


class _Layer:
    def __init__(self, shape: BertShape, get: Get, prefix: str) -> None:
        hidden, inner = shape.hidden, shape.inner
        names = [f"{prefix}attention.self.{name}" for name in ("query", "key", "value")]
        weight = torch.cat([get(f"{name}.weight", (hidden, hidden)) for name in names])
        self.qkv = Linear(weight, torch.cat([get(f"{name}.bias", (hidden,)) for name in names]))
        self.out = _linear(get, f"{prefix}attention.output.dense", hidden, hidden)
        self.after_attention = _norm(get, f"{prefix}attention.output.LayerNorm", hidden)
        self.up = _linear(get, f"{prefix}intermediate.dense", inner, hidden)
        self.down = _linear(get, f"{prefix}output.dense", hidden, inner)
        self.after_mlp = _norm(get, f"{prefix}output.LayerNorm", hidden)


class FastBert:
    """An encoder of the family; all of its layers look both ways."""

    decoder = False
    start = 0
    longest = None

    def __init__(self, shape: BertShape, get: Get) -> None:
        self.shape = shape
        self.layers, self.vocabulary = shape.layers, shape.vocabulary
        self.positions = shape.positions - (0 if shape.padding is None else shape.padding + 1)
        self._tokens = get("embeddings.word_embeddings.weight", (shape.vocabulary, shape.hidden))
        self.device = self._tokens.device
        self._places = get("embeddings.position_embeddings.weight", (shape.positions, shape.hidden))
        self._kind = get("embeddings.token_type_embeddings.weight", (shape.kinds, shape.hidden))[0]
        self._norm = _norm(get, "embeddings.LayerNorm", shape.hidden)
        self._layers = [_Layer(shape, get, f"encoder.layer.{index}.") for index in range(shape.layers)]

    def states(self, ids: Tensor, packing: Packing) -> Iterator[Tensor]:
        """The states `(tokens, hidden)` after the embeddings and after each layer."""
        shape = self.shape
        places = packing.positions if shape.padding is None else self._counted(ids, packing, shape.padding)
        states = self._normed(self._tokens[ids] + self._kind + self._places[places], self._norm)
        for layer in self._layers:
            yield states
            queries, keys, values = layer.qkv(states).unflatten(1, (3, shape.heads, -1)).unbind(1)
            read = attend(queries, keys, values, packing, False)
            states = self._normed(layer.out.plus(read, states), layer.after_attention)
            states = self._normed(layer.down.plus(layer.up.activated(states, shape.activation), states), layer.after_mlp)
        yield states

    def _normed(self, states: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return functional.layer_norm(states, norm[0].shape, *norm, self.shape.epsilon)

    def _counted(self, ids: Tensor, packing: Packing, padding: int) -> Tensor:
        """RoBERTa's positions: from `padding` + 1 on, not counting tokens that are the padding token itself."""
        real = ids != padding
        counted = [real[run.tokens].view(run.texts, run.length).cumsum(1).flatten() for run in packing.runs]
        return torch.cat(counted) * real + padding


def _linear(get: Get, name: str, outside: int, inside: int) -> Linear:
    return Linear(get(f"{name}.weight", (outside, inside)), get(f"{name}.bias", (outside,)))


def _norm(get: Get, name: str, hidden: int) -> tuple[Tensor, Tensor]:
    return get(f"{name}.weight", (hidden,)), get(f"{name}.bias", (hidden,))
