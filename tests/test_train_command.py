"""`embell train` as users meet it: what it prints, and what it says of a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import Ran, write_jsonl
from embell import Encoder
from training_parts import World

Run = Callable[..., Ran]
QUICK = ("--steps", "2", "--batch", "8", "--precision", "float32", "--report-every", "1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_the_model_is_on_stdout_and_all_else_on_stderr(embell: Run, world: World, tmp_path: Path) -> None:
    args = ["train", "contrastive", "--model", world.model, "--data", world.triplets, "--output", tmp_path / "run", *QUICK]
    done = embell(*args, "--start-layer", "2")
    assert (done.status, done.out) == (0, f"{tmp_path / 'run' / 'model'}\n"), done
    lines = done.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 1/2", "step 2/2"], lines
    assert "loss" in lines[0]
    assert Encoder.load(tmp_path / "run" / "model").spec.start_layer == 2

    again = embell(*args, "--start-layer", "2")
    told = f"{tmp_path / 'run'} is finished already; give another --output to train anew\n"
    assert (again.status, again.out, again.err) == (0, done.out, told)
    embell(*args, "--start-layer", "1").fails(2, "start_layer = 2, not 1", "--output")
    by_config = embell("train", "contrastive", "--config", tmp_path / "run" / "config.toml", "--output", tmp_path / "copy")
    assert by_config.status == 0, by_config
    one, other = (Encoder.load(tmp_path / run / "model").encode(["A B", "0 1"]) for run in ("run", "copy"))
    np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("recipe", ["graded", "distill", "pretrain"])
def test_the_other_recipes(inside: Run, world: World, tmp_path: Path, recipe: str) -> None:
    given = {
        "graded": ["--model", world.model, "--data", world.scored],
        "distill": [
            "--model",
            "new",
            "--fit-steps",
            "2",
            "--teacher",
            world.model,
            "--data",
            world.texts,
            "--hidden",
            "32",
            "--heads",
            "2",
            "--inner",
            "48",
        ],
        "pretrain": ["--data", world.texts, "--hidden", "32", "--heads", "2", "--inner", "48"],
    }[recipe]
    if recipe != "graded":
        given += ["--new-layers", "2", "--vocabulary", "300"]
    done = inside("train", recipe, *given, "--output", tmp_path / "run", *QUICK)
    assert (done.status, done.out) == (0, f"{tmp_path / 'run' / 'model'}\n"), done
    assert all(line.startswith(("step ", "token table: ")) for line in done.err.splitlines()), done.err


@pytest.mark.usefixtures("no_plots")
def test_a_start_layer_of_none_is_a_causal_model(inside: Run, world: World, tmp_path: Path) -> None:
    given = ("--model", world.model, "--data", world.triplets, "--output", tmp_path / "run", "--pooling", "last", *QUICK)
    done = inside("train", "contrastive", *given, "--start-layer", "none")  # with a layer that looks both ways, "last" is refused
    assert done.status == 0, done
    assert Encoder.load(tmp_path / "run" / "model").spec.start_layer is None
    (tmp_path / "run.toml").write_text('start_layer = "none"\npooling = "last"\n')
    given = (*given[:4], "--output", tmp_path / "toml", *QUICK, "--config", tmp_path / "run.toml")
    assert inside("train", "contrastive", *given).status == 0
    assert Encoder.load(tmp_path / "toml" / "model").spec.start_layer is None
    again = inside("train", "contrastive", "--config", tmp_path / "run" / "config.toml", "--output", tmp_path / "again")
    assert again.status == 0, again
    assert Encoder.load(tmp_path / "again" / "model").spec.start_layer is None


@pytest.mark.usefixtures("no_plots")
def test_a_mistake_is_one_line_and_does_not_block_the_next_start(inside: Run, world: World, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "columns.jsonl", [{"foo": "a", "bar": "b"}])
    write_jsonl(tmp_path / "one.jsonl", [{"query": "a", "positive": "b"}])
    write_jsonl(tmp_path / "same.jsonl", [{"query": "a", "positive": "a"}] * 3)
    write_jsonl(tmp_path / "blank.jsonl", [{"query": "a", "positive": " "}] * 3)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "commas.tsv").write_text("query,positive\na,b\n")
    (tmp_path / "bad.toml").write_text("batsh = 8\n")
    (tmp_path / "other.toml").write_text('recipe = "graded"\n')
    run = tmp_path / "run"

    def start(*args: str | Path, data: Path = world.triplets, model: str | Path = world.model) -> Ran:
        return inside("train", "contrastive", "--model", model, "--data", data, "--output", run, *QUICK, *args)

    mistakes: list[tuple[Ran, int, tuple[str, ...]]] = [
        (start(data=tmp_path / "columns.jsonl"), 1, ("columns.jsonl", "no column for the query", "'foo', 'bar'")),
        (start(data=tmp_path / "empty.jsonl"), 1, ("empty.jsonl", "no rows")),
        (start(data=tmp_path / "one.jsonl"), 1, ("one.jsonl", "one pair is not enough")),
        (start(data=tmp_path / "same.jsonl"), 1, ("same.jsonl:1", "same text")),
        (start(data=tmp_path / "blank.jsonl"), 1, ("blank.jsonl:1", "positive")),
        (start(data=tmp_path / "nowhere.jsonl"), 1, ("nowhere.jsonl",)),
        (start("--start-layer", "9"), 1, ("9", "4 layers")),
        (start("--pooling", "last"), 1, ("equals the causal model",)),
        (start("--causal", "--start-layer", "1"), 2, ("causal",)),
        (start("--depths", "7"), 2, ("depth 7", "4 layers")),
        (start("--widths", "999"), 2, ("width 999", "32")),
        (start("--evaluate", tmp_path / "held.tsv"), 1, ("held.tsv", "no such file")),
        (start("--evaluate", world.triplets), 1, ("triplets.jsonl", "TSV", ".jsonl")),
        (start("--evaluate-every", "5"), 2, ("--evaluate-every", "--evaluate")),
        (start("--guide", world.model), 2, ("--mask-above",)),
        (start("--guide", world.model, "--mask-above", "2"), 2, ("mask_above", "2.0")),
        (start("--lora-dropout", "0.1"), 2, ("--lora-dropout", "--lora-rank")),
        (start("--no-merge"), 2, ("--no-merge", "--lora-rank")),
        (start("--lora-dropout", "7", "--lora-rank", "4"), 2, ("lora_dropout", "7.0")),
        (start("--lora-rank", "33"), 2, ("lora_rank 33", "any matrix")),
        (start("--lora-rank", "4", "--table-rate", "2"), 2, ("--table-rate", "--lora-rank")),
        (start("--positive", "query"), 1, ("'query' is taken for the positive",)),
        (start("--weight-decay", "-1"), 2, ("weight_decay cannot be negative",)),
        (start(model=""), 2, ("--model is empty",)),
        (start(data=tmp_path / "commas.tsv"), 1, ("commas.tsv", ".csv")),
        (start("--nli", "--negative", "foo"), 2, ("--negative", "--nli")),
        (start("--max-length", "999"), 2, ("--max-length 999", "128 tokens")),
        (start("--learning-rate", "fast"), 2, ("--learning-rate", "fast")),
        (start("--batsh", "8"), 2, ("--batsh", "--batch")),
        (start("--schedule", "linaer"), 2, ("linaer", "linear")),
        (start("--config", tmp_path / "bad.toml"), 2, ("bad.toml", "batsh", "batch")),
        (start("--config", tmp_path / "other.toml"), 2, ("other.toml", "graded")),
        (start("--config", tmp_path / "none.toml"), 2, ("none.toml", "no such file")),
        (start(model=tmp_path / "no-model"), 1, ("no-model",)),
        (start("--learning-rate", "1e9", "--clip", "1e9", "--steps", "30"), 1, ("no number",)),
    ]
    for ran, status, parts in mistakes[:-1]:
        ran.fails(status, *parts)
    ran, status, parts = mistakes[-1]
    lines = [line for line in ran.err.splitlines() if not line.startswith("step ")]
    assert (ran.status, ran.out, len(lines)) == (status, "", 1), ran
    assert parts[0] in lines[0]
    done = start()
    assert done.status == 0, done
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]

    inside("train", "contrastiv").fails(2, "contrastiv", "contrastive")
    inside("train", "contrastive", "--output", run).fails(2, "--data")
    inside("train", "distill", "--data", world.texts, "--output", tmp_path / "d").fails(2, "--teacher")

    def distil(*args: str | Path) -> Ran:
        return inside("train", "distill", "--data", world.texts, "--output", run, *QUICK, *args)

    teacher = ("--teacher", world.model)
    new = (*teacher, "--model", "new")
    distil(*teacher, "--hidden", "64").fails(2, "--hidden", "--model new")
    distil(*teacher, "--hidden", "64", "--heads", "2").fails(2, "--hidden, --heads have no effect", "leave them out")
    distil(*teacher, "--fit-steps", "5").fails(2, "--fit-steps", "--model new")
    distil(*teacher, "--first", "foo").fails(2, "--first", "--teacher")
    distil(*teacher, "--near-weight", "-1").fails(2, "near_weight", "-1.0")
    distil(*teacher, "--cosine-weight", "0", "--similarity-weight", "0").fails(2, "nothing would be learnt", "near_weight")
    distil(*new, "--phrases", "5", "--fit-steps", "0").fails(2, "--phrases", "--fit-steps")
    distil(*new, "--phrases", "500", "--vocabulary", "300").fails(2, "from 0 to 42", "500")
    distil("--cross-encoder", world.judge, "--principal").fails(2, "--principal", "--teacher")
    distil("--cross-encoder", world.judge, "--score", "foo").fails(2, "--score", "--cross-encoder")

    def pretrained(*args: str | Path) -> Ran:
        return inside("train", "pretrain", "--data", world.texts, "--output", tmp_path / "p", *QUICK, *args)

    pretrained("--piece", "300", "--positions", "200").fails(2, "200 of --positions", "300")
    pretrained("--tokenizer", world.model, "--vocabulary", "300").fails(2, "--vocabulary", "--tokenizer")
    pretrained("--vocabulary", "0").fails(2, "vocabulary must be at least 1")
    pretrained("--held-out", "0", "--evaluate-every", "5").fails(2, "--evaluate-every", "--held-out")
    assert not (tmp_path / "p").exists()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    inside("train", "pretrain", "--data", world.texts, "--output", tmp_path / "mine").fails(2, "mine", "holds no run")
