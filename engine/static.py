"""Static models (model2vec): a vector for each token of the vocabulary, averaged. No attention, no order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from embell.engine.spec import ModelSettings, read_json
from embell.errors import EncoderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TABLES = ("embeddings", "embedding.weight")  # as model2vec and as sentence-transformers name it


class StaticNetwork(nn.Module):
    """A token table `(vocabulary, dim)` in the place of a transformer."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])

    def save_pretrained(self, directory: Path) -> None:
        save_file({"embeddings": self.table.contiguous()}, directory / "model.safetensors")


def is_static(directory: Path) -> bool:
    """Whether a model directory holds a static model."""
    weights = directory / "model.safetensors"
    if not weights.is_file() or not (directory / "tokenizer.json").is_file():
        return False
    try:
        with safe_open(weights, framework="pt") as tensors:
            return any(name in tensors.keys() for name in _TABLES)  # noqa: SIM118  (not a dictionary)
    except Exception:
        return False  # damaged: whoever loads it will say so


def load(directory: Path) -> tuple[StaticNetwork, PreTrainedTokenizerBase, int | None]:
    """The model, its tokenizer, and the id of its unknown token, which is left out of the average.

    A table that is smaller than the vocabulary comes with a mapping of token to row, and with a weight for each token.

    Raises EncoderError if files are damaged or do not fit each other.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        with safe_open(directory / "model.safetensors", framework="pt") as tensors:
            stored = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:
        raise EncoderError(f"{directory}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    own = next(name for name in _TABLES if name in stored)
    table = stored[own].float()
    if "mapping" in stored:
        table = table[stored["mapping"].long()]
    if "weights" in stored:
        table = table * stored["weights"].float().unsqueeze(1)
    if len(table) < tokenizer.get_vocab_size():
        raise EncoderError(f"{directory}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model only {len(table)}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    name = getattr(tokenizer.model, "unk_token", None)
    # Only model2vec leaves unknown tokens out; a table saved by sentence-transformers is trained with them.
    unknown = tokenizer.token_to_id(name) if name and own == "embeddings" else None
    return StaticNetwork(table), PreTrainedTokenizerFast(tokenizer_object=tokenizer), unknown


def settings(directory: Path) -> ModelSettings:
    """What model2vec's own `config.json` says, in embell's terms."""
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    longest = config.get("max_length", 512) if "model_type" in config or "normalize" in config else None
    head: tuple[dict[str, Any], ...] = ({"kind": "normalise"},) if config.get("normalize") else ()
    return ModelSettings(start_layer=None, max_length=longest or 1_000_000, head=head)
