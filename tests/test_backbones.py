"""The acceptance checks of BeLLM, on every architecture that can be served and with each attention that it has.

The numbers are those of methods.md B.10. Each check also has to fail on models that were sabotaged in ways that are
easy to commit: see `SABOTAGE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from embell import Encoder
from embell.engine import bellm
from embell.errors import EncoderError
from tiny_models import (
    BATCHES,
    FAMILIES,
    LAYERS,
    LENGTH,
    SENTENCES,
    SLIDING,
    VOCABULARY,
    WINDOW,
    assert_reach,
    attentions,
    combinations,
    make_batch,
    pad,
    reach,
    real_tokens,
    run,
    texts,
    tiny_encoder_directory,
    tiny_model,
)

BOTH_WAYS = ("llama", "gemma3")
"""The families that are always tested with both attentions; the others with "eager" too in the heavy run."""


def marked(family: str, attention: str) -> Any:
    heavy = attention != attentions(family)[-1] and family not in BOTH_WAYS
    return pytest.param(family, attention, marks=pytest.mark.heavy if heavy else ())


every_backbone = pytest.mark.parametrize(("family", "attention"), [marked(*pair) for pair in combinations()])
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models only lose time to a thread pool
    yield
    torch.set_num_threads(threads)


def fresh(family: str, attention: str) -> PreTrainedModel:
    model = tiny_model(family, attention)
    assert model.config._attn_implementation == attention
    return model


@lru_cache(maxsize=50)
def shared(family: str, attention: str) -> PreTrainedModel:
    return fresh(family, attention)


@lru_cache(maxsize=50)
def shared_both_ways(family: str, attention: str) -> PreTrainedModel:
    """For what transformers calls is_causal=False, with the windows that it then has."""
    model = fresh(family, attention)
    if family in SLIDING:
        model.config.sliding_window = WINDOW - 1  # in both directions, theirs is one token wider on each side
    return model


class Backbone(NamedTuple):
    """One architecture with one attention, and what makes its last layers bidirectional.

    The models are to be run, not to be changed: checks share them.
    """

    family: str
    attention: str
    make: Callable[[nn.Module, int], Any] = bellm.make_bidirectional

    def causal(self) -> PreTrainedModel:
        return shared(self.family, self.attention)

    @lru_cache(maxsize=150)  # noqa: B019
    def model(self, start: int) -> PreTrainedModel:
        model = fresh(self.family, self.attention)
        self.make(model, start)
        return model


def cases() -> Iterator[tuple[str, Tensor, Tensor | None, Tensor]]:
    """Each kind of batch: its name for messages, token ids, attention mask, which tokens are real."""
    for padding, size in BATCHES:
        ids, mask = make_batch(padding, size)
        yield f"padding {padding}, batch {size}", ids, mask, real_tokens(ids, mask)


def differs(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN, which fails every comparison, where a number is not finite."""
    return float((one - other).abs().max())


# --- the checks


def stock_model(backbone: Backbone) -> None:
    """1. start = L is the stock model, to the bit."""
    stock, model = backbone.causal(), backbone.model(LAYERS)
    for case, ids, mask, real in cases():
        states = run(model, ids, mask)
        assert torch.equal(states, run(stock, ids, mask)), case
        if case.startswith("padding left"):
            continue  # the stock model counts the padding as positions
        with torch.no_grad():
            plain = stock(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(states[real], plain[real]), case


def directions(backbone: Backbone) -> None:
    """2. Layers below start are causal, the others see everything real, as far as their window goes."""
    for start in (2, 0, 3):
        model = backbone.model(start)
        for case, ids, mask, real in cases():
            if len(ids) == 1 and start != 2:
                continue
            seen = reach(model, lambda ids=ids, mask=mask: bellm.forward(model, ids, mask))  # type: ignore[misc]  # noqa: B023
            assert_reach(seen, real, start, backbone.family, f"start {start}, {case}")


def padding(backbone: Backbone) -> None:
    """3. Padding does not matter: 1 to 64 tokens of it, on either side, alone or with neighbours."""
    model = backbone.model(2)
    for text in texts(WINDOW - 1, LENGTH):
        alone = run(model, text[None])[0]
        for pads in (1, 2, 7, 64):
            for side in ("left", "right"):
                ids, mask = pad([text], len(text) + pads, side)
                states = run(model, ids, mask)[0, mask[0].bool()]
                assert differs(states, alone) < 1e-5, f"{len(text)} tokens alone, {pads} pads, padding {side}"
    for pads in (*range(1, 10), 13, 16, 21, 31, 32, 33, 47, 63, 64):
        length = LENGTH + pads
        neighbour = texts(length, seed=pads)[0]
        (left, left_mask), (right, right_mask) = pad([text, neighbour], length, "left"), pad([text], length, "right")
        ids, mask = torch.cat([left, right]), torch.cat([left_mask, right_mask])
        states = run(model, ids, mask)
        assert states.isfinite().all(), f"with neighbours, {pads} pads, padding on both sides"
        for row, side in ((0, "left"), (2, "right")):
            assert differs(states[row, mask[row].bool()], alone) < 1e-5, f"with neighbours, {pads} pads, padding {side}"


def transformers_own(backbone: Backbone) -> None:
    """4. start = 0 is what transformers calls is_causal=False."""
    causal, model, theirs = backbone.causal(), backbone.model(0), shared_both_ways(backbone.family, backbone.attention)
    for case, ids, mask, real in cases():
        expected = run(theirs, ids, mask, is_causal=False)
        assert differs(expected[real], run(causal, ids, mask)[real]) > 1e-3, case
        assert differs(run(model, ids, mask)[real], expected[real]) < 1e-6, case


def last_token(backbone: Backbone) -> None:
    """5. If only the last layer is bidirectional, the last token is that of the causal model."""
    causal, one_layer, two_layers = backbone.causal(), backbone.model(LAYERS - 1), backbone.model(LAYERS - 2)
    for case, ids, mask, real in cases():
        at = torch.arange(len(ids)), torch.stack([row.nonzero().max() for row in real])
        before = run(causal, ids, mask)[at]
        assert differs(run(one_layer, ids, mask)[at], before) < 1e-5, case
        assert (run(two_layers, ids, mask)[at] - before).abs().amax(dim=1).min() > 1e-3, case


def mean(backbone: Backbone) -> None:
    """6. If only the last layer is bidirectional, the mean is not that of the causal model."""
    causal, one_layer = backbone.causal(), backbone.model(LAYERS - 1)
    for case, ids, mask, real in cases():
        before, after = run(causal, ids, mask), run(one_layer, ids, mask)
        for row, kept in enumerate(real):
            assert differs(after[row, kept].mean(dim=0), before[row, kept].mean(dim=0)) > 1e-3, case


def later_token(backbone: Backbone) -> None:
    """7. A later token changes the output of layer `start`, none before it, and no other text."""
    for start in (2, 0):
        model = backbone.model(start)
        for case, ids, mask, real in cases():
            position = int(real[0].nonzero().min()) + 1
            changed = ids.clone()
            changed[0, position + 1] = (ids[0, position + 1] + 40) % VOCABULARY
            with torch.no_grad():
                one = bellm.forward(model, ids, mask, output_hidden_states=True).hidden_states
                other = bellm.forward(model, changed, mask, output_hidden_states=True).hidden_states
            same = [torch.equal(a[0, position], b[0, position]) for a, b in zip(one, other, strict=True)]
            assert same == [index <= start for index in range(LAYERS + 1)], f"start {start}, {case}"
            assert all(torch.equal(a[1:], b[1:]) for a, b in zip(one, other, strict=True)), f"start {start}, {case}"


def vectors(backbone: Backbone) -> None:
    """9. A vector does not depend on order, batch size, neighbours or the side of the padding."""
    rows = texts(LENGTH, 2, LENGTH + 9, 1, WINDOW, LENGTH)

    def pooled(model: nn.Module, which: list[int], side: str) -> Tensor:
        chosen = [rows[index] for index in which]
        ids, mask = pad(chosen, max(map(len, chosen)), side)
        states = run(model, ids, None if mask.all() else mask)
        means = [state[kept].mean(dim=0) for state, kept in zip(states, mask.bool(), strict=True)]
        lasts = [state[kept][-1] for state, kept in zip(states, mask.bool(), strict=True)]
        return torch.nn.functional.normalize(torch.stack([torch.cat(means), torch.cat(lasts)]).view(2, len(which), -1), dim=-1)

    for start in (0, 3):
        model = backbone.model(start)
        alone = torch.cat([pooled(model, [row], "right") for row in range(len(rows))], dim=1)
        for which in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0], [1, 0], [0, 5], [3, 2], [4, 4, 3]):
            for side in ("left", "right") if which != [0, 5] else ("none",):
                together = pooled(model, which, side)
                assert differs(together, alone[:, which]) < 1e-5, f"start {start}, texts {which}, padding {side}"


CHECKS = (stock_model, directions, padding, transformers_own, last_token, mean, later_token, vectors)


@every_backbone
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_backbone(check: Callable[[Backbone], None], family: str, attention: str) -> None:
    check(Backbone(family, attention))


@every_family
def test_every_layer_and_every_position_of_a_backbone_matters(family: str) -> None:
    """Without this, the checks above could pass for want of anything to see."""
    model = tiny_model(family, "eager")
    (ids,) = texts(LENGTH)
    states = run(model, ids[None])[0]
    assert len(bellm.attention_modules(model)) == LAYERS
    for index, module in bellm.attention_modules(model).items():
        silence = module.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]), *output[1:]))
        assert (run(model, ids[None])[0] - states).abs().mean() > 0.1, f"layer {index}"
        silence.remove()
    mixed = run(model, ids[[1, 0, 3, 2, 5, 4, 6]][None])[0]
    assert (mixed[-1] - states[-1]).abs().mean() > 0.05, "the order of the tokens makes no difference"


def test_only_gemma2_lacks_an_attention() -> None:
    assert {family for family in FAMILIES if attentions(family) != ("eager", "sdpa")} <= {"gemma2"}


# --- 8. save and load, and the rest of the encoder


@every_backbone
def test_a_saved_model_is_causal_until_it_is_made_bidirectional_again(family: str, attention: str, tmp_path: Path) -> None:
    start = 2
    model = Backbone(family, attention).model(start)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
    with pytest.raises(EncoderError, match=f"layer {start} of {LAYERS} is causal"):
        bellm.probe(loaded, start)
    bellm.make_bidirectional(loaded, start)
    bellm.probe(loaded, start)
    for case, ids, mask, real in cases():
        assert torch.equal(run(loaded, ids, mask)[real], run(model, ids, mask)[real]), case
    ids, mask = make_batch("right", 3)
    assert_reach(reach(loaded, lambda: bellm.forward(loaded, ids, mask)), real_tokens(ids, mask), start, family)


@every_family
def test_a_saved_encoder_keeps_its_directions(family: str, tmp_path: Path) -> None:
    first = Encoder.load(tiny_encoder_directory(tmp_path / "model", family), start_layer=-2, pooling="last", dtype="float32")
    first.save(tmp_path / "saved")
    second = Encoder.load(tmp_path / "saved", dtype="float32")
    assert second.spec.start_layer == first.spec.start_layer == LAYERS - 2
    np.testing.assert_array_equal(second.encode(SENTENCES), first.encode(SENTENCES))
    causal = Encoder.load(tmp_path / "saved", start_layer=None, pooling="last", dtype="float32")
    assert np.abs(causal.encode(SENTENCES) - first.encode(SENTENCES)).max(axis=1).min() > 1e-3

    model, tokenizer = AutoModel.from_pretrained(tmp_path / "saved").eval(), AutoTokenizer.from_pretrained(tmp_path / "saved")
    bellm.make_bidirectional(model, LAYERS - 2)
    ids, mask = make_batch("right", 3)
    assert_reach(reach(model, lambda: bellm.forward(model, ids, mask)), real_tokens(ids, mask), LAYERS - 2, family)
    for text, vector in zip(SENTENCES, second.encode(SENTENCES), strict=True):
        states = run(model, torch.tensor([tokenizer(text)["input_ids"]]))
        expected = torch.nn.functional.normalize(states[0, -1], dim=-1)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5, err_msg=text)


@every_family
def test_encoded_vectors_depend_on_their_own_text_only(family: str, tmp_path: Path) -> None:
    """9. In the encoder, which chooses the batches itself."""
    directory = tiny_encoder_directory(tmp_path, family)
    written = [*SENTENCES, "x", "two words", " ".join(SENTENCES[:3])[:-30], SENTENCES[0]]
    for start, pooling in ((-1, "mean"), (1, "last")):
        encoder = Encoder.load(directory, start_layer=start, pooling=pooling, dtype="float32")
        together = encoder.encode(written)
        assert np.isfinite(together).all()
        alone = np.concatenate([encoder.encode([text]) for text in written])
        np.testing.assert_allclose(together, alone, atol=1e-5)
        order = np.random.default_rng(0).permutation(len(written))
        np.testing.assert_allclose(encoder.encode([written[i] for i in order]), together[order], atol=1e-5)
        few = order[:3]
        np.testing.assert_allclose(encoder.encode([written[i] for i in few]), together[few], atol=1e-5)
        distances = np.abs(together[:-1, None] - together[None, :-1]).max(axis=-1) + np.eye(len(written) - 1)
        assert distances.min() > 1e-3  # different texts have different vectors


@every_family
def test_the_encoder_refuses_what_would_change_nothing(family: str, tmp_path: Path) -> None:
    """5. The last layer alone with last-token pooling."""
    directory = tiny_encoder_directory(tmp_path, family)
    with pytest.raises(EncoderError, match="equals the causal model"):
        Encoder.load(directory, start_layer=-1, pooling="last", dtype="float32")


# --- each check can fail


def flag_only(model: nn.Module, start: int) -> None:
    """`is_causal` is off, the mask stays causal: without effect in eager, and on padded batches."""
    for index, module in bellm.attention_modules(model).items():
        if index >= start:
            module.is_causal = False  # type: ignore[assignment]


def mask_only(model: nn.Module, start: int) -> None:
    """The mask is symmetric, `is_causal` stays on: without effect in sdpa where there is no mask."""
    bellm.make_bidirectional(model, start)
    for module in bellm.attention_modules(model).values():
        module.is_causal = True  # type: ignore[assignment]


def zeroed_mask(model: nn.Module, start: int) -> None:
    """As in BiLLM: nothing is masked, neither padding nor what lies beyond the window."""

    def unmask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs["attention_mask"]
        if mask is not None:
            mask = torch.ones_like(mask) if mask.dtype == torch.bool else torch.zeros_like(mask)
        return args, {**kwargs, "attention_mask": mask}

    flag_only(model, start)
    for index, module in bellm.attention_modules(model).items():
        if index >= start:
            module.register_forward_pre_hook(unmask, with_kwargs=True)


def one_layer_early(model: nn.Module, start: int) -> None:
    bellm.make_bidirectional(model, max(start - 1, 0))


# Which checks notice what, and in which attention. Those that are not named pass, and rightly so:
SABOTAGE: dict[Callable[[nn.Module, int], None], dict[Callable[[Backbone], None], tuple[str, ...]]] = {
    # Eager only reads the mask: the model is then causal throughout, so padding and neighbours still do not matter.
    flag_only: {
        **dict.fromkeys([directions, transformers_own, last_token, mean, later_token], ("eager", "sdpa")),
        **dict.fromkeys([padding, vectors], ("sdpa",)),
    },
    # Eager never reads the flag: nothing is wrong with this model.
    mask_only: dict.fromkeys([directions, padding, transformers_own, last_token, mean, later_token, vectors], ("sdpa",)),
    # The model does look both ways, at too much: the mean (6) and later tokens (7) change as they should.
    zeroed_mask: dict.fromkeys([directions, padding, transformers_own, last_token, vectors], ("eager", "sdpa")),
    # Padding stays hidden (3, 9), layer 0 has no layer before it (4), and the mean changes even more (6).
    one_layer_early: dict.fromkeys([stock_model, directions, last_token, later_token], ("eager", "sdpa")),
}


def notices(check: Callable[[Backbone], None], backbone: Backbone) -> bool:
    try:
        check(backbone)
    except AssertionError as error:
        return "padding" in str(error)  # every message of a check names the batch
    return False


@pytest.mark.parametrize(
    ("sabotage", "family", "attention"),
    [
        pytest.param(sabotage, family, attention, id=f"{sabotage.__name__}-{family}-{attention}")
        for sabotage, noticed in SABOTAGE.items()
        for family, attention in combinations()
        if any(attention in where for where in noticed.values())
    ],
)
def test_checks_notice_sabotage(
    sabotage: Callable[[nn.Module, int], None], family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "__repr__", lambda *_, **__: "a tensor")  # nobody reads what pytest says of a failed check
    backbone = Backbone(family, attention, sabotage)
    fooled = [
        check.__name__ for check, where in SABOTAGE[sabotage].items() if attention in where and not notices(check, backbone)
    ]
    assert not fooled


def test_every_check_can_fail() -> None:
    assert {check for noticed in SABOTAGE.values() for check in noticed} == set(CHECKS)
