"""The texts that embell-mini is trained on: drawn from the sources that shipped weights may be trained on.

python -m embell.training.mini --data DATA --output texts.jsonl
embell train distill --config training/presets/embell-mini.toml --data texts.jsonl --teacher TEACHER --output RUN
"""

from __future__ import annotations

from pathlib import Path

import click
import orjson

from embell.errors import EmbellError
from embell.training import sources


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="Folder of training corpora."
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="JSON Lines file to write.")
@click.option("--source", "only", multiple=True, help="Draw once, from these files of the list only (repeatable).")
@click.option("--scale", default=1.0, show_default=True, help="Multiplies how many texts each source gives.")
@click.option("--seed", default=0, show_default=True, help="Decides which texts are drawn.")
def main(data: Path, output: Path, only: tuple[str, ...], scale: float, seed: int) -> None:
    """Write groups of related texts, a line each: {"texts": [...]}, and say how many texts each source gave."""
    try:
        groups, counts = (
            sources.collect(data, sources.select(only), scale, seed) if only else sources.whole_mix(data, scale, seed)
        )
    except EmbellError as error:
        raise click.ClickException(str(error)) from error
    with output.open("wb") as file:
        for group in groups:
            file.write(orjson.dumps({"texts": group}, option=orjson.OPT_APPEND_NEWLINE))
    for path, count in counts.items():
        click.echo(f"{count:>9,}  {path}", err=True)
    click.echo(f"{sum(counts.values()):>9,}  texts in {len(groups):,} groups", err=True)


if __name__ == "__main__":
    main()
