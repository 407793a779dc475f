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
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_TABLES = ("embeddings", "embedding.weight")  # as model2vec and as sentence-transformers name it


class StaticNetwork(nn.Module):
    """A token table `(vocabulary, dim)` in the place of a transformer; `name` is what its file calls it, one of `_TABLES`."""

    def __init__(self, table: Tensor, name: str) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self._name = name

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])

    def save_pretrained(self, directory: Path) -> None:
        save_file({self._name: self.table.contiguous()}, directory / "model.safetensors")


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
    try:
        if "mapping" in stored:
            table = table[stored["mapping"].long()]
        if "weights" in stored:
            table = table * stored["weights"].float().unsqueeze(1)
    except (IndexError, RuntimeError) as error:
        raise EncoderError(f"{directory}: its table, mapping and weights do not fit each other ({error})") from error
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if len(table) < tokens:
        raise EncoderError(f"{directory}: the tokenizer has {tokens} tokens, the model only {len(table)}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # Only model2vec leaves unknown tokens out; a table saved by sentence-transformers is trained with them.
    unknown = _unknown(tokenizer, directory) if own == "embeddings" else None
    return StaticNetwork(table, own), PreTrainedTokenizerFast(tokenizer_object=tokenizer), unknown


def _unknown(tokenizer: Tokenizer, directory: Path) -> int | None:
    if hasattr(tokenizer.model, "unk_token"):
        name = tokenizer.model.unk_token
        return None if name is None else tokenizer.token_to_id(name)
    unknown: int | None = read_json(directory / "tokenizer.json")["model"].get("unk_id")  # Unigram
    return unknown


def settings(directory: Path) -> ModelSettings:
    """What model2vec's own `config.json` says, in embell's terms; without one, texts are cut where the tokenizer's file says."""
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    if "model_type" in config or "normalize" in config:
        longest = config.get("max_length", 512)
    else:
        longest = (read_json(directory / "tokenizer.json").get("truncation") or {}).get("max_length")
    head: tuple[dict[str, Any], ...] = ({"kind": "normalise"},) if config.get("normalize") else ()
    return ModelSettings(start_layer=None, max_length=longest or 1_000_000, head=head)
