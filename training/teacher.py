"""What a student learns from: the vectors of an encoder, or the pair scores of a cross-encoder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embell.engine import Encoder, backbone
from embell.errors import EncoderError, UsageError
from embell.training.run_directory import mark_of, weights_mark

SAMPLE = 30_000
"""Texts that the principal axes are computed from, at most."""


class Teacher:
    """An encoder's unit vectors of a run's texts, each computed once and kept beside the run as float16."""

    def __init__(
        self, model: str, length: int | None, folder: Path, texts: Sequence[str], principal: bool, dtype: str | None = None,
        begun: bool = False, device: str | None = None,
    ) -> None:  # fmt: skip
        """`length` tokens are read at a time and pieces averaged; `principal` turns the vectors to their principal axes.

        `dtype` and `device` as for `Encoder.load`. With `begun`, what was computed before has been learnt from, and must be of the same texts.

        Raises EncoderError for a model that is no encoder, UsageError if texts or teacher are not those of a run that has begun.
        """
        options: dict[str, Any] = {} if length is None else {"max_length": length, "on_long": "chunk"}
        self.encoder = Encoder.load(model, dtype=dtype, device=device, **options)
        self._texts, self._folder = texts, folder
        self.made_of = hashlib.sha256(
            repr((mark_of(self.encoder), length, list(texts))).encode(errors="surrogatepass")
        ).hexdigest()
        mark, path, known = folder / "made_of", folder / "vectors.f16", folder / "known"
        if not (mark.is_file() and mark.read_text() == self.made_of):
            if mark.is_file() and begun:
                raise UsageError(
                    f"{folder.parent}: the teacher changed since this run began; put it back to go on, or give another --output to begin anew"
                )
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file, size in ((path, 2 * self.dim), (known, 1)):
                with file.open("wb") as empty:
                    empty.truncate(len(texts) * size)
            mark.write_text(self.made_of)
        self._kept = np.memmap(path, np.float16, "r+", shape=(len(texts), self.dim))
        self._known = np.memmap(
            known, bool, "r+", shape=len(texts)
        )  # which rows are whole: one may have been cut, or is written to
        self._axes = self._principal_axes() if principal else None

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.encoder.dim

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        """Unit vectors `(n, dim)` in float32 of the texts with these numbers."""
        return self.turned(self._plain(np.asarray(chosen)))

    def _plain(self, rows: np.ndarray) -> Tensor:
        missing = np.unique(rows[~self._known[rows]])
        if len(missing):
            self._kept[missing] = self.encoder.encode([self._texts[row] for row in missing])
            self._known[missing] = True
        return torch.nn.functional.normalize(torch.from_numpy(self._kept[rows].astype(np.float32)), dim=-1)

    def turned(self, vectors: Tensor) -> Tensor:
        """Vectors of length 1, turned to the principal axes if those are asked for, or towards a student's."""
        if self._axes is not None:
            vectors = vectors @ self._axes
        return torch.nn.functional.normalize(vectors, dim=-1)

    def _principal_axes(self) -> Tensor:
        """Orthonormal columns `(dim, dim)`, those along which the texts' vectors are longest first."""

        def make() -> Tensor:
            vectors = self._plain(self._sample()).double()
            columns: Tensor = torch.linalg.eigh(vectors.T @ vectors).eigenvectors
            return columns.flip(1)

        return self._kept_axes("axes", make)

    def turn_towards(self, student: Encoder) -> None:
        """Turn the vectors to where those of a student are that has learnt turned ones: what it knows stays right.

        The orthogonal map that brings the teacher's vectors of a sample nearest to the student's (Schönemann, 1966); of a
        narrower student, to its components, which come first.
        """

        def make() -> Tensor:
            rows = self._sample()
            ours = torch.from_numpy(np.asarray(student.encode([self._texts[row] for row in rows]), np.float64))
            left, _, right = torch.linalg.svd(self._plain(rows).double().T @ torch.nn.functional.normalize(ours, dim=-1))
            width = student.dim
            return torch.cat([left[:, :width] @ right, left[:, width:]], dim=1)

        self._axes = self._kept_axes(f"towards-{student.spec.fingerprint[:16]}", make)

    def _sample(self) -> np.ndarray:
        return np.linspace(0, len(self._texts) - 1, min(SAMPLE, len(self._texts))).astype(int)

    def _kept_axes(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Axes that are made once and kept beside the vectors."""
        path, part = self._folder / f"{name}.npy", self._folder / "part.npy"
        if not path.is_file():
            np.save(part, make().float().numpy())
            part.replace(path)
        return torch.from_numpy(np.load(path))


class CrossEncoder:
    """A sequence classifier with one output, which reads both sentences at once."""

    def __init__(self, model: str) -> None:
        """Raises EncoderError if it cannot be read or has more outputs than one."""
        from transformers import AutoModelForSequenceClassification

        directory = backbone.find(model, None)
        self.mark = weights_mark(directory).hex()
        self._tokenizer = backbone.load_tokenizer(directory)
        with backbone.quietly():
            try:
                self._network: Any = AutoModelForSequenceClassification.from_pretrained(
                    directory, use_safetensors=True, trust_remote_code=False
                ).eval()
            except Exception as error:  # a damaged file raises whatever its reader likes
                raise EncoderError(f"{model}: cannot be loaded as a cross-encoder: {str(error).splitlines()[0]}") from error
        if self._network.config.num_labels != 1:
            raise EncoderError(f"{model}: has {self._network.config.num_labels} outputs; a cross-encoder for scores has one")
        if self._tokenizer.pad_token is None:
            raise EncoderError(f"{model}: its tokenizer has no padding token, and pairs of several lengths need one")
        self._longest = min(self._tokenizer.model_max_length, backbone.position_limit(self._network) or 512)

    @torch.inference_mode()
    def __call__(self, first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Scores `(n,)` from 0 to 1: the sigmoid of the model's output."""
        batch = self._tokenizer(
            list(first), list(second), padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        scores: Tensor = self._network(**batch).logits.float().squeeze(-1).sigmoid()
        return scores.clone()
