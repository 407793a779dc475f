"""A training run: transformers' Trainer around a student, in a directory that it can be taken up again from.

RUN/config.toml      what was asked for, every value of it
RUN/metrics.jsonl    a line per report: step, loss, learning rate, texts and tokens a second; and per evaluation
RUN/plot.png         loss and scores over the steps (where matplotlib is installed)
RUN/made_of.json     what the data and models were that it began with; gone with the checkpoints
RUN/checkpoints/     the Trainer's; gone when the run is finished
RUN/lock             held by the process that trains here, the first of several
RUN/model/           the encoder, for embell and for sentence-transformers
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import filelock
import orjson
import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from embell.engine import Encoder
from embell.engine.hardware import cpu_has_bf16, pick_device
from embell.errors import CorpusError, EmbellError, UsageError
from embell.indexers.corpora import TableFile
from embell.training.batches import Batches
from embell.training.columns import tables
from embell.training.muon import MuonAdamW
from embell.training.progress import Progress, draw
from embell.training.trainer import COMPLETED, Completed, Loss, StudentTrainer

CONFIG, METRICS, MODEL, CHECKPOINTS = "config.toml", "metrics.jsonl", "model", "checkpoints"
LOCK, MADE_OF = "lock", "made_of.json"
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


@contextmanager
def begin(run: Path, config: str, data: Sequence[Path]) -> Iterator[Path | None]:
    """Make the run's directory, or take it up again, and keep other runs out of it; gives the model if the run is finished.

    Of several processes of one run the first does so, and the others begin when it has.

    Raises what `_begin` raises.
    """
    state = PartialState()
    with _begin(run, config, data) if state.is_main_process else nullcontext() as finished:
        state.wait_for_everyone()
        if not state.is_main_process:
            finished = run / MODEL if (run / MODEL).is_dir() else None
        yield finished
        state.wait_for_everyone()


@contextmanager
def _begin(run: Path, config: str, data: Sequence[Path]) -> Iterator[Path | None]:
    """Make the run's directory, or take it up again, and hold its lock; gives the model if the run is finished.

    What has no checkpoint yet may begin again with other settings or data. What a recipe made for itself is then made anew, but for
    the vectors in `teacher`, which know themselves what they are of.

    Raises UsageError if the directory holds a run with other settings or on other data, or something else; EmbellError while
    another process trains there; CorpusError for data that cannot be read.
    """
    if _finished(run, config):
        yield run / MODEL
        return
    if run.exists() and not (run / CONFIG).is_file() and (not run.is_dir() or any(one.name != LOCK for one in run.iterdir())):
        raise UsageError(f"{run} exists and holds no run; give another --output")
    files = [file for path in data for file in tables(path)]
    run.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise EmbellError(f"{run}: another process trains here; wait for it, or give another --output") from None
    try:
        if _finished(run, config):  # by the process that has just let go of it
            yield run / MODEL
            return
        made_of = {"data": _contents(files), "number of processes": str(PartialState().num_processes)}
        same = (run / CONFIG).is_file() and _same_settings(run, config)
        if _changed(run, made_of) or not same:
            for folder in ("student", "tokenizer"):
                shutil.rmtree(run / folder, ignore_errors=True)
            for turned in (run / "teacher").glob("towards-*"):
                turned.unlink()
            _write(run / CONFIG, config.encode())
        _note(run, made_of)
        yield None
    finally:
        lock.release()


def _finished(run: Path, config: str) -> bool:
    """Whether the run is finished, which is said. Raises UsageError if it is one with other settings."""
    if not ((run / CONFIG).is_file() and (run / MODEL).is_dir()):
        return False
    _same_settings(run, config)
    print(f"{run} is finished already; give another --output to train anew", file=sys.stderr)
    return True


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    part = path.with_name(f"{LOCK}.part")
    part.write_bytes(content)
    part.replace(path)


def _same_settings(run: Path, config: str) -> bool:
    """Whether the run has these settings, but for `output`: it may have been moved.

    Raises UsageError if it has others, and a checkpoint or a model.
    """
    old, new = (_settings(text) for text in ((run / CONFIG).read_text(encoding="utf-8"), config))
    name = next((name for name in {**old, **new} if old.get(name) != new.get(name)), None)
    if name is not None and ((run / MODEL).is_dir() or last_checkpoint(run)):
        raise UsageError(
            f"{run} holds a run with {name} = {old.get(name, 'its default')}, not {new.get(name, 'its default')}; "
            "give the same settings to go on with it, or another --output"
        )
    return name is None


def _settings(config: str) -> dict[str, str]:
    """The lines of a configuration by name, but for `output`."""
    lines = (line.partition(" = ") for line in config.splitlines())
    return {name: value for name, _, value in lines if name != "output"}


def _contents(files: Sequence[TableFile]) -> str:
    """A hash of what stands in files."""
    found = hashlib.sha256()
    for file in files:
        try:
            found.update(_hash(Path(file.path)))
        except OSError as error:
            raise CorpusError(f"{file.label}: cannot be read ({error.strerror or error}); check the file") from error
    return found.hexdigest()


def mark_of(encoder: Encoder) -> str:
    """What tells an encoder from others, wherever it lies: a hash of its spec and of all weights in its directories."""
    spec = encoder.spec
    found = hashlib.sha256(
        repr(replace(spec, backbone="", revision=None, adapter=None, adapter_revision=None)).encode(errors="surrogatepass")
    )
    for place in (spec.backbone, spec.adapter):
        found.update(b"" if place is None else weights_mark(Path(place)))
    return found.hexdigest()


def weights_mark(directory: Path) -> bytes:
    """A hash of all weights in a directory; the fingerprint of a spec looks at a sample of them. Empty for what is no directory."""
    paths = sorted(directory.rglob("*.safetensors")) if directory.is_dir() else []
    return b"".join(_hash(path) for path in paths)


def _hash(path: Path) -> bytes:
    found = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.digest()


def _noted(run: Path) -> dict[str, str]:
    path = run / MADE_OF
    found: dict[str, str] = orjson.loads(path.read_bytes()) if path.is_file() else {}
    return found


def _changed(run: Path, made_of: Mapping[str, str]) -> bool:
    """Whether the run began with something else, and has no checkpoint of that; raises UsageError if it has one."""
    before = _noted(run)
    changed = [name for name, mark in made_of.items() if before.get(name, mark) != mark]
    if changed and last_checkpoint(run) is not None:
        raise UsageError(
            f"{run}: the {changed[0]} changed since this run began; put it back to go on, or give another --output to begin anew"
        )
    return bool(changed)


def _note(run: Path, made_of: Mapping[str, str]) -> None:
    _write(run / MADE_OF, orjson.dumps({**_noted(run), **made_of}))


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
    _changed(run, made_of)
    state.wait_for_everyone()
    if state.is_main_process:
        _note(run, made_of)
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
                if last is None or _step(other) > _step(last):
                    shutil.rmtree(other)
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            report.close()


def finish(run: Path, save: Callable[[Path], None]) -> Path:
    """Write the model, draw the plot, and drop the checkpoints; the model's directory appears when it is whole.

    Of several processes the first does it.
    """
    if not PartialState().is_main_process:
        return run / MODEL
    part = run / f"{MODEL}.part"
    shutil.rmtree(part, ignore_errors=True)
    save(part)
    part.replace(run / MODEL)
    draw(run / METRICS, run / "plot.png")
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    (run / MADE_OF).unlink(missing_ok=True)
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
