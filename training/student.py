"""The encoder in training: its network with gradients, a LoRA adapter inside if one is asked for, and its vectors at several depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embell.engine import Encoder
from embell.engine.encoder import after_pooling
from embell.engine.fast_llama import FastLlama
from embell.engine.layers import States
from embell.engine.packed import Packing, pool_packed
from embell.engine.pooling import pool
from embell.engine.tokens import TokenRow
from embell.errors import EncoderError, UsageError
from embell.training.packed_llama import PackedLlama
from embell.training.run import RunOptions, training_device


@dataclass(frozen=True)
class EncoderOptions:
    """How the model encodes, in training as afterwards.

    Attributes:
        start_layer: first layer that looks both ways, counted from 0, negative from the end; none is causal;
            default: as the model's files say, else the last layer
        causal: no layer looks both ways
        pooling: how token states become one vector, as for `embell encode`; default: as the model's files say, else mean
        layers: keep only the first so many layers
        preset: prompts and pooling of a known method: bellm, prompteol, summarize, knowledge, cot, echo
        query_prompt: template around queries, with {text} in it
        document_prompt: template around documents, with {text} in it
        max_length: tokens at most; what is longer is cut
        device: cpu or cuda; default: a GPU if there is one
    """

    start_layer: int | None = None
    causal: bool = False
    pooling: str | None = None
    layers: int | None = None
    preset: str | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    max_length: int | None = None
    device: str | None = None

    def load(self, model: str | None) -> Encoder:
        """The model as an encoder in float32, in which weights are kept while they learn.

        Raises EncoderError, and UsageError for a causal model with a start layer and for a card that is not the first.
        """
        names = ("start_layer", "pooling", "layers", "preset", "query_prompt", "document_prompt", "max_length", "device")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if model == "":
            raise UsageError("--model is empty; leave it out for the embedded model")
        if self.causal:
            if self.start_layer is not None:
                raise UsageError("a causal model has no start layer; give one of the two")
            given["start_layer"] = None
        given["device"] = str(training_device(self.device))  # one card: copies on others would not learn
        given["merge_adapter"] = (
            model is not None and (Path(model) / "adapter_config.json").is_file()
        )  # or there would be nothing with gradients
        encoder = Encoder.load(model, dtype="float32", **given)
        encoder.merge_adapter()  # one of the hub
        if self.max_length is not None and encoder.spec.max_length < self.max_length:
            raise UsageError(
                f"--max-length {self.max_length} is more than the {encoder.spec.max_length} tokens that the model reads"
            )
        return encoder


@dataclass(frozen=True)
class LoraOptions:
    """LoRA on all linear layers; without it, all weights are trained.

    Attributes:
        lora_rank: rank of the adapter; 0 trains all weights
        lora_alpha: scale of the adapter; default: the rank
        lora_dropout: share of the adapter's inputs that are dropped in training
        merge: add the finished adapter to the weights; without it, the adapter alone is saved
    """

    lora_rank: int = 0
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    merge: bool = True

    def check(self, run: RunOptions) -> None:
        """Raises UsageError for a value that means nothing, and for what an adapter would need if there is to be none."""
        if self.lora_rank < 0:
            raise UsageError(f"lora_rank cannot be negative, as {self.lora_rank} is")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise UsageError(f"lora_alpha must be at least 1, not {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout is a share from 0 to below 1, not {self.lora_dropout}")
        if not self.lora_rank and self != LoraOptions():
            name = next(field.name for field in fields(self) if getattr(self, field.name) != field.default)
            option = "--no-merge" if name == "merge" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} has no effect without --lora-rank; give that, or leave it out")
        if self.lora_rank and run.table_rate != RunOptions.table_rate:
            raise UsageError("--table-rate has no effect with --lora-rank, which leaves the token table as it is; leave it out")


class Student(nn.Module):
    """An encoder whose vectors carry gradients.

    Texts of the Llama family run packed, without padding; those of other models as padded batches through transformers.
    """

    def __init__(self, encoder: Encoder, depths: Sequence[int] = (), lora: LoraOptions | None = None) -> None:
        """`depths` are the numbers of layers, beside all of them, after which vectors are wanted.

        Raises EncoderError for an encoder that cannot be trained, UsageError for a depth that it has not.
        """
        super().__init__()
        layers = encoder.spec.layers
        if not layers:
            raise EncoderError("a static model has no layers to train; give a transformer")
        if wrong := [depth for depth in depths if not 1 <= depth < layers]:
            raise UsageError(f"depth {wrong[0]} is not one of the depths 1 to {layers - 1} of a model with {layers} layers")
        fast = encoder.fast
        self.encoder, self.depths = encoder, tuple(sorted(depths))
        self.network = encoder.network.requires_grad_()  # an adapter that was merged into it left it frozen
        self.head = encoder.head
        self._width = encoder.dim  # less than the network's where the model is told to keep the first components only
        states = States(encoder) if self.depths and not (fast and isinstance(fast[0], FastLlama)) else None
        self._states = states
        self._merge = lora is None or lora.merge
        if lora is not None and lora.lora_rank and not lora.merge and encoder.spec.adapter is not None:
            raise UsageError(
                f"{encoder.spec.adapter} is an adapter itself, and the new one would be saved without it; leave out --no-merge"
            )
        if lora is not None and lora.lora_rank:
            widest = max(
                (min(one.weight.shape) for one in self.network.modules() if isinstance(one, nn.Linear)), default=lora.lora_rank
            )
            if lora.lora_rank > widest:
                raise UsageError(
                    f"lora_rank {lora.lora_rank} is more than any matrix of the model has, {widest}; give a lower --lora-rank"
                )
            encoder.add_adapter(lora.lora_rank, lora.lora_alpha, lora.lora_dropout)
            if self.head is not None:
                self.head.requires_grad_(False)
        start = layers if encoder.spec.start_layer is None else encoder.spec.start_layer
        self._packed = PackedLlama(self.network, fast[0].shape, start) if fast and isinstance(fast[0], FastLlama) else None

    @property
    def packed(self) -> bool:
        """Whether batches run without padding."""
        return self._packed is not None

    def forward(self, rows: Sequence[TokenRow]) -> tuple[Tensor, dict[int, Tensor]]:
        """Vectors `(n, width)` of token rows after all layers, and by depth after fewer; float32, not of length 1."""
        return self._run_packed(rows) if self._packed is not None else self._run_padded(rows)

    def _run_packed(self, rows: Sequence[TokenRow]) -> tuple[Tensor, dict[int, Tensor]]:
        assert self._packed is not None
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
        sorted_rows = [rows[row] for row in order]
        device = self.encoder.device
        ids = torch.tensor(list(chain.from_iterable(row.ids for row in sorted_rows)), device=device)
        packing = Packing(tuple(len(row.ids) for row in sorted_rows), device)
        begins, ends = ([getattr(row, border) for row in sorted_rows] for border in ("begin", "end"))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        back = back.to(device)
        found: dict[int, Tensor] = {}
        for depth, states in enumerate(self._packed.states(ids, packing)):
            if depth in self.depths or depth == self.encoder.spec.layers:
                pooled = pool_packed(self._packed.normed(states), packing, begins, ends, self.encoder.spec.pooling)
                found[depth] = after_pooling(pooled, self.head)[back, : self._width]
        return found.pop(self.encoder.spec.layers), found

    def _run_padded(self, rows: Sequence[TokenRow]) -> tuple[Tensor, dict[int, Tensor]]:
        batch = self.encoder.collate(rows)
        if self._states is None:
            return self.encoder.vectors(batch)[:, : self._width], {}
        first = batch.real.long().argmax(dim=1)
        found = {}
        for depth, states in enumerate(self._states.before_norm(batch)):
            if depth in self.depths or depth == self.encoder.spec.layers:
                pooled = pool(self._states.normed(states), batch.pooled, self.encoder.spec.pooling, first)
                found[depth] = after_pooling(pooled, self.head)[:, : self._width]
        return found.pop(self.encoder.spec.layers), found

    def finish(self, directory: Path) -> None:
        """Write the trained encoder, or its adapter alone if that was not to be merged.

        Raises EncoderError if the directory holds a model of the other kind.
        """
        self.network.eval()
        if self._merge:
            self.encoder.merge_adapter()
        self.encoder.save(directory)
