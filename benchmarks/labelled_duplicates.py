"""Near-duplicate decisions on labelled data: embell beside semhash and MinHash, precision, recall and F1 of pairs.

    python benchmarks/labelled_duplicates.py --data DATA/dup [--sets mrpc citations] [--final]

Thresholds are tuned for each set on its train part, in steps of 0.01, and reported on its test part. For embell a pair is one of
duplicates as in `deduplicate`: the same text after normalisation, or a Jaccard of the words that reaches the lexical threshold, or a
cosine and a containment that both reach theirs. semhash has the vectors of the same model; its rule for a pair is a cosine at or
above the threshold, and where a corpus is given, it is semhash itself that finds the groups. MinHash is rensa's estimate of the
Jaccard similarity, of 128 permutations, over runs of words; how many in a run is tuned too. The defaults are one set of numbers for
all sets; how well others would do in their place is said for the train parts.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from duplicate_sets import PRIMARY, LabelledCorpus, LabelledPairs, LabelledSet, load

from embell.engine import Encoder
from embell.engine.normalise import normalise, text_mark
from embell.engine.pair_list import OVERLAP, THRESHOLDS
from embell.engine.shingles import LexicalSets

Array = np.ndarray[Any, Any]

STEPS = 100
LOOSE = {**THRESHOLDS, "semantic": 0.70, OVERLAP: 0.57}
"""Beside the defaults: the cosine and the containment with the largest mean F1 of the train parts of the primary sets."""
BETA = 0.5
"""Of the F-score by which defaults are chosen: a pair that is none costs more than one that is not found."""
COSINES = range(75, 96)
"""Where the default semantic threshold is looked for, in steps."""
RUNS = (1, 2, 3, 5)
PERMUTATIONS = 128


@dataclass(frozen=True)
class Pairs:
    """All pairs of a part as positions of its distinct texts, or of the documents of a corpus, and whether each is a true one."""

    texts: list[str]
    first: Array
    second: Array
    labels: Array

    @classmethod
    def of(cls, part: LabelledPairs | LabelledCorpus) -> Pairs:
        if isinstance(part, LabelledCorpus):
            first, second = np.triu_indices(len(part.texts), 1)
            true = np.zeros((len(part.texts), len(part.texts)), bool)
            true[tuple(np.array(sorted(part.pairs)).T)] = True
            return cls(part.texts, first, second, true[first, second])
        place = {text: position for position, text in enumerate(dict.fromkeys(part.first + part.second))}
        return cls(
            list(place),
            np.array([place[text] for text in part.first]),
            np.array([place[text] for text in part.second]),
            np.array(part.labels),
        )


def embell_scores(pairs: Pairs, vectors: Array) -> tuple[Array, Array, Array]:
    """Of each pair the cosine, and of their words the containment and the Jaccard: 1 if the texts are the same after normalisation."""
    sets = LexicalSets.of(pairs.texts)
    marks: dict[bytes, int] = {}
    text = np.array([marks.setdefault(text_mark(text), number) for number, text in enumerate(pairs.texts)])
    jaccard = np.where(text[pairs.first] == text[pairs.second], 1.0, sets.jaccard(pairs.first, pairs.second))
    return cosines(pairs, vectors), sets.containment(pairs.first, pairs.second), jaccard


def cosines(pairs: Pairs, vectors: Array) -> Array:
    found = [
        np.einsum("ij,ij->i", vectors[pairs.first[begin : begin + 50_000]], vectors[pairs.second[begin : begin + 50_000]])
        for begin in range(0, len(pairs.first), 50_000)
    ]
    return np.concatenate(found)


def minhash_scores(pairs: Pairs, run: int) -> Array:
    """The Jaccard similarity of the runs of so many words, as rensa estimates it."""
    from rensa import RMinHash

    signatures = []
    for text in pairs.texts:
        words = re.findall(r"\w+", normalise(text))
        signature = RMinHash(num_perm=PERMUTATIONS, seed=42)
        signature.update([" ".join(words[begin : begin + run]) for begin in range(max(1, len(words) - run + 1))])
        signatures.append(signature.digest())
    table = np.array(signatures)
    found = [
        (table[pairs.first[begin : begin + 50_000]] == table[pairs.second[begin : begin + 50_000]]).mean(1)
        for begin in range(0, len(pairs.first), 50_000)
    ]
    return np.concatenate(found)


def step(scores: Array) -> Array:
    """How many steps of 0.01 a score reaches."""
    return np.clip(np.floor(scores.astype(np.float64) * STEPS + 1e-3), 0, STEPS).astype(np.int64)


def counted(of: Array, *scores: Array) -> Array:
    """How many of these pairs have each combination of scores, in steps."""
    shape = (STEPS + 1,) * len(scores)
    cells = np.ravel_multi_index([step(score[of]) for score in scores], shape)
    return np.bincount(cells, minlength=int(np.prod(shape))).reshape(shape)


def from_there(counts: Array, *axes: int) -> Array:
    """Of each cell, what is in it and in those after it along these axes."""
    for axis in axes:
        counts = np.flip(np.cumsum(np.flip(counts, axis), axis), axis)
    return counts


def decided(counts: Array) -> Array:
    """What embell's rule finds at each cosine, containment and Jaccard: those that reach the last, or both of the others."""
    near = from_there(counts, 0, 1)
    below = np.cumsum(near, 2) - near
    found: Array = below + from_there(counts.sum((0, 1)), 0)
    return found


def f_scores(true: Array, false: Array, labels: Array, beta: float = 1.0) -> Array:
    """The F-score of each number of pairs found, true ones and false ones."""
    scores: Array = (1 + beta**2) * true / np.maximum(true + false + beta**2 * labels.sum(), 1)
    return scores


def best(f1: Array) -> tuple[int, ...]:
    """The place of the largest score: of equals, the one nearest the middle."""
    places = np.argwhere(f1 >= f1.max() - 1e-9)
    middle = places[np.abs(places - np.median(places, axis=0)).sum(1).argmin()]
    return tuple(int(value) for value in middle)


def tune(labels: Array, score: Array) -> tuple[float, int]:
    """The largest F1 of one score, and the threshold for it, in steps."""
    f1 = f_scores(from_there(counted(labels, score), 0), from_there(counted(~labels, score), 0), labels)
    return float(f1.max()), best(f1)[0]


def tune_rule(labels: Array, scores: Sequence[Array]) -> dict[str, float]:
    """The thresholds of embell's rule with the largest F1."""
    f1 = f_scores(decided(counted(labels, *scores)), decided(counted(~labels, *scores)), labels)
    f1[0], f1[:, :, 0] = -1, -1  # thresholds lie above 0
    return dict(zip(("semantic", OVERLAP, "lexical"), (value / STEPS for value in best(f1)), strict=True))


def reached(threshold: int, scores: Array) -> Array:
    """The pairs whose score reaches the threshold."""
    met: Array = step(scores) >= threshold
    return met


def by_rule(thresholds: Mapping[str, float], scores: Sequence[Array]) -> Array:
    """The pairs that embell finds with these thresholds."""
    cosine, containment, jaccard = (
        reached(round(thresholds[kind] * STEPS), score)
        for kind, score in zip(("semantic", OVERLAP, "lexical"), scores, strict=True)
    )
    found: Array = (cosine & containment) | jaccard
    return found


def figures(found: Array, labels: Array) -> tuple[float, float, float]:
    """Precision, recall and F1 × 100."""
    both = int((found & labels).sum())
    return (
        100 * both / max(1, int(found.sum())),
        100 * both / max(1, int(labels.sum())),
        200 * both / max(1, int(found.sum() + labels.sum())),
    )


def semhash_groups(pairs: Pairs, vectors: Array, threshold: float) -> Array:
    """The pairs of a corpus that semhash puts into one group."""
    from semhash import SemHash

    class Known:
        def encode(self, inputs: Sequence[str] | str, **options: Any) -> Array:
            raise AssertionError("the vectors are given")

    records = [{"number": str(number), "text": text} for number, text in enumerate(pairs.texts)]
    made = SemHash.from_embeddings(vectors, records, model=Known(), columns=["text"])
    group = np.arange(len(records))
    for row in made.self_deduplicate(threshold).filtered:
        group[int(row.record["number"])] = int(row.duplicate_of["number"])
    same: Array = group[pairs.first] == group[pairs.second]
    return same


@dataclass(frozen=True)
class Measured:
    """P, R and F1 of embell, semhash and MinHash, tuned, and of embell's defaults and loose ones; what was tuned, in words.

    `chosen_on` is what the train part says about defaults: the mean of precision, recall, F1 and the F-score that chooses, of each
    cosine and containment, `(101, 101, 4)`.
    """

    answers: list[tuple[float, float, float]]
    said: str
    chosen_on: Array


def measured(one: LabelledSet, encoder: Encoder) -> Measured:
    """Tuned on the train part, reported on the test part."""
    train, test = Pairs.of(one.train), Pairs.of(one.test)
    known, vectors = (encoder.encode(part.texts, "document") for part in (train, test))
    shown, ours = embell_scores(train, known), embell_scores(test, vectors)
    limits = tune_rule(train.labels, shown)
    _, cosine = tune(train.labels, shown[0])
    corpus = isinstance(one.test, LabelledCorpus)
    theirs = semhash_groups(test, vectors, cosine / STEPS) if corpus else reached(cosine, ours[0])
    tuned = {run: tune(train.labels, minhash_scores(train, run)) for run in RUNS}
    run = max(RUNS, key=lambda words: tuned[words][0])
    limit = tuned[run][1]
    said = (
        f"{limits['semantic']:.2f} and {limits[OVERLAP]:.2f}, or {limits['lexical']:.2f} / {cosine / STEPS:.2f} / "
        f"{limit / STEPS:.2f} of {run}-word runs"
    )
    answers = [
        by_rule(limits, ours), theirs, reached(limit, minhash_scores(test, run)), by_rule(THRESHOLDS, ours), by_rule(LOOSE, ours)
    ]  # fmt: skip
    return Measured([figures(answer, test.labels) for answer in answers], said, with_defaults(train.labels, shown))


def with_defaults(labels: Array, scores: Sequence[Array]) -> Array:
    """P, R, F1 and the F-score of the rule with each cosine and containment and the default lexical threshold, × 100."""
    lexical = round(THRESHOLDS["lexical"] * STEPS)
    true, false = (decided(counted(of, *scores))[:, :, lexical] for of in (labels, ~labels))
    both = [true / np.maximum(true + false, 1), true / max(1, int(labels.sum()))]
    return 100 * np.stack([*both, *(f_scores(true, false, labels, beta) for beta in (1.0, BETA))], axis=-1)


def report_defaults(parts: Sequence[Array]) -> None:
    """Which cosine and containment are the best defaults by what the train parts say, and what others would give."""
    mean = np.mean(parts, axis=0)
    allowed = np.where(np.isin(np.arange(STEPS + 1), COSINES)[:, None], mean[:, :, 3], -1)
    chosen = best(allowed)
    near = np.argwhere(allowed >= allowed.max() - 0.5)
    rows = {"best": chosen}
    rows |= {f"best at {cosine / STEPS:.2f}": (cosine, best(mean[cosine, :, 3])[0]) for cosine in COSINES[::5]}
    rows |= {
        name: (round(of["semantic"] * STEPS), round(of[OVERLAP] * STEPS))
        for name, of in (("shipped", THRESHOLDS), ("loose", LOOSE))
    }
    print(f"\nDefaults on the train parts of {len(parts)} primary sets, means; lexical {THRESHOLDS['lexical']:g}\n")
    print(f"| | cosine and containment | P / R / F1 | F{BETA:g} |\n| --- | --- | --- | --- |")
    for name, place in rows.items():
        *others, last = mean[place]
        print(
            f"| {name} | {' and '.join(f'{value / STEPS:.2f}' for value in place)} | "
            f"{' / '.join(f'{value:.1f}' for value in others)} | {last:.2f} |"
        )
    low, high = near.min(0) / STEPS, near.max(0) / STEPS
    print(
        f"\nWithin 0.5 of the best: {len(near)} pairs, cosines {low[0]:.2f} to {high[0]:.2f}, containments {low[1]:.2f} to {high[1]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--final", action="store_true", help="report on what was held back as a test")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    encoder = Encoder.load(threads=options.threads)
    shipped, loose = (f"{of['semantic']:.2f} and {of[OVERLAP]:.2f}, or {of['lexical']:.2f}" for of in (THRESHOLDS, LOOSE))
    print("P / R / F1 of pairs; thresholds: cosine and containment, or Jaccard / semhash / MinHash\n")
    print(
        f"| set | embell, tuned | semhash, tuned | MinHash, tuned | embell, defaults {shipped} | embell, {loose} | thresholds |\n"
        "| --- |" + " --- |" * 6
    )
    rows: dict[str, Measured] = {}

    def line(name: str, cells: Any, said: str = "") -> None:
        print(
            f"| {name} | " + " | ".join(" / ".join(f"{value:.1f}" for value in cell) for cell in cells) + f" | {said} |",
            flush=True,
        )

    for one in load(options.data, options.sets, options.final):
        rows[one.name] = measured(one, encoder)
        line(one.name, rows[one.name].answers, rows[one.name].said)
    for name, of in (("mean of the primary sets", [key for key in rows if key in PRIMARY]), ("mean of all", list(rows))):
        if of:
            line(f"**{name}**", np.mean([rows[key].answers for key in of], axis=0))
    if primary := [row.chosen_on for name, row in rows.items() if name in PRIMARY]:
        report_defaults(primary)


if __name__ == "__main__":
    main()
