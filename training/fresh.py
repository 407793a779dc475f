"""A new small decoder: its shape, and what its weights begin with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel

from embell.engine import backbone
from embell.errors import UsageError
from embell.training.table import Bags, fit, worth_joining
from embell.training.teacher import Teacher
from embell.training.vocabulary import join, train_tokenizer

TOKEN_RMS = 0.7
"""Root mean square of a component of the token table at the start."""
ROUNDS = 2
"""Rounds in which phrases are chosen."""
RESIDUAL = 0.02
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
        epsilon: what every norm adds to the mean square of a state before its root; where it is large, states keep their lengths, and
            with them tokens their weights in the mean
    """

    new_layers: int = 4
    hidden: int = 384
    inner: int = 1024
    heads: int = 6
    vocabulary: int = 24_576
    positions: int = 512
    epsilon: float = 1e-6

    def config(self) -> LlamaConfig:
        """The configuration; the padding token is the first of the vocabulary.

        Raises UsageError for a shape that cannot be built.
        """
        for name in ("new_layers", "hidden", "inner", "heads", "positions", "vocabulary"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.epsilon <= 0:
            raise UsageError(f"epsilon must be more than 0, not {self.epsilon}")
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
            rms_norm_eps=self.epsilon,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=True,
        )


def fresh_student(
    shape: ShapeOptions, teacher: Teacher, texts: Sequence[str], directory: Path, seed: int, fit_steps: int, phrases: int
) -> str:
    """Write a decoder that begins near the teacher, unless it is there already, made of the same texts; returns its directory.

    Each token's row begins as the teacher's vector of the token's string. Then the table alone is fitted for `fit_steps` steps: the
    mean of a text's rows to the teacher's vector of the text. `phrases` of the vocabulary's tokens join two others, those that explain
    best what the fitted table misses; they are chosen in `ROUNDS` rounds, so that a phrase may grow, and the table is fitted anew
    after each. That takes minutes, and layers trained afterwards start from there.

    Raises UsageError if the student would be wider than the teacher, or if phrases leave no room for other tokens.
    """
    of = directory / "made_of"
    if of.is_file() and of.read_text() == teacher.made_of:
        return str(directory)
    shutil.rmtree(directory, ignore_errors=True)
    if shape.hidden > teacher.dim:
        raise UsageError(f"hidden is {shape.hidden}, more than the {teacher.dim} components of the teacher's vectors")
    tokenizer = train_tokenizer(texts, shape.vocabulary - phrases, shape.positions)
    torch.manual_seed(seed)
    network = LlamaModel(shape.config())
    strings = [str(tokenizer.decode([token])).strip() or "space" for token in range(len(tokenizer))]
    rows = teacher.turned(torch.from_numpy(teacher.encoder.encode(strings)))[:, : shape.hidden]
    rows -= rows.mean(dim=0)
    rows *= TOKEN_RMS / rows.square().mean().sqrt()
    rows[0] = 0
    if fit_steps:
        bags = Bags(tokenizer, texts, shape.positions)
        rows = fit(rows, bags, teacher, shape.epsilon, fit_steps, seed)
    for wanted in [phrases * (number + 1) // ROUNDS - phrases * number // ROUNDS for number in range(ROUNDS)] if phrases else ():
        pairs = worth_joining(rows, bags, teacher, shape.epsilon, 2 * wanted)
        tokenizer, pairs = join(tokenizer, pairs, wanted)
        first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
        rows = torch.cat([rows, rows[first] + rows[second]])
        bags = Bags(tokenizer, texts, shape.positions)
        rows = fit(rows, bags, teacher, shape.epsilon, fit_steps, seed)
    if len(rows) < shape.vocabulary:  # the texts have no more tokens to give
        network.resize_token_embeddings(len(rows))
    with torch.no_grad():
        network.embed_tokens.weight[:] = rows
        for name, weight in network.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(RESIDUAL)
    part = directory.with_name(f"{directory.name}.part")
    with backbone.quietly():
        tokenizer.save_pretrained(part)
        network.save_pretrained(part)
    (part / of.name).write_text(teacher.made_of)
    part.replace(directory)
    return str(directory)
