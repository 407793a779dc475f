"""What a run tells while it goes: a line of metrics every few steps, evaluations, and a plot at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

from embell.errors import EmbellError

if TYPE_CHECKING:
    from embell.training.run import RunOptions


class Progress(TrainerCallback):
    """Writes RUN/metrics.jsonl, and says the same on stderr: as a bar on a terminal, else as lines."""

    def __init__(
        self, path: Path, steps: int, options: RunOptions, evaluate: Callable[[], dict[str, float]] | None, first: bool = True
    ) -> None:
        """`path` is appended to; what a run that was cut off wrote after its last checkpoint is written again.

        Of several processes only the `first` evaluates and tells, of itself.
        """
        self._path, self._steps, self._every, self._first = path, steps, options.evaluate_every, first
        self._evaluate = evaluate if first else None
        self._texts = self._tokens = 0
        self._begun = time.monotonic()
        self._bar: Bar | None = None
        self._task: Any = None
        if first and sys.stderr.isatty():
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=steps, said="")
            self._bar.start()

    def count(self, texts: int, tokens: int) -> None:
        """Texts and tokens of the batch that is being trained on."""
        self._texts += texts
        self._tokens += tokens

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._first:
            return
        _keep_until(self._path, state.global_step)
        self._begun = time.monotonic()
        if state.global_step:
            self._say(f"going on from step {state.global_step} of {self._steps}")
        elif self._evaluate is not None:
            self._score(0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not self._first:
            return
        loss = float(logs["loss"])
        seconds = max(time.monotonic() - self._begun, 1e-9)
        line = {
            "step": state.global_step,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": float(logs["learning_rate"]),
            "gradient_norm": float(logs.get("grad_norm", 0.0)),
            "texts_per_second": round(self._texts / seconds, 1),
            "tokens_per_second": round(self._tokens / seconds, 1),
        }
        self._write(line)
        said = f"loss {loss:.4f}, {line['texts_per_second']:,.0f} texts/s, {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, said=said)
        else:
            self._say(f"step {state.global_step}/{self._steps}: {said}")
        self._texts = self._tokens = 0
        self._begun = time.monotonic()
        if not math.isfinite(loss):
            raise EmbellError(f"the loss is no number any more at step {state.global_step}; give a lower --learning-rate")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._steps:
            control.should_log = True  # the last steps, too, where they are fewer than those of a report
        if self._evaluate is None:
            return
        if state.global_step == self._steps or (self._every and state.global_step % self._every == 0):
            self._score(state.global_step)

    def _score(self, step: int) -> None:
        assert self._evaluate is not None
        began = time.monotonic()
        scores = self._evaluate()
        self._write({"step": step, "scores": {name: round(score, 4) for name, score in scores.items()}})
        self._say(f"step {step}/{self._steps}: " + ", ".join(f"{name} {score:.2f}" for name, score in scores.items()))
        self._begun += time.monotonic() - began

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that was cut off in the middle is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            found.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
    return found


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after a step: they are going to be written again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
    path.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in kept))


def draw(metrics: Path, target: Path) -> None:
    """Loss and scores over the steps as a PNG; without matplotlib there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_metrics(metrics)
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    scores: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, score in line.get("scores", {}).items():
            scores.setdefault(name, []).append((line["step"], score))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    axes[0].plot(*zip(*losses, strict=True), color="tab:blue") if losses else None
    axes[0].set(xlabel="step", ylabel="loss")
    for name, points in scores.items():
        axes[1].plot(*zip(*points, strict=True), marker="o", label=name)
    if scores:
        axes[1].set(xlabel="step", ylabel="score")
        axes[1].legend(fontsize="small")
    figure.savefig(target, dpi=110)
