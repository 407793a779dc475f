"""Distil a small BeLLM encoder from a sentence encoder: the recipe behind embell-mini.

    python -m embell.training.distill --data DATA --teacher DIR --output RUN

The student is a Llama decoder whose last layer looks in both directions. It learns, text by text,
the teacher's vector (5 x (1 - cosine)) and the teacher's view of each batch (Kullback-Leibler
divergence between the rows of the two in-batch similarity matrices at temperature 0.05).
It starts near the teacher: each token's row is the teacher's vector of that token's string, and the
residual branches start small, so that the untrained student is already a bag of such vectors.

Stopped at any point, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from embell.engine import bellm, sentence_format
from embell.engine.spec import ModelSettings
from embell.errors import EmbellError
from embell.training import sources


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; written to RUN/recipe.json."""

    layers: int = 6
    hidden: int = 384
    inner: int = 1024
    heads: int = 6
    vocabulary: int = 16384
    start_layer: int = 5
    batch: int = 256
    batch_tokens: int = 8192
    longest: int = 256
    learning_rate: float = 1e-3
    warmup: float = 0.04
    weight_decay: float = 0.01
    temperature: float = 0.05
    cosine_weight: float = 5.0
    token_rms: float = 0.7
    residual_scale: float = 0.1
    scale: float = 1.0
    seed: int = 0
    compile: bool = True


PAD = "<pad>"


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on lower-cased, NFKC-normalised text with white space folded; no token is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # The prefix space makes a word at the start of a text the same token as elsewhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, padding_side="right", model_max_length=512)


class Teacher:
    """A mean-pooled encoder from a sentence-transformers directory, run in bf16."""

    def __init__(self, directory: Path, longest: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModel.from_pretrained(directory, dtype=torch.bfloat16).eval()
        self.longest = longest

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `(n, hidden)` in float32."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        states = self.model(**batch).last_hidden_state.float()
        return F.normalize(mean_pool(states, batch["attention_mask"]), dim=-1)


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real tokens: `(n, length, hidden)` and `(n, length)` to `(n, hidden)`."""
    real = mask.bool().unsqueeze(-1)
    return states.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)


def student_config(recipe: Recipe) -> LlamaConfig:
    """The architecture; the padding token is the first of the vocabulary."""
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )


def build_student(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, teacher: Teacher) -> LlamaModel:
    """The student before training: teacher's token vectors, small residual branches."""
    torch.manual_seed(recipe.seed)
    model = LlamaModel(student_config(recipe))
    strings = [str(tokenizer.decode([token])).strip() or " " for token in range(recipe.vocabulary)]
    rows = torch.cat([teacher(strings[i : i + 512]) for i in range(0, len(strings), 512)])
    rows -= rows.mean(dim=0)
    rows *= recipe.token_rms / rows.square().mean().sqrt()
    rows[tokenizer.pad_token_id] = 0
    with torch.no_grad():
        model.embed_tokens.weight.copy_(rows)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(recipe.residual_scale)
    return model


def plan_batches(lengths: np.ndarray, recipe: Recipe) -> list[np.ndarray]:
    """Rows of each batch: texts of near-equal length together, batches in random order."""
    rng = random.Random(recipe.seed)
    order = np.lexsort((np.random.default_rng(recipe.seed).random(len(lengths)), lengths))
    batches = []
    begin = 0
    while begin < len(order):
        size = min(recipe.batch, max(1, recipe.batch_tokens // int(lengths[order[min(begin + recipe.batch, len(order)) - 1]])))
        batches.append(order[begin : begin + size])
        begin += size
    batches = [rows for rows in batches if len(rows) >= 16]  # too few rows say little about similarity
    rng.shuffle(batches)
    return batches


def distillation_loss(student: Tensor, teacher: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The loss of a batch and the mean cosine to the teacher; both inputs are unit rows `(n, hidden)`."""
    cosine = (student * teacher).sum(dim=-1).mean()
    own = torch.eye(len(student), dtype=torch.bool)
    log_student = F.log_softmax((student @ student.T / recipe.temperature).masked_fill(own, -1e9), dim=-1)
    log_teacher = F.log_softmax((teacher @ teacher.T / recipe.temperature).masked_fill(own, -1e9), dim=-1)
    divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    return recipe.cosine_weight * (1 - cosine) + divergence, cosine


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = max(1, int(recipe.warmup * steps))
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def save_checkpoint(run: Path, step: int, model: LlamaModel, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer state in one safetensors file, put in place by one rename."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adamw.{key}.{name}"] = torch.as_tensor(value).contiguous()
    save_file(tensors, run / "checkpoint.part", metadata={"step": str(step)})
    (run / "checkpoint.part").replace(run / "checkpoint.safetensors")


def load_checkpoint(run: Path, model: LlamaModel, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote; the number of steps done, 0 without a checkpoint."""
    path = run / "checkpoint.safetensors"
    if not path.is_file():
        return 0
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {key: tensors[f"adamw.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return step


def encode_batch(model: LlamaModel, ids: Sequence[Sequence[int]]) -> Tensor:
    """Unit vectors `(n, hidden)` of token id rows, padded here."""
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = bellm.forward(model, padded, None if mask.all() else mask).last_hidden_state
    return F.normalize(mean_pool(states.float(), mask), dim=-1)


def distill(
    data: Path,
    teacher_directory: Path,
    run: Path,
    recipe: Recipe,
    only: Sequence[str] | None = None,
    checkpoint_seconds: float = 240.0,
) -> Path:
    """Run or resume the recipe; returns the directory of the finished student.

    Raises UsageError if a source is not on the list of what may be shipped.
    """
    run.mkdir(parents=True, exist_ok=True)
    chosen = sources.select(only)
    sentences, paragraphs, counts = sources.collect(data, chosen, recipe.scale, recipe.seed)
    texts = sentences + paragraphs
    (run / "recipe.json").write_text(json.dumps({"recipe": asdict(recipe), "texts": counts}, indent=1))
    teacher = Teacher(teacher_directory, recipe.longest)
    if (run / "tokenizer" / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    else:
        tokenizer = train_tokenizer(texts, recipe.vocabulary)
        tokenizer.save_pretrained(run / "tokenizer")
    token_ids = [
        np.array(ids[: recipe.longest], dtype=np.uint16)
        for begin in range(0, len(texts), 10_000)
        for ids in tokenizer(texts[begin : begin + 10_000])["input_ids"]
    ]
    lengths = np.array([len(ids) for ids in token_ids])
    batches = plan_batches(lengths, recipe)

    model = build_student(recipe, tokenizer, teacher)
    bellm.make_bidirectional(model, recipe.start_layer)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    first = load_checkpoint(run, model, optimizer)
    click.echo(
        f"{len(sentences)} sentences, {len(paragraphs)} paragraphs, {int(lengths.sum())} tokens, "
        f"{len(batches)} steps from {first}, {sum(p.numel() for p in model.parameters())} parameters", err=True,
    )  # fmt: skip
    if recipe.compile:  # fuses the element-wise work of a layer: about 15 % faster here
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    model.train()
    began = saved = time.monotonic()
    with (run / "metrics.jsonl").open("a") as metrics:
        for step in range(first, len(batches)):
            rows = batches[step]
            target = teacher([texts[row] for row in rows])
            student = encode_batch(model, [token_ids[row].tolist() for row in rows])
            loss, cosine = distillation_loss(student, target, recipe)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(batches), recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record = {
                "step": step,
                "loss": round(loss.item(), 4),
                "cosine": round(cosine.item(), 4),
                "seconds": round(time.monotonic() - began, 1),
            }
            metrics.write(json.dumps(record) + "\n")
            if step % 50 == 0:
                metrics.flush()
                click.echo(
                    f"step {step}/{len(batches)} loss {record['loss']} cosine {record['cosine']} {record['seconds']} s", err=True
                )
            if time.monotonic() - saved > checkpoint_seconds:
                save_checkpoint(run, step + 1, model, optimizer)
                saved = time.monotonic()
    save_checkpoint(run, len(batches), model, optimizer)
    return export(run)


def export(run: Path) -> Path:
    """Write the student of the last checkpoint as an encoder directory, RUN/model, in bf16.

    Runs of white space become one space before tokenisation, as in the training texts.
    """
    values = json.loads((run / "recipe.json").read_text())["recipe"]
    recipe = Recipe(**values)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    inner = tokenizer.backend_tokenizer
    fold = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *fold])
    tensors = load_file(run / "checkpoint.safetensors")
    model = LlamaModel(student_config(recipe))
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
    directory = run / "model"
    model.bfloat16().save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, padding_side="right", model_max_length=512, clean_up_tokenization_spaces=False
    ).save_pretrained(directory)
    ModelSettings(start_layer=recipe.start_layer, pooling="mean", max_length=512, languages=("en",)).write(directory)
    sentence_format.write(directory)
    return directory


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="Folder of training corpora."
)
@click.option(
    "--teacher",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="A sentence-transformers directory.",
)
@click.option(
    "--output", "run", type=click.Path(path_type=Path), required=True, help="Run directory; holds checkpoints and the model."
)
@click.option("--source", "only", multiple=True, help="Train on these files of the list only (repeatable).")
@click.option("--scale", default=1.0, show_default=True, help="Multiplies how many texts each source gives.")
@click.option("--compile/--no-compile", default=True, show_default=True, help="Compile the layers; needs a C++ compiler.")
def main(data: Path, teacher: Path, run: Path, only: tuple[str, ...], scale: float, compile: bool) -> None:
    """Distil the embedded model, or go on with a run that was stopped."""
    try:
        distill(data, teacher, run, Recipe(scale=scale, compile=compile), only or None)
    except EmbellError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
