"""The copy of a collection's documents: it says what the table says, about rows and about conditions."""

from __future__ import annotations

import datetime
import gc
import math
import operator
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embell import Collection, Document, UsageError
from embell.engine import collection as collection_module
from embell.errors import EmbellWarning
from embell.indexers.documents_file import DocumentsFile

DIM = 8
ROWS = 300
ODD = [math.nan, math.copysign(math.nan, -1), 0.0, -0.0, 3.0, math.inf, -math.inf, None, -2.0]


def vector(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def document(number: int, **more: Any) -> Document:
    metadata: dict[str, Any] = {
        "whole": number % 17 - 4,
        "gaps": number % 13 if number % 6 else None,
        "Part": number / 8 if number % 5 else None,
        "odd": ODD[number % len(ODD)],
        "yes": number % 3 == 0 if number % 7 else None,
        "a word": ["one", "Two", "it's", "", None][number % 5],
        "day": datetime.date(2020, 1, 1) + datetime.timedelta(number) if number % 4 else None,
        "at": datetime.datetime(2020, 1, 1, 3, 4) + datetime.timedelta(hours=number),
        "tags": ["a", "b"][: number % 3] or None,
    }
    return Document(f"d{number}", f"text {number}", {**metadata, **more}, vector(number))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    collection = Collection.create(tmp_path_factory.mktemp("documents") / "c", None, dim=DIM)
    collection.add(map(document, range(ROWS)))
    return collection


numbers = st.sampled_from(["0", "3", "-2", "12.5", "1e1", "3.0", "1000", "1e400"])
words = st.sampled_from(["'one'", "'Two'", "'it''s'", "''", "'d3'", "'%o%'", "'T_o'"])
comparisons = st.sampled_from(["=", "!=", "<>", "<", "<=", ">", ">="])
plain = st.one_of(
    st.builds("{} {} {}".format, st.sampled_from(["whole", "gaps", "Part", "odd"]), comparisons, numbers),
    st.builds("odd {} -0.0".format, comparisons),
    st.builds("{} {} {}".format, numbers, comparisons, st.sampled_from(["whole", "gaps", "Part", "odd"])),
    st.builds("{} {} {}".format, st.sampled_from(["`a word`", "id", "text"]), comparisons, words),
    st.builds("{} {}LIKE {}".format, st.sampled_from(["`a word`", "id"]), st.sampled_from(["", "NOT ", "I"]), words),
    st.builds("{} {}IN ({}, {})".format, st.sampled_from(["whole", "gaps"]), st.sampled_from(["", "NOT "]), numbers, numbers),
    st.builds("`a word` {}IN ({}, {})".format, st.sampled_from(["", "NOT "]), words, st.one_of(words, st.just("NULL"))),
    st.builds("{} BETWEEN {} AND {}".format, st.sampled_from(["whole", "Part"]), numbers, numbers),
    st.builds("{} IS {}NULL".format, st.sampled_from(["Part", "`a word`", "yes", "day", "tags"]), st.sampled_from(["", "NOT "])),
    st.sampled_from(["yes", "NOT yes", "yes = true", "yes != true", "false = yes", "gaps = NULL", "gaps > whole", "whole + 1 > Part", "whole % 2 = 0", "lower(`a word`) = 'two'"]),
    st.builds("day {} date '2020-03-01'".format, comparisons),
    st.builds("at {} timestamp '2020-01-05 00:00:00'".format, comparisons),
    st.sampled_from(["array_has(tags, 'b')", "regexp_like(id, '^d1.$')", "cast(whole as double) / 2 > 1.5", "length(text) > 6"]),
)  # fmt: skip
conditions = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.builds("({}) {} {}".format, inner, st.sampled_from(["AND", "OR"]), inner), st.builds("NOT ({}) OR {}".format, inner, inner)
    ),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(conditions)
def test_a_condition_fits_the_rows_that_lancedb_says(made: Collection, where: str) -> None:
    snapshot = made._look()
    assert snapshot.documents is not None
    found = snapshot.documents.matches(where)
    assert found is not None or "-0.0" in where
    if found is None:
        return
    try:
        right = made.store.keys(where)
    except UsageError:  # LanceDB coerces less: nobody is told something else than it would tell
        return
    assert snapshot.keys[found].tolist() == right.tolist()


@pytest.mark.parametrize(
    ("where", "looked_up"),
    [("whole < 3", True), ("3 >= gaps AND `a word` != 'it''s' OR yes = false", True), ("whole IN (1, 2) AND id = 'd5'", True),
     ("Part < 3", True), ("odd <> -0.5", True), ("Part < 9007199254740992", False), ("Part IN (0.5)", False), ("whole < 2.5", True), ("2.5 >= gaps OR whole = 1e30", True), ("NOT whole < 3", False), ("whole NOT IN (1)", False), ("gaps = NULL", False),
     ("`a word` = 3", False), ("whole < 3 AND yes", False), ("day < '2020-03-01'", False), ("whole < 9223372036854775808", False)]
)  # fmt: skip
def test_comparisons_are_looked_up_and_nothing_else(made: Collection, where: str, looked_up: bool) -> None:
    documents = made._look().documents
    assert documents is not None
    assert (documents.comparison(where) is not None) == looked_up


@pytest.mark.parametrize(
    ("where", "read"),
    [("whole<3", True), (" whole >= -3 and id<>'d5' ", True), ("text = ' AND ' AND gaps = 0", False), ("key < 3", False), ("whole < 3 OR whole > 5", False),
     ("`a word` = 'one'", False), ("id = 'it''s'", False), ("whole = 1234567890123456789", False), ("whole = 3.0", True), ("gaps > 3.5 AND whole<>0.5", True), ("odd >= 3", True), ("odd <0.25 AND Part>=1.5", True), ("odd = -0.0", True), ("Part = 9007199254740993", False), ("whole = '3'", False),
     ("true = 1", False), ("user = 'x'", True), ("current_date > 5", False), ("Whole < 3", False), ("3 < whole", False),
     ("whole = \uff13", False), ("whole\x1f< 3", False), ("text = 'a \"b\"'", True), ("whole = 1" + " " * 200_000 + "x", False)]
)  # fmt: skip
def test_the_plainest_conditions_are_read_here(tmp_path: Path, where: str, read: bool) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    collection.add(document(number, true=1, user="x", current_date=9) for number in range(20))
    snapshot = collection._look()
    assert snapshot.documents is not None
    fits = snapshot.documents.plain(where)
    assert (fits is not None) == read
    if fits is not None:
        try:
            right = collection.store.keys(where)
        except UsageError:  # LanceDB compares no whole numbers with fractions
            right = snapshot.keys[snapshot.documents.matches(f"({where})")]
        assert snapshot.keys[snapshot.documents.fitting(fits)].tolist() == right.tolist()
        assert snapshot.documents.share(fits) == pytest.approx(snapshot.documents.fitting(fits).mean())
        some = np.array([19, 3, 3, 0])
        assert snapshot.documents.fitting(fits, some).tolist() == snapshot.documents.fitting(fits)[some].tolist()


def test_rows_are_looked_up_one_by_one_in_several_batches(tmp_path: Path, made: Collection) -> None:
    file = DocumentsFile(list(made.store.batches())[0:1])
    (batch,) = file._batches
    mixed = batch.take(np.random.default_rng(1).permutation(ROWS))
    apart = DocumentsFile([mixed.slice(0, 70), mixed.slice(70, 1), mixed.slice(71)])
    some = np.random.default_rng(0).integers(0, ROWS, 100)
    for where in ("whole < 3", "gaps >= 4", "id > 'd2'", "gaps != 3 AND yes = true", "gaps IN (1, 2) OR whole = 3"):
        fits = apart.comparison(where)
        right = file.matches(where)
        assert fits is not None
        assert right is not None
        assert apart.fitting(fits, some).tolist() == right[some].tolist()
        assert apart.fitting(fits).tolist() == right.tolist()
        assert apart.share(fits) == pytest.approx(right.mean(), abs=0.05)


WHOLE = [0, -1, 3, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), None]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["=", "!=", "<>", "<", "<=", ">", ">="]),
    st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([2.0**53, 2.0**63, -(2.0**63), -1.5, 3.0, 2.5])),
)
def test_whole_numbers_are_compared_with_fractions_exactly(sign: str, value: float) -> None:
    batch = pa.record_batch({"key": pa.array(range(len(WHOLE))), "n": pa.array(WHOLE, pa.int64())})
    compare = {
        "=": operator.eq,
        "!=": operator.ne,
        "<>": operator.ne,
        "<": operator.lt,
        "<=": operator.le,
        ">": operator.gt,
        ">=": operator.ge,
    }
    right = [number is not None and compare[sign](number, value) for number in WHOLE]  # Python compares these exactly
    written = f"{value:.17e}"
    assert float(written) == value
    found = DocumentsFile([batch]).matches(f"n {sign} {written}")
    if "-0.0" not in written:
        assert found is not None
        assert found.tolist() == right


def test_what_a_search_takes_is_taken_without_the_copy_and_by_a_deletion(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    collection.add(map(document, range(100)))
    conditions = ["whole > 2.5", "whole BETWEEN -1.5 AND 2.5 OR gaps = 3.0", "day > '2020-02-01'"]
    found = [{hit.id for hit in collection.search(vector(3)[None], 100, where=where)[0]} for where in conditions]
    assert all(found)
    (collection.path / "index" / str(collection.manifest.generation) / "documents.arrow").unlink()
    bare = Collection.open(collection.path)
    with pytest.warns(EmbellWarning, match="has no documents"):
        bare.search(vector(3)[None])
    assert [{hit.id for hit in bare.search(vector(3)[None], 100, where=where)[0]} for where in conditions] == found
    with pytest.raises(UsageError, match="there is no column hole; columns are"):
        bare.search(vector(3)[None], where="hole > 2.5")
    assert collection.delete(where=conditions[0]) == len(found[0])
    assert {hit.id for hit in collection.search(vector(3)[None], 100)[0]} == {f"d{at}" for at in range(100)} - found[0]
    with pytest.raises(UsageError, match="there is no column hole; columns are"):
        collection.delete(where="hole > 2.5")


def test_keys_of_rows_that_a_killed_writer_left_are_not_given_again(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    collection.add(map(document, range(20)))
    before = collection.manifest
    collection.add([document(20, whole=1000)])
    replace(before, generation=collection.manifest.generation).write(collection.path)  # as if it had been killed before that
    (newest,) = collection._look().keys[-1:].tolist()
    again = Collection.open(collection.path)
    assert again.delete(where="whole > 999.5") == 1
    again.add([document(21)])
    assert again._look().keys[-1] > newest


def test_words_of_windows_within_strings_are_words(made: Collection) -> None:
    found = made.search(vector(3)[None], 400, where="whole < 2.5 AND text NOT LIKE '%over (select%'")[0]
    assert {hit.id for hit in found} == {f"d{at}" for at in range(ROWS) if at % 17 - 4 < 2.5}


def test_an_empty_collection_refuses_wrong_conditions(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    with pytest.raises(UsageError, match="no column typo"):
        collection.search(vector(3)[None], where="typo = 1")
    with pytest.raises(UsageError, match="no column typo"):
        collection.delete(where="typo = 1")


def asked_until_held(collection: Collection, where: str, queries: np.ndarray, most: int) -> int | None:
    """How many searches it takes until the rows that fit are held together; all of them find the same."""
    first = collection.search(queries, 7, where=where)
    condition = collection._look().conditions[where]
    for number in range(1, most + 1):
        if condition.held is not None:
            return number
        assert collection.search(queries, 7, where=where) == first
    return None


@pytest.mark.parametrize("count", [1, 5, 40])
def test_rows_that_fit_are_held_together_when_that_pays(tmp_path: Path, count: int) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=32)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1000, 32)).astype(np.float32)
    collection.add(
        Document(str(at), "x", {"n": int(n)}, row) for at, (n, row) in enumerate(zip(rng.permutation(1000), rows, strict=True))
    )
    queries = rng.standard_normal((count, 32))
    wheres = {"n < 10": 2, "n < 250": 2, "n < 500": 3, "n < 500 OR n = -1": 3, "n >= 250": 9, "n >= 100": 27}
    for where, asked in wheres.items():
        found = asked_until_held(collection, where, queries, 60)
        assert found is not None
        assert 0.6 * asked <= found <= 2 * asked + 1, where  # how many fit is known by a sample, where a few queries are asked
    assert asked_until_held(collection, "n >= 0", queries, 40) is None
    assert asked_until_held(collection, "n < 0", queries, 40) is not None


def test_rows_that_are_held_together_make_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=32)
    rng = np.random.default_rng(0)
    collection.add(Document(str(at), "x", {"n": at % 10}, rng.standard_normal(32).astype(np.float32)) for at in range(1000))
    monkeypatch.setattr("embell.engine.snapshot._HELD", 36_999)  # 1 000 and 40 for each row that fits
    asked = rng.standard_normal((1, 32))
    wheres = ["n < 3", "n > 5", "n < 5", "n <> 4"]
    right = [collection.search(asked, 7, where=where) for where in wheres]
    conditions = collection._look().conditions
    for where, found in zip(wheres, right, strict=True):
        assert conditions[where].held is None
        for _ in range(40):
            assert collection.search(asked, 7, where=where) == found
    held = [where for where in wheres if conditions[where].held is not None]
    assert held == ["n < 5"]  # those before made room for it, and the last is too large
    assert [collection.search(asked, 7, where=where) for where in wheres] == right


def test_no_question_and_a_condition_that_is_no_text(made: Collection) -> None:
    assert made.search(np.empty((0, DIM)), where="whole > -9") == []
    for where in ("id = 'caf\udce9'", "whole = 3 AND `a word` = '\udce9' OR yes"):
        with pytest.raises(UsageError, match="not UTF-8"):
            made.search(vector(3)[None], where=where)


def test_a_condition_holds_no_snapshot_that_was_replaced(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    collection.add(map(document, range(50)))
    collection.search(vector(3)[None], where="whole > -9")
    before = weakref.ref(collection._look())
    gc.disable()
    try:
        collection.add([document(60)])
        collection.search(vector(3)[None], where="whole > -9")
        assert before() is None
    finally:
        gc.enable()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_few_questions_get_the_best_rows_that_fit(made: Collection, data: st.DataObject) -> None:
    """Against a look at every row, whether or not the best of all rows were enough."""
    where = data.draw(
        st.sampled_from(
            ["whole > -3", "whole > 2", "gaps < 9", "id > 'd15' AND whole < 9", "id < 'd14'", "gaps >= 0 AND yes = true"]
        )
    )
    seed, count, k = data.draw(st.integers(0, 50)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    snapshot = made._look()
    assert snapshot.documents is not None
    fits = np.flatnonzero(snapshot.documents.matches(where))
    asked = np.stack([vector(seed + number) for number in range(count)])
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    condition = snapshot.condition(where)
    scores, keys = snapshot.search(asked, k, condition)
    every = snapshot.rows.vectors(fits).astype(np.float64) @ asked.astype(np.float64).T
    for query in range(count):
        order = np.lexsort((fits, -every[:, query]))[:k]
        assert keys[query].tolist() == snapshot.keys[fits[order]].tolist()
        assert scores[query] == pytest.approx(every[order, query], abs=1e-12)


def test_the_best_rows_are_looked_at_first_only_where_many_fit(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    near, far = np.eye(DIM, dtype=np.float32)[:2]
    towards = [near if number < 300 else far for number in range(600)]
    collection.add(
        Document(str(number), "x", {"far": int(number >= 300), "tenth": number % 10}, to + 0.01 * vector(number))
        for number, to in enumerate(towards)
    )
    snapshot = collection._look()

    def best(asked: np.ndarray[Any, Any], where: str, k: int = 5) -> tuple[Any, Any] | None:
        return snapshot._among_the_best(asked[None].astype(np.float32), k, snapshot.condition(where))

    found = best(near, "tenth < 5")
    assert found is not None
    assert (snapshot.keys[np.searchsorted(snapshot.keys, found[1][0])] % 10 < 5).all()
    assert best(near, "tenth < 1") is None  # too few
    assert best(near, "tenth < 5", k=100) is None  # too many wanted
    assert best(near, "tenth * 2 < 10") is None  # not looked up
    surplus = snapshot.condition("far = 1").surplus
    assert best(near, "far = 1") is None  # what fits is not what is asked for
    assert snapshot.condition("far = 1").surplus > surplus
    assert best(far, "far = 1") is not None
    hits = collection.search(near[None], 5, where="far = 1")[0]
    assert all(hit.metadata["far"] == 1 for hit in hits)
    assert len(hits) == 5


@pytest.mark.parametrize("sign", ["=", "!=", "<>", "<", "<=", ">", ">="])
def test_every_sign_from_either_side(made: Collection, sign: str) -> None:
    snapshot = made._look()
    assert snapshot.documents is not None
    for column, value in (("whole", "3"), ("gaps", "3"), ("`a word`", "'one'"), ("yes", "true")):
        for where in (f"{column} {sign} {value}", f"{value} {sign} {column}"):
            found = snapshot.documents.matches(where)
            assert found is not None
            assert snapshot.keys[found].tolist() == made.store.keys(where).tolist(), where


@pytest.mark.parametrize(
    "where", ["whole", "shore < 3", "whole < ", "count(*) > 1", "whole IN (SELECT 1)", "whole = 1; DROP TABLE documents", "whole IN (-0.0)", "NOT whole IN (-0)",
              "1 = 1 -- x", '`a word` = "one"', "PART > 3", "vector IS NULL", "key > 3"]
)  # fmt: skip
def test_what_the_copy_cannot_tell_is_left_to_lancedb(made: Collection, where: str) -> None:
    fresh = Collection.open(made.path)
    bare = Collection.open(made.path)
    bare._look().__dict__["documents"] = None
    answers = []
    for one in (fresh, bare):
        try:
            answers.append([hit.id for hit in one.search(vector(3)[None], 5, where=where)[0]])
        except UsageError as error:
            answers.append([str(error)])
    assert answers[0] == answers[1]


def everything(collection: Collection) -> list[Any]:
    """What searches answer, with all that they tell of the documents."""
    asked = np.stack([vector(number) for number in (3, 500)])
    return [
        collection.search(asked, k, where=where)
        for k in (4, 400)
        for where in (
            None,
            "whole > 5",
            "whole > -2 AND id < 'd7'",
            "`a word` = 'changed'",
            "Part IS NULL",
            "whole / 2.0 = 0.25 OR whole = 99",
            "whole = 8",
        )
    ]


def check(collection: Collection) -> None:
    """The copy tells what the table tells."""
    bare = Collection.open(collection.path)
    bare._look().__dict__["documents"] = None
    right = repr(everything(bare))  # NaN is like NaN there
    assert repr(everything(Collection.open(collection.path))) == repr(everything(collection)) == right


@pytest.mark.parametrize("few", [True, False])
def test_changes_after_the_copy_was_made_are_seen(few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection_module, "_CHANGED", 1000 if few else 2)
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    collection.add(map(document, range(ROWS)))
    reader = Collection.open(collection.path)
    generation = collection.manifest.generation
    check(reader)
    changed = [document(number, whole=99, **{"a word": "changed"}) for number in (3, 7, 250)]
    assert collection.add(changed).updated == 3
    check(reader)
    assert {hit.id for hit in reader.search(vector(3)[None], 400, where="whole = 99")[0]} == {"d3", "d7", "d250"}
    assert (collection.manifest.changed is not None) == few
    collection.add([document(ROWS, **{"a word": "changed"}), document(7, whole=5, Part=1.0)])
    check(reader)
    collection.delete(["d3", "d100"])
    check(reader)
    collection.add([document(5, whole=0.5)])  # the column is one of fractions now
    check(reader)
    assert all(isinstance(hit.metadata["whole"], float) for hit in reader.search(vector(9)[None], 50)[0])
    collection.add([document(6, more="a new column")])
    check(reader)
    assert [hit.id for hit in reader.search(vector(6)[None], where="more IS NOT NULL")[0]] == ["d6"]
    assert collection.manifest.generation == generation  # all of this with the copy of the beginning
    collection.optimize()
    assert collection.manifest.changed == []
    check(reader)


def test_rows_come_in_the_order_that_is_asked_for(tmp_path: Path, made: Collection) -> None:
    batches = list(made.store.batches())
    mixed = [
        batches[0].take(np.random.default_rng(0).permutation(len(batches[0]))[part]) for part in (slice(0, 100), slice(100, None))
    ]
    DocumentsFile.write(tmp_path, made.store.readable, mixed)
    file = DocumentsFile.load(tmp_path, made.store.readable)
    assert (np.diff(file.keys) > 0).all()
    positions = np.array([200, 3, 3, 299, 0])
    assert [row["id"] for row in file.rows(positions)] == [f"d{number}" for number in positions]
    assert file.rows(positions, ["text"])[0] == {"text": "text 200"}
    found = file.matches("text = 'text 200' OR whole = 4")
    assert found is not None
    assert np.flatnonzero(found).tolist() == [number for number in range(ROWS) if number == 200 or number % 17 == 8]
    assert math.isclose(file.rows(np.array([11]))[0]["Part"], 11 / 8)


def test_conditions_are_found_without_lancedb(made: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Collection.open(made.path)
    reader._look()
    monkeypatch.setattr("embell.indexers.store.Store._batches", lambda *_: pytest.fail("the table was read"))
    hits = reader.search(vector(4)[None], 3, where="whole > 5 AND yes")[0]
    assert len(hits) == 3
    assert all(hit.metadata["yes"] and hit.metadata["whole"] > 5 for hit in hits)


def test_what_is_neither_true_nor_false_is_not_false(made: Collection) -> None:
    """LanceDB 0.40 leaves out the rows without a value here where it has a scalar index on the column."""
    expected = {f"d{number}" for number in range(ROWS) if number % 7 == 0 or number % 3 == 0}
    hits = made.search(vector(0)[None], ROWS, where="NOT (yes IS FALSE)")[0]
    assert {hit.id for hit in hits} == expected
    keys = set(made.store.keys("NOT (yes IS FALSE)").tolist())  # as without the copy, and for a deletion
    assert {row["id"] for row in made.store.rows(sorted(keys)).values()} == expected


def test_rows_of_keys_that_are_gone_are_not_those_of_others(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    collection.add(map(document, range(20)))
    collection.delete(["d7"])
    collection.optimize()
    snapshot = collection._look()
    assert snapshot.documents is not None
    assert {key: row["id"] for key, row in snapshot.documents_of([6, 7, 8, 19, 20]).items()} == {6: "d6", 8: "d8", 19: "d19"}


@pytest.mark.parametrize(
    ("where", "said"),
    [("hole > 3", "there is no column hole; columns are"),
     ("whole >", "Expected: an expression, found: ) or the end; columns"), ("whole > 5 5", "Expected: ), found: 5; columns"),
     ("sum(whole) > 1", "not supported in a condition; columns"), ("fool(whole) > 1", "Invalid function 'fool'")]
)  # fmt: skip
def test_a_wrong_condition_is_told_without_what_nobody_wrote(made: Collection, where: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        made.search(vector(3)[None], where=where)
    assert str(refused.value).startswith(f"--where {where!r}: {said}")
    assert "SELECT" not in str(refused.value)


@pytest.mark.parametrize(
    "where",
    ["row_number() OVER (ORDER BY whole) <= 2", "row_number() over(PARTITION BY whole ORDER BY gaps) > 1", "unnest(tags) = 'a'", "whole > (SELECT 1)",
     "whole IN (SELECT whole)", "count(*) OVER () > 1",
     "/*'*/ row_number() OVER (ORDER BY whole) <= 2 /*'*/"]
)  # fmt: skip
@pytest.mark.parametrize("copy", [True, False])
def test_what_is_no_condition_on_a_row_alone_is_refused(tmp_path: Path, where: str, copy: bool) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    collection.add(map(document, range(50)))
    if not copy:
        collection._look().__dict__["documents"] = None
    with pytest.raises(UsageError):
        collection.search(vector(3)[None], where=where)
    with pytest.raises(UsageError):
        collection.delete(where=where)
    assert len(collection) == 50
