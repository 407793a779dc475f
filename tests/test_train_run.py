"""A run: its batches, its gradients, and that one which was cut off ends as if it had not been."""

from __future__ import annotations

import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, TrainingArguments

import embell.training.contrastive as contrastive_module
import embell.training.run_directory as directory_module
import embell.training.trainer as trainer_module
from embell import EmbellError, Encoder, UsageError
from embell.engine.backbone import fingerprint
from embell.training.batches import Batches, plan_batches
from embell.training.contrastive import contrastive
from embell.training.distill import distill
from embell.training.fresh import ShapeOptions
from embell.training.muon import MuonAdamW, orthogonal, sort
from embell.training.nesting import NestingOptions
from embell.training.pretrain import _NextToken, pretrain
from embell.training.progress import Progress
from embell.training.run import rate
from embell.training.run_directory import last_checkpoint, weights_mark
from embell.training.student import EncoderOptions, LoraOptions, Student
from embell.training.texts import TokenisedTexts
from embell.training.trainer import StudentTrainer
from forked import Started
from training_parts import World, assert_equal_weights, cut_off, losses, metrics, run_options, weights

OPTIONS = EncoderOptions(start_layer=2)
SHAPE = ShapeOptions(new_layers=2, hidden=32, inner=48, heads=2, vocabulary=300, positions=64)
Start = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def calm(world: World) -> Path:
    """The model of an undisturbed run."""
    return start_of(world)(world.model.parent / "calm")


def start_of(world: World, **changes: Any) -> Start:
    """Starts a contrastive run in a directory."""
    data, lora = getattr(world, changes.pop("data", "triplets")), changes.pop("lora", LoraOptions())
    options = run_options(**{"checkpoint_every": 4, "report_every": 2, **changes})

    def start(output: Path) -> Path:
        return contrastive((data,), output, str(world.model), encoder=OPTIONS, lora=lora, run=options)

    return start


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"data": "few", "batch": 10, "epochs": 2.9}, marks=pytest.mark.heavy),
        {"optimizer": "muon"},
        pytest.param({"accumulate": 2, "schedule": "cosine"}, marks=pytest.mark.heavy),
        pytest.param({"lora": LoraOptions(lora_rank=4, lora_dropout=0.3)}, marks=pytest.mark.heavy),
        {"lora": LoraOptions(lora_rank=4, lora_dropout=0.3), "chunk": 10, "optimizer": "muon", "batch": 6},
    ],
    ids=["epochs", "muon", "accumulate", "dropout", "all"],
)
def test_a_run_that_was_cut_off_ends_where_an_undisturbed_one_does(world: World, tmp_path: Path, changes: dict[str, Any]) -> None:
    start = start_of(world, **changes)
    calm = start(tmp_path / "calm")
    cut = tmp_path / "cut"
    cut_off(lambda: start(cut), 11 * changes.get("accumulate", 1))
    assert last_checkpoint(cut) == cut / "checkpoints" / "checkpoint-8"
    again = start(cut)
    assert_equal_weights(calm, again)
    assert metrics(tmp_path / "calm") == metrics(cut)
    steps = [line["step"] for line in metrics(cut)]
    assert len(set(steps)) == len(steps) > 3
    assert not (cut / "checkpoints").exists()
    changed = weights(again)
    before = weights(world.model)
    assert sum(not torch.equal(changed[name], before[name]) for name in before) > 20


def test_pretraining_and_distilling_go_on_too(world: World, tmp_path: Path) -> None:
    def pretrained(output: Path) -> Path:
        options = run_options(checkpoint_every=4, report_every=2, optimizer="muon")
        return pretrain((world.texts,), output, held_out=0.05, shape=SHAPE, run=options)

    def distilled(output: Path) -> Path:
        options = run_options(checkpoint_every=4, report_every=2, evaluate_every=3, optimizer="muon")
        return distill(
            (world.texts,), output, "new", teacher=str(world.model), principal=True, fit_steps=3, shape=SHAPE,
            evaluate=(world.held_out,), encoder=EncoderOptions(start_layer=1), run=options,
        )  # fmt: skip

    for start in (pretrained, distilled):
        name = start.__name__
        calm = start(tmp_path / name)
        cut_off(lambda start=start, name=name: start(tmp_path / f"{name}-cut"), 10)
        assert_equal_weights(calm, start(tmp_path / f"{name}-cut"))
        assert metrics(tmp_path / name) == metrics(tmp_path / f"{name}-cut")


def test_a_process_that_was_killed_goes_on(world: World, tmp_path: Path) -> None:
    undisturbed = start_of(world, steps=24, threads=1)(tmp_path / "calm")
    args = ["train", "contrastive", "--config", str(tmp_path / "calm" / "config.toml"), "--output", str(tmp_path / "killed")]
    process = Started(args)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("checkpoints/*/completed.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(EmbellError, match=r"killed: another process trains here; .*--output"):
        start_of(world, steps=24, threads=1)(tmp_path / "killed")
    process.kill()
    assert process.finish()[0] == -9
    assert not (tmp_path / "killed" / "model").exists()
    status, out, err = Started(args).finish()
    assert (status, out) == (0, f"{tmp_path / 'killed' / 'model'}\n"), err
    assert "going on from step" in err
    assert_equal_weights(undisturbed, tmp_path / "killed" / "model")
    assert metrics(tmp_path / "calm") == metrics(tmp_path / "killed")


def test_two_processes_make_steps_of_two_batches(world: World, tmp_path: Path) -> None:
    """As torchrun starts them. Their gradients are averaged, so that a run is that of one process that accumulates over two batches.

    There are nine; the last is left out.
    """
    pairs, negatives = [(row["query"], row["positive"]) for row in world.rows], [(row["negative"],) for row in world.rows]
    assert len(plan_batches(pairs, 8, 0.06, 0, negatives)) == 9
    options = {
        "batch": "8",
        "steps": "4",
        "learning-rate": "1e-4",
        "precision": "float32",
        "report-every": "1",
        "start-layer": "2",
    }
    given = [
        "train",
        "contrastive",
        "--data",
        str(world.triplets),
        "--model",
        str(world.model),
        "--evaluate",
        str(world.held_out),
    ]
    given += [part for name, value in options.items() for part in (f"--{name}", value)]
    alone = Started([*given, "--output", str(tmp_path / "alone"), "--accumulate", "2", "--steps", "4", "--threads", "1"])
    assert alone.finish()[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    both = [Started([*given, "--output", str(tmp_path / "both")], RANK=rank, LOCAL_RANK=rank, **several) for rank in ("0", "1")]
    told = [process.finish() for process in both]
    assert [(status, out) for status, out, _ in told] == [(0, f"{tmp_path / 'both' / 'model'}\n"), (0, "")], told
    assert "step 4/4" in told[0][2]
    assert "step" not in told[1][2]
    one, two = metrics(tmp_path / "alone"), metrics(tmp_path / "both")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for first, second in zip(one, two, strict=True):
        if "loss" in first:
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
    expected = weights(tmp_path / "alone" / "model")
    for name, tensor in weights(tmp_path / "both" / "model").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: list[Callable[[Path], None]] = [
    lambda folder: (folder / "trainer_state.json").unlink(),
    lambda folder: (folder / "completed.json").unlink(),
    lambda folder: _halve(folder / "completed.json"),
    lambda folder: _halve(folder / "model.safetensors"),
    lambda folder: _halve(folder / "optimizer.pt"),
    lambda folder: _halve(folder / "scheduler.pt"),
    lambda folder: shutil.rmtree(folder),
]


def test_a_torn_checkpoint_is_passed_over(world: World, calm: Path, tmp_path: Path) -> None:
    start = start_of(world)
    cut_off(lambda: start(tmp_path / "cut"), 10)
    for at, damage in enumerate(DAMAGES):
        run = tmp_path / str(at)
        shutil.copytree(tmp_path / "cut", run)
        assert last_checkpoint(run) == run / "checkpoints" / "checkpoint-8"
        damage(run / "checkpoints" / "checkpoint-8")
        assert last_checkpoint(run) == run / "checkpoints" / "checkpoint-4"
        if at in (4, 6):
            assert_equal_weights(calm, start(run))
            assert metrics(run) == metrics(calm.parent)
    run = tmp_path / "0"
    _halve(run / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    assert last_checkpoint(run) is None
    assert_equal_weights(calm, start(run))
    assert metrics(run) == metrics(calm.parent)


@pytest.mark.parametrize("changes", [{}, {"schedule": "constant", "report_every": 1, "accumulate": 2, "steps": 4}])
def test_a_run_cut_off_after_its_last_step_is_finished_without_another(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    start = start_of(world, **changes)
    calm = start(tmp_path / "calm")

    def stop(*args: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(contrastive_module, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut")
    monkeypatch.undo()
    assert_equal_weights(calm, start(tmp_path / "cut"))
    assert metrics(calm.parent) == metrics(tmp_path / "cut")


def test_a_finished_run_is_not_trained_again_and_others_are_refused(
    world: World, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = start_of(world)
    monkeypatch.setattr(contrastive_module, "train", None)  # whoever calls it fails
    assert start(calm.parent) == calm
    with pytest.raises(UsageError, match=r"holds a run with batch = 16, not 8; .*--output"):
        start_of(world, batch=8)(calm.parent)
    shutil.copytree(calm.parent, tmp_path / "moved")
    assert start(tmp_path / "moved") == tmp_path / "moved" / "model"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for foreign in ("mine", "file"):
        with pytest.raises(UsageError, match="holds no run"):
            start(tmp_path / foreign)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_run_that_another_process_finished_meanwhile_is_left_as_it_is(
    world: World, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def finished_now(path: Path) -> list[Any]:  # as the data are looked for, before the lock is asked for
        shutil.copytree(calm.parent, run, dirs_exist_ok=True)
        return []

    monkeypatch.setattr(contrastive_module, "train", None)  # whoever calls it fails
    monkeypatch.setattr(directory_module, "tables", finished_now)
    assert start_of(world)(run) == run / "model"
    assert metrics(run) == metrics(calm.parent)


def test_settings_may_change_until_there_is_a_checkpoint(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cut_off(lambda: start_of(world)(run), 3)
    with pytest.raises(EmbellError):
        contrastive((world.triplets,), run, str(world.model), encoder=OPTIONS, nesting=NestingOptions((99,)))
    start = start_of(world, batch=8, steps=6)
    cut_off(lambda: start(run), 5)
    with pytest.raises(UsageError, match="batch = 8, not 16"):
        start_of(world, steps=6)(run)
    assert_equal_weights(start(run), start(tmp_path / "other"))


def _other_weights(model: Path) -> None:
    path = model / "model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_what_a_run_began_with_must_stay_while_it_has_a_checkpoint(world: World, calm: Path, tmp_path: Path) -> None:
    data, model = tmp_path / "triplets.jsonl", tmp_path / "model"
    shutil.copy(world.triplets, data)
    shutil.copytree(world.model, model)
    options = run_options(checkpoint_every=4, report_every=2)

    def start() -> Path:
        return contrastive((data,), tmp_path / "cut", str(model), encoder=OPTIONS, run=options)

    cut_off(start, 10)
    whole = data.read_text()
    data.write_text(whole + whole[: whole.index("\n") + 1])
    with pytest.raises(UsageError, match=r"cut: the data changed since this run began; put it back .*--output"):
        start()
    data.write_text(whole)
    _other_weights(model)
    with pytest.raises(UsageError, match=r"cut: the model changed since this run began"):
        start()
    made_of = tmp_path / "cut" / "made_of.json"
    before = made_of.read_text()
    made_of.write_text(before.replace('"number of processes":"1"', '"number of processes":"2"'))
    with pytest.raises(UsageError, match=r"cut: the number of processes changed"):
        start()
    made_of.write_text(before)
    shutil.copy(world.model / "model.safetensors", model)
    assert_equal_weights(calm, start())


def test_data_may_change_until_there_is_a_checkpoint(world: World, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    shutil.copy(world.texts, data)

    def start(output: Path) -> Path:
        return pretrain((data,), output, shape=SHAPE, run=run_options(steps=6))

    cut_off(lambda: start(tmp_path / "cut"), 3)
    before = (tmp_path / "cut" / "tokenizer" / "tokenizer.json").read_text()
    data.write_text(data.read_text().replace("A", "WORDS OF ANOTHER KIND"))  # which give another tokenizer, too
    assert_equal_weights(start(tmp_path / "calm"), start(tmp_path / "cut"))
    tokenizers = [(tmp_path / run / "model" / "tokenizer.json").read_text() for run in ("calm", "cut")]
    assert tokenizers[0] == tokenizers[1] != before


def test_a_changed_teacher_is_told(world: World, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world.model, teacher)
    options = run_options(checkpoint_every=4, report_every=2)

    def start() -> Path:
        return distill((world.texts,), tmp_path / "run", str(world.model), teacher=str(teacher), encoder=OPTIONS, run=options)

    cut_off(start, 6)
    _other_weights(teacher)
    with pytest.raises(UsageError, match="the teacher changed since this run began"):
        start()
    shutil.copy(world.model / "model.safetensors", teacher)
    (teacher / "embell.json").write_text('{"format": 1, "pooling": "weighted-mean"}')
    with pytest.raises(UsageError, match="the teacher changed since this run began"):
        start()
    (teacher / "embell.json").unlink()
    shutil.rmtree(tmp_path / "run" / "teacher")  # its vectors can be made anew, by the same one
    _other_weights(teacher)
    with pytest.raises(UsageError, match="the teacher changed since this run began"):
        start()


def test_one_weight_tells_a_model_from_another(tmp_path: Path) -> None:
    table = torch.zeros(1000, 1000)
    marks = []
    for value in (0.0, 1.0):
        table[500, 3] = value  # where the fingerprint does not look
        save_file({"table": table}, tmp_path / "model.safetensors")
        marks.append((fingerprint(tmp_path), weights_mark(tmp_path)))
    assert marks[0][0] == marks[1][0]
    assert marks[0][1] != marks[1][1]


def test_the_last_steps_are_reported(world: World, tmp_path: Path) -> None:
    start_of(world, report_every=5, steps=7)(tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 5, 7]
    start_of(world, report_every=1, steps=7)(tmp_path / "each")
    assert losses(tmp_path / "run")[2] == pytest.approx(sum(losses(tmp_path / "each")[5:]) / 2, rel=1e-5)


def test_a_loss_that_is_no_number_ends_the_run(world: World, tmp_path: Path) -> None:
    with pytest.raises(EmbellError, match=r"loss is no number any more at step .*lower --learning-rate"):
        start_of(world, learning_rate=1e9, steps=20, clip=1e9)(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert metrics(tmp_path / "run")[-1]["loss"] is None
    assert start_of(world, steps=2)(tmp_path / "run").is_dir()


# Gradients


@pytest.fixture
def student(world: World) -> Student:
    torch.manual_seed(0)
    encoder = OPTIONS.load(str(world.model))
    made = Student(encoder, (1, 3), LoraOptions(lora_rank=4, lora_dropout=0.4))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return made


def test_chunks_give_the_gradient_of_the_whole_batch_through_the_same_dropout(
    world: World, student: Student, tmp_path: Path
) -> None:
    rows = TokenisedTexts(student.encoder)([row["query"] for row in world.rows[:11]], "query")

    def loss(deep: list[torch.Tensor], shallow: dict[int, list[torch.Tensor]], targets: Any) -> torch.Tensor:
        found = torch.zeros(())
        for vectors in (deep[0], *(columns[0] for columns in shallow.values())):
            found = found + (torch.nn.functional.normalize(vectors, dim=1).sum(dim=0)[:9] ** 3).sum()
        return found

    student.train()
    torch.manual_seed(5)
    parts = [student(rows[begin : begin + 4]) for begin in range(0, 11, 4)]
    whole = [torch.cat([deep for deep, _ in parts])], {d: [torch.cat([early[d] for _, early in parts])] for d in (1, 3)}
    expected = loss(*whole, {})
    expected.backward()
    after = torch.rand(1)
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert len(gradients) == 4 * 7 * 2
    student.zero_grad()

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    report = Progress(tmp_path / "m", 1, run_options(), None)
    trainer = StudentTrainer(Batches([], list), loss, 4, report, model=student, args=arguments)
    torch.manual_seed(5)
    found = trainer._chunked(student, rows, lambda deep, early: loss([deep], {d: [v] for d, v in early.items()}, {}), 0.5)
    assert found.item() == pytest.approx(expected.item() / 2, rel=1e-6)
    assert torch.equal(torch.rand(1), after)
    for name, parameter in student.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name] / 2, rtol=1e-4, atol=1e-7)
    with torch.no_grad():  # and dropout does something
        assert not torch.allclose(student(rows)[0], whole[0][0], atol=1e-3)


def test_a_chunked_run_is_the_unchunked_one(world: World, tmp_path: Path) -> None:
    nesting = NestingOptions((8,), (1, 3))
    options: dict[str, Any] = {"steps": 2, "learning_rate": 1e-4, "accumulate": 2, "batch": 8}
    made = [
        contrastive(
            (world.triplets,),
            tmp_path / str(chunk),
            str(world.model),
            encoder=OPTIONS,
            nesting=nesting,
            run=run_options(chunk=chunk, **options),
        )
        for chunk in (None, 7, 23)
    ]
    one = weights(made[0])
    assert losses(tmp_path / "7") == pytest.approx(losses(tmp_path / "None"), rel=1e-5)
    for other in made[1:]:
        for name, tensor in weights(other).items():
            torch.testing.assert_close(tensor, one[name], rtol=0, atol=2e-6)


def test_accumulated_batches_are_averaged(world: World, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = run_options(accumulate=3, steps=1, batch=8, epochs=1.0)
    contrastive((world.pairs,), tmp_path / "run", str(world.model), encoder=OPTIONS, run=options)
    student = Student(OPTIONS.load(str(world.model)))
    tokens, found = TokenisedTexts(student.encoder), []
    texts = [(row["query"], row["positive"]) for row in world.rows]
    for rows in plan_batches(texts, 8, 1.0, 0)[:3]:
        queries, positives = (student(tokens([texts[row][side] for row in rows], "query"))[0] for side in (0, 1))
        cosines = torch.cosine_similarity(queries.unsqueeze(1), positives.unsqueeze(0), dim=-1)
        found.append(torch.nn.functional.cross_entropy(cosines / 0.05, torch.arange(8)))
    torch.stack(found).mean().backward()
    norm = torch.stack([p.grad.square().sum() for p in student.parameters() if p.grad is not None]).sum().sqrt()
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(torch.stack(found).mean().item(), rel=1e-4)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_cores_that_share_a_batch_find_the_gradients_of_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads add up their parts in order: the losses of one thread, and the same weights in every run."""
    monkeypatch.setattr(trainer_module, "CORE_TOKENS", 10)
    shared: list[int] = []
    original = StudentTrainer._each_on_a_core

    def counted(self: StudentTrainer, model: Any, rows: Any, parts: list[list[int]], *rest: Any) -> torch.Tensor:
        assert sorted(row for part in parts for row in part) == list(range(len(rows)))
        shared.append(len(parts))
        return original(self, model, rows, parts, *rest)

    monkeypatch.setattr(StudentTrainer, "_each_on_a_core", counted)
    nesting = NestingOptions((8,), (1,))

    def start(name: str, threads: int, lora: LoraOptions = LoraOptions()) -> Path:  # noqa: B008
        options = run_options(steps=4, threads=threads)
        return contrastive(
            (world.triplets,), tmp_path / name, str(world.model), encoder=OPTIONS, nesting=nesting, lora=lora, run=options
        )

    before = torch.get_num_threads()
    try:
        alone = start("alone", 1)
        assert not shared
        together, again = start("together", 3), start("again", 3)
        assert shared == [3] * 8
        start("dropout", 3, LoraOptions(lora_rank=4, lora_dropout=0.5))
        assert len(shared) == 8  # all threads would draw from one generator
    finally:
        torch.set_num_threads(before)
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "together"), rel=1e-4)
    assert_equal_weights(together, again)
    first, second = weights(alone), weights(together)
    start_weights = weights(world.model)
    for name, tensor in first.items():
        moved = (tensor - start_weights[name]).abs().max()
        assert (tensor - second[name]).abs().max() <= 0.02 * moved + 1e-6, name


# Batches


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[tuple[str, ...]], int, int]:
    names = st.sampled_from([f"t{number}" for number in range(draw(st.integers(1, 80)))])
    return draw(st.lists(st.tuples(names, names), min_size=1, max_size=120)), draw(st.integers(1, 20)), draw(st.integers(0, 5))


@given(plans())
@settings(max_examples=150)
def test_a_text_stands_once_in_a_batch_and_a_row_once_in_an_epoch(case: tuple[list[tuple[str, ...]], int, int]) -> None:
    texts, batch, seed = case
    found = plan_batches(texts, batch, 1.0, seed)
    rows = [row for one in found for row in one]
    assert len(set(rows)) == len(rows)
    for one in found:
        assert 1 <= len(one) <= batch
        counted = Counter(text for row in one for text in set(texts[row]))
        assert max(counted.values()) == 1
        assert 2 * len(one) >= len(found[0])
    # What is left would fill less than half a batch; rows of two texts chosen in another order, at most twice as much.
    free: set[str] = set()
    fitting = [
        row for row in sorted(set(range(len(texts))) - set(rows)) if free.isdisjoint(texts[row]) and not free.update(texts[row])
    ]
    assert len(fitting) < len(found[0])
    assert found == plan_batches(texts, batch, 1.0, seed)
    assert plan_batches(texts, batch, 2.0, seed)[: len(found)] == found


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 3), st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.25]))
def test_rows_without_common_texts_are_all_seen(rows: int, batch: int, seed: int, epochs: float) -> None:
    texts = [(str(row),) for row in range(rows)]
    found = plan_batches(texts, batch, epochs, seed)
    seen = Counter(row for one in found for row in one)
    expected = int(epochs) * rows + (max(1, round((epochs % 1) * rows)) if epochs % 1 else 0)
    lost = expected - sum(seen.values())
    assert 0 <= lost <= (int(epochs) + 1) * max(0, (min(batch, rows) - 1) // 2)
    assert max(seen.values()) <= -(-epochs // 1)
    if rows >= 20 and epochs == 2.25:
        per_epoch = plan_batches(texts, batch, 1.0, seed)
        assert found[: len(per_epoch)] == per_epoch
        assert found[len(per_epoch) : 2 * len(per_epoch)] != per_epoch
        assert plan_batches(texts, batch, epochs, seed + 1) != found


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 30), st.integers(31, 60), st.lists(st.integers(0, 90), max_size=3)), min_size=2, max_size=40
    ),
    batch=st.integers(2, 9),
)
def test_rows_share_negatives_with_each_other_but_no_row_s_negative_is_a_text_of_another(
    rows: list[tuple[int, int, list[int]]], batch: int
) -> None:
    pairs = [(f"{query}", f"{positive}") for query, positive, _ in rows]
    negatives = [[f"{one}" for one in listed] for _, _, listed in rows]
    for numbers in plan_batches(pairs, batch, 1.0, 0, negatives):
        own = [text for row in numbers for text in pairs[row]]
        assert len(own) == len(set(own))
        for row in numbers:
            assert not set(negatives[row]) & {text for other in numbers if other != row for text in pairs[other]}
    same = [(f"q{row}", f"p{row}") for row in range(40)]
    assert [len(numbers) for numbers in plan_batches(same, 16, 1.0, 0, [["n"]] * 40)] == [16, 16, 8]


def test_few_classes_use_up_their_rows() -> None:
    """Ten labels as positives: a batch holds each once, however large it was to be."""
    texts = [(f"question {row}", f"label {row % 10}") for row in range(500)]
    found = plan_batches(texts, 64, 1.0, 0)
    assert {len(one) for one in found} == {10}
    assert len(found) == 50


def test_learning_rates() -> None:
    def rates(**changes: Any) -> list[float]:
        return [round(rate(step, 12, run_options(**changes)), 3) for step in range(12)]

    assert rates(warmup=0.25, schedule="constant") == [0.333, 0.667, *[1.0] * 10]
    assert rates(warmup=0.0, schedule="linear") == [round(1 - step / 12, 3) for step in range(12)]
    assert rates(warmup=0.0, schedule="late") == [1.0] * 8 + [1.0, 0.75, 0.5, 0.25]
    cosine = rates(warmup=0.0, schedule="cosine")
    assert (cosine[0], cosine[6]) == (1.0, 0.5)
    assert cosine == sorted(cosine, reverse=True)


# Muon


def test_orthogonal_moves_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 24, 24)):
        matrices = torch.randn(*shape)
        values = torch.linalg.svdvals(orthogonal(matrices))
        assert 0.3 < float(values.min()) <= float(values.max()) < 1.3
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        cosine = (orthogonal(matrices) * (u @ v)).sum() / ((u @ v).norm() * orthogonal(matrices).norm())
        assert float(cosine) > 0.97


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_muon_is_for_matrices_of_layers_and_equals_torch_s(student: Student, precision: torch.dtype) -> None:
    assert [len(group) for group in sort(student)] == [56, 0, 0]
    whole = sort(Student(OPTIONS.load(str(student.encoder.spec.backbone))))
    assert [len(group) for group in whole] == [28, 1, 9]
    pretrained = sort(_NextToken(LlamaForCausalLM(SHAPE.config()), SHAPE))  # whose table is also its last product
    assert [len(group) for group in pretrained] == [14, 1, 5]
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(24)]
    module = torch.nn.Linear(16, 24)
    module.weight.data, module.bias.data = start[0].clone(), start[1].clone()
    mine, theirs = [module.weight, module.bias], [tensor.clone().requires_grad_() for tensor in start]
    optimizer = MuonAdamW(module, 0.01, 0.1, muon=True, precision=precision)
    muon = torch.optim.Muon([theirs[0]], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs[1]], lr=0.01, weight_decay=0.0, betas=(0.9, 0.98))
    for _, pair in product(range(4), ([mine, theirs],)):
        for one, other in zip(*pair, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
            each.zero_grad()
    torch.testing.assert_close(mine[1], theirs[1])
    torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=2e-3)  # torch's is computed in bfloat16
    assert (mine[0] - start[0]).abs().max().item() > 0.01


def test_the_result_loads_in_sentence_transformers(world: World, calm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [row["query"] for row in world.rows[:5]]
    theirs = SentenceTransformer(str(calm), trust_remote_code=True, device="cpu").encode(texts, normalize_embeddings=True)
    torch.testing.assert_close(
        torch.tensor(theirs), torch.tensor(Encoder.load(calm, dtype="float32").encode(texts)), rtol=0, atol=1e-5
    )
