"""Pre-training: a small decoder learns to tell the next token, on text without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from embell.engine import backbone
from embell.engine.fast_llama import LlamaShape
from embell.engine.packed import Packing
from embell.engine.tokens import TokenRow
from embell.errors import CorpusError, UsageError
from embell.training.batches import Batches, Examples, plan_batches
from embell.training.fresh import ShapeOptions
from embell.training.packed_llama import PackedLlama
from embell.training.pairs import read_groups
from embell.training.recipe import refuse, to_toml
from embell.training.run import RunOptions, train, training_device
from embell.training.run_directory import begin, finish
from embell.training.vocabulary import train_tokenizer


def pretrain(
    data: tuple[Path, ...],
    output: Path,
    text: str | None = None,
    tokenizer: str | None = None,
    piece: int | None = None,
    held_out: float = 0.01,
    device: str = "cpu",
    shape: ShapeOptions = ShapeOptions(),  # noqa: B008
    run: RunOptions = RunOptions(),  # noqa: B008
) -> Path:
    """Train a small causal language model from nothing, for `contrastive`, `graded` and `distill` to make an encoder of.

    Texts stand in a batch side by side without padding, and none sees another. The loss is the cross-entropy of the next token;
    the score reported is the perplexity on texts that were held out.

    Args:
        data: files with a column of texts; JSONL, CSV, TSV or Parquet
        output: directory of the run
        text: column of the texts; default: text, texts, sentence or content
        tokenizer: directory or hub id of a tokenizer to use; default: one is trained on the data
        piece: tokens of a text at a time; longer ones are cut into pieces; default: 256, or the positions if those are fewer
        held_out: share of the pieces that perplexity is measured on, at most 1 000 of them
        device: cpu, or a GPU such as cuda
        shape: the shape of a new decoder
        run: how long and how fast

    Raises UsageError for settings that mean nothing, CorpusError for data that cannot be used, EncoderError for a device that cannot.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is a share from 0 to below 1, not {held_out}")
    long = min(256, shape.positions) if piece is None else piece
    if not 2 <= long <= shape.positions:
        raise UsageError(f"piece must be from 2 tokens to the {shape.positions} of --positions, not {long}")
    if tokenizer is not None:
        refuse(pretrain, locals(), ("vocabulary",), "with --tokenizer, which has one")
    if not held_out:
        refuse(pretrain, locals(), ("evaluate_every",), "where --held-out is 0")
    target = training_device(device)
    shape.config()
    run.start(device)
    with begin(output, to_toml(pretrain, locals()), data) as finished:
        if finished:
            return finished
        texts = list(chain.from_iterable(read_groups(data, text)))
        folder = output / "tokenizer"
        with PartialState().main_process_first():  # the others find what it has made
            if tokenizer is None and not (folder / "tokenizer.json").is_file():
                train_tokenizer(texts, shape.vocabulary, shape.positions).save_pretrained(folder)
        words = backbone.load_tokenizer(folder if tokenizer is None else backbone.find(tokenizer, None))
        pieces = [
            ids[begin : begin + long]
            for at in range(0, len(texts), 10_000)
            for ids in words(texts[at : at + 10_000], add_special_tokens=False, verbose=False)["input_ids"]
            for begin in range(0, len(ids), long)
            if len(ids) - begin > 1  # one token alone has no next
        ]
        kept = min(1000, int(held_out * len(pieces)))
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(run.seed)).tolist()
        aside, rows = [TokenRow(pieces[at], 0, len(pieces[at])) for at in order[:kept]], order[kept:]
        if not rows:
            raise CorpusError(f"{data[0]}: no text has two tokens to learn from")
        config = shape.config()
        config.vocab_size, config.pad_token_id = len(words), words.pad_token_id
        torch.manual_seed(run.seed)
        network = LlamaForCausalLM(config).to(target)  # type: ignore[arg-type]  # stubs of a decorated method
        model = _NextToken(network, shape)

        def make(numbers: Sequence[int]) -> Examples:
            return Examples([[TokenRow(pieces[rows[at]], 0, len(pieces[rows[at]])) for at in numbers]])

        def loss(deep: list[Tensor], shallow: dict[int, list[Tensor]], targets: dict[str, Tensor]) -> Tensor:
            return deep[0][:, 0].sum() / deep[0][:, 1].sum()

        @torch.no_grad()
        def measure() -> dict[str, float]:
            found = [model(aside[begin : begin + 32])[0] for begin in range(0, len(aside), 32)]
            total = torch.cat(found).sum(dim=0)
            return {"perplexity": float((total[0] / total[1]).exp())}

        def save(directory: Path) -> None:
            with backbone.quietly():
                network.save_pretrained(directory)
                words.save_pretrained(directory)

        plan = plan_batches([()] * len(rows), run.batch, run.epochs, run.seed)
        vocabulary = repr(sorted(words.get_vocab().items())).encode(errors="surrogatepass")
        made_of = {"tokenizer": hashlib.sha256(vocabulary).hexdigest()}
        train(model, Batches(plan, make), loss, output, run, made_of, measure if aside else None)
        return finish(output, save)


class _NextToken(nn.Module):
    """Called like a Student; instead of vectors it gives, for each piece, the sum of its losses and their number."""

    packed = True

    def __init__(self, network: LlamaForCausalLM, shape: ShapeOptions) -> None:
        super().__init__()
        self.network = network
        config: Any = network.config
        facts = LlamaShape(
            config.vocab_size, shape.hidden, shape.new_layers, shape.heads, shape.heads, shape.hidden // shape.heads, shape.inner,
            config.rms_norm_eps, config.rope_parameters["rope_theta"], shape.positions, config.hidden_act,
        )  # fmt: skip
        self._packed = PackedLlama(network.model, facts, shape.new_layers)

    def forward(self, rows: Sequence[TokenRow]) -> tuple[Tensor, dict[int, Tensor]]:
        """`(pieces, 2)`: the summed cross-entropy in nats of a piece's tokens but the first, and their number."""
        rows = sorted(rows, key=lambda row: -len(row.ids))
        device = self.network.device
        ids = torch.tensor(list(chain.from_iterable(row.ids for row in rows)), device=device)
        lengths = [len(row.ids) for row in rows]
        for states in self._packed.states(ids, Packing(tuple(lengths), device)):  # noqa: B007  (only the last are needed)
            pass
        owners = torch.arange(len(rows), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        followed = owners[:-1] == owners[1:]
        logits = self.network.lm_head(self._packed.normed(states)[:-1][followed])
        each = nn.functional.cross_entropy(logits.float(), ids[1:][followed], reduction="none")
        sums = torch.zeros(len(rows), device=device).index_add(0, owners[:-1][followed], each)
        return torch.stack([sums, torch.tensor(lengths, device=device) - 1.0], dim=1), {}
