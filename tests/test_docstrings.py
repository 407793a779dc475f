"""The demo's corpus: what the standard library says about itself, without importing it."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from embell.document import Document
from embell.engine import docstrings
from embell.engine.docstrings import SHORTEST, standard_library


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(standard_library())


@pytest.fixture(scope="module")
def by_id(documents: list[Document]) -> dict[str, Document]:
    return {document.id: document for document in documents}


def test_ids_are_unique_and_sorted(documents: list[Document]) -> None:
    ids = [document.id for document in documents]
    assert ids == sorted(set(ids))
    assert 5_000 <= len(ids) <= 12_000


def test_reading_twice_gives_the_same(by_id: dict[str, Document], monkeypatch: pytest.MonkeyPatch) -> None:
    """With few of the modules that are written in Python, for the sake of time, and all others."""
    few = {name: path for name, path in docstrings.python_sources().items() if name.split(".")[0] in ("csv", "heapq", "json")}
    monkeypatch.setattr(docstrings, "python_sources", lambda: few)
    again = list(standard_library())
    assert again == list(standard_library())
    read = {document.id: document for document in again}
    assert {"csv.reader", "heapq.heappush", "json.dumps", "math.sqrt", "builtins.str.split"} <= read.keys()
    for name, document in read.items():
        if name.split(".")[0] in ("csv", "heapq", "json", "math", "builtins", "itertools"):
            assert document == by_id[name]


@pytest.mark.parametrize(
    ("name", "kind", "module"),
    [
        ("csv", "module", "csv"),  # Python source
        ("textwrap.dedent", "function", "textwrap"),
        ("json.encoder.JSONEncoder", "class", "json.encoder"),
        ("json.encoder.JSONEncoder.iterencode", "method", "json.encoder"),
        ("csv.reader", "function", "csv"),  # C, re-exported from _csv by name
        ("heapq.heappush", "function", "heapq"),  # the same by star
        ("datetime.datetime", "class", "datetime"),
        ("math.sqrt", "function", "math"),  # the public module itself is C
        ("itertools.chain", "class", "itertools"),
        ("itertools.chain.from_iterable", "method", "itertools"),
        ("builtins.str.split", "method", "builtins"),
        ("builtins.sorted", "function", "builtins"),
    ],
)
def test_names_of_every_origin(by_id: dict[str, Document], name: str, kind: str, module: str) -> None:
    assert by_id[name].metadata == {"kind": kind, "module": module}
    assert by_id[name].text.startswith(f"{name}: ")


def test_signatures_are_cut_off(by_id: dict[str, Document]) -> None:
    assert by_id["math.sqrt"].text.splitlines()[0] == "math.sqrt: Return the square root of x."
    assert not [name for name, document in by_id.items() if "\n--\n\n" in document.text]


def test_nothing_private_short_or_inherited(documents: list[Document]) -> None:
    for document in documents:
        assert not any(part.startswith("_") for part in document.id.split(".")), document.id
        said = document.text.removeprefix(f"{document.id}: ")
        assert len(said) >= SHORTEST, document
        assert not said.startswith(("Return repr(self)", "Initialize self")), document


def test_a_text_is_short_and_says_what_its_module_is_for(by_id: dict[str, Document]) -> None:
    summary = by_id["csv"].text.splitlines()[0]
    assert by_id["csv.reader"].text.endswith(f"\n({summary})")
    for document in by_id.values():
        assert len(document.text) <= 400 + 2 + len(by_id.get(str(document.metadata["module"]), document).text), document.id


def test_left_out(documents: list[Document]) -> None:
    modules = {document.metadata["module"] for document in documents}
    parts = {part for module in modules for part in module.split(".")}
    assert parts.isdisjoint({"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages"})


def test_no_side_effects() -> None:
    program = (
        "import json, sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "from embell.engine.docstrings import standard_library\n"
        "count = sum(1 for _ in standard_library())\n"
        "print(json.dumps([count, sorted(sys.modules)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, loaded = json.loads(done.stdout)  # and not a word more on stdout
    assert done.stderr == ""
    assert count > 5_000
    assert {"antigravity", "this", "tkinter", "idlelib", "turtle", "torch"}.isdisjoint(loaded)


def test_without_python_sources_the_c_modules_speak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docstrings, "python_sources", dict)
    ids = {document.id for document in standard_library()}
    assert "builtins.sorted" in ids
    assert "csv.reader" not in ids  # nothing says that `csv` re-exports it

    monkeypatch.undo()
    real = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else real(name))
    assert "builtins.sorted" in {document.id for document in standard_library()}


def test_a_source_that_does_not_parse_counts_as_empty(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_bytes(b"\xff\xfe def (")
    assert docstrings.parse(broken).body == []
    assert docstrings.parse(tmp_path / "missing.py").body == []
