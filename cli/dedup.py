"""`embell dedup`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embell.cli.compared_corpus import opened
from embell.cli.console import compared, counted, note, snippet, write_json
from embell.cli.dedup_outputs import Texts, bars, read_decisions, report_of, tell_suggestions, write_outputs
from embell.cli.duplicate_report import write_report
from embell.cli.options import PATH, ModelOptions, corpus_options, json_option, model_options
from embell.cli.outputs import check_outputs, whole_file

if TYPE_CHECKING:
    from embell.engine import Duplicates, Encoder
    from embell.engine.duplicates import Dropped
    from embell.indexers.corpora import CorpusOptions, CorpusReport


_FEWEST_SHOWN = 30
"""Characters of a text that are shown however narrow the terminal is."""


@click.command(no_args_is_help=True)
@click.argument("sources", metavar="SOURCE_OR_DIR...", type=PATH, nargs=-1, required=True)
@click.option("--threshold", type=float, help="Cosine at which two texts are duplicates, whatever their words are.")
@click.option(
    "--overlap", type=float, metavar="SHARE", help="Share of the shorter text's words that such a pair must have in common."
)
@click.option(
    "--lexical", type=float, metavar="JACCARD", help="Share of all words of two texts that lexical duplicates have in common."
)
@click.option(
    "--contained", type=float, metavar="SHARE", help="Share of the shorter text's words that are in the longer: part of it."
)
@click.option("--kinds", metavar="KIND,...", help="What to look for: exact, lexical, contained, semantic.")
@click.option(
    "--against",
    multiple=True,
    metavar="SOURCE_OR_DIR",
    type=PATH,
    help="Find the rows that this has too (repeatable), such as test items.",
)
@click.option("--keep", default="first", show_default=True, metavar="POLICY",
              help="Which of two is kept: first, last, longest, shortest, central, FIELD:max or FIELD:min.")  # fmt: skip
@click.option("--rule", type=click.Choice(["cover", "components", "complete"]), default="cover", show_default=True,
              help="How pairs decide: a kept row near each dropped one; connected rows; groups of which all are near.")  # fmt: skip
@click.option(
    "--reduce-to", type=click.IntRange(1), metavar="N",
    help="After the duplicates, drop those nearest to a kept one until N rows with text are left.",
)  # fmt: skip
@click.option("--group-by", metavar="FIELD", help="Compare only rows with the same value of this field.")
@click.option(
    "--weight",
    "weights",
    metavar="FIELD=WEIGHT",
    multiple=True,
    help="Compare the meaning field by field, as much as each weighs (repeatable); sources only.",
)
@click.option(
    "--decisions",
    metavar="FILE.jsonl",
    type=PATH,
    help="Decisions from the report's review: pairs that are duplicates, or are not.",
)
@click.option("--suggest", metavar="FILE.jsonl", type=PATH, help="Instead of removing: thresholds that fit these decisions best.")
@click.option("--output", metavar="FILE.jsonl", type=PATH, help="Write the rows that are kept.")
@click.option(
    "--removed", metavar="FILE.jsonl", type=PATH, help="Write the rows that are dropped, each with the kept one and the score."
)
@click.option("--pairs", metavar="FILE.parquet", type=PATH, help="Write every pair of duplicates.")
@click.option(
    "--report",
    "page",
    metavar="FILE.html",
    type=PATH,
    help="Write a page that shows the duplicates, to be reviewed in a browser.",
)
@corpus_options
@model_options
@json_option
def dedup(
    sources: tuple[str, ...],
    threshold: float | None,
    overlap: float | None,
    lexical: float | None,
    contained: float | None,
    kinds: str | None,
    against: tuple[str, ...],
    keep: str,
    rule: str,
    reduce_to: int | None,
    group_by: str | None,
    weights: tuple[str, ...],
    decisions: str | None,
    suggest: str | None,
    output: str | None,
    removed: str | None,
    pairs: str | None,
    page: str | None,
    corpus: CorpusOptions,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Find near-duplicates: copies but for case and spacing, texts of nearly the same words, and texts of the same meaning.

    With --threshold, cosine alone decides. The first of each kind is kept, unless --keep says otherwise. No two kept rows are duplicates of
    each other, and every dropped row names a kept one. JSON Lines are written out as they stood; the source is not changed. Beside a
    collection the pairs are kept: another threshold is then a matter of seconds.

    \b
    embell dedup corpus.jsonl --output kept.jsonl --removed removed.jsonl --report duplicates.html
    embell dedup train.jsonl --against test.jsonl --output clean.jsonl
    embell dedup notes.embell --threshold 0.92 --keep longest
    """
    import time

    from embell.engine.duplicates import chosen_thresholds
    from embell.engine.rules import check_keep
    from embell.indexers.corpora import CorpusReport, is_read

    check_keep(keep)
    chosen: dict[str, Any] = {"lexical": lexical, "contained": contained, "overlap": overlap, "kinds": _kinds(kinds)}
    chosen_thresholds(threshold, **chosen)
    outputs = {"output": output, "removed": removed, "pairs": pairs, "report": page}
    check_outputs(**outputs)
    if decisions and suggest:
        raise click.UsageError("--suggest looks at decisions, --decisions applies them: give one of the two")
    for path in (path for path in outputs.values() if path not in (None, "-")):
        for source in (*sources, *against):
            if source != "-" and is_read(path, source):
                where = (
                    "the source and would be overwritten"
                    if os.path.realpath(source) == os.path.realpath(path)
                    else f"part of the source {source}"
                )
                raise click.UsageError(f"{path} is {where}; name another file")
        if decisions and os.path.realpath(decisions) == os.path.realpath(path):
            raise click.UsageError(f"{path} holds the decisions and would be overwritten; name another file")
    for option in ("pairs", "report"):
        if outputs[option] == "-":
            raise click.UsageError(f"--{option} needs a file: it does not go to stdout")
    if against and (group_by or keep != "first" or rule != "cover"):
        raise click.UsageError("--against decides by itself what is dropped: leave out --keep, --rule and --group-by")
    if reduce_to and (against or group_by or suggest):
        raise click.UsageError("--reduce-to compares all rows with each other: leave out --against, --group-by and --suggest")
    if suggest and any(outputs.values()):
        raise click.UsageError("--suggest writes nothing: leave out --output, --removed, --pairs and --report")
    weighing = _weights(weights)
    if weighing:
        corpus = replace(corpus, text_fields=corpus.text_fields or tuple(weighing), fields_beside=tuple(weighing))
    judged = read_decisions(given) if (given := decisions or suggest) else []
    began = time.monotonic()
    report = CorpusReport()
    fields = {name for name in (keep.rpartition(":")[0], group_by) if name}
    with ExitStack() as stack:
        folder = _work_folder(stack, outputs)
        load = _loading(model, (*sources, *against))
        collection, records = opened(
            stack, folder / "dedup.embell", sources, corpus, model, load, report, fields, weighing, " but kept"
        )
        collections = [collection]
        with compared("Comparing") as step:
            if against:
                other, _ = opened(stack, folder / "against.embell", against, corpus, model, load, CorpusReport(), set(), weighing)
                collections.append(other)
                found = collection.leaks(other, threshold, progress=step, **chosen)
            else:
                found = collection.duplicates(
                    threshold, keep=keep, rule=rule, group_by=group_by, progress=step, on_note=note, **chosen
                )
        if suggest:
            tell_suggestions(found, judged, as_json)
            return
        if judged:
            found = found.decided(judged)
        if reduce_to:
            with compared("Reducing") as step:
                found = collection.reduce(found, reduce_to, progress=step)
        texts = Texts(collections)
        write_outputs(found, records, texts, output, removed, pairs)
        if page:
            with whole_file(page) as file:
                write_report(report_of(found, texts, _title(sources, against)), file)
        shown = [] if as_json or any(outputs.values()) else found.dropped[:10]
        _tell(found, report, shown, texts, time.monotonic() - began, as_json, "-" in (output, removed), reduce_to)
        shutil.rmtree(folder, ignore_errors=True)


def _loading(model: ModelOptions, sources: Sequence[str]) -> Callable[[], Encoder]:
    """How sources get their encoder: that of the collection among them, if there is one, whose vectors they will meet."""
    from embell.engine.manifest import FILE, Manifest

    for source in sources:
        if not model.given and Path(source, FILE).is_file() and (spec := Manifest.read(Path(source)).encoder) is not None:
            from embell.engine.encoder import Encoder

            return partial(Encoder.from_spec, spec)
    return model.load


def _weights(given: Sequence[str]) -> dict[str, float]:
    """FIELD=WEIGHT as field and weight."""
    found: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf"):
            raise click.UsageError(f"--weight {text}: write FIELD=WEIGHT with a weight above 0, such as title=2")
        found[name] = weight
    return found


def _kinds(kinds: str | None) -> list[str] | None:
    return None if kinds is None else [kind.strip() for kind in kinds.split(",") if kind.strip()]


def _title(sources: Sequence[str], against: Sequence[str]) -> str:
    return ", ".join(Path(source).name for source in sources) + (
        f" against {', '.join(Path(a).name for a in against)}" if against else ""
    )


def _work_folder(stack: ExitStack, outputs: dict[str, str | None]) -> Path:
    """Where vectors and pairs lie until the results are written: beside the first output, so that the same command goes on if it was killed."""
    from embell.indexers.corpora import UNFINISHED

    for path in outputs.values():
        if path not in (None, "-") and not (Path(path).exists() and not Path(path).is_file()):
            folder = Path(os.path.realpath(path) + UNFINISHED)
            folder.mkdir(exist_ok=True)
            stack.callback(_drop_empty, folder)
            return folder
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embell-")))


def _drop_empty(folder: Path) -> None:
    """A mistake that is noticed before anything is made leaves nothing behind."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _tell(
    found: Duplicates,
    report: CorpusReport,
    shown: Sequence[Dropped],
    texts: Texts,
    seconds: float,
    as_json: bool,
    stdout_taken: bool,
    reduce_to: int | None,
) -> None:
    kinds = Counter(row.kind for row in found.dropped)
    documents = len(found.kept) + len(found.dropped)
    if found.capped:
        note(
            f"{counted(found.capped, 'row')} with more than 1,000 partners: only the links to a few of them are in the pair list"
        )
    if as_json:
        summary = {
            "documents": documents,
            "kept": len(found.kept),
            "dropped": len(found.dropped),
            **{kind: kinds[kind] for kind in found.thresholds if kind != "overlap"},
            **({"reduced": kinds["reduced"], "reduced_at": found.reduced} if reduce_to else {}),
            "pairs": found.pairs.num_rows,
            "capped": found.capped,
            "threshold": found.thresholds.get("semantic"),
            "thresholds": found.thresholds,
            "empty": report.empty,
            "rejected": report.rejected,
            "seconds": round(seconds, 3),
        }
        write_json(summary, sys.stderr if stdout_taken else None)
        return
    dropped, kept = texts.of(shown)
    for row in shown:
        through = f" (through {row.via})" if row.via is not None else ""
        for head, text in (
            (f"{row.score:.3f} {row.kind:<10}{row.id}: ", dropped[row.id]),
            (f"      kept      {row.kept_id}{through}: ", kept[row.kept_id]),
        ):
            click.echo(head + snippet(text, max(_FEWEST_SHOWN, shutil.get_terminal_size().columns - len(head))))
    if shown and len(found.dropped) > len(shown):
        click.echo(
            f"… and {len(found.dropped) - len(shown):,} more; --removed FILE.jsonl writes them all, --report FILE.html shows them"
        )
    for line in bars(found):
        note(line)
    how = ", ".join(f"{kinds[kind]:,} {kind}{_where(kind, found.thresholds)}" for kind in found.thresholds if kind != "overlap")
    if found.reduced is not None:
        how += f", {kinds['reduced']:,} to reduce, at cosine {found.reduced:.3f} or more"
    note(f"{counted(documents, 'document')}: {len(found.kept):,} kept, {len(found.dropped):,} dropped ({how}; {seconds:.1f} s)")


def _where(kind: str, thresholds: dict[str, float]) -> str:
    """What a kind's threshold means, in words."""
    if kind == "semantic":
        shared = f" with {thresholds['overlap']:.0%} of the words" if "overlap" in thresholds else ""
        return f" at cosine {thresholds[kind]} or more{shared}"
    if kind == "lexical":
        return f" at Jaccard {thresholds[kind]} or more"
    return f" with {thresholds[kind]:.0%} in another" if kind == "contained" else ""
