"""Texts that weights shipped with embell may be trained on, and nothing else.

Each source names its file below the data folder, its licence, and how texts are read from it.
A file that is not in `SHIPPABLE` is refused, whatever it holds: shipped weights must come from text
whose licence allows it. Test splits are not listed, so that they cannot be trained on by mistake.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from embell.errors import CorpusError, UsageError

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A file of training text: where it is, under which licence, and what to take from a row.

    `sentences` and `paragraphs` give the texts of one row; `share_s` and `share_p` are how many of
    each go into the default mix at most (0: none, None: all).
    """

    path: str
    licence: str
    sentences: Callable[[Row], Iterable[str]]
    paragraphs: Callable[[Row], Iterable[str]] = lambda row: ()
    share_s: int | None = None
    share_p: int | None = 0


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z0-9\"'(])")


def split_sentences(text: str) -> Iterator[str]:
    """Sentences of running English text, by punctuation: good enough to draw training text from."""
    for line in text.split("\n"):
        yield from _SENTENCE_END.split(line)


def split_paragraphs(text: str) -> Iterator[str]:
    """Lines of at least 200 characters, cut to about 1 200 at a sentence end, and short ones joined to them."""
    held = ""
    for line in text.split("\n"):
        held = f"{held} {line}".strip()
        if len(held) < 200:
            continue
        while len(held) > 1200:
            cut = held.rfind(". ", 0, 1200) + 1 or 1200
            yield held[:cut]
            held = held[cut:].strip()
        if len(held) >= 200:
            yield held
            held = ""


def _fields(*names: str) -> Callable[[Row], Iterable[str]]:
    return lambda row: (row[name] for name in names)


def _article(row: Row) -> Iterable[str]:
    yield row["title"]
    yield from split_sentences(row["text"])


def _titled_paragraphs(row: Row) -> Iterable[str]:
    """The paragraphs of an article; the lead carries the title in front, as `title` + `text` documents do."""
    for number, paragraph in enumerate(split_paragraphs(row["text"])):
        yield f"{row['title']}. {paragraph}" if number == 0 else paragraph


_WIKIPEDIA = "CC BY-SA (Wikipedia)"

SHIPPABLE: tuple[Source, ...] = (
    Source("text/enwiki_a.jsonl.xz", _WIKIPEDIA, _article, _titled_paragraphs, 160_000, 16_000),
    Source("text/enwiki_b.jsonl.xz", _WIKIPEDIA, _article, _titled_paragraphs, 60_000, 5_000),
    Source("text/openstax_md.jsonl.xz", "CC BY (OpenStax)", _article, _titled_paragraphs, 10_000, 3_000),
    Source("text/factbook.jsonl", "CC0", _article, _titled_paragraphs, 5_000, 1_200),
    Source("dict/oewn_definitions.tsv.xz", "CC BY 4.0 + WordNet licence", _fields("definition"), share_s=40_000),
    Source("dict/wordset.tsv.xz", "CC BY-SA 4.0 + WordNet licence", _fields("definition", "example"), share_s=30_000),
    Source("pairs/snli-dev.tsv.xz", "CC BY-SA 4.0", _fields("premise", "hypothesis")),
    Source("pairs/snli-test.tsv.xz", "CC BY-SA 4.0", _fields("premise", "hypothesis")),
    Source("pairs/wikisplit-tune.tsv.xz", "CC BY-SA 4.0", _fields("complex", "split"), share_s=8_000),
    Source("pairs/medquad.jsonl.xz", "CC BY 4.0", _fields("question"), lambda r: split_paragraphs(r["answer"]), 12_000, 4_500),
    Source("pairs/scitldr-train.jsonl.xz", "Apache-2.0", lambda r: [r["title"], *r["tldr"]], _fields("abstract"), None, None),
    Source("pairs/pubmedqa_l.jsonl.xz", "MIT", _fields("question", "long_answer"), _fields("context"), None, None),
    Source("pairs/opentriviaqa.tsv.xz", "CC BY-SA 4.0", _fields("question"), share_s=40_000),
    Source("pairs/banking77-train.tsv.xz", "CC BY 4.0", _fields("text")),
    Source("pairs/clinc150.tsv.xz", "CC BY 3.0", lambda r: [r["text"]] if r["split"].endswith("train") else [], share_s=15_000),
    Source("multi/tatoeba-en-mr.tsv.xz", "CC BY 2.0 FR", _fields("en"), share_s=25_000),
    Source("multi/tatoeba-en-hi.tsv", "CC BY 2.0 FR", _fields("en")),
    Source("code/django.tsv.xz", "MIT", _fields("annotation"), share_s=8_000),
    Source("code/python_stdlib_api_docs.jsonl.xz", "Apache-2.0", _fields("intent")),
    Source("code/concode-java-dev.jsonl", "C-UDA", _fields("nl")),
)


def select(paths: Iterable[str] | None) -> list[Source]:
    """The sources of these paths, relative to the data folder; None means all that may be shipped.

    Raises UsageError for a path that is not on the list.
    """
    if paths is None:
        return list(SHIPPABLE)
    by_path = {source.path: source for source in SHIPPABLE}
    chosen = []
    for path in paths:
        if path not in by_path:
            raise UsageError(f"{path} may not be trained on for weights that ship; allowed are: {', '.join(by_path)}")
        chosen.append(by_path[path])
    return chosen


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl` or `.tsv` file (with a header line), plain or `.xz` or `.gz`."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    if not path.is_file():
        raise CorpusError(f"{path}: no such file; give the data folder with --data")
    with opener(path, "rb") as raw:  # type: ignore[operator]
        if ".jsonl" in path.suffixes:
            for line in raw:
                yield orjson.loads(line)
        else:
            yield from csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)


_ALNUM = re.compile(r"[^a-z0-9]+")


def fingerprint(text: str) -> str:
    """What two texts share if they differ only in case, punctuation or white space."""
    return _ALNUM.sub("", unicodedata.normalize("NFKC", text).lower())


def held_out(data: Path) -> set[str]:
    """Fingerprints of every sentence and query that a score is reported on, so that none is trained on."""
    found: set[str] = set()
    for path in sorted((data / "sts").rglob("*.tsv")):
        for row in read_rows(path):
            found.update((fingerprint(row["sentence1"]), fingerprint(row["sentence2"])))
    for path in sorted((data / "ir").rglob("queries*.jsonl")):
        found.update(fingerprint(row["text"]) for row in read_rows(path))
    return found


def _usable(text: str, shortest: int, longest: int) -> bool:
    if not shortest <= len(text) <= longest or "formula_" in text or "<unk>" in text:
        return False
    return sum(map(str.isalpha, text)) > 0.6 * len(text)


def collect(
    data: Path, sources: Iterable[Source], scale: float, seed: int
) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Draw the training mix: `(sentences, paragraphs, counts by path)`, shuffled, each text once.

    `scale` multiplies how many texts each source gives. Texts of the held-out sets are left out.
    """
    rng = random.Random(seed)
    seen = held_out(data)
    sentences: list[str] = []
    paragraphs: list[str] = []
    counts: dict[str, tuple[int, int]] = {}
    for source in sources:
        drawn: list[list[str]] = []
        for take, share, shortest, longest in (
            (source.sentences, source.share_s, 8, 320),
            (source.paragraphs, source.share_p, 160, 1600),
        ):
            pool: list[str] = []
            if share != 0:
                for row in read_rows(data / source.path):
                    for text in take(row):
                        text = " ".join(text.split())
                        if _usable(text, shortest, longest):
                            pool.append(text)
            rng.shuffle(pool)
            limit = len(pool) if share is None else share
            kept: list[str] = []
            for text in pool:
                if len(kept) >= int(limit * scale):
                    break
                mark = fingerprint(text)
                if mark not in seen:
                    seen.add(mark)
                    kept.append(text)
            drawn.append(kept)
        sentences += drawn[0]
        paragraphs += drawn[1]
        counts[source.path] = (len(drawn[0]), len(drawn[1]))
    rng.shuffle(sentences)
    rng.shuffle(paragraphs)
    return sentences, paragraphs, counts
