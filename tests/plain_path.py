"""The plain transformers path, one text at a time, that vectors are compared with; models that are no decoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

from embell import Encoder
from embell.engine import bellm
from tiny_models import HIDDEN, tiny_tokenizer


@cache
def stock(directory: Path, start: int | None = None) -> PreTrainedModel:
    """The saved model as transformers loads it, its layers from `start` on made bidirectional."""
    model: PreTrainedModel = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    if start is not None:
        bellm.make_bidirectional(model, start)
    return model


def hidden_states(directory: Path, ids: Sequence[int], start: int | None = None) -> tuple[Tensor, ...]:
    """The states `(length, hidden)` before each layer and at the end, of one text without padding."""
    with torch.no_grad():
        output = stock(directory, start)(input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
    return tuple(states[0] for states in output.hidden_states)


def last_states(directory: Path, ids: Sequence[int], start: int | None = None) -> Tensor:
    return hidden_states(directory, ids, start)[-1]


def tokens_of(encoder: Encoder, text: str) -> list[int]:
    ids: list[int] = encoder.tokenizer(text)["input_ids"]
    return ids


def decoded(encoder: Encoder, ids: Sequence[int]) -> str:
    text: str = encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def unit(vector: Any) -> np.ndarray:
    """The vector as numpy, with length 1."""
    array = np.asarray(vector, dtype=np.float32)
    scaled: np.ndarray = array / np.linalg.norm(array)
    return scaled


def tiny_bert_directory(path: Path) -> Path:
    """Save a tiny model whose layers all look both ways, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


WORDS = ("search", "engines", "keep", "vectors", "of", "texts")


def tiny_static_directory(path: Path) -> Path:
    """Save a static model over whole words, which does not know any but `WORDS`."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: at + 1 for at, word in enumerate(WORDS)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    table = torch.randn(len(WORDS) + 1, 8, generator=torch.Generator().manual_seed(0))
    save_file({"embeddings": table}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": False}))
    return path
