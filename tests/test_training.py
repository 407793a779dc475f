"""The recipes: each has the loss that its sources define, and a model learns with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import log_softmax, logsumexp, softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conftest import write_jsonl
from embell import CorpusError, EmbellError, Encoder, EncoderError, UsageError
from embell.engine.tokens import TokenRow
from embell.training.batches import plan_batches
from embell.training.contrastive import contrastive
from embell.training.distill import distill
from embell.training.fresh import ShapeOptions, fresh_student
from embell.training.graded import graded
from embell.training.nesting import NestingOptions
from embell.training.pairs import Triplet, read_nli, read_triplets
from embell.training.pretrain import _NextToken, pretrain
from embell.training.run import training_device
from embell.training.student import EncoderOptions, LoraOptions
from embell.training.teacher import CrossEncoder, Teacher
from training_parts import World, judge_directory, losses, metrics, run_options, scores

OPTIONS = EncoderOptions(start_layer=2)
SHAPE = ShapeOptions(new_layers=2, hidden=32, inner=48, heads=2, vocabulary=300, positions=64)
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def teacher(world: World) -> Path:
    """An encoder that knows the topics."""
    run = world.model.parent / "taught"
    return contrastive((world.triplets,), run, str(world.model), encoder=OPTIONS, run=run_options(steps=50))


def first_batch(texts: list[tuple[str, ...]], batch: int = 16) -> list[int]:
    return plan_batches(texts, batch, 9.0, 0)[0]


def unit(vectors: Any) -> np.ndarray:
    array = np.asarray(vectors, dtype=np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def infonce(columns: list[np.ndarray], masked: np.ndarray | None = None) -> float:
    """Columns: queries, positives, perhaps negatives."""
    logits = unit(columns[0]) @ unit(np.concatenate(columns[1:])).T / 0.05
    if masked is not None:
        logits[masked & ~np.eye(*logits.shape, dtype=bool)] = -np.inf
    return float(np.mean(logsumexp(logits, axis=1) - np.diagonal(logits)))


def cosent(similarities: np.ndarray, labels: np.ndarray) -> float:
    wrong = [
        20 * (a - b)
        for a, x in zip(similarities, labels, strict=True)
        for b, y in zip(similarities, labels, strict=True)
        if x < y
    ]
    return float(logsumexp([0, *wrong]))


def angle(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    u, v = ((one := unit(side))[:, :16] + 1j * one[:, 16:] for side in (first, second))
    product = (u * v.conj()).sum(axis=1)
    return np.abs(product.real + product.imag)


def divergence(student: np.ndarray, wanted: np.ndarray) -> float:
    found = []
    for at in range(len(student)):
        mine, theirs = (np.delete(unit(side) @ unit(side)[at], at) / 0.05 for side in (student, wanted))
        found.append((softmax(theirs) * (log_softmax(theirs) - log_softmax(mine))).sum())
    return float(np.mean(found))


def check(run: Path, recorded: list[float], by_hand: float, better: float) -> None:
    """The first losses, and how much a held-out score must rise."""
    found = losses(run)
    assert found[0] == pytest.approx(by_hand, rel=1e-4)
    assert found[1:4] == pytest.approx(recorded, rel=1e-4)
    before, after = scores(run)
    assert after > before + better, (before, after)


def vectors_of(model: Path | str, texts: list[str], **options: Any) -> np.ndarray:
    return Encoder.load(str(model), dtype="float32", **options).encode(texts, normalize=False)


def test_contrastive_pairs(world: World, tmp_path: Path) -> None:
    contrastive(
        (world.pairs,), tmp_path / "run", str(world.model), evaluate=(world.held_out,), encoder=OPTIONS, run=run_options(steps=35)
    )
    rows = [world.rows[at] for at in first_batch([(row["query"], row["positive"]) for row in world.rows])]
    columns = [vectors_of(world.model, [row[name] for row in rows], start_layer=2) for name in ("query", "positive")]
    check(tmp_path / "run", PAIRS, infonce(columns), 20)


def test_contrastive_triplets_nested(world: World, tmp_path: Path) -> None:
    nesting = NestingOptions((8, 16), (1, 3))
    contrastive(
        (world.triplets,), tmp_path / "run", str(world.model),
        evaluate=(world.held_out,), encoder=OPTIONS, nesting=nesting, run=run_options(steps=35),
    )  # fmt: skip
    rows = [world.rows[at] for at in first_batch([tuple(row.values()) for row in world.rows])]

    def columns(**options: Any) -> list[np.ndarray]:
        return [vectors_of(world.model, [row[name] for row in rows], **options) for name in ("query", "positive", "negative")]

    deep = columns(start_layer=2)
    expected = infonce(deep) + infonce([c[:, :8] for c in deep]) + infonce([c[:, :16] for c in deep])
    for depth, start in ((1, None), (3, 2)):
        early = columns(layers=depth, start_layer=start)
        expected += infonce(early) + infonce([c[:, :8] for c in early]) + infonce([c[:, :16] for c in early])
        for whole, part in zip(deep, early, strict=True):
            log_whole, log_part = log_softmax(whole, axis=1), log_softmax(part, axis=1)
            expected += (np.exp(log_whole) * (log_whole - log_part)).sum(axis=1).mean() / 3
    check(tmp_path / "run", NESTED, expected, 20)


def test_contrastive_with_a_guide(world: World, teacher: Path, tmp_path: Path) -> None:
    contrastive(
        (world.triplets,), tmp_path / "run", str(world.model), guide=str(teacher), mask_above=0.85,
        evaluate=(world.held_out,), encoder=OPTIONS, run=run_options(steps=30),
    )  # fmt: skip
    rows = [world.rows[at] for at in first_batch([tuple(row.values()) for row in world.rows])]
    texts = [[row[name] for row in rows] for name in ("query", "positive", "negative")]
    columns = [vectors_of(world.model, column, start_layer=2) for column in texts]
    guide = [Encoder.load(teacher, dtype="float32").encode(column) for column in texts]
    masked = guide[0] @ np.concatenate(guide[1:]).T > 0.85
    assert 16 < masked.sum() < 200
    check(tmp_path / "run", GUIDED, infonce(columns, masked), 20)


def test_graded(world: World, tmp_path: Path) -> None:
    graded(
        (world.scored,), tmp_path / "run", str(world.model),
        angle_weight=0.1, evaluate=(world.held_out,), encoder=OPTIONS, run=run_options(steps=60, batch=32),
    )  # fmt: skip
    rows = [world.scored_rows[at] for at in first_batch([()] * len(world.scored_rows), 32)]
    first, second = (vectors_of(world.model, [row[name] for row in rows], start_layer=2) for name in ("sentence1", "sentence2"))
    labels = np.array([row["score"] for row in rows])
    expected = cosent((unit(first) * unit(second)).sum(axis=1), labels) + 0.1 * cosent(angle(first, second), labels)
    check(tmp_path / "run", GRADED, expected, 20)


def test_distill_from_a_teacher(world: World, teacher: Path, tmp_path: Path) -> None:
    distill(
        (world.texts,), tmp_path / "run", str(world.model),
        teacher=str(teacher), evaluate=(world.held_out,), encoder=OPTIONS, run=run_options(steps=30, warmup=0.1),
    )  # fmt: skip
    texts = [text for at in first_batch([tuple(group) for group in world.groups]) for text in world.groups[at]]
    student, wanted = vectors_of(world.model, texts, start_layer=2), vectors_of(teacher, texts)
    expected = 5 * (1 - (unit(student) * unit(wanted)).sum(axis=1)).mean() + divergence(student, wanted)
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=2e-3)  # the teacher's vectors are kept in float16
    check(tmp_path / "run", DISTILLED, losses(tmp_path / "run")[0], 20)


def test_a_text_that_comes_again_is_read_once_by_the_teacher(world: World, teacher: Path, tmp_path: Path) -> None:
    groups = [*world.groups[:9], *world.groups[:30]]
    data = write_jsonl(tmp_path / "texts.jsonl", [{"texts": group} for group in groups])
    run = tmp_path / "run"
    distill((data,), run, str(world.model), teacher=str(teacher), encoder=OPTIONS, run=run_options(steps=1, batch=12))
    distinct = list(dict.fromkeys(chain.from_iterable(groups)))
    assert (run / "teacher" / "vectors.f16").stat().st_size == 2 * 32 * len(distinct)
    rows = first_batch([tuple(group) for group in groups], 12)
    assert min(rows) < 9 < max(rows)
    texts = [text for at in rows for text in groups[at]]
    student, wanted = vectors_of(world.model, texts, start_layer=2), vectors_of(teacher, texts)
    expected = 5 * (1 - (unit(student) * unit(wanted)).sum(axis=1)).mean() + divergence(student, wanted)
    assert losses(run)[0] == pytest.approx(expected, rel=2e-3)


def test_distill_a_new_student(world: World, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = run_options(steps=40, optimizer="muon", learning_rate=1e-2)
    distill(
        (world.texts,), run, "new", teacher=str(teacher), principal=True, fit_steps=0, shape=SHAPE, nesting=NestingOptions((8,), (1,)),
        evaluate=(world.held_out,), encoder=EncoderOptions(start_layer=1), run=options,
    )  # fmt: skip
    texts = [text for at in first_batch([tuple(group) for group in world.groups]) for text in world.groups[at]]
    deep, early = (
        vectors_of(run / "student", texts, start_layer=1),
        vectors_of(run / "student", texts, layers=1, start_layer=None),
    )
    wanted = unit(vectors_of(teacher, texts)) @ np.load(run / "teacher" / "axes.npy")

    def whole(vectors: np.ndarray) -> float:
        return 5 * (1 - (unit(vectors) * unit(wanted)).sum(axis=1)).mean() + divergence(vectors, wanted)

    expected = whole(deep) + 0.4 * whole(early) + 0.3 * divergence(deep[:, :8], wanted)
    assert losses(run)[0] == pytest.approx(expected, rel=2e-3)
    found = losses(run)
    assert found[1:4] == pytest.approx(FRESH, rel=1e-4)
    assert np.mean(found[-5:]) < 0.7 * np.mean(found[:5])
    before, after = scores(run)
    assert after > before + 4
    encoder = Encoder.load(run / "model")
    assert (encoder.spec.start_layer, encoder.dim) == (1, 32)
    np.testing.assert_array_equal(encoder.encode("Q  x\n R"), encoder.encode(" q X r"))


def test_distill_from_a_column_of_scores(world: World, tmp_path: Path) -> None:
    tens = [{**row, "score": 10 * row["score"] - 3} for row in world.scored_rows]
    (tmp_path / "tens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tens))
    distill(
        (tmp_path / "tens.jsonl",), tmp_path / "run", str(world.model),
        score="score", evaluate=(world.held_out,), encoder=OPTIONS, run=run_options(steps=35),
    )  # fmt: skip
    rows = [world.scored_rows[at] for at in first_batch([()] * len(tens))]
    first, second = (vectors_of(world.model, [row[name] for row in rows], start_layer=2) for name in ("sentence1", "sentence2"))
    expected = np.mean(((unit(first) * unit(second)).sum(axis=1) - [row["score"] for row in rows]) ** 2)
    check(tmp_path / "run", FROM_SCORES, expected, 20)


def test_distill_from_a_cross_encoder(world: World, tmp_path: Path) -> None:
    distill(
        (world.scored,), tmp_path / "run", str(world.model),
        cross_encoder=str(world.judge), encoder=OPTIONS, run=run_options(steps=30, warmup=0.1),
    )  # fmt: skip
    rows = [world.scored_rows[at] for at in first_batch([()] * len(world.scored_rows))]
    texts = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    first, second = (vectors_of(world.model, column, start_layer=2) for column in texts)
    judge = CrossEncoder(str(world.judge))
    network, tokenizer = judge._network, judge._tokenizer
    with torch.no_grad():
        one_by_one = [
            float(network(**tokenizer(a, b, return_tensors="pt")).logits.sigmoid()) for a, b in zip(*texts, strict=True)
        ]
    expected = np.mean(((unit(first) * unit(second)).sum(axis=1) - one_by_one) ** 2)
    found = losses(tmp_path / "run")
    assert found[:4] == pytest.approx([expected, *JUDGED], rel=1e-4)
    assert np.mean(found[-10:]) < 0.6 * np.mean(found[:5])
    with pytest.raises(EncoderError, match="has 3 outputs"):
        CrossEncoder(str(judge_directory(tmp_path / "three", 3)))


def test_pretrain(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = pretrain((world.texts,), run, piece=5, held_out=0.1, shape=SHAPE, run=run_options(steps=30, batch=32))
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    ids = [i for text in chain.from_iterable(world.groups) for i in [tokenizer(text)["input_ids"]]]
    pieces = [i[begin : begin + 5] for i in ids for begin in range(0, len(i), 5) if len(i) - begin > 1]
    assert any(len(i) > 5 for i in ids)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()[int(0.1 * len(pieces)) :]
    torch.manual_seed(0)
    config = SHAPE.config()
    config.vocab_size = len(tokenizer)
    untrained = LlamaForCausalLM(config)
    batch = [torch.tensor([pieces[order[at]]]) for at in plan_batches([()] * len(order), 32, 9.0, 0)[0]]
    with torch.no_grad():
        assert {row.shape[1] for row in batch} == {2, 5}
        sums = [float(untrained(input_ids=row, labels=row).loss) * (row.shape[1] - 1) for row in batch]
    found = losses(run)
    assert found[0] == pytest.approx(sum(sums) / sum(row.shape[1] - 1 for row in batch), rel=1e-4)
    assert found[1:4] == pytest.approx(PRETRAINED, rel=1e-4)
    before, after = scores(run, "perplexity")
    assert after < before / 3

    trained = AutoModelForCausalLM.from_pretrained(model).eval()
    kept = load_file(model / "model.safetensors")
    assert torch.equal(trained.model.embed_tokens.weight, kept["model.embed_tokens.weight"])
    aside = [
        torch.tensor([pieces[at]]) for at in torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    ]
    aside = aside[: int(0.1 * len(pieces))]
    with torch.no_grad():
        sums = [float(trained(input_ids=row, labels=row).loss) * (row.shape[1] - 1) for row in aside]
    assert np.exp(sum(sums) / sum(row.shape[1] - 1 for row in aside)) == pytest.approx(after, rel=1e-4)
    assert Encoder.load(model, start_layer=1).encode(["A B C", "0 1 2"]).shape == (2, 32)
    again = pretrain((world.texts,), run, piece=5, held_out=0.1, shape=SHAPE, run=run_options(steps=30, batch=32))
    assert again == model
    assert losses(run) == found


def test_no_piece_sees_another() -> None:
    torch.manual_seed(0)
    config = SHAPE.config()
    model = _NextToken(LlamaForCausalLM(config), SHAPE)
    rows = [
        TokenRow([5, 9, 11, 40], 0, 4),
        TokenRow([6, 7], 0, 2),
        TokenRow([8, 1, 30, 2, 9, 9], 0, 6),
        TokenRow([3, 7, 2, 5], 0, 4),
    ]
    sums = sorted(map(tuple, model(rows)[0].tolist()))
    alone = []
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            alone.append((float(model.network(input_ids=ids, labels=ids).loss) * (len(row.ids) - 1), len(row.ids) - 1.0))
    np.testing.assert_allclose(sums, sorted(alone), rtol=1e-5)


def test_pretrain_with_a_tokenizer_of_its_own(world: World, tmp_path: Path) -> None:
    own, shape = str(world.model), replace(SHAPE, vocabulary=ShapeOptions.vocabulary)
    model = pretrain((world.texts,), tmp_path / "run", tokenizer=own, held_out=0, shape=shape, run=run_options(steps=2))
    assert AutoTokenizer.from_pretrained(model).get_vocab() == AutoTokenizer.from_pretrained(world.model).get_vocab()
    assert not scores(tmp_path / "run", "perplexity")
    (tmp_path / "short.jsonl").write_text('{"text": "A"}\n')
    with pytest.raises(CorpusError, match="no text has two tokens"):
        pretrain((tmp_path / "short.jsonl",), tmp_path / "none", tokenizer=own, shape=shape)


def test_the_teacher_reads_each_text_once(world: World, teacher: Path, tmp_path: Path) -> None:
    texts = list(chain.from_iterable(world.groups))
    mine = Teacher(str(teacher), None, tmp_path / "kept", texts, False, "float32")
    expected = Encoder.load(teacher, dtype="float32").encode(texts[:6])
    np.testing.assert_allclose(mine([0, 3, 3, 5]), expected[[0, 3, 3, 5]], atol=1e-3)
    kept = np.memmap(tmp_path / "kept" / "vectors.f16", np.float16, "r+", shape=(len(texts), 32))
    assert np.flatnonzero(kept.any(axis=1)).tolist() == [0, 3, 5]
    kept[3] = np.eye(32)[7]  # were it encoded again, this would be lost
    kept[5, :9] = 0.5  # a row that was being written when the process was killed
    kept.flush()
    known = np.memmap(tmp_path / "kept" / "known", bool, "r+", shape=len(texts))
    assert np.flatnonzero(known).tolist() == [0, 3, 5]
    known[5] = False
    known.flush()
    again = Teacher(str(teacher), None, tmp_path / "kept", texts, False, "float32")
    np.testing.assert_array_equal(again([3])[0], np.eye(32)[7])
    np.testing.assert_allclose(again([4, 5]), expected[4:], atol=1e-3)
    coarse = Teacher(str(teacher), None, tmp_path / "kept", texts, False, "bfloat16")
    np.testing.assert_allclose(coarse([3])[0], expected[3], atol=1e-2)
    others = Teacher(str(teacher), None, tmp_path / "kept", [*texts[:3], "Z 9 8", *texts[4:]], False, "float32")
    np.testing.assert_allclose(others([3])[0], Encoder.load(teacher, dtype="float32").encode("Z 9 8")[0], atol=1e-3)


def test_principal_axes_keep_cosines_and_order_energy(world: World, teacher: Path, tmp_path: Path) -> None:
    texts = list(chain.from_iterable(world.groups))[:200]
    turned = Teacher(str(teacher), None, tmp_path / "kept", texts, True)(range(200)).numpy()
    plain = Encoder.load(teacher).encode(texts)
    np.testing.assert_allclose(turned @ turned.T, plain @ plain.T, atol=1e-3)
    energy = (turned**2).sum(axis=0)
    assert (np.diff(energy) <= 1e-4).all()
    assert energy[:8].sum() > (plain[:, :8] ** 2).sum() + 20


def test_a_fresh_student_is_nearly_a_bag_of_the_teacher_s_vectors(world: World, teacher: Path, tmp_path: Path) -> None:
    texts = list(chain.from_iterable(world.groups))
    source = Teacher(str(teacher), None, tmp_path / "kept", texts, True)
    directory = fresh_student(SHAPE, source, texts, tmp_path / "student", 0, 0, 0)
    student = Encoder.load(directory, start_layer=1, dtype="float32")
    table = student.network.get_input_embeddings().weight.detach()[: len(student.tokenizer)]
    assert not table[0].any()
    assert float(table[1:].square().mean().sqrt()) == pytest.approx(0.7, rel=0.05)
    strings = [str(student.tokenizer.decode([token])).strip() or "space" for token in range(len(student.tokenizer))]
    wanted = source.turned(torch.from_numpy(source.encoder.encode(strings)))
    wanted = wanted - wanted.mean(dim=0)
    assert float(torch.cosine_similarity(table[1:], wanted[1:]).min()) > 0.999
    rows = student.tokenise(texts[:100], "document").rows
    bags = torch.stack([table[row.ids].mean(dim=0) for row in rows])
    near = torch.cosine_similarity(torch.from_numpy(student.encode(texts[:100])), bags)
    assert float(near.min()) > 0.9
    layer = student.network.layers[0]
    for quiet, usual in ((layer.self_attn.o_proj, layer.self_attn.q_proj), (layer.mlp.down_proj, layer.mlp.up_proj)):
        assert 0.016 < float(quiet.weight.detach().std() / usual.weight.detach().std()) < 0.024
    assert fresh_student(SHAPE, source, texts, tmp_path / "student", 1, 0, 0) == directory
    with pytest.raises(UsageError, match="hidden is 64, more than the 32"):
        fresh_student(ShapeOptions(hidden=64, heads=2, vocabulary=300), source, texts, tmp_path / "wide", 0, 0, 0)


def test_a_fresh_student_has_no_more_tokens_than_its_texts_give(world: World, teacher: Path, tmp_path: Path) -> None:
    texts = list(chain.from_iterable(world.groups))
    source = Teacher(str(teacher), None, tmp_path / "kept", texts, True)
    shape = replace(SHAPE, vocabulary=24_576)
    student = Encoder.load(fresh_student(shape, source, texts, tmp_path / "student", 0, 5, 0), start_layer=1)
    assert student.network.config.vocab_size == len(student.tokenizer) < 24_576
    assert len(student.network.get_input_embeddings().weight) == len(student.tokenizer)


def test_a_teacher_of_another_width(world: World, tmp_path: Path) -> None:
    narrow = Encoder.load(world.model, start_layer=2, dim=16)
    narrow.save(tmp_path / "narrow")
    with pytest.raises(UsageError, match=r"32 components and the teacher's 16: .*--cosine-weight 0"):
        distill((world.texts,), tmp_path / "run", str(world.bert), teacher=str(tmp_path / "narrow"), run=run_options(steps=2))
    made = distill(
        (world.texts,),
        tmp_path / "run",
        str(world.bert),
        teacher=str(tmp_path / "narrow"),
        cosine_weight=0.0,
        run=run_options(steps=2),
    )
    assert Encoder.load(made).dim == 32


def test_a_narrower_student_learns_the_leading_principal_components(world: World, teacher: Path, tmp_path: Path) -> None:
    run, shape = tmp_path / "run", replace(SHAPE, hidden=16, heads=2)
    settings: dict[str, Any] = {
        "fit_steps": 0,
        "shape": shape,
        "encoder": EncoderOptions(start_layer=1),
        "run": run_options(steps=2),
    }
    with pytest.raises(UsageError, match=r"16 components and the teacher's 32: .*--principal"):
        distill((world.texts,), tmp_path / "plain", "new", teacher=str(teacher), **settings)
    distill((world.texts,), run, "new", teacher=str(teacher), principal=True, **settings)
    texts = [text for at in first_batch([tuple(group) for group in world.groups]) for text in world.groups[at]]
    student = vectors_of(run / "student", texts, start_layer=1)
    wanted = unit(vectors_of(teacher, texts)) @ np.load(run / "teacher" / "axes.npy")
    expected = 5 * (1 - (unit(student) * unit(wanted[:, :16])).sum(axis=1)).mean() + divergence(student, wanted)
    assert losses(run)[0] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("width", [16, 32])
def test_a_teacher_turns_towards_a_student_that_has_its_axes(world: World, teacher: Path, tmp_path: Path, width: int) -> None:
    texts = list(chain.from_iterable(world.groups))[:300]
    shape = replace(SHAPE, hidden=width, heads=2)
    principal = Teacher(str(teacher), None, tmp_path / "principal", texts, True)
    student = Encoder.load(fresh_student(shape, principal, texts, tmp_path / "student", 0, 60, 0), start_layer=1, dtype="float32")
    ours = torch.from_numpy(student.encode(texts))

    def nearness(vectors: torch.Tensor) -> float:
        return float(torch.cosine_similarity(vectors[:, :width], ours).mean())

    source = Teacher(str(teacher), None, tmp_path / "kept", texts, False)
    plain = source(range(300))
    source.turn_towards(student)
    turned = source(range(300))
    np.testing.assert_allclose(turned @ turned.T, plain @ plain.T, atol=1e-3)  # a turn, whatever the student's width
    assert nearness(turned) >= nearness(principal(range(300))) - 1e-3 > nearness(plain) + 0.3
    again = Teacher(str(teacher), None, tmp_path / "kept", texts, False)
    again.turn_towards(student)
    assert torch.equal(again(range(300)), turned)


def test_a_student_goes_on_with_the_axes_that_it_has(world: World, teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": str(teacher), "encoder": EncoderOptions(start_layer=1)}
    first = distill(
        (world.texts,), tmp_path / "first", "new", principal=True, fit_steps=60, shape=SHAPE, run=run_options(steps=2), **settings
    )
    for aligned in (False, True):
        distill((world.texts,), tmp_path / str(aligned), str(first), aligned=aligned, run=run_options(steps=1), **settings)
    assert losses(tmp_path / "True")[0] < losses(tmp_path / "False")[0] - 1
    for wrong in ({"principal": True}, {"model": "new"}):
        with pytest.raises(UsageError, match="aligned is for a student that has its axes"):
            distill((world.texts,), tmp_path / "wrong", **{"model": str(first), "aligned": True, **settings, **wrong})


def test_near_pairs_are_part_of_the_loss(world: World, teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": str(teacher), "fit_steps": 0, "shape": SHAPE, "encoder": EncoderOptions(start_layer=1)}
    for weight in (0.0, 7.0):
        distill((world.texts,), tmp_path / str(weight), "new", near_weight=weight, run=run_options(steps=1), **settings)
    texts = [text for at in first_batch([tuple(group) for group in world.groups]) for text in world.groups[at]]
    ours = unit(vectors_of(tmp_path / "7.0" / "student", texts, start_layer=1))
    theirs = unit(vectors_of(teacher, texts))
    wanted = theirs @ theirs.T
    near = np.triu(wanted > 0.5, 1)
    assert near.any()
    added = 7 * np.square(ours @ ours.T - wanted)[near].mean()
    assert losses(tmp_path / "7.0")[0] - losses(tmp_path / "0.0")[0] == pytest.approx(added, rel=5e-3)


def test_fitting_the_table_brings_a_fresh_student_nearer(world: World, teacher: Path, tmp_path: Path) -> None:
    texts = list(chain.from_iterable(world.groups))[:600]
    source = Teacher(str(teacher), None, tmp_path / "kept", texts, True)
    wanted = source(range(100))
    found = []
    for steps in (0, 40):
        student = Encoder.load(fresh_student(SHAPE, source, texts, tmp_path / str(steps), 0, steps, 0), start_layer=1)
        found.append(float(torch.cosine_similarity(torch.from_numpy(student.encode(texts[:100])), wanted).mean()))
    assert found[1] > found[0] + 0.1


@pytest.mark.parametrize(
    ("recipe", "settings", "error"),
    [
        (contrastive, {"guide": "x"}, "--guide and --mask-above"),
        (contrastive, {"temperature": 0.0}, "temperature"),
        (graded, {"tau": 0.0}, "tau"),
        (distill, {}, "--teacher"),
        (distill, {"teacher": "x", "score": "score"}, "not both"),
        (distill, {"teacher": "x", "cosine_weight": 0.0, "similarity_weight": 0.0}, "nothing would be learnt"),
        (distill, {"teacher": "x", "near_weight": -1.0}, "near_weight cannot be negative"),
        (distill, {"teacher": "x", "model": "new", "fit_steps": -1}, "fit_steps"),
        (distill, {"model": "new", "score": "score"}, '"new"'),
        (pretrain, {"piece": 1}, "piece"),
        (pretrain, {"shape": ShapeOptions(heads=0)}, "heads"),
        (pretrain, {"shape": ShapeOptions(heads=5)}, "5 heads"),
        (pretrain, {"shape": ShapeOptions(vocabulary=200)}, "vocabulary"),
        (pretrain, {"shape": ShapeOptions(epsilon=0.0)}, "epsilon"),
        (contrastive, {"run": run_options(batch=1)}, "batch must be at least 2"),
        (graded, {"run": run_options(batch=1)}, "batch must be at least 2"),
        (contrastive, {"run": run_options(seed=-1)}, "seed"),
        (contrastive, {"run": run_options(batch=0)}, "batch"),
        (contrastive, {"run": run_options(warmup=1.0)}, "warmup"),
        (contrastive, {"run": run_options(chunk=0)}, "chunk"),
        (contrastive, {"lora": LoraOptions(lora_rank=-1)}, "lora_rank"),
        (contrastive, {"lora": LoraOptions(lora_rank=2, lora_dropout=1.0)}, "lora_dropout"),
        (contrastive, {"nesting": NestingOptions((32,))}, "width 32"),
        (contrastive, {"encoder": EncoderOptions(causal=True, start_layer=1)}, "causal"),
    ],
)
def test_settings_that_mean_nothing(
    world: World, tmp_path: Path, recipe: Callable[..., Path], settings: dict[str, Any], error: str
) -> None:
    if recipe is contrastive and "model" not in settings:
        settings = {"model": str(world.model), **settings}
    data = {contrastive: world.pairs, graded: world.scored, distill: world.texts, pretrain: world.texts}[recipe]
    with pytest.raises(UsageError, match=error):
        recipe((data,), tmp_path / "run", **settings)


@pytest.mark.parametrize("recipe", [contrastive, graded, distill, pretrain])
def test_no_data(world: World, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    settings = {"teacher": str(world.bert)} if recipe is distill else {}
    with pytest.raises(UsageError, match="no data: give --data"):
        recipe((), tmp_path / "run", **settings)


@pytest.mark.parametrize("recipe", [contrastive, pretrain])
def test_a_device_that_is_not_there(world: World, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    settings = {"device": "cudu"} if recipe is pretrain else {"encoder": EncoderOptions(device="cudu")}
    with pytest.raises(EncoderError, match="device 'cudu' cannot be used"):
        recipe((world.pairs,), tmp_path / "run", text="query", **settings) if recipe is pretrain else recipe(
            (world.pairs,), tmp_path / "run", **settings
        )


def test_a_card_that_the_trainer_would_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embell.training.run.pick_device", torch.device)  # there may be no such card here
    assert training_device("cuda") == torch.device("cuda")
    with pytest.raises(UsageError, match=r"CUDA_VISIBLE_DEVICES=1"):
        training_device("cuda:1")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"nesting": NestingOptions(depths=(2,))}, "depth 2"),
        ({"nesting": NestingOptions(widths=(32,))}, "width 32"),
        ({"encoder": EncoderOptions(start_layer=2)}, "2 layers"),
        ({"encoder": EncoderOptions(pooling="maen")}, "maen"),
        ({"encoder": EncoderOptions(device="cudu")}, "cudu"),
        ({"lora": LoraOptions(lora_rank=2, lora_dropout=1.0)}, "lora_dropout"),
        ({"shape": replace(SHAPE, hidden=16)}, "16 components and the teacher's 32"),
    ],
)
def test_a_wrong_setting_of_a_new_student_is_told_before_the_teacher_reads(
    world: World, teacher: Path, tmp_path: Path, settings: dict[str, Any], error: str
) -> None:
    with pytest.raises(EmbellError, match=error):
        distill((world.texts,), tmp_path / "run", "new", teacher=str(teacher), **{"shape": SHAPE, **settings})
    path = tmp_path / "run" / "teacher" / "vectors.f16"
    assert not path.exists() or not np.fromfile(path, np.float16).any()


def test_a_student_is_made_anew_for_other_texts(world: World, teacher: Path, tmp_path: Path) -> None:
    def student(texts: list[str], begun: bool = False) -> bytes:
        source = Teacher(str(teacher), None, tmp_path / "kept", texts, True, begun=begun)
        made = fresh_student(SHAPE, source, texts, tmp_path / "student", 0, 3, 0)
        return (Path(made) / "model.safetensors").read_bytes()

    texts = list(chain.from_iterable(world.groups))
    first = student(texts[:200])
    assert student(texts[:200]) == first
    assert student(texts[:200], begun=True) == first
    assert student(texts[:150]) != first
    with pytest.raises(UsageError, match="teacher changed"):
        student(texts[:200], begun=True)


def test_rows_of_which_none_is_another_s_negative(world: World, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "A", "positive": letter} for letter in "BCDE"])
    with pytest.raises(CorpusError, match=r"pairs\.jsonl: all rows share a text"):
        contrastive((data,), tmp_path / "run", str(world.model), run=run_options())


@pytest.mark.parametrize("negative", ["A", "B", ["C", "B"]])
def test_a_negative_that_is_the_query_or_the_positive(tmp_path: Path, negative: Any) -> None:
    rows = [{"query": "A", "positive": "C", "negative": "D"}, {"query": "A", "positive": "B", "negative": negative}]
    with pytest.raises(CorpusError, match=r"rows\.jsonl:2: a negative is the query or the positive"):
        read_triplets((write_jsonl(tmp_path / "rows.jsonl", rows),))


@pytest.mark.parametrize("kind", ["words", "numbers", "texts of numbers"])
def test_nli_labels(tmp_path: Path, kind: str) -> None:
    labels: dict[str, list[Any]] = {
        "words": ["entailment", "neutral", "contradiction"], "numbers": [0, 1, 2], "texts of numbers": ["0", "1", "2"],
    }  # fmt: skip
    rows = [("P", "E", 0), ("P", "N", 1), ("P", "C", 2), ("P", "E", 2), ("Q", "F", 0), ("Q", "F", 2)]
    table = [{"premise": one, "hypothesis": other, "label": labels[kind][label]} for one, other, label in rows]
    found = read_nli((write_jsonl(tmp_path / "nli.jsonl", table),))
    # A hypothesis that some say follows and some say does not is not its own negative.
    assert found == [Triplet("P", "E", ("C",)), Triplet("Q", "F")]


def test_a_cross_encoder_cuts_what_it_cannot_hold(world: World, tmp_path: Path) -> None:
    directory = judge_directory(tmp_path / "judge")
    path = directory / "tokenizer_config.json"
    said = json.loads(path.read_text())
    said.pop("model_max_length", None)
    path.write_text(json.dumps(said))
    scores = CrossEncoder(str(directory))(["A B", "A " * 2000], ["B", "C " * 2000])
    assert torch.isfinite(scores).all()


def test_metrics_say_what_happened(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the plot
    run = tmp_path / "run"
    options = run_options(steps=6, report_every=2, evaluate_every=3, warmup=0.5, schedule="linear")
    contrastive((world.pairs,), run, str(world.model), evaluate=(world.held_out,), encoder=OPTIONS, run=options)
    lines = metrics(run)
    assert [line["step"] for line in lines if "scores" in line] == [0, 3, 6]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6]
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "lock", "metrics.jsonl", "model", "plot.png"]
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")


# Losses of the first steps but the very first, which the tests compute themselves.
PAIRS = [5.51684, 5.49015, 3.1739]
NESTED = [53.2541, 52.3818, 33.8125]
GUIDED = [5.30993, 5.7693, 3.2614]
GRADED = [18.6026, 18.2212, 14.4527]
DISTILLED = [7.5056, 4.20835, 1.58357]
FRESH = [10.8094, 11.3488, 11.788]
FROM_SCORES = [0.278933, 0.324699, 0.219233]
JUDGED = [0.127454, 0.101397, 0.0431323]
PRETRAINED = [5.59605, 5.55902, 5.52443]
