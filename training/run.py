"""Training: transformers' Trainer around a student, in a run's directory."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from embell.engine.hardware import cpu_has_bf16, pick_device
from embell.errors import UsageError
from embell.training.batches import Batches
from embell.training.muon import MuonAdamW
from embell.training.progress import Progress
from embell.training.run_directory import CHECKPOINTS, METRICS, began_otherwise, last_checkpoint, note, step_of
from embell.training.trainer import Completed, Loss, StudentTrainer

_PATIENCE = timedelta(days=7)
"""Processes of one run wait so long for the first: it alone reads, fits and measures."""


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

    @property
    def frozen_device(self) -> str | None:
        """Where they compute; None: on all cards that there are. Of several processes each keeps to its own."""
        state = PartialState()
        return None if state.num_processes == 1 else str(state.device)

    def start(self, device: str | None) -> None:
        """Set the seed and the threads of this process, and meet the others if there are any.

        Raises UsageError for a value that means nothing, EncoderError for a device that cannot be used.
        """
        self._check()
        PartialState(cpu=training_device(device).type == "cpu", timeout=_PATIENCE)
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
        for name in ("weight_decay", "evaluate_every"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} cannot be negative, as {getattr(self, name)} is")
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


def train(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    run: Path,
    options: RunOptions,
    made_of: Mapping[str, str],
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train `model`, a Student or another module of the same calls, from the last checkpoint of `run` if there is one.

    `made_of` tells, by name, hashes of the models that it begins with; `evaluate` returns scores by name.

    Raises UsageError if the checkpoint comes from others, or if there are fewer batches than processes; EmbellError if the loss is
    no number any more.
    """
    state = PartialState()
    began_otherwise(run, made_of)
    state.wait_for_everyone()
    if state.is_main_process:
        note(run, made_of)
    each = len(batches) // state.num_processes  # what is left over would be made up by batches of the beginning
    if not each:
        raise UsageError(f"{len(batches)} batches are too few for {state.num_processes} processes; give a smaller --batch")
    together = options.accumulate * state.num_processes  # batches of a step
    steps = math.ceil(each / options.accumulate)
    if options.steps is not None:
        steps = min(steps, options.steps)
    batches = batches.first(
        min(steps * together, each * state.num_processes)
    )  # so that a run that is taken up after its last step has none left
    device = next(model.parameters()).device
    bf16 = _bf16(options.precision, device)
    optimizer = MuonAdamW(
        model, options.learning_rate, options.weight_decay, muon=options.optimizer == "muon", table_rate=options.table_rate,
        precision=torch.bfloat16 if bf16 else torch.float32,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, options))
    report = Progress(run / METRICS, steps, options, evaluate, state.is_main_process)
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
        state.wait_for_everyone()
        if state.is_main_process:
            for other in (run / CHECKPOINTS).glob("checkpoint-*"):
                if last is None or step_of(other) > step_of(last):
                    shutil.rmtree(other)
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            report.close()


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
