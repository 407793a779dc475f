"""Near-duplicate decisions on labelled data: embell beside semhash and MinHash, precision, recall and F1 of pairs.

    python benchmarks/labelled_duplicates.py --data DATA/dup [--sets mrpc citations] [--final]

Thresholds are tuned for each set on its train part, in steps of 0.01, and reported on its test part. semhash has the vectors of
the same model; its rule for a pair is a cosine at or above the threshold, and where a corpus is given, it is semhash itself that
finds the groups. MinHash is rensa's estimate of the Jaccard similarity, of 128 permutations, over runs of words; how many in a
run is tuned too. The defaults are one pair of numbers for all sets.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from duplicate_sets import PRIMARY, LabelledCorpus, LabelledPairs, LabelledSet, load
from scipy.sparse import csr_array

from embell.engine import Encoder
from embell.engine.normalise import normalise

Array = np.ndarray[Any, Any]

STEPS = 100
COSINE, CONTAINMENT = 0.70, 0.57
"""The defaults: duplicates reach both. They maximise the mean F1 of the train parts of the primary sets."""
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


def embell_scores(pairs: Pairs, vectors: Array) -> tuple[Array, Array]:
    """Of each pair the cosine, and the containment of the words: those in both texts, over those of the text with fewer."""
    return cosines(pairs, vectors), containments(pairs)


def cosines(pairs: Pairs, vectors: Array) -> Array:
    found = [
        np.einsum("ij,ij->i", vectors[pairs.first[begin : begin + 50_000]], vectors[pairs.second[begin : begin + 50_000]])
        for begin in range(0, len(pairs.first), 50_000)
    ]
    return np.concatenate(found)


def containments(pairs: Pairs) -> Array:
    words: dict[str, int] = {}
    sets = [{words.setdefault(word, len(words)) for word in re.findall(r"\w+", normalise(text))} for text in pairs.texts]
    sizes = np.array([len(one) for one in sets])
    columns = np.array([word for one in sets for word in one])
    table = csr_array(
        (np.ones(len(columns), np.float32), columns, np.r_[0, np.cumsum(sizes)]), shape=(len(sets), max(1, len(words)))
    )
    common = [
        (table[pairs.first[begin : begin + 10_000]] * table[pairs.second[begin : begin + 10_000]]).sum(1)
        for begin in range(0, len(pairs.first), 10_000)
    ]
    found: Array = np.concatenate(common) / np.maximum(np.minimum(sizes[pairs.first], sizes[pairs.second]), 1)
    return found


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


def reaching(labels: Array, *scores: Array) -> tuple[Array, Array]:
    """For each combination of thresholds the true and the false pairs that reach all of them."""
    shape = (STEPS + 1,) * len(scores)
    cells = np.ravel_multi_index([step(score) for score in scores], shape)
    counts = []
    for of in (labels, ~labels):
        count = np.bincount(cells[of], minlength=int(np.prod(shape))).reshape(shape)
        for axis in range(len(shape)):
            count = np.flip(np.cumsum(np.flip(count, axis), axis), axis)
        counts.append(count)
    return counts[0], counts[1]


def tune(labels: Array, *scores: Array) -> tuple[float, tuple[int, ...]]:
    """The largest F1, and the thresholds for it, in steps: of equals, those nearest the middle."""
    true, false = reaching(labels, *scores)
    f1 = 2 * true / np.maximum(true + false + labels.sum(), 1)
    best = np.argwhere(f1 >= f1.max() - 1e-9)
    middle = best[np.abs(best - np.median(best, axis=0)).sum(1).argmin()]
    return float(f1.max()), tuple(int(value) for value in middle)


def reached(thresholds: Sequence[int], *scores: Array) -> Array:
    """The pairs that reach all thresholds."""
    met: Array = np.logical_and.reduce([step(score) >= limit for score, limit in zip(scores, thresholds, strict=True)])
    return met


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


def measured(one: LabelledSet, encoder: Encoder) -> tuple[list[tuple[float, float, float]], str]:
    """P, R and F1 of embell, semhash and MinHash, tuned, and of embell's defaults; and what was tuned, in words."""
    train, test = Pairs.of(one.train), Pairs.of(one.test)
    known, vectors = (encoder.encode(part.texts, "document") for part in (train, test))
    ours = embell_scores(test, vectors)
    _, limits = tune(train.labels, *embell_scores(train, known))
    _, (cosine,) = tune(train.labels, cosines(train, known))
    corpus = isinstance(one.test, LabelledCorpus)
    theirs = semhash_groups(test, vectors, cosine / STEPS) if corpus else reached([cosine], ours[0])
    tuned = {run: tune(train.labels, minhash_scores(train, run)) for run in RUNS}
    run = max(RUNS, key=lambda words: tuned[words][0])
    limit = tuned[run][1]
    chosen = " and ".join(f"{value / STEPS:.2f}" for value in limits)
    said = f"{chosen} / {cosine / STEPS:.2f} / {limit[0] / STEPS:.2f} of {run}-word runs"
    defaults = [round(value * STEPS) for value in (COSINE, CONTAINMENT)]
    answers = [reached(limits, *ours), theirs, reached(limit, minhash_scores(test, run)), reached(defaults, *ours)]
    return [figures(answer, test.labels) for answer in answers], said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--final", action="store_true", help="report on what was held back as a test")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    encoder = Encoder.load(threads=options.threads)
    print("P / R / F1 of pairs; thresholds: cosine and containment / semhash / MinHash\n")
    print("| set | embell, tuned | semhash, tuned | MinHash, tuned | embell, defaults | thresholds |\n| --- |" + " --- |" * 5)
    rows: dict[str, list[tuple[float, float, float]]] = {}

    def line(name: str, cells: Any, said: str = "") -> None:
        print(
            f"| {name} | " + " | ".join(" / ".join(f"{value:.1f}" for value in cell) for cell in cells) + f" | {said} |",
            flush=True,
        )

    for one in load(options.data, options.sets, options.final):
        rows[one.name], said = measured(one, encoder)
        line(one.name, rows[one.name], said)
    for name, of in (("mean of the primary sets", [key for key in rows if key in PRIMARY]), ("mean of all", list(rows))):
        if of:
            line(f"**{name}**", np.mean([rows[key] for key in of], axis=0))


if __name__ == "__main__":
    main()
