"""The command line as users meet it: real processes, real files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from click.shell_completion import BashComplete

from conftest import TOPICS, Ran, topic_rows, write_jsonl
from embell.cli.main import cli

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", topic_rows())


@pytest.fixture(scope="module")
def collection(embell: Run, corpus: Path) -> Path:
    target = corpus.parent / "topics.embell"
    done = embell("index", corpus, "--to", target, "--json")
    assert done.status == 0, done
    (record,) = done.lines
    assert {name: record[name] for name in ("documents", "encoded", "unchanged", "missing", "rejected", "truncated")} == {
        "documents": 12, "encoded": 12, "unchanged": 0, "missing": 0, "rejected": 0, "truncated": 0,
    }  # fmt: skip
    assert record["seconds"] > 0
    return target


def test_help_imports_neither_torch_nor_lancedb() -> None:
    code = "import sys, embell.cli.main as m\ntry: m.main()\nexcept SystemExit: pass\nprint([n for n in ('torch', 'lancedb', 'numpy', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    ["index", "search", "similar", "dedup", "info", "optimize", "tune", "delete", "encode", "evaluate", "train", "demo"],
)
def test_every_command_explains_itself(inside: Run, command: str) -> None:
    done = inside(command, "--help")
    assert done.status == 0
    assert done.out.startswith(f"Usage: embell {command}") or done.out.startswith("Usage: python -m embell")
    assert max(map(len, done.out.splitlines())) <= 100
    assert "\\b" not in done.out
    examples = [line for line in done.out.splitlines() if line.startswith(f"  embell {command} ")]
    assert examples or command == "info" or command == "demo"


def test_indexing_again_encodes_nothing_and_a_changed_row_once(inside: Run, corpus: Path, tmp_path: Path) -> None:
    target = tmp_path / "c with space.embell"
    rows = topic_rows()
    source = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"id": "empty", "text": "  "}])
    first = inside("index", source, "--to", target)
    assert "12 documents in" in first.out
    assert "1 row without text skipped, the first is" in first.err
    assert "rows.jsonl:13" in first.err
    rows[3]["text"] = "Entirely new words."
    write_jsonl(source, rows[1:])
    (again,) = inside("index", source, "--to", target, "--json").lines
    assert (again["documents"], again["encoded"], again["unchanged"], again["missing"]) == (11, 1, 10, 1)
    (pruned,) = inside("index", source, "--to", target, "--prune", "--json").lines
    assert (pruned["encoded"], pruned["pruned"], pruned["rows"]) == (0, 1, 11)


def test_search_answers_by_meaning(inside: Run, collection: Path) -> None:
    done = inside("search", collection, "a tired kitten", "-k", "3", "--json")
    assert done.status == 0, done
    assert [set(line) for line in done.lines] == [{"query", "rank", "id", "score", "text", "metadata"}] * 3
    assert [line["rank"] for line in done.lines] == [1, 2, 3]
    first = done.lines[0]
    assert first["query"] == "a tired kitten"
    assert first["id"].startswith("cats-")
    assert first["metadata"]["topic"] == "cats"
    assert first["text"] in TOPICS["cats"]
    scores = [line["score"] for line in done.lines]
    assert scores == sorted(scores, reverse=True)
    filtered = inside("search", collection, "a tired kitten", "--where", "topic = 'space' AND year > 2006", "--json")
    assert {line["id"] for line in filtered.lines} == {"space-1", "space-2"}
    human = inside("search", collection, "economic news", "-k", "2")
    assert human.out.splitlines()[0].split()[2].startswith("money-")
    assert max(map(len, human.out.splitlines())) <= 80


def test_queries_come_from_stdin_a_line_each(embell: Run, collection: Path) -> None:
    done = embell("search", collection, "-", "-k", "1", "--json", input="cooking advice\n\n  planets \n")
    assert [(line["query"], line["rank"]) for line in done.lines] == [("cooking advice", 1), ("  planets ", 1)]
    assert [line["metadata"]["topic"] for line in done.lines] == ["food", "space"]


def test_without_a_question_it_asks(embell: Run, collection: Path) -> None:
    done = embell("search", collection, "-k", "1", "--where", "year > 0", input="stock market\ncats\n\n")
    assert done.status == 0
    assert "money-" in done.out
    assert "cats-" in done.out
    bad = embell("search", collection, "--where", "yeer = 1", input="stock market\ncats\n")
    assert bad.status == 0
    assert bad.err.count("yeer") >= 2


def test_similar_info_and_delete(inside: Run, collection: Path, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "own.embell"
    shutil.copytree(collection, own)
    hits = inside("similar", own, "food-1", "-k", "2", "--json").lines
    assert {hit["metadata"]["topic"] for hit in hits} <= {"food", "cats"}
    assert all(hit["id"] != "food-1" for hit in hits)
    (facts,) = inside("info", own, "--json").lines
    assert (facts["documents"], facts["dim"], facts["index"], facts["recall"]) == (12, 320, "exact", 1.0)
    assert facts["columns"] == {"topic": "string", "year": "int64"}
    assert facts["encoder"]["start_layer"] == 1
    assert "look both ways" in inside("info", own).out
    (gone,) = inside("delete", own, "--id", "food-1", "--id", "food-2", "--json").lines
    assert gone == {"deleted": 2}
    assert inside("delete", own, "--where", "topic = 'cats'").out == "3 rows deleted\n"
    assert inside("info", own, "--json").lines[0]["documents"] == 7
    inside("delete", own, "--id", "food-1").fails(1, "no document with the id 'food-1'")
    inside("delete", own).fails(2, "--id ID, or --where")


def test_stdin_folders_csv_and_chunks(embell: Run, inside: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    for topic, texts in TOPICS.items():
        (folder / "deep" / f"{topic}.md").write_text(f"# {topic}\n\n" + "\n\n".join(texts))
    (folder / "table.csv").write_text("id,text,price\n007,A red bicycle with a basket,12.5\n8,A blue car,1000\n")
    done = embell(
        "index",
        "notes",
        "-",
        "--to",
        "n.embell",
        "--chunk",
        "16",
        "--json",
        cwd=tmp_path,
        input='{"_id": 5, "text": "from a pipe", "price": 3}\n',
    )
    assert done.lines[0]["documents"] == 7
    monkeypatch.chdir(tmp_path)
    hits = inside("search", "n.embell", "interest rates of banks", "-k", "20", "--json").lines
    assert hits[0]["id"] == "notes/deep/money.md"
    source = (folder / "deep" / "money.md").read_text()
    assert source[hits[0]["start"] : hits[0]["end"]] == hits[0]["text"]
    assert len({hit["id"] for hit in hits}) == len(hits) == 7
    chunks = inside("search", "n.embell", "interest rates of banks", "-k", "50", "--chunks", "--json").lines
    assert len(chunks) > 7
    cheap = inside("search", "n.embell", "anything", "--where", "price < 100", "--json").lines
    assert {hit["id"] for hit in cheap} == {"007", "5"}


def test_dedup_of_a_file_writes_rows_as_they_stood(embell: Run, inside: Run, tmp_path: Path) -> None:
    rows = topic_rows()
    lines = [json.dumps(row) for row in rows]
    lines.insert(1, '{"id":"copy",  "text":"the CAT sleeps on the warm  sofa.", "big": 123456789012345678901234567890}')
    lines.append('{"id": "near", "text": "Shares fell sharply on a Monday."}')
    lines.append('{"id": "blank", "text": ""}')
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(lines) + "\n")
    done = inside("dedup", source, "--threshold", "0.9", "--output", tmp_path / "kept.jsonl", "--removed", tmp_path / "removed.jsonl",
                  "--pairs", tmp_path / "pairs.parquet", "--json")  # fmt: skip
    (summary,) = done.lines
    assert (summary["documents"], summary["kept"], summary["dropped"], summary["exact"], summary["semantic"]) == (14, 12, 2, 1, 1)
    kept = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert kept == [line for line in lines if '"copy"' not in line and '"near"' not in line]
    removed = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert [set(row) for row in removed] == [{"id", "kept_id", "score", "kind", "text"}] * 2
    assert [(row["id"], row["kept_id"], row["kind"]) for row in removed] == [
        ("copy", "cats-0", "exact"),
        ("near", "money-1", "semantic"),
    ]
    assert removed[0]["text"] == "the CAT sleeps on the warm  sofa."
    assert 0.9 <= removed[1]["score"] < 1
    pairs = pyarrow.parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [(pair["id_a"], pair["id_b"], pair["kind"]) for pair in pairs] == [
        ("cats-0", "copy", "exact"),
        ("money-1", "near", "semantic"),
    ]
    piped = embell("dedup", "-", "--threshold", "0.9", "--output", "-", input=source.read_text())
    assert piped.out.splitlines() == kept
    assert "12 kept, 2 dropped" in piped.err


def test_dedup_of_a_collection_gives_the_same(inside: Run, collection: Path, tmp_path: Path) -> None:
    before = (collection / "manifest.json").read_bytes()
    done = inside("dedup", collection, "--threshold", "0.3", "--json", "--output", tmp_path / "kept.jsonl")
    (summary,) = done.lines
    assert summary["kept"] + summary["dropped"] == 12
    assert summary["dropped"] > 0
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == summary["kept"]
    assert set(kept[0]) == {"id", "text", "topic", "year"}
    assert (collection / "manifest.json").read_bytes() == before


def test_encode_writes_unit_rows_and_their_ids(inside: Run, corpus: Path, tmp_path: Path, mini) -> None:  # type: ignore[no-untyped-def]
    done = inside("encode", corpus, "--output", tmp_path / "v.npy", "--ids", tmp_path / "v.ids", "--json")
    assert done.lines[0]["documents"] == 12
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.dtype == np.float32
    assert vectors.shape == (12, 320)
    assert (tmp_path / "v.ids").read_text().splitlines() == [row["id"] for row in topic_rows()]
    assert (vectors * mini.encode([row["text"] for row in topic_rows()])).sum(axis=1).min() > 0.999
    target = tmp_path / "own.embell"
    assert inside("index", corpus, "--to", target, "--vectors", tmp_path / "v.npy", "--json").lines[0]["encoded"] == 12
    inside("search", target, "cats").fails(1, "vectors were given", "--model")
    for change, message in (
        (lambda v: v.__setitem__((4, 3), np.nan), "row 5"),
        (lambda v: v.__setitem__(5, 0), "row 6"),
    ):
        broken = vectors.copy()
        change(broken)
        np.save(tmp_path / "broken.npy", broken)
        inside("index", corpus, "--to", tmp_path / "b.embell", "--vectors", tmp_path / "broken.npy").fails(
            1, "broken.npy", message, "corpus.jsonl:"
        )
    gaps = write_jsonl(tmp_path / "gaps.jsonl", [{"id": "blank", "text": ""}, *topic_rows()])
    done = inside("index", gaps, "--to", tmp_path / "gaps.embell", "--vectors", tmp_path / "v.npy", "--model", "embell-mini")
    assert "12 stored" in done.out
    assert inside("search", tmp_path / "gaps.embell", "The cat sleeps on the warm sofa.", "--json").lines[0]["id"] == "cats-0"
    np.save(tmp_path / "short.npy", vectors[:7])
    inside("index", corpus, "--to", tmp_path / "s.embell", "--vectors", tmp_path / "short.npy").fails(
        1, "has 7 rows", "the source 12"
    )


def test_vectors_in_a_field_are_checked(inside: Run, tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"t{i}", "v": [1.0, float(i), 0.5]} for i in range(5)]
    source = write_jsonl(tmp_path / "v.jsonl", rows)
    assert inside("index", source, "--to", tmp_path / "v.embell", "--vector-field", "v", "--json").lines[0]["encoded"] == 5
    assert inside("similar", tmp_path / "v.embell", "3", "-k", "1", "--json").lines[0]["id"] == "4"
    rows[3]["v"] = [1.0, 2.0]
    write_jsonl(source, rows)
    inside("index", source, "--to", tmp_path / "w.embell", "--vector-field", "v").fails(1, "v.jsonl:4", "2 wide")
    (tmp_path / "nan.jsonl").write_text('{"text": "a", "v": [1, NaN]}\n')
    inside("index", tmp_path / "nan.jsonl", "--to", tmp_path / "x.embell", "--vector-field", "v").fails(1, "nan.jsonl:1")


def test_evaluate(inside: Run, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "score\tsentence1\tsentence2\n5\tA cat sleeps.\tThe cat is sleeping.\n3\tA cat sleeps.\tA dog sleeps.\n"
        '1\tA cat sleeps.\tA "kitten runs.\n0\tA cat sleeps.\tShares fell on Monday.\n'
    )
    (result,) = inside("evaluate", "sts", pairs, "--json").lines
    assert (result["dataset"], result["pairs"]) == ("pairs", 4)
    assert result["spearman"] >= 79
    inside("evaluate", "sts", pairs, "--score-field", "gold").fails(1, "pairs.tsv", "no column 'gold'", "sentence1")
    write_jsonl(
        tmp_path / "corpus.jsonl",
        [{"_id": row["id"], "title": "", "text": row["text"]} for row in topic_rows()] + [{"_id": "e", "title": "", "text": ""}],
    )
    write_jsonl(
        tmp_path / "queries.jsonl",
        [{"_id": "q1", "text": "pets"}, {"_id": "q2", "text": "economy"}, {"_id": "unjudged", "text": "x"}],
    )
    (tmp_path / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q1\tcats-{i}\t1\nq2\tmoney-{i}\t2\n" for i in range(3)) + "q2\tcats-1\t-1\n"
    )
    (result,) = inside("evaluate", "retrieval", tmp_path, "--json").lines
    assert (result["documents"], result["queries"], result["recall@100"], result["empty"]) == (12, 2, 1.0, 1)
    assert result["ndcg@10"] > 0.9
    inside("evaluate", "retrieval", tmp_path / "nowhere").fails(1, "qrels.tsv", "no such file")


def test_bad_input_gets_one_line(inside: Run, collection: Path, corpus: Path, tmp_path: Path) -> None:
    good = [json.dumps(row) for row in topic_rows()]
    target = tmp_path / "t.embell"
    inside("index", tmp_path / "missing.jsonl", "--to", target).fails(1, "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    inside("index", tmp_path / "empty.jsonl", "--to", target).fails(1, "empty.jsonl", "nothing to index")
    inside("index", corpus, "--to", target, "--text-field", "txt").fails(1, "corpus.jsonl:1", "'txt'", "'text'")
    inside("index", corpus, "--to", target, "--id-field", "idd").fails(1, "corpus.jsonl:1", "'idd'", "'id'")
    (tmp_path / "a.docx").write_text("x")
    inside("index", tmp_path / "a.docx", "--to", target).fails(1, "a.docx", ".jsonl")
    assert not target.exists()
    (tmp_path / "broken.jsonl").write_text("\n".join([*good[:6], '{"id": "x", "text": ', *good[6:]]))
    inside("index", tmp_path / "broken.jsonl", "--to", target).fails(1, "broken.jsonl:7", "JSON")
    assert inside("info", target, "--json").lines[0]["documents"] == 6  # what came before it stays
    going = inside(
        "index", tmp_path / "broken.jsonl", "--to", target, "--keep-going", "--rejects", tmp_path / "rejects.jsonl", "--json"
    )
    assert (going.lines[0]["rejected"], going.lines[0]["documents"], going.lines[0]["encoded"]) == (1, 12, 6)
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["row"] == '{"id": "x", "text": '
    (tmp_path / "twice.jsonl").write_text("\n".join([*good, good[2]]))
    inside("index", tmp_path / "twice.jsonl", "--to", tmp_path / "u.embell").fails(
        1, "twice.jsonl:13", "'cats-2'", "twice.jsonl:3"
    )
    inside("search", tmp_path / "nowhere", "x").fails(1, "nowhere", "embell index")
    inside("search", tmp_path, "x").fails(1, "not a collection")
    inside("index", corpus, "--to", corpus.parent).fails(1, "not a collection")
    inside("search", collection, "x", "--where", "yeer > 3").fails(2, "yeer", "year")
    inside("search", collection, "x", "-k", "0").fails(2, "-k")
    inside("search", collection, " ").fails(2, "empty")
    inside("index", corpus, "--to", collection, "--pooling", "maxi").fails(2, "'maxi'", "did you mean max?")
    inside("index", corpus, "--to", collection, "--poling", "mean").fails(2, "--poling", "--pooling")
    inside("index", corpus, "--to", target, "--index", "exakt").fails(2, "exakt", "faiss:FACTORY")
    inside("dedup", corpus, "--threshold", "1.5").fails(2, "threshold")
    inside("serch", collection).fails(2, "serch", "search")
    inside("similar", collection, "nobody").fails(1, "'nobody'")
    inside("index", corpus, "--to", collection, "--chunk", "50").fails(1, "whole documents")


def test_a_collection_made_with_another_model_is_refused(inside: Run, collection: Path, corpus: Path, tmp_path: Path) -> None:
    from tiny_models import tiny_encoder_directory

    tiny_encoder_directory(tmp_path / "tiny")
    inside("search", collection, "x", "--model", tmp_path / "tiny").fails(1, "made with another model")
    inside("index", corpus, "--to", collection, "--model", tmp_path / "tiny").fails(1, "made with another model")
    inside("index", corpus, "--to", tmp_path / "t.embell", "--model", tmp_path / "tiny", "--pooling", "last").fails(
        1, "equals the causal model"
    )
    made = inside(
        "index", corpus, "--to", tmp_path / "t.embell", "--model", tmp_path / "tiny", "--pooling", "last", "--start-layer", "none"
    )
    assert made.status == 0, made
    assert inside("search", tmp_path / "t.embell", "x", "--json", "-k", "1").lines[0]["rank"] == 1


def test_options_have_environment_variables(inside: Run, collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBELL_SEARCH_K", "2")
    done = inside("search", collection, "cats", "--json")
    assert len(done.lines) == 2


@pytest.mark.parametrize(
    ("variable", "parts"),
    [
        ("EMBELL_SEARCH_KK", ("EMBELL_SEARCH_KK", "did you mean EMBELL_SEARCH_K?")),
        ("EMBELL_SEARCH_QQQQQQ", ("embell search --help",)),
        ("EMBELL_TRAIN_CONTRASTIVE_BATSH", ("did you mean EMBELL_TRAIN_CONTRASTIVE_BATCH?",)),
        ("EMBELL_TRAIN_CONTRASTIVE_QQQQQQ", ("embell train contrastive --help",)),
        ("EMBELL_TRAIN_CONTRASTIV_BATCH", ("did you mean EMBELL_TRAIN_CONTRASTIVE_BATCH?",)),
    ],
)
def test_a_misspelt_variable_is_refused(
    inside: Run, collection: Path, monkeypatch: pytest.MonkeyPatch, variable: str, parts: tuple[str, ...]
) -> None:
    monkeypatch.setenv(variable, "2")
    command = ("train", "contrastive") if "TRAIN" in variable else ("search", collection, "cats")
    inside(*command).fails(2, *parts)
    assert inside(*command, "--help").status == 0
    assert inside("info", collection).status == 0  # another command's settings are its own affair


def test_a_wrong_value_is_told_by_the_name_of_its_variable(
    inside: Run, collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBELL_SEARCH_K", "few")
    inside("search", collection, "cats").fails(2, "'few' is not a valid integer", "EMBELL_SEARCH_K")
    from_line = inside("search", collection, "cats", "-k", "many")
    from_line.fails(2, "'many' is not a valid integer")
    assert "EMBELL" not in from_line.err


def test_the_reader_of_the_output_may_leave(collection: Path) -> None:
    command = f'"{sys.executable}" -m embell search "{collection}" - --json | head -n 1'
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], input="cats\n" * 200, capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["rank"] == 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_pruning_waits_for_the_whole_source(inside: Run, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", topic_rows()[:4])
    target = tmp_path / "p.embell"
    inside("index", source, "--to", target)
    lines = source.read_text().splitlines()
    source.write_text("\n".join([*lines[:2], "{broken", lines[3]]))
    inside("index", source, "--to", target, "--prune", "--keep-going").fails(1, "nothing was pruned")
    assert inside("info", target, "--json").lines[0]["documents"] == 4


def test_outputs_are_checked_first_and_links_followed(inside: Run, corpus: Path, tmp_path: Path) -> None:
    inside("dedup", corpus, "--output", tmp_path / "no" / "x.jsonl").fails(2, "--output", "no directory")
    inside("dedup", corpus, "--output", tmp_path / "x.jsonl", "--removed", tmp_path / "x.jsonl").fails(2, "two files")
    inside("dedup", corpus, "--output", corpus).fails(2, "overwritten")
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    done = inside("dedup", corpus, "--output", tmp_path / "link.jsonl", "--removed", "/dev/null")
    assert done.status == 0, done
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len((tmp_path / "real.jsonl").read_text().splitlines()) == 12
    assert Path("/dev/null").is_char_device()


def test_dedup_keeps_what_it_cannot_compare(inside: Run, tmp_path: Path) -> None:
    lines = [
        '{"id": 1, "text": "A cat sleeps."}',
        "{broken",
        '{"id": 2, "text": ""}',
        '{"id": 3, "text": "a CAT sleeps."}',
        "[1]",
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    done = inside("dedup", tmp_path / "s.jsonl", "--keep-going", "--output", tmp_path / "kept.jsonl", "--json")
    assert (done.lines[0]["rejected"], done.lines[0]["dropped"]) == (2, 1)
    assert (tmp_path / "kept.jsonl").read_text().splitlines() == [lines[0], lines[1], lines[2], lines[4]]


@pytest.mark.parametrize(
    ("before", "is_file"),
    [(["search"], True), (["search", "c.embell"], False), (["dedup"], True), (["dedup", "a", "--against"], True), (["index", "a", "--to"], True),
     (["encode", "a", "--output"], True), (["evaluate", "sts"], True), (["tune"], True), (["train", "contrastive", "--data"], True)]
)  # fmt: skip
def test_a_shell_completes_files_where_files_are_meant(before: list[str], is_file: bool) -> None:
    found = BashComplete(cli, {}, "embell", "_EMBELL_COMPLETE").get_completions(before, "co")
    assert [(item.type, item.value) for item in found] == ([("file", "co")] if is_file else [])
