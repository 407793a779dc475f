"""Batches without padding: the tokens of several texts in one long row, and attention within each text.

Texts come longest first, so that texts of one length lie side by side: everything but attention works on all tokens at
once, and attention on each run of equally long texts, as a plain batch that needs no mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from embell.engine.pooling import pool

SHORT = 40
"""Up to this many tokens, on a CPU, attention is two batched products: measured faster than the fused kernel, which
works in blocks of 32 queries and spends its time on their edges."""


@dataclass(frozen=True)
class Run:
    """`texts` texts of `length` tokens each, from token `begin` of the batch on."""

    begin: int
    texts: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.begin, self.begin + self.texts * self.length)


@dataclass(frozen=True)
class Packing:
    """The layout of a packed batch on a device; texts of one length lie side by side."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def runs(self) -> list[Run]:
        found, begin = [], 0
        for length, texts in groupby(self.lengths):
            found.append(Run(begin, sum(1 for _ in texts), length))
            begin += found[-1].texts * length
        return found

    @cached_property
    def positions(self) -> Tensor:
        """The place of each token in its text, from 0, `(tokens,)`."""
        counted = [torch.arange(run.length, device="cpu").repeat(run.texts) for run in self.runs]
        return torch.cat(counted).to(self.device)

    @cached_property
    def borders(self) -> Tensor:
        """Where each text begins, and where the last one ends, `(texts + 1,)` int32."""
        ends = torch.tensor([0, *self.lengths], device="cpu").cumsum(0, dtype=torch.int32)
        return ends.to(self.device)


def attend(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, causal: bool) -> Tensor:
    """Attention of each text to itself, `(tokens, heads, width)` each, to `(tokens, heads * width)` in the values' dtype.

    Keys and values may have fewer heads, each of which then serves several queries. `causal` hides later tokens.
    """
    if _flash_takes(values):
        return _attend_varlen(queries, keys, values, packing, causal)
    parts = []
    for run in packing.runs:
        query, key, value = (part[run.tokens].unflatten(0, (run.texts, run.length)) for part in (queries, keys, values))
        short = run.length <= SHORT and values.device.type == "cpu"
        parts.append((_attend_short if short else _attend_long)(query, key, value, causal).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flash_takes(values: Tensor) -> bool:
    """Whether the variable-length kernel serves this card, dtype and width."""
    if not values.is_cuda or values.dtype not in (torch.bfloat16, torch.float16):
        return False
    width = values.shape[-1]
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(values.device)[0] >= 8


def _attend_long(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    query, key, value = (part.to(values.dtype).transpose(1, 2) for part in (queries, keys, values))
    shared = queries.shape[2] > keys.shape[2]
    return (
        functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=shared).transpose(1, 2).flatten(2)
    )


def _attend_short(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """In float32 whatever the dtype: for so few tokens the products cost less than the copies around them."""
    texts, length, heads, width = queries.shape
    shared = keys.shape[2]
    each = heads // shared
    exact: dict[str, Any] = {"dtype": torch.float32, "device": values.device}
    # the queries that share a key-value head stand below each other: one product serves them all
    laid = torch.empty(texts, shared, each, length, width, **exact).copy_(
        queries.unflatten(2, (shared, each)).permute(0, 2, 3, 1, 4)
    )
    turned = torch.empty(texts, shared, width, length, **exact).copy_(keys.permute(0, 2, 3, 1))
    laid, turned = laid.view(texts * shared, each * length, width), turned.view(texts * shared, width, length)
    weights = torch.empty(texts * shared, each * length, length, **exact)
    torch.baddbmm(weights, laid, turned, beta=0, alpha=1 / math.sqrt(width), out=weights)
    if causal:
        hidden = torch.full((length, length), float("-inf"), **exact).triu_(1)
        weights.view(-1, each, length, length).add_(hidden)
    weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
    sums = weights.sum(dim=-1, keepdim=True)
    read = torch.bmm(
        weights, torch.empty(texts, shared, length, width, **exact).copy_(values.transpose(1, 2)).view(-1, length, width)
    )
    read.div_(sums)
    out = torch.empty(texts, length, shared, each, width, dtype=values.dtype, device=values.device)
    return out.copy_(read.view(texts, shared, each, length, width).permute(0, 3, 1, 2, 4)).flatten(2)


def _attend_varlen(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, causal: bool) -> Tensor:
    """One flash-attention kernel for texts of all lengths (CUDA, 16-bit)."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = queries.to(values.dtype), keys.to(values.dtype)
    if queries.shape[1] > keys.shape[1]:
        each = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(each, dim=1) for part in (keys, values))
    longest = max(packing.lengths)
    out = varlen_attn(
        queries, keys, values, packing.borders, packing.borders, longest, longest, window_size=(-1, 0) if causal else (-1, -1)
    )
    assert isinstance(out, Tensor)
    return out.flatten(1)


def pool_packed(states: Tensor, packing: Packing, begins: Sequence[int], ends: Sequence[int], pooling: str) -> Tensor:
    """`pool` for packed states `(tokens, hidden)`: one float32 vector a text, of its tokens from `begins` to `ends`."""
    first, last = (torch.tensor(border, device=states.device) for border in (begins, ends))
    if states.is_cuda:  # a few padded batches, at most half of each padding: many small kernels would take longer
        texts, parts, begin = torch.split(states, list(packing.lengths)), [], 0
        for at in range(1, len(texts) + 1):
            if at == len(texts) or 2 * len(texts[at]) < len(texts[begin]):
                parts.append((slice(begin, at), torch.nn.utils.rnn.pad_sequence(list(texts[begin:at]), batch_first=True)))
                begin = at
    else:  # split at once: in training, the gradient of each slice would be a row of zeros as long as the batch
        parts, text = [], 0
        for run, part in zip(packing.runs, states.split([run.texts * run.length for run in packing.runs]), strict=True):
            parts.append((slice(text, text + run.texts), part.view(run.texts, run.length, -1)))
            text += run.texts
    pooled = []
    for some, rows in parts:
        columns = torch.arange(rows.shape[1], device=states.device)
        mask = (columns >= first[some].unsqueeze(1)) & (columns < last[some].unsqueeze(1))
        pooled.append(pool(rows, mask, pooling, torch.zeros_like(first[some])))
    return torch.cat(pooled)
