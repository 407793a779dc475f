"""A training run: transformers' Trainer around a student, in a directory that it can be taken up again from.

RUN/config.toml      what was asked for, every value of it
RUN/metrics.jsonl    a line per report: step, loss, learning rate, texts and tokens a second; and per evaluation
RUN/plot.png         loss and scores over the steps (where matplotlib is installed)
RUN/checkpoints/     the Trainer's; gone when the run is finished
RUN/model/           the encoder, for embell and for sentence-transformers
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson
import torch
from torch import nn
from transformers import TrainingArguments

from embell.engine.hardware import cpu_has_bf16, pick_device
from embell.errors import UsageError
from embell.training.batches import Batches
from embell.training.muon import MuonAdamW
from embell.training.progress import Progress, draw
from embell.training.trainer import COMPLETED, Completed, Loss, StudentTrainer

CONFIG, METRICS, MODEL, CHECKPOINTS = "config.toml", "metrics.jsonl", "model", "checkpoints"


@dataclass(frozen=True)
class RunOptions:
    """How long and how fast a model learns.

    Attributes:
        epochs: times that each row is seen
        steps: at most so many steps, however many the epochs would be
        batch: rows (pairs, triplets, texts) in a batch; in contrastive training all of them are each other's negatives
        chunk: texts that are run at a time; smaller than the batch, memory is that of a chunk and each text runs twice
        accumulate: batches whose gradients are added up for a step
        learning_rate: the highest learning rate
        table_rate: learning rate of the token table, as a multiple of the others'
        warmup: share of the steps in which the learning rate rises
        schedule: how it falls afterwards; "late" holds it for two thirds of the steps and then falls in a line
        weight_decay: decoupled weight decay of matrices
        optimizer: adamw, or muon for the matrices of the layers and adamw for the rest
        clip: gradients are cut to this norm
        precision: auto takes bfloat16 where the hardware computes in it; weights are kept in float32 either way; with float32, a teacher or
            guide computes in it too
        seed: decides the order of rows, dropout and fresh weights
        threads: CPU threads
        report_every: steps between two lines of metrics
        evaluate_every: steps between two evaluations; 0 evaluates at the end only
        checkpoint_every: steps between two checkpoints, which are made with a report: rounded up to a multiple of report_every
    """

    epochs: float = 1.0
    steps: int | None = None
    batch: int = 64
    chunk: int | None = None
    accumulate: int = 1
    learning_rate: float = 2e-4
    table_rate: float = 1.0
    warmup: float = 0.05
    schedule: Literal["linear", "cosine", "constant", "late"] = "linear"
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "muon"] = "adamw"
    clip: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    threads: int | None = None
    report_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 200

    @property
    def frozen_dtype(self) -> str | None:
        """The numbers that a teacher or guide computes in; None: what the hardware is fast in."""
        return "float32" if self.precision == "float32" else None

    def start(self) -> None:
        """Set the seed and the threads of this process.

        Raises UsageError for a value that means nothing.
        """
        self._check()
        torch.manual_seed(self.seed)
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def _check(self) -> None:
        for name in ("batch", "accumulate", "report_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("steps", "chunk", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("epochs", "learning_rate", "table_rate", "clip"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be more than 0, not {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is a share of the steps, from 0 to below 1, not {self.warmup}")
        if self.weight_decay < 0 or self.evaluate_every < 0:
            raise UsageError("weight_decay and evaluate_every cannot be negative")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed is a whole number from 0 to 2^32 - 1, not {self.seed}")


def training_device(device: str | None) -> torch.device:
    """The device that was named, else a GPU if there is one.

    Raises EncoderError if it cannot be used here, UsageError for a card that is not the first: the Trainer takes that one.
    """
    found = pick_device(device)
    if found.index:
        raise UsageError(
            f"device {device}: training takes the first card it sees; give cuda, and set CUDA_VISIBLE_DEVICES={found.index}"
        )
    return found


def begin(run: Path, config: str) -> Path | None:
    """Make the run's directory, or take it up again; returns the model if the run is finished.

    What has no checkpoint yet may begin again with other settings. A recipe's own folders are then made anew, but for
    `teacher`, which knows itself what it was made of.

    Raises UsageError if the directory holds a run with other settings, or something else.
    """
    path = run / CONFIG
    if path.is_file():
        old, new = (_settings(text) for text in (path.read_text(encoding="utf-8"), config))
        if differing := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            name = differing[0]
            if (run / MODEL).is_dir() or last_checkpoint(run):
                raise UsageError(
                    f"{run} holds a run with {name} = {old.get(name, 'its default')}, not {new.get(name, 'its default')}; "
                    "give the same settings to go on with it, or another --output"
                )
            for folder in ("student", "tokenizer"):
                shutil.rmtree(run / folder, ignore_errors=True)
            path.write_text(config, encoding="utf-8")
        if (run / MODEL).is_dir():
            print(f"{run} is finished already; give another --output to train anew", file=sys.stderr)
            return run / MODEL
        return None
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UsageError(f"{run} exists and holds no run; give another --output")
    run.mkdir(parents=True, exist_ok=True)
    path.write_text(config, encoding="utf-8")
    return None


def _settings(config: str) -> dict[str, str]:
    """The lines of a configuration by name, but for `output`: a run may be moved."""
    lines = (line.partition(" = ") for line in config.splitlines())
    return {name: value for name, _, value in lines if name != "output"}


def train(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    run: Path,
    options: RunOptions,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train `model`, a Student or another module of the same calls, from the last checkpoint of `run` if there is one.

    `evaluate` returns scores by name.

    Raises EmbellError if the loss is no number any more.
    """
    steps = math.ceil(len(batches) / options.accumulate)
    if options.steps is not None:
        steps = min(steps, options.steps)
    batches = batches.first(steps * options.accumulate)  # so that a run that is taken up after its last step has none left
    device = next(model.parameters()).device
    bf16 = _bf16(options.precision, device)
    optimizer = MuonAdamW(
        model, options.learning_rate, options.weight_decay, muon=options.optimizer == "muon", table_rate=options.table_rate,
        precision=torch.bfloat16 if bf16 else torch.float32,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, options))
    report = Progress(run / METRICS, steps, options, evaluate)
    arguments = TrainingArguments(
        output_dir=str(run / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=options.accumulate,
        max_grad_norm=options.clip,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=options.seed,
        save_strategy="steps",
        # Only where a report has just been made: the loss since the last one is not part of a checkpoint.
        save_steps=math.ceil(options.checkpoint_every / options.report_every) * options.report_every,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=options.report_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several cards: one process each, by torchrun or accelerate launch
    with _quiet():
        trainer = StudentTrainer(
            batches,
            loss,
            options.chunk,
            report,
            model=model,
            args=arguments,
            data_collator=lambda listed: {"examples": listed[0]},
            optimizers=(optimizer, schedule),
            callbacks=[report, Completed()],
        )
        for unwanted in ("PrinterCallback", "ProgressCallback"):
            for callback in list(trainer.callback_handler.callbacks):
                if type(callback).__name__ == unwanted:
                    trainer.remove_callback(callback)
        last = last_checkpoint(run)
        for other in (run / CHECKPOINTS).glob("checkpoint-*"):
            if last is None or _step(other) > _step(last):
                shutil.rmtree(other)
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            report.close()


def finish(run: Path, save: Callable[[Path], None]) -> Path:
    """Write the model, draw the plot, and drop the checkpoints; the model's directory appears when it is whole."""
    part = run / f"{MODEL}.part"
    shutil.rmtree(part, ignore_errors=True)
    save(part)
    part.replace(run / MODEL)
    draw(run / METRICS, run / "plot.png")
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    return run / MODEL


def rate(step: int, steps: int, options: RunOptions) -> float:
    """The share of the learning rate at a step, counted from 0."""
    warm = round(options.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if options.schedule == "constant":
        return 1.0
    first = max(warm, steps * 2 // 3) if options.schedule == "late" else warm
    done = min(1.0, max(0, step - first) / max(1, steps - first))
    return 0.5 * (1 + math.cos(math.pi * done)) if options.schedule == "cosine" else 1.0 - done


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end and is as it was then; others are passed over."""
    for path in sorted((run / CHECKPOINTS).glob("checkpoint-*"), key=_step, reverse=True):
        try:
            sizes = orjson.loads((path / COMPLETED).read_bytes())
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return path
        except (OSError, orjson.JSONDecodeError):
            continue
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return cpu_has_bf16() if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"


@contextmanager
def _quiet() -> Iterator[None]:
    """What the Trainer has to say is said by `Progress`."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
