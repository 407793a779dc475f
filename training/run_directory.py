"""The directory of a training run, which it can be taken up again from.

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
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import filelock
import orjson
from accelerate import PartialState

from embell.engine import Encoder
from embell.errors import CorpusError, EmbellError, UsageError
from embell.indexers.corpora import TableFile
from embell.training.columns import tables
from embell.training.progress import draw
from embell.training.trainer import COMPLETED

CONFIG, METRICS, MODEL, CHECKPOINTS = "config.toml", "metrics.jsonl", "model", "checkpoints"
LOCK, MADE_OF = "lock", "made_of.json"


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
        if began_otherwise(run, made_of) or not same:
            for folder in ("student", "tokenizer"):
                shutil.rmtree(run / folder, ignore_errors=True)
            for turned in (run / "teacher").glob("towards-*"):
                turned.unlink()
            _write(run / CONFIG, config.encode())
        note(run, made_of)
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


def began_otherwise(run: Path, made_of: Mapping[str, str]) -> bool:
    """Whether the run began with something else, and has no checkpoint of that; raises UsageError if it has one."""
    before = _noted(run)
    changed = [name for name, mark in made_of.items() if before.get(name, mark) != mark]
    if changed and last_checkpoint(run) is not None:
        raise UsageError(
            f"{run}: the {changed[0]} changed since this run began; put it back to go on, or give another --output to begin anew"
        )
    return bool(changed)


def note(run: Path, made_of: Mapping[str, str]) -> None:
    _write(run / MADE_OF, orjson.dumps({**_noted(run), **made_of}))


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


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end and is as it was then; others are passed over."""
    for path in sorted((run / CHECKPOINTS).glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            sizes = orjson.loads((path / COMPLETED).read_bytes())
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return path
        except (OSError, orjson.JSONDecodeError):
            continue
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
