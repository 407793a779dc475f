"""Stored rows, their codes, and the coarse products of queries with them: the first half of exact search.

The coarse product multiplies int8 codes where the CPU has instructions for it, else the stored rows in float32; for a few queries int8 codes
with bfloat16 where it has AVX2; for many int8 codes on a graphics card, if there is one. How far it can be wrong is known for each query.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from embell.errors import EmbellWarning
from embell.indexers.codes import (
    FEW_QUERIES,
    FILES,
    Codes,
    QueryCodes,
    card_products,
    int8_products,
    mixed_products,
    renormalise,
)
from embell.indexers.shortlist import LOWEST, Block
from embell.indexers.vector_index import Array

Rows = TypeVar("Rows", bound="CodedRows")
Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")

_PRODUCTS = 2**21
"""Products that are in work at a time: they stay in the cache until they have been looked at."""
_FEWEST_ROWS, _MOST_ROWS = 8192, 2**18
CARD_QUERIES = 32
"""Queries from which on a graphics card makes the products; fewer are answered before it has been asked."""
_CARD_PRODUCTS, _CARD_ROWS = 2**26, 2**20
_STRIP = 2048
"""Stored rows that are unpacked to float32 at a time: they are multiplied while they are in the cache."""
_COPIED = 8192
"""Codes of rows that a filter lets through, copied at a time: they are multiplied while they are in the cache."""
_GATHERED_MIXED, _GATHERED, _GATHERED_BY_MANY, _MANY = 0.2, 0.5, 0.7, 16
"""Rows that a filter lets through are copied together where they are at most this share: for a few queries, for more, and for so many or more."""


@dataclass
class _Segment:
    """Rows that were added at once, and their codes once they are needed."""

    keys: Array
    rows: Array
    codes: Codes | None = None
    on_card: Tensor | None = None


@dataclass(frozen=True)
class Chosen:
    """Rows that take part in a search, with their codes copied together: for one that is made again and again.

    `mask` says of each position whether it does; the others hold, for rows that were added at once, which of them, and where they are coded their
    codes and which of these say nothing.
    """

    mask: Array
    positions: list[Array]
    codes: list[Tensor | None]
    loose: list[Array | None]

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(part.nbytes for part in (self.mask, *self.positions, *self.codes) if part is not None)


def or_without_card(
    answer: Callable[Concatenate[Rows, Asked], Answer],
) -> Callable[Concatenate[Rows, Asked], Answer]:
    """A method that begins again without the graphics card where that has no memory left."""

    @wraps(answer)
    def answered(self: Rows, *asked: Asked.args, **more: Asked.kwargs) -> Answer:
        cardless = self._cardless
        try:
            return answer(self, *asked, **more)
        except torch.OutOfMemoryError:
            if cardless:
                raise
            if not self._cardless:  # several threads may meet this at once
                self._cardless = True
                warnings.warn(
                    "the graphics card has no memory left to search with: the processor does it", EmbellWarning, stacklevel=2
                )
            for segment in self._segments:
                segment.on_card = None
            return answer(self, *asked, **more)

    return answered  # type: ignore[return-value]  # the first parameter has a name now


class CodedRows:
    """Float16 rows in memory or memory-mapped, under ascending keys, and their codes once they are needed."""

    FILES = ("vectors.npy", "keys.npy", *FILES)

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._segments: list[_Segment] = []
        self._int8, self._mixed = int8_products(), mixed_products(dim)
        self._cardless = False

    def __len__(self) -> int:
        return sum(len(segment.keys) for segment in self._segments)

    def add(self, keys: Array, rows: Array) -> None:
        """Add float16 rows `(n, dim)`, made from rows of length 1, under ascending keys."""
        if len(keys):
            self._segments.append(_Segment(np.asarray(keys, np.int64), rows))

    @property
    def keys(self) -> Array:
        """The key of each position, ascending."""
        if len(self._segments) == 1:
            return self._segments[0].keys
        return np.concatenate([segment.keys for segment in self._segments]) if self._segments else np.empty(0, np.int64)

    def vectors(self, positions: Array) -> Array:
        """The vectors at these positions: stored rows, renormalised in float32, `(n, dim)`."""
        return renormalise(self.stored(positions))

    def stored(self, positions: Array, out: Array | None = None) -> Array:
        """The float16 rows at these positions, as they are stored, `(n, dim)`; in `out`, where that is given."""
        rows: Array = np.empty((len(positions), self.dim), np.float16) if out is None else out
        if len(self._segments) == 1:
            return np.take(self._segments[0].rows, positions, axis=0, out=rows, mode="clip")
        start = 0
        for segment in self._segments:
            inside = (positions >= start) & (positions < start + len(segment.rows))
            if inside.any():
                rows[inside] = segment.rows[positions[inside] - start]
            start += len(segment.rows)
        return rows

    def save(self, directory: Path) -> None:
        """Write keys, rows and codes."""
        rows = mapped(directory / CodedRows.FILES[0], np.float16, (len(self), self.dim))
        start = 0
        for segment in self._segments:
            rows[start : start + len(segment.rows)] = segment.rows
            start += len(segment.rows)
        rows.flush()
        self.write_beside(directory, self.keys, rows)

    @staticmethod
    def write_beside(directory: Path, keys: Array, rows: Array) -> None:
        """Write keys and codes into the directory in which `rows` lie already."""
        np.save(directory / CodedRows.FILES[1], keys)
        if (int8_products() or mixed_products(rows.shape[1])) and len(keys):
            out = mapped(directory / FILES[0], np.int8, rows.shape)
            Codes.of(rows, out).save(directory)
            out.flush()

    @classmethod
    def load(cls: type[Rows], directory: Path) -> Rows:
        """Open what `save` wrote; the matrices stay on disk and are memory-mapped.

        Raises ValueError if the files do not belong together.
        """
        keys = np.load(directory / CodedRows.FILES[1], allow_pickle=False)
        # An empty array cannot be mapped. "c": torch wants arrays that it may write to.
        rows = np.load(directory / CodedRows.FILES[0], mmap_mode="c" if len(keys) else None, allow_pickle=False)
        index = cls(rows.shape[1])
        codes = Codes.load(directory) if (index._int8 or index._mixed) and len(keys) else None
        if len(keys) != len(rows) or (codes is not None and codes.codes.shape != rows.shape):
            raise ValueError(f"{directory}: files of different lengths")
        index.add(keys, rows)
        if codes is not None:
            index._segments[0].codes = codes
        return index

    @property
    def coded(self) -> bool:
        """Whether all rows have codes."""
        return all(segment.codes is not None for segment in self._segments)

    def chosen(self, mask: Array) -> Chosen:
        """Rows by a bool array over positions, and their codes."""
        found = Chosen(mask, [], [], [])
        start = 0
        for segment in self._segments:
            positions = np.flatnonzero(mask[start : start + len(segment.rows)])
            codes = segment.codes
            found.positions.append(positions)
            copied = None
            if codes is not None:  # NumPy's large arrays are of large pages, which the system hands out sooner
                copied = torch.from_numpy(np.empty((len(positions), self.dim), np.int8))
                torch.index_select(codes.codes, 0, torch.from_numpy(positions), out=copied)
            found.codes.append(copied)
            found.loose.append(None if codes is None else np.flatnonzero(np.isin(positions, codes.loose)))
            start += len(segment.rows)
        return found

    def _card_for(self, queries: int) -> torch.device | None:
        """The graphics card, where it is to make the products of so many queries."""
        return card_products(self.dim) if queries >= CARD_QUERIES and not self._cardless else None

    @or_without_card
    def code(self, queries: int) -> None:
        """Make the codes that are missing: once, and not by every core. Where they serve few queries only, they are not worth it."""
        card = self._card_for(queries)
        for segment in self._segments if self._int8 or card is not None else ():
            segment.codes = segment.codes or Codes.of(segment.rows)
            if card is not None and segment.on_card is None:
                segment.on_card = segment.codes.held_by(card)

    def _blocks(
        self, queries: Array, allowed: Array | Chosen | None, until: int | None, card: torch.device | None
    ) -> Iterator[Block]:
        """Coarse products of the queries with all rows, some rows at a time; with those allowed, and perhaps others, which a block names; before `until`.

        `card` is what `_card_for` says. The products of a block are overwritten by those of the next.
        """
        most_products, most_rows = (_PRODUCTS, _MOST_ROWS) if card is None else (_CARD_PRODUCTS, _CARD_ROWS)
        size = min(max(most_products // len(queries) // 8 * 8, _FEWEST_ROWS), most_rows)
        left = torch.from_numpy(queries)
        mixed = card is None and self._multiplies_mixed(len(queries))
        gathered = _GATHERED_BY_MANY if len(queries) >= _MANY else _GATHERED_MIXED if mixed else _GATHERED
        coding = card is not None or self._int8 or mixed
        whole = coding and not mixed
        count = len(queries) * -(-min(size, len(self)) // 8) * 8  # see `multiply_there`
        room = torch.empty(count, dtype=torch.int32 if whole else torch.float32, device=card)
        start = 0
        for number, segment in enumerate(self._segments):
            end = len(segment.rows) if until is None else min(len(segment.rows), until - start)
            if end <= 0:
                return
            loose = np.zeros(0, np.int64)
            chosen = mask = held = held_loose = None
            if isinstance(allowed, Chosen):
                chosen, held, held_loose = allowed.positions[number], allowed.codes[number], allowed.loose[number]
                end = len(chosen)
            elif allowed is not None:
                mask = allowed[start : start + end]
                count = int(np.count_nonzero(mask))
                if count <= gathered * end:
                    chosen, mask, end = np.flatnonzero(mask), None, count
            codes, coded = segment.codes if coding else None, None
            if codes is not None:
                coded = codes.query(queries, mixed)
                loose = codes.loose if held_loose is None else held_loose
            for begin in range(0, end, size):
                some: Any = slice(begin, min(begin + size, end)) if chosen is None else chosen[begin : begin + size]
                if coded is not None and codes is not None:
                    products = room[: len(queries) * min(size, end - begin)].view(len(queries), -1)
                    if card is not None:
                        products = coded.multiply_there(_codes_there(segment, some, card), room)
                    elif chosen is None:
                        coded.multiply(codes.codes[some], products)
                    elif held is not None:
                        coded.multiply(held[begin : begin + size], products)
                    else:
                        _multiply_chosen(coded, codes.codes, torch.from_numpy(some), products)
                    numbers = products, coded.scale, coded.offset, coded.error
                else:
                    rows = torch.from_numpy(segment.rows[some])
                    products = room[: len(queries) * len(rows)].view(len(queries), -1)
                    _multiply(left, rows, products)
                    none = np.zeros(len(queries))
                    numbers = products, none + 1, none, none + rough_error(self.dim)
                if len(loose) and (chosen is None or held_loose is not None):
                    out = loose[np.searchsorted(loose, begin) : np.searchsorted(loose, begin + products.shape[1])]
                    products.index_fill_(1, torch.from_numpy(out - begin).to(room.device), int(LOWEST))
                elif len(loose):
                    products.index_fill_(1, torch.from_numpy(np.flatnonzero(np.isin(some, loose))).to(room.device), int(LOWEST))
                if chosen is not None:
                    yield Block(start, some, *numbers)
                else:
                    yield Block(start + begin, None, *numbers, None if mask is None else mask[some])
            start += len(segment.rows)

    def _multiplies_mixed(self, queries: int) -> bool:
        return self._mixed and queries <= FEW_QUERIES

    def _loose(self, queries: int, allowed: Array | Chosen | None, until: int | None, card: torch.device | None) -> Array:
        """Positions whose codes say nothing: candidates whatever these queries, so many, ask; `card` as for `_blocks`."""
        found = [np.empty(0, np.int64)]
        start = 0
        for segment in self._segments:
            coded = self._int8 or self._multiplies_mixed(queries) or card is not None
            if segment.codes is not None and coded:
                found.append(segment.codes.loose + start)
            start += len(segment.rows)
        positions = np.concatenate(found)
        if until is not None:
            positions = positions[positions < until]
        mask = allowed.mask if isinstance(allowed, Chosen) else allowed
        return positions if mask is None else positions[mask[positions]]


def mapped(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A new `.npy` file, mapped to be written to; its blocks are there already.

    Raises OSError where the disk has no room for it: writing into a map of a file with holes would kill the process.
    """
    found: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return found


def _multiply(queries: Tensor, rows: Tensor, out: Tensor) -> None:
    """Float32 products `(q, n)` of queries with rows as they are stored, `_STRIP` of which are unpacked at a time."""
    unpacked = torch.empty((min(_STRIP, len(rows)), rows.shape[1]))
    for begin in range(0, len(rows), _STRIP):
        strip = rows[begin : begin + _STRIP]
        torch.mm(queries, unpacked[: len(strip)].copy_(strip).T, out=out[:, begin : begin + _STRIP])


def _codes_there(segment: _Segment, some: slice | Array, card: torch.device) -> Tensor:
    """The codes of some rows on the card; brought there, where it does not hold all of them."""
    assert segment.codes is not None
    codes = segment.codes.codes if segment.on_card is None else segment.on_card
    rows = codes[some] if isinstance(some, slice) else torch.index_select(codes, 0, torch.from_numpy(some).to(codes.device))
    return rows.to(card)


def _multiply_chosen(queries: QueryCodes, codes: Tensor, chosen: Tensor, out: Tensor) -> None:
    """Products `(q, n)` of queries with the codes of the chosen rows."""
    copied = torch.empty((min(_COPIED, len(chosen)), codes.shape[1]), dtype=codes.dtype)
    for begin in range(0, len(chosen), _COPIED):
        strip = chosen[begin : begin + _COPIED]
        rows = torch.index_select(codes, 0, strip, out=copied[: len(strip)])  # not codes[strip]: that copies byte by byte
        queries.multiply(rows, out[:, begin : begin + len(strip)])


def rough_error(dim: int) -> float:
    """More than the float32 inner product of a unit vector with a row as it is stored is off from that with the row's vector.

    What float32 loses, in whatever order it is summed (Higham, 2002, section 3.1), and what float16 changes of a row's length: 2^-11 of it, and
    a little for components too small for it.
    """
    return float(2 * (dim + 8) * 2**-24 + 2**-11 + dim**0.5 * 2**-24)
