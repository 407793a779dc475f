"""Which rows may belong to an answer: gathered from coarse products whose error is known, for exact scores to decide."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from embell.indexers.vector_index import Array

GROUP = 64
"""Rows of which only the largest product is looked at first."""
_BARRED = 32
"""Groups that reach for a query, from which on it is better to bar rows that take no part than to find them and leave them out."""
LOWEST = -1e9
"""Below every score: stands where rows take no part. As a product, below all of those."""


@dataclass(frozen=True)
class Block:
    """Coarse products `(q, rows)` of some rows: a row's score is scale * product + offset, give or take error, each `(q,)`.

    The rows stand at `start` and after, or at `start` + `chosen`. Where there is `allowed`, a bool array `(rows,)`, the others take no part.
    """

    start: int
    chosen: Array | None
    products: Tensor
    scale: Array
    offset: Array
    error: Array
    allowed: Array | None = None

    def bar(self) -> Block:
        """The same block, in which the products of rows that take no part are `LOWEST`."""
        if self.allowed is None:
            return self
        # A minimum is many times as fast as filling in.
        most = torch.from_numpy(self.allowed).to(self.products.device, self.products.dtype)
        torch.minimum(self.products, most.mul_(-2 * int(LOWEST)).add_(int(LOWEST)), out=self.products)
        return replace(self, allowed=None)

    @cached_property
    def maxima(self) -> Tensor:
        """The largest of each `GROUP` products of a query, `(q, groups)`: those of different rows. What is left over is in none."""
        count, rows = self.products.shape
        return self.products[:, : rows - rows % GROUP].view(count, rows // GROUP, GROUP).amax(dim=2)

    def least(self, scores: Array) -> Tensor:
        """The smallest product `(q,)` of a row whose score may be as large as that of `scores` `(q,)`."""
        return least_products(scores, self.scale, self.offset, self.error, self.products.dtype)

    def lows(self, products: Tensor) -> Tensor:
        """What the scores behind products `(q, n)` are at least; float64."""
        products = products.cpu()
        low: Tensor = (
            products.double() * torch.from_numpy(self.scale)[:, None] + torch.from_numpy(self.offset - self.error)[:, None]
        )
        # Where the scale is tiny, as with equal rows, what stands for "no part" would come near the scores.
        return low.masked_fill_(products <= LOWEST / 2, -torch.inf)


def least_products(scores: Array, scale: Array, offset: Array, error: Array, dtype: torch.dtype) -> Tensor:
    """The smallest products `(q,)`, int32 or float32, of rows whose scores may be as large as `scores` `(q,)`; the others as in `Block`."""
    wanted = ((np.maximum(scores, -2) - error - offset) / scale).clip(LOWEST / 2, -LOWEST)
    if dtype == torch.int32:
        return torch.from_numpy(np.ceil(wanted).astype(np.int32))
    return torch.from_numpy(np.nextafter(wanted.astype(np.float32), np.float32(-np.inf)))


@dataclass
class Shortlist:
    """Pairs of a query and a position that may belong to the answer, and what their scores are at least and at most."""

    queries: list[Array] = field(default_factory=list)
    positions: list[Array] = field(default_factory=list)
    lows: list[Array] = field(default_factory=list)
    highs: list[Array] = field(default_factory=list)
    held: int = 0

    def take(self, block: Block, least: Tensor) -> None:
        """Add the rows of a block whose product is `least` `(q,)` or more, found where its products lie."""
        count, rows = block.products.shape
        whole = rows - rows % GROUP
        there = least.to(block.products.device)[:, None]
        reaching = block.maxima >= there
        if block.allowed is not None and reaching.sum() > _BARRED * count:
            block = block.bar()
            reaching = block.maxima >= there
        asked, group = _places(reaching)
        near = _at(block.products[:, :whole].view(count, whole // GROUP, GROUP), asked, group)
        at, inside = np.divmod(np.flatnonzero(near >= least.numpy()[asked, None]), GROUP)
        chosen, places, found = asked[at], group[at] * GROUP + inside, near[at, inside]
        if whole < rows:
            rest = block.products[:, whole:]
            asked, inside = _places(rest >= there)
            chosen, places = np.concatenate([chosen, asked]), np.concatenate([places, inside + whole])
            found = np.concatenate([found, _at(rest, asked, inside)])
        if block.allowed is not None:
            kept = block.allowed[places]
            chosen, places, found = chosen[kept], places[kept], found[kept]
        middle = found * block.scale[chosen] + block.offset[chosen]
        error = block.error[chosen]
        places = places if block.chosen is None else block.chosen[places]
        self.add(chosen, places + block.start, middle - error, middle + error)

    def add(self, queries: Array, positions: Array, lows: Array, highs: Array) -> None:
        """Add pairs, all arrays `(n,)`."""
        self.queries.append(queries)
        self.positions.append(positions)
        self.lows.append(lows)
        self.highs.append(highs)
        self.held += len(queries)

    def kth(self, best: Tensor, since: int) -> Tensor:
        """`best` `(q, k)`, the largest lows so far, with those that were added from the part number `since` on."""
        queries, lows = (np.concatenate(parts[since:]) for parts in (self.queries, self.lows))
        order = np.argsort(queries.astype(np.uint16), kind="stable")  # a radix sort; there are not more than QUERIES
        queries, lows = queries[order], lows[order]
        places = ranks(queries)
        table = np.full((len(best), places.max(initial=-1) + 1), -np.inf)
        table[queries, places] = lows
        return torch.cat([best, torch.from_numpy(table)], dim=1).topk(best.shape[1], dim=1).values

    def thin(self, part: int, crowded: Array, sure: Array, few: int) -> None:
        """Of these queries (a bool array), keep in one part only the first `few` that are `sure`."""
        queries = self.queries[part]
        chosen = np.flatnonzero(sure & crowded[queries])
        chosen = chosen[np.argsort(queries[chosen].astype(np.uint16), kind="stable")]  # a radix sort, as in `kth`
        counts = np.bincount(queries[chosen], minlength=len(crowded))
        rank = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = ~crowded[queries]
        kept[chosen[rank < few]] = True
        self.held -= int((~kept).sum())
        self.queries[part], self.positions[part] = queries[kept], self.positions[part][kept]
        self.lows[part], self.highs[part] = self.lows[part][kept], self.highs[part][kept]

    def everywhere(self, queries: int, positions: Array) -> None:
        """Add positions for every query, whatever their scores are."""
        unknown = np.full(queries * len(positions), np.inf)
        self.add(np.repeat(np.arange(queries), len(positions)), np.tile(positions, queries), -unknown, unknown)

    def among(self, reach: Array) -> tuple[Array, Array]:
        """Queries and positions of the pairs that may reach `reach` `(q,)`; by query."""
        if not self.held:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        queries, positions, highs = map(np.concatenate, (self.queries, self.positions, self.highs))
        kept = np.flatnonzero(highs >= reach[queries])
        kept = kept[np.argsort(queries[kept], kind="stable")]
        return queries[kept], positions[kept]


def ranks(sorted_queries: Array) -> Array:
    """How many entries of the same query stand before each."""
    return np.arange(len(sorted_queries)) - np.searchsorted(sorted_queries, sorted_queries)


def _places(true: Tensor) -> tuple[Array, Array]:
    """Where a table is true: rows and columns, in order. By NumPy, unless it lies on a card: PyTorch's way is several times as slow."""
    if true.is_cuda:
        rows, columns = (part.cpu().numpy() for part in true.nonzero(as_tuple=True))
    else:
        rows, columns = np.divmod(np.flatnonzero(true.numpy()), max(1, true.shape[1]))
    return rows, columns


def _at(table: Tensor, rows: Array, columns: Array) -> Array:
    """What stands there in a table; read where that lies."""
    if table.is_cuda:
        return table[torch.from_numpy(rows).to(table.device), torch.from_numpy(columns).to(table.device)].cpu().numpy()
    found: Array = table.numpy()[rows, columns]
    return found
