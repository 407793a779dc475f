"""The encoder in training: packed or padded it is the encoder that texts are encoded with, and an adapter inside learns alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embell import Encoder, EncoderError, UsageError
from embell.training.contrastive import contrastive
from embell.training.student import EncoderOptions, LoraOptions, Student
from tiny_models import SENTENCES
from training_parts import World, bert_directory, run_options, tiny_directory, weights

PACKED = ("llama", "mistral-full", "qwen2", "qwen3")
PADDED = ("gpt2", "gemma", "qwen3-sliding", "bert")
TEXTS = [*SENTENCES, "No.", "Yes.", "A river, a bridge."]
LORA = LoraOptions(lora_rank=4)
POOLED = ((0, "mean"), (2, "mean"), (None, "mean"), (1, "last"), (2, "cls"))
"""Start layer and pooling."""
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: tiny_directory(folder / family, family) for family in (*PACKED, *PADDED[:3])}
    return {**made, "bert": bert_directory(folder / "bert")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def wake(student: Student) -> None:
    """A new adapter changes nothing: give it weights that do."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)


def gradients(student: Student, vectors: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    weighing = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(3))
    (vectors * weighing).sum().backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize(
    ("family", "lora", "start", "pooling"),  # each two of family, adapter and pooling come together
    [
        pytest.param(
            family, LORA if (at + row) % 2 else None, *pooled, id=f"{family}-{'lora' if (at + row) % 2 else 'whole'}-{at}"
        )
        for row, family in enumerate(PACKED)
        for at, pooled in enumerate(POOLED)
    ],
)
def test_packed_vectors_and_gradients_are_those_of_transformers(
    directories: dict[str, Path], family: str, lora: LoraOptions | None, start: int | None, pooling: str
) -> None:
    encoder = Encoder.load(
        directories[family], start_layer=start, pooling=pooling, dtype="float32", document_prompt="Say: {text}!"
    )
    student = Student(encoder, (1, 3), lora)
    assert student.packed
    wake(student)
    rows = encoder.tokenise(TEXTS, "document").rows
    packed, by_depth = student(rows)
    mine = gradients(student, packed)
    padded = encoder.vectors(encoder.collate(rows))
    theirs = gradients(student, padded)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    assert mine.keys() == theirs.keys()
    assert len(mine) == (56 if lora else len(list(student.parameters())))
    for name, gradient in theirs.items():
        assert float((mine[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
    assert sorted(by_depth) == [1, 3]


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_vectors_in_bfloat16_are_near_those_in_float32(directories: dict[str, Path], family: str, weights: str) -> None:
    student = Student(Encoder.load(directories[family], start_layer=1, dtype=weights))
    rows = student.encoder.tokenise(TEXTS, "document").rows
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "float32"):
        vectors = student(rows)[0]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(student, vectors).values())
    precise = torch.from_numpy(Encoder.load(directories[family], start_layer=1, dtype="float32").encode(TEXTS))
    cosines = torch.cosine_similarity(vectors.detach().float(), precise)
    assert float(cosines.min()) > 0.999
    assert not torch.equal(torch.nn.functional.normalize(vectors.detach().float()), precise)


@cache
def vectors_at(directory: Path, depth: int, **options: Any) -> np.ndarray:
    """Those of the encoder of so many layers."""
    return Encoder.load(directory, layers=depth, **options).encode(TEXTS, normalize=False)


@pytest.mark.parametrize(
    ("family", "start"),  # BERT's layers look both ways anyway
    [(family, start) for family in (*PACKED, *PADDED) for start in (0, 2, None) if family != "bert" or start == 0],
)
def test_a_depth_is_the_encoder_of_so_many_layers(directories: dict[str, Path], family: str, start: int | None) -> None:
    bert = family == "bert"
    options: dict[str, Any] = {"dtype": "float32", **({} if bert else {"start_layer": start})}
    encoder = Encoder.load(directories[family], **options)
    expected = encoder.encode(TEXTS, normalize=False)
    depths = (1,) if bert else (1, 2, 3)
    student = Student(encoder, depths)
    assert student.packed == (family in PACKED)
    student.eval()
    rows = encoder.tokenise(TEXTS, "document").rows
    with torch.no_grad():
        whole, found = student(rows)
    np.testing.assert_allclose(whole, expected, atol=2e-5)
    assert tuple(found) == depths
    for depth in depths:
        if not bert:
            options["start_layer"] = start if start is not None and start < depth else None
        np.testing.assert_allclose(found[depth], vectors_at(directories[family], depth, **options), atol=2e-5, err_msg=str(depth))
    student.train()
    whole, found = student(rows)
    sum(((vectors - 1) ** 2).sum() for vectors in (whole, *found.values())).backward()
    for name, parameter in student.named_parameters():
        if not (bert and "pooler" in name):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("family", [PACKED[0], "bert"])
@pytest.mark.parametrize("depths", [(), (1,)])
def test_vectors_are_cut_where_the_encoder_s_are(directories: dict[str, Path], family: str, depths: tuple[int, ...]) -> None:
    encoder = Encoder.load(directories[family], dtype="float32", dim=8)
    student = Student(encoder, depths).eval()
    with torch.no_grad():
        whole, found = student(encoder.tokenise(TEXTS, "document").rows)
    np.testing.assert_allclose(whole, encoder.encode(TEXTS, normalize=False), atol=2e-5)
    assert {len(vectors[0]) for vectors in found.values()} <= {8}


def test_a_text_s_vector_does_not_depend_on_its_neighbours(directories: dict[str, Path]) -> None:
    student = Student(EncoderOptions(start_layer=1).load(str(directories["llama"])))
    rows = student.encoder.tokenise(TEXTS, "document").rows
    with torch.no_grad():
        together = student(rows)[0]
        for at in (0, 8, 10):
            torch.testing.assert_close(student([rows[at]])[0][0], together[at], rtol=0, atol=1e-5)
        torch.testing.assert_close(student(rows[::-1])[0].flip(0), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3-sliding"])
def test_padded_models_learn(world: World, directories: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = contrastive((world.pairs,), tmp_path / "run", str(directories[family]), run=run_options(steps=3))
    before, after = weights(directories[family]), weights(model)
    assert sum(not torch.equal(after[name], before[name]) for name in before) > len(before) - 4
    assert Encoder.load(model).encode(TEXTS).shape == (11, 32)


# Adapters


@pytest.fixture(scope="module")
def adapter(world: World) -> Path:
    return contrastive(
        (world.pairs,), world.model.parent / "adapter", str(world.model),
        encoder=EncoderOptions(start_layer=2), lora=replace(LORA, merge=False), run=run_options(steps=5),
    )  # fmt: skip


def test_an_adapter_learns_alone_and_merged_it_is_the_same(world: World, adapter: Path, tmp_path: Path) -> None:
    encoder = EncoderOptions(start_layer=2)
    merged = contrastive((world.pairs,), tmp_path / "run", str(world.model), encoder=encoder, lora=LORA, run=run_options(steps=5))
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (adapter / "model.safetensors").exists()
    assert {name.rsplit(".", 2)[1] for name in weights(adapter)} == {"lora_A", "lora_B"}
    assert Encoder.load(adapter).spec.start_layer == 2
    one, other = (Encoder.load(path, dtype="float32").encode(TEXTS) for path in (adapter, merged))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(one - Encoder.load(world.model, start_layer=2).encode(TEXTS)).max() > 0.01
    before, after = weights(world.model), weights(merged)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "_proj" not in name}


def test_training_goes_on_from_an_adapter(world: World, adapter: Path, tmp_path: Path) -> None:
    student = Student(EncoderOptions().load(str(adapter)))
    rows = student.encoder.tokenise(TEXTS, "document").rows
    with torch.no_grad():
        np.testing.assert_allclose(
            student(rows)[0], Encoder.load(adapter, dtype="float32").encode(TEXTS, normalize=False), atol=1e-5
        )
    for name, lora in {"whole": LoraOptions(), "lora": LORA}.items():
        model = contrastive((world.pairs,), tmp_path / name, str(adapter), lora=lora, run=run_options(steps=2))
        assert not (model / "adapter_config.json").exists()
        assert np.abs(Encoder.load(model).encode(TEXTS) - Encoder.load(adapter).encode(TEXTS)).max() > 1e-3
    with pytest.raises(UsageError, match="is an adapter itself"):
        contrastive((world.pairs,), tmp_path / "alone", str(adapter), lora=replace(LORA, merge=False))


def test_an_adapter_over_the_first_layers_or_the_embedded_model(world: World, tmp_path: Path) -> None:
    alone = replace(LORA, merge=False)
    cut = EncoderOptions(layers=2, start_layer=1)
    model = contrastive((world.pairs,), tmp_path / "cut", str(world.model), encoder=cut, lora=alone, run=run_options(steps=2))
    student = Encoder.load(world.model, layers=2, start_layer=1, adapter=model)
    np.testing.assert_allclose(Encoder.load(model).encode(TEXTS), student.encode(TEXTS), atol=1e-6)
    mini = contrastive((world.pairs,), tmp_path / "mini", lora=alone, run=run_options(steps=1, batch=4))
    assert np.abs(Encoder.load(mini).encode(TEXTS) - Encoder.load().encode(TEXTS)).max() > 1e-4


def test_adding_and_merging(directories: dict[str, Path]) -> None:
    encoder = Encoder.load(directories["llama"], start_layer=2, dtype="float32")
    before = encoder.encode(TEXTS)
    encoder.merge_adapter()  # there is none
    encoder.add_adapter(2, 8)
    np.testing.assert_allclose(encoder.encode(TEXTS), before, atol=1e-5)
    with pytest.raises(EncoderError, match="has an adapter already"):
        encoder.add_adapter(2)
    learnt = [(name, p) for name, p in encoder.network.named_parameters() if p.requires_grad]
    assert len(learnt) == 56
    assert all("lora_" in name for name, _ in learnt)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in learnt:
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    with_adapter = encoder.encode(TEXTS)
    assert np.abs(with_adapter - before).max() > 0.01
    encoder.merge_adapter()
    np.testing.assert_allclose(encoder.encode(TEXTS), with_adapter, atol=1e-5)
    assert not any("lora_" in name for name, _ in encoder.network.named_parameters())
    encoder.add_adapter(2)


def test_what_has_no_linear_layers(directories: dict[str, Path]) -> None:
    with pytest.raises(EncoderError, match="linear"):
        Student(Encoder.load(directories["gpt2"]), (), LORA)
