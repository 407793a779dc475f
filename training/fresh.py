"""A new small decoder: its tokenizer, its shape, and what its weights begin with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from embell.engine import backbone
from embell.errors import UsageError
from embell.training import losses
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
            rms_norm_eps=self.epsilon,
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


def fresh_student(shape: ShapeOptions, teacher: Teacher, texts: Sequence[str], directory: Path, seed: int, fit_steps: int) -> str:
    """Write a decoder that begins near the teacher, unless it is there already; returns its directory.

    Each token's row begins as the teacher's vector of the token's string. Then the table alone is fitted for `fit_steps` steps: the
    mean of a text's rows to the teacher's vector of the text. That takes minutes, and layers trained afterwards start from there.

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
    rows[0] = 0
    if fit_steps:
        rows = fit_table(rows, tokenizer, teacher, texts, shape, fit_steps, seed)
    with torch.no_grad():
        network.embed_tokens.weight.zero_()
        network.embed_tokens.weight[: len(rows)] = rows
        for name, weight in network.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(RESIDUAL)
    part = directory.with_name(f"{directory.name}.part")
    with backbone.quietly():
        tokenizer.save_pretrained(part)
        network.save_pretrained(part)
    part.replace(directory)
    return str(directory)


FIT_BATCH, FIT_RATE = 2048, 2e-2
"""Texts of a step of `fit_table`, and its learning rate at the start."""


def fit_table(
    rows: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    teacher: Teacher,
    texts: Sequence[str],
    shape: ShapeOptions,
    steps: int,
    seed: int,
) -> Tensor:
    """The token table `(vocabulary, hidden)` whose means over texts, after the final norm, come nearest to the teacher's vectors.

    Lengths of rows are free: common words become short, which is what weights them in a mean. Texts are drawn with replacement,
    at most `FIT_BATCH` a step.
    """
    table = nn.Parameter(rows.clone())
    optimizer = torch.optim.Adam([table], lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(texts), (min(FIT_BATCH, len(texts)),), generator=order).unique().tolist()
        listed = tokenizer([texts[at] for at in chosen], truncation=True, max_length=shape.positions)["input_ids"]
        lengths = torch.tensor([len(ids) for ids in listed])
        normed = table * torch.rsqrt(table.square().mean(dim=1, keepdim=True) + shape.epsilon)
        ids = torch.tensor([token for ids in listed for token in ids])
        means = functional.embedding_bag(ids, normed, lengths.cumsum(0) - lengths, mode="mean")
        loss = losses.to_teacher(means, teacher(chosen)[:, : shape.hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return table.detach()
