"""Unit rows as int8 codes: what the coarse product of exact search multiplies, and how far it can be wrong.

int8 products with int32 sums are exact, and several times as fast as float32 where the CPU has instructions for them
(AVX512-VNNI, AVX-VNNI, AMX). What is lost is lost in coding, and that is measured for each row when it is coded. A few queries
are multiplied as bfloat16, by a kernel that needs no such instructions and rounds its products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from scipy import fft
from torch import Tensor

Array = np.ndarray[Any, Any]

SAMPLE = 20_000
"""Rows, evenly spaced, that the centre and the scale are chosen from."""
_BLOCK = 1024
_TURNED = 128
"""Rows from which on every core turns a share of them."""
_LOOSE_SHARE = 1e-4
_SLACK = 3e-6
"""What float32 arithmetic may lose in a coarse score beside the coding."""
FEW_QUERIES = 4
"""Up to so many queries are multiplied with codes as bfloat16, by a kernel that reads each code once."""
_WIDEST_MIXED = 2**14
"""Components whose products, of codes and whole numbers up to 8, float32 adds up exactly."""
FILES = ("codes.npy", "codes_of_rows.npz")


@cache
def int8_products() -> bool:
    """Whether this CPU multiplies int8 matrices in hardware, and exactly.

    Without VNNI or AMX, int8 kernels add pairs of products in saturating 16-bit steps: fast, and wrong for large codes.
    """
    able = torch.cpu.get_capabilities()
    if not any(able.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")) or not hasattr(torch, "_int_mm"):
        return False
    largest = torch.full((64, 256), 127, dtype=torch.int8)  # these saturate first
    signs = torch.where(torch.arange(64).unsqueeze(1) % 2 == 0, 1, -1).to(torch.int8)
    found = torch._int_mm(largest * signs, largest.T)
    return bool((found == 127 * 127 * 256 * signs.int()).all())


@cache
def mixed_products(dim: int) -> bool:
    """Whether a few vectors of this width in bfloat16 are multiplied with int8 rows by a kernel that reads each row once, and is right.

    It needs no more than AVX2. It works in steps of up to 16 components, and what is left of a row beyond them it would not read right.
    Tried with whole numbers, whose sums float32 holds: then the products are the exact ones, rounded to the nearest bfloat16.
    """
    able = torch.backends.cpu.get_cpu_capability().startswith("AVX") and hasattr(torch, "_weight_int8pack_mm")
    if not able or dim % 32 or dim > _WIDEST_MIXED:
        return False
    rows = (torch.arange(67 * dim) * 37 % 255 - 127).to(torch.int8).view(67, dim)
    asked = (torch.arange(FEW_QUERIES * dim) * 11 % 17 - 8).to(torch.bfloat16).view(FEW_QUERIES, dim)
    asked[0] = rows[0].sign()
    right = (asked.double() @ rows.double().T).bfloat16()
    ones = torch.ones(67, dtype=torch.bfloat16)
    return all(
        torch.equal(torch._weight_int8pack_mm(asked[:some], rows, ones), right[:some]) for some in range(1, FEW_QUERIES + 1)
    )


@cache
def card_products(dim: int) -> torch.device | None:
    """The graphics card, if there is one that multiplies int8 rows of this width, and exactly."""
    if dim % 8 or not torch.cuda.is_available():
        return None
    card = torch.device("cuda")
    rows = (torch.arange(64 * dim) * 37 % 255 - 127).to(torch.int8).view(64, dim)
    try:
        found = torch._int_mm(rows.to(card), rows.to(card).T).cpu()
    except RuntimeError:  # a card, or a build, without them
        return None
    return card if torch.equal(found, (rows.double() @ rows.double().T).int()) else None


@dataclass(frozen=True)
class QueryCodes:
    """Queries to be multiplied with codes: the inner product of a query and a row is `scale * product + offset`, give or take `error`.

    `codes` is `(q, dim)`, int8, or bfloat16 for a few queries; `scale`, `offset` and `error` are float64 `(q,)`.
    """

    codes: Tensor
    scale: Array
    offset: Array
    error: Array

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """Put the products `(q, n)` with the codes of rows, int8 `(n, dim)`, into `out`: int32, or float32 for queries in bfloat16."""
        if self.codes.dtype == torch.bfloat16:
            out.copy_(torch._weight_int8pack_mm(self.codes, rows, torch.ones(len(rows), dtype=torch.bfloat16)))
        elif out.is_contiguous():
            torch._int_mm(self.codes, rows.T, out=out)
        else:
            out.copy_(torch._int_mm(self.codes, rows.T))

    def multiply_there(self, rows: Tensor, room: Tensor) -> Tensor:
        """Products `(q, n)`, int32, with the codes of rows on the card on which they lie; `room` there has space for `q` times n, rounded up to eights.

        Cards multiply more than 16 queries with a multiple of 8 rows.
        """
        count = len(rows)
        if count % 8:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % 8))
        products = room[: len(self.codes) * len(rows)].view(len(self.codes), -1)
        torch._int_mm(self.codes.to(rows.device), rows.T, out=products)
        return products[:, :count]


@dataclass(frozen=True)
class Codes:
    """Rows of length 1, coded: turned row = `centre` + `scale` * code + what is left, at most `residual` long.

    `codes` is int8 `(n, dim)`; `length` is the largest length of a coded row; the rows at `loose`, whose residual is larger,
    are not to be judged by their codes, which are zeros.
    """

    codes: Tensor
    centre: Array
    scale: float
    residual: float
    length: float
    loose: Array

    @classmethod
    def of(cls, rows: Array, out: Array | None = None, vectors: Callable[[Array], Array] | None = None) -> Codes:
        """Code float16 rows `(n, dim)`, a block at a time; `out`, int8 `(n, dim)`, takes the codes if it is given.

        `vectors` makes of some rows what is coded, float32 vectors of length 1 or little more; without it, they are renormalised.

        Rows are turned, so that no component is much larger than others. Components are taken from the rows' mean, since what
        all rows share would cost range, and cut at the largest of a sample; a row that loses much by this is loose.
        """
        vectors = renormalise if vectors is None else vectors
        sample = turned(vectors(rows[:: max(1, len(rows) // SAMPLE)]))
        width = sample.shape[1]
        centre = sample.mean(axis=0)
        largest = float(np.abs(sample - centre).max(initial=0))
        while True:
            scale = max(largest, 1e-9) / 127
            limit = 1.2 * float(np.sqrt(width / 12)) * scale  # rounding alone loses a root of dim / 12 steps
            codes = np.empty((len(rows), width), np.int8) if out is None else out
            residual = length = 0.0
            reaches = np.empty(len(rows), np.float32)
            loose: list[Array] = [np.empty(0, np.int64)]
            for begin in range(0, len(rows), _BLOCK):
                left = turned(vectors(rows[begin : begin + _BLOCK])) - centre
                reach = reaches[begin : begin + _BLOCK] = np.abs(left).max(axis=1)
                code = np.rint(left * np.float32(1 / scale)).clip(-127, 127)
                left -= code * np.float32(scale)
                lost = _lengths(left)
                far = np.flatnonzero((lost > limit) & (reach > largest))
                code[far], lost[far] = 0, 0
                codes[begin : begin + len(code)] = code
                residual, length = max(residual, float(lost.max())), max(length, scale * float(_lengths(code).max()))
                loose.append(far + begin)
            positions = np.concatenate(loose)
            if len(positions) <= _LOOSE_SHARE * len(rows):
                return cls(torch.from_numpy(codes), centre, scale, residual, length, positions)
            # The sample was not like the rest. Rows within the new largest cannot be loose.
            largest = float(np.quantile(reaches, 1 - _LOOSE_SHARE, method="higher"))

    def query(self, queries: Array, mixed: bool = False) -> QueryCodes:
        """Code float32 queries `(q, dim)`: in int8, or `mixed` in bfloat16, which loses less of them, and then rounds each product."""
        queries = turned(queries)
        lengths = _lengths(queries)
        if mixed:
            scale = np.ones(len(queries))
            codes = torch.from_numpy(queries).bfloat16()
            lost = _lengths(queries - codes.float().numpy())
            rounded = _mixed_error(queries.shape[1]) * (lengths + lost) * self.length
        else:
            largest = np.maximum(np.abs(queries).max(axis=1, initial=0), 1e-9)
            step = (largest / 127)[:, None]
            whole = np.rint(queries / step)
            codes, scale = torch.from_numpy(whole.astype(np.int8)), step[:, 0].astype(np.float64)
            lost = _lengths(queries - whole * step)
            rounded = np.zeros(len(queries))
        return QueryCodes(
            codes,
            scale * self.scale,
            queries.astype(np.float64) @ self.centre.astype(np.float64),
            (lengths * self.residual + lost * self.length + rounded) * (1 + 1e-5) + _SLACK * (1 + lengths),
        )

    def held_by(self, card: torch.device) -> Tensor | None:
        """The codes in a card's memory; None if they would take more than half of what is free there."""
        if card.type == "cuda" and 2 * self.codes.nbytes > torch.cuda.mem_get_info(card)[0]:
            return None
        return self.codes.to(card)

    def save(self, directory: Path) -> None:
        """Write what is not there yet: the codes, unless they were coded into their file, and the numbers that go with them."""
        if not (directory / FILES[0]).exists():
            np.save(directory / FILES[0], self.codes.numpy())
        np.savez(directory / FILES[1], centre=self.centre, loose=self.loose, numbers=[self.scale, self.residual, self.length])

    @classmethod
    def load(cls, directory: Path) -> Codes | None:
        """What `save` wrote, the codes memory-mapped; None if it is not there: another machine had no use for codes.

        Raises OSError or ValueError if it is damaged, or only a part of it is there.
        """
        if not any((directory / name).is_file() for name in FILES):
            return None
        codes = np.load(directory / FILES[0], mmap_mode="c", allow_pickle=False)
        try:
            with np.load(directory / FILES[1], allow_pickle=False) as stored:
                scale, residual, length = stored["numbers"].tolist()
                return cls(torch.from_numpy(codes), stored["centre"], scale, residual, length, stored["loose"])
        except (BadZipFile, KeyError) as error:
            raise ValueError(f"{directory / FILES[1]}: damaged") from error


def _mixed_error(dim: int) -> float:
    """More than a product of `mixed_products` is off, as a share of the product of both lengths: a float32 sum, rounded to the nearest bfloat16."""
    return float(2**-8 + dim * 2**-24)


def turned(rows: Array) -> Array:
    """Float32 rows `(n, dim)` under one orthogonal map that spreads every component over all: random signs, then a cosine transform.

    Inner products stay what they are. The components of most unit rows are then like those of random directions, near
    dim ** -0.5, and eight bits go further (the idea of QuIP, Chee et al. 2023, section 4).
    """
    cores = torch.get_num_threads() if len(rows) >= _TURNED else None  # threads begin anew each time
    found: Array = fft.dct(rows * _signs(rows.shape[1]), axis=1, norm="ortho", workers=cores)
    return found


@cache
def _signs(dim: int) -> Array:
    return np.random.default_rng(384).integers(0, 2, dim).astype(np.float32) * 2 - 1


def renormalise(rows: Array, out: Array | None = None) -> Array:
    """Stored rows as the vectors that they stand for: float32, of length 1; in `out`, where that is given."""
    found: Array = np.empty(rows.shape, np.float32) if out is None else out
    if rows.dtype == np.float16:  # NumPy's own conversion is ten times as slow
        torch.from_numpy(found).copy_(torch.from_numpy(np.ascontiguousarray(rows)))
    else:
        found[:] = rows
    # Not by BLAS, here and where scores are made: equal rows must stay equal wherever they lie in memory.
    lengths = np.sqrt(np.einsum("ij,ij->i", found, found))
    there = torch.from_numpy(found)
    torch.div(there, torch.from_numpy(lengths)[:, None], out=there)  # NumPy takes twice as long
    return found


def _lengths(rows: Array) -> Array:
    lengths: Array = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return lengths
