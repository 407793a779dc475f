"""The attention of BeLLM: which token sees which, in every layer, for every kind of batch.

The numbers in the section headings are those of the acceptance checks in methods.md B.10.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
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
from transformers import (
    AutoModel,
    BltConfig,
    CLIPVisionConfig,
    FalconConfig,
    FalconH1Config,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from embell.engine import bellm
from embell.errors import EncoderError
from tiny_models import FAMILIES, HIDDEN, LAYERS, SLIDING, VOCABULARY, WINDOW, tiny_encoder_directory, tiny_model

# Transformers gave the switch another name in 5.23, which older versions lack.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

LENGTH = 7  # of the texts; longer than the attention window

family = pytest.mark.parametrize("family", FAMILIES)
attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
starts = pytest.mark.parametrize("start", [0, 2, 3, 4])
padding = pytest.mark.parametrize("padding", ["none", "ones", "left", "right"])
side = pytest.mark.parametrize("side", ["left", "right"])
batch = pytest.mark.parametrize("batch", [1, 3])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models only lose time to a thread pool
    yield
    torch.set_num_threads(threads)


def texts(*lengths: int, seed: int = 1) -> list[Tensor]:
    """Random token ids, one row for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


def pad(rows: list[Tensor], length: int, side: str) -> tuple[Tensor, Tensor]:
    """The rows as one batch, and its attention mask; the padding has token ids of its own."""
    ids = torch.full((len(rows), length), 5)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, text in enumerate(rows):
        where = slice(length - len(text), length) if side == "left" else slice(0, len(text))
        ids[row, where], mask[row, where] = text, 1
    return ids, mask


def make_batch(padding: str, batch: int) -> tuple[Tensor, Tensor | None]:
    """A batch of texts: without a mask, with a mask of ones, or padded on one side."""
    if padding in ("none", "ones"):
        ids = torch.stack(texts(*[LENGTH] * batch))
        return ids, torch.ones_like(ids) if padding == "ones" else None
    return pad(texts(*[LENGTH, LENGTH - 2, LENGTH + 2][:batch]), LENGTH + 2, padding)


def real_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def run(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = bellm.forward(model, ids, mask, **options).last_hidden_state
    return output


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return list(model.h if hasattr(model, "h") else model.layers)  # type: ignore[arg-type]


def reach(model: nn.Module, run_model: Callable[[], Any]) -> list[Tensor]:
    """For each layer, which of its outputs depend on which of its inputs, by gradient.

    Each is a bool tensor `(batch, outputs, inputs)`. A gradient that is not exactly 0 counts.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
        return ((inputs[-1], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inputs[-1]})

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [layer.register_forward_pre_hook(cut, with_kwargs=True) for layer in decoder_layers(model)]
    handles += [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    run_model()
    for handle in handles:
        handle.remove()
    assert len(inputs) == len(outputs) == LAYERS
    direction = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))
    seen = []
    for before, after in zip(inputs, outputs, strict=True):
        rows = []
        for position in range(before.shape[1]):
            (gradient,) = torch.autograd.grad((after[:, position] @ direction).sum(), before, retain_graph=True)
            rows.append((gradient != 0).any(dim=-1))
        seen.append(torch.stack(rows, dim=1))
    return seen


def expected_reach(real: Tensor, start: int, windows: list[int | None]) -> list[Tensor]:
    """What `reach` must be where the query is a real token, written out token by token."""
    rows, length = real.shape
    layers = []
    for index in range(LAYERS):
        window = windows[index] or length
        sees = torch.zeros(rows, length, length, dtype=torch.bool)
        for row in range(rows):
            for query in range(length):
                for key in range(length):
                    near = abs(query - key) < window
                    allowed = key <= query or index >= start
                    sees[row, query, key] = bool(real[row, key]) and near and allowed
        layers.append(sees)
    return layers


def windows(family: str) -> list[int | None]:
    if family == "qwen3-sliding":
        return [None, WINDOW] * 2
    return [WINDOW if family == "mistral" else None] * LAYERS


def assert_reach(seen: list[Tensor], real: Tensor, start: int, family: str) -> None:
    for index, expected in enumerate(expected_reach(real, start, windows(family))):
        assert torch.equal(seen[index][real], expected[real]), f"layer {index}"


# --- 1. start = L is the stock model


@family
@attention
@padding
@batch
def test_without_bidirectional_layers_the_model_is_the_stock_model(family: str, attention: str, padding: str, batch: int) -> None:
    model = tiny_model(family, attention)
    ids, mask = make_batch(padding, batch)
    stock = run(model, ids, mask)
    bellm.make_bidirectional(model, LAYERS)
    assert torch.equal(run(model, ids, mask), stock)
    if mask is None:
        with torch.no_grad():
            assert torch.equal(model(ids).last_hidden_state, stock)


# --- 2. layers below start are causal, the others are not


@family
@attention
@padding
@batch
@pytest.mark.parametrize("start", [0, 2, 3])
def test_each_layer_sees_what_it_should(family: str, attention: str, padding: str, batch: int, start: int) -> None:
    model = tiny_model(family, attention)
    bellm.make_bidirectional(model, start)
    ids, mask = make_batch(padding, batch)
    seen = reach(model, lambda: bellm.forward(model, ids, mask))
    assert_reach(seen, real_tokens(ids, mask), start, family)


# --- 3. padding does not matter


@family
@attention
@side
@batch
def test_padding_changes_nothing(family: str, attention: str, side: str, batch: int) -> None:
    model = tiny_model(family, attention)
    bellm.make_bidirectional(model, 2)
    (text,) = texts(LENGTH)
    alone = run(model, text[None])[0]
    for pads in range(1, 65):
        neighbours = texts(LENGTH + pads, max(1, pads - 3), seed=pads)[: batch - 1]
        ids, mask = pad([text, *neighbours], LENGTH + pads, side)
        states = run(model, ids, mask)
        assert states.isfinite().all()
        assert (states[0, mask[0].bool()] - alone).abs().max() < 1e-5, f"{pads} pads"


@attention
def test_masks_of_the_same_shape_are_not_mixed_up(attention: str) -> None:
    model = tiny_model("mistral", attention)
    bellm.make_bidirectional(model, 2)
    alone = {length: run(model, texts(length)[0][None])[0] for length in range(1, 10)}
    for length in [9, 3, 5, 4, 8, 1, 2, 7, 6] * 2:
        for side in ("left", "right"):
            ids, mask = pad(texts(length), 10, side)
            assert (run(model, ids, mask)[mask.bool()] - alone[length]).abs().max() < 1e-5


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


# --- 4. start = 0 is what transformers calls is_causal=False


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
@attention
@padding
@batch
def test_start_zero_is_the_bidirectional_model_of_transformers(family: str, attention: str, padding: str, batch: int) -> None:
    changes: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    model = tiny_model(family, attention, **changes)
    ids, mask = make_batch(padding, batch)
    real = real_tokens(ids, mask)
    causal = run(model, ids, mask)
    theirs = run(model, ids, mask, is_causal=False)
    assert (theirs - causal)[real].abs().max() > 1e-3
    bellm.make_bidirectional(model, 0)
    assert (run(model, ids, mask) - theirs)[real].abs().max() < 1e-6


# --- 5. and 6. only the last layer: the last token stays as it was, the mean does not


@family
@attention
@padding
@batch
def test_the_last_layer_alone_changes_the_mean_but_not_the_last_token(
    family: str, attention: str, padding: str, batch: int
) -> None:
    model = tiny_model(family, attention)
    ids, mask = make_batch(padding, batch)
    real = real_tokens(ids, mask)
    last = torch.stack([row.nonzero().max() for row in real])
    rows = torch.arange(len(ids))

    def mean(states: Tensor) -> Tensor:
        return torch.stack([state[kept].mean(dim=0) for state, kept in zip(states, real, strict=True)])

    causal = run(model, ids, mask)
    undo = bellm.make_bidirectional(model, LAYERS - 1)
    one_layer = run(model, ids, mask)
    undo()
    bellm.make_bidirectional(model, LAYERS - 2)
    two_layers = run(model, ids, mask)
    assert (one_layer - causal)[rows, last].abs().max() < 1e-5
    assert (mean(one_layer) - mean(causal)).abs().amax(dim=1).min() > 1e-3
    assert (two_layers - causal)[rows, last].abs().amax(dim=1).min() > 1e-3


# --- 7. what comes after a token reaches it in layer `start`, and not before


@family
@attention
@padding
@batch
@pytest.mark.parametrize("start", [0, 2])
def test_a_later_token_changes_the_first_bidirectional_layer(
    family: str, attention: str, padding: str, batch: int, start: int
) -> None:
    model = tiny_model(family, attention)
    bellm.make_bidirectional(model, start)
    ids, mask = make_batch(padding, batch)
    position = int(real_tokens(ids, mask)[0].nonzero().min()) + 2
    changed = ids.clone()
    changed[0, position + 1] = (ids[0, position + 1] + 40) % VOCABULARY
    with torch.no_grad():
        one = bellm.forward(model, ids, mask, output_hidden_states=True).hidden_states
        other = bellm.forward(model, changed, mask, output_hidden_states=True).hidden_states
    same = [torch.equal(a[0, position], b[0, position]) for a, b in zip(one, other, strict=True)]
    assert same == [index <= start for index in range(LAYERS + 1)]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a[1:], b[1:])  # the other texts notice nothing


# --- 8. save and load


@family
@attention
@pytest.mark.parametrize("start", [0, 3])
def test_a_saved_model_is_causal_until_it_is_made_bidirectional_again(
    family: str, attention: str, start: int, tmp_path: Path
) -> None:
    model = tiny_model(family, attention)
    bellm.make_bidirectional(model, start)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
    with pytest.raises(EncoderError, match=f"layer {start} of {LAYERS} is causal"):
        bellm.probe(loaded, start)
    bellm.make_bidirectional(loaded, start)
    bellm.probe(loaded, start)
    ids, mask = make_batch("right", 3)
    assert torch.equal(run(loaded, ids, mask), run(model, ids, mask))
    assert_reach(reach(loaded, lambda: bellm.forward(loaded, ids, mask)), real_tokens(ids, mask), start, family)


@family
@pytest.mark.parametrize("layers", [LAYERS, 5])
def test_the_tiny_encoder_directory_loads(family: str, layers: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

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


@family
@attention
@starts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_accepts_a_correct_model(family: str, attention: str, start: int, dtype: torch.dtype) -> None:
    model = tiny_model(family, attention, dtype=dtype)
    bellm.make_bidirectional(model, start)
    bellm.probe(model, start)


@family
@attention
def test_the_probe_refuses_every_other_start(family: str, attention: str) -> None:
    for start in range(LAYERS + 1):
        model = tiny_model(family, attention)
        bellm.make_bidirectional(model, start)
        for claimed in set(range(LAYERS + 1)) - {start}:
            wrong = f"layer {claimed} of 4 is causal" if claimed < start else f"layer {start} of 4 looks ahead"
            with pytest.raises(EncoderError, match=wrong):
                bellm.probe(model, claimed)


@family
@attention
@pytest.mark.parametrize("start", [0, 2, 3])
def test_the_probe_notices_a_missing_mask_swap(family: str, attention: str, start: int) -> None:
    model = tiny_model(family, attention)
    for index, module in bellm.attention_modules(model).items():
        if index >= start:
            module.is_causal = False  # type: ignore[assignment]
    # SDPA without padding gets no mask at all, so there the flag is enough; but a text longer than the window has one.
    only_padded = attention == "sdpa" and family not in SLIDING
    with pytest.raises(EncoderError, match=f"layer {start} of 4 is causal on padded" if only_padded else "is causal"):
        bellm.probe(model, start)


@family
@pytest.mark.parametrize("start", [0, 2])
def test_the_probe_notices_a_missing_flag(family: str, start: int) -> None:
    changes: dict[str, Any] = (
        {"sliding_window": 8} if family in SLIDING else {}
    )  # a text shorter than the window comes without a mask
    model = tiny_model(family, "sdpa", **changes)
    bellm.make_bidirectional(model, start)
    for module in bellm.attention_modules(model).values():
        module.is_causal = True  # type: ignore[assignment]
    with pytest.raises(EncoderError, match="is causal without padding"):
        bellm.probe(model, start)


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


@family
@attention
@starts
def test_undo_restores_the_model(family: str, attention: str, start: int) -> None:
    model = tiny_model(family, attention)
    batches = [make_batch(padding, 3) for padding in ("none", "left", "right")]
    before = [run(model, *batch) for batch in batches]
    undo = bellm.make_bidirectional(model, start)
    changed = [not torch.equal(run(model, *batch), old) for batch, old in zip(batches, before, strict=True)]
    assert changed == [start < LAYERS] * 3
    undo()
    undo()  # a second time does no harm
    for batch, old in zip(batches, before, strict=True):
        assert torch.equal(run(model, *batch), old)
    bellm.probe(model, LAYERS)


# --- training


@family
@attention
@side
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, attention: str, side: str, reentrant: bool) -> None:
    still: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    model = tiny_model(family, attention, **still).train()
    bellm.make_bidirectional(model, 2)
    ids, mask = make_batch(side, 3)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        states = bellm.forward(model, ids, mask).last_hidden_state
        states[mask.bool()].tanh().sum().backward()  # type: ignore[union-attr]
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert len(plain) > 4 * LAYERS
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-5, atol=1e-6), name


@family
@attention
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_lora_adapter_keeps_the_directions(family: str, attention: str, padding: str) -> None:
    model = tiny_model(family, attention)
    bellm.make_bidirectional(model, 2)
    ids, mask = make_batch(padding, 3)
    before = run(model, ids, mask)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    adapted = get_peft_model(model, lora)
    assert (run(adapted, ids, mask) - before).abs().max() > 1e-3
    assert_reach(reach(model, lambda: bellm.forward(adapted, ids, mask)), real_tokens(ids, mask), 2, family)
    bellm.probe(adapted, 2)
    merged = adapted.merge_and_unload()
    bellm.probe(merged, 2)


# --- several texts in one row


@family
@attention
@pytest.mark.parametrize("start", [0, 2, 3])
def test_packed_texts_do_not_see_each_other(family: str, attention: str, start: int) -> None:
    model = tiny_model(family, attention)
    bellm.make_bidirectional(model, start)
    rows = texts(LENGTH, 3, LENGTH + 4)
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(rows)[None],
            position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
            attention_mask=None,
            use_cache=False,
        ).last_hidden_state[0]
    separate = torch.cat([run(model, row[None])[0] for row in rows])
    assert (packed - separate).abs().max() < 1e-5


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


# --- models of other kinds

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def other_model(config: PreTrainedConfig, attention: str = "eager") -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModel.from_config(config, attn_implementation=attention)
    model.eval()
    return model


def assert_untouched(model: nn.Module) -> None:
    assert all(module.is_causal for module in bellm.attention_modules(model).values())
    assert not any(module._forward_pre_hooks for module in bellm.attention_modules(model).values())


def test_a_state_space_model_is_refused() -> None:
    model = other_model(MambaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=4))
    with pytest.raises(EncoderError, match=r"layer 2 of this mamba model has no attention .*state-space"):
        bellm.make_bidirectional(model, 2)
    bellm.make_bidirectional(model, LAYERS)  # causal, as it is


def test_a_mixed_model_is_refused_unless_its_last_layers_are_attention() -> None:
    model = other_model(JambaConfig(**SHAPE, num_experts=1, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1))
    with pytest.raises(EncoderError, match=r"layer 2 of this jamba model has no attention .*state-space"):
        bellm.make_bidirectional(model, 1)
    assert_untouched(model)
    bellm.make_bidirectional(model, 3)
    bellm.probe(model, 3)


def test_a_state_space_beside_the_attention_is_refused() -> None:
    sizes: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    model = other_model(FalconH1Config(**SHAPE, **sizes))
    with pytest.raises(EncoderError, match=r"layer 3 of this falcon_h1 model has no attention .*state-space"):
        bellm.make_bidirectional(model, 3)
    assert_untouched(model)


def test_a_model_with_an_encoder_is_refused() -> None:
    model = other_model(T5Config(vocab_size=VOCABULARY, d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8))
    with pytest.raises(EncoderError, match="t5 model has an encoder and a decoder"):
        bellm.make_bidirectional(model, 1)


def test_a_model_without_one_stack_of_layers_is_refused() -> None:
    model = nn.Module()
    model.config = BltConfig()  # type: ignore[assignment]
    with pytest.raises(EncoderError, match="blt model is not one stack of decoder layers"):
        bellm.make_bidirectional(model, 0)


@attention
def test_biases_in_the_mask_are_refused(attention: str) -> None:
    """Falcon with ALiBi adds the distance of the tokens to the mask, and only backwards."""
    config = FalconConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, alibi=True)
    model = other_model(config, attention)
    bellm.make_bidirectional(model, 2)
    with pytest.raises(EncoderError, match="for each head"):
        bellm.probe(model, 2)


@attention
@starts
def test_a_mixture_of_experts_is_accepted(attention: str, start: int) -> None:
    """A token that goes to another expert changes the rounding of its neighbours, which is no look ahead."""
    model = other_model(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), attention)
    bellm.make_bidirectional(model, start)
    bellm.probe(model, start)
    with pytest.raises(EncoderError, match="probe failed"):
        bellm.probe(model, (start + 1) % (LAYERS + 1))


@pytest.mark.parametrize("start", [0, 2])
def test_a_multimodal_model_is_accepted(start: int) -> None:
    vision: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 28,
        "patch_size": 14,
    }
    config = LlavaConfig(text_config=LlamaConfig(**SHAPE), vision_config=CLIPVisionConfig(hidden_size=HIDDEN, **vision))
    model = other_model(config, "sdpa")
    bellm.make_bidirectional(model, start)
    bellm.probe(model, start)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", None])
def test_other_attention_kernels_are_refused(kernel: str | None) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = kernel
    with pytest.raises(EncoderError, match=r"need eager or sdpa attention, not .* attn_implementation='sdpa'"):
        bellm.make_bidirectional(model, 2)
    assert_untouched(model)
    bellm.make_bidirectional(model, LAYERS)  # nothing to change, nothing to refuse


def test_an_attention_that_takes_its_mask_by_position_is_refused() -> None:
    model = tiny_model("llama")
    bellm.make_bidirectional(model, 2)
    with pytest.raises(EncoderError, match="LlamaAttention does not take its attention_mask by name"):
        bellm.attention_modules(model)[2](torch.zeros(1, 2, HIDDEN), None, None)
