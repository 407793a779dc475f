"""`embell encode`: files of each format, and what is left when it is stopped: real files, processes and signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import Ran
from embell import Encoder, EncoderSpec
from embell.cli import unfinished, vector_files
from embell.cli.main import cli
from forked import Started
from tiny_models import SENTENCES, tiny_encoder_directory

Run = Callable[..., Ran]
FORMATS = ("npy", "parquet", "arrow")
LINES = 900
GIVEN = 500
"""Lines that a run gets before it has to wait; those of them that have text are more than `SAFE`, with less than the next commit takes."""
SAFE = 64 + 128 + 256
"""Rows in the first three commits."""


def line(number: int) -> str:
    """A line of the corpus: texts come again and again, some are empty, two lines are broken."""
    if number in (100, 800):
        return '{"id": "broken", "text": '
    text = "" if number in (50, 700) else f"{number // 20} {SENTENCES[number % 8]}"
    return json.dumps({"id": f"line\n{number}" if number == 3 else f"r{number}", "text": text})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def saved(folder: Path, seed: int = 0) -> Path:
    """A tiny model whose files say everything, so that nothing is to be told of it."""
    plain = tiny_encoder_directory(folder / "plain", layers=2, seed=seed)
    Encoder.load(plain, dtype="float32").save(folder / "saved")
    return folder / "saved"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[dict[str, Any], Any, list[str]]:
    """What a run that nobody disturbs gives: its report, vectors and ids."""
    folder = tmp_path_factory.mktemp("calm")
    write(folder / "rows.jsonl")
    done = invoke(folder, model, "v.npy", "--ids", str(folder / "v.ids"), "--keep-going")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report.pop("resumed"), report["documents"], report["empty"], report["rejected"]) == (0, LINES - 4, 2, 2)
    assert report.pop("seconds") > 0
    vectors = np.load(folder / "v.npy")
    assert vectors.shape == (LINES - 4, 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    return report, vectors, (folder / "v.ids").read_text().splitlines()


def write(source: Path, **changed: str) -> None:
    """The corpus as a file; `l5=...` changes line 5."""
    source.unlink(missing_ok=True)
    source.write_text("".join(changed.get(f"l{number}", line(number)) + "\n" for number in range(1, LINES + 1)))


def arguments(folder: Path, model: Path, output: str) -> list[str]:
    return ["encode", str(folder / "rows.jsonl"), "--output", str(folder / output), "--model", str(model), "--json"]


def invoke(folder: Path, model: Path, output: str, *more: str) -> Result:
    """The command within this process: for what needs no signal."""
    return CliRunner().invoke(cli, [*arguments(folder, model, output), *more])


def fails(done: Result, status: int, *parts: str) -> None:
    assert done.exception is not None
    assert done.stdout == ""
    assert getattr(done.exception, "exit_status", None) == status or done.exit_code == status, done
    said = str(done.exception) if hasattr(done.exception, "exit_status") else done.stderr
    for part in parts:
        assert part in said


@contextmanager
def waiting(folder: Path, model: Path, output: str, *more: str) -> Iterator[Started]:
    """A run that has made `SAFE` rows safe and waits for more of its source."""
    source = folder / "rows.jsonl"
    source.unlink(missing_ok=True)
    os.mkfifo(source)
    process = Started([*arguments(folder, model, output), *more])
    with source.open("w") as pipe:
        pipe.writelines(line(number) + "\n" for number in range(1, GIVEN + 1))
        pipe.flush()
        record, end = folder / f"{output}.part" / "record.json", time.monotonic() + 100
        while not record.exists() or json.loads(record.read_bytes())["rows"] < SAFE:
            assert process.poll() is None, process.finish()
            assert time.monotonic() < end
            time.sleep(0.005)
        try:
            yield process
        finally:
            process.kill()
    write(source)


def content(path: Path) -> tuple[list[str] | None, Any, dict[bytes, bytes]]:
    """Ids, vectors and metadata of a file."""
    if path.suffix == ".npy":
        return None, np.load(path), {}
    table = {".parquet": pyarrow.parquet.read_table, ".feather": pyarrow.feather.read_table}.get(
        path.suffix, lambda path: pa.ipc.open_file(path).read_all()
    )(path)
    assert table.schema.names == ["id", "vector"]
    assert table.schema.types == [pa.string(), pa.list_(pa.float32(), 32)]
    rows = table.column("vector").combine_chunks().flatten().to_numpy().reshape(-1, 32).copy()
    return table.column("id").to_pylist(), rows, table.schema.metadata


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_and_run_again_the_file_is_that_of_a_run_left_alone(
    tmp_path: Path, model: Path, calm: tuple[dict[str, Any], Any, list[str]], suffix: str
) -> None:
    output, part = f"v.{suffix}", tmp_path / f"v.{suffix}.part"
    with waiting(tmp_path, model, output, "--keep-going") as process:
        process.kill()
        assert process.finish()[0] == -signal.SIGKILL
    assert not (tmp_path / output).exists()
    with (part / "vectors").open("ab") as file:  # what was written and not counted yet, more than is to come
        file.write(b"x" * 70_070)
    with (part / "ids").open("ab") as file:
        file.write(b'"late"\n' * 5000 + b'"r44')
    marked = np.eye(32, dtype="<f4")[0]
    with (part / "vectors").open("r+b") as file:  # a row that cannot come from the model: it must be there in the end
        file.seek(len(vector_files.npy_header(0, 32)) + 7 * 32 * 4)
        file.write(marked.tobytes())

    report, vectors, ids = calm
    status, out, err = Started([*arguments(tmp_path, model, output), "--keep-going", "--ids", str(tmp_path / "ids")]).finish()
    assert status == 0, err
    again = json.loads(out)
    assert again.pop("resumed") == SAFE
    assert again.pop("seconds") > 0
    assert again == report
    names, rows, metadata = content(tmp_path / output)
    np.testing.assert_array_equal(rows[7], marked)
    rows[7] = vectors[7]
    np.testing.assert_allclose(rows, vectors, atol=1e-5)
    assert (tmp_path / "ids").read_text().splitlines() == ids
    if suffix != "npy":
        assert names is not None
        assert [name.replace("\n", " ") for name in names] == ids
        assert names[2] == "line\n3"
        spec = EncoderSpec.from_dict(orjson.loads(metadata[b"embell"]), "the file")
        assert (spec.backbone, spec.dim, spec.dtype) == (str(model), 32, Encoder.load(model).spec.dtype)
        assert metadata[b"embell.kind"] == b"document"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids", "rows.jsonl", output]


def test_one_run_at_a_time_and_an_interrupted_one_says_what_is_kept(
    embell: Run, tmp_path: Path, model: Path, calm: tuple[dict[str, Any], Any, list[str]]
) -> None:
    with waiting(tmp_path, model, "v.npy", "--keep-going") as process:
        (tmp_path / "other.jsonl").write_text(line(1) + "\n")
        other = ["encode", tmp_path / "other.jsonl", "--output", tmp_path / "v.npy", "--model", model, "--restart"]
        embell(*other).fails(1, "v.npy: another process is writing it")
        assert process._process.pid is not None
        os.kill(process._process.pid, signal.SIGINT)
        status, out, err = process.finish()
    assert (status, out) == (130, "")
    assert len(err.splitlines()) == 1
    assert f"interrupted; {SAFE} rows kept in {tmp_path / 'v.npy.part'}, the same command goes on from there" in err
    again = embell(*arguments(tmp_path, model, "v.npy"), "--keep-going")
    assert again.lines[0]["resumed"] == SAFE
    assert f"going on after {SAFE} rows" in again.err
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), calm[1], atol=1e-5)


def test_a_bad_text_is_named_by_its_place_and_costs_nothing(embell: Run, tmp_path: Path, model: Path) -> None:
    whole = {"l50": line(51), "l100": line(101), "l700": line(701), "l800": line(801)}
    long = json.dumps({"id": "long", "text": "too long " * 500})
    write(tmp_path / "rows.jsonl", **{**whole, "l650": long})
    command = [*arguments(tmp_path, model, "v.parquet"), "--max-length", "100", "--on-long", "error"]
    embell(*command).fails(1, "rows.jsonl:650: is longer than the 100 tokens", f"{SAFE} rows kept in", "the same command goes on")
    for _ in range(2):  # the place is right from there, too, and more becomes safe before it
        again = invoke(tmp_path, model, "v.parquet", "--max-length", "100", "--on-long", "error")
        fails(again, 1, "rows.jsonl:650: is longer than the 100 tokens", f"{SAFE + 64 + 128} rows kept in")
    cut = invoke(tmp_path, model, "v.parquet", "--max-length", "100")
    assert cut.exit_code == 0, cut
    assert json.loads(cut.stdout)["resumed"] == SAFE + 64 + 128
    assert json.loads(cut.stdout)["truncated"] == 1

    write(tmp_path / "rows.jsonl", **{**whole, "l650": "{broken"})
    fails(invoke(tmp_path, model, "w.npy"), 1, "rows.jsonl:650: not valid JSON", "649 rows kept in")
    going = invoke(tmp_path, model, "w.npy", "--keep-going")
    assert (json.loads(going.stdout)["resumed"], json.loads(going.stdout)["rejected"]) == (649, 1)


def test_another_source_or_encoder_is_refused_and_restart_begins_anew(tmp_path: Path, model: Path) -> None:
    source, part = tmp_path / "rows.jsonl", tmp_path / "v.npy.part"
    write(source)
    options = ["--max-length", "100", "--on-long", "chunk", "--dtype", "float32"]
    fails(invoke(tmp_path, model, "v.npy", *options), 1, "rows.jsonl:100:", "98 rows kept")
    kept = {path.name: path.read_bytes() for path in part.iterdir()}

    def refused(status: int, *parts: str, more: tuple[str, ...] = (), model: Path = model) -> None:
        fails(invoke(tmp_path, model, "v.npy", "--keep-going", *options, *more), status, *parts, "--restart")
        assert {path.name: path.read_bytes() for path in part.iterdir()} == kept

    refused(2, "pooling was mean, is last", more=("--pooling", "last", "--start-layer", "0"))
    refused(2, "on-long was chunk, is truncate", more=("--on-long", "truncate"))
    refused(2, "dtype was float32, is bfloat16", more=("--dtype", "bfloat16"))
    refused(2, "kind was document, is query", more=("--kind", "query"))
    refused(2, "text-fields was not given, is text", more=("--text-field", "text"))
    other = saved(tmp_path / "other", seed=1)
    refused(2, f"the model was {model}, is {other} with other weights", model=other)

    for changed in ('{"id": "r9", "text": "new"}', '{"id": "new", "text": ' + json.dumps(json.loads(line(9))["text"]) + "}"):
        write(source, l9=changed)
        refused(1, "rows.jsonl: no longer begins with the 98 documents whose rows are in")
    source.write_text("".join(line(number) + "\n" for number in range(1, 41)))
    refused(1, "no longer begins with the 98 documents")
    (part / "record.json").write_text("{")
    fails(invoke(tmp_path, model, "v.npy"), 1, "record.json: damaged", "--restart")
    anew = invoke(tmp_path, other, "v.npy", "--restart")
    assert (json.loads(anew.stdout)["documents"], json.loads(anew.stdout)["resumed"]) == (40, 0)
    assert np.load(tmp_path / "v.npy").shape == (40, 32)
    assert not part.exists()


@pytest.mark.parametrize("suffix", [*FORMATS, "feather"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_while_the_output_is_put_in_place_nothing_is_encoded_again(
    tmp_path: Path,
    model: Path,
    calm: tuple[dict[str, Any], Any, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    when: str,
) -> None:
    """Before: a part of it is written. After: it has its name, and the folder is there still."""
    write(tmp_path / "rows.jsonl")
    output = tmp_path / f"v.{suffix}"
    output.write_text("old")
    monkeypatch.setattr(vector_files, "BLOCK_BYTES", 100 * 32 * 4)
    with monkeypatch.context() as stopping:

        def stop(*args: Any) -> None:
            if when == "before" and suffix == "npy":
                os.link(output.with_name("v.npy.part") / "vectors", output.with_name("v.npy.part") / "whole")
            elif when == "before":
                (tmp_path / f"v.{suffix}.part" / "whole").write_text("a beginning")
            raise OSError(28, "No space left on device")

        if when == "before":
            stopping.setattr(unfinished, "write_vector_file", stop)
        else:
            stopping.setattr(unfinished.Unfinished, "remove", stop)
        first = invoke(tmp_path, model, output.name, "--keep-going")
        assert isinstance(first.exception, OSError)
        assert f"{LINES - 4} rows kept" in first.stderr
    assert (output.read_bytes() == b"old") == (when == "before")
    second = invoke(tmp_path, model, output.name, "--keep-going")
    report = json.loads(second.stdout)
    assert (report.pop("resumed"), report.pop("seconds") > 0) == (LINES - 4, True)
    assert report == calm[0]
    np.testing.assert_allclose(content(output)[1], calm[1], atol=1e-5)
    assert not (tmp_path / f"{output.name}.part").exists()
    if suffix == "parquet":
        assert pyarrow.parquet.ParquetFile(output).num_row_groups == 9
    elif suffix != "npy":
        assert pa.ipc.open_file(output).num_record_batches == 9


def test_a_finished_output_is_not_touched_before_the_next_is_ready(tmp_path: Path, model: Path) -> None:
    """The .npy file and the rows kept may be one file on disk; beginning anew must not write into it."""
    write(tmp_path / "rows.jsonl")
    fails(invoke(tmp_path, model, "v.npy"), 1, "rows.jsonl:100")
    os.link(tmp_path / "v.npy.part" / "vectors", tmp_path / "v.npy")
    with (tmp_path / "v.npy").open("r+b") as file:
        file.write(vector_files.npy_header(98, 32))
    before = (tmp_path / "v.npy").read_bytes()
    (tmp_path / "v.npy.part" / "record.json").unlink()  # killed while the folder was being removed
    fails(invoke(tmp_path, model, "v.npy"), 1, "rows.jsonl:100")
    assert (tmp_path / "v.npy").read_bytes() == before


def test_a_finished_output_stays_as_it_is_while_a_longer_one_is_made(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the output got its name, before the rows kept were removed; then the source grows."""
    write(tmp_path / "rows.jsonl")
    with monkeypatch.context() as stopping:
        stopping.setattr(unfinished.Unfinished, "remove", lambda self: (_ for _ in ()).throw(OSError(5, "killed")))
        assert isinstance(invoke(tmp_path, model, "v.npy", "--keep-going").exception, OSError)
    os.link(tmp_path / "v.npy", tmp_path / "as-it-was.npy")
    before = (tmp_path / "as-it-was.npy").read_bytes()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"id": "one more", "text": "one more"}\n')
    second = invoke(tmp_path, model, "v.npy", "--keep-going")
    assert json.loads(second.stdout)["resumed"] == LINES - 4
    assert len(np.load(tmp_path / "v.npy")) == LINES - 3
    assert (tmp_path / "as-it-was.npy").read_bytes() == before


def test_a_model_that_gives_nan_is_told_with_the_row(tmp_path: Path, model: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    one, two = (set(ids) for ids in AutoTokenizer.from_pretrained(model)(["one", "two"])["input_ids"])
    weights[name][min(two - one)] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "text": "one"}\n{"id": "2", "text": "two"}\n')
    fails(invoke(tmp_path, broken, "v.npy"), 1, "rows.jsonl:2: the model gave a vector with NaN", "--dtype float32")
    assert not (tmp_path / "v.npy").exists()


def test_what_cannot_be_done_is_refused_at_once(embell: Run, tmp_path: Path, model: Path) -> None:
    write(tmp_path / "rows.jsonl", l1='{"id": 1}')
    embell(*arguments(tmp_path, model, "v.csv")).fails(2, "v.csv", ".npy, .parquet, .arrow or .feather")
    fails(CliRunner().invoke(cli, ["encode", "x.jsonl", "--output", "-"]), 2, "do not go to stdout")
    os.mkfifo(tmp_path / "pipe.npy")
    fails(invoke(tmp_path, model, "pipe.npy"), 2, "pipe.npy: a device or a pipe")
    fails(invoke(tmp_path, model, "v.npy", "--ids", str(tmp_path / "rows.jsonl")), 2, "would be overwritten")
    (tmp_path / "folder").mkdir()
    inside = ["encode", str(tmp_path / "folder"), "--output", str(tmp_path / "folder" / "v.parquet")]
    fails(CliRunner().invoke(cli, inside), 2, "v.parquet: lies in")
    inside[-1] = str(tmp_path / "v.npy")
    fails(CliRunner().invoke(cli, [*inside, "--ids", str(tmp_path / "folder" / "ids.txt")]), 2, "ids.txt: lies in")
    (tmp_path / "folder").rmdir()
    (tmp_path / "mine.npy.part").mkdir()
    (tmp_path / "mine.npy.part" / "letter.txt").write_text("dear")
    fails(invoke(tmp_path, model, "mine.npy", "--restart"), 2, "mine.npy.part: is in the way")
    assert (tmp_path / "mine.npy.part" / "letter.txt").read_text() == "dear"
    fails(invoke(tmp_path, model, "v.npy"), 1, "rows.jsonl:1: no field 'text'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.npy.part", "pipe.npy", "rows.jsonl"]  # no row, nothing kept
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n')
    fails(invoke(tmp_path, model, "v.npy"), 1, "no text to encode")


def test_links_are_followed_and_stdin_is_read_again(embell: Run, tmp_path: Path, model: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "v.arrow").symlink_to(tmp_path / "deep" / "real.arrow")
    rows = [line(number) + "\n" for number in range(1, 81)]
    command = ["encode", "-", "--output", tmp_path / "v.arrow", "--model", model, "--json"]
    embell(*command, input="".join([*rows, "{broken\n"])).fails(1, "-:81: not valid JSON", f"79 rows kept in {tmp_path / 'deep'}")
    again = embell(*command, "--ids", "-", input="".join(rows))
    assert again.status == 0, again
    *ids, report = again.out.splitlines()
    assert json.loads(report)["resumed"] == 79
    assert [name.replace("\n", " ") for name in content(tmp_path / "deep" / "real.arrow")[0] or ()] == ids
    assert (tmp_path / "v.arrow").is_symlink()
