"""What weights that ship may be trained on."""

from __future__ import annotations

import json
import lzma
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from embell import CorpusError, UsageError
from embell.training import sources, variants

NOUNS = ["river", "bridge", "engine", "vector", "sentence", "bank", "galaxy", "soup", "kitten", "market", "teacher", "window"]
VERBS = ["crosses", "builds", "reads", "follows", "paints", "forgets", "measures", "opens", "carries", "answers"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    sentences = [f"The {a} {verb} the {b} near a {c}." for a in NOUNS for verb in VERBS for b in NOUNS[:5] for c in NOUNS[9:11]]
    parts = [sentences[begin : begin + 40] for begin in range(0, len(sentences), 40)]
    rows = [{"id": str(n), "title": f"About {n}", "text": " ".join(part)} for n, part in enumerate(parts)]
    (folder / "text" / "factbook.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sts").mkdir()
    held = "\n".join(f"1\t{sentence.upper()}\tunrelated words" for sentence in sentences[::2])
    (folder / "sts" / "test.tsv").write_text(f"score\tsentence1\tsentence2\n{held}\n")
    return folder


def test_only_sources_on_the_list_are_read() -> None:
    assert [source.path for source in sources.select(["text/factbook.jsonl"])] == ["text/factbook.jsonl"]
    for refused in ("text/reuters21578.jsonl.xz", "dup/mrpc-train.tsv.xz", "sts/stsb-train.tsv", "pairs/banking77-test.tsv"):
        with pytest.raises(UsageError, match="may not be trained on"):
            sources.select([refused])
    assert all(source.licence for source in sources.SHIPPABLE)


def test_held_out_sentences_are_left_out_whatever_their_case(data: Path) -> None:
    chosen = sources.select(["text/factbook.jsonl"])
    groups, counts = sources.collect(data, chosen, 1.0, 0)
    texts = [text for group in groups for text in group]
    assert counts == {"text/factbook.jsonl": len(texts)}
    marks = [sources.fingerprint(text) for text in texts]
    assert len(set(marks)) == len(marks) > 20
    held_out = sources.held_out(data)
    assert len(held_out) == 601
    assert not set(marks) & held_out
    assert sources.collect(data, chosen, 1.0, 0)[0] == groups
    assert sources.collect(data, chosen, 1.0, 1)[0] != groups
    with pytest.raises(CorpusError, match="no such file"):
        sources.collect(data, sources.select(["dict/wordset.tsv.xz"]), 1.0, 0)


def test_pieces_are_short_runs_of_a_text_s_words() -> None:
    text = "Heat transfer at high speed, and the boundary layer that was seen (in 1954) because it grew; so."
    found = sources.pieces_of([text], 10)
    assert set(found) == {"Heat transfer at high speed", "the boundary layer"}  # "it grew" is too short
    assert sources.pieces_of([text], 1)[0] in found
    assert sources.pieces_of([text], 1) == sources.pieces_of([text], 1)
    long = " ".join(["word"] * 9)
    assert sources.pieces_of([long], 3) == []


def test_pieces_change_no_other_text(data: Path) -> None:
    (source,) = sources.select(["text/factbook.jsonl"])
    plain, fewer = sources.collect(data, [replace(source, pieces=0)], 1.0, 0)
    groups, counts = sources.collect(data, [source], 1.0, 0)
    assert source.pieces > 0
    assert counts["text/factbook.jsonl"] > fewer["text/factbook.jsonl"]
    known = {text for group in plain for text in group}
    assert [[text for text in group if text in known] for group in groups] == plain
    added = {text for group in groups for text in group} - known
    assert all(any(piece in text for text in known) for piece in added)


def test_the_whole_mix_has_each_text_once_but_for_what_is_no_running_text(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (running,) = sources.select(["text/factbook.jsonl"])
    (captions,) = sources.select(["pairs/snli-dev.tsv.xz"])
    (data / "pairs").mkdir(exist_ok=True)
    with lzma.open(data / captions.path, "wt", encoding="utf-8") as file:
        file.write("premise\thypothesis\n")
        file.writelines(f"A {one} is near the {other}.\tThe {other} is red.\n" for one in NOUNS for other in NOUNS[:5])
    monkeypatch.setattr(sources, "SHIPPABLE", (replace(running, texts=60), captions))
    groups, counts = sources.whole_mix(data, 1.0, 0)
    assert sum(map(len, groups)) == sum(counts.values())
    times = Counter(sources.fingerprint(text) for group in groups for text in group)
    assert not set(times) & sources.held_out(data)
    assert set(times.values()) == {1, 2}
    assert sum(count == 2 for count in times.values()) == counts["again"] == counts[captions.path]
    assert sum(count == 1 for count in times.values()) == counts[running.path] + counts["edits"]
    once, _ = sources.collect(data, [replace(running, texts=60)], 1.0, 0)
    assert counts[running.path] > 2 * sum(map(len, once))
    assert 0 < counts["edits"] < counts[running.path]
    assert sources.whole_mix(data, 1.0, 0) == (groups, counts)


def test_edits_are_few_and_the_same_for_the_same_text() -> None:
    text = "In 1954 the old bridge carried 12 trains a day."
    found = variants.edited([text], 100, {"bridge": ["road"], "trains": ["cars"]}, ["Nobody knew."])
    assert text not in found
    assert f"{text} Nobody knew." in found
    assert any(re.fullmatch(r"In \d{4} the old bridge carried \d\d trains a day\.", one) for one in found)
    assert any("road" in one or "cars" in one for one in found)
    assert "In 1954 old bridge carried 12" in [" ".join(one.split()[:6]) for one in found]  # as a headline
    assert variants.edited([text], 2, {}, ["Nobody knew."]) == variants.edited([text], 2, {}, ["Nobody knew."])
    assert len(variants.edited([text], 2, {}, ["Nobody knew."])) == 2
    assert variants.edited(["long " * 60], 5, {}, ["Nobody knew."]) == []


def test_words_are_exchanged_for_those_of_the_same_places() -> None:
    found = variants.exchangeable(["A dog runs home.", "A cat runs home.", "A cat eats here.", "A bird eats here."])
    assert found == {"dog": ["cat"], "cat": ["dog", "bird"], "bird": ["cat"]}


def test_a_headline_is_a_clause_without_articles_and_auxiliaries() -> None:
    text = "The new bridge over the river was opened by the mayor of Oslo, which is far away."
    for seed in range(20):
        title = variants.headline(text, random.Random(seed))
        assert title is not None
        words = title.split()
        assert 6 <= len(words) <= 9
        assert words == ["new", "bridge", "over", "river", "opened", "by", "mayor", "of", "Oslo"][: len(words)]
    assert variants.headline("It was the end, as they say.", random.Random(0)) is None


def test_rows_of_compressed_tables_are_read_without_quoting(tmp_path: Path) -> None:
    with lzma.open(tmp_path / "a.tsv.xz", "wt", encoding="utf-8") as file:
        file.write('one\ttwo\n"open\tand 5" more\n')
    assert list(sources.read_rows(tmp_path / "a.tsv.xz")) == [{"one": '"open', "two": 'and 5" more'}]
