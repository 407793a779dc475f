"""Representatives, a smaller corpus, and outliers: ours beside semhash, pyversity and chance, on the same vectors.

    python benchmarks/overview.py --data DATA

The corpora are Cranfield, MED, CISI and CACM, encoded with embell-mini. A choice of documents is judged by the cosine of every other document
with the nearest chosen one: its mean, the lowest twentieth, and the lowest of all. Outliers are planted: 30 documents of the three other
corpora in one; the average precision of their ranking is the mean of ten draws.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pyversity import diversify
from semhash import SemHash

from embell import Encoder, deduplicate
from embell.engine.closeness import closeness
from embell.engine.overview import representatives
from embell.indexers.exact import ExactIndex

Array = np.ndarray[Any, Any]
CORPORA = ("cranfield", "med", "cisi", "cacm")


def texts_of(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    texts = (f"{row.get('title') or ''} {row.get('text') or ''}".strip() for row in rows)
    return [text for text in dict.fromkeys(texts) if text]


def index_of(vectors: Array) -> ExactIndex:
    index = ExactIndex(vectors.shape[1])
    index.add(np.arange(len(vectors)), vectors.astype(np.float16))
    return index


class Known:
    """A model for semhash where the vectors are given."""

    def encode(self, inputs: Any, **_: Any) -> Array:
        raise NotImplementedError


def semhash_ranking(vectors: Array) -> SemHash:
    return SemHash.from_embeddings(vectors, [str(at) for at in range(len(vectors))], model=Known())


def judged(name: str, vectors: Array, choose: Callable[[], Any]) -> None:
    """Print how well a choice of rows stands for the others."""
    began = time.perf_counter()
    chosen = np.asarray([int(at) for at in choose()])
    seconds = time.perf_counter() - began
    others = np.setdiff1d(np.arange(len(vectors)), chosen)
    near = np.concatenate([(vectors[some] @ vectors[chosen].T).max(axis=1) for some in np.array_split(others, 8)])
    numbers = " | ".join(f"{value:.3f}" for value in (near.mean(), np.quantile(near, 0.05), near.min()))
    print(f"| {name} | {len(chosen):,} | {numbers} | {seconds:.1f} |", flush=True)


def choices(vectors: Array, texts: list[str]) -> None:
    """Tables of representatives and of reduced corpora."""
    rng = np.random.default_rng(0)
    ours, count = index_of(vectors), len(vectors)
    dense = closeness(ours, 100)
    for size in (20, 100):
        print(f"\n| {size} of {count:,} | chosen | mean | lowest 5 % | lowest | s |\n| --- | --- | --- | --- | --- | --- |")
        judged("embell representatives", vectors, lambda n=size: representatives(ours, n)[0])
        judged(
            "semhash, find_representative", vectors, lambda n=size: semhash_ranking(vectors).self_find_representative(n).selected
        )
        for strategy in ("mmr", "msd", "dpp", "ssd"):
            judged(
                f"pyversity {strategy}, of all rows by density",
                vectors,
                lambda n=size, s=strategy: diversify(vectors, dense, n, s, 0.5).indices,
            )
        judged("chance", vectors, lambda n=size: rng.choice(count, n, replace=False))
    for share in (0.1, 0.3, 0.7):
        size = int(share * count)
        print(f"\n| {share:.0%} of {count:,} | kept | mean | lowest 5 % | lowest | s |\n| --- | --- | --- | --- | --- | --- |")
        for keep in ("first", "last"):
            judged(
                f"embell, --reduce-to, --keep {keep}",
                vectors,
                lambda k=keep, n=size: deduplicate(texts, vectors=vectors, kinds=["exact"], keep=k, reduce_to=n).kept_positions,
            )
        judged("chance", vectors, lambda n=size: rng.choice(count, n, replace=False))


def average_precision(scores: Array, planted: Array) -> float:
    """Of the planted rows in the ranking from the lowest score on."""
    hits = planted[np.argsort(scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def outliers(vectors: dict[str, Array]) -> None:
    """Table of planted outliers found."""
    print("\n| outliers in | embell | semhash | one neighbour | ten |\n| --- | --- | --- | --- | --- |")
    for name, inliers in vectors.items():
        found: list[list[float]] = []
        for seed in range(10):
            rng = np.random.default_rng(seed)
            foreign = [other[rng.choice(len(other), 10, replace=False)] for key, other in vectors.items() if key != name]
            rows = np.concatenate([inliers, *foreign])
            planted = np.arange(len(rows)) >= len(inliers)
            index = index_of(rows)
            ranked = semhash_ranking(rows).self_filter_outliers(1.0)
            theirs = np.empty(len(rows))
            theirs[[int(record) for record in ranked.filtered]] = ranked.scores_filtered
            scores = closeness(index, 50), theirs, closeness(index, 1), closeness(index, 10)
            found.append([average_precision(score, planted) for score in scores])
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in np.mean(found, axis=0)) + " |", flush=True)


def main() -> None:
    """Read the options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    encoder = Encoder.load()
    texts = {name: texts_of(data / "ir" / name / "corpus.jsonl") for name in CORPORA}
    vectors = {name: encoder.encode(some) for name, some in texts.items()}
    choices(np.concatenate([*vectors.values()]), [text for some in texts.values() for text in some])
    outliers(vectors)


if __name__ == "__main__":
    main()
