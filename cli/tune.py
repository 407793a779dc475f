"""`embell optimize` and `embell tune`: the index built anew, as it was or to a recall that is measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from embell.cli.console import compared, note, write_json
from embell.cli.options import PATH, json_option

if TYPE_CHECKING:
    from embell.engine import Collection
    from embell.engine.manifest import Manifest

RECALL_HELP = "Share of the nearest ten that a search is to find, such as 0.95."
MEMORY_HELP = 'What an index "auto" may hold in memory beside the stored rows, such as 500MB or 2GB.'


def in_bytes(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> int | None:
    """A size such as 500MB or 1.5GiB."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{value!r} is no size; write 500MB or 2GB", ctx, param)
    number, power, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(power.upper() or " "))


@click.command(no_args_is_help=True)
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--index", "kind", metavar="KIND", help="Another kind: exact, auto, faiss:FACTORY such as faiss:HNSW32, or lance.")
@json_option
def optimize(directory: str, kind: str | None, as_json: bool) -> None:
    """Build the index of a collection anew, from its documents.

    \b
    embell optimize notes.embell
    embell optimize notes.embell --index faiss:HNSW32
    """
    from embell.engine.collection import Collection

    collection = Collection.open(directory)
    with compared("Building the index") as step:
        collection.optimize(kind, progress=step, on_note=note)
    _tell(collection, as_json)


@click.command(no_args_is_help=True)
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--recall", type=float, required=True, help=RECALL_HELP)
@click.option(
    "--queries", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Questions like those that will be asked, one a line, or JSON Lines with a text; without, those given last, or documents.",
)  # fmt: skip
@click.option("--memory", metavar="SIZE", callback=in_bytes, help=MEMORY_HELP)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw recall and speed of all settings tried: a PNG."
)
@json_option
def tune(directory: str, recall: float, queries: Path | None, memory: int | None, plot: Path | None, as_json: bool) -> None:
    """Make search as fast as a recall allows, and measure the recall.

    Nothing is encoded again. The settings are chosen on half of the queries and certified on the other half.

    \b
    embell tune papers.embell --recall 0.95 --queries questions.txt --plot recall.png
    """
    from embell.cli.layer_plot import check_matplotlib
    from embell.cli.outputs import check_outputs
    from embell.engine.collection import Collection

    if plot is not None:
        check_outputs(plot=str(plot))
        if plot.suffix.lower() != ".png":
            raise click.UsageError(f"--plot {plot}: the file must end in .png")
        check_matplotlib()
    collection = Collection.open(directory)
    asked = None if queries is None else _questions(queries)
    with compared("Building the index") as step:
        collection.tune(recall, asked, memory=memory, progress=step, on_note=note)
    _tell(collection, as_json)
    if plot is not None:
        _draw(collection, plot)


def _questions(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            text = orjson.loads(line)["text"] if path.suffix in (".jsonl", ".ndjson") and line.strip() else line.decode()
        except (ValueError, KeyError, TypeError) as error:
            raise click.UsageError(
                f"{path}:{number}: no question; a line is UTF-8 text, or JSON with a text in .jsonl"
            ) from error
        if str(text).strip():
            found.append(str(text))
    return found


def _tell(collection: Collection, as_json: bool) -> None:
    manifest = collection.manifest
    if as_json:
        write_json({
            "index": manifest.index, "rows": len(collection), "approximate": manifest.approximate, "target": manifest.target,
            "recall": manifest.recall, "tuned": manifest.tuned,
        })  # fmt: skip
    else:
        click.echo(in_words(manifest))


def in_words(manifest: Manifest) -> str:
    """How a collection is searched, and what recall that has."""
    tuned = manifest.tuned
    if tuned is not None:
        settings = ", ".join(f"{name} {value}" for name, value in tuned["settings"].items())
        return (
            f"{tuned['index']} ({settings}): recall@10 {tuned['recall']:.3f}, with 95 % certainty more than {tuned['low']:.3f}, "
            f"measured on {tuned['of']}; {tuned['qps']:,.0f} queries/s, {tuned['bytes_per_vector']:.0f} bytes a vector"
        )
    if manifest.approximate:
        return f"{manifest.index}: recall not measured; embell tune measures it"
    from embell.engine.generation import AUTO_ROWS

    few = manifest.index == "auto" and manifest.target is not None and manifest.rows < AUTO_ROWS
    return "searched exactly: recall@10 1.000" + few * f"; below {AUTO_ROWS:,} rows no other index is tried"


def _draw(collection: Collection, target: Path) -> None:
    manifest = collection.manifest
    path = collection.path / "index" / str(manifest.generation) / "curve.json"
    if not path.is_file():
        note(f"nothing to draw: {len(collection):,} rows are searched exactly, and no settings were tried")
        return
    from matplotlib.figure import Figure

    curve: dict[str, Any] = orjson.loads(path.read_bytes())
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = curve["points"]
    axes.plot([point["recall"] for point in points], [point["qps"] for point in points], "o", label="settings tried")
    axes.plot([1], [curve["exact"]], "s", label="exact")
    if manifest.tuned is not None:
        axes.plot([manifest.tuned["recall"]], [manifest.tuned["qps"]], "*", markersize=14, label="chosen, as certified")
    axes.axvline(manifest.target or 1, linestyle=":", color="grey")
    axes.set(xlabel="recall@10", ylabel="queries a second, in batches", yscale="log", title=f"{len(collection):,} rows")
    axes.legend()
    figure.savefig(target, dpi=120)
