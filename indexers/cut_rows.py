"""Vectors cut to the axes along which a corpus extends most, and the length of what was cut off: products that are hardly less than a score.

What is cut off two vectors adds at most the product of its lengths to their inner product (Cauchy and Schwarz). So with that length as one
component more, a product of far fewer components says which pairs cannot reach a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from embell.indexers.codes import Array, Codes
from embell.indexers.shortlist import GROUP, least_products

WIDTHS = (64, 128, 192)
"""Components of a cut vector, the length among them."""
_WIDEST = 0.75
"""Of the vectors' own width; beyond it little is saved."""
_ROUGH_ERROR = 2**-10
"""More than rounding to float16, and products in float32, change an inner product of cut vectors."""
_ASKED = 512
_CODING = 0.02
"""What products of codes are off, about."""
_PAIR = 1_000_000
"""Products of two components that take as long as looking closely at one pair, about."""
_BLOCK = 4096
"""Rows that are multiplied with the queries at a time: the products stay in the cache until they have been looked at."""
_HELD = 2**15
"""Groups whose products are held until they are looked at more closely."""


@dataclass(frozen=True)
class Sketch:
    """Orthonormal `axes`, float64 `(dim, width - 1)`.

    The inner product of two cut vectors is less than that of the vectors by no more than `error`, if these are of length 1.
    """

    axes: Tensor

    @property
    def width(self) -> int:
        """Components of a cut vector."""
        return self.axes.shape[1] + 1

    @property
    def error(self) -> float:
        """More than float32 loses of a vector's squared length, or of an inner product of cut ones, in whatever order it is summed."""
        return float((len(self.axes) + 8) * 2**-24)

    def cut(self, vectors: Array) -> Array:
        """Float32 vectors `(n, dim)` as `(n, width)`: components along the axes, then the length of the rest."""
        along = (torch.from_numpy(vectors).double() @ self.axes).numpy()
        found = np.empty((len(vectors), self.width), np.float32)
        found[:, :-1] = along
        rest = np.vecdot(vectors, vectors) - np.vecdot(along, along)
        found[:, -1] = np.sqrt(np.maximum(rest, 0) + self.error)  # never less than it is
        return found


class CutRows:
    """All rows of an index, cut; in int8 codes where the CPU multiplies those in hardware, else in float16."""

    def __init__(self, sketch: Sketch, count: int, vectors: Callable[[Array], Array], int8: bool) -> None:
        """`vectors` gives the vectors at some positions below `count`. Takes a byte, or two, for each component of a cut row."""
        self._sketch, self._count = sketch, count
        self._rows = room = torch.zeros((-(-count // GROUP) * GROUP, sketch.width), dtype=torch.int8 if int8 else torch.float16)

        def cut(positions: Array) -> Array:
            return sketch.cut(vectors(positions))

        self._codes = Codes.of(np.arange(count), room[:count].numpy(), cut) if int8 else None
        for begin in range(0, 0 if int8 else count, _BLOCK):
            some = np.arange(begin, min(begin + _BLOCK, count))
            room[begin : begin + len(some)] = torch.from_numpy(cut(some))

    def reaching(self, queries: Array, threshold: float, until: int | None) -> tuple[Array, Array]:
        """Pairs of a query, float32 `(q, dim)`, and a position, below `until` if that is given, that may score `threshold`: by query and position."""
        end = self._count if until is None else min(until, self._count)
        cut = self._sketch.cut(queries)
        wanted = np.full(len(cut), threshold - self._sketch.error)
        if self._codes is None:
            left, loose, none = torch.from_numpy(cut), np.empty(0, np.int64), np.zeros(len(cut))
            least = least_products(wanted, none + 1, none, none + _ROUGH_ERROR, torch.float32)
        else:
            coded = self._codes.query(cut)
            left, loose = coded.codes, self._codes.loose[self._codes.loose < end]
            least = least_products(wanted, coded.scale, coded.offset, coded.error, torch.int32)
        least = least[:, None]
        room = torch.empty(len(cut) * _BLOCK, dtype=least.dtype)
        rows = self._rows[: -(-end // GROUP) * GROUP]
        queries_of, positions = [np.repeat(np.arange(len(cut)), len(loose))], [np.tile(loose, len(cut))]
        asked: list[Tensor] = []
        group: list[Tensor] = []
        near: list[Tensor] = []
        held = 0

        def look_closely() -> None:
            query, place = torch.cat(asked), torch.cat(group)
            at, inside = (torch.cat(near) >= least[query]).nonzero(as_tuple=True)
            found = (place[at] * GROUP + inside).numpy()
            kept = (found < end) & ~np.isin(found, loose) if len(loose) else found < end
            queries_of.append(query[at].numpy()[kept])
            positions.append(found[kept])

        for begin in range(0, len(rows), _BLOCK):
            some = rows[begin : begin + _BLOCK]
            products = room[: len(cut) * len(some)].view(len(cut), -1)
            if self._codes is None:
                torch.mm(left, some.float().T, out=products)
            else:
                torch._int_mm(left, some.T, out=products)
            grouped = products.view(len(cut), -1, GROUP)
            query, place = (grouped.amax(dim=2) >= least).nonzero(as_tuple=True)
            asked.append(query)
            group.append(place + begin // GROUP)
            near.append(grouped[query, place])
            held += len(query)
            if held > _HELD:
                look_closely()
                asked, group, near, held = [], [], [], 0
        if asked:
            look_closely()
        found, places = np.concatenate(queries_of), np.concatenate(positions)
        order = np.lexsort((places, found))
        return found[order], places[order]


def sketch_for(sample: Array, threshold: float, few: float) -> Sketch | None:
    """The sketch with which pairs of vectors like these, float32 `(n, dim)`, that reach a threshold are found fastest.

    As estimated from pairs of these vectors, which are to be a sample in random order. None where all components are as fast, and where more
    than a share `few` of all pairs reach the threshold: whole products tell of many of them that they do, without scoring them.
    """
    rows = torch.from_numpy(sample)
    dim = rows.shape[1]
    widths = [width for width in WIDTHS if width <= _WIDEST * dim]
    if not widths or len(rows) <= 2 * _ASKED:
        return None
    asked, others = rows[:_ASKED], rows[_ASKED:]
    share = float((asked @ others.T >= threshold).double().mean())
    if share > few:
        return None
    most = max(widths) - 1
    vectors = linalg.eigh((rows.T @ rows).double().numpy(), subset_by_index=(dim - most, dim - 1))[1]
    axes = torch.from_numpy(np.ascontiguousarray(vectors[:, ::-1]))
    costs: dict[int, float] = {dim: dim + _PAIR * share}
    for width in widths:
        sketch = Sketch(axes[:, : width - 1])
        one, other = (torch.from_numpy(sketch.cut(some.numpy())) for some in (asked, others))
        costs[width] = width + _PAIR * float((one @ other.T >= threshold - _CODING).double().mean())
    best = min(costs, key=lambda width: costs[width])
    return None if best == dim else Sketch(axes[:, : best - 1].contiguous())
