"""Tables to train on: every format, which column serves which role, and every error line."""

from __future__ import annotations

import csv
import gzip
import lzma
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import write_jsonl
from embell.errors import CorpusError, UsageError
from embell.training.columns import read_columns

PAIR = {"query": ("anchor", "query", "question"), "positive": ("positive", "answer", "text")}
NEGATIVE = {"negative": ("negative", "negatives")}
SCORED = {"first": ("sentence1",), "second": ("sentence2",), "score": ("score",)}
ROWS = [{"question": "How far?", "answer": 'Two "miles", or so'}, {"question": "2024", "answer": "中文\u2028é"}]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return cast(bytes, sink.getvalue().to_pybytes())


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the first suffix names."""
    kind = path.suffixes[0]
    if kind == ".jsonl":
        write_jsonl(path, rows)
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == ".tsv":
        lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    path.write_bytes(PACK[path.suffixes[1] if path.suffixes[1:] else ""](path.read_bytes()))
    return path


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_texts(tmp_path: Path, kind: str, packed: str) -> None:
    table = read_columns([write_table(tmp_path / f"pairs{kind}{packed}", ROWS)], PAIR)
    assert table.texts == {"query": ["How far?", "2024"], "positive": ['Two "miles", or so', "中文\u2028é"]}
    assert len(table) == 2


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_digits_in_a_text_column_stay_as_they_are_written(tmp_path: Path, kind: str) -> None:
    path = write_table(
        tmp_path / f"pairs{kind}",
        [{"id": 1, "anchor": "2024", "positive": "1.50"}, {"id": "x", "anchor": "7", "positive": "true"}],
    )
    assert read_columns([path], PAIR).texts == {"query": ["2024", "7"], "positive": ["1.50", "true"]}


def test_files_and_folders_are_read_in_order_and_each_row_knows_its_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("no table")
    write_jsonl(tmp_path / "folder" / "b.jsonl", [{"anchor": "b", "positive": "B"}])
    write_table(tmp_path / "folder" / "a.tsv", [{"query": "a", "text": "A"}])
    last = tmp_path / "last.jsonl"
    last.write_text('\n{"anchor": "c", "positive": "C"}\n')
    table = read_columns([tmp_path / "folder", last], PAIR)
    assert table.texts == {"query": ["a", "b", "c"], "positive": ["A", "B", "C"]}
    assert [table.place(row) for row in range(3)] == [
        f"{tmp_path}/folder/a.tsv:2", f"{tmp_path}/folder/b.jsonl:1", f"{tmp_path}/last.jsonl:2",
    ]  # fmt: skip


CELL = st.text(st.characters(exclude_characters="\t\r\n", codec="utf-8"), min_size=1).filter(lambda cell: bool(cell.strip()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_tsv_knows_no_quoting(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    path = write_table(tmp_path / "pairs.tsv", [{"anchor": first, "positive": second} for first, second in rows])
    table = read_columns([path], PAIR)
    assert list(zip(table.texts["query"], table.texts["positive"], strict=True)) == rows
    assert table.lines == list(range(2, len(rows) + 2))


def test_a_quote_that_two_tsv_rows_would_share_joins_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text('anchor\tpositive\na\t"b\nc"\td\n')
    assert read_columns([path], PAIR).texts == {"query": ["a", 'c"'], "positive": ['"b', "d"]}


def test_the_best_column_is_taken_and_serves_one_role_only(tmp_path: Path) -> None:
    rows = [{"text": "t", "question": "q", "anchor": "a", "other": 1}]
    assert read_columns([write_jsonl(tmp_path / "a.jsonl", rows)], PAIR).texts == {"query": ["a"], "positive": ["t"]}
    both = {"query": ("text",), "positive": ("text", "question")}
    assert read_columns([tmp_path / "a.jsonl"], both).texts == {"query": ["t"], "positive": ["q"]}


def test_a_named_column_takes_the_place_of_the_usual_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"anchor": "a", "answer": "b", "title": "c"}])
    assert read_columns([path], PAIR, names={"query": "title"}).texts == {"query": ["c"], "positive": ["b"]}
    assert read_columns([path], PAIR, names={"positive": "anchor", "query": "anchor"}).texts == {
        "query": ["a"],
        "positive": ["a"],
    }
    with pytest.raises(CorpusError, match=r"a\.jsonl: no column for the query: accepted is 'titel'; .*; did you mean 'title'\?$"):
        read_columns([path], PAIR, names={"query": "titel"})
    with pytest.raises(
        CorpusError, match=r"a\.jsonl: no column for the negative: accepted is 'hard'; the columns here: 'anchor'"
    ):
        read_columns([path], PAIR, NEGATIVE, names={"negative": "hard"})
    with pytest.raises(UsageError, match=r"no column 'querry' is read here; did you mean 'query'\?"):
        read_columns([path], PAIR, names={"querry": "title"})


def test_what_is_optional_may_lack_in_a_file_or_a_row(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"anchor": "a", "positive": "b"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"anchor": "a", "positive": "b", "score": None}, {"anchor": "a", "positive": "b", "negatives": ["x", "y"]},
                                                {"anchor": "a", "positive": "b", "negatives": "z", "score": 3, "note": "n"}])  # fmt: skip
    third = write_table(tmp_path / "c.csv", [{"anchor": "a", "positive": "b", "note": ""}])
    optional = {**NEGATIVE, "score": ("score",), "note": ("note",), "never": ("never",)}
    table = read_columns([first, second, third], PAIR, optional, numbers=["score", "never"], lists=["negative"])
    assert table.lists == {"negative": [(), (), ("x", "y"), ("z",), ()]}
    assert table.texts["note"] == ["", "", "", "n", ""]
    assert set(table.numbers) == {"score"}
    assert table.numbers["score"][3] == 3
    assert [math.isnan(value) for value in table.numbers["score"]] == [True, True, True, False, True]


def test_lists_of_texts_come_from_parquet_too(tmp_path: Path) -> None:
    rows = [{"anchor": "a", "positive": "b", "negative": ["x", "y"]}, {"anchor": "a", "positive": "b", "negative": ["z"]}]
    table = read_columns([write_table(tmp_path / "a.parquet", rows)], {**PAIR, **NEGATIVE}, lists=["negative"])
    assert table.lists["negative"] == [("x", "y"), ("z",)]


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_numbers_are_floats(tmp_path: Path, kind: str) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (0.25, -4.0, 1e-07)]
    path = write_table(tmp_path / f"scored{kind}", rows)
    assert read_columns([path], SCORED, numbers=["score"]).numbers == {"score": [0.25, -4.0, 1e-07]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"none\.jsonl: No such file or directory"),
        ("empty.jsonl", "\n\n", r"empty\.jsonl: no rows"),
        ("empty.csv", "anchor,positive\n", r"empty\.csv: no rows"),
        ("empty.tsv", "", r"empty\.tsv: no rows"),
        ("notes.txt", "words", r"notes\.txt: a text file is no table"),
        ("pairs.xlsx", "words", r"pairs\.xlsx: unknown kind of file"),
        ("a.jsonl", '{"anchor": "a", "reply": "b"}', r"a\.jsonl: no column for the positive: accepted are 'positive', 'answer', 'text'; the columns here: 'anchor', 'reply'"),
        ("a.tsv", "anchor\treply\na\tb\n", r"a\.tsv: no column for the positive: .*: 'anchor', 'reply'"),
        ("a.jsonl", '{"anchor": "a", "positive": "b"}\n{"anchor": "a"}', r"a\.jsonl:2: the positive, column 'positive', holds nothing; text is needed"),
        ("a.jsonl", '{"anchor": "a", "positive": " "}', r"a\.jsonl:1: .* holds ' '; text"),
        ("a.jsonl", '{"anchor": "a", "positive": 7}', r"a\.jsonl:1: .* holds 7; text"),
        ("a.jsonl", '{"anchor": "a", "positive": ["b"]}', r"a\.jsonl:1: .* holds a list; text"),
        ("a.jsonl", '{"anchor": "a", "positive": "b"}\n{"anchor": ', r"a\.jsonl:2: not valid JSON .*; correct it$"),
        ("a.jsonl", '{"anchor": "a", "positive": "b"}\n["a"]', r"a\.jsonl:2: a JSON value but not an object"),
        ("a.csv", "anchor,positive\na,b\na,\n", r"a\.csv:3: the positive, .* holds nothing"),
        ("a.csv", 'anchor,positive\na,b\na,b,c\n', r"a\.csv:3: 3 cells where the header has 2; [^-]*$"),
        ("a.tsv", "anchor\tpositive\na\tb\n\na\n", r"a\.tsv:4: 1 cells where the header has 2"),
        ("a.tsv", "anchor\tpositive\na\t\n", r"a\.tsv:2: the positive, .* holds nothing"),
        ("a.tsv", "anchor\tanchor\na\tb\n", r"a\.tsv:1: two columns are named 'anchor'"),
        ("a.tsv", b"anchor\tpositive\na\t\xff\n", r"a\.tsv:2: not UTF-8"),
        ("a.tsv.xz", "anchor\tpositive\na\tb\n", r"a\.tsv\.xz: cannot be read"),
        ("a.parquet", "words", r"a\.parquet: not a sound Parquet file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_that_says_where(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError) as raised:
        read_columns([path], PAIR)
    assert re.search(message, str(raised.value))
    assert "\n" not in str(raised.value)
    assert "--keep-going" not in str(raised.value)


@pytest.mark.parametrize("score", ['"high"', '"3"', "true", "null", "1" + "0" * 400, "[1]"])
def test_a_number_in_jsonl_must_be_one(tmp_path: Path, score: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "score": %s}\n' % score)  # noqa: UP031
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: "):
        read_columns([path], SCORED, numbers=["score"])


@pytest.mark.parametrize("score", ["high", "nan", "inf", "1e999", "1_0", ""])
@pytest.mark.parametrize(("kind", "tab"), [("csv", ","), ("tsv", "\t")])
def test_a_number_in_a_cell_must_be_finite(tmp_path: Path, kind: str, tab: str, score: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_text(f"sentence1{tab}sentence2{tab}score\na{tab}b{tab}1\na{tab}b{tab}{score}\n")
    with pytest.raises(CorpusError, match=rf"a\.{kind}:3: the score, column 'score', holds .*; a finite number is needed"):
        read_columns([path], SCORED, numbers=["score"])


@pytest.mark.parametrize("negative", ["[]", '["a", ""]', '["a", 1]', "{}", "null", '""'])
def test_a_list_of_texts_holds_texts(tmp_path: Path, negative: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"anchor": "a", "positive": "b", "negative": %s}\n' % negative)  # noqa: UP031
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: the negative, column 'negative', holds .* is needed"):
        read_columns([path], {**PAIR, **NEGATIVE}, lists=["negative"])


def test_stdin_is_refused() -> None:
    with pytest.raises(CorpusError, match="not stdin"):
        read_columns([Path("-")], PAIR)


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no table")
    with pytest.raises(CorpusError, match="no table in this folder"):
        read_columns([tmp_path], PAIR)
