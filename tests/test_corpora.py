"""Corpora: what each kind of file gives, what is refused and in which words, and that nothing is read ahead of need."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embell.document import Document
from embell.errors import CorpusError, UsageError
from embell.indexers import corpora
from embell.indexers.corpora import CorpusOptions, CorpusReport, Row, read_corpus, read_rows, to_document

COMPRESSIONS = ["", ".gz", ".xz", ".zst"]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lambda data: lzma.compress(data, preset=0), ".zst": zstd}


def as_jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def as_table(rows: Sequence[dict[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(table: pa.Table | Sequence[dict[str, Any]], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(list(table)), sink, **options)
    return sink.getvalue().to_pybytes()


WRITE: dict[str, Callable[[Sequence[dict[str, Any]]], bytes]] = {
    ".jsonl": as_jsonl,
    ".NDJSON": as_jsonl,
    ".csv": as_table,
    ".tsv": lambda rows: as_table(rows, "\t"),
    ".parquet": as_parquet,
}


def put(path: Path, content: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def documents(source: str | Sequence[str], report: CorpusReport | None = None, **options: Any) -> list[Document]:
    sources = [source] if isinstance(source, str) else source
    return list(read_corpus(sources, CorpusOptions(**options), report or CorpusReport()))


def fault(source: str | Sequence[str], **options: Any) -> str:
    """The one line in which the corpus is refused."""
    with pytest.raises(CorpusError) as caught:
        documents(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What goes in comes out

NO_NUL = "\0" if sys.version_info < (3, 11) else ""  # the csv module of Python 3.10 refuses it
STRINGS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=NO_NUL), max_size=20)
RECORDS = st.fixed_dictionaries(
    {
        "text": STRINGS,
        "note": STRINGS,
        "count": st.integers(-(2**63), 2**63 - 1),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "sound": st.booleans(),
    }
)


@given(
    rows=st.dictionaries(STRINGS.filter(str.strip), RECORDS, min_size=1, max_size=8),
    suffix=st.sampled_from(sorted(WRITE)),
    compression=st.sampled_from(COMPRESSIONS),
)
@settings(deadline=None, max_examples=200)
def test_round_trip(
    rows: dict[str, dict[str, Any]], suffix: str, compression: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = [{"id": identity, **row} for identity, row in rows.items()]
    path = put(tmp_path_factory.mktemp("round") / f"c{suffix}{compression.upper()}", PACK[compression](WRITE[suffix](records)))
    report = CorpusReport()
    found = documents(path, report, string_fields=("note",))
    table = suffix in (".csv", ".tsv")
    assert [(document.id, document.text) for document in found] == [(r["id"], r["text"]) for r in records if r["text"].strip()]
    for document, (ordinal, record) in zip(found, ((n, r) for n, r in enumerate(records) if r["text"].strip()), strict=True):
        expected = {name: record[name] for name in ("note", "count", "share", "sound")}
        if table and not record["note"]:
            expected["note"] = None
        assert document.metadata == expected
        assert all(type(value) is type(expected[name]) for name, value in document.metadata.items())
        assert document.ordinal == ordinal
        if not table:  # a cell may span lines
            assert document.place == f"{path}:{ordinal + 1}"
    assert (report.rows, report.empty, report.rejected) == (len(records), len(records) - len(found), 0)
    assert bool(report.first_empty) == bool(report.empty)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_compressed_parts_in_one_file(compression: str, tmp_path: Path) -> None:
    pack = PACK[compression]
    parts = [b'{"text":"on', b'e"}\n{"text":"two"}\n', b"", b'{"text":"three"}']
    path = put(tmp_path / f"c.jsonl{compression}", b"".join(map(pack, parts)))
    assert [document.text for document in documents(path)] == ["one", "two", "three"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".txt", ".text", ".md", ".markdown", ".rst", ".TXT"])
def test_a_text_file_is_one_document(suffix: str, compression: str, tmp_path: Path) -> None:
    content = "\ufeff# Größe\r\n\r\nzwei\0drei \n"
    path = put(tmp_path / f"a note{suffix}{compression}", PACK[compression](content.encode()))
    for options in ({}, {"text_fields": ("body",), "id_field": "key"}):  # these name fields of tables
        (document,) = documents(path, **options)
        assert (document.id, document.place, document.text) == (path, path, content[1:])
        assert document.metadata == {"path": path}


def test_rows_places_and_default_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "d/c.jsonl", b'\xef\xbb\xbf{"text":"a"}\r\n \t\r\n\n{"text":"b"}')
    put(tmp_path / "d/c.csv", '\n\ufefftext,n\n"a\nb",1\n\nc,2\n'.replace("\n\ufeff", "\ufeff\n"))
    put(tmp_path / "d/c.parquet", as_parquet([{"text": "p"}, {"text": "q"}]))
    put(tmp_path / "d/c.txt", "t")
    rows = list(read_rows(["./d//c.jsonl", "d", "-"], CorpusOptions(), CorpusReport(), stdin=io.BytesIO(b'\n{"text":"s"}\n')))
    assert [(row.place, row.default_id) for row in rows] == [
        ("d/c.jsonl:1", "d/c.jsonl#1"),
        ("d/c.jsonl:4", "d/c.jsonl#4"),
        ("d/c.csv:3", "d/c.csv#1"),
        ("d/c.csv:6", "d/c.csv#2"),
        ("d/c.jsonl:1", "d/c.jsonl#1"),
        ("d/c.jsonl:4", "d/c.jsonl#4"),
        ("d/c.parquet:1", "d/c.parquet#1"),
        ("d/c.parquet:2", "d/c.parquet#2"),
        ("d/c.txt", "d/c.txt"),
        ("-:2", "-#2"),
    ]
    assert [row.ordinal for row in rows] == list(range(10))
    assert [row.raw for row in rows] == [
        b'{"text":"a"}',
        b'{"text":"b"}',
        None,
        None,
        b'{"text":"a"}',
        b'{"text":"b"}',
        *[None] * 3,
        b'{"text":"s"}',
    ]
    documents_ = [to_document(row, CorpusOptions()) for row in rows]
    assert [document.id for document in documents_ if document] == [row.default_id for row in rows]
    assert [document.ordinal for document in documents_ if document] == list(range(10))


def test_stdin_is_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b'{"text":"from stdin"}')

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert [document.text for document in documents("-")] == ["from stdin"]
    with pytest.raises(UsageError, match="twice"):
        documents(["-", "-"])
    with pytest.raises(CorpusError, match=r"^-:1: not valid JSON"):
        list(read_corpus(["-"], CorpusOptions(), CorpusReport(), stdin=io.BytesIO(b"oops")))


def test_the_same_options_serve_many_calls(tmp_path: Path) -> None:
    path = put(tmp_path / "c.jsonl", '{"text":"a"}\n{"text":"b"}\n')
    report = CorpusReport()
    assert [document.ordinal for document in [*documents(path, report), *documents(path, report)]] == [0, 1, 0, 1]
    assert report.rows == 4
    assert documents([]) == []
    assert documents(put(tmp_path / "empty.jsonl", "")) == []


# Ids, texts, metadata, vectors


def row(**fields: Any) -> Row:
    return Row("c.jsonl:7", "c.jsonl#7", fields, 6, None)


def document(fields: dict[str, Any], **options: Any) -> Document:
    made = to_document(row(**fields), CorpusOptions(**options))
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        ({"id": "a", "_id": "b"}, {}, ("a", {"_id": "b"})),
        ({"_id": "b"}, {}, ("b", {})),
        ({}, {}, ("c.jsonl#7", {})),
        ({"id": "a", "key": 7}, {"id_field": "key"}, ("7", {"id": "a"})),
        ({"id": -(10**30)}, {}, (str(-(10**30)), {})),
        ({"id": " é "}, {}, (" é ", {})),
    ],
)
def test_ids(fields: dict[str, Any], options: dict[str, Any], expected: tuple[str, dict[str, Any]]) -> None:
    made = document({**fields, "text": "t"}, **options)
    assert (made.id, made.metadata) == expected


@pytest.mark.parametrize("value", [None, "", " ", 1.5, True, ["a"], {"a": 1}])
def test_what_no_id_can_be(value: Any) -> None:
    for fields, options in [({"id": value}, {}), ({"key": value}, {"id_field": "key"})]:
        with pytest.raises(CorpusError, match=r"^c\.jsonl:7: id field '(id|key)' holds .*an id is a text or an integer"):
            document({**fields, "text": "t"}, **options)


@pytest.mark.parametrize(
    ("fields", "names", "text", "metadata"),
    [
        ({"text": " a "}, (), " a ", {}),
        ({"title": "T", "text": "a"}, (), "T\na", {}),
        ({"text": "a", "title": " "}, (), "a", {}),
        ({"text": "a", "title": None}, (), "a", {}),
        ({"text": "", "title": "T"}, (), "T", {}),
        ({"text": "a", "title": 1984}, (), "1984\na", {}),
        ({"text": "a", "title": ["T"]}, (), "a", {"title": ["T"]}),
        ({"text": "a", "title": "T"}, ("text",), "a", {"title": "T"}),
        ({"q": "a", "r": "", "s": "b", "text": "c"}, ("s", "r", "q"), "b\na", {"text": "c"}),
        ({"q": "a"}, ("q", "r"), "a", {}),
        (
            {"q": 3, "r": 2.5, "s": decimal.Decimal("1.50"), "t": None, "u": float("nan")},
            ("q", "r", "s", "t", "u"),
            "3\n2.5\n1.50",
            {},
        ),
        ({"text": datetime.date(2020, 1, 2)}, (), "2020-01-02", {}),
    ],
)
def test_texts(fields: dict[str, Any], names: tuple[str, ...], text: str, metadata: dict[str, Any]) -> None:
    made = document(fields, text_fields=names)
    assert (made.text, made.metadata) == (text, metadata)


@pytest.mark.parametrize("fields", [{"text": ""}, {"text": " \n\u3000"}, {"text": None}, {"text": "", "title": "", "id": None}])
def test_rows_without_text(fields: dict[str, Any]) -> None:
    assert to_document(row(**fields), CorpusOptions()) is None


@pytest.mark.parametrize("value", [["a"], {"a": 1}, True])
def test_what_no_text_can_be(value: Any) -> None:
    with pytest.raises(CorpusError, match=r"^c\.jsonl:7: text field 'text' holds .*: text or a number is needed"):
        document({"text": value})


@pytest.mark.parametrize(
    ("value", "stored", "as_text"),
    [
        (None, None, None),
        (True, True, "true"),
        (3, 3, "3"),
        (-(2**63), -(2**63), str(-(2**63))),
        (2**63, str(2**63), str(2**63)),
        (1.5, 1.5, "1.5"),
        ("a", "a", "a"),
        ("", "", ""),
        ([], [], "[]"),
        (["a", "b"], ["a", "b"], '["a","b"]'),
        ([1, 2], [1, 2], "[1,2]"),
        ([1.5], [1.5], "[1.5]"),
        ([True], [True], "[true]"),
        ([1, True], "[1,true]", "[1,true]"),
        ([1, 2.5], "[1,2.5]", "[1,2.5]"),
        (["a", None], '["a",null]', '["a",null]'),
        ([2**63], f"[{2**63}]", f"[{2**63}]"),
        ([10**40], f"[{10**40}]", f"[{10**40}]"),
        ({"é": [1, {"b": None}]}, '{"é":[1,{"b":null}]}', '{"é":[1,{"b":null}]}'),
        (datetime.date(2020, 1, 2), datetime.date(2020, 1, 2), "2020-01-02"),
        (decimal.Decimal("1.50"), decimal.Decimal("1.50"), "1.50"),
        ([datetime.date(2020, 1, 2)], '["2020-01-02"]', '["2020-01-02"]'),
    ],
)
def test_metadata(value: Any, stored: Any, as_text: Any) -> None:
    for options, expected in [({}, stored), ({"string_fields": ("A Field.x",)}, as_text)]:
        found = document({"text": "t", "A Field.x": value}, **options).metadata
        assert found == {"A Field.x": expected}
        assert type(found["A Field.x"]) is type(expected)


@given(st.integers(), st.sampled_from(["id", "n", "deep", "list"]))
@settings(deadline=None)
def test_integers_of_any_size_keep_their_digits(number: int, field: str) -> None:
    value = {"deep": {"a": [number]}, "list": [number, "x"]}.get(field, number)
    lines = io.BytesIO(json.dumps({"text": "t", field: value}).encode())
    (found,) = read_corpus(["-"], CorpusOptions(string_fields=("n",)), CorpusReport(), stdin=lines)
    shown = found.id if field == "id" else found.metadata[field]
    assert re.search(r"-?\d+", shown)[0] == str(number)  # type: ignore[index]


@pytest.mark.parametrize("value", [[1, 2.5], "[1, 2.5]", "[1e0,25e-1]"])
def test_vectors(value: Any) -> None:
    made = document({"text": "t", "v": value, "w": 1}, vector_field="v")
    assert made.vector == [1.0, 2.5]
    assert made.metadata == {"w": 1}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "holds null, not a list"),
        ("x", "holds 'x', not a list"),
        ("{}", "holds an object, not a list"),
        ([], "not a list of numbers"),
        ([1, "2"], "not a list of numbers"),
        ([1, True], "not a list of numbers"),
        ([[1.0]], "not a list of numbers"),
        ([1, float("nan")], "NaN or infinity"),
        ([1, float("inf")], "NaN or infinity"),
        ([10**400], "NaN or infinity"),
        ([0, -0.0], "all zero"),
    ],
)
def test_what_no_vector_can_be(value: Any, words: str) -> None:
    with pytest.raises(CorpusError, match=rf"^c\.jsonl:7: vector field 'v' .*{words}"):
        document({"text": "t", "v": value}, vector_field="v")


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        (
            {"txt": "a", "n": 1},
            {},
            "no field 'text'; the row has: 'txt', 'n'; did you mean 'txt'\\? name .* text with --text-field",
        ),
        ({"Text": "a"}, {}, "did you mean 'Text'"),
        ({"zzz": "a"}, {}, "the row has: 'zzz'; name the"),
        ({}, {}, "the row has: none"),
        ({"title": "a"}, {}, "no field 'text'"),
        (
            {"text": "a", "body": "b"},
            {"text_fields": ("bdoy", "abstract")},
            "no field 'bdoy' or 'abstract'; .*did you mean 'body'",
        ),
        ({"text": "a", "key": 1}, {"id_field": "kye"}, "no field 'kye'; .*did you mean 'key'\\? name .* id with --id-field"),
        (
            {"text": "a", "vec": [1]},
            {"vector_field": "vector"},
            "no field 'vector'; .*did you mean 'vec'\\? name .*--vector-field",
        ),
        ({str(number): 1 for number in range(50)}, {}, "'19', …; name"),
    ],
)
def test_a_field_that_is_not_there(fields: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = put(tmp_path / "c.jsonl", as_jsonl([fields, {"text": "t"}]))
    for keep_going in (False, True):  # a misspelt name must not reject a whole corpus
        message = fault(path, keep_going=keep_going, **options)
            assert message.startswith(f"{path}:1: no field '")
        assert re.search(words, message)


def test_a_field_that_is_missing_later_is_a_rejected_row(tmp_path: Path) -> None:
    path = put(tmp_path / "c.jsonl", 'oops\n{"text":"a"}\n{"txt":"b"}\n{"text":"c"}\n')
    report = CorpusReport()
    assert [document.text for document in documents(path, report, keep_going=True)] == ["a", "c"]
    assert report.rejected == 2
    other = put(tmp_path / "d.jsonl", '{"txt":"b"}\n')
    assert fault([path, other], keep_going=True).startswith(f"{other}:1: no field")


# JSON Lines


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text":', "not valid JSON (unexpected end of data at column"),
        (b'{"text":NaN}', "not valid JSON ("),
        (b'{"text":1e999}', "not valid JSON ("),
        (b'{"text":"\\ud800"}', "not valid JSON ("),
        (b'{"text":"a"} x', "not valid JSON ("),
        (b"[" * 5000, "not valid JSON ("),
        (b'["a"]', "a JSON array where an object is needed"),
        (b'"a"', "a JSON string where"),
        (b"7", "a JSON number where"),
        (b"null", "a JSON null where"),
        (b"true", "a JSON boolean where"),
        (b'{"text":"caf\xe9"}', "not UTF-8 (byte 0xe9 at offset 12)"),
    ],
)
def test_lines_that_are_no_rows(line: bytes, words: str, tmp_path: Path) -> None:
    path = put(tmp_path / "c.jsonl", b'{"text":"a"}\n\n' + line + b'\r\n{"text":"b"}\n')
    message = fault(path)
    assert message.startswith(f"{path}:3: {words}")
    assert message.endswith("with --keep-going")
    report, rejects = CorpusReport(), []
    kept = list(read_corpus([path], CorpusOptions(keep_going=True), report, lambda *what: rejects.append(what)))
    assert [(document.text, document.ordinal) for document in kept] == [("a", 0), ("b", 2)]
    assert rejects == [(message, line)]
    assert report == CorpusReport(rows=3, rejected=1, first_rejected=message)


def test_rows_report_what_they_reject_too(tmp_path: Path) -> None:
    path = put(tmp_path / "c.jsonl", 'x\n{"a":1}\ny\n')
    report, rejects = CorpusReport(), []
    rows = list(read_rows([path], CorpusOptions(keep_going=True), report, lambda *what: rejects.append(what)))
    assert [(row.fields, row.ordinal) for row in rows] == [({"a": 1}, 1)]
    assert [raw for _, raw in rejects] == [b"x", b"y"]
    assert (report.rows, report.rejected, report.first_rejected) == (3, 2, rejects[0][0])


@pytest.mark.parametrize("depth", [300, 1000])
def test_deep_nesting_is_told_not_crashed_on(depth: int, tmp_path: Path) -> None:
    """JSON may nest deeper than orjson writes, and deeper than Python recurses."""
    deep = '{"a":' * depth + "1e30" + "}" * depth
    path = put(tmp_path / "c.jsonl", f'{{"text":"t"}}\n{{"text":"t","deep":{deep}}}\n')
    report = CorpusReport()
    found = documents(path, report, keep_going=True)
    if depth == 300:
        assert found[1].metadata["deep"] == deep.replace("1e30", "1e+30")
    else:
        assert (report.rejected == 1) == ("nested too deeply" in report.first_rejected) == (len(found) == 1)


# CSV and TSV


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "-2", "", "0"], [1, -2, None, 0]),
        (["9223372036854775807", "-9223372036854775808"], [2**63 - 1, -(2**63)]),
        (["9223372036854775808", "1"], ["9223372036854775808", "1"]),
        (["007", "8"], ["007", "8"]),
        (["+4912345", "1"], ["+4912345", "1"]),
        (["1", "2.5", "-1e-3", ".5"], [1.0, 2.5, -0.001, 0.5]),
        (["1.5", "9007199254740993"], ["1.5", "9007199254740993"]),
        (["1.5", "007.5"], ["1.5", "007.5"]),
        (["1.5", "nan"], ["1.5", "nan"]),
        (["1e999"], ["1e999"]),
        (["1.", "2."], ["1.", "2."]),
        (["1_000"], ["1_000"]),
        (["٣"], ["٣"]),
        ([" 1"], [" 1"]),
        (["true", "False", "", "TRUE"], [True, False, None, True]),
        (["true", "1"], ["true", "1"]),
        (["", ""], [None, None]),
        (["a", "", "1"], ["a", None, "1"]),
    ],
)
def test_column_types(cells: list[str], expected: list[Any], tmp_path: Path) -> None:
    table = [{"id": str(at), "text": "7", "c": cell, "s": cell, "k": cell} for at, cell in enumerate(cells)]
    path = put(tmp_path / "c.csv", as_table(table))
    found = documents(path, string_fields=("s",))
    assert [document.metadata["c"] for document in found] == expected
    assert [type(document.metadata["c"]) for document in found] == list(map(type, expected))
    assert [document.metadata["s"] for document in found] == [cell or None for cell in cells]
    assert [(document.id, document.text) for document in found] == [(str(at), "7") for at in range(len(cells))]
    assert [d.text for d in documents(path, text_fields=("k",))] == [cell for cell in cells if cell.strip()]


def test_ids_and_texts_of_tables_stay_as_written(tmp_path: Path) -> None:
    path = put(tmp_path / "c.csv", "_id,title,text,key\n007,1.50,2.0,1e3\n")
    (found,) = documents(path)
    assert (found.id, found.text, found.metadata) == ("007", "1.50\n2.0", {"key": 1000.0})
    (found,) = documents(path, id_field="key", text_fields=("title",))
    assert (found.id, found.text, found.metadata) == ("1e3", "1.50", {"_id": "007", "text": 2.0})
    (found,) = documents(put(tmp_path / "v.csv", 'text,v\na,"[1, 2]"\n'), vector_field="v")
    assert found.vector == [1.0, 2.0]


@pytest.mark.parametrize(("cell", "kind"), [("unknown", "integers"), ("3.5", "integers"), ("9" * 100, "integers")])
def test_a_later_cell_that_does_not_fit(cell: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_SAMPLE_ROWS", 3)
    path = put(tmp_path / "c.csv", f"text,year\na,1\nb,2\nc,3\nd,{cell}\ne,5\n")
    message = fault(path)
    shown = cell if len(cell) < 60 else "9" * 56 + "…"
    assert message.startswith(f"{path}:5: column 'year' holds '{shown}' where the rows before hold {kind}")
    assert message.endswith("--string-field year")
    report, rejects = CorpusReport(), []
    kept = list(read_corpus([path], CorpusOptions(keep_going=True), report, lambda *what: rejects.append(what)))
    assert [document.metadata["year"] for document in kept] == [1, 2, 3, 5]
    assert rejects == [(message, orjson.dumps({"text": "d", "year": cell}))]
    assert [document.metadata["year"] for document in documents(path, string_fields=("year",))] == ["1", "2", "3", cell, "5"]


def test_types_are_told_from_ten_thousand_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [*(f"t,{number}" for number in range(9_999)), "t,x"]
    assert documents(put(tmp_path / "c.csv", "\n".join(["text,n", *lines])))[0].metadata == {"n": "0"}
    assert ":10002: column 'n'" in fault(put(tmp_path / "d.csv", "\n".join(["text,n", "t,1", *lines])))
    monkeypatch.setattr(corpora, "_SAMPLE_CHARACTERS", 1000)  # fewer where they are long
    assert ":10001: column 'n'" in fault(put(tmp_path / "c.csv", "\n".join(["text,n", *lines])))


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        ("", ":1", "no header line"),
        ("\n \n", ":2", "column 1 has no name"),
        ("text,,b\n", ":1", "column 2 has no name"),
        ("a,text,a\n", ":1", "two columns are named 'a'"),
        ('"text\na,b\n', ":1", "cells cannot be told apart"),
        (b"t\xe9xt,b\n", ":1", "not UTF-8 (byte 0xe9 at offset 1)"),
    ],
)
def test_headers_that_are_none(content: bytes | str, place: str, words: str, tmp_path: Path) -> None:
    path = put(tmp_path / "c.csv", content)
    for keep_going in (False, True):
        assert fault(path, keep_going=keep_going).startswith(f"{path}{place}: {words}")


@pytest.mark.parametrize(
    ("bad", "words", "raw"),
    [
        (b"x,1,2", "3 cells where the header has 2", None),
        (b"x", "1 cells where the header has 2", None),
        (b'"x" y,1', "cells cannot be told apart", None),
        (b'"x,1', "cells cannot be told apart", None),
        (b"caf\xe9,1", "not UTF-8 (byte 0xe9 at offset 3)", None),
        (b'"one\ncaf\xe9",1', "line 5 is not UTF-8 (byte 0xe9 at offset 3)", None),
    ],
)
def test_rows_of_tables_that_are_none(bad: bytes, words: str, raw: bytes | None, tmp_path: Path) -> None:
    path = put(tmp_path / "c.csv", b'text,n\r\n"a\r\nb",1\r\n' + bad + b"\r\nc,2\r\n")
    message = fault(path)
    assert message.startswith(f"{path}:4: {words}")
    report, rejects = CorpusReport(), []
    kept = list(read_corpus([path], CorpusOptions(keep_going=True), report, lambda *what: rejects.append(what)))
    assert [(document.text, document.id, document.ordinal) for document in kept] == [
        ("a\r\nb", f"{path}#1", 0),
        ("c", f"{path}#3", 2),
    ]
    assert rejects == [(message, raw)]
    assert kept[1].place == f"{path}:{6 if b'one' in bad else 5}"


def test_quotes_in_tsv_survive(tmp_path: Path) -> None:
    lines = [
        "text\tn\tnote",
        'a 5" pipe\t1\tx"y"',
        '"Hello" she said\t2\tx',
        '"never closed\t3\tx',
        '"a ""b""\tc\nd"\t4\tx',
        'plain\t5\t"x" and "y"',
        'last "\t6\t"',
    ]
    found = documents(put(tmp_path / "c.tsv", "\n".join(lines)))
    assert [document.text for document in found] == [
        'a 5" pipe',
        '"Hello" she said',
        '"never closed',
        'a "b"\tc\nd',
        "plain",
        'last "',
    ]
    assert [document.metadata["n"] for document in found] == [1, 2, 3, 4, 5, 6]
    assert [document.metadata["note"] for document in found] == ['x"y"', "x", "x", "x", '"x" and "y"', '"']
    assert [document.place.rpartition(":")[2] for document in found] == ["2", "3", "4", "5", "7", "8"]


def test_very_long_cells(tmp_path: Path) -> None:
    path = put(tmp_path / "c.csv", "text,n\n" + "x" * 3_000_000 + ",1\n")
    assert len(documents(path)[0].text) == 3_000_000


# Parquet


def test_parquet_values_keep_their_types(tmp_path: Path) -> None:
    moment = datetime.datetime(2020, 1, 2, 3, 4, 5, 678901)
    table = pa.table(
        {
            "id": pa.array([2**40], pa.int64()),
            "text": pa.array(["t"], pa.large_string()),
            "day": pa.array([moment.date()]),
            "at": pa.array([1577934245678901234], pa.timestamp("ns")),
            "zone": pa.array([moment], pa.timestamp("us", "UTC")),
            "time": pa.array([1_001], pa.time64("ns")),
            "cost": pa.array([decimal.Decimal("1.50")]),
            "kind": pa.array(["a"]).dictionary_encode(),
            "huge": pa.array([2**64 - 1], pa.uint64()),
            "tags": pa.array([["a", "b"]]),
            "times": pa.array([[1_001]], pa.list_(pa.timestamp("ns"))),
            "object": pa.array([{"a": 1, "b": [None]}]),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "null": pa.array([None]),
            "image": pa.array([b"\x00\xff"]),
            "held": pa.array([{"bytes": b"\xff"}]),
            "vector": pa.array([[1.0, 0.5]], pa.list_(pa.float32(), 2)),
        }
    )
    (found,) = documents(put(tmp_path / "c.parquet", as_parquet(table)), vector_field="vector")
    assert (found.id, found.text, found.vector) == (str(2**40), "t", [1.0, 0.5])
    assert found.metadata == {
        "day": moment.date(),
        "at": moment,
        "zone": moment.replace(tzinfo=datetime.timezone.utc),
        "time": datetime.time(0, 0, 0, 1),
        "cost": decimal.Decimal("1.50"),
        "kind": "a",
        "huge": str(2**64 - 1),
        "tags": ["a", "b"],
        "times": '["1970-01-01T00:00:00.000001"]',
        "object": '{"a":1,"b":[null]}',
        "map": '[["k",1]]',
        "null": None,
    }


def test_parquet_at_fault(tmp_path: Path) -> None:
    table = pa.table({"text": ["t"], "image": [b"\xff"], "far": pa.array([2**40], pa.timestamp("s"))})
    path = put(tmp_path / "c.parquet", as_parquet(table.drop_columns(["far"])))
    for options in ({"text_fields": ("image",)}, {"id_field": "image"}, {"vector_field": "image"}):
        assert fault(path, keep_going=True, **options).startswith(f"{path}: column 'image' is of type binary: convert it")
    good = as_parquet(table)
    twice = as_parquet(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]))
    for content, words in [
        (b"", "not a sound Parquet file ("),
        (b"PAR1 nonsense PAR1", "not a sound Parquet file ("),
        (good[:-9], "not a sound Parquet file ("),
        (good, "not a sound Parquet file ("),  # a date beyond the year 9999
        (twice, "two columns are named 'a'"),
    ]:
        for compression in COMPRESSIONS:
            path = put(tmp_path / f"bad.parquet{compression}", PACK[compression](content))
            assert fault(path, keep_going=True).startswith(f"{path}: {words}")


# Files and folders


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outside = put(tmp_path / "outside/o.txt", "outside")
    inside = ["a-b.txt", "a.txt", "a/b.md", "a/c/d.jsonl", "a/c/z.csv.gz", "a0.rst"]
    for name in inside:
        content = b'{"text":"j"}' if "json" in name else gzip.compress(b"text\nz\n") if ".gz" in name else b"t"
        put(tmp_path / "tree" / name, content)
    for name in [".hidden.txt", ".git/x.txt", "a/.b.md", "notes.docx", "data.json", "README", "x.gz"]:
        put(tmp_path / "tree" / name, "nothing")
    (tmp_path / "tree/empty.txt").mkdir()
    (tmp_path / "tree/link.txt").symlink_to("a/b.md")
    (tmp_path / "tree/leaves.txt").symlink_to(outside)
    (tmp_path / "tree/broken.txt").symlink_to("nowhere.txt")
    (tmp_path / "tree/loop.txt").symlink_to("loop.txt")
    (tmp_path / "tree/up").symlink_to(tmp_path / "tree", target_is_directory=True)
    (tmp_path / "tree/out").symlink_to(tmp_path / "outside", target_is_directory=True)
    expected = sorted([f"tree/{name}" for name in [*inside, "link.txt"]])
    for source in ("tree", "./tree/", "tree/a/.."):
        rows = read_rows([source], CorpusOptions(), CorpusReport())
        assert [row.place.partition(":")[0] for row in rows] == expected
    assert [document.text for document in documents("tree/leaves.txt")] == ["outside"]  # named, so meant
    assert [document.id for document in documents("tree/out")] == ["tree/out/o.txt"]
    assert [document.id for document in documents("tree/.git")] == ["tree/.git/x.txt"]
    monkeypatch.chdir(tmp_path / "outside")
    assert [document.id for document in documents(".")] == ["o.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not Unicode exist on Linux")
def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9 \\.txt")).write_text("t")
    (found,) = documents(str(tmp_path))
    assert found.id == f"{tmp_path}/caf\\xe9 \\.txt"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", r"an empty path"),
        ("none.jsonl", r"No such file or directory: check the path"),
        ("c.docx", r"unknown kind of file: embell reads \.jsonl .*\.rst, each also with \.gz \.xz \.zst$"),
        ("c.gz", r"unknown kind of file"),
        ("c.json", r"unknown kind .*JSON Lines.*name it \.jsonl"),
        ("c.JSON.gz", r"unknown kind .*JSON Lines"),
        ("folder", r"no file to read in this folder: embell reads \.jsonl"),
    ],
)
def test_paths_that_give_nothing(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("c.docx", "c.gz", "c.json", "c.JSON.gz", "folder/.hidden.txt", "folder/x.json", "good.jsonl"):
        put(tmp_path / file, '{"text":"t"}')
    message = fault(["good.jsonl", name], keep_going=True)
    assert re.search(words, message)
    assert not name or message.startswith(f"{name}: ")
    # Told before anything is read.
    with pytest.raises(CorpusError):
        next(read_rows(["good.jsonl", name], CorpusOptions(), CorpusReport()))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "f/c.jsonl", '{"text":"t"}')

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "open", refuse, raising=False)  # root may read whatever the mode says
        assert fault(path) == f"{path}: cannot be read (Permission denied): check the file and its permissions"
    monkeypatch.setattr(os, "scandir", refuse)
    assert fault(str(tmp_path)).startswith(f"{tmp_path}: cannot be read (Permission denied): check the folder")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_broken_compression(suffix: str, compression: str, tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(2000)]
    packed = PACK[compression](WRITE.get(suffix, as_jsonl)(rows))
    for content in (b"not compressed", packed[:-3], packed + b"trailing"):
        path = put(tmp_path / f"c{suffix}{compression}", content)
        message = fault(path, keep_going=True)
        assert message.startswith(f"{path}: broken {compression} compression (")
        assert message.endswith("): fetch or compress the file anew")


def test_texts_that_are_not_utf8(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", b"ok " * 3 + b"caf\xe9")
    put(tmp_path / "b.txt", "good")
    message = fault(str(tmp_path))
    assert message.startswith(f"{tmp_path}/a.txt: not UTF-8 (byte 0xe9 at offset 12)")
    report = CorpusReport()
    assert [document.text for document in documents(str(tmp_path), report, keep_going=True)] == ["good"]
    assert report.first_rejected == message


def test_an_error_of_the_caller_is_not_the_corpus(tmp_path: Path) -> None:
    path = put(tmp_path / "c.jsonl", 'oops\n{"text":"t"}\n')

    def full(message: str, raw: bytes | None) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        list(read_corpus([path], CorpusOptions(keep_going=True), CorpusReport(), full))


@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.lists(st.sampled_from(['"', ",", "\t", "\n", "\r", "text", "id", "1", "x y", "\0", "é"])).map("".join),
    ),
    suffix=st.sampled_from([".jsonl", ".csv", ".tsv", ".parquet", ".txt"]),
    compression=st.sampled_from(COMPRESSIONS),
    packed=st.booleans(),
    keep_going=st.booleans(),
    head=st.sampled_from([b"", b"text\tid\n", b"text,id\n", b'{"text":"a"}\n', b"PAR1"]),
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_give_documents_or_one_line(
    content: bytes | str,
    suffix: str,
    compression: str,
    packed: bool,
    keep_going: bool,
    head: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = head + (content.encode() if isinstance(content, str) else content)
    path = put(tmp_path_factory.mktemp("any") / f"c{suffix}{compression}", PACK[compression](data) if packed else data)
    report = CorpusReport()
    message, found = "", []
    try:
        found = documents(path, report, keep_going=keep_going)
    except CorpusError as error:
        message = str(error)
    if message:
        assert message.startswith(path)
        assert len(message.splitlines()) == 1
    else:
        assert len(found) + report.empty + report.rejected == report.rows
        assert all(document.text.strip() and document.id for document in found)


# Streaming


class Endless(io.RawIOBase):
    """JSON Lines without end, counting what is taken."""

    def __init__(self) -> None:
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        line = b'{"text":"again"}\n'
        buffer[: len(line)] = line
        self.taken += len(line)
        return len(line)


def test_stdin_is_read_as_it_comes() -> None:
    endless = Endless()
    rows = read_corpus(["-"], CorpusOptions(), CorpusReport(), stdin=io.BufferedReader(endless))
    assert len(list(itertools.islice(rows, 3))) == 3
    assert endless.taken < 200


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_files_are_read_as_they_are_needed(suffix: str, compression: str, tmp_path: Path) -> None:
    """The first rows come from a file that is broken farther on, and closing early leaves nothing open."""
    rows = [{"text": os.urandom(20).hex()} for _ in range(30_000)]
    content = WRITE[suffix](rows)
    packed = PACK[compression](content)[:-2000] if compression else content + b"\n\xff\n"
    path = put(tmp_path / f"c{suffix}{compression}", packed)
    report = CorpusReport()
    reading = read_corpus([path], CorpusOptions(), report)
    assert next(reading).text == rows[0]["text"]
    assert report.rows == 1
    assert isinstance(reading, Iterator)
    reading.close()  # type: ignore[attr-defined]
    assert path in fault(path)


def big(suffix: str, rows: Iterable[dict[str, Any]]) -> bytes:
    return as_parquet(list(rows), row_group_size=500) if suffix == ".parquet" else WRITE[suffix](list(rows))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_corpus(
    suffix: str, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "_SAMPLE_ROWS", 100)
    rows = [{"text": os.urandom(1000).hex()} for _ in range(5_000)]
    path = put(tmp_path / f"c{suffix}{compression}", PACK[compression](big(suffix, rows)))
    del rows
    documents(put(tmp_path / f"warm{suffix}{compression}", PACK[compression](WRITE[suffix]([{"text": "t"}]))))
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        peak_arrow = 0
        for _ in read_corpus([path], CorpusOptions(), CorpusReport()):
            peak_arrow = max(peak_arrow, pa.total_allocated_bytes() - arrow)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_500_000  # of 10 MB of text
    assert peak_arrow < 4_000_000
