"""Tiny random decoder models, made in milliseconds and the same on every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

LAYERS = 4
HIDDEN = 32
VOCABULARY = 97
WINDOW = 4
POSITIONS = 128

FAMILIES = ("llama", "qwen3", "qwen3-sliding", "mistral", "gpt2")
SLIDING = ("qwen3-sliding", "mistral")  # the families with an attention window

SENTENCES = (
    "The river rose over night and took the old bridge with it.",
    "A decoder reads its text from left to right, one token after another.",
    "Search engines keep vectors, and vectors keep the meaning of sentences.",
    "Nobody had expected that the committee would vote for the smaller budget.",
    "Café owners in Zürich pay more rent than those in Łódź.",
    "Padding must never change what a model says about a sentence!",
    "Two texts may look alike and still be about different things.",
    "Is the last layer of a language model the best one to read from?",
)


def tiny_config(family: str, vocabulary: int = VOCABULARY, layers: int = LAYERS, **changes: Any) -> PreTrainedConfig:
    """The configuration of a small model; the weights are wide enough for every layer to matter."""
    if family == "gpt2":
        options: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": layers, "n_head": 4, "n_positions": POSITIONS}
        config_class: type[PreTrainedConfig] = GPT2Config
    else:
        options = {
            "hidden_size": HIDDEN,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": HIDDEN // 4,
            "intermediate_size": 64,
            "max_position_embeddings": POSITIONS,
        }
        if family == "mistral":
            options["sliding_window"] = WINDOW
        if family == "qwen3-sliding":
            kinds = [("full_attention", "sliding_attention")[index % 2] for index in range(layers)]
            options |= {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": kinds}
        families = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config, "qwen3-sliding": Qwen3Config}
        config_class = families[family]
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return config_class(**{"vocab_size": vocabulary, "initializer_range": 0.2, **special, **options, **changes})


def tiny_model(
    family: str, attention: str = "sdpa", seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any
) -> PreTrainedModel:
    """A seeded random model of the family, in eval mode; `attention` is "eager" or "sdpa"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(family, vocabulary, **changes)
        model: PreTrainedModel = AutoModel.from_config(config, attn_implementation=attention)
    model.eval()
    return model


def tiny_tokenizer(size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that reads any text; the padding token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_encoder_directory(path: Path, family: str = "llama", layers: int = LAYERS, seed: int = 0) -> Path:
    """Save a tiny model and its tokenizer in `path`, for AutoModel and AutoTokenizer to load."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, seed=seed, vocabulary=len(tokenizer), layers=layers, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
