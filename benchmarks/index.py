"""Where the time of `embell index` goes, and how long a cold `embell search` takes.

    python benchmarks/index.py --data DATA

Each command is a process of its own. What it spends in each part is taken from inside, the whole from outside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click

PARTS = (
    "start",
    "import torch",
    "import lancedb",
    "load the model",
    "read the corpus",
    "encode",
    "write to LanceDB",
    "index",
    "rest",
)


def spent_in(began: float, arguments: list[str]) -> dict[str, float]:
    """Seconds that `embell ARGUMENTS` takes, part by part; `began` is the time at which this process was started."""
    from embell.cli.main import cli

    parts = dict.fromkeys(PARTS, 0.0)
    parts["start"] = time.time() - began

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                parts[part] += time.perf_counter() - start

        return run

    timed("import torch", __import__)("torch")
    timed("import lancedb", __import__)("lancedb")
    from embell.engine.collection import Collection
    from embell.engine.encoder import Encoder
    from embell.indexers import corpora
    from embell.indexers.store import Store

    read = corpora.read_corpus

    def reading(*args: Any, **options: Any) -> Iterator[Any]:
        documents = read(*args, **options)
        step = timed("read the corpus", lambda: next(documents, None))
        while (document := step()) is not None:
            yield document

    corpora.read_corpus = reading
    Encoder.load = timed("load the model", Encoder.load)  # type: ignore[method-assign]
    Encoder.encode = timed("encode", Encoder.encode)  # type: ignore[method-assign]
    Store.upsert = timed("write to LanceDB", Store.upsert)  # type: ignore[method-assign]
    Collection._refresh_index = timed("index", Collection._refresh_index)  # type: ignore[method-assign]
    cli.main(arguments, standalone_mode=False)
    parts["rest"] = time.time() - began - sum(parts.values())
    return parts


def seconds(*command: str) -> float:
    """How long a process takes from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="The corpora folder.")
@click.option("--sentences", default=20_000, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="How often a search is started.")
@click.option("--began", type=float, hidden=True)
@click.argument("arguments", nargs=-1)
def run(data: Path | None, sentences: int, rounds: int, began: float | None, arguments: tuple[str, ...]) -> None:
    """See above."""
    if began is not None:
        parts = spent_in(began, list(arguments))
        click.echo(json.dumps(parts), err=True)
        return
    if data is None:
        raise click.UsageError("--data is missing: the corpora folder")
    from encode import short_texts  # type: ignore[import-not-found]  # beside this file

    with tempfile.TemporaryDirectory() as folder:
        corpus, large, small = (Path(folder, name) for name in ("corpus.jsonl", "large.embell", "small.embell"))
        texts = short_texts(data)[:sentences]
        corpus.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)))
        command = [sys.executable, __file__, "--began", str(time.time()), "--", "index", str(corpus), "--to", str(large)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        parts = json.loads(ran.stderr.splitlines()[-1])
        whole = sum(parts.values())
        click.echo(f"`embell index`, {len(texts):,} sentences: {whole:.1f} s\n\n| part | seconds | share |\n| --- | --- | --- |")
        for part, taken in parts.items():
            click.echo(f"| {part} | {taken:.2f} | {taken / whole:.1%} |")
        corpus.write_text(
            "".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts[:100]))
        )
        subprocess.run(
            [sys.executable, "-m", "embell", "index", str(corpus), "--to", str(small)], check=True, stdout=subprocess.DEVNULL
        )
        taken: dict[str, list[float]] = {"import torch, lancedb": [], "embell search": []}
        for _ in range(rounds):
            taken["import torch, lancedb"].append(seconds("-c", "import torch, lancedb"))
            taken["embell search"].append(seconds("-m", "embell", "search", str(small), "a river and its bridges"))
        click.echo(f"\nA cold start, median of {rounds}, alternating\n\n| process | seconds |\n| --- | --- |")
        for name, times in taken.items():
            click.echo(f"| {name} | {median(times):.2f} |")
        ratios = [b / a for a, b in zip(*taken.values(), strict=True)]
        click.echo(f"| ratio | {median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f}) |")


if __name__ == "__main__":
    run()
