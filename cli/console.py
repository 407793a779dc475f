"""What the commands share on a terminal: data to stdout, messages and progress to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

import click
import orjson

if TYPE_CHECKING:
    from embell.engine import Hit


def json_value(value: Any) -> Any:
    """What JSON has no word for: bytes as hexadecimal digits, anything else as text."""
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def write_json(record: Any, file: IO[str] | None = None) -> None:
    """One line of JSON on stdout."""
    options = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    click.echo(orjson.dumps(record, default=json_value, option=options).decode(), file=file)


def note(message: str) -> None:
    """One line for the reader, on stderr."""
    click.echo(message, err=True)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that counts documents and shows their rate; nothing if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} documents"), TimeElapsedColumn(),
               TextColumn("{task.fields[rate]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, rate="")

        def step(done: int) -> None:
            bar.advance(task, done)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:,.0f}/s" if speed else "")

        yield step


@contextmanager
def compared(what: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr for work whose share is known, with an estimate of the time left; nothing if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda stage, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(),
               TextColumn("left:"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)

        def step(stage: str, share: float) -> None:
            if bar.tasks[0].description != f"{what} ({stage})":
                bar.reset(task, description=f"{what} ({stage})")
            bar.update(task, completed=share)

        yield step


def waiting() -> None:
    """Says that another process holds the collection."""
    note("another process is writing to this collection; waiting for it to finish")


def counted(number: int, noun: str) -> str:
    """The number and the noun, in the plural unless there is one: 1 document, 2 documents."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def snippet(text: str, width: int) -> str:
    """The text on one line, cut to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def hit_record(hit: Hit) -> dict[str, Any]:
    """A hit as it is written in JSON."""
    record = asdict(hit)
    if hit.start is None:
        del record["start"], record["end"]
    return record


def print_hits(hits: list[Hit], offset: int = 0) -> None:
    """Hits as a table that fits the terminal: rank, score, and the id above two lines of text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not hits:
        note("nothing found")
        return
    console = Console(highlight=False)
    room = 2 * (console.width - 14)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(justify="right", style="cyan", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for rank, hit in enumerate(hits, offset + 1):
        where = "" if hit.start is None else f"  characters {hit.start:,} to {hit.end:,}"
        text = snippet(hit.text.removeprefix(f"{hit.id}: "), room)
        table.add_row(str(rank), f"{hit.score:.3f}", Text.assemble((hit.id, "bold"), (where, "dim"), "\n", text))
    console.print(table)
