"""The texts that embell-mini is trained on: drawn from the sources that shipped weights may be trained on.

python -m embell.training.mini --data DATA --output texts.jsonl
embell train distill --config training/presets/embell-mini.toml --data texts.jsonl --teacher TEACHER --output FIRST
python -m embell.training.mini --data DATA --further --output further.jsonl
embell train distill --config training/presets/embell-mini-further.toml --model FIRST/model --data further.jsonl --teacher TEACHER --output RUN
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
@click.option("--source", "only", multiple=True, help="Draw from these files of the list only (repeatable).")
@click.option("--further", is_flag=True, help="Other texts than those drawn without this, for a second training.")
@click.option("--scale", default=1.0, show_default=True, help="Multiplies how many texts each source gives.")
@click.option("--seed", default=0, show_default=True, help="Decides which texts are drawn.")
def main(data: Path, output: Path, only: tuple[str, ...], further: bool, scale: float, seed: int) -> None:
    """Write groups of related texts, a line each: {"texts": [...]}, and say how many texts each source gave."""
    if further and only:
        raise click.UsageError("--further draws from all sources; leave out --source")
    try:
        if further:
            groups, counts = sources.further(data, scale, seed)
        else:
            groups, counts = sources.collect(data, sources.select(only or None), scale, seed)
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
