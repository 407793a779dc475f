"""Texts that weights shipped with embell may be trained on, and nothing else, in groups of texts that belong together.

Each source names its file below the data folder, its licence, and which texts of it belong together: a premise and what was said of
it, a paragraph, its title and one of its sentences, a question and its answer. Groups stay together in a batch, so that
a student sees related texts side by side.

A file that is not in `SHIPPABLE` is refused, whatever it holds: shipped weights must come from text
whose licence allows it. Test splits that scores are reported on are not listed, so that they cannot be trained on by mistake.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from embell.errors import CorpusError, UsageError
from embell.training.variants import captions_like, edited, exchangeable

Row = dict[str, Any]
Groups = Iterator[Sequence[str]]


@dataclass(frozen=True)
class Source:
    """A file of training text: where it is, under which licence, and the groups of related texts that it gives.

    `groups` is called with the rows, shuffled, and a random generator. At most `texts` texts are taken, and with each group
    `pieces` pieces of its sentences, as short as questions to a search engine are.
    """

    path: str
    licence: str
    groups: Callable[[list[Row], random.Random], Groups]
    texts: int
    pieces: int = 0


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


_CLAUSE_END = re.compile(
    r"[,;:()\[\].?!\"–—]+|\b(?:and|or|but|that|which|who|whose|when|where|while|because|although|if|as|is|are|was|were|has|have|had|be|been)\b"
)


def pieces_of(texts: Sequence[str], most: int) -> list[str]:
    """Runs of two to eight words between punctuation, conjunctions and common verbs, at most `most` of them; the same for the same texts."""
    found = [" ".join(piece.split()) for text in texts for piece in _CLAUSE_END.split(text)]
    found = sorted({piece for piece in found if 2 <= len(piece.split()) <= 8 and usable(piece, 10, 80)})
    return random.Random(texts[0]).sample(found, min(most, len(found)))


def usable(text: str, shortest: int, longest: int) -> bool:
    """Whether a text has the right length in characters, and is mostly letters."""
    if not shortest <= len(text) <= longest or "formula_" in text or "<unk>" in text:
        return False
    return sum(map(str.isalpha, text)) > 0.6 * len(text)


def _fields(*names: str) -> Callable[[list[Row], random.Random], Groups]:
    def groups(rows: list[Row], rng: random.Random) -> Groups:
        for row in rows:
            yield [row[name] for name in names if row[name]]

    return groups


def _article(row: Row, rng: random.Random) -> Groups:
    """Neighbouring sentences; a paragraph with its title, one of its sentences, and perhaps the next; now and then a long lead."""
    title, text = row["title"], row["text"]
    sentences = [" ".join(sentence.split()) for sentence in split_sentences(text)]
    good = [at for at, sentence in enumerate(sentences) if usable(sentence, 20, 240)]
    if len(good) > 6:
        for at in rng.sample(good[:-3], min(6 if len(text) > 6000 else 2, len(good) - 3)):
            near = [sentence for sentence in sentences[at : at + 3] if usable(sentence, 20, 240)]
            yield [*near, title] if rng.random() < 0.3 else near
    paragraphs = list(split_paragraphs(text))
    if paragraphs and rng.random() < 0.35:
        at = 0 if rng.random() < 0.5 else rng.randrange(len(paragraphs))
        inside = [sentence for sentence in split_sentences(paragraphs[at]) if usable(sentence, 20, 200)]
        # The lead carries the title in front, as documents of title and text do.
        group = [f"{title}. {paragraphs[at]}" if at == 0 else paragraphs[at], *rng.sample(inside, min(1, len(inside))), title]
        yield [*group, paragraphs[at + 1]] if at + 1 < len(paragraphs) and rng.random() < 0.3 else group
    if len(text) > 6000 and rng.random() < 0.12:
        yield [f"{title}. {' '.join(text[:2600].split())}"[: rng.randrange(1400, 2500)]]


def _articles(rows: list[Row], rng: random.Random) -> Groups:
    for row in rows:
        yield from _article(row, rng)


def _premises(rows: list[Row], rng: random.Random) -> Groups:
    said: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        said[row["premise"]].append(row["hypothesis"])
    for premise, hypotheses in said.items():
        yield [premise, *hypotheses]
    captions = [text for premise, hypotheses in said.items() for text in (premise, *hypotheses)]
    yield from captions_like(captions, rng)


def _classes(
    text: str, label: str, only: Callable[[Row], bool] = lambda row: True
) -> Callable[[list[Row], random.Random], Groups]:
    """Four texts of one class at a time."""

    def groups(rows: list[Row], rng: random.Random) -> Groups:
        members: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if only(row):
                members[row[label]].append(row[text])
        for texts in members.values():
            for begin in range(0, len(texts), 4):
                yield texts[begin : begin + 4]

    return groups


def _synsets(rows: list[Row], rng: random.Random) -> Groups:
    """A definition, its words, an example of their use, and now and then the definition of what is above them."""
    by_name = {row["synset"]: row for row in rows}
    for row in rows:
        above = by_name.get((row["hypernyms"] or [""])[0])
        group = [*row["definition"][:1], ", ".join(row["members"][:3]), *map(str, row["examples"][:1])]
        yield [*group, *above["definition"][:1]] if above is not None and rng.random() < 0.3 else group


def _answers(rows: list[Row], rng: random.Random) -> Groups:
    """A question with a sentence of its answer, or with a paragraph of it."""
    for row in rows:
        if rng.random() < 0.35:
            parts: Iterator[str] = split_paragraphs(row["answer"])
        else:
            parts = (sentence for sentence in split_sentences(row["answer"]) if usable(sentence, 20, 240))
        yield [row["question"], *[part for part, _ in zip(parts, range(1), strict=False)]]


def _summaries(rows: list[Row], rng: random.Random) -> Groups:
    for row in rows:
        yield [row["title"], row["abstract"], *row["tldr"][:1]]


def _splits(rows: list[Row], rng: random.Random) -> Groups:
    for row in rows:
        yield [row["complex"], *row["split"].split(" <::::> ")]


_WIKIPEDIA = "CC BY-SA (Wikipedia)"

SHIPPABLE: tuple[Source, ...] = (
    Source("text/enwiki_a.jsonl.xz", _WIKIPEDIA, _articles, 200_000, 3),
    Source("text/enwiki_b.jsonl.xz", _WIKIPEDIA, _articles, 80_000, 3),
    Source("text/openstax_md.jsonl.xz", "CC BY (OpenStax)", _articles, 6_000, 6),
    Source("text/factbook.jsonl", "CC0", _articles, 4_000, 3),
    Source("dict/oewn_synsets.jsonl.xz", "CC BY 4.0 + WordNet licence", _synsets, 55_000),
    Source("dict/wordset.tsv.xz", "CC BY-SA 4.0 + WordNet licence", _fields("definition", "example"), 20_000),
    Source("pairs/snli-dev.tsv.xz", "CC BY-SA 4.0", _premises, 60_000),
    Source("pairs/snli-test.tsv.xz", "CC BY-SA 4.0", _premises, 60_000),
    Source("pairs/wikisplit-tune.tsv.xz", "CC BY-SA 4.0", _splits, 8_000),
    Source("pairs/medquad.jsonl.xz", "CC BY 4.0", _answers, 30_000, 2),
    Source("pairs/scitldr-train.jsonl.xz", "Apache-2.0", _summaries, 6_000, 6),
    Source("pairs/scitldr-dev.jsonl.xz", "Apache-2.0", _summaries, 2_000, 6),
    Source("pairs/pubmedqa_l.jsonl.xz", "MIT", _fields("question", "long_answer", "context"), 3_000, 8),
    Source("pairs/opentriviaqa.tsv.xz", "CC BY-SA 4.0", _fields("question"), 25_000),
    Source("pairs/banking77-train.tsv.xz", "CC BY 4.0", _classes("text", "category"), 10_000),
    Source("pairs/clinc150.tsv.xz", "CC BY 3.0", _classes("text", "intent", lambda row: row["split"].endswith("train")), 15_000),
    Source("multi/xquad/en.corpus.jsonl", "CC BY-SA 4.0", _fields("text"), 240),
    Source("multi/tatoeba-en-mr.tsv.xz", "CC BY 2.0 FR", _fields("en"), 18_000),
    Source("multi/tatoeba-en-hi.tsv", "CC BY 2.0 FR", _fields("en"), 3_000),
    Source("code/django.tsv.xz", "MIT", _fields("annotation", "code"), 9_000),
    Source("code/python_stdlib_api_docs.jsonl.xz", "Apache-2.0", _fields("intent", "snippet"), 15_000),
    Source("code/concode-java-dev.jsonl", "C-UDA", _fields("nl", "code"), 4_000),
    Source("code/cosqa-dev.jsonl", "C-UDA", _fields("query", "code"), 1_200),
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


SHORTEST, LONGEST = 4, 2600
"""Characters of a text that is taken."""


def _unseen(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    for text in (" ".join(text.split()) for text in texts):
        mark = fingerprint(text)
        if SHORTEST <= len(text) <= LONGEST and mark and mark not in seen:
            seen.add(mark)
            yield text


def collect(
    data: Path, sources: Iterable[Source], scale: float, seed: int, seen: set[str] | None = None
) -> tuple[list[list[str]], dict[str, int]]:
    """Draw the training mix: groups of texts in random order, and how many texts each path gave; each text comes once.

    `scale` multiplies how many texts each source gives. Texts of the held-out sets are left out, and those whose fingerprints are in
    `seen`, to which the fingerprints of what is drawn are added.
    """
    seen = held_out(data) if seen is None else seen
    found: list[list[str]] = []
    counts: dict[str, int] = {}
    for source in sources:
        rng = random.Random(f"{seed} {source.path}")
        rows = list(read_rows(data / source.path))
        rng.shuffle(rows)
        counts[source.path] = taken = 0
        for group in source.groups(rows, rng):
            if taken >= int(source.texts * scale):
                break
            kept = list(_unseen(group, seen))
            if kept:
                taken += len(kept)
                found.append(kept + list(_unseen(pieces_of(kept, source.pieces), seen)))
                counts[source.path] += len(found[-1])
    random.Random(seed).shuffle(found)
    return found, counts


_EDITED, _EDITS = 0.25, 2
"""Share of the groups of a whole mix that get edits of their sentences, and how many at most."""
_SAMPLE = 300_000
"""Sentences, at most, that are looked through for words that stand in the same places."""


def whole_mix(data: Path, scale: float, seed: int) -> tuple[list[list[str]], dict[str, int]]:
    """Groups of `collect` with all sources, as many again of what they have left, and more of running text.

    Running text is drawn three times more, other sentences of it each time; every text is new. A quarter of the groups get edits of their
    sentences, "edits" among the counts. The groups of all other sources come twice, "again" among the counts: they are few
    beside an encyclopedia, and of more kinds.
    """
    seen = held_out(data)
    running = [source for source in SHIPPABLE if source.path.startswith("text/")]
    others = [source for source in SHIPPABLE if source not in running]
    found: list[list[str]] = []
    again: list[list[str]] = []
    counts: dict[str, int] = defaultdict(int)
    draws = [(part, 1.0, seed) for _ in range(2) for part in (running, others)]
    for part, times, draw in (*draws, *((running, 1.5, seed + number) for number in (1, 2, 3))):
        groups, drawn = collect(data, part, times * scale, draw, seen)
        found += groups
        if part is others:
            again += groups
        for path, count in drawn.items():
            counts[path] += count
    counts["again"] = sum(map(len, again))
    again = [list(group) for group in again]
    rng = random.Random(f"{seed} edits")
    short = [text for group in found for text in group if len(text) <= 240]
    exchanged = exchangeable(rng.sample(short, min(_SAMPLE, len(short))))
    for group in found:
        if rng.random() < _EDITED:
            made = list(_unseen(edited(group, _EDITS, exchanged, short), seen))
            group += made
            counts["edits"] += len(made)
    found += again
    rng.shuffle(found)
    return found, dict(counts)
