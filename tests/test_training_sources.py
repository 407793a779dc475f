"""What weights that ship may be trained on."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from embell import CorpusError, UsageError
from embell.training import sources

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


def test_rows_of_compressed_tables_are_read_without_quoting(tmp_path: Path) -> None:
    with lzma.open(tmp_path / "a.tsv.xz", "wt", encoding="utf-8") as file:
        file.write('one\ttwo\n"open\tand 5" more\n')
    assert list(sources.read_rows(tmp_path / "a.tsv.xz")) == [{"one": '"open', "two": 'and 5" more'}]
