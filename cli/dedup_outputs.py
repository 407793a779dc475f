"""What `embell dedup` writes: rows, pairs, the report; and what it reads back: decisions of a review."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embell.cli.console import note, write_json
from embell.cli.duplicate_report import Group, Member, Report
from embell.cli.outputs import whole_file

if TYPE_CHECKING:
    from embell.engine import Collection, Duplicates
    from embell.engine.duplicates import Dropped
    from embell.engine.threshold_choice import Decision

_TOGETHER = 2000
_GROUPS_SHOWN = 5000
_READ = 500
_BINS = 20
_BAR = 30
_FEWEST_DRAWN = 20


class Texts:
    """Texts by id, of the collection that was looked at or of the one that it was compared against."""

    def __init__(self, collections: Sequence[Collection]) -> None:
        self._collections = collections

    def of(self, dropped: Sequence[Dropped]) -> tuple[dict[str, str], dict[str, str]]:
        """Texts of these dropped rows, and of those that they were dropped for, which may have the same ids."""
        mine, reference = self._collections[0], self._collections[-1]
        return self._some(mine, {row.id for row in dropped}), self._some(reference, {row.kept_id for row in dropped})

    @staticmethod
    def _some(collection: Collection, ids: set[str]) -> dict[str, str]:
        return {row["id"]: row["text"] for row in collection.store.rows_of(sorted(ids), ["id", "text"])}


def write_outputs(
    found: Duplicates,
    records: Callable[[], Iterable[tuple[str, bytes]]],
    texts: Texts,
    output: str | None,
    removed: str | None,
    pairs: str | None,
) -> None:
    """Write what was asked for."""
    if output:
        dropped = {row.id for row in found.dropped}
        with whole_file(output, "wb") as file:
            for identity, line in records():
                if not identity or identity not in dropped:
                    file.write(line + b"\n")
    if removed:
        with whole_file(removed) as file:
            for begin in range(0, len(found.dropped), _TOGETHER):
                some = found.dropped[begin : begin + _TOGETHER]
                known, _ = texts.of(some)
                for row in some:
                    fields = {name: value for name, value in asdict(row).items() if value is not None}
                    write_json({**fields, "text": known[row.id]}, file)
    if pairs:
        import orjson
        import pyarrow.parquet

        # The thresholds are the list's floors: below them nothing was looked for.
        about = {"embell.thresholds": orjson.dumps(found.thresholds)}
        if "semantic" in found.thresholds:
            about["embell.threshold"] = str(found.thresholds["semantic"]).encode()
        with whole_file(pairs, "wb") as file:
            pyarrow.parquet.write_table(found.pairs.replace_schema_metadata(about), file)


def histogram(found: Duplicates) -> dict[str, list[tuple[float, float, int]]]:
    """By kind, the number of pairs in each step of the score from the threshold to 1: (low, high, pairs)."""
    import numpy as np

    table = found.pairs
    kinds, scores = np.array(table["kind"].to_pylist(), object), table["score"].to_numpy()
    bars_of = {}
    for kind, threshold in found.thresholds.items():
        if kind in ("exact", "overlap") or threshold >= 1:
            continue
        counts, edges = np.histogram(np.minimum(scores[kinds == kind], 1.0), bins=_BINS, range=(threshold, 1.0))
        bars_of[kind] = [(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    return bars_of


def bars(found: Duplicates) -> Iterator[str]:
    """The histogram as lines of text, two steps to a line; of kinds with few pairs it would say nothing."""
    for kind, steps in histogram(found).items():
        wide = [(low[0], high[1], low[2] + high[2]) for low, high in zip(steps[::2], steps[1::2], strict=True)]
        most = max(count for *_, count in wide)
        if sum(count for *_, count in wide) >= _FEWEST_DRAWN:
            yield f"{kind} pairs by score:"
            for low, high, count in wide:
                yield f"  {low:.3f} to {high:.3f} {'█' * -(-count * _BAR // most):<{_BAR}} {count:,}"


def report_of(found: Duplicates, texts: Texts, title: str) -> Report:
    """The result as the page shows it."""
    ids = found.groups
    notes = []
    if len(ids) > _GROUPS_SHOWN:
        notes.append(f"The first {_GROUPS_SHOWN:,} of {len(ids):,} groups are shown; --removed writes every dropped row.")
    if "overlap" in found.thresholds:
        notes.append(f"Semantic pairs also share {found.thresholds['overlap']:.0%} of the shorter text's words.")
    by_kept: dict[str, list[Dropped]] = {}
    for row in found.dropped:
        by_kept.setdefault(row.kept_id, []).append(row)
    return Report(
        title=title,
        documents=len(found.kept) + len(found.dropped),
        kept=len(found.kept),
        dropped=dict(Counter(row.kind for row in found.dropped)),
        thresholds={kind: value for kind, value in found.thresholds.items() if kind not in ("exact", "overlap", "reviewed")},
        rule={"cover": "greedy cover", "components": "connected components", "complete": "complete linkage"}[found.rule],
        keep=found.keep,
        histogram=histogram(found),
        groups=_groups([by_kept[kept] for kept in itertools.islice(by_kept, _GROUPS_SHOWN)], texts),
        all_groups=len(ids),
        capped=found.capped,
        notes=notes,
    )


def _groups(groups: list[list[Dropped]], texts: Texts) -> Iterator[Group]:
    """The groups of a report, whose texts are read when they are written."""
    for begin in range(0, len(groups), _READ):
        some = groups[begin : begin + _READ]
        known, others = texts.of([row for group in some for row in group])
        for group in some:
            kept = group[0].kept_id
            yield Group(kept, others[kept], [Member(row.id, known[row.id], row.score, row.kind, kept) for row in group])


def read_decisions(path: str) -> list[Decision]:
    """Decisions as the report's review writes them: lines with id_a, id_b, score, kind and duplicate (true or false).

    Raises CorpusError, with file and line, for a line that is something else.
    """
    import orjson

    from embell.engine.threshold_choice import Decision
    from embell.errors import CorpusError

    found = []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            if not isinstance(row["duplicate"], bool):
                raise TypeError
            found.append(Decision(str(row["id_a"]), str(row["id_b"]), row["duplicate"]))
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{path}:{number}: a decision is a JSON object with id_a, id_b and duplicate (true or false), as the report's review writes them"
            ) from error
    return found


def tell_suggestions(found: Duplicates, decisions: Sequence[Decision], as_json: bool) -> None:
    """Print the threshold of each kind that fits the decisions best, and what each level would be worth."""
    from embell.engine.threshold_choice import suggest

    for choice in suggest(found, decisions):
        if as_json:
            write_json(asdict(choice))
            continue
        click.echo(f"{choice.kind}: {choice.threshold:.3f} fits best (precision {choice.precision:.2f}, recall {choice.recall:.2f}, "
                   f"F1 {choice.f1:.2f}, of {choice.decided:,} decided pairs)")  # fmt: skip
        for level in choice.levels:
            click.echo(
                f"  {level.threshold:.3f}  precision {level.precision:.2f} ± {level.margin:.2f}  recall {level.recall:.2f}  pairs {level.pairs:,}"
            )
    note("recall is of the duplicates among the decided pairs, not of all that there are")
