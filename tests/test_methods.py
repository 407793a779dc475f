"""Token prepending, echo, MetaEOL, fewer layers and fewer dimensions, against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embell import Encoder, EncoderError
from embell.engine import bellm
from embell.engine.tokens import TokenRow
from plain_path import (
    hidden_states,
    last_states,
    stock,
    tiny_bert_directory,
    tiny_static_directory,
    tokens_of,
    unit,
)
from tiny_models import HIDDEN, LAYERS, SENTENCES, decoder_layers, tiny_encoder_directory

FAMILIES = ("llama", "gpt2", "mistral", "qwen3")
FULL = ("llama", "gpt2", "qwen3")
"""The families without an attention window."""
TEXTS = ["A cat", *SENTENCES[:3], "漢字 🙂", "x"]
PREPENDED = {"document_prompt": 'This: <PST> "{text}" is:"', "query_prompt": "<PST> {text}", "start_layer": None}
ECHO = {"document_prompt": "D:{text}\nAgain:{text}", "query_prompt": "Q:{text}\nAgain:{text}", "pooled_tokens": "text"}

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tiny_encoder_directory(tmp_path_factory.mktemp(family), family) for family in FAMILIES}
    return made | {
        "bert": tiny_bert_directory(tmp_path_factory.mktemp("bert")),
        "static": tiny_static_directory(tmp_path_factory.mktemp("static")),
    }


def load(directory: Path, **options: Any) -> Encoder:
    return Encoder.load(directory, dtype="float32", **options)


def reach(encoder: Encoder, row: TokenRow) -> Tensor:
    """Which final states (first axis) of a row depend on the embeddings of which of its tokens, by gradient."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = encoder.network.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
    longer = TokenRow([*row.ids, 5, 5], row.begin, row.end, max(row.placeholder, 0))  # its neighbour gets padding
    states = encoder.forward(encoder.collate([row, longer])).last_hidden_state[0, : len(row.ids)]
    handle.remove()
    direction = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad(state @ direction, kept[0], retain_graph=True)[0] for state in states]
    return torch.stack([(gradient[0] != 0).any(dim=-1) for gradient in gradients])[:, : len(row.ids)]


def prepended_by_hand(encoder: Encoder, directory: Path, row: TokenRow, first: int, end: int) -> tuple[Tensor, ...]:
    """Each layer's output for one row without padding: the last state written over the placeholder's, layer by layer."""
    model = stock(directory)
    assert encoder._loaded.prepending is not None
    initial = encoder._loaded.prepending._initial
    outputs: list[Tensor] = []

    def before(index: int, module: Any, args: Any, kwargs: Any) -> Any:
        states = (args[0] if args else kwargs["hidden_states"]).clone()
        if index == 0:
            states[0, row.placeholder] = initial
        if first <= index < end:
            states[0, row.placeholder] = states[0, -1].clone()
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    handles = []
    for index, layer in enumerate(decoder_layers(model)):
        handles.append(layer.register_forward_pre_hook(lambda *a, i=index: before(i, *a), with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda m, a, out: outputs.append(out if isinstance(out, Tensor) else out[0])))
    with torch.no_grad():
        final = model(input_ids=torch.tensor([row.ids]), use_cache=False).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return *(output[0] for output in outputs), final


# token prepending


@pytest.mark.parametrize(
    ("family", "span"), [("llama", (0, 2)), ("llama", (1, 4)), ("gpt2", (1, 3)), ("mistral", (1, 3)), ("qwen3", (2, 4))]
)
def test_token_prepending_is_that_done_by_hand(directory: dict[str, Path], family: str, span: tuple[int, int]) -> None:
    encoder = load(directory[family], **PREPENDED, token_prepending=span)
    for kind in ("document", "query"):
        vectors = encoder.encode(TEXTS, kind)  # type: ignore[arg-type]
        for row, vector in zip(encoder.tokens(TEXTS, kind).rows, vectors, strict=True):  # type: ignore[arg-type]
            states = prepended_by_hand(encoder, directory[family], row, *span)[-1]
            np.testing.assert_allclose(vector, unit(states.mean(dim=0)), atol=1e-5)


@pytest.mark.parametrize("family", FULL)
def test_from_the_placeholder_on_all_tokens_know_the_whole_text_and_none_before_it(
    directory: dict[str, Path], family: str
) -> None:
    encoder = load(directory[family], **PREPENDED, token_prepending=(1, 3))
    (row,) = encoder.tokens(["two cats"], "document").rows
    position = torch.arange(len(row.ids))
    expected = (position[:, None] >= position) | (position[:, None] >= row.placeholder)
    expected[:, row.placeholder] = False  # which token stands there does not matter
    assert 0 < row.placeholder < len(row.ids) - 2
    assert torch.equal(reach(encoder, row), expected)


def test_states_before_the_placeholder_are_those_without_it(directory: dict[str, Path]) -> None:
    encoder = load(directory["llama"], **PREPENDED, token_prepending=(1, 3))
    (row,) = encoder.tokens([SENTENCES[0]], "document").rows
    with torch.no_grad():
        states = encoder.forward(encoder.collate([row])).last_hidden_state[0]
    plain = last_states(directory["llama"], row.ids)
    assert (states[: row.placeholder] - plain[: row.placeholder]).abs().max() == 0.0
    assert ((states[row.placeholder :] - plain[row.placeholder :]).abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_span_of_no_layers_changes_nothing_but_the_placeholders_start(directory: dict[str, Path], family: str) -> None:
    vectors = []
    for span in ((0, 0), (2, 2), (4, 4)):
        encoder = load(directory[family], **PREPENDED, token_prepending=span)
        (row,) = encoder.tokens(["A cat"], "document").rows
        vectors.append(encoder.encode("A cat"))
        by_hand = prepended_by_hand(encoder, directory[family], row, 0, 0)[-1]
        np.testing.assert_allclose(vectors[-1][0], unit(by_hand.mean(dim=0)), atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_array_equal(vectors[0], vectors[2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_placeholder_starts_the_same_in_each_run(directory: dict[str, Path], family: str) -> None:
    vectors = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        vectors.append(load(directory[family], **PREPENDED, token_prepending=(1, 3)).encode(TEXTS))
    np.testing.assert_array_equal(*vectors)


@every_family
def test_recorded_hidden_states_are_not_written_over(directory: dict[str, Path], family: str) -> None:
    encoder = load(directory[family], **PREPENDED, token_prepending=(1, 3))
    prepending = encoder._loaded.prepending
    assert prepending is not None
    (row,) = encoder.tokens(["A cat"], "document").rows
    by_hand = prepended_by_hand(encoder, directory[family], row, 1, 3)
    with torch.no_grad(), prepending.at(torch.tensor([row.placeholder]), torch.tensor([len(row.ids) - 1])):
        recorded = bellm.forward(encoder.network, torch.tensor([row.ids]), None, output_hidden_states=True).hidden_states
    assert len(recorded) == LAYERS + 1
    for index in range(1, LAYERS):
        torch.testing.assert_close(recorded[index][0], by_hand[index - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
@given(data=st.data())
@settings(max_examples=10)
def test_prepended_vectors_depend_on_their_own_text_only(directory: dict[str, Path], family: str, data: st.DataObject) -> None:
    encoder = remembered(directory[family])
    texts = data.draw(st.lists(st.sampled_from([*TEXTS, *SENTENCES[3:]]), min_size=2, max_size=6, unique=True))
    together = encoder.encode(texts)
    np.testing.assert_allclose(encoder.encode(texts[::-1])[::-1], together, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([encoder.encode(text) for text in texts]), together, atol=1e-5)


_encoders: dict[Path, Encoder] = {}


def remembered(directory: Path) -> Encoder:
    if directory not in _encoders:
        _encoders[directory] = load(directory, **PREPENDED, token_prepending=(1, 3))
    return _encoders[directory]


BEFORE = "<PST> {text}"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", {"token_prepending": (1, 5), "start_layer": None}, "ends at layer 5, but the model has 4 layers"),
        ("llama", {"token_prepending": (1, 4), "start_layer": None, "layers": 3}, "ends at layer 4, but the model has 3 layers"),
        ("llama", {"token_prepending": (1, 3), "start_layer": 2}, "reaches into the bidirectional layers from 2 on"),
        ("llama", {"token_prepending": (3, 1), "start_layer": None}, "0 <= first <= end"),
        ("llama", {"token_prepending": (-1, 2), "start_layer": None}, "0 <= first <= end"),
        ("llama", {"token_prepending": None}, "only means something with token_prepending"),
        ("llama", {"token_prepending": (1, 3), "query_prompt": "{text}"}, "once in each prompt"),
        ("llama", {"token_prepending": (1, 3), "query_prompt": "<PST> <PST> {text}"}, "once in each prompt"),
        ("llama", {"token_prepending": (1, 3), "query_prompt": "{text} <PST>"}, "must stand before {text}"),
        ("llama", {"token_prepending": (1, 3), "query_prompt": "<PST> {text} {text}"}, "token prepending and an echo"),
        ("bert", {"token_prepending": (0, 1)}, "token prepending is for decoders; every layer of this bert model"),
        ("static", {"token_prepending": (0, 1)}, "token_prepending means nothing for it"),
    ],
)
def test_token_prepending_that_cannot_work_is_refused(
    directory: dict[str, Path], model: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EncoderError, match=message.replace("{", r"\{")) as raised:
        load(directory[model], **{"query_prompt": BEFORE, "document_prompt": BEFORE, **options})
    assert len(str(raised.value).splitlines()) == 1


def test_token_prepending_works_below_the_bidirectional_layers(directory: dict[str, Path]) -> None:
    both, above = (
        load(directory["llama"], **{**PREPENDED, "start_layer": 3}, token_prepending=span) for span in ((1, 3), (1, 1))
    )
    assert np.abs(both.encode(TEXTS) - above.encode(TEXTS)).max() > 1e-3


# echo


@pytest.mark.parametrize(("family", "pooling"), [("llama", "mean"), ("gpt2", "last"), ("mistral", "mean"), ("qwen3", "max")])
def test_an_echo_pools_the_second_copy_alone(directory: dict[str, Path], family: str, pooling: str) -> None:
    encoder = load(directory[family], **ECHO, start_layer=None, pooling=pooling)
    for kind, letter in (("document", "D"), ("query", "Q")):
        for text, vector in zip(TEXTS, encoder.encode(TEXTS, kind), strict=True):  # type: ignore[arg-type]
            first = tokens_of(encoder, f"{letter}:{text}\nAgain:")
            ids = tokens_of(encoder, f"{letter}:{text}\nAgain:{text}")
            assert ids[: len(first)] == first
            second = last_states(directory[family], ids)[len(first) :]
            expected = {"mean": second.mean(dim=0), "last": second[-1], "max": second.amax(dim=0)}[pooling]
            np.testing.assert_allclose(vector, unit(expected), atol=1e-5)


@pytest.mark.parametrize("family", FULL)
def test_the_second_copy_has_seen_all_of_the_first(directory: dict[str, Path], family: str) -> None:
    encoder = load(directory[family], **ECHO, start_layer=None)
    (row,) = encoder.tokens(["two cats sat"], "document").rows
    assert 0 < row.begin < row.end == len(row.ids)
    copy = row.end - row.begin
    assert row.ids[2 : 2 + copy] == row.ids[row.begin :]
    seen = reach(encoder, row)
    assert seen[row.begin :, : row.begin].all()
    assert torch.equal(seen, torch.ones_like(seen).tril())
    one, other = (hidden_states(directory[family], tokens_of(encoder, f"D:{t}\nAgain:{t}"))[-1] for t in ("a cat", "a car"))
    assert (one[-5] - other[-5]).abs().max() > 1e-4, "the second copy's beginning does not depend on the first one's end"


def test_both_copies_of_a_cut_text_are_the_same(directory: dict[str, Path]) -> None:
    encoder = load(directory["llama"], **ECHO, start_layer=None, max_length=60)
    (row,) = encoder.tokens(["river bridge night " * 30], "document").rows
    copy = row.end - row.begin
    first = len(tokens_of(encoder, "D:"))
    assert row.ids[first : first + copy] == row.ids[row.begin : row.end]
    assert row.end == len(row.ids)
    assert 58 <= len(row.ids) <= 60
    assert copy >= (60 - len(tokens_of(encoder, "D:\nAgain:"))) // 2 - 1


@pytest.mark.parametrize(
    ("model", "start", "message"),
    [("llama", 0, "with start layer 0 every token sees all others"), ("bert", 0, "an echo is for decoders; every layer")],
)
def test_an_echo_where_all_tokens_see_each_other_is_refused(
    directory: dict[str, Path], model: str, start: int, message: str
) -> None:
    with pytest.raises(EncoderError, match=message):
        load(directory[model], **ECHO, start_layer=start)


# MetaEOL

PROMPTS = tuple(f'Task {word}: "{{text}}" in one word:"' for word in ("one", "two", "three", "four", "five", "six", "7", "8"))


@every_family
def test_a_text_under_several_prompts_is_the_mean_of_its_vectors(directory: dict[str, Path], family: str) -> None:
    options: dict[str, Any] = {"start_layer": None, "pooling": "last"}
    encoder = load(directory[family], **options, document_prompt=PROMPTS, query_prompt=PROMPTS[:2])
    for kind, prompts in (("document", PROMPTS), ("query", PROMPTS[:2])):
        for text, vector in zip(TEXTS, encoder.encode(TEXTS, kind), strict=True):  # type: ignore[arg-type]
            filled = [tokens_of(encoder, prompt.replace("{text}", text)) for prompt in prompts]
            states = torch.stack([last_states(directory[family], ids)[-1] for ids in filled])
            np.testing.assert_allclose(vector, unit(states.mean(dim=0)), atol=1e-5)


def test_one_prompt_of_several_is_that_prompt_alone(directory: dict[str, Path]) -> None:
    alone = load(directory["llama"], preset="prompteol")
    listed = load(directory["llama"], preset="prompteol", document_prompt=(alone.spec.document_prompt,))
    np.testing.assert_array_equal(listed.encode(TEXTS), alone.encode(TEXTS))


def test_the_order_of_prompts_does_not_matter(directory: dict[str, Path]) -> None:
    options: dict[str, Any] = {"start_layer": None, "pooling": "last", "max_length": 80, "on_long": "chunk"}
    texts = [*TEXTS, "river bridge night " * 12]
    there = load(directory["llama"], **options, document_prompt=PROMPTS)
    back = load(directory["llama"], **options, document_prompt=PROMPTS[::-1])
    assert len(there.tokens(texts, "document").rows) > 8 * len(texts)
    np.testing.assert_allclose(there.encode(texts), back.encode(texts), atol=1e-6)


# fewer layers, fewer dimensions


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 1), ("llama", 4), ("gpt2", 2), ("mistral", 3), ("mistral", 1), ("qwen3", 2)]
)
def test_fewer_layers_end_in_the_final_norm_of_what_they_leave(directory: dict[str, Path], family: str, layers: int) -> None:
    full = stock(directory[family])
    (norm,) = [module for name, module in full.named_modules() if name in ("norm", "ln_f")]
    encoder = load(directory[family], layers=layers, start_layer=None)
    assert encoder.spec.layers == layers
    for text, vector in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        states = hidden_states(directory[family], tokens_of(encoder, text))[layers]
        with torch.no_grad():
            expected = states if layers == LAYERS else norm(states)
        np.testing.assert_allclose(vector, unit(expected.mean(dim=0)), atol=1e-5)
    dropped = sum(weight.numel() for layer in decoder_layers(full)[layers:] for weight in layer.parameters())
    kept = sum(weight.numel() for weight in encoder.network.parameters())
    assert sum(weight.numel() for weight in full.parameters()) - kept == dropped
    assert (dropped > 0) == (layers < LAYERS)


@every_family
def test_the_start_layer_counts_in_the_layers_that_are_kept(directory: dict[str, Path], family: str, tmp_path: Path) -> None:
    encoder = load(directory[family], layers=3, start_layer=-1)
    assert (encoder.spec.layers, encoder.spec.start_layer) == (3, 2)
    by_number = load(directory[family], layers=3, start_layer=2)
    np.testing.assert_array_equal(encoder.encode(TEXTS), by_number.encode(TEXTS))
    assert np.abs(encoder.encode(TEXTS) - load(directory[family], layers=3, start_layer=None).encode(TEXTS)).max() > 1e-3
    encoder.save(tmp_path)
    again = load(tmp_path)
    assert (again.spec.layers, again.spec.start_layer) == (3, 2)
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_layers_that_the_model_does_not_have_are_refused(directory: dict[str, Path]) -> None:
    for options, message in (
        ({"layers": 5}, "cannot keep 5 layers of a model that has 4"),
        ({"layers": 0}, "cannot keep 0 layers"),
        ({"layers": 2, "start_layer": 2}, "start layer 2 lies outside the model, which has 2 layers"),
        ({"layers": 2, "start_layer": -3}, "start layer -3 lies outside the model, which has 2 layers"),
        ({"layers": 2, "start_layer": 1, "pooling": "last"}, "equals the causal model"),
    ):
        with pytest.raises(EncoderError, match=message):
            load(directory["llama"], **options)
    with pytest.raises(EncoderError, match="layers means nothing for it"):
        load(directory["static"], layers=1)


def test_an_adapter_saved_alone_remembers_how_many_layers_were_kept(directory: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(directory["llama"]), config).save_pretrained(tmp_path / "adapter")
    encoder = load(directory["llama"], adapter=tmp_path / "adapter", layers=2)
    encoder.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (again.spec.layers, again.spec.start_layer) == (2, 1)
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize("dim", [1, 7, HIDDEN])
def test_fewer_dimensions_are_the_first_of_them_at_length_1(directory: dict[str, Path], dim: int, tmp_path: Path) -> None:
    full = load(directory["llama"]).encode(TEXTS)
    encoder = load(directory["llama"], dim=dim)
    assert encoder.dim == encoder.spec.dim == dim
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors, [unit(vector[:dim]) for vector in full], atol=1e-6)
    encoder.save(tmp_path)
    for again in (load(tmp_path), Encoder.from_spec(encoder.spec, dtype="float32")):
        assert again.dim == dim
        np.testing.assert_array_equal(again.encode(TEXTS), vectors)


def test_more_dimensions_than_there_are_are_refused(directory: dict[str, Path]) -> None:
    for options, message in (
        ({"dim": HIDDEN + 1}, f"dim {HIDDEN + 1} is more than the model's vectors have: {HIDDEN}"),
        ({"dim": 0}, "dim must be at least 1"),
    ):
        with pytest.raises(EncoderError, match=message):
            load(directory["llama"], **options)
    assert load(directory["llama"], dim=HIDDEN + 1, pooling="mean+max").dim == HIDDEN + 1
