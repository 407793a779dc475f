"""Near-duplicates of a collection, and the list of pairs beside it: what is reused is what a fresh search finds."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embell import Collection, CollectionError, Document, Encoder, UsageError
from embell.engine import collection_pairs, pair_search, search_parts
from embell.engine.duplicates import Duplicates
from embell.engine.lexical import lexical_pairs
from embell.engine.normalise import normalise
from embell.engine.saved_pairs import SavedPairs
from embell.indexers import exact
from tiny_models import tiny_encoder_directory

Array = np.ndarray[Any, Any]

DIM = 16
THRESHOLD = {"threshold": 0.7, "lexical": 0.6}


@pytest.fixture(autouse=True)
def every_lexical_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """With these bands no pair is missed: MinHash as it is used finds 99 of 100 pairs right at the threshold."""
    monkeypatch.setattr(pair_search, "lexical_pairs", partial(lexical_pairs, permutations=512, recall=1 - 1e-9))


def documents(n: int, start: int = 0, seed: int = 0) -> list[Document]:
    """Texts that share words and directions, some of them copies; a copy has the vector of its original."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5, DIM))
    texts: list[str] = []
    rows: dict[str, Array] = {}
    found = []
    for at in range(start + n):
        if texts and rng.random() < 0.2:
            text = f" {rng.choice(texts).upper()}"
        else:
            text = " ".join(f"w{word}" for word in rng.integers(0, 6, rng.integers(2, 7)))
        texts.append(text)
        vector = rows.setdefault(normalise(text), centres[rng.integers(5)] + 0.3 * rng.standard_normal(DIM))
        year = None if at % 5 == 0 else 2000 + at * 7 % 20
        found.append(Document(f"d{at}", text, {"year": year, "topic": f"t{at % 3}"}, vector=vector.tolist()))
    return found[start:]


def made(path: Path, docs: Sequence[Document]) -> Collection:
    collection = Collection.create(path, None, dim=DIM)
    if docs:
        collection.add(docs)
    return collection


def result(found: Duplicates) -> tuple[Any, ...]:
    return found.kept, found.dropped, found.pairs.to_pylist(), found.capped, found.groups, found.kept_positions.tolist()


def fresh(tmp_path: Path, collection: Collection, **options: Any) -> tuple[Any, ...]:
    """The same, without any list; the list of the collection stays what it is."""
    there, aside = collection.path / "duplicates", tmp_path / "aside"
    if there.exists():
        there.rename(aside)
    found = result(collection.duplicates(**options))
    shutil.rmtree(there, ignore_errors=True)
    if aside.exists():
        aside.rename(there)
    return found


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows already known with each search for pairs."""
    calls: list[int] = []
    find = collection_pairs.find_pairs

    def counted(*args: Any, **options: Any) -> Any:
        known = options.get("known")
        calls.append(0 if known is None else known.rows)
        return find(*args, **options)

    monkeypatch.setattr(collection_pairs, "find_pairs", counted)
    return calls


def test_the_list_is_kept_and_cut_again_at_higher_thresholds(tmp_path: Path, searches: list[int]) -> None:
    collection = made(tmp_path / "c", documents(60))
    notes: list[str] = []
    first = result(collection.duplicates(**THRESHOLD, on_note=notes.append))
    assert len(first[1]) > 15
    left = {path.name for path in (tmp_path / "c" / "duplicates").iterdir()}
    assert left - {"lock"} == {"pairs.parquet", "rows.npz"}
    assert searches == [0]
    again = Collection.open(tmp_path / "c")
    assert result(again.duplicates(**THRESHOLD, on_note=notes.append)) == first
    higher: list[dict[str, Any]] = [
        {"threshold": 0.9, "lexical": 0.6},
        {"threshold": 0.75, "lexical": 0.8},
        {"threshold": 0.8, "kinds": ["semantic"]},
        {"lexical": 0.7, "kinds": ["lexical"]},
        {"kinds": []},
        {**THRESHOLD, "keep": "last"},
        {**THRESHOLD, "keep": "longest", "rule": "components"},
        {"threshold": 0.9, "lexical": 0.8, "keep": "year:max", "rule": "complete"},
        {**THRESHOLD, "keep": "central"},
    ]
    found = [result(again.duplicates(**options, on_note=notes.append)) for options in higher]
    assert searches == [0]
    assert notes == []
    for options, what in zip(higher, found, strict=True):
        assert what == fresh(tmp_path, again, **options), options


def test_lower_thresholds_and_other_kinds_are_looked_for_anew(tmp_path: Path, searches: list[int]) -> None:
    collection = made(tmp_path / "c", documents(40))
    collection.duplicates(0.8)
    for options, said in (
        ({"threshold": 0.7}, "the semantic threshold 0.7 is below 0.8, the floor of the list of pairs"),
        (THRESHOLD, "lexical duplicates were not looked for"),
        ({"threshold": 0.7, "contained": 0.9}, "contained duplicates were not looked for"),
        ({"threshold": 0.7, "overlap": 0.5}, "overlap duplicates were not looked for"),
        ({"threshold": 0.7}, "semantic duplicates were looked for only where words overlap too"),
    ):
        notes: list[str] = []
        del searches[:]
        found = result(collection.duplicates(**options, on_note=notes.append))  # type: ignore[arg-type]
        assert notes == [f"looking for pairs anew: {said}"]
        assert searches == [0]
        assert found == fresh(tmp_path, collection, **options)


def test_only_new_rows_are_compared(tmp_path: Path, searches: list[int]) -> None:
    everything = documents(90)
    collection = made(tmp_path / "c", everything[:30])
    notes: list[str] = []
    for end in (30, 31, 60, 90):
        collection.add(everything[:end])
        found = result(collection.duplicates(**THRESHOLD, on_note=notes.append))
        assert found == result(made(tmp_path / f"c{end}", everything[:end]).duplicates(**THRESHOLD))
    assert [known for known in searches if known] == [30, 31, 60]
    assert notes == []
    # At a higher threshold too, the list keeps its floor.
    collection.add(documents(1, start=90))
    collection.duplicates(0.9, lexical=0.9)
    del searches[:]
    assert result(collection.duplicates(**THRESHOLD)) == fresh(tmp_path, collection, **THRESHOLD)
    assert searches == [0]  # that without the list


def test_changed_texts_and_metadata_are_seen(tmp_path: Path, searches: list[int]) -> None:
    everything = documents(50)
    collection = made(tmp_path / "c", everything)
    collection.duplicates(**THRESHOLD)
    changed = [
        Document("d3", everything[7].text, {"year": 1}, vector=everything[7].vector),  # now a copy
        Document("d9", "nothing like it", {"year": 2}, vector=np.eye(DIM)[0].tolist()),
        Document("d12", everything[12].text, {"year": 3}, vector=everything[4].vector),  # only its vector
        Document("d20", everything[20].text, {"year": 9999, "topic": "t1"}, vector=everything[20].vector),  # only its metadata
    ]
    collection.add(changed)
    for options in (THRESHOLD, {**THRESHOLD, "keep": "year:max"}, {**THRESHOLD, "group_by": "topic"}):
        assert result(collection.duplicates(**options)) == fresh(tmp_path, collection, **options)  # type: ignore[arg-type]
    assert "d20" in collection.duplicates(**THRESHOLD, keep="year:max").kept


@pytest.mark.parametrize("index", [False, True])
def test_deleted_rows_are_gone_and_nothing_is_compared_again(tmp_path: Path, searches: list[int], index: bool) -> None:
    collection = made(tmp_path / "c", documents(60))
    before = collection.duplicates(**THRESHOLD)
    copied = {int(name) for name in before.found.original[before.found.original != np.arange(60)]}
    alone = [f"d{at}" for at in range(60) if before.found.original[at] == at and at not in copied]
    copies = [f"d{at}" for at in range(60) if before.found.original[at] != at]
    del searches[:]
    collection.delete([*alone[:5], copies[0]])  # others hang on none of these
    if index:
        collection.optimize()
    notes: list[str] = []
    found = [result(collection.duplicates(**THRESHOLD, on_note=notes.append)) for _ in range(2)]
    assert searches == []
    assert notes == []
    assert found == [fresh(tmp_path, collection, **THRESHOLD)] * 2
    collection.add(documents(5, start=60))
    del searches[:]
    assert result(collection.duplicates(**THRESHOLD)) == fresh(tmp_path, collection, **THRESHOLD)
    assert searches == [54, 0]


def test_after_a_text_with_copies_is_deleted_pairs_are_looked_for_anew(tmp_path: Path) -> None:
    docs = documents(40)
    collection = made(tmp_path / "c", docs)
    found = collection.duplicates(**THRESHOLD)
    original = next(int(name) for at, name in enumerate(found.found.original) if name != at)
    collection.delete([f"d{original}"])
    notes: list[str] = []
    again = result(collection.duplicates(**THRESHOLD, on_note=notes.append))
    assert again == fresh(tmp_path, collection, **THRESHOLD)
    assert notes in ([], ["looking for pairs anew: rows were deleted"])
    collection.delete([f"d{at}" for at in range(40) if at != original])
    assert result(collection.duplicates(**THRESHOLD))[:2] == ([], [])
    collection.add(docs)
    assert result(collection.duplicates(**THRESHOLD)) == fresh(tmp_path, collection, **THRESHOLD)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tail_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def garbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, 3 * len(data) // 4):
        data[at] ^= 0x5A
    path.write_bytes(bytes(data))


def replaced(path: Path) -> None:
    path.write_text("something else\n" * 10)


def made_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["rows.npz", "pairs.parquet"])
@pytest.mark.parametrize("damage", [Path.unlink, emptied, halved, tail_cut, garbled, replaced])
def test_a_damaged_list_is_made_anew(tmp_path: Path, name: str, damage: Callable[[Path], None], searches: list[int]) -> None:
    collection = made(tmp_path / "c", documents(30))
    expected = result(collection.duplicates(**THRESHOLD))
    damage(tmp_path / "c" / "duplicates" / name)
    assert result(collection.duplicates(**THRESHOLD)) == expected
    assert searches == [0, 0]
    assert result(collection.duplicates(**THRESHOLD)) == expected
    assert searches == [0, 0]


def test_a_removed_or_foreign_list_is_made_anew(tmp_path: Path) -> None:
    collection = made(tmp_path / "c", documents(30))
    expected = result(collection.duplicates(**THRESHOLD))
    shutil.rmtree(tmp_path / "c" / "duplicates")
    assert result(collection.duplicates(**THRESHOLD)) == expected
    other = made(tmp_path / "other", documents(31, seed=1))
    other.duplicates(**THRESHOLD)
    for name in ("rows.npz", "pairs.parquet"):  # killed between the two
        shutil.copy(tmp_path / "other" / "duplicates" / name, tmp_path / "c" / "duplicates" / name)
        assert result(collection.duplicates(**THRESHOLD)) == expected
    (tmp_path / "c" / "duplicates" / "new").mkdir()
    (tmp_path / "c" / "duplicates" / "new" / "rows.npz").write_text("left behind")
    collection.delete(["d0"])
    assert result(collection.duplicates(**THRESHOLD)) == fresh(tmp_path, collection, **THRESHOLD)


def crowd(n: int = 120) -> list[Document]:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((3, DIM))[rng.integers(0, 3, n)] * 1.2 + rng.standard_normal((n, DIM)) * 0.5
    return [
        Document(f"d{at}", f"t{at} only" + " x" * (at * 7 % n), {"year": at * 11 % n, "topic": f"t{at % 2}"}, vector=row.tolist())
        for at, row in enumerate(rows)
    ]


def kept_are_apart(found: Duplicates, docs: Sequence[Document], threshold: float, groups: Sequence[Any] | None = None) -> None:
    rows = np.array([doc.vector for doc in docs])
    stored = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    near = (stored @ stored.T)[np.ix_(found.kept_positions, found.kept_positions)]
    if groups is not None:
        of = np.array(groups)[found.kept_positions]
        near[of[:, None] != of] = -1
    np.fill_diagonal(near, -1)
    assert near.max() < threshold


@pytest.mark.parametrize("keep", ["first", "last", "shortest", "year:max"])
def test_of_rows_with_too_many_partners_no_two_are_kept(tmp_path: Path, keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_search, "PARTNERS", 6)
    monkeypatch.setattr(exact, "FEW", 2)
    docs = crowd()
    collection = made(tmp_path / "c", docs[:70])
    for end in (70, 120, 120):
        collection.add(docs[:end])
        for threshold in (0.8, 0.9):
            found = collection.duplicates(threshold, keep=keep)
            kept_are_apart(found, docs[:end], threshold)
    assert collection.duplicates(0.8, keep=keep).capped > 20
    assert (SavedPairs.told(tmp_path / "c") or {})["capped"] > 20
    collection.delete(["d1", "d5"])
    left = [doc for doc in docs if doc.id not in ("d1", "d5")]
    kept_are_apart(collection.duplicates(0.8, keep=keep), left, 0.8)
    again = collection.duplicates(0.8, keep=keep)
    for other in ("first", "last"):
        try:
            changed = again.rethreshold(keep=other)
        except UsageError:
            continue
        kept_are_apart(changed, left, 0.8)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_of_rows_of_a_group_with_too_many_partners_no_two_are_kept(
    tmp_path: Path, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_search, "PARTNERS", 6)
    monkeypatch.setattr(exact, "FEW", 2)
    docs = crowd()
    found = made(tmp_path / "c", docs).duplicates(0.8, keep=keep, group_by="topic")
    assert found.capped > 20
    kept_are_apart(found, docs, 0.8, [doc.metadata["topic"] for doc in docs])


def test_groups_are_compared_each_for_itself(tmp_path: Path, searches: list[int]) -> None:
    docs = documents(60)
    collection = made(tmp_path / "c", docs)
    collection.duplicates(**THRESHOLD)
    for keep in ("last", "year:max"):
        found = collection.duplicates(**THRESHOLD, keep=keep, group_by="topic")
        kept, dropped = set(), set()
        for topic in ("t0", "t1", "t2"):
            alone = made(tmp_path / f"{keep[:4]}{topic}", [doc for doc in docs if doc.metadata["topic"] == topic])
            part = alone.duplicates(**THRESHOLD, keep=keep)
            kept |= set(part.kept)
            dropped |= {(row.id, row.kept_id, row.score, row.kind) for row in part.dropped}
        assert set(found.kept) == kept
        assert {(row.id, row.kept_id, row.score, row.kind) for row in found.dropped} == dropped
    del searches[:]
    collection.duplicates(**THRESHOLD)  # the list of all pairs is still there
    assert searches == []


def test_rows_are_kept_by_a_field(tmp_path: Path) -> None:
    docs = documents(60)
    collection = made(tmp_path / "c", docs)
    found = collection.duplicates(**THRESHOLD, keep="year:max")
    year = {doc.id: doc.metadata["year"] for doc in docs}
    assert len(found.dropped) > 15
    for row in found.dropped:
        assert year[row.id] is None or year[row.kept_id] >= year[row.id]
    assert collection.duplicates(**THRESHOLD, keep="topic:min").keep == "topic:min"
    for options in ({"keep": "month:max"}, {"group_by": "month"}, {"keep": "text:max"}):
        with pytest.raises(UsageError, match=r"field '(month|text)'; there are topic, year"):
            collection.duplicates(0.8, **options)  # type: ignore[arg-type]


def test_deciding_again_goes_by_what_is_known_of_the_rows(tmp_path: Path) -> None:
    collection = made(tmp_path / "c", documents(60))
    for _ in range(2):  # the second one is read from the list
        found = collection.duplicates(**THRESHOLD)
        for keep in ("longest", "shortest", "last", "central"):
            try:
                again = found.rethreshold(keep=keep)
            except UsageError:  # what it goes by was not read
                assert keep in ("longest", "shortest")
                continue
            assert again.kept == collection.duplicates(**THRESHOLD, keep=keep).kept, keep
        with pytest.raises(UsageError, match="there is no field 'year'"):
            found.rethreshold(keep="year:max")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0.0}, "the semantic threshold must"),
        ({"threshold": math.nan}, "the semantic threshold must"),
        ({"threshold": 1.5}, "the semantic threshold must"),
        ({"keep": "any"}, "keep 'any' is not known"),
        ({"rule": "any"}, "rule 'any' is not known"),
        ({"kinds": ["any"]}, "kind 'any' is not known"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_compared(
    tmp_path: Path, options: dict[str, Any], said: str, searches: list[int]
) -> None:
    with pytest.raises(UsageError, match=said):
        made(tmp_path / "c", documents(5)).duplicates(**options)
    assert searches == []


@pytest.mark.parametrize("n", [0, 1])
def test_few_documents(tmp_path: Path, n: int) -> None:
    collection = made(tmp_path / "c", documents(n))
    for options in (THRESHOLD, THRESHOLD, {**THRESHOLD, "keep": "last", "rule": "complete"}):
        found = collection.duplicates(**options)  # type: ignore[arg-type]
        assert (found.kept, found.dropped, found.pairs.num_rows) == (["d0"][:n], [], 0)


def test_a_search_that_is_cut_short_goes_on_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pair_search, exact):
        monkeypatch.setattr(module, "QUERIES", 4)
    monkeypatch.setattr(search_parts, "SAVED_SECONDS", 0)
    collection = made(tmp_path / "c", documents(60))
    expected = fresh(tmp_path, collection, **THRESHOLD)
    parts: list[tuple[str, float]] = []

    class KilledError(Exception):
        pass

    def stop(kind: str, share: float) -> None:
        parts.append((kind, share))
        if share > 0.5 and kind == "semantic":
            raise KilledError

    with pytest.raises(KilledError):
        collection.duplicates(**THRESHOLD, progress=stop)
    again: list[tuple[str, float]] = []
    found = result(Collection.open(tmp_path / "c").duplicates(**THRESHOLD, progress=lambda *part: again.append(part)))
    assert found == expected
    assert {kind for kind, _ in again} == {"semantic"}
    assert again[0][1] > 0.4
    left = {path.name for path in (tmp_path / "c" / "duplicates").iterdir()}
    assert left - {"lock"} == {"pairs.parquet", "rows.npz"}
    # What was left by a search of other vectors of the same texts is of no use.
    docs = documents(60)
    other = made(tmp_path / "other", docs)
    with pytest.raises(KilledError):
        other.duplicates(**THRESHOLD, progress=stop)
    turned = [Document(doc.id, doc.text, doc.metadata, vector=docs[at - 1].vector) for at, doc in enumerate(docs)]
    other.add(turned)
    assert result(other.duplicates(**THRESHOLD)) == fresh(tmp_path, other, **THRESHOLD)


def test_another_search_that_ends_first_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pair_search, exact):
        monkeypatch.setattr(module, "QUERIES", 4)
    monkeypatch.setattr(search_parts, "SAVED_SECONDS", 0)
    collection = made(tmp_path / "c", documents(60))
    expected = fresh(tmp_path, collection, **THRESHOLD)
    found = []

    def meanwhile(kind: str, share: float) -> None:
        if share > 0.3 and kind == "semantic" and not found:
            found.append(result(Collection.open(tmp_path / "c").duplicates(**THRESHOLD)))

    found.append(result(collection.duplicates(**THRESHOLD, progress=meanwhile)))
    assert found == [expected] * 2
    assert result(collection.duplicates(**THRESHOLD)) == expected


# Leaks.


def test_leaks_are_what_another_collection_has_too(tmp_path: Path) -> None:
    docs = documents(80)
    train, test = made(tmp_path / "train", docs[:50]), made(tmp_path / "test", docs[50:])
    test.delete(["d52"])
    found = test.leaks(train, **THRESHOLD)
    both = made(tmp_path / "both", docs)
    both.delete(["d52"])
    pairs = [row for row in both.duplicates(**THRESHOLD).found.pairs if row["first"] < 50 <= row["second"]]
    ids = [doc.id for doc in docs if doc.id != "d52"]
    texts = {doc.id: normalise(doc.text) for doc in docs}
    original = {text: name for name, text in reversed(texts.items())}
    near: dict[str, float] = {ids[row["second"]]: 0.0 for row in pairs}
    leaked = {name for name in ids[50:] if int(original[texts[name]][1:]) < 50} | set(near)
    leaked |= {name for name in ids[50:] if original[texts[name]] in near}
    assert {row.id for row in found.dropped} == leaked
    assert found.kept == [name for name in ids[50:] if name not in leaked]
    assert {row.kept_id for row in found.dropped} <= set(ids[:50])
    assert not (tmp_path / "test" / "duplicates").exists()
    assert [ids[50:][at] for at in found.kept_positions] == found.kept


def test_copies_within_a_collection_are_no_leaks(tmp_path: Path) -> None:
    rows = np.eye(DIM).tolist()
    one = made(
        tmp_path / "one",
        [Document("a", "alpha", vector=rows[0]), Document("b", "Alpha", vector=rows[0]), Document("c", "beta", vector=rows[1])],
    )
    other = made(tmp_path / "other", [Document("a", "beta", vector=rows[1]), Document("b", "BETA", vector=rows[1])])
    found = one.leaks(other, 0.9)
    assert found.kept == ["a", "b"]
    assert [(row.id, row.kept_id, row.kind) for row in found.dropped] == [("c", "a", "exact")]
    assert [tuple(row.values())[:2] for row in found.pairs.to_pylist()] in ([("a", "c")], [("a", "c"), ("b", "c")])


def test_nothing_leaks_from_or_to_an_empty_collection(tmp_path: Path) -> None:
    docs = documents(20)
    one, empty = made(tmp_path / "one", docs), made(tmp_path / "empty", [])
    assert (one.leaks(empty, **THRESHOLD).kept, one.leaks(empty, **THRESHOLD).dropped) == ([doc.id for doc in docs], [])
    assert (empty.leaks(one, **THRESHOLD).kept, empty.leaks(one, **THRESHOLD).dropped) == ([], [])
    assert one.leaks(one, **THRESHOLD).kept == []


@pytest.mark.parametrize("keep", ["first", "last", "year:min", "year:max"])
def test_copies_whose_vectors_differ_are_compared_as_they_are_kept(tmp_path: Path, keep: str) -> None:
    """A model that sees case gives copies different vectors: those of the copy that is kept count."""
    far, near = np.zeros((2, DIM), np.float32)
    far[0], near[:2] = 1, [0.6, 0.8]
    other = np.zeros(DIM, np.float32)
    other[:2] = [0.55, 0.835]
    collection = Collection.create(tmp_path / "c", None, dim=DIM)
    collection.add(
        [Document("a", "NEW TAX LAW", {"year": 1}, far), Document("b", "Something else", {"year": 2}, other),
         Document("c", "new tax law", {"year": 3}, near)]
    )  # fmt: skip
    for _ in range(2):  # then from the pairs that are kept
        found = collection.duplicates(0.95, kinds=["exact", "semantic"], keep=keep)
        first = keep in ("first", "year:min")
        assert set(found.kept) == ({"a", "b"} if first else {"c"}), keep
        assert {row.id: row.kept_id for row in found.dropped} == ({"c": "a"} if first else {"a": "c", "b": "c"})


def test_leaks_between_encoders_that_differ_in_what_does_not_matter(tmp_path: Path) -> None:
    texts = {"a": "The cat sleeps on the sofa.", "b": "Shares fell on Monday."}
    made = []
    for name, dtype in (("one", "float32"), ("other", "bfloat16")):
        made.append(Collection.create(tmp_path / name, Encoder.load(dtype=dtype)))
        made[-1].add(Document(key, text) for key, text in texts.items())
    assert {row.id: row.kept_id for row in made[0].leaks(made[1], 0.95).dropped} == {"a": "a", "b": "b"}


def test_leaks_of_collections_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = made(tmp_path / "one", documents(3))
    with pytest.raises(CollectionError, match="different models"):
        one.leaks(Collection.create(tmp_path / "other", None, dim=DIM + 1), 0.9)
    with pytest.raises(UsageError, match="the semantic threshold must"):
        one.leaks(one, 1.5)


def test_collections_of_chunks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tiny_encoder_directory(tmp_path / "model", "llama")
    chunks = Collection.create(tmp_path / "chunks", Encoder.load(tmp_path / "model", dtype="float32"), chunk=16)
    one = made(tmp_path / "one", documents(3))
    for call in (lambda: chunks.duplicates(0.9), lambda: chunks.leaks(one), lambda: one.leaks(chunks)):
        with pytest.raises(CollectionError, match="chunks: holds chunks, not whole documents"):
            call()
