"""The plot of `embell layers`: scores by depth, and below them the dependence on later tokens."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

from embell.errors import MissingExtraError

if TYPE_CHECKING:
    from embell.engine.layers import LayerSweep, Recommendation

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart; shapes differ as well.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
_BARS = ("#56B4E9", "#CC79A7")
_INK, _GREY, _GRID, _SHADE = "#222222", "#666666", "#E2E2E2", "#F1F1F1"
_MANY = 24
"""Layers above which marks are smaller."""


def check_matplotlib() -> None:
    """Raises MissingExtraError if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib is needed for --plot: pip install 'embell[plot]'") from error


def draw(found: LayerSweep, advice: Recommendation, name: str, file: IO[bytes], form: str) -> None:
    """Draw a sweep of the model `name` to `file`; `form` is "png" (800 pixels wide) or "svg".

    The same sweep gives the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 10, "svg.hashsalt": "embell", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 6.6), dpi=100, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
        figure.suptitle(f"{name} on {found.dataset}: what each depth is worth", x=0.01, ha="left", fontsize=13, fontweight="bold")
        _scores(upper, found, advice)
        _dependence(lower, found)
        label = _mark_start((upper, lower), found, advice)
        _head(upper, f"Correlation of cosine with human scores, {found.pairs:,} pairs, by pooling", label)
        _head(lower, "Change of a text's first half when its second half is hidden")
        figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})


def _scores(axes: Any, found: LayerSweep, advice: Recommendation) -> None:
    depths = [depth.depth for depth in found.depths]
    size = 6.0 if len(depths) <= _MANY else 3.5
    for pooling, (color, marker) in zip(found.depths[0].spearman, _STYLES, strict=False):
        line = {"color": color, "marker": marker, "markersize": size}
        axes.plot(depths, [d.spearman[pooling] for d in found.depths], linewidth=2, label=pooling, zorder=3, **line)
        if found.final_norm:
            line |= {"markerfacecolor": "white", "linewidth": 1, "linestyle": (0, (4, 2)), "alpha": 0.75}
            values = [d.unnormed[pooling] for d in found.depths]
            axes.plot(depths, values, label=f"{pooling}, before the norm", zorder=2, **line)
    marks = [(advice.best, advice.best_spearman, "best", 10)]
    if advice.exit not in (advice.best, len(depths)):
        marks.append((advice.exit, advice.exit_spearman, "exit", -11))
    for depth, score, word, shift in marks:
        axes.plot([depth], [score], "o", markersize=size + 7, markerfacecolor="none", markeredgecolor=_INK, zorder=4)
        axes.annotate(f"{word} {score:.1f}", (depth, score), xytext=(0, shift), textcoords="offset points", ha="center",
                      va="bottom" if shift > 0 else "top", color=_INK, fontweight="bold", zorder=5,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5})  # fmt: skip
    axes.set_ylabel("Spearman × 100")
    axes.margins(y=0.18)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)


def _dependence(axes: Any, found: LayerSweep) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    total, width = len(found.depths), 0.38
    kinds = (("later", "of the layer's output"), ("later_added", "of what the layer adds"))
    for (name, label), color, shift in zip(kinds, _BARS, (-width / 2, width / 2), strict=True):
        places = [depth.depth + shift for depth in found.depths]
        axes.bar(places, [getattr(depth, name) for depth in found.depths], width, color=color, label=label, zorder=3)
    zero = [depth.depth for depth in found.depths if depth.later == 0]
    if zero:  # they are the first ones; a bar of no height says less than a word
        axes.annotate("exactly 0", ((zero[0] + zero[-1]) / 2, 0), xytext=(0, 4), textcoords="offset points", ha="center",
                      color=_GREY)  # fmt: skip
    axes.set_ylabel("share")
    axes.set_ylim(0, 1 if len(zero) == total else None)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_xlabel("depth: number of layers kept, the last of them being layer depth − 1")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.set_xlim(0.4, total + 0.6)


def _mark_start(both: tuple[Any, Any], found: LayerSweep, advice: Recommendation) -> str | None:
    """Mark the layers that look both ways, or should, in both panels; returns what the mark means."""
    now = found.start_layer is not None
    start = found.start_layer if now else advice.start_layer
    if not found.decoder or start is None:
        return None
    for axes in both:
        if now:
            axes.axvspan(start + 0.5, len(found.depths) + 0.6, color=_SHADE, zorder=0)
        axes.axvline(start + 0.5, color=_GREY, linewidth=1.4, linestyle=":", zorder=1)
    return f"both ways from layer {start}" if now else f"suggested start layer {start}"


def _head(axes: Any, title: str, mark: str | None = None) -> None:
    """A title and the legend under it, both above the data."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    if mark is not None:
        handles.append(Line2D([], [], color=_GREY, linewidth=1.4, linestyle=":"))
        labels.append(mark)
    columns = 3 if max(map(len, labels)) <= 26 else 2
    legend = axes.legend(
        handles, labels, ncols=columns, columnspacing=1.5, frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 0.99),
        borderaxespad=0.2,
    )  # fmt: skip
    legend.set_in_layout(False)  # the title's distance makes room for it
    axes.set_title(title, loc="left", fontsize=10, color=_INK, pad=8 + 16 * -(-len(labels) // columns))
