"""Shared by the tests: the embedded encoder, and the command line as a real process."""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Workers side by side, and the processes that they start, would fight for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "RAYON"):  # RAYON: tokenizers
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from forked import Started

collect_ignore = ["test_mteb.py"] if sys.version_info < (3, 11) else []  # mteb is not to be had there

settings.register_profile(
    "embell", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
settings.load_profile("embell")


def pytest_collection_finish() -> None:
    """What the libraries made on import stays: collections of garbage, of which each training run asks for one, pass it over."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    def fails(self, status: int, *parts: str) -> None:
        """Asserts one line on stderr that says all of this, nothing on stdout, and the status."""
        assert self.status == status, self
        assert self.out == "", self
        assert len(self.err.splitlines()) == 1, self
        assert "Traceback" not in self.err
        for part in parts:
            assert part in self.err, (part, self.err)


@pytest.fixture(scope="session")
def embell() -> Callable[..., Ran]:
    """Runs `embell ARGS` in a process of its own."""

    def run(*args: str | Path, input: str = "", cwd: Path | None = None, **env: str) -> Ran:
        return Ran(*Started([str(arg) for arg in args], input, cwd, **env).finish())

    return run


@pytest.fixture
def inside(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs `embell ARGS` in this process, which is quicker: for what does not depend on how it starts."""
    from embell.cli.main import main

    def run(*args: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["embell", *map(str, args)])
        status: Any = 0
        capfd.readouterr()
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
        out, err = capfd.readouterr()
        return Ran(status, out, err)

    return run


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training runs draw none: they take longer than the small runs of the tests."""
    from embell.training import run_directory

    monkeypatch.setattr(run_directory, "draw", lambda metrics, target: None)


@pytest.fixture(scope="session", autouse=True)
def one_classifier() -> Iterator[None]:
    """The language classifier is read once: in a process of a user's that is so anyway, and it takes half a second."""
    from embell.engine import language

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "_classifier", functools.cache(language._classifier))
        yield


@pytest.fixture(scope="session")
def mini() -> Any:
    """The embedded encoder."""
    from embell import Encoder

    return Encoder.load()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TOPICS = {
    "cats": ["The cat sleeps on the warm sofa.", "A kitten chases a ball of wool.", "Cats purr when they are content."],
    "money": ["The bank raised its interest rate.", "Shares fell sharply on Monday.", "Inflation slowed to two percent."],
    "space": [
        "The probe entered orbit around Mars.",
        "A telescope photographed a distant galaxy.",
        "Astronauts repaired the station.",
    ],
    "food": ["Bake the bread for forty minutes.", "The soup needs more salt.", "Fresh basil goes well with tomatoes."],
}
"""Twelve short texts on four topics."""


def topic_rows() -> list[dict[str, Any]]:
    rows = []
    for topic, texts in TOPICS.items():
        for number, text in enumerate(texts):
            rows.append({"id": f"{topic}-{number}", "text": text, "topic": topic, "year": 2000 + len(rows)})
    return rows
