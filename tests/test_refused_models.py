"""Models that are not one stack of plain attention layers: which are served, and how the others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BltConfig,
    CLIPVisionConfig,
    ConvBertConfig,
    FalconConfig,
    FalconH1Config,
    FNetConfig,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    T5Config,
    ZayaConfig,
)

from embell.engine import bellm
from embell.errors import EncoderError
from tiny_models import HIDDEN, LAYERS, VOCABULARY, combinations, tiny_model

attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_backbone = pytest.mark.parametrize(("family", "attention"), combinations())

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


@pytest.mark.parametrize(
    "config",
    [
        FNetConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, intermediate_size=64),
        ConvBertConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, embedding_size=HIDDEN),
    ],
)  # fmt: skip
def test_a_model_that_sees_padding_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(EncoderError, match="padding changes what this"):
        bellm.looks_ahead(other_model(config))


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


def test_a_linear_attention_layer_is_refused_unless_it_stays_causal() -> None:
    sizes: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
    sizes |= {"shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    config = Qwen3NextConfig(**SHAPE, **sizes, linear_num_key_heads=2, linear_num_value_heads=4, layer_types=kinds)
    model = other_model(config, "sdpa")
    for start, refused in ((0, 1), (1, 1), (2, 2)):
        message = rf"layer {refused} of this qwen3_next model has no attention .*linear-attention layers are not supported"
        with pytest.raises(EncoderError, match=message):
            bellm.make_bidirectional(model, start)
        assert_untouched(model)
    bellm.make_bidirectional(model, 3)
    bellm.probe(model, 3)


@pytest.mark.parametrize("kind", ["hybrid", "hybrid_sliding"])
def test_an_attention_behind_a_convolution_is_refused(kind: str) -> None:
    """Zaya's queries, keys and values come from a causal convolution."""
    sizes: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 2, "head_dim": 8, "router_hidden_size": 16}
    shape = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
    model = other_model(ZayaConfig(**shape, **sizes, sliding_window=4, layer_types=[kind] * LAYERS))
    with pytest.raises(EncoderError, match="layer 2 of this zaya model has no attention"):
        bellm.make_bidirectional(model, 2)
    assert_untouched(model)


@pytest.mark.parametrize("family", ["gemma", "gemma3"])
def test_a_model_that_looks_both_ways_by_itself_is_refused(family: str) -> None:
    model = tiny_model(family, "sdpa", use_bidirectional_attention=True)
    bellm.make_bidirectional(model, 2)
    with pytest.raises(EncoderError, match="layer 0 of 4 looks ahead"):
        bellm.probe(model, 2)


@every_backbone
def test_a_configuration_that_is_not_causal_is_refused(family: str, attention: str) -> None:
    model = tiny_model(family, attention, is_causal=False)
    bellm.make_bidirectional(model, 2)
    with pytest.raises(EncoderError, match="layer 0 of 4 looks ahead"):
        bellm.probe(model, 2)


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
@pytest.mark.parametrize("start", [0, 2, 3, 4])
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


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt-neox", "opt"])
def test_flex_attention_is_refused(family: str) -> None:
    model = tiny_model(family, "flex_attention")
    with pytest.raises(EncoderError, match=r"need eager or sdpa attention, not 'flex_attention'.* attn_implementation='sdpa'"):
        bellm.make_bidirectional(model, 2)
    assert_untouched(model)


def test_an_attention_that_takes_its_mask_by_position_is_refused() -> None:
    model = tiny_model("llama")
    bellm.make_bidirectional(model, 2)
    with pytest.raises(EncoderError, match="LlamaAttention does not take its attention_mask by name"):
        bellm.attention_modules(model)[2](torch.zeros(1, 2, HIDDEN), None, None)
