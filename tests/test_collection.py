"""Collections: what `add`, `search`, `similar` and `delete` promise, against brute force where there is one."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import topic_rows
from embell import Collection, CollectionError, CorpusError, Document, Encoder, UsageError
from embell.engine import collection as collection_module
from embell.engine.seen import Places, SeenIds
from embell.engine.snapshot import Snapshot
from embell.indexers.codes import renormalise
from tiny_models import tiny_encoder_directory

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    path = tmp_path_factory.mktemp("tiny")
    tiny_encoder_directory(path, "llama")
    return Encoder.load(path, dtype="float32")


def documents(n: int, start: int = 0, word: str = "number") -> list[Document]:
    return [
        Document(f"d{i}", f"text {word} {i} of {i * i}", {"n": i, "even": i % 2 == 0, "name": f"x{i % 7}"})
        for i in range(start, start + n)
    ]


def content(collection: Collection) -> dict[str, Any]:
    names = ["id", "text", *collection.store.metadata_types]
    return {row["id"]: {name: row[name] for name in names} for row in collection.store.scan(names)}


def vectors_of(collection: Collection) -> dict[str, Array]:
    """The vector of each document: its stored row, renormalised."""
    return {row["id"]: renormalise(np.array([row["vector"]], np.float16))[0] for row in collection.store.scan(["id", "vector"])}


def brute_force(collection: Collection, query: Array, k: int, keep: Any = lambda row: True) -> list[tuple[str, float]]:
    rows = [row for row in collection.store.scan(["key", "id", "vector", *collection.store.metadata_types]) if keep(row)]
    scored = [
        (float(query.astype(np.float64) @ renormalise(np.array([row["vector"]], np.float16))[0].astype(np.float64)), row)
        for row in rows
    ]
    scored.sort(key=lambda pair: (-pair[0], pair[1]["key"]))
    return [(row["id"], score) for score, row in scored[:k]]


@pytest.mark.parametrize("index", ["exact", "faiss:Flat", "faiss:HNSW16"])
def test_search_is_brute_force_at_every_filter_and_after_every_change(tiny: Encoder, tmp_path: Path, index: str) -> None:
    collection = Collection.create(tmp_path / "c", tiny, index=index)
    collection.add(documents(300))
    filters = {
        None: lambda row: True,
        "n < 3": lambda row: row["n"] < 3,
        "even AND n >= 50": lambda row: row["even"] and row["n"] >= 50,
        "name = 'x3' OR n = 299": lambda row: row["name"] == "x3" or row["n"] == 299,
        "n IN (7)": lambda row: row["n"] == 7,
        "n > 1000": lambda row: False,
    }

    def check() -> None:
        questions = ["text number 17 of 289", "something else entirely"]
        for where, keep in filters.items():
            for k in (1, 10, 400):
                for question, hits in zip(questions, collection.search(questions, k, where=where), strict=True):
                    expected = brute_force(collection, tiny.encode(question, "query")[0], k, keep)
                    assert [hit.id for hit in hits] == [name for name, _ in expected]
                    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], rtol=0, atol=1e-12)

    check()
    collection.add(documents(12, start=300))  # fewer than a tenth: outside the index, found all the same
    assert collection.manifest.rows == 312
    assert collection._look().covered == 300
    check()
    collection.delete(["d17", "d3", "d301"])
    check()
    collection.add([Document("d20", "text number 17 of 289", {"n": 20, "even": True, "name": "x6"})])
    assert collection.search("text number 17 of 289", 1)[0].id == "d20"
    check()
    collection.optimize()
    assert collection._look().outside == 0
    check()


def test_add_encodes_only_what_is_new_or_changed(tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    assert collection.add(documents(20)).encoded == 20
    keys = {row["id"]: row["key"] for row in collection.store.scan(["id", "key"])}
    before = vectors_of(collection)
    monkeypatch.setattr(tiny, "encode", lambda *args, **kwargs: pytest.fail("encoded again"))
    again = collection.add(documents(20))
    assert (again.documents, again.encoded, again.unchanged, again.missing) == (20, 0, 20, 0)
    changed = [Document(d.id, d.text, {**d.metadata, "n": 1000 + i}) for i, d in enumerate(documents(20))]
    report = collection.add(changed[:5])
    assert (report.encoded, report.updated, report.missing) == (0, 5, 15)
    assert content(collection)["d2"]["n"] == 1002
    np.testing.assert_array_equal(vectors_of(collection)["d2"], before["d2"])
    monkeypatch.undo()
    report = collection.add([Document("d4", "another text", {"n": 4})])
    assert (report.encoded, len(collection)) == (1, 20)
    row = next(row for row in collection.store.scan(["id", "key", "text"]) if row["id"] == "d4")
    assert row["text"] == "another text"
    assert row["key"] > max(keys.values())  # changed text gets a new key
    collection.delete(["d4"])
    collection.add([Document("d4", "third text", {})])
    assert (
        next(r["key"] for r in collection.store.scan(["id", "key"]) if r["id"] == "d4") > row["key"]
    )  # keys are never used again


def test_prune_deletes_what_left_the_source_and_nothing_else(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add(documents(10))
    report = collection.add(documents(6, start=4), prune=True)
    assert (report.missing, report.pruned, report.unchanged) == (4, 4, 6)
    assert sorted(content(collection)) == sorted(f"d{i}" for i in range(4, 10))


def test_commits_come_in_groups_and_an_error_keeps_what_came_before(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)

    def source() -> Iterator[Document]:
        yield from documents(30)
        raise CorpusError("corpus.jsonl:31: broken")

    with pytest.raises(CorpusError, match="31: broken"):
        collection.add(source(), commit_rows=8)
    assert len(Collection.open(tmp_path / "c", tiny)) == 30


def test_a_repeated_id_names_both_places(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    far = [Document(f"d{i}", f"t {i}", place=f"a.jsonl:{i + 1}") for i in range(1500)]
    with pytest.raises(CorpusError, match=r"b.txt: the id 'd3' stands here a second time, first at a.jsonl:4"):
        collection.add([*far, Document("d3", "again", place="b.txt")])
    assert len(collection) == 1500
    with pytest.raises(CorpusError, match="document 2: the id 'x' stands here a second time, first at document 1"):
        collection.add([Document("x", "one"), Document("x", "two")])


@given(st.lists(st.lists(st.integers(0, 60), max_size=20), max_size=12))
def test_seen_ids_find_every_repeat_and_its_first_place(batches: list[list[int]]) -> None:
    seen, first, place = SeenIds(), {}, 0
    for batch in batches:
        numbers = np.arange(place, place + len(batch))
        repeats = dict(seen.add(np.array(batch, np.int64), numbers)) if batch else {}
        for row, value in enumerate(batch):
            assert (row in repeats) == (value in first)
            first.setdefault(value, place + row)
        place += len(batch)
    assert all((value in seen) == (value in first) for value in range(61)) or not any(batches)


def test_places_keep_file_and_line() -> None:
    places = Places()
    given_places = ["a.jsonl:7", "x:y/b.csv:12", "c.txt", "a.jsonl:8"]
    numbers = [places.number(Document("i", "t", place=place), 5) for place in given_places]
    assert [places.name(number) for number in numbers] == given_places
    assert places.name(places.number(Document("i", "t"), 5)) == "document 5"


def test_metadata_keeps_its_types(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    day = datetime.date(2020, 2, 29)
    metadata = {
        "whole": 7, "part": 0.5, "yes": True, "word": "it's", "tags": ["a", "b"], "day": day, "nothing": None,
        "inner": {"a": [1, None]}, "huge": 2**70, "dotted.name": 1, "key": "mine", "mixed": [1, "a"],
    }  # fmt: skip
    collection.add([Document("a", "some text", metadata), Document("b", "other text", {"late": 1})])
    hit = collection.search("some text", 1)[0]
    assert hit.metadata == {
        "whole": 7, "part": 0.5, "yes": True, "word": "it's", "tags": ["a", "b"], "day": day,
        "inner": '{"a":[1,null]}', "huge": str(2**70), "dotted_name": 1, "key_": "mine", "mixed": '[1,"a"]',
    }  # fmt: skip
    assert [
        h.id
        for h in collection.search("text", where="word = 'it''s' AND yes AND day < DATE '2021-01-01' AND array_has(tags, 'b')")
    ] == ["a"]
    assert [h.id for h in collection.search("text", where="late = 1")] == ["b"]
    collection.add([Document("c", "third", {"whole": 1.5})])  # a fraction widens the column
    assert [h.id for h in collection.search("text", where="whole = 1.5")] == ["c"]
    with pytest.raises(
        CorpusError, match=r"d.csv:9: field 'part' holds text \('many'\), but the column holds numbers.*--string-field part"
    ):
        collection.add([Document("d", "text", {"part": "many"}, place="d.csv:9")])


def test_offset_minimum_score_and_batches(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add(documents(50))
    all_hits = collection.search("text number 3", 50)
    assert collection.search("text number 3", 5, offset=7) == all_hits[7:12]
    assert collection.search("text number 3", 5, offset=60) == []
    limit = all_hits[20].score
    assert collection.search("text number 3", 50, min_score=limit) == all_hits[:21]
    assert [hit.id for hit in collection.search(["text number 3", "text number 4"], 3)[0]] == [hit.id for hit in all_hits[:3]]
    assert collection.search([], 3) == []
    by_vector = collection.search(5 * tiny.encode(["text number 3"], "query"), 3)
    assert [hit.id for hit in by_vector[0]] == [hit.id for hit in all_hits[:3]]
    for call in (
        lambda: collection.search("x", 0),
        lambda: collection.search("x", 1, offset=-1),
        lambda: collection.search(" "),
        lambda: collection.search("x", where="no_such = 1"),
        lambda: collection.search("x", where="n = 'a'"),
        lambda: collection.search("x", where="n ="),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(CollectionError, match="4 wide"):
        collection.search(np.ones((1, 4)), 1)
    with pytest.raises(CollectionError, match="NaN"):
        collection.search(np.full((1, tiny.dim), np.nan), 1)


def test_similar_leaves_the_document_itself_out(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add([*documents(30), Document("twin", documents(30)[4].text, {"n": -1})])
    hits = collection.similar("d4", 5)
    query = vectors_of(collection)["d4"]
    assert [hit.id for hit in hits] == [name for name, _ in brute_force(collection, query, 6, lambda row: row["id"] != "d4")][:5]
    assert (hits[0].id, hits[0].score) == ("twin", pytest.approx(1.0, abs=1e-6))
    assert [hit.id for hit in collection.similar("d4", 1, where="n = 9")] == ["d9"]
    with pytest.raises(CollectionError, match="no document with the id 'nobody'"):
        collection.similar("nobody")


def test_delete_is_all_or_nothing_for_ids(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add([*documents(5), Document("it's", "quoted")])
    with pytest.raises(CollectionError, match="'d9'; nothing was deleted"):
        collection.delete(["d1", "d9"])
    assert len(collection) == 6
    assert collection.delete(["it's", "d1"]) == 2
    assert collection.delete(where="n > 2") == 2
    with pytest.raises(UsageError, match="wrong"):
        collection.delete(where="wrong = 1")
    assert sorted(content(collection)) == ["d0", "d2"]


@pytest.fixture
def long_documents() -> list[Document]:
    rows = topic_rows()
    cats, money, space = (" ".join(row["text"] for row in rows if row["topic"] == topic) for topic in ("cats", "money", "space"))
    return [Document("a", f"{cats} {money}"), Document("b", f"{space} {cats}"), Document("c", money, {"n": 1})]


def test_chunks_give_the_best_piece_of_each_document(mini: Encoder, tmp_path: Path, long_documents: list[Document]) -> None:
    collection = Collection.create(tmp_path / "c", mini, chunk=12)
    report = collection.add(long_documents)
    assert (report.documents, report.rows) == (3, len(collection))
    assert len(collection) > 6
    text = {d.id: d.text for d in long_documents}
    hits = collection.search("a telescope in orbit", 3)
    assert next(hit.id for hit in hits) == "b"
    assert sorted(hit.id for hit in hits) == ["a", "b", "c"]
    every = collection.search("a telescope in orbit", 100, chunks=True)
    assert len(every) == len(collection)
    for hit in every:
        assert hit.start is not None
        assert hit.text == text[hit.id][hit.start : hit.end]
    for hit in hits:
        assert hit == next(one for one in every if one.id == hit.id)
    assert collection.add(long_documents).encoded == 0
    shorter = [Document("a", "A kitten."), *long_documents[1:]]
    report = collection.add(shorter)
    assert (report.encoded, report.unchanged) == (1, 2)
    assert [hit.text for hit in collection.search("kitten", 100, chunks=True) if hit.id == "a"] == ["A kitten."]
    assert collection.similar("a", 5)[0].id == "b"
    assert collection.delete(["b"]) > 1
    assert {hit.id for hit in collection.search("anything", 50, chunks=True)} == {"a", "c"}
    with pytest.raises(CollectionError, match="holds chunks"):
        collection.duplicates()
    assert collection.add([shorter[2]], prune=True).pruned == 1


def test_vectors_of_ones_own(tiny: Encoder, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 6)) * 3
    collection = Collection.create(tmp_path / "c", None, dim=6)
    report = collection.add(Document(f"d{i}", f"text {i}", vector=row.tolist()) for i, row in enumerate(rows))
    assert report.encoded == 20
    hits = collection.search(rows[:2], 20)
    cosine = renormalise(rows[:2]).astype(np.float64) @ renormalise(rows).astype(np.float64).T
    assert [hit.id for hit in hits[0]] == [f"d{i}" for i in np.argsort(-cosine[0])]
    np.testing.assert_allclose([hit.score for hit in hits[0]], np.sort(cosine[0])[::-1], atol=2e-3)
    assert collection.add(Document(f"d{i}", f"text {i}", vector=row.tolist()) for i, row in enumerate(rows)).unchanged == 20
    with pytest.raises(CollectionError, match="text queries need the model"):
        collection.search("words")
    with pytest.raises(CollectionError, match="6 wide, those of the model 32"):
        Collection.open(tmp_path / "c", tiny)
    for vector, message in (
        ([1.0] * 5, "5 wide"),
        ([float("nan")] * 6, "NaN"),
        ([0.0] * 6, "all zeros"),
        (None, "has no vector"),
    ):
        with pytest.raises(CollectionError, match=rf"f.jsonl:3: .*{message}"):
            collection.add([Document("x", "t", vector=vector, place="f.jsonl:3")])
    assert len(collection) == 20


def test_another_model_is_refused(tiny: Encoder, mini: Encoder, tmp_path: Path) -> None:
    Collection.create(tmp_path / "c", tiny).add(documents(3))
    with pytest.raises(CollectionError, match="made with another model"):
        Collection.open(tmp_path / "c", mini)
    assert Collection.open(tmp_path / "c").search("text", 1)  # finds its own again
    directory = Path(tiny.spec.backbone)
    kept = tmp_path / "kept"
    shutil.copytree(directory, kept)
    try:
        tiny_encoder_directory(directory, "llama", seed=5)
        with pytest.raises(CollectionError, match=r"made with another model .*fingerprint"):
            Collection.open(tmp_path / "c").search("text", 1)
    finally:
        shutil.rmtree(directory)
        shutil.copytree(kept, directory)


def test_what_is_no_collection_is_refused_and_left_alone(tiny: Encoder, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CollectionError, match="no such collection"):
        Collection.open(tmp_path / "nowhere")
    with pytest.raises(CollectionError, match="not a collection"):
        Collection.open(tmp_path / "notes")
    with pytest.raises(CollectionError, match=r"not empty .*mine.txt"):
        Collection.create(tmp_path / "notes", tiny)
    with pytest.raises(CollectionError, match="a file"):
        Collection.create(tmp_path / "file", tiny)
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    Collection.create(tmp_path / "c", tiny)
    with pytest.raises(CollectionError, match="there is a collection already"):
        Collection.create(tmp_path / "c", tiny)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    for change, message in (({"format": 99}, "newer embell"), ({"indx": 1}, "did you mean 'index'")):
        (tmp_path / "c" / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises((CollectionError, Exception), match=message):
            Collection.open(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("{")
    with pytest.raises(CollectionError, match="damaged"):
        Collection.open(tmp_path / "c")


def test_the_index_is_derived_and_may_be_deleted(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add(documents(40))
    before = collection.search("text number 9", 7)
    shutil.rmtree(tmp_path / "c" / "index")
    assert Collection.open(tmp_path / "c", tiny).search("text number 9", 7) == before


def test_an_open_reader_sees_what_another_writer_adds(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    reader = Collection.open(tmp_path / "c", tiny)
    assert reader.search("text", 5) == []
    collection.add(documents(5))
    assert len(reader.search("text", 9)) == 5
    Collection.open(tmp_path / "c", tiny).delete(["d1"])
    assert len(reader.search("text", 9)) == 4


def test_a_collection_that_was_made_anew_is_not_answered_from_the_old_one(tiny: Encoder, tmp_path: Path) -> None:
    made = Collection.create(tmp_path / "c", tiny)
    made.add(documents(5))
    reader = Collection.open(tmp_path / "c", tiny)
    assert len(reader.search("text", 9)) == 5
    made.add(documents(2, start=5))
    assert len(reader) == 7
    shutil.rmtree(tmp_path / "c")
    again = Collection.create(tmp_path / "c", tiny)
    again.add(documents(5, word="other"))
    again.add(documents(2, start=5, word="other"))  # as many versions of the table
    for use in (lambda: reader.search("text"), lambda: reader.add(documents(1)), lambda: reader.delete(["d1"])):
        with pytest.raises(CollectionError, match="made anew since it was opened here; open it again"):
            use()
    assert all("other" in hit.text for hit in Collection.open(tmp_path / "c", tiny).search("text", 9))


def test_duplicates_of_a_collection(mini: Encoder, tmp_path: Path) -> None:
    rows = topic_rows()
    collection = Collection.create(tmp_path / "c", mini)
    collection.add(Document(row["id"], row["text"]) for row in rows)
    copies = [Document("copy", rows[0]["text"].upper() + "  "), Document("near", "Shares fell sharply on a Monday.")]
    collection.add([*copies, Document("gone", "Astronauts have repaired the station.")])
    collection.delete(["gone"])
    found = collection.duplicates(0.9)
    assert {(row.id, row.kept_id, row.kind) for row in found.dropped} == {
        ("copy", "cats-0", "exact"),
        ("near", "money-1", "semantic"),
    }
    assert found.kept == [row["id"] for row in rows]
    assert sorted(map(sorted, found.groups)) == [["cats-0", "copy"], ["money-1", "near"]]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_widening_that_was_cut_short_is_finished(tiny: Encoder, tmp_path: Path, steps: int) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add(documents(4))
    table = collection.store._table
    table.add_columns({"n__as_float": "CAST(n AS DOUBLE)"})
    if steps == 2:
        table.drop_columns(["n"])
    collection.add([Document("new", "a text", {"n": 0.5})])
    assert {name: row["n"] for name, row in content(collection).items()} == {"d0": 0, "d1": 1, "d2": 2, "d3": 3, "new": 0.5}
    assert [hit.id for hit in collection.search("text", where="n = 0.5")] == ["new"]


@pytest.mark.parametrize("writer", ["optimize", "delete"])
def test_a_widening_that_was_cut_short_is_finished_by_every_writer(
    tiny: Encoder, tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add(documents(4))
    table = collection.store._table
    table.add_columns({"n__as_float": "CAST(n AS DOUBLE)"})
    table.drop_columns(["n"])
    monkeypatch.setattr(collection_module, "_REBUILD_SHARE", 10)
    if writer == "optimize":
        collection.optimize()
    else:
        assert collection.delete(where="n = 3") == 1
    opened = Collection.open(collection.path, tiny)
    opened.add([Document("new", "a text", {"n": 0.5})])
    assert [hit.metadata["n"] for hit in opened.search("text", where="n < 1.5", k=3)].count(0.5) == 1
    assert {hit.id for hit in opened.search("text", where="n < 1.5", k=9)} == {"d0", "d1", "new"}


def test_a_hit_that_another_thread_sees_deleted_gives_its_place_to_the_next(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection_module, "_REBUILD_SHARE", 10)
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add(documents(6))
    collection.add([Document("new", "a new text", {})])  # outside the index
    other = Collection.open(collection.path, tiny)
    found = Snapshot.search

    def then_deleted(snapshot: Snapshot, *given: Any) -> Any:
        answer = found(snapshot, *given)
        if len(other) == 7:
            other.delete(["new"])
            collection.store.refresh()  # as the other thread's search does
        return answer

    monkeypatch.setattr(Snapshot, "search", then_deleted)
    hits = collection.search("a new text", 3)
    assert len(hits) == 3
    assert "new" not in {hit.id for hit in hits}


def test_keys_that_a_killed_writer_gave_are_not_given_again(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add(documents(4))

    def killed(next_key: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collection, "commit_manifest", killed)
    late = [Document(f"late{number}", f"late text {number}", {}) for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        collection.add(late)
    monkeypatch.undo()
    opened = Collection.open(collection.path, tiny)
    assert len(opened) == 7
    opened.optimize()
    opened.delete([document.id for document in late])
    others = [Document(f"other{number}", f"quite another text {number}", {}) for number in range(3)]
    opened.add(others)
    for document in others:
        hit = opened.search(document.text, 1)[0]
        assert (hit.id, hit.text) == (document.id, document.text)
        assert hit.score > 0.999


@pytest.mark.parametrize(
    "name", ["_rowid", "_rowaddr", "_rowoffset", "", "back`tick", "with space", "Ünï", "1st", "a/b", "x__as_float", "select"]
)
def test_metadata_fields_may_have_any_name(tiny: Encoder, tmp_path: Path, name: str) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add([Document("a", "some text", {name: 1, "x": 2})])
    collection.add([Document("b", "other text", {name: 3})])
    (column,) = set(collection.store.metadata_types) - {"x"}
    assert content(collection)["a"][column] == 1
    assert [hit.id for hit in collection.search("text", where=f"`{column}` = 3")] == ["b"]


def test_fields_that_would_share_a_column_are_refused(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    with pytest.raises(CorpusError, match="share the column 'a_b'"):
        collection.add([Document("x", "text", {"a.b": 1, "a_b": 2})])


def test_conditions_see_metadata_only_and_are_read_to_their_end(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add([Document("a", "one", {"key": 5}), Document("b", "two", {"key": 9})])
    assert [hit.id for hit in collection.search("one", where="key_ > 6")] == ["b"]
    assert [hit.id for hit in collection.search("one", where="id = 'key'")] == []
    assert [hit.id for hit in collection.search("one", where="(text = ')' OR id IN ('b', '?', ')$1'))")] == ["b"]
    collection.add([Document("c", "three", {"what (?": 1})])
    assert [hit.id for hit in collection.search("one", where="`what (?` = 1")] == ["c"]
    collection.delete(where="id = 'c'")
    beyond = ("id = 'a')", "id = 'a') x", "id = 'a') OR (true", "id = 'a'))))", "(id = 'a'", ")", "key_ = ?", "key_ = $1")
    for where in ("key > 6", "vector IS NULL", "", "  ", "1 = 1 -- x", "id = 'a'; drop", *beyond):
        with pytest.raises(UsageError):
            collection.search("one", where=where)
        with pytest.raises(UsageError):
            collection.delete(where=where)
    assert len(collection) == 2


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_least_score_that_is_none_is_refused(score: float, tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    collection.add([Document("a", "one")])
    with pytest.raises(UsageError, match="min_score"):
        collection.search("one", min_score=score)


def test_what_cannot_be_used_is_handed_over_and_the_rest_goes_in(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    rows = [
        Document("a", "one", {"n": 1}),
        Document("b", "  "),
        Document("a", "again"),
        Document("c", "two", {"n": "x", "new": 1}),
        Document("d", "three"),
    ]
    told: list[str] = []
    report = collection.add(rows, on_reject=lambda error, document: told.append(document.id))
    assert (told, report.documents, report.encoded) == (["b", "a", "c"], 2, 2)
    assert sorted(content(collection)) == ["a", "d"]
    assert "new" not in collection.store.metadata_types
    for chunk in (None, 16):
        with pytest.raises(CorpusError, match=r"f.txt:2: has no text"):
            Collection.create(tmp_path / f"c{chunk}", tiny, chunk=chunk).add([Document("x", " ", place="f.txt:2")])


def test_a_bad_vector_loses_nothing_that_came_before_it(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", None, dim=3)
    good = [Document(f"d{i}", "text", vector=[1.0, i, 0.0]) for i in range(300)]
    with pytest.raises(CollectionError, match="2 wide"):
        collection.add([*good, Document("bad", "text", vector=[1.0, 2.0])])
    assert len(collection) == 300
    collection.add([Document("large", "text", vector=[1e30, 0.0, 0.0]), Document("small", "text", vector=[0.0, 0.0, 1e-30])])
    scores = {hit.id: hit.score for hit in collection.search(np.array([[0.0, 0.0, 1e-30]]), 400)[0]}
    assert scores["small"] == pytest.approx(1)
    assert scores["large"] == pytest.approx(0)


def test_a_model_that_gives_nan_is_refused(tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection.create(tmp_path / "c", tiny)
    monkeypatch.setattr(tiny, "encode", lambda texts, **kwargs: np.full((len(texts), tiny.dim), np.nan, np.float32))
    with pytest.raises(CollectionError, match=r"f:1: the model gave a vector with NaN"):
        collection.add([Document("x", "text", place="f:1")])
    assert len(collection) == 0


def test_an_index_that_is_damaged_or_too_large_for_the_rows_does_no_harm(tiny: Encoder, tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "c", tiny, index="faiss:IVF64,Flat")
    collection.add(documents(20))
    assert collection.manifest.recall == 1.0  # too few rows to train: exact
    before = collection.search("text number 3", 5)
    collection.add(documents(3000))
    assert collection.manifest.recall is None
    assert (tmp_path / "c" / "index" / str(collection.manifest.generation) / "index.faiss").exists()
    generation = tmp_path / "c" / "index" / str(collection.manifest.generation)
    truth = brute_force(collection, tiny.encode("text number 3", "query")[0], 5)
    (generation / "index.faiss").unlink()
    assert [hit.id for hit in Collection.open(tmp_path / "c", tiny).search("text number 3", 5)] == [name for name, _ in truth]
    (generation / "vectors.npy").write_bytes((generation / "vectors.npy").read_bytes()[:500])
    assert [hit.id for hit in Collection.open(tmp_path / "c", tiny).search("text number 3", 5)] == [name for name, _ in truth]
    again = Collection.open(tmp_path / "c", tiny)
    again.add(documents(1))
    assert again._look().outside == 0
    assert before
    with pytest.raises(UsageError, match="32 wide"):
        Collection.create(tmp_path / "d", tiny, index="faiss:PQ33")
