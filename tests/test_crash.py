"""What survives a kill, and what two writers at once leave behind: real processes, real signals."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Ran, write_jsonl
from embell import Collection
from embell.indexers.codes import renormalise
from forked import Started

Run = Callable[..., Ran]
ROWS = 200


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = [
        "river",
        "bridge",
        "night",
        "search",
        "engine",
        "vector",
        "meaning",
        "sentence",
        "bank",
        "rate",
        "orbit",
        "galaxy",
        "soup",
        "bread",
        "kitten",
        "wool",
    ]
    rows = [{"id": f"r{n}", "text": f"{n} " + " ".join(rng.choices(words, k=rng.randint(3, 40))), "n": n} for n in range(ROWS)]
    return write_jsonl(tmp_path_factory.mktemp("source") / "rows.jsonl", rows)


def start(source: Path, target: Path) -> Started:
    return Started(["index", str(source), "--to", str(target), "--commit-rows", "20", "--json"])


def content(target: Path) -> dict[str, dict[str, Any]]:
    rows = list(Collection.open(target).store.scan(["id", "text", "n", "vector"]))
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The equality of collections: ids, texts and metadata the same, vectors to cosine 0.9999."""
    assert set(one) == set(other)
    for name, row in one.items():
        assert (row["text"], row["n"]) == (other[name]["text"], other[name]["n"])
        a, b = (renormalise(np.array([r["vector"]], np.float16))[0] for r in (row, other[name]))
        assert float(a @ b) >= 0.9999


def rows_committed(target: Path) -> int:
    manifest = target / "manifest.json"
    return int(json.loads(manifest.read_text())["rows"]) if manifest.exists() else 0


def test_killed_at_random_moments_and_run_again_it_is_as_if_nothing_happened(source: Path, tmp_path: Path) -> None:
    Started(["--version"]).finish()  # whatever starts only once should not count
    began = time.monotonic()
    undisturbed = start(source, tmp_path / "calm.embell")
    _, out, _ = undisturbed.finish()
    length = time.monotonic() - began
    assert json.loads(out)["encoded"] == ROWS

    rng = random.Random(os.getpid())
    target = tmp_path / "killed.embell"
    for _ in range(6):
        process = start(source, target)
        time.sleep(rng.uniform(0.1, 1.0) * length)
        process.kill()
        process.finish()
    _, out, err = start(source, target).finish()
    report = json.loads(out)
    assert report["documents"] == ROWS, err
    assert report["encoded"] + report["unchanged"] == ROWS
    assert report["rows"] == ROWS
    assert_equal(content(tmp_path / "calm.embell"), content(target))
    questions = ["a bridge over the river", "bread and soup"]
    calm = Collection.open(tmp_path / "calm.embell").search(questions, 5)
    assert [[hit.id for hit in hits] for hits in Collection.open(target).search(questions, 5)] == [
        [hit.id for hit in hits] for hits in calm
    ]


def test_after_a_kill_past_the_first_commit_less_is_left_to_encode(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "c.embell"
    process = start(source, target)
    while process.poll() is None and rows_committed(target) == 0:
        time.sleep(0.005)
    process.kill()
    process.finish()
    committed = len(Collection.open(target))
    assert committed > 0
    _, out, _ = start(source, target).finish()
    assert json.loads(out)["encoded"] == ROWS - committed


def test_two_writers_at_once_leave_each_id_once(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "both.embell"
    processes = [start(source, target) for _ in range(2)]
    reports = []
    for process in processes:
        status, out, err = process.finish()
        assert status == 0, err
        reports.append(json.loads(out))
    assert sorted(report["encoded"] for report in reports) == [0, ROWS]
    assert len(content(target)) == ROWS
