"""Corpora: every format and compression, every error line, folders, column types, streaming."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import lzma
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embell.document import Document
from embell.errors import CorpusError, UsageError
from embell.indexers import corpora, csv_rows
from embell.indexers.columns import plain
from embell.indexers.corpora import CorpusOptions, CorpusReport, Row, read_corpus, read_rows, to_document


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return cast(bytes, sink.getvalue().to_pybytes())


PACK: dict[str, Callable[[bytes], bytes]] = {"": lambda data: data, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def table(rows: Sequence[dict[str, Any]], dialect: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), dialect=dialect)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return cast(bytes, sink.getvalue().to_pybytes())


WRITE: dict[str, Callable[[Sequence[dict[str, Any]]], bytes]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".csv": lambda rows: table(rows, "excel"),
    ".tsv": lambda rows: table(rows, "excel-tab"),
    ".parquet": parquet,
}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(path: str, content: str | bytes) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(*sources: str, report: CorpusReport | None = None, **options: Any) -> list[Document]:
    return list(read_corpus(sources, CorpusOptions(**options), report or CorpusReport()))


def fields(source: str, **options: Any) -> list[dict[str, Any]]:
    return [row.fields for row in read_rows([source], CorpusOptions(**options), CorpusReport())]


def fails(*sources: str, **options: Any) -> str:
    """The message of the error, which is one line."""
    with pytest.raises(CorpusError) as caught:
        read(*sources, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Round trips


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
FILLED = WORDS.filter(lambda text: text.strip() != "")
ROWS = st.lists(st.fixed_dictionaries({"id": FILLED, "text": FILLED, "note": FILLED}), min_size=1, max_size=5)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", WRITE)
@settings(max_examples=6, deadline=None)
@given(rows=ROWS)
def test_every_format_and_compression(suffix: str, packing: str, rows: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = put(f"{folder}/rows{suffix.upper()}{packing}", PACK[packing](WRITE[suffix](rows)))
        found = read(path, string_fields=("note",))
    assert [(one.id, one.text, one.metadata) for one in found] == [
        (one["id"], one["text"], {"note": one["note"]}) for one in rows
    ]
    assert [one.ordinal for one in found] == list(range(len(rows)))


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".text", ".md", ".markdown", ".rst"])
def test_text_files(suffix: str, packing: str) -> None:
    content = "\ufeffGröße\r\n\r\n漢字\n"
    path = put(f"notes/a{suffix}{packing}", PACK[packing](content.encode()))
    (row,) = read_rows([f"./notes//a{suffix}{packing}"], CorpusOptions(), CorpusReport())
    assert row == Row(path, path, {"text": content[1:], "path": path}, 0, None)
    assert read(path) == [Document(path, content[1:], {"path": path})]
    assert read(path, text_fields=("body",), id_field="key")[0].id == path, "field names are meant for tables"


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_compressed_parts_one_after_another(packing: str) -> None:
    pack = PACK[packing]
    assert [one.text for one in read(put("a.jsonl" + packing, pack(b'{"text": "a"}\n{"te') + pack(b'xt": "b"}\n')))] == ["a", "b"]


def test_values_of_json_and_parquet_stay_as_they_are() -> None:
    row = {"text": "a", "n": 2**70, "f": 0.5, "b": True, "none": None, "list": [1, "x"], "Deep.Name": {"a": [None]}}
    assert fields(put("a.jsonl", jsonl([row]))) == [row]
    day = datetime.date(2020, 2, 29)
    typed = {"text": "a", "day": day, "at": datetime.datetime(2020, 1, 1, 1, 2, 3, 4), "price": Decimal("1.50"), "list": [1, 2]}
    assert fields(put("a.parquet", parquet([typed]))) == [typed]
    nanoseconds = pa.table({"text": ["a"], "at": pa.array([1_001], pa.timestamp("ns"))})
    pq.write_table(nanoseconds, "b.parquet")
    assert fields("b.parquet")[0]["at"] == datetime.datetime(1970, 1, 1, 0, 0, 0, 1)


def test_places_ids_ordinals_and_raw_lines() -> None:
    put("a.jsonl", b'\xef\xbb\xbf\r\n{"text": "a"}\r\n  \n{"text": "b"}')
    put("b.csv", '\ufefftext,n\n"x\ny",1\n\n"z",2\n')
    put("c.parquet", parquet([{"text": "p"}]))
    rows = list(read_rows(["a.jsonl", "b.csv", "c.parquet"], CorpusOptions(), report := CorpusReport()))
    assert [(row.place, row.default_id, row.ordinal, row.raw) for row in rows] == [
        ("a.jsonl:2", "a.jsonl#2", 0, b'{"text": "a"}'),
        ("a.jsonl:4", "a.jsonl#4", 1, b'{"text": "b"}'),
        ("b.csv:2", "b.csv#1", 2, None),
        ("b.csv:5", "b.csv#2", 3, None),
        ("c.parquet:1", "c.parquet#1", 4, None),
    ]
    assert report.rows == 5
    document = to_document(rows[2], CorpusOptions())
    assert document is not None
    assert (document.id, document.text, document.metadata) == ("b.csv#1", "x\ny", {"n": 1})
    assert (document.place, document.ordinal) == ("b.csv:2", 2)


def test_stdin() -> None:
    rows = list(read_rows(["-"], CorpusOptions(), CorpusReport(), stdin=io.BytesIO(b'\n{"text": "a"}\n')))
    assert [(row.place, row.default_id) for row in rows] == [("-:2", "-#2")]
    with pytest.raises(UsageError, match="given twice"):
        list(read_rows(["-", "-"], CorpusOptions(), CorpusReport(), stdin=io.BytesIO()))


# Fields


def test_ids() -> None:
    assert [one.id for one in read(put("a.jsonl", '{"id": 7, "text": "a"}\n{"_id": "x", "text": "a"}\n{"text": "a"}'))] == [
        "7",
        "x",
        "a.jsonl#3",
    ]
    assert read(put("a.jsonl", '{"key": "k", "id": 1, "text": "a"}'), id_field="key") == [Document("k", "a", {"id": 1})]
    assert read(put("a.csv", "id,text\n007,1e3\n")) == [Document("007", "1e3")]


@pytest.mark.parametrize("value", ["null", '""', '" "', "1.5", "true", "[1]", "{}"])
def test_ids_that_are_none(value: str) -> None:
    message = fails(put("a.jsonl", f'{{"text": "a"}}\n{{"id": {value}, "text": "a"}}'))
    assert re.match(r"a\.jsonl:2: id field 'id' holds .*text or an integer", message)


def test_text_fields() -> None:
    put(
        "a.jsonl",
        jsonl(
            [{"title": "T", "text": "a"}, {"title": "", "text": "b"}, {"title": None, "text": 3}, {"title": ["t"], "text": "c"}]
        ),
    )
    assert [(one.text, one.metadata) for one in read("a.jsonl")] == [("T\na", {}), ("b", {}), ("3", {}), ("c", {"title": ["t"]})]
    put("b.jsonl", jsonl([{"x": "1", "y": 2, "title": "T"}, {"y": None, "x": "3"}, {"y": "4"}]))
    found = read("b.jsonl", text_fields=("y", "x"))
    assert [(one.text, one.metadata) for one in found] == [("2\n1", {"title": "T"}), ("3", {}), ("4", {})]


@pytest.mark.parametrize("value", ["[1]", "{}", "true"])
def test_texts_that_are_none(value: str) -> None:
    assert re.match(r"a\.jsonl:1: text field 'text' holds", fails(put("a.jsonl", f'{{"text": {value}}}')))


def test_missing_text_fields() -> None:
    message = fails(put("a.jsonl", '{"txet": "a", "n": 1}'))
    assert message == (
        "a.jsonl:1: no field 'text'; the fields here: 'txet', 'n'; "
        "did you mean 'txet'? name the field that holds the text with --text-field"
    )
    assert fails(put("a.jsonl", '{"text": "a"}\n{"body": "a"}')).startswith(
        "a.jsonl:2: no field 'text'; the fields here: 'body'; "
    )
    assert "no field 'y'" in fails(put("a.jsonl", '{"x": "a"}'), text_fields=("x", "y")), "the first row must have them all"
    put("a.jsonl", '{"x": "a", "y": "b"}\n{"z": "a"}')
    assert fails("a.jsonl", text_fields=("x", "y")).startswith("a.jsonl:2: no field 'x' or 'y'; ")


def test_missing_id_field() -> None:
    put("a.jsonl", '{"Key": 1, "text": "a"}')
    message = fails("a.jsonl", id_field="kye")
    assert message.startswith("a.jsonl:1: no field 'kye'; the fields here: 'Key', 'text'; did you mean 'Key'?")
    assert message.endswith("--id-field")


def test_rows_without_text_are_counted() -> None:
    put("a.jsonl", jsonl([{"text": "a"}, {"text": " \n"}, {"text": None}, {"text": "b"}]))
    report = CorpusReport()
    assert [one.ordinal for one in read("a.jsonl", put("b.txt", ""), report=report)] == [0, 3]
    assert report == CorpusReport(rows=5, empty=3, first_empty="a.jsonl:2")


def test_string_fields() -> None:
    row = {"text": "a", "n": 1, "b": True, "none": None, "list": [1, "é"], "s": "x", "f": 1.0}
    (found,) = read(put("a.jsonl", jsonl([row])), string_fields=tuple(row)[1:])
    assert found.metadata == {"n": "1", "b": "true", "none": None, "list": '[1,"é"]', "s": "x", "f": "1.0"}


def test_vectors() -> None:
    put("a.jsonl", '{"text": "a", "v": [1, 0.5]}')
    put("a.csv", 'text,v\na,"[1, 0.5]"\n')
    put("a.parquet", parquet([{"text": "a", "v": [1.0, 0.5]}]))
    for path in ("a.jsonl", "a.csv", "a.parquet"):
        (found,) = read(path, vector_field="v")
        assert (found.vector, found.metadata) == ([1.0, 0.5], {})


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("[]", "list of numbers"),
        ("[1,true]", "list of numbers"),
        ('["1"]', "list of numbers"),
        ('"[NaN]"', "list of numbers"),
        ("7", "list of numbers"),
        ("null", "null, not a list"),
        ("[0, 0.0]", "only zeros"),
    ],
)
def test_bad_vectors(cell: str, fault: str) -> None:
    message = fails(put("a.jsonl", f'{{"text": "a", "v": [1]}}\n{{"text": "a", "v": {cell}}}'), vector_field="v")
    assert message.startswith("a.jsonl:2: vector field 'v' holds ")
    assert fault in message


def test_vectors_missing_or_not_finite() -> None:
    assert fails(put("a.jsonl", '{"text": "a"}'), vector_field="v").startswith("a.jsonl:1: no field 'v'; ")
    assert fails(put("a.jsonl", '{"text": "a", "v": [1]}\n{"text": "a"}'), vector_field="v").startswith(
        "a.jsonl:2: no field 'v'; "
    )
    for bad in (float("nan"), float("inf")):
        path = put("a.parquet", parquet([{"text": "a", "v": [1.0, bad]}]))
        assert fails(path, vector_field="v").startswith("a.parquet:1: vector field 'v' holds NaN or infinity")


# Faults of rows


FAULTY: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"text": "a"}\n{"text": }\n{"text": "b"}\n', r"a\.jsonl:2: not valid JSON \(.+\); .+"),
    ("a.jsonl", b'{"text": "a"}\n["text"]\n{"text": "b"}\n', r"a\.jsonl:2: a JSON value but not an object; .+"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n{"text": "b"}\n', r"a\.jsonl:2: not UTF-8 \(byte 0xe9 at offset 10\); .+"),
    ("a.csv", b"text,n\na,1\nx\nb,2\n", r"a\.csv:3: 1 cells where the header has 2; .+"),
    ("a.csv", b"text,n\na,1\nx,1,2\nb,2\n", r"a\.csv:3: 3 cells where the header has 2; .+"),
    ("a.csv", b'text,n\na,1\n"x"y,1\nb,2\n', r"a\.csv:3: cells cannot be told apart .+"),
    ("a.csv", b'text,n\na,1\n"x,1\nb,2\n', r"a\.csv:3: cells cannot be told apart \(unexpected end of data\); .+"),
    ("a.csv", b"text,n\na,1\n\xe9,1\nb,2\n", r"a\.csv:3: not UTF-8 \(byte 0xe9 at offset 0\); .+"),
    ("a.tsv", b"text\tn\na\t1\nx\nb\t2\n", r"a\.tsv:3: 1 cells where the header has 2; .+"),
]


@pytest.mark.parametrize(("path", "content", "message"), FAULTY)
def test_faulty_rows_stop_the_reading_or_are_skipped(path: str, content: bytes, message: str) -> None:
    put(path, content)
    seen: list[str] = []
    with pytest.raises(CorpusError) as caught:
        seen.extend(one.text for one in read_corpus([path], CorpusOptions(), CorpusReport()))
    assert re.fullmatch(message, str(caught.value)), str(caught.value)

    report = CorpusReport()
    rejects: list[tuple[str, bytes | None]] = []
    options = CorpusOptions(keep_going=True)
    found = list(read_corpus([path], options, report, lambda said, raw: rejects.append((said, raw))))
    assert [(one.text, one.ordinal) for one in found] == [("a", 0), ("b", 2)]
    assert (report.rows, report.rejected, report.first_rejected) == (3, 1, str(caught.value))
    assert rejects[0][0] == str(caught.value)
    assert rejects[0][1] is not None
    if path == "a.jsonl":
        assert rejects[0][1] == content.splitlines()[1]


def test_rows_that_make_no_document_are_skipped_too() -> None:
    put("a.csv", "id,text\n1,a\n,b\n3,c\n")
    rejects: list[tuple[str, bytes | None]] = []
    options = CorpusOptions(keep_going=True)
    found = list(read_corpus(["a.csv"], options, report := CorpusReport(), lambda *said: rejects.append(said)))
    assert [one.id for one in found] == ["1", "3"]
    assert report.rejected == 1
    assert rejects == [(report.first_rejected, b'{"id":null,"text":"b"}')]
    assert report.first_rejected.startswith("a.csv:3: id field 'id' holds null; ")


@pytest.mark.parametrize(
    "options", [{"text_fields": ("body",)}, {"id_field": "key"}, {"vector_field": "v"}, {"text_fields": ("text", "b")}]
)
def test_a_wrong_name_is_an_error_whatever_is_skipped(options: dict[str, Any]) -> None:
    put("a.jsonl", 'broken\n{"text": "a"}\n{"text": "b"}')
    assert fails("a.jsonl", keep_going=True, **options).startswith("a.jsonl:2: no field ")


def test_text_file_that_is_not_utf8() -> None:
    put("d/a.txt", b"\xef\xbb\xbfab\xff")
    put("d/b.txt", "b")
    assert fails("d").startswith("d/a.txt: not UTF-8 (byte 0xff at offset 5); ")
    assert [one.id for one in read("d", keep_going=True)] == ["d/b.txt"]


# Faults of files


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("a.json", b"{}", r"a\.json: unknown kind of file; embell reads \.jsonl .*\.zst; if it is JSON Lines.*\.jsonl"),
        ("a.json.gz", b"{}", r"a\.json\.gz: unknown kind of file; .*; if it is JSON Lines.*"),
        ("a.pdf", b"", r"a\.pdf: unknown kind of file; embell reads [^;]*"),
        ("a.gz", b"", r"a\.gz: unknown kind of file; .*"),
        ("a.csv", b"", r"a\.csv:1: no header line; .*"),
        ("a.csv", b"text,n,text\n", r"a\.csv:1: two columns are named 'text'; .*"),
        ("a.csv", b"text,,n\n", r"a\.csv:1: column 2 has no name; .*"),
        ("a.csv", b"te\xe9xt,n\n", r"a\.csv:1: not UTF-8 \(.*\); save the file as UTF-8"),
        ("a.parquet", b"PAR1 nonsense PAR1", r"a\.parquet: not a sound Parquet file \(.*\); write the file anew"),
        ("a.parquet.gz", gzip.compress(b"nonsense", mtime=0), r"a\.parquet\.gz: not a sound Parquet file \(.*"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz: broken \.gz compression \(.*\); .*"),
        ("a.txt.xz", b"not packed", r"a\.txt\.xz: broken \.xz compression \(.*\); .*"),
        ("a.txt.zst", b"not packed", r"a\.txt\.zst: broken \.zst compression \(.*\); .*"),
    ],
)
def test_faulty_files(path: str, content: bytes, message: str) -> None:
    put(path, content)
    for keep_going in (False, True):
        assert re.fullmatch(message, said := fails(path, keep_going=keep_going)), said


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_compressed_files_cut_short(packing: str) -> None:
    whole = PACK[packing](jsonl([{"text": str(number)} for number in range(1_000)]))
    assert fails(put("a.jsonl" + packing, whole[:-9])).startswith(f"a.jsonl{packing}: broken {packing} compression")


def test_missing_paths_are_told_before_anything_is_read() -> None:
    rows = read_rows([put("a.txt", "a"), "gone/b.txt"], CorpusOptions(), CorpusReport())
    with pytest.raises(CorpusError, match=r"^gone/b\.txt: No such file or directory; check the path$"):
        next(rows)
    assert fails("").startswith("'': ")


def test_unreadable_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: Any) -> BinaryIO:
        raise PermissionError(13, "Permission denied", path)

    put("a.txt", "a")
    monkeypatch.setattr(corpora, "open", refuse, raising=False)
    assert fails("a.txt").startswith("a.txt: cannot be read (Permission denied); check")


def test_parquet_with_two_columns_of_one_name() -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), "a.parquet")
    assert fails("a.parquet").startswith("a.parquet: two columns are named 'text'")


# Folders


def test_folders() -> None:
    for path in (
        "b.txt",
        "a/z.md",
        "a.txt",
        "a-b.txt",
        "a/y/x.rst",
        ".hidden.txt",
        ".git/c.txt",
        "a/.d/e.txt",
        "picture.png",
        "README",
    ):
        put(f"tree/{path}", path)
    names = ["tree/a-b.txt", "tree/a.txt", "tree/a/y/x.rst", "tree/a/z.md", "tree/b.txt"]
    assert [one.id for one in read("tree")] == names == sorted(names)
    assert [one.id for one in read("./tree/a/../")] == names
    assert [one.id for one in read("tree/.git")] == ["tree/.git/c.txt"], "what is named is read"


def test_links() -> None:
    put("tree/a.txt", "a")
    put("tree/deep/b.txt", "b")
    put("treetop/c.txt", "c")
    os.symlink("deep/b.txt", "tree/inside.txt")
    os.symlink("../treetop/c.txt", "tree/outside.txt")
    os.symlink("gone.txt", "tree/broken.txt")
    os.symlink("loop.txt", "tree/loop.txt")
    os.symlink("deep", "tree/folder")
    os.symlink("..", "tree/deep/up")
    os.symlink("tree", "named")
    assert [one.id for one in read("tree")] == ["tree/a.txt", "tree/deep/b.txt", "tree/inside.txt"]
    assert [one.id for one in read("named")] == ["named/a.txt", "named/deep/b.txt", "named/inside.txt"]
    assert fails("tree/loop.txt").startswith("tree/loop.txt: ")


def test_folders_without_a_usable_file() -> None:
    put("tree/.a.txt", "a")
    put("tree/b.png", "b")
    assert fails("tree").startswith("tree: no file to read in this folder; embell reads .jsonl ")


def test_fields_are_checked_on_the_first_table_row_of_a_folder() -> None:
    put("tree/README.md", "read me")
    put("tree/a.jsonl", '{"body": "a"}')
    assert fails("tree", keep_going=True).startswith("tree/a.jsonl:1: no field 'text'")
    assert [one.text for one in read("tree", text_fields=("body",))] == ["read me", "a"]


# CSV and TSV


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-20", "0", ""], [1, -20, 0, None]),
        (["1", "01"], ["1", "01"]),
        (["9223372036854775807", "-9223372036854775808"], [2**63 - 1, -(2**63)]),
        (["9223372036854775808"], ["9223372036854775808"]),
        (["9007199254740993", "0.5"], ["9007199254740993", "0.5"]),
        (["1", "2.5", "1e3", "-.5"], [1.0, 2.5, 1000.0, -0.5]),
        (["nan", "1"], ["nan", "1"]),
        (["1e999"], ["1e999"]),
        (["true", "FALSE", "", "True"], [True, False, None, True]),
        (["1", "true"], ["1", "true"]),
        (["", ""], [None, None]),
        (["1 ", "٣"], ["1 ", "٣"]),
    ],
)
def test_column_types(cells: list[str], values: list[Any]) -> None:
    put("a.csv", "text,c\n" + "".join(f"x,{cell}\n" for cell in cells))
    found = [row["c"] for row in fields("a.csv")]
    assert [(type(value), value) for value in found] == [(type(value), value) for value in values]
    assert [row["c"] for row in fields("a.csv", string_fields=("c",))] == [cell or None for cell in cells]
    assert [row["c"] for row in fields("a.csv", text_fields=("text", "c"))] == [cell or None for cell in cells]
    assert [row["c"] for row in fields("a.csv", id_field="c")] == [cell or None for cell in cells]


def test_a_later_cell_of_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "SAMPLE_ROWS", 3)
    put("a.csv", "text,n\na,1\nb,2\nc,3\nd,x" + "y" * 500 + "\ne,5\n")
    message = fails("a.csv")
    assert message.startswith("a.csv:5: column 'n' holds 'xyyy")
    assert len(message) < 250
    assert "first rows hold integers;" in message
    assert message.endswith("--string-field n")
    assert [one.text for one in read("a.csv", keep_going=True)] == ["a", "b", "c", "e"]
    assert len(read("a.csv", string_fields=("n",))) == 5


def test_the_sample_ends_at_its_number_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "SAMPLE_CHARACTERS", 6)
    assert fails(put("a.csv", "text,n\naa,1\nbb,2\nc,x\n")).startswith("a.csv:4: column 'n' holds 'x'")


def test_stray_quotes_in_tsv() -> None:
    put("a.tsv", 'text\tn\n5" pipe\t1\n"He" said\t2\n"open\t3\n"a ""quoted""\tcell"\t4\n"two\nlines"\t5\nend\t6\n')
    texts = ['5" pipe', '"He" said', '"open', 'a "quoted"\tcell', "two\nlines", "end"]
    assert [(row["text"], row["n"]) for row in fields("a.tsv")] == list(zip(texts, range(1, 7), strict=True))
    rows = read_rows(["a.tsv"], CorpusOptions(), CorpusReport())
    assert [row.place for row in rows] == [f"a.tsv:{line}" for line in (2, 3, 4, 5, 6, 8)]


def test_quotes_that_would_join_rows_of_tsv_join_none() -> None:
    """The quote that row 1 opens ends a cell of row 3: read with quoting, both are one row of the right width."""
    put("a.tsv", 'id\ttext\n5\t"I don\'t know.\n6\tNobody does.\n7\tMaybe tomorrow."\n8\tend\n')
    found = [(row["id"], row["text"]) for row in fields("a.tsv")]
    assert found == [("5", "\"I don't know."), ("6", "Nobody does."), ("7", 'Maybe tomorrow."'), ("8", "end")]


def test_times_of_day_are_their_own_text() -> None:
    assert plain(datetime.time(12, 30)) == "12:30:00"
    assert plain(datetime.timedelta(minutes=90)) == "1:30:00"


def test_long_cells() -> None:
    text = "word " * 100_000
    assert read(put("a.csv", f"text,n\n{text},1\n"))[0].text == text


# Streaming


class Counting(io.RawIOBase):
    """A stream of endless rows that knows how much was asked of it."""

    def __init__(self, line: bytes) -> None:
        self.line = line
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(buffer)
        self.taken += size
        buffer[:] = (self.line * (size // len(self.line) + 2))[:size]
        return size


def test_one_row_takes_little_of_an_endless_stream() -> None:
    source = Counting(b'{"text": "a"}\n')
    documents = read_corpus(["-"], CorpusOptions(), CorpusReport(), stdin=io.BufferedReader(source))
    assert next(documents).text == "a"
    assert source.taken < 100_000


@pytest.mark.parametrize("path", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_one_row_takes_little_of_a_large_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "SAMPLE_ROWS", 100)
    rows = [{"text": os.urandom(1_500).hex(), "n": number} for number in range(8_000 if path.endswith("parquet") else 2_000)]
    stem, packed = (path[:-3], ".gz") if path.endswith(".gz") else (path, "")
    put(path, PACK[packed](WRITE[os.path.splitext(stem)[1]](rows)))
    size = os.path.getsize(path)
    opened: list[Any] = []

    def watched(name: str, mode: str) -> Any:
        opened.append(Watched(name, mode))
        return io.BufferedReader(opened[-1])

    monkeypatch.setattr(corpora, "open", watched, raising=False)
    documents = read_corpus([path], CorpusOptions(), CorpusReport())
    assert next(documents).text == rows[0]["text"]
    assert 0 < opened[0].taken < size / 2
    documents.close()  # type: ignore[attr-defined]
    assert opened[0].closed


class Watched(io.FileIO):
    """A file that knows how much was read of it."""

    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self.taken += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        self.taken += count or 0
        return count
