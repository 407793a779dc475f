"""What follows pooling in some encoders: linear layers, layer norm, normalisation, as sentence-transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embell.errors import EncoderError

FILE = "head.safetensors"


class Dense(nn.Module):
    """A linear layer with an activation; `residual` adds its input, projected if the widths differ."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: str, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = getattr(nn, activation)()
        if residual and inputs != outputs:
            self.residual: nn.Module | None = nn.Linear(inputs, outputs, bias=False)
        else:
            self.residual = nn.Identity() if residual else None

    def forward(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.activation(self.linear(vectors))
        return out if self.residual is None else out + self.residual(vectors)


class Norm(nn.Module):
    """LayerNorm over the components."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.norm(vectors)
        return out


class Normalise(nn.Module):
    """Length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


_KINDS: dict[str, type[nn.Module]] = {"dense": Dense, "layer-norm": Norm, "normalise": Normalise}


def build(parts: Sequence[dict[str, Any]], where: str) -> nn.Sequential:
    """The layers that `parts` describe, with random weights; each part has a `kind` and that layer's arguments.

    Raises EncoderError for a part of an unknown kind or with other arguments.
    """
    layers = []
    for part in parts:
        options = dict(part)
        kind = str(options.pop("kind", None))
        activation = options.get("activation", "Identity")
        if kind not in _KINDS or activation not in ("Identity", *torch.nn.modules.activation.__all__):
            raise EncoderError(f"{where}: a head of kind {kind!r} with activation {activation!r} is not supported")
        try:
            layers.append(_KINDS[kind](**options))
        except TypeError as error:
            raise EncoderError(f"{where}: the head's {kind} layer is not described right ({error})") from error
    return nn.Sequential(*layers)


def load(parts: Sequence[dict[str, Any]], directory: Path) -> nn.Sequential:
    """The head that was saved in `directory` as `head.safetensors`.

    Raises EncoderError if its weights are not all there.
    """
    head = build(parts, str(directory))
    if head.state_dict():
        fill(head, directory / FILE)
    return head


def fill(module: nn.Module, path: Path) -> None:
    """Load weights from a safetensors file; every key must be there and none be left over.

    Raises EncoderError.
    """
    if not path.is_file():
        raise EncoderError(f"{path}: not there; its weights belong to the model (pickled weights are never loaded)")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:  # a damaged file raises what its reader likes
        raise EncoderError(f"{path}: does not hold the weights it should: {' '.join(str(error).split())[:300]}") from error


def save(head: nn.Sequential, directory: Path) -> None:
    """Write the weights, if there are any."""
    if weights := head.state_dict():
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / FILE)
