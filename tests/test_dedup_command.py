"""`embell dedup`: kinds, policies, leaks, the report, decisions, and going on after a kill; `embell evaluate duplicates`."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from conftest import Ran
from embell.engine.shingles import LexicalSets
from forked import Started

Run = Callable[..., Ran]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "The cat sleeps on the warm sofa in the sun.", "year": 2001},
    {"id": "b", "text": "the CAT sleeps on the warm  sofa in the sun.", "year": 2005},
    {"id": "c", "text": "The cat sleeps on the warm sofa in sun.", "year": 2003},
    {"id": "d", "text": "Shares fell sharply on Monday.", "year": 1999},
    {"id": "e", "text": "Shares fell sharply on a Monday.", "year": None},
    {"id": "f", "text": "A treaty was signed in Vienna last night.", "year": 2001},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def removed(path: Path) -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: (row["kept_id"], row["kind"]) for row in rows}


def test_kinds_and_thresholds_are_chosen_by_name(inside: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "removed.jsonl"
    for options, expected in (
        (["--kinds", "exact"], {"b": ("a", "exact")}),
        (["--kinds", "exact,lexical", "--lexical", "0.8"], {"b": ("a", "exact"), "c": ("a", "lexical"), "e": ("d", "lexical")}),
        (["--kinds", "contained", "--contained", "1"], {"b": ("a", "exact"), "c": ("a", "contained"), "e": ("d", "contained")}),
        (["--threshold", "0.95"], {"b": ("a", "exact"), "c": ("a", "semantic"), "e": ("d", "semantic")}),
        (["--threshold", "0.95", "--overlap", "1"], {"b": ("a", "exact"), "c": ("a", "semantic"), "e": ("d", "semantic")}),
    ):
        done = inside("dedup", source, *options, "--removed", out)
        assert done.status == 0, done
        assert removed(out) == expected, options
    assert not list(tmp_path.glob("*.unfinished"))


def test_policies_decide_which_is_kept(inside: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.jsonl"
    for keep, expected in (
        ("first", ["a", "d", "f"]), ("last", ["c", "e", "f"]), ("longest", ["b", "e", "f"]), ("shortest", ["c", "d", "f"]),
        ("year:max", ["b", "d", "f"]), ("year:min", ["a", "d", "f"]),
    ):  # fmt: skip
        done = inside("dedup", source, "--threshold", "0.95", "--keep", keep, "--output", out)
        assert done.status == 0, done
        assert ids(out) == expected, keep
    done = inside("dedup", source, "--threshold", "0.95", "--group-by", "year", "--output", out)
    assert done.status == 0, done
    assert ids(out) == ["a", "b", "c", "d", "e", "f"]


def test_rows_are_reduced_to_so_many(inside: Run, source: Path, tmp_path: Path) -> None:
    out, gone, page = tmp_path / "kept.jsonl", tmp_path / "removed.jsonl", tmp_path / "page.html"
    done = inside("dedup", source, "--reduce-to", "2", "--output", out, "--removed", gone, "--report", page, "--json")
    assert done.status == 0, done
    (told,) = done.lines
    rows = [json.loads(line) for line in gone.read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert (told["kept"], told["dropped"], told["reduced"]) == (2, 4, kinds.count("reduced"))
    assert told["reduced"] >= 1
    assert told["reduced_at"] == min(row["score"] for row in rows if row["kind"] == "reduced")
    assert len(ids(out)) == 2
    assert {row["kept_id"] for row in rows} <= set(ids(out))
    assert "reduced" in page.read_text()
    assert "to reduce, at cosine" in inside("dedup", source, "--reduce-to", "2").err
    (told,) = inside("dedup", source, "--reduce-to", "6", "--json").lines
    assert (told["reduced"], told["reduced_at"]) == (0, None)


def test_mistakes_get_one_line(inside: Run, source: Path, tmp_path: Path) -> None:
    inside("dedup", source, "--keep", "best").fails(2, "keep 'best'", "longest")
    inside("dedup", source, "--keep", "colour:max").fails(2, "no document has the field 'colour'")
    inside("dedup", source, "--group-by", "colour").fails(2, "no document has the field 'colour'")
    inside("dedup", source, "--kinds", "semantical").fails(2, "semantical", "lexical")
    inside("dedup", source, "--lexical", "0").fails(2, "lexical threshold")
    inside("dedup", source, "--reduce-to", "0").fails(2, "--reduce-to")
    inside("dedup", source, "--reduce-to", "2", "--against", source).fails(2, "--reduce-to", "--against")
    inside("dedup", source, "--kinds", "exact", "--lexical", "0.5").fails(2, "not among the kinds")
    inside("dedup", source, "--report", "-").fails(2, "--report needs a file")
    inside("dedup", source, "--against", source, "--keep", "last").fails(2, "--against")
    inside("dedup", source, "--against", tmp_path / "no.jsonl").fails(1, "no.jsonl")
    inside("dedup", tmp_path / "no.jsonl", "--output", tmp_path / "kept.jsonl").fails(1, "no.jsonl")
    inside("dedup", source, "--suggest", source, "--output", tmp_path / "x").fails(2, "--suggest writes nothing")
    inside("dedup", source, "--decisions", tmp_path / "no.jsonl").fails(1, "no.jsonl", "cannot be read")
    (tmp_path / "d.jsonl").write_text('{"id_a": "a", "id_b": "b", "duplicate": true}\n{"id_a": "a"}\n')
    inside("dedup", source, "--decisions", tmp_path / "d.jsonl").fails(1, "d.jsonl:2", "id_b")
    (tmp_path / "d.jsonl").write_text('{"id_a": "a", "id_b": "nobody", "duplicate": true}\n')
    inside("dedup", source, "--decisions", tmp_path / "d.jsonl").fails(2, "'nobody'")
    assert sorted(path.name for path in tmp_path.glob("*.unfinished")) == []


def test_fields_weigh_as_they_are_told(inside: Run, tmp_path: Path) -> None:
    """Records that agree in the title only: duplicates where the title weighs most."""
    rows = [
        {"id": "1", "title": "Chocolate cake with cherries", "text": "Sold in Berlin on weekdays."},
        {"id": "2", "title": "Chocolate cake with cherries", "text": "The engine of the locomotive failed."},
        {"id": "3", "title": "Treaty on fishing rights", "text": "Sold in Berlin on weekdays."},
        {"id": "4", "title": "", "text": "Sold in Berlin on weekdays."},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "removed.jsonl"
    for weights, expected in (
        (["title=9", "text=1"], {"2": "1"}), (["title=1", "text=9"], {"3": "1", "4": "1"}), (["text=1"], {"3": "1", "4": "1"}),
    ):  # fmt: skip
        options = [part for weight in weights for part in ("--weight", weight)]
        done = inside("dedup", source, "--threshold", "0.85", *options, "--removed", out)
        assert done.status == 0, done
        assert {name: kept for name, (kept, _) in removed(out).items()} == expected, weights
    inside("dedup", source, "--weight", "title").fails(2, "--weight title", "title=2")
    inside("dedup", source, "--weight", "colour=1").fails(1, "colour")


def test_leaks_are_found_and_each_side_is_left_as_it_is(inside: Run, source: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text('{"id": "t1", "text": "shares FELL sharply on monday."}\n{"id": "t2", "text": "Nothing of the kind."}\n')
    out = tmp_path / "clean.jsonl"
    done = inside("dedup", source, "--against", test, "--threshold", "0.95", "--output", out, "--removed", tmp_path / "r.jsonl")
    assert done.status == 0, done
    assert ids(out) == ["a", "b", "c", "f"]
    assert removed(tmp_path / "r.jsonl") == {"d": ("t1", "exact"), "e": ("t1", "semantic")}


def test_ids_that_both_sides_of_a_leak_have_are_kept_apart(inside: Run, tmp_path: Path) -> None:
    texts = [
        "The cat sleeps on the sofa.",
        "Shares fell sharply on Monday.",
        "A treaty was signed in Vienna.",
        "Rain is expected today.",
    ]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    turned = [texts[3], texts[0] + " Now.", texts[1].upper(), texts[2]]  # 0 is like 3, 1 like 0, 2 like 1, 3 like 2
    test.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(turned)))
    given = ("dedup", train, "--against", test, "--kinds", "exact,lexical", "--lexical", "0.6")
    gone, page, decided = tmp_path / "gone.jsonl", tmp_path / "page.html", tmp_path / "decided.jsonl"
    done = inside(*given, "--removed", gone, "--report", page, "--pairs", tmp_path / "pairs.parquet")
    assert done.status == 0, done
    assert removed(gone) == {"0": ("1", "lexical"), "1": ("2", "exact"), "2": ("3", "exact"), "3": ("0", "exact")}
    assert turned[1] in page.read_text()
    shown = inside(*given).out
    assert f"0: {texts[0]}" in shown
    assert f"kept      1: {turned[1]}" in shown
    for names in (("1", "0"), ("0", "1")):  # test's, train's; also where both sides have both ids, as here, the first is test's
        decided.write_text(json.dumps({"id_a": names[0], "id_b": names[1], "duplicate": False}) + "\n")
        done = inside(*given, "--decisions", decided, "--removed", gone, "--pairs", tmp_path / "pairs.parquet")
        assert done.status == 0, done
        assert ("0" in removed(gone)) == (names == ("0", "1"))
    decided.write_text('{"id_a": "3", "id_b": "3", "duplicate": true}\n{"id_a": "0", "id_b": "0", "duplicate": true}\n')
    assert inside(*given, "--decisions", decided, "--pairs", tmp_path / "pairs.parquet").status == 0
    pairs = pyarrow.parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert {(row["id_a"], row["id_b"]) for row in pairs if row["kind"] == "reviewed"} == {("0", "0")}  # train's 3 is a copy


def test_an_output_within_a_source_is_refused(inside: Run, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    source.rename(folder / "rows.jsonl")
    before = (folder / "rows.jsonl").read_bytes()
    inside("dedup", folder, "--output", folder / "kept.jsonl").fails(2, "kept.jsonl is part of the source")
    inside("dedup", folder, "--output", folder / "rows.jsonl").fails(2, "rows.jsonl is part of the source")
    decided = tmp_path / "decided.jsonl"
    decided.write_text('{"id_a": "a", "id_b": "b", "duplicate": true}\n')
    inside("dedup", folder, "--decisions", decided, "--removed", decided).fails(2, "holds the decisions")
    inside("dedup", folder, "--decisions", decided, "--suggest", decided).fails(2, "--suggest", "--decisions")
    assert inside("dedup", folder, "--report", folder / "page.html").status == 0  # nothing that is read
    assert (folder / "rows.jsonl").read_bytes() == before


def test_collections_and_unfinished_work_in_a_folder_are_no_sources(inside: Run, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    source.rename(folder / "rows.jsonl")
    assert inside("index", folder, "--to", folder / "notes.embell").status == 0
    assert inside("dedup", folder / "notes.embell").status == 0  # leaves a list of pairs, a Parquet file, in there
    assert list(folder.rglob("*.parquet"))
    (folder / "kept.jsonl.unfinished").mkdir()
    (folder / "kept.jsonl.unfinished" / "other.jsonl").write_text('{"text": "left behind"}\n')
    done = inside("dedup", folder, "--kinds", "exact", "--json")
    assert done.status == 0, done
    assert done.lines[0]["documents"] == len(ROWS)


def test_what_cannot_be_read_is_kept_as_it_stands(inside: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "kept.jsonl"
    lines = [b'{"id": "1", "text": "One row."}', '{"id": "2", "text": "Zürich"}'.encode("latin-1"), b"no JSON", b'{"id": "3"}']
    source.write_bytes(b"\n".join(lines) + b"\n")
    done = inside("dedup", source, "--keep-going", "--output", out)
    assert done.status == 0, done
    assert out.read_bytes() == source.read_bytes()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("A note.")
    (tmp_path / "notes" / "b.txt").write_bytes("Ein Gruß.".encode("latin-1"))
    assert inside("dedup", tmp_path / "notes", "--keep-going", "--output", out).status == 0
    assert len(out.read_text().splitlines()) == 2


def test_fields_whose_columns_have_other_names(inside: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "kept.jsonl"
    rows = [
        {
            "id": str(n),
            "title": f"Title {n % 2}",
            "text": "Just the same.",
            "document": n % 2,
            "meta.topic": n % 3,
            "tags": ["x", "y"],
        }
        for n in range(6)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for field, expected in (("document", 2), ("meta.topic", 3), ("title", 2)):
        done = inside(
            "dedup",
            source,
            "--text-field",
            "text",
            "--text-field",
            "title",
            "--kinds",
            "exact",
            "--group-by",
            field,
            "--output",
            out,
        )
        assert done.status == 0, done
        assert len(ids(out)) == expected * (1 if field != "meta.topic" else 2), field
    inside("dedup", source, "--group-by", "tags").fails(2, "the field 'tags' holds lists")


def test_the_report_is_written_and_decisions_come_back(inside: Run, source: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = inside("dedup", source, "--threshold", "0.95", "--report", page)
    assert done.status == 0, done
    text = page.read_text()
    assert "rows.jsonl" in text
    assert ROWS[4]["text"] in text
    decided = tmp_path / "decisions.jsonl"
    decided.write_text(
        '{"id_a": "d", "id_b": "e", "score": 0.99, "kind": "semantic", "duplicate": false}\n'
        '{"id_a": "a", "id_b": "f", "score": 0.1, "kind": "semantic", "duplicate": true}\n'
    )
    done = inside("dedup", source, "--threshold", "0.95", "--decisions", decided, "--removed", tmp_path / "r.jsonl")
    assert done.status == 0, done
    assert removed(tmp_path / "r.jsonl") == {"b": ("a", "exact"), "c": ("a", "semantic"), "f": ("a", "reviewed")}


def test_a_list_of_pairs_is_decided_on_again(inside: Run, source: Path, tmp_path: Path) -> None:
    where = tmp_path / "rows.embell"
    inside("index", source, "--to", where)
    first = inside("dedup", where, "--threshold", "0.5", "--json").lines[0]
    told = inside("info", where, "--json").lines[0]["duplicates"]
    assert told == {"pairs": first["pairs"] - first["exact"], "rows": 6, "capped": 0, "thresholds": first["thresholds"]}
    assert f"{told['pairs']} pairs of 6 rows (semantic 0.5 or more)" in inside("info", where).out
    again = inside("dedup", where, "--threshold", "0.95", "--keep", "longest", "--json", "--output", tmp_path / "kept.jsonl")
    assert again.err == ""
    assert again.lines[0]["kept"] == 3
    assert first["pairs"] >= again.lines[0]["pairs"]
    assert ids(tmp_path / "kept.jsonl") == ["b", "e", "f"]
    lower = inside("dedup", where, "--threshold", "0.4", "--json")
    assert "looking for pairs anew" in lower.err
    assert lower.lines[0]["pairs"] >= first["pairs"]


def test_thresholds_are_suggested_from_decisions(inside: Run, tmp_path: Path) -> None:
    words = [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
    ]
    rows, decisions = [], []
    for at in range(8):
        base = [f"{word}{at}" for word in words]
        for share, same in ((15, True), (10, False)):
            rows.append({"id": f"{at}-{share}", "text": " ".join(base[:share] + [f"x{at}{share}{n}" for n in range(16 - share)])})
            decisions.append({"id_a": f"{at}", "id_b": f"{at}-{share}", "duplicate": same})
        rows.append({"id": f"{at}", "text": " ".join(base)})
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in decisions))
    done = inside(
        "dedup", tmp_path / "r.jsonl", "--kinds", "lexical", "--lexical", "0.3", "--suggest", tmp_path / "d.jsonl", "--json"
    )
    (choice,) = done.lines
    texts = {row["id"]: row["text"] for row in rows}
    sets = LexicalSets.of([texts["0"], texts["0-15"], texts["0-10"]])
    near, far = (float(sets.jaccard(np.array([0]), np.array([other]))[0]) for other in (1, 2))
    assert far < choice["threshold"] < near
    assert (choice["precision"], choice["recall"], choice["decided"]) == (1.0, 1.0, 16)
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps(decisions[0]) + "\n")
    inside("dedup", tmp_path / "r.jsonl", "--kinds", "lexical", "--suggest", few).fails(2, "too few decisions")


def test_a_killed_run_goes_on(inside: Run, source: Path, tmp_path: Path) -> None:
    """Killed while it encodes or compares; the second run gives what an undisturbed one gives."""
    rows = [{"id": str(n), "text": f"Text number {n % 400} about matter {n % 37} and {n % 11} things."} for n in range(800)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["dedup", str(source), "--threshold", "0.97", "--output"]
    assert inside(*command, tmp_path / "whole.jsonl").status == 0
    started = Started([*command, str(tmp_path / "kept.jsonl")])
    folder = tmp_path / "kept.jsonl.unfinished"
    deadline = time.monotonic() + 60
    while not (folder / "dedup.embell" / "manifest.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    started.kill()
    assert started.finish()[0] == -signal.SIGKILL
    assert folder.is_dir()
    assert not (tmp_path / "kept.jsonl").exists()
    assert inside(*command, tmp_path / "kept.jsonl").status == 0
    assert (tmp_path / "kept.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not folder.exists()


def test_labelled_pairs_are_measured(inside: Run, tmp_path: Path) -> None:
    lines = ["label\tsentence1\tsentence2"]
    for at in range(12):
        lines.append(f"1\tThe small dog number {at} ran over the hill.\tThe small dog number {at} ran over a hill.")
        lines.append(f"0\tThe small dog number {at} ran over the hill.\tPrices rose in the third quarter, said bank {at}.")
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n")
    rows = {row["kind"]: row for row in inside("evaluate", "duplicates", path, "--choose-on", path, "--json").lines}
    assert set(rows) == {"semantic", "lexical", "contained", "together"}
    for row in rows.values():
        assert (row["precision"], row["recall"], row["f1"], row["pairs"], row["duplicates"]) == (1, 1, 1, 24, 12)
    assert rows["semantic"]["average_precision"] == 1
    usual = {row["kind"]: row for row in inside("evaluate", "duplicates", path, "--json").lines}
    assert usual["together"]["thresholds"] == {"lexical": 0.9, "semantic": 0.8, "overlap": 0.7}
    path.write_text("label\tsentence1\tsentence2\n2\ta\tb\n0\ta\tb\n")
    inside("evaluate", "duplicates", path).fails(1, "pairs.tsv:2", "label is 2")
