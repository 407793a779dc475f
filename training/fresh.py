"""A new small decoder: its tokenizer, its shape, and what its weights begin with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from embell.engine import backbone
from embell.errors import UsageError
from embell.training.teacher import Teacher

PAD = "<pad>"
TOKEN_RMS = 0.7
"""Root mean square of a component of the token table at the start."""
RESIDUAL = 0.1
"""Layers begin at this share of their usual strength: the untrained student is nearly a bag of token vectors."""


@dataclass(frozen=True)
class ShapeOptions:
    """The shape of a new decoder, of the Llama family.

    Attributes:
        new_layers: layers
        hidden: width of the states, and of the vectors
        inner: width inside a layer's two products
        heads: attention heads
        vocabulary: tokens of the byte-level BPE tokenizer that is trained on the data
        positions: tokens of the longest text
    """

    new_layers: int = 4
    hidden: int = 384
    inner: int = 1024
    heads: int = 6
    vocabulary: int = 24_576
    positions: int = 512

    def config(self) -> LlamaConfig:
        """The configuration; the padding token is the first of the vocabulary.

        Raises UsageError for a shape that cannot be built.
        """
        for name in ("new_layers", "hidden", "inner", "heads", "positions"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise UsageError(f"hidden {self.hidden} cannot be shared out among {self.heads} heads of even width")
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.new_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.positions,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=True,
        )


def train_tokenizer(texts: Iterable[str], size: int, longest: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on NFKC-normalised, lower-cased text with white space folded; no token is ever unknown.

    Raises UsageError for a vocabulary with no room for the 256 bytes.
    """
    if size < 258:
        raise UsageError(f"vocabulary must be at least 258, not {size}: the bytes alone take 256 tokens")
    tokenizer = Tokenizer(models.BPE())
    fold = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *fold])
    # The prefix space makes a word at the start of a text the same token as elsewhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        padding_side="right",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def fresh_student(shape: ShapeOptions, teacher: Teacher, texts: Sequence[str], directory: Path, seed: int) -> str:
    """Write an untrained decoder that begins near the teacher, unless it is there already; returns its directory.

    Each token's row is the teacher's vector of the token's string.

    Raises UsageError if the student would be wider than the teacher.
    """
    if (directory / "config.json").is_file():
        return str(directory)
    if shape.hidden > teacher.dim:
        raise UsageError(f"hidden is {shape.hidden}, more than the {teacher.dim} components of the teacher's vectors")
    tokenizer = train_tokenizer(texts, shape.vocabulary, shape.positions)
    torch.manual_seed(seed)
    network = LlamaModel(shape.config())
    strings = [str(tokenizer.decode([token])).strip() or "space" for token in range(len(tokenizer))]
    rows = teacher.turned(torch.from_numpy(teacher.encoder.encode(strings)))[:, : shape.hidden]
    rows -= rows.mean(dim=0)
    rows *= TOKEN_RMS / rows.square().mean().sqrt()
    with torch.no_grad():
        network.embed_tokens.weight.zero_()
        network.embed_tokens.weight[: len(rows)] = rows
        network.embed_tokens.weight[0] = 0
        for name, weight in network.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(RESIDUAL)
    part = directory.with_name(f"{directory.name}.part")
    with backbone.quietly():
        tokenizer.save_pretrained(part)
        network.save_pretrained(part)
    part.replace(directory)
    return str(directory)
