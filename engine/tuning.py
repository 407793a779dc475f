"""An approximate index tuned to a recall that is measured: which settings are fastest, and what recall they really have.

Queries are split in two. On one half the settings are chosen, the other half certifies them: a promise holds if the lower
95 % bound of the mean recall@10, from a bootstrap over queries (Efron, 1979), reaches it. Where settings fail and others are looked at,
the 5 % are shared out among the looks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from embell.engine.snapshot import MEASURED_AT as K
from embell.engine.snapshot import SHARE
from embell.indexers.exact import ExactIndex
from embell.indexers.faiss_index import Progress, Settings
from embell.indexers.vector_index import Candidates
from embell.indexers.workers import in_shares

Array = np.ndarray[Any, Any]

QUERIES = 2000
"""Rows that stand in for queries where none are given."""
_LEFT_OUT = 2
"""Rows left out of the answers of a row that stands in: itself, and the nearest other. A row has relatives, such as the next sentence, that are
easily found; a query has none."""
STOOD_IN, GIVEN = "rows of the collection", "queries"
"""What an index was tuned on."""
_FEWEST = 20
"""Queries without which a measured recall means nothing."""
_DEPTHS = (2, 4, 6, 8, 12, 16)
"""Candidates that are scored more finely, for each hit that is asked for."""
_SAMPLES = 2000
_DOUBT = 0.05
"""Probability of a promise that does not hold."""
_TIMED = 3
_CONTENDERS, _ROUNDS = 8, 5
_SLOWER = 3
"""Settings that reach the target, but more slowly than others, after which no more are tried."""


@dataclass(frozen=True)
class Point:
    """Settings with their recall@10 over the queries that they were chosen on, and queries a second in batches, at their fastest."""

    settings: Settings
    depth: int
    recall: float
    qps: float


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and what it was certified to be.

    `recall` is the mean recall@10 over queries that took no part in the choice; the true mean is larger than `low` with a probability of
    95 % at least, and smaller than `high` likewise. `of` says what the queries were.
    """

    index: str
    settings: Settings
    depth: int
    target: float
    recall: float
    low: float
    high: float
    of: str
    qps: float
    bytes_per_vector: float


def nearest(
    rows: ExactIndex, candidates: Candidates, queries: Array, k: int, settings: Settings, depth: float
) -> tuple[Array, Array, Array]:
    """The best `k` of the candidates of an index over the first of these rows, scored exactly; `depth` as in `Candidates.positions`.

    Returns `(queries, scores, positions)`, by query and best first.
    """
    queries = np.ascontiguousarray(queries, np.float32)

    def of_share(numbers: Array) -> tuple[Array, Array, Array]:
        some = queries[numbers]
        found = candidates.positions(some, k, depth, settings)
        asked, place = np.nonzero(found >= 0)
        best, scores, positions = rows.best_of(some, k, asked, found[asked, place])
        return numbers[best], scores, positions

    shares = in_shares(of_share, np.arange(len(queries)), SHARE)
    best, scores, positions = (np.concatenate(part) for part in zip(*shares, strict=True))
    return best, scores, positions


def tune(
    rows: ExactIndex,
    candidates: Candidates,
    name: str,
    target: float,
    queries: Array | None,
    progress: Progress | None = None,
) -> tuple[Tuned | None, list[Point]]:
    """The fastest settings whose recall@10 is certified to be `target`, and the curve that they were chosen from.

    `candidates`, called `name`, holds the rows of `rows`. None if no settings reach the target. `queries` are unit vectors
    `(q, dim)`; without them rows stand in.
    """
    own = np.empty(0, np.int64)
    if queries is None:
        own = np.random.default_rng(len(rows)).permutation(len(rows))[:QUERIES]
        queries = rows.vectors(own)
    spare = _LEFT_OUT if len(own) else 0
    _, truth = rows.search(queries, K + spare)
    places = np.searchsorted(rows.keys, truth)
    places[truth < 0] = -1
    if len(own):  # equal rows may come before a row itself
        others = [row[row != self] for row, self in zip(places, own, strict=True)]
        left_out = [{self, *row[: spare - 1].tolist()} for row, self in zip(others, own.tolist(), strict=True)]
        answers = [row[spare - 1 :] for row in others]
    else:
        left_out, answers = [set()] * len(places), list(places)
    best = [set(row[row >= 0][:K].tolist()) for row in answers]

    def recalls(chosen: Array, settings: Settings, depth: int, times: int) -> tuple[Array, list[float]]:
        """Recall of each chosen query, and how many seconds they took, time after time."""
        ask = queries[chosen]
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            # As many candidates as a query will have that is not among the rows, and those that are left out.
            asked, _, positions = nearest(rows, candidates, ask, K + spare, settings, (depth * K + spare) / (K + spare))
            seconds.append(time.perf_counter() - began)
        ends = np.searchsorted(asked, np.arange(1, len(chosen)))
        hits = [
            len(best[query] & set([at for at in found.tolist() if at not in left_out[query]][:K])) / max(1, len(best[query]))
            for query, found in zip(chosen.tolist(), np.split(positions, ends), strict=True)
        ]
        return np.array(hits), seconds

    halves = np.arange(0, len(queries), 2), np.arange(1, len(queries), 2)
    points = []
    choices = candidates.choices()
    fastest, slower = 0.0, 0
    for number, settings in enumerate(choices):
        if progress is not None:
            progress("trying settings", number / len(choices))
        speeds = []
        for depth in reversed(_DEPTHS):
            each, seconds = recalls(halves[0], settings, depth, 1)
            if enough := (low := bounds(each)[0]) >= target:
                # Other work on the machine only slows down: the fastest time says most of the settings.
                seconds += recalls(halves[0], settings, depth, _TIMED - 1)[1]
                speeds.append(len(each) / min(seconds))
            points.append((Point(settings, depth, float(each.mean()), len(each) / min(seconds)), low))
            if not enough:  # with fewer candidates it would be lower still
                break
        slower += bool(speeds) and max(speeds) < fastest
        fastest = max([fastest, *speeds])
        if slower == _SLOWER:  # those that look further are slower still
            break
    # Noise favours one or another: those that seem fastest are timed again, in turns.
    reaching = sorted((point for point, low in points if low >= target), key=lambda point: -point.qps)
    again: dict[int, list[float]] = {number: [] for number in range(min(_CONTENDERS, len(reaching)))}
    for _ in range(_ROUNDS):
        for number, taken in again.items():
            taken += recalls(halves[0], reaching[number].settings, reaching[number].depth, 1)[1]
    first = sorted(again, key=lambda number: min(again[number]))
    certified = None
    for look, point in enumerate([*(reaching[number] for number in first), *reaching[len(first) :]], 1):
        each, seconds = recalls(halves[1], point.settings, point.depth, _TIMED)
        low, high = bounds(each, _DOUBT * 0.5**look)
        if low >= target:
            qps = len(each) / float(np.median(seconds))
            certified = Tuned(
                name, point.settings, point.depth, target, float(each.mean()), low, high,
                STOOD_IN if len(own) else GIVEN, qps, candidates.bytes / max(1, len(rows)),
            )  # fmt: skip
            break
    return certified, [point for point, _ in points]


def fewest(target: float) -> int:
    """The queries without which a recall cannot be certified, even if everything is found."""
    return max(_FEWEST, 2 * math.ceil(math.log(_DOUBT / 2) / math.log(target)))


def exact_qps(rows: ExactIndex, queries: Array | None) -> float:
    """Queries a second that exact search answers, in batches."""
    ask = rows.vectors(np.arange(min(len(rows), QUERIES // 2))) if queries is None else queries[: QUERIES // 2]
    seconds = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        rows.search(ask, K)
        seconds.append(time.perf_counter() - began)
    return len(ask) / float(np.median(seconds))


def bounds(values: Array, doubt: float = _DOUBT) -> tuple[float, float]:
    """What the mean of recalls is larger and smaller than, each with a probability of 1 - `doubt`: quantiles of the mean of resampled values.

    Resampling knows nothing of what the sample has not met, so the lower bound is not above `at_most`.
    """
    means = np.concatenate(list(_resampled(values)))
    low, high = np.quantile(means, (doubt, 1 - doubt))
    return min(float(low), at_most(len(values), doubt)), float(high)


def at_most(count: int, doubt: float = _DOUBT) -> float:
    """The largest recall that so many queries can certify, by finding everything.

    If a share p of all queries finds nothing, none of them is among `count` with a probability of (1 - p)^count: the "rule of three"
    (Hanley and Lippman-Hand, 1983).
    """
    return float(doubt ** (1 / count))


def _resampled(values: Array) -> Iterator[Array]:
    rng = np.random.default_rng(0)
    for _ in range(0, _SAMPLES, 100):
        yield values[rng.integers(0, len(values), (100, len(values)))].mean(axis=1)
