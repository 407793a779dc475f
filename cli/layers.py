"""`embell layers`."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embell.cli.console import progress, write_json
from embell.cli.options import PATH, ModelOptions, json_option, model_options
from embell.cli.outputs import check_outputs, whole_file
from embell.errors import UsageError

if TYPE_CHECKING:
    from embell.engine.layers import LayerSweep, Recommendation


@click.command(no_args_is_help=True)
@click.argument("file", metavar="FILE.tsv", type=PATH)
@click.option("--score-field", metavar="F", help="Column of the score.  [default: score, or relatedness]")
@click.option(
    "--tolerance",
    metavar="POINTS",
    type=click.FloatRange(0),
    default=0.5,
    show_default=True,
    help="What an early exit may lose of the best score, and a turning point must.",
)
@click.option("--plot", metavar="FILE.png|FILE.svg", type=PATH, help="Draw the scores and the dependence on later tokens.")
@model_options
@json_option
def layers(file: str, score_field: str | None, tolerance: float, plot: str | None, model: ModelOptions, as_json: bool) -> None:
    """Score an encoder at every depth, and measure how far each layer looks ahead.

    \b
    embell layers stsb-dev.tsv
    embell layers stsb-dev.tsv --model path/to/decoder --start-layer none --plot layers.png

    The file is TSV with the columns sentence1, sentence2 and score (or relatedness); the measure is Spearman
    correlation (times 100) of cosine and score. One pass gives the scores of the first 1, 2, … layers, for mean
    and last-token pooling, with and without the model's final norm.

    It suggests where a causal model should begin to look both ways (run it with --start-layer none for that),
    and how many layers are enough. "later tokens" is the share by which a layer's states of a text's first half
    change when the second half is hidden: 0 in a causal layer.
    """
    if plot is not None:
        _check_plot(plot)
    if not math.isfinite(tolerance):
        raise UsageError("--tolerance must be a finite number of points")
    from embell.engine.evaluation import read_pairs

    pairs = read_pairs(Path(file), score_field)
    from embell.engine.layers import sweep

    encoder = model.load()
    with progress("measuring") as step:
        found = sweep(encoder, pairs, progress=step)
    advice = found.recommend(tolerance)
    if plot is not None:
        from embell.cli.layer_plot import draw

        with whole_file(plot, "wb") as out:
            draw(found, advice, Path(model.model or "embell-mini").name, out, _format(plot))
    if as_json:
        _print_json(found, advice)
    else:
        _print_table(found, advice)


def _format(plot: str) -> str:
    return Path(plot).suffix.lower().removeprefix(".")


def _check_plot(plot: str) -> None:
    """Raises UsageError or MissingExtraError before any work is done."""
    if _format(plot) not in ("png", "svg"):
        raise UsageError(f"--plot {plot}: the name must end in .png or .svg")
    check_outputs(plot=plot)
    from embell.cli.layer_plot import check_matplotlib

    check_matplotlib()


def _print_json(found: LayerSweep, advice: Recommendation) -> None:
    def rounded(scores: dict[str, float]) -> dict[str, float]:
        return {name: round(score, 3) for name, score in scores.items()}

    for depth in found.depths:
        write_json(
            {
                "dataset": found.dataset, "depth": depth.depth, "spearman": rounded(depth.spearman),
                "unnormed": rounded(depth.unnormed), "later": depth.later, "later_added": depth.later_added,
            }
        )  # fmt: skip
    about = {name: getattr(found, name) for name in ("dataset", "pairs", "texts", "dtype")}
    about["layers"], about["bidirectional_from"] = len(found.depths), found.start_layer
    scores = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(advice).items()}
    write_json({**about, "recommendation": scores})


def _print_table(found: LayerSweep, advice: Recommendation) -> None:
    names = list(found.depths[0].spearman)
    sets = [("as an encoder", [depth.spearman for depth in found.depths])]
    if found.final_norm:
        sets.append(("before the norm", [depth.unnormed for depth in found.depths]))
    widths = [max(len(name), 7) for name in names]
    block = sum(widths) + 2 * len(widths)
    count = f"{len(found.depths)} layers, {_direction(found)}"
    click.echo(f"{found.dataset}   {found.pairs:,} pairs   {count}   {found.dtype}")
    click.echo("")
    click.echo((" " * 5 + "".join(f"{title:>{block}}   " for title, _ in sets) + f"{'later tokens, share of':>26}").rstrip())
    head = "".join("".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True)) + "   " for _ in sets)
    click.echo(f"depth{head}{'state':>11}{'what is added':>15}")
    for at, depth in enumerate(found.depths):
        cells = "".join(
            "".join(f"  {_score(scores[at][name]):>{width}}" for name, width in zip(names, widths, strict=True)) + "   "
            for _, scores in sets
        )
        marks = [word for word, place in (("best", advice.best), ("exit", advice.exit)) if place == depth.depth]
        mark = f"   <- {', '.join(marks)}" if marks else ""
        click.echo(f"{depth.depth:>5}{cells}{_share(depth.later):>11}{_share(depth.later_added):>15}{mark}")
    click.echo("")
    for line in sentences(found, advice):
        click.echo(line)


def _score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else "0" if value == 0 else f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _direction(found: LayerSweep) -> str:
    if not found.decoder:
        return "all look both ways"
    if found.start_layer is None:
        return "all causal"
    return f"both ways from layer {found.start_layer} on"


def sentences(found: LayerSweep, advice: Recommendation) -> list[str]:
    """The recommendation in words, with the options that follow from it."""
    total = len(found.depths)
    out = [f"Best: depth {advice.best} of {total} with {advice.pooling} pooling, {advice.best_spearman:.2f}."]
    if advice.exit == total:
        out.append(f"Exit: no smaller depth comes within {advice.tolerance:g} of that; keep all layers.")
    else:
        loss = advice.best_spearman - advice.exit_spearman
        lost = f"{loss:.2f} below the best" if loss else "the best itself"
        out.append(f"Exit: depth {advice.exit} is enough, {advice.exit_spearman:.2f}, {lost}: {advice.exit_options}")
    if not found.decoder:
        out.append("Start layer: none to choose; every layer of this model looks both ways by nature.")
    elif advice.start_layer is None:
        out.append(
            f"Start layer: layers from {found.start_layer} on look both ways already; "
            "only the causal model has a turning point: measure it with --start-layer none"
        )
    elif advice.turning_point:
        by = "" if math.isnan(advice.fall) else f", by {advice.fall:.2f} to the last"
        out.append(
            f"Start layer: after depth {advice.best} the score falls{by}; the layers from {advice.start_layer} on are those "
            f"to make bidirectional: {advice.start_options}"
        )
    else:
        why = (
            "the last depth is the best"
            if advice.best == total
            else f"after the best depth the score falls by only {advice.fall:.2f}"
        )
        out.append(
            f"Start layer: no turning point, {why}; make the last layer bidirectional, with mean pooling: {advice.start_options}"
        )
    return out
