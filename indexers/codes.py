"""Unit rows as int8 codes: what the coarse product of exact search multiplies, and how far it can be wrong.

int8 products with int32 sums are exact, and several times as fast as float32 where the CPU has instructions for them
(AVX512-VNNI, AVX-VNNI, AMX). What is lost is lost in coding, and that is measured for each row when it is coded.
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
_LOOSE_SHARE = 1e-4
_SLACK = 3e-6
"""What float32 arithmetic may lose in a coarse score beside the coding."""
_FILES = ("codes.npy", "codes_of_rows.npz")


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


@dataclass(frozen=True)
class QueryCodes:
    """Queries in int8: the inner product of a query and a row is `scale * product + offset`, give or take `error`.

    `codes` is int8 `(q, dim)`; `scale`, `offset` and `error` are float64 `(q,)`.
    """

    codes: Tensor
    scale: Array
    offset: Array
    error: Array


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

    def query(self, queries: Array) -> QueryCodes:
        """Code float32 queries `(q, dim)`."""
        queries = turned(queries)
        scale = np.maximum(np.abs(queries).max(axis=1, keepdims=True, initial=0), 1e-9) / 127
        codes = np.rint(queries / scale)
        lost = _lengths(queries - codes * scale)
        lengths = _lengths(queries)
        return QueryCodes(
            torch.from_numpy(codes.astype(np.int8)),
            scale[:, 0].astype(np.float64) * self.scale,
            queries.astype(np.float64) @ self.centre.astype(np.float64),
            (lengths * self.residual + lost * self.length) * (1 + 1e-5) + _SLACK * (1 + lengths),
        )

    def save(self, directory: Path) -> None:
        """Write what is not there yet: the codes, unless they were coded into their file, and the numbers that go with them."""
        if not (directory / _FILES[0]).exists():
            np.save(directory / _FILES[0], self.codes.numpy())
        np.savez(directory / _FILES[1], centre=self.centre, loose=self.loose, numbers=[self.scale, self.residual, self.length])

    @classmethod
    def load(cls, directory: Path) -> Codes | None:
        """What `save` wrote, the codes memory-mapped; None if it is not there.

        Raises OSError or ValueError if it is damaged.
        """
        if not all((directory / name).is_file() for name in _FILES):
            return None
        codes = np.load(directory / _FILES[0], mmap_mode="c", allow_pickle=False)
        try:
            with np.load(directory / _FILES[1], allow_pickle=False) as stored:
                scale, residual, length = stored["numbers"].tolist()
                return cls(torch.from_numpy(codes), stored["centre"], scale, residual, length, stored["loose"])
        except (BadZipFile, KeyError) as error:
            raise ValueError(f"{directory / _FILES[1]}: damaged") from error


def turned(rows: Array) -> Array:
    """Float32 rows `(n, dim)` under one orthogonal map that spreads every component over all: random signs, then a cosine transform.

    Inner products stay what they are. The components of most unit rows are then like those of random directions, near
    dim ** -0.5, and eight bits go further (the idea of QuIP, Chee et al. 2023, section 4).
    """
    found: Array = fft.dct(rows * _signs(rows.shape[1]), axis=1, norm="ortho", workers=-1)
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
    found /= np.sqrt(np.einsum("ij,ij->i", found, found))[:, None]
    return found


def _lengths(rows: Array) -> Array:
    lengths: Array = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return lengths
