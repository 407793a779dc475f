"""From the states of a text's tokens to one vector."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(states: Tensor, mask: Tensor, pooling: str, first: Tensor | None = None) -> Tensor:
    """One float32 vector a text: `(n, length, hidden)` and bool `(n, length)` to `(n, hidden)`, or a multiple of hidden.

    `mask` marks the tokens to read, on whichever side the padding stands; each row must have one. "mean" averages
    them, "last" and "cls" take the last and the first, "max" the largest value of each component,
    "mean-sqrt-length" divides their sum by the root of their number, and "weighted-mean" weighs each with its
    place in the text, 1 for the token at column `first` (default: the first marked one). Several, joined by "+", are
    put side by side.
    """
    return torch.cat([_pool(states, mask, one, first) for one in pooling.split("+")], dim=-1)


def _pool(states: Tensor, mask: Tensor, pooling: str, first: Tensor | None) -> Tensor:
    rows = torch.arange(len(states), device=states.device)
    if pooling == "last":
        return states[rows, mask.shape[1] - 1 - mask.long().flip(1).argmax(dim=1)].float()
    if pooling == "cls":
        return states[rows, mask.long().argmax(dim=1)].float()
    # masked_fill, not a product: a padding state may be NaN, and NaN times 0 is NaN
    if pooling == "max":
        return states.float().masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(dim=1)
    real = states.float().masked_fill(~mask.unsqueeze(-1), 0.0)
    count = mask.sum(dim=1, keepdim=True)
    if pooling == "mean":
        return real.sum(dim=1) / count
    if pooling == "mean-sqrt-length":
        return real.sum(dim=1) / count.sqrt()
    if pooling == "weighted-mean":
        begin = mask.long().argmax(dim=1) if first is None else first
        weight = (torch.arange(1, mask.shape[1] + 1, device=mask.device) - begin.unsqueeze(1)) * mask
        return (real * weight.unsqueeze(-1)).sum(dim=1) / weight.sum(dim=1, keepdim=True)
    raise ValueError(pooling)
