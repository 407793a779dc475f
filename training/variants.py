"""New sentences out of old ones: a teacher can judge any sentence, so a student can learn from sentences that nobody wrote.

What changes the meaning of a sentence a little, or wholly, while its words stay nearly the same, is what similarity is hardest to tell by:
another subject or predicate, a word exchanged for one that others use in its place, another number, a phrase left out, a negation.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

_CLAUSE = re.compile(r"^(.{3,}?) (is|are) (.{5,})$")
_WORD = re.compile(r"[a-z]+")
_ARTICLE = re.compile(r"^(a|an|the|some|two|three) ", re.IGNORECASE)
_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "his",
        "her",
        "their",
        "its",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "has",
        "have",
        "had",
        "do",
        "does",
        "and",
        "or",
        "but",
        "of",
        "in",
        "on",
        "at",
        "by",
        "for",
        "with",
        "to",
        "from",
        "into",
        "out",
        "up",
        "down",
        "over",
        "off",
        "near",
        "as",
        "while",
        "who",
        "which",
        "there",
        "it",
        "he",
        "she",
        "they",
        "not",
        "no",
    ]
)
_LEFT_OUT = frozenset(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "was",
        "were",
        "been",
        "be",
        "being",
        "has",
        "have",
        "had",
        "its",
        "his",
        "her",
        "their",
        "also",
        "that",
        "there",
    ]
)
"""Words that headlines do without."""
_CLAUSE_END = re.compile(r"[,;:()\[\]–—\"]+| - |\b(?:which|who|whose|where|while|because|although|when)\b")
_NUMBER = re.compile(r"\d+")


def captions_like(captions: Sequence[str], rng: random.Random) -> Iterator[list[str]]:
    """Up to four variants of each caption, in groups."""
    subjects: dict[str, list[str]] = defaultdict(list)
    predicates: dict[str, list[str]] = defaultdict(list)
    for caption in captions:
        if clause := _CLAUSE.match(caption):
            subjects[clause[2]].append(clause[1])
            predicates[clause[2]].append(clause[3])
    exchanged = exchangeable(captions)
    order = list(captions)
    rng.shuffle(order)
    for caption in order:
        found = [*_exchanges(caption, exchanged, rng), *_shortened(caption, rng)]
        if clause := _CLAUSE.match(caption):
            subject, verb, predicate = clause.groups()
            found.append(f"{subject} {verb} {rng.choice(predicates[verb])}")
            found.append(f"{rng.choice(subjects[verb])} {verb} {predicate}")
            chance = rng.random()
            if chance < 0.3:
                found.append(f"{subject} {verb} not {predicate}")
            elif chance < 0.5:
                found.append(f"There {verb} no {_ARTICLE.sub('', subject)} {predicate}")
            elif chance < 0.6:
                found.append(f"Nobody is {predicate}")
        if found:
            yield rng.sample(found, min(4, len(found)))


def edited(texts: Sequence[str], most: int, exchanged: dict[str, list[str]], others: Sequence[str]) -> list[str]:
    """At most `most` edits of sentences of up to 240 characters among `texts`; the same for the same arguments.

    An edit exchanges words or numbers, leaves words out, writes the sentence as a headline, or puts one of `others` behind
    a short one. `exchanged` is what `exchangeable` found.
    """
    rng = random.Random(texts[0])
    found: list[str] = []
    for text in texts:
        if len(text) > 240:
            continue
        found += [*_exchanges(text, exchanged, rng), *_shortened(text, rng)]
        if title := headline(text, rng):
            found += [title, *list(_exchanges(title, exchanged, rng))[:1]]
        if _NUMBER.search(text):
            found.append(_NUMBER.sub(lambda number: _another(number[0], rng), text))
        if len(text) < 60:
            found.append(f"{text} {rng.choice(others)}"[:240])
    return rng.sample(found, min(most, len(found)))


def headline(text: str, rng: random.Random) -> str | None:
    """One clause of a sentence, of five to eleven words, without articles and auxiliaries; None where no clause is long enough."""
    clauses = [[word for word in clause.split() if word.lower() not in _LEFT_OUT] for clause in _CLAUSE_END.split(text)]
    long = [words for words in clauses if len(words) >= 5]
    return " ".join(rng.choice(long)[: rng.randint(6, 11)]).rstrip(".!?") if long else None


def _another(number: str, rng: random.Random) -> str:
    """A number of as many digits."""
    return str(rng.randrange(10 ** (len(number) - 1) if len(number) > 1 else 0, 10 ** len(number)))


def exchangeable(sentences: Sequence[str]) -> dict[str, list[str]]:
    """For each word, those that stand between the same two neighbours somewhere, most often first."""
    between: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sentence in sentences:
        words = ["^", *_WORD.findall(sentence.lower()), "$"]
        for before, word, after in zip(words, words[1:], words[2:], strict=False):
            if word not in _FUNCTION_WORDS:
                between[before, after][word] += 1
    shared: dict[str, Counter[str]] = defaultdict(Counter)
    for places in between.values():
        common = [word for word, _ in places.most_common(30)]
        for word in common:
            for other in common:
                if word != other:
                    shared[word][other] += 1
    return {word: [other for other, _ in others.most_common(20)] for word, others in shared.items()}


def _exchanges(caption: str, exchanged: dict[str, list[str]], rng: random.Random) -> Iterator[str]:
    words = caption.split()
    places = [at for at, word in enumerate(words) if word.strip(".,").lower() in exchanged]
    for _ in range(2 if places else 0):
        changed = list(words)
        for at in rng.sample(places, min(len(places), rng.choice((1, 1, 2)))):
            end = "." if words[at].endswith(".") else ""
            changed[at] = rng.choice(exchanged[words[at].strip(".,").lower()]) + end
        yield " ".join(changed)


def _shortened(caption: str, rng: random.Random) -> Iterator[str]:
    words = caption.split()
    if len(words) > 5:
        begin = rng.randrange(1, len(words) - 2)
        yield " ".join(words[:begin] + words[begin + rng.choice((1, 2, 3)) :])
