"""Training pairs and triplets from tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embell.errors import CorpusError
from embell.training.columns import read_columns

QUERY = ("query", "anchor", "question", "premise", "sentence1", "text1", "text")
POSITIVE = ("positive", "answer", "document", "passage", "entailment", "sentence2", "text2")
NEGATIVE = ("negative", "negatives", "hard_negative", "contradiction", "sentence3")
FIRST = ("sentence1", "text1", "premise", "query")
SECOND = ("sentence2", "text2", "hypothesis", "document")
TEXT = ("text", "texts", "sentence", "content")
SCORE = ("score", "relatedness", "similarity", "label")
_ENTAILED, _CONTRADICTED = ("entailment", "0"), ("contradiction", "2")


@dataclass(frozen=True)
class Triplet:
    """A query, a text that belongs to it, and texts that only seem to."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Pairs of sentences, and how alike they are, in any unit."""

    first: list[str]
    second: list[str]
    scores: list[float]


def read_triplets(
    data: Sequence[Path], query: str | None = None, positive: str | None = None, negative: str | None = None
) -> list[Triplet]:
    """The rows of tables as triplets; a row without a negative is a pair.

    Raises CorpusError for a table without these columns, without rows, or with a row that has no text in them.
    """
    names = {role: name for role, name in (("query", query), ("positive", positive), ("negative", negative)) if name}
    wanted, optional = {"query": QUERY, "positive": POSITIVE}, {"negative": NEGATIVE}
    table = read_columns(data, wanted, optional, lists=("negative",), names=names)
    negatives = table.lists.get("negative") or [()] * len(table)
    found = [Triplet(*row) for row in zip(table.texts["query"], table.texts["positive"], negatives, strict=True)]
    for at, triplet in enumerate(found):
        if triplet.query == triplet.positive:
            raise CorpusError(f"{table.place(at)}: the query and its positive are the same text; leave such rows out")
        if {triplet.query, triplet.positive} & set(triplet.negatives):
            raise CorpusError(f"{table.place(at)}: a negative is the query or the positive itself; leave such rows out")
    return found


def read_nli(data: Sequence[Path]) -> list[Triplet]:
    """Triplets from natural language inference: a premise, what follows from it, and what contradicts it.

    Each entailed hypothesis gives one; it takes the premise's contradictions in turn. A premise without one gives pairs.

    Raises CorpusError for a table without premise, hypothesis and label, or with no entailment in it.
    """
    wanted = {"premise": ("premise", "sentence1"), "hypothesis": ("hypothesis", "sentence2"), "label": ("label", "gold_label")}
    table = read_columns(data, wanted, classes=("label",))
    labels = set(table.texts["label"])
    # Numbers are taken for SNLI's, 0 1 2, only where all three stand: a 0 may as well mean "no paraphrase".
    known = {"entailment", "neutral", "contradiction", "-"} | ({"0", "1", "2", "-1"} if {"0", "1", "2"} <= labels else set())
    if labels - known:
        odd = next(at for at, label in enumerate(table.texts["label"]) if label not in known)
        raise CorpusError(
            f"{table.place(odd)}: the label is {table.texts['label'][odd]!r}; --nli takes entailment, neutral and contradiction, or 0, 1 and 2"
        )
    by_premise: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for premise, hypothesis, label in zip(*(table.texts[role] for role in wanted), strict=True):
        if label in (*_ENTAILED, *_CONTRADICTED) and premise != hypothesis:
            by_premise[premise][label in _CONTRADICTED].append(hypothesis)
    found = []
    for premise, (entailed, contradicted) in by_premise.items():
        for at, hypothesis in enumerate(entailed):
            others = [other for other in contradicted if other != hypothesis]  # annotators differ
            negatives = (others[at % len(others)],) if others else ()
            found.append(Triplet(premise, hypothesis, negatives))
    if not found:
        raise CorpusError(f"{data[0]}: no row is labelled entailment; labels are entailment, neutral and contradiction")
    return found


def read_scored(data: Sequence[Path], first: str | None = None, second: str | None = None, score: str | None = None) -> Scored:
    """Pairs of sentences with a score.

    Raises CorpusError for a table without these columns, with a score that is no number, or with one score throughout.
    """
    names = {role: name for role, name in (("first", first), ("second", second), ("score", score)) if name}
    table = read_columns(data, {"first": FIRST, "second": SECOND, "score": SCORE}, numbers=("score",), names=names)
    scores = table.numbers["score"]
    if len(set(scores)) < 2:
        raise CorpusError(f"{data[0]}: every score is {scores[0]:g}; there is no order to learn")
    return Scored(table.texts["first"], table.texts["second"], scores)


def read_sentence_pairs(data: Sequence[Path], first: str | None = None, second: str | None = None) -> Scored:
    """Pairs of sentences that are still to be scored.

    Raises CorpusError for a table without these columns, or without rows.
    """
    names = {role: name for role, name in (("first", first), ("second", second)) if name}
    table = read_columns(data, {"first": FIRST, "second": SECOND}, names=names)
    return Scored(table.texts["first"], table.texts["second"], [])


def read_groups(data: Sequence[Path], text: str | None = None) -> list[tuple[str, ...]]:
    """The texts of each row: one, or several that belong together where the column holds a list.

    Raises CorpusError for a table without such a column, or without rows.
    """
    names = {"text": text} if text else {}
    return read_columns(data, {"text": TEXT}, lists=("text",), names=names).lists["text"]
