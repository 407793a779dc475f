"""Encoders on the fast path: the vectors of transformers, on every core, and what happens when the model behind changes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embell import Encoder, EncoderError
from embell.engine import encoder
from embell.indexers import workers
from sentence_models import MINILM, Normalize, dense, plain_directory, qwen3, save
from tiny_models import SENTENCES, tiny_encoder_directory


def test_a_window_is_left_to_transformers_where_texts_are_longer(tmp_path: Path) -> None:
    directory = tiny_encoder_directory(tmp_path, "mistral")  # a window of 4 tokens
    encoder = Encoder.load(directory, dtype="float32", max_length=4)
    assert encoder.fast
    longer = encoder.with_max_length(20)
    assert not longer.fast
    longer.encode(SENTENCES)
    assert longer.with_max_length(4).fast  # nobody was given the network, so nobody can have changed it
    assert not Encoder.load(directory, dtype="float32", max_length=20).fast
    np.testing.assert_allclose(
        longer.encode(SENTENCES), Encoder.load(directory, dtype="float32", max_length=20).encode(SENTENCES), atol=1e-6
    )


ALONE = 18
"""So many of the texts are also run one at a time; the rest only keep those company in their batches."""
TEXTS = [*SENTENCES, "a", "river " * 30, "The river rose over night.", *(f"number {n}" * (n % 5 + 1) for n in range(40))]


def slow(encoder: Encoder) -> np.ndarray:
    """The vectors of the first texts by way of transformers, one text at a time."""
    vectors = [encoder.vectors(encoder.collate(encoder.tokenise([text], "document").rows)) for text in TEXTS[:ALONE]]
    return torch.nn.functional.normalize(torch.cat(vectors)).detach().numpy()


@pytest.mark.parametrize("pooling", ["mean", "last", "cls+max", "weighted-mean", "mean-sqrt-length"])
@pytest.mark.parametrize("prompt", ["{text}", 'The word for "{text}" is:'])
def test_encode_gives_what_transformers_gives(tmp_path: Path, pooling: str, prompt: str) -> None:
    directory = tiny_encoder_directory(tmp_path, "llama")
    options: dict[str, Any] = {"start_layer": 1, "pooling": pooling, "document_prompt": prompt, "dtype": "float32"}
    if pooling == "mean" and prompt != "{text}":
        options["pooled_tokens"] = "text"
    ours = Encoder.load(directory, **options)
    assert ours.fast
    found = ours.encode(TEXTS)
    np.testing.assert_allclose(found[:ALONE], slow(Encoder.load(directory, **options)), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "xlm-r", "qwen3"])
def test_models_of_sentence_transformers_take_the_fast_path(tmp_path: Path, kind: str) -> None:
    directory, plain = tmp_path / "model", plain_directory(tmp_path / "plain", kind)
    if kind == "qwen3":
        qwen3(directory, plain)
    else:
        save(directory, plain, dense(), Normalize())
    ours = Encoder.load(directory, dtype="float32")
    assert ours.fast
    np.testing.assert_allclose(ours.encode(TEXTS)[:ALONE], slow(Encoder.load(directory, dtype="float32")), atol=1e-5)


@pytest.mark.parametrize("model", [None, MINILM], ids=["embell-mini", "MiniLM"])
def test_real_weights(model: Path | None) -> None:
    exact = Encoder.load(model, dtype="float32")
    assert exact.fast
    vectors = exact.encode(TEXTS)
    np.testing.assert_allclose(vectors[:ALONE], slow(Encoder.load(model, dtype="float32")), atol=1e-5)
    rounded = Encoder.load(model, dtype="bfloat16")
    assert rounded.fast
    assert (rounded.encode(TEXTS[:12]) * vectors[:12]).sum(axis=1).min() > 0.999


def test_who_takes_the_network_may_change_it(tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_encoder_directory(tmp_path, "llama"), dtype="float32")
    shorter = encoder.with_max_length(50)
    before = encoder.encode(SENTENCES)
    assert encoder.fast
    with torch.no_grad():
        encoder.network.get_input_embeddings().weight.mul_(-1.5)  # type: ignore[operator]
    assert not encoder.fast
    changed = encoder.encode(SENTENCES)
    assert np.abs(changed - before).max() > 0.1
    np.testing.assert_allclose(shorter.encode(SENTENCES), changed, atol=1e-6)


def test_every_core_takes_batches_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_encoder_directory(tmp_path, "llama")
    encoder = Encoder.load(directory, dtype="float32", batch_tokens=40)
    alone = encoder.encode(TEXTS)
    threads = set()
    inner = type(encoder)._encode_batch

    def noted(self: Encoder, rows: Any) -> Any:
        threads.add((threading.current_thread().name, torch.get_num_threads()))
        return inner(self, rows)

    monkeypatch.setattr(type(encoder), "_encode_batch", noted)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = encoder.encode(TEXTS)
        assert torch.get_num_threads() == 3
        fresh: list[int] = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert fresh == [3]
    finally:
        torch.set_num_threads(before)
    assert {count for _, count in threads} == {1}
    assert len(threads) > 1
    assert not any("MainThread" in name for name, _ in threads)
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_results_come_in_order_and_failures_come_through() -> None:
    before = torch.get_num_threads()

    def work(number: int) -> int:
        if number == 30:
            raise EncoderError("thirty")
        return number * number

    try:
        torch.set_num_threads(2)
        assert list(workers.each_on_a_core(work, range(20))) == [(n, n * n) for n in range(20)]
        begun: list[int] = []
        for number, _ in workers.each_on_a_core(begun.append, range(100)):  # few results wait for somebody to take them
            assert len(begun) <= number + 1 + 4 * torch.get_num_threads()
        results = workers.each_on_a_core(work, range(100))
        assert [next(results)[0] for _ in range(30)] == list(range(30))
        with pytest.raises(EncoderError, match="thirty"):
            next(results)
    finally:
        torch.set_num_threads(before)


def test_several_devices_take_turns(tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_encoder_directory(tmp_path, "llama"), dtype="float32", batch_tokens=60)
    alone = encoder.encode(TEXTS)
    both = Encoder(replace(encoder._loaded, fast=encoder.fast * 2, heads=(encoder.head,)), 60)
    turns = [both._launch([row], turn).numpy() for turn, row in enumerate(both.tokenise(TEXTS, "document").rows)]
    vectors = np.concatenate(turns)
    np.testing.assert_allclose(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), alone, atol=1e-5)


def test_a_stream_that_fails_gives_first_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "WINDOW", 4)
    tiny = Encoder.load(tiny_encoder_directory(tmp_path, "llama"), dtype="float32")

    def texts() -> Iterator[str]:
        yield from TEXTS[:10]
        raise ValueError("the disk is gone")

    stream = tiny.encode_stream(texts())
    assert [len(next(stream)) for _ in range(3)] == [4, 4, 2]
    with pytest.raises(ValueError, match="the disk is gone"):
        next(stream)


@pytest.mark.parametrize("model", ["None", repr(str(MINILM))])
def test_the_embedded_model_needs_no_transformers(model: str) -> None:
    code = f"""
import sys
from embell import Encoder
encoder = Encoder.load({model}, dtype="float32")
assert encoder.encode(["a river", "a bridge"]).shape[0] == 2
print(any(name.split(".")[0] in ("transformers", "sklearn", "scipy") for name in sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(model != "None")


@pytest.mark.heavy
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
@pytest.mark.parametrize("model", [None, MINILM], ids=["embell-mini", "MiniLM"])
def test_a_graphics_card_gives_the_same_vectors(model: Path | None) -> None:
    exact = Encoder.load(model, device="cpu", dtype="float32").encode(TEXTS)
    for dtype, close in (("float32", 0.99999), ("bfloat16", 0.999), ("float16", 0.999)):
        card = Encoder.load(model, device="cuda", dtype=dtype, batch_tokens=300)
        assert card.fast
        assert (card.encode(TEXTS) * exact).sum(axis=1).min() > close


def test_a_model_that_was_replaced_since_is_not_mixed_with_the_one_in_memory(tmp_path: Path) -> None:
    directory = tiny_encoder_directory(tmp_path / "model", "llama")
    encoder = Encoder.load(directory, dtype="float32")
    before = encoder.encode(SENTENCES)
    tiny_encoder_directory(directory, "llama", seed=5)
    for use in (lambda: encoder.save(tmp_path / "copy"), lambda: encoder.network):
        with pytest.raises(EncoderError, match="its files have changed since it was loaded; load it again"):
            use()
    np.testing.assert_array_equal(encoder.encode(SENTENCES), before)


def test_the_process_s_defaults_change_nothing(tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_encoder_directory(tmp_path, "llama"), dtype="float32")
    before = encoder.encode(SENTENCES)
    torch.set_default_dtype(torch.bfloat16)
    try:
        np.testing.assert_allclose(encoder.encode(SENTENCES), before, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_copy_and_what_is_changed_in_the_head(tmp_path: Path) -> None:
    save(tmp_path / "model", plain_directory(tmp_path / "plain", "bert"), dense(), Normalize())
    encoder = Encoder.load(tmp_path / "model", dtype="float32")
    before = encoder.encode(SENTENCES)
    np.testing.assert_array_equal(copy.deepcopy(encoder).encode(SENTENCES), before)
    with torch.no_grad():
        next(encoder.head.parameters()).mul_(-1)
    assert encoder.fast
    assert np.abs(encoder.encode(SENTENCES) - before).max() > 0.1


def test_a_tokenizer_that_was_handed_out_counts_for_encoders_made_after(tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_encoder_directory(tmp_path, "llama"), dtype="float32")
    tokenizer = encoder.tokenizer
    assert encoder.tokens.tokenizer is tokenizer
    assert encoder.with_max_length(12).tokens.tokenizer is tokenizer


def test_encoding_goes_on_while_the_interpreter_shuts_down(tmp_path: Path) -> None:
    directory = tiny_encoder_directory(tmp_path, "llama")
    code = f"""
import threading, time, torch
from embell import Encoder
from embell.engine import encoder as module
module.WINDOW = 1000
torch.set_num_threads(2)
encoder = Encoder.load({str(directory)!r}, dtype="float32", batch_tokens=40)
def late():
    threading.main_thread().join()
    print(encoder.encode([f"number {{n}}" for n in range(50)]).shape)
    print(sum(len(block) for block in encoder.encode_stream(f"{{n}}" for n in range(2500))))
threading.Thread(target=late).start()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split("\n")[:2] == ["(50, 32)", "2500"], ran.stderr


def test_bf16_on_a_processor_that_has_nothing_for_it(tmp_path: Path) -> None:
    directory = tiny_encoder_directory(tmp_path, "llama")
    code = f"""
from embell import Encoder
encoder = Encoder.load({str(directory)!r}, dtype="bfloat16")
print(encoder.encode(["a river", "a bridge"]).shape, bool(encoder.fast))
"""
    old = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=old)
    assert ran.stdout.strip() == "(2, 32) True", ran.stderr
