"""Labelled near-duplicates in one form: pairs with labels, or a corpus with its true pairs.

Of each set there is a part on which thresholds are chosen (`train`) and one on which they are reported (`test`). That is `dev` or
`valid` here; with `final`, the files named `test` that stand beside them, for a figure at the very end.

A record of several fields is also one text: its values in the order of the file, joined by a space, empty ones left out. That is
how the flat files of DBLP-Scholar are made too.
"""

from __future__ import annotations

import csv
import hashlib
import lzma
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from embell.engine.normalise import normalise

Fields = dict[str, str]

PRIMARY = ("mrpc", "quora", "planted-news", "dblp-acm", "dblp-scholar", "abt-buy", "citations")
"""The sets over which the mean is taken that decides."""

MATCHING = {
    "dblp-acm": "structured-dblp-acm", "dblp-acm-dirty": "dirty-dblp-acm", "abt-buy": "textual-abt-buy",
    "amazon-google": "structured-amazon-google", "walmart-amazon": "structured-walmart-amazon", "beer": "structured-beer",
    "fodors-zagats": "structured-fodors-zagats", "itunes-amazon": "structured-itunes-amazon",
}  # fmt: skip

ANSWER = "class"
"""A field of Fodors-Zagats that is the same in both records of a pair if they are duplicates: left out."""

LOST = re.compile(r"\bCOL (\w+) VAL\b")
"""What a parser of these files left where an empty field followed."""


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of texts and whether they are duplicates. `fields` are the records, where the texts are records, else empty."""

    first: list[str]
    second: list[str]
    labels: list[bool]
    fields: list[tuple[Fields, Fields]]


@dataclass(frozen=True)
class LabelledCorpus:
    """Texts of which all true pairs `(earlier, later)` are known, as positions: every other pair is none."""

    ids: list[str]
    texts: list[str]
    fields: list[Fields]
    pairs: set[tuple[int, int]]


@dataclass(frozen=True)
class LabelledSet:
    """One set: thresholds are chosen on `train` and reported on `test`; both are of one kind."""

    name: str
    train: LabelledPairs | LabelledCorpus
    test: LabelledPairs | LabelledCorpus


def opened(path: Path) -> IO[str]:
    """The file, or the one with `.xz` behind its name, as text."""
    if path.exists():
        return open(path, encoding="utf-8", newline="")
    return lzma.open(path.with_name(path.name + ".xz"), "rt", encoding="utf-8", newline="")


def table(path: Path) -> Iterator[Fields]:
    """The rows of a TSV file; quotation marks are part of the text."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as file:
        yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    with opened(path) as file:
        yield from map(orjson.loads, file)


def joined(fields: Fields) -> str:
    """A record as one text."""
    return " ".join(value for value in fields.values() if value)


def half(text: str) -> int:
    """0 or 1, by a hash of the normalised text."""
    return hashlib.blake2b(normalise(text).encode(), digest_size=1).digest()[0] % 2


def sentence_pairs(rows: Iterable[Fields], first: str, second: str, label: str) -> LabelledPairs:
    """Pairs out of two columns of a table."""
    kept = list(rows)
    return LabelledPairs([row[first] for row in kept], [row[second] for row in kept], [row[label] == "1" for row in kept], [])


def record_pairs(path: Path) -> LabelledPairs:
    """Pairs of records: `{"label": 0 or 1, "left": {…}, "right": {…}}`."""
    labels, fields = [], []
    for row in lines(path):
        labels.append(bool(row["label"]))
        left, right = (
            {name: LOST.sub("", value).strip() for name, value in row[side].items() if name != ANSWER}
            for side in ("left", "right")
        )
        fields.append((left, right))
    return LabelledPairs([joined(left) for left, _ in fields], [joined(right) for _, right in fields], labels, fields)


def planted_news(folder: Path, size: int) -> LabelledCorpus:
    """Articles put together from sentences of news, and the few of them that were planted as near-duplicates of another."""
    rows = list(lines(folder / f"articles_{size}.jsonl"))
    place = {row["_id"]: number for number, row in enumerate(rows)}
    pairs = {(place[row["id1"]], place[row["id2"]]) for row in table(folder / f"truth_{size}.tsv")}
    texts = [row["text"] for row in rows]
    return LabelledCorpus(list(place), texts, [{"text": text} for text in texts], {(min(pair), max(pair)) for pair in pairs})


def citations(path: Path) -> tuple[LabelledCorpus, LabelledCorpus]:
    """Records of articles out of several literature databases, in two halves by a hash of the group.

    The file says of a record that somebody threw it out as a duplicate, not of which. Records are of one group if they agree in
    the first author's name and the DOI (supplements share one), or in name, title (letters and digits) and year; also through a
    third record. The text is title, authors, year, journal and abstract: DOI, issue and pages are not compared.
    """
    rows = list(lines(path))
    parent = list(range(len(rows)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    same: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows):
        doi = re.sub(r"^.*?(10\.\d)", r"\1", row["doi"].casefold().strip())
        title = re.sub(r"\W+", "", row["title"].casefold())
        author = re.split(r"[\s,.]", row["author"].casefold().strip())[0]
        keys = [(author, title, str(row["year"]))] + [(author, doi)] * doi.startswith("10.")
        for key in keys:
            one, other = root(same.setdefault(key, number)), root(number)
            parent[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(rows)):
        groups[root(number)].append(number)

    parts: list[LabelledCorpus] = []
    for part in (0, 1):
        kept = sorted(number for first, group in groups.items() if half(rows[first]["title"]) == part for number in group)
        place = {number: position for position, number in enumerate(kept)}
        fields = []
        for number in kept:
            values = {name: str(rows[number][name]) for name in ("title", "author", "year", "journal", "abstract")}
            fields.append({name: "" if value == "NA" else value for name, value in values.items()})
        pairs = {
            (place[one], place[other])
            for group in groups.values()
            if group[0] in place
            for position, one in enumerate(group)
            for other in group[position + 1 :]
        }
        parts.append(LabelledCorpus([str(rows[number]["record_id"]) for number in kept], [*map(joined, fields)], fields, pairs))
    return parts[0], parts[1]


def load(data: Path, names: Iterable[str] | None = None, final: bool = False) -> Iterator[LabelledSet]:
    """The sets in the folder, or those named. With `final`, what was held back as a test is what is reported.

    Quora has no training part: its dev rows are halved by a hash of the first question, and with `final` all of them choose.
    Of planted news, 100 articles choose and 1 000 (which hold the planted pairs of the 100) are reported; citations are halved by
    group. Of these two nothing more is held back.
    """
    matching = data / "entity_matching"
    wanted = set(PRIMARY) | set(MATCHING) if names is None else set(names)
    if "mrpc" in wanted:
        columns = ("sentence1", "sentence2", "label")
        parts = [sentence_pairs(table(data / f"mrpc-{part}.tsv"), *columns) for part in ("train", "test" if final else "dev")]
        yield LabelledSet("mrpc", *parts)
    if "quora" in wanted:
        columns = ("question1", "question2", "is_duplicate")
        rows = list(table(data / "quora-dev.tsv"))
        halves = [[row for row in rows if half(row["question1"]) == part] for part in (0, 1)]
        if final:
            halves = [rows, list(table(data / "quora-test.tsv"))]
        yield LabelledSet("quora", *(sentence_pairs(part, *columns) for part in halves))
    if "planted-news" in wanted:
        yield LabelledSet("planted-news", *(planted_news(data / "planted_news", size) for size in (100, 1000)))
    for name, file in MATCHING.items():
        if name in wanted:
            parts = [record_pairs(matching / f"{file}.{part}.jsonl") for part in ("train", "test" if final else "valid")]
            yield LabelledSet(name, *parts)
    if "dblp-scholar" in wanted:
        columns = ("text_left", "text_right", "label")
        names_of_parts = ("train", "test" if final else "dev")
        parts = [sentence_pairs(table(matching / f"dblp_scholar_flat.{part}.tsv"), *columns) for part in names_of_parts]
        yield LabelledSet("dblp-scholar", *parts)
    if "citations" in wanted:
        yield LabelledSet("citations", *citations(data / "asysd_labelled_citations.jsonl"))
