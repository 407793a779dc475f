"""BeLLM besides its acceptance checks (test_backbones.py): masks, the probe, undoing, training, packed texts."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from embell.engine import bellm
from embell.errors import EncoderError
from tiny_models import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    LENGTH,
    SLIDING,
    assert_reach,
    attentions,
    combinations,
    make_batch,
    pad,
    reach,
    real_tokens,
    run,
    sliding_layers,
    texts,
    tiny_encoder_directory,
    tiny_model,
)

# Transformers gave the switch another name in 5.23, which older versions lack.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

every_family = pytest.mark.parametrize("family", FAMILIES)
every_backbone = pytest.mark.parametrize(("family", "attention"), combinations())
PADDINGS = ("none", "left", "right")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models only lose time to a thread pool
    yield
    torch.set_num_threads(threads)


# --- the tiny models of these tests


@every_family
@pytest.mark.parametrize("layers", [LAYERS, 5])
def test_the_tiny_encoder_directory_loads(family: str, layers: int, tmp_path: Path) -> None:
    directory = tiny_encoder_directory(tmp_path / "model", family, layers)
    model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    bellm.make_bidirectional(model, 3)
    bellm.probe(model, 3)
    assert model.config.num_hidden_layers == layers
    assert model.dtype == torch.float32
    assert tokenizer.is_fast
    assert len(tokenizer) <= model.config.vocab_size
    encoded = tokenizer(["The river rose.", "¿Łódź?"], padding=True, return_tensors="pt")
    assert tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True) == "The river rose."
    assert run(model, encoded["input_ids"], encoded["attention_mask"]).isfinite().all()


# --- the probe


@every_backbone
def test_the_probe_accepts_a_correct_model_in_bfloat16(family: str, attention: str) -> None:
    model = tiny_model(family, attention, dtype=torch.bfloat16)
    for start in (0, 3):
        undo = bellm.make_bidirectional(model, start)
        bellm.probe(model, start)
        undo()


@every_backbone
def test_the_probe_accepts_the_right_start_and_refuses_every_other(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    for start in range(LAYERS + 1):
        undo = bellm.make_bidirectional(model, start)
        bellm.probe(model, start)
        for claimed in {start - 1, start + 1, LAYERS - start} & set(range(LAYERS + 1)) - {start}:
            wrong = f"layer {claimed} of 4 is causal" if claimed < start else f"layer {start} of 4 looks ahead"
            with pytest.raises(EncoderError, match=wrong):
                bellm.probe(model, claimed)
        undo()


@every_backbone
def test_the_probe_notices_a_missing_mask_swap(family: str, attention: str) -> None:
    for start in (0, 2, 3):
        model = tiny_model(family, attention)
        for index, module in bellm.attention_modules(model).items():
            if index >= start:
                module.is_causal = False  # type: ignore[assignment]
        # SDPA without padding gets no mask at all, so there the flag is enough; but a text longer than the window has one.
        only_padded = attention == "sdpa" and not any(sliding_layers(family))
        with pytest.raises(EncoderError, match=f"layer {start} of 4 is causal on padded" if only_padded else "is causal"):
            bellm.probe(model, start)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "sdpa" in attentions(family)])
def test_the_probe_notices_a_missing_flag(family: str) -> None:
    # A text shorter than the window comes without a mask.
    changes: dict[str, Any] = {"sliding_window": 8} if family in SLIDING else {}
    for start in (0, 2):
        model = tiny_model(family, "sdpa", **changes)
        bellm.make_bidirectional(model, start)
        for module in bellm.attention_modules(model).values():
            module.is_causal = True  # type: ignore[assignment]
        with pytest.raises(EncoderError, match="is causal without padding"):
            bellm.probe(model, start)


@every_backbone
def test_the_probe_notices_a_causal_layer_behind_one_that_looks_ahead(family: str, attention: str) -> None:
    """All states differ there, whichever way that layer looks."""
    for layer in (2, 3):
        model = tiny_model(family, attention)
        bellm.make_bidirectional(model, 1)
        module = bellm.attention_modules(model)[layer]
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module.is_causal = True  # type: ignore[assignment]
        with pytest.raises(EncoderError, match=f"layer {layer} of 4 is causal"):
            bellm.probe(model, 1)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    for training in (True, False):
        model = tiny_model("gpt2").train(training)  # GPT-2 drops out, which the probe must not meet
        bellm.make_bidirectional(model, 2)
        state = torch.random.get_rng_state()
        bellm.probe(model, 2)
        assert model.training is training
        assert torch.equal(torch.random.get_rng_state(), state)


def test_the_probe_refuses_a_model_without_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    output = SimpleNamespace(last_hidden_state=torch.zeros(1, 6, HIDDEN))
    monkeypatch.setattr(bellm, "forward", lambda *args, **options: output)
    with pytest.raises(EncoderError, match="4 layers but returns 0 hidden states"):
        bellm.probe(model, 2)


# --- undoing it


@every_backbone
def test_undo_restores_the_model(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    batches = [make_batch(padding, 3) for padding in PADDINGS]
    before = [run(model, *batch) for batch in batches]
    for start in (0, 2, 3, 4):
        undo = bellm.make_bidirectional(model, start)
        changed = [not torch.equal(run(model, *batch), old) for batch, old in zip(batches, before, strict=True)]
        assert changed == [start < LAYERS] * 3, start
        undo()
        undo()  # a second time does no harm
        for padding, batch, old in zip(PADDINGS, batches, before, strict=True):
            assert torch.equal(run(model, *batch), old), (start, padding)
    bellm.probe(model, LAYERS)


# --- training


def without_dropout(family: str) -> dict[str, Any]:
    if family == "gpt2":
        return {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return {"dropout": 0.0} if family == "opt" else {}


@every_backbone
def test_gradient_checkpointing_gives_the_same_gradients(family: str, attention: str) -> None:
    model = tiny_model(family, attention, **without_dropout(family)).train()
    bellm.make_bidirectional(model, 2)
    for side in ("left", "right"):
        model.gradient_checkpointing_disable()
        plain = gradients(model, *make_batch(side, 3))
        assert len(plain) > 4 * LAYERS
        for reentrant in (True, False):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
            checkpointed = gradients(model, *make_batch(side, 3))
            assert plain.keys() == checkpointed.keys()
            for name, gradient in plain.items():
                assert torch.allclose(checkpointed[name], gradient, rtol=1e-5, atol=1e-6), (side, reentrant, name)


def gradients(model: nn.Module, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    model.zero_grad()
    states = bellm.forward(model, ids, mask).last_hidden_state
    states[real_tokens(ids, mask)].tanh().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@every_backbone
def test_a_lora_adapter_keeps_the_directions(family: str, attention: str) -> None:
    fused = {"gpt2": ["c_attn"], "gpt-neox": ["query_key_value"], "phi3": ["qkv_proj"]}
    targets = fused.get(family, ["q_proj", "v_proj"])
    model = tiny_model(family, attention)
    bellm.make_bidirectional(model, 2)
    batches = [make_batch(padding, 3) for padding in PADDINGS]
    before = [run(model, *batch) for batch in batches]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    adapted = get_peft_model(model, lora)
    for padding, (ids, mask), old in zip(PADDINGS, batches, before, strict=True):
        assert (run(adapted, ids, mask) - old).abs().max() > 1e-3, padding
        seen = reach(model, lambda ids=ids, mask=mask: bellm.forward(adapted, ids, mask))  # type: ignore[misc]
        assert_reach(seen, real_tokens(ids, mask), 2, family, padding)
    bellm.probe(adapted, 2)
    merged = adapted.merge_and_unload()
    bellm.probe(merged, 2)


# --- several texts in one row


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family, attention in combinations() if family != "opt"],  # OPT's mask does not ask for positions
)
def test_packed_texts_do_not_see_each_other(family: str, attention: str) -> None:
    rows = texts(LENGTH, 3, LENGTH + 4)
    for start in (0, 2, 3):
        model = tiny_model(family, attention)
        bellm.make_bidirectional(model, start)
        with torch.no_grad():
            packed = model(
                input_ids=torch.cat(rows)[None],
                position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
                attention_mask=None,
                use_cache=False,
            ).last_hidden_state[0]
        separate = torch.cat([run(model, row[None])[0] for row in rows])
        assert (packed - separate).abs().max() < 1e-5, start


# --- one mask after the other


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])  # one mask a call, one with a window, one of each
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_the_same_shape_are_not_mixed_up(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    bellm.make_bidirectional(model, 2)
    alone = {length: run(model, texts(length)[0][None])[0] for length in range(1, 10)}
    for length in [9, 3, 5, 4, 8, 1, 2, 7, 6] * 2:
        for side in ("left", "right"):
            ids, mask = pad(texts(length), 10, side)
            assert (run(model, ids, mask)[mask.bool()] - alone[length]).abs().max() < 1e-5, (length, side)


@every_backbone
def test_a_configuration_that_says_causal_does_not_overrule_the_layers(family: str, attention: str) -> None:
    """Transformers then tells each attention so in every call, and SDPA heeds that more than the module."""
    model, plain = tiny_model(family, attention, is_causal=True), tiny_model(family, attention)
    for changed in (model, plain):
        bellm.make_bidirectional(changed, 2)
    bellm.probe(model, 2)
    for padding in ("short", *PADDINGS):
        batch = make_batch(padding, 3)
        assert torch.equal(run(model, *batch), run(plain, *batch)), padding


def test_threads_that_share_a_model_do_not_mix_up_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    hook, module = bellm._Symmetriser(), nn.Identity()
    ours = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    theirs = torch.eye(6, dtype=torch.bool)[None, None]

    def interrupted(*args: Any) -> Any:
        monkeypatch.undo()
        hook(module, (), {"attention_mask": theirs})  # as if another thread got its turn here
        return weakref.ref(*args)

    monkeypatch.setattr(bellm, "weakref", SimpleNamespace(ref=interrupted))
    for _ in range(2):
        assert hook(module, (), {"attention_mask": ours})[1]["attention_mask"].all()
    assert vars(bellm)["weakref"] is weakref


# --- the masks themselves


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, list[int], int]]:
    """Rows of one batch: padding on the left and on the right, the text of each position, the window."""
    length = draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        left = draw(st.integers(0, length))
        right = draw(st.integers(0, length - left))
        breaks = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        rows.append((left, right, list(np.cumsum(breaks)), draw(st.integers(1, length + 1))))
    return rows


@settings(deadline=None, max_examples=300)
@given(layouts(), st.sampled_from([torch.bool, torch.float32, torch.float16, torch.bfloat16]), st.booleans())
def test_symmetrise_against_its_definition(
    rows: list[tuple[int, int, list[int], int]], dtype: torch.dtype, infinite: bool
) -> None:
    length = len(rows[0][2])
    causal = np.zeros((len(rows), 1, length, length), dtype=bool)
    real = np.zeros((len(rows), length), dtype=bool)
    for row, (left, right, text, window) in enumerate(rows):
        real[row, left : length - right] = True
        for query in range(length):
            for key in range(query + 1):
                causal[row, 0, query, key] = real[row, key] and text[query] == text[key] and query - key < window
    mask = torch.from_numpy(causal)
    if dtype != torch.bool:
        hidden = float("-inf") if infinite else torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)
    original = mask.clone()
    result = bellm.symmetrise(mask)
    assert isinstance(result, Tensor)
    assert torch.equal(mask, original)
    assert result.dtype == dtype
    assert result.shape == mask.shape
    if dtype == torch.bool:
        sees = result.numpy()[:, 0]
    else:
        assert set(result.unique().tolist()) <= {0.0, torch.finfo(dtype).min}
        sees = (result == 0).numpy()[:, 0]
    for row in range(len(rows)):
        for query in range(length):
            if real[row, query]:
                for key in range(length):
                    either = causal[row, 0, query, key] or causal[row, 0, key, query]
                    assert sees[row, query, key] == (real[row, key] and either)
            else:
                assert not (sees[row, query] & ~real[row]).any()
                assert sees[row, query].any() == real[row].any()
    again = bellm.symmetrise(result)
    assert isinstance(again, Tensor)
    assert torch.equal(again, result)


def test_symmetrise_leaves_no_mask_alone() -> None:
    assert bellm.symmetrise(None) is None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5), "eager or sdpa"),
        ((2, 5, 5), "eager or sdpa"),
        ((2, 1, 1, 5), "use_cache=False"),
        ((2, 1, 3, 5), "use_cache=False"),
        ((2, 4, 5, 5), "separate attention mask for each head"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_symmetrise_refuses_other_masks(shape: tuple[int, ...], message: str, dtype: torch.dtype) -> None:
    with pytest.raises(EncoderError, match=message):
        bellm.symmetrise(torch.ones(shape).to(dtype))


def test_symmetrise_refuses_block_masks() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    block = create_block_mask(lambda b, h, q, k: q >= k, B=None, H=None, Q_LEN=128, KV_LEN=128, device="cpu")
    with pytest.raises(EncoderError, match="eager or sdpa"):
        bellm.symmetrise(block)  # type: ignore[arg-type]


# --- which layer to start from


@given(st.integers(1, 80), st.integers(-200, 200))
def test_resolve_start(layers: int, start: int) -> None:
    if -layers <= start < layers:
        assert bellm.resolve_start(start, layers) == range(layers)[start]
    else:
        with pytest.raises(EncoderError, match=f"start layer {start} lies outside the model, which has {layers} layers"):
            bellm.resolve_start(start, layers)


def test_no_start_means_no_bidirectional_layer() -> None:
    assert bellm.resolve_start(None, LAYERS) == LAYERS


@pytest.mark.parametrize("start", [-1, LAYERS + 1])
def test_make_bidirectional_refuses_a_start_outside_the_model(start: int) -> None:
    with pytest.raises(EncoderError, match="outside the model"):
        bellm.make_bidirectional(tiny_model("llama"), start)
