"""Tiny random decoder models, made in milliseconds and the same on every run; batches to run them on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from embell.engine import bellm

LAYERS = 4
HIDDEN = 32
VOCABULARY = 97
WINDOW = 4
POSITIONS = 128

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3-sliding": Qwen3Config,
    "mistral": MistralConfig,
    "mistral-full": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
    "gpt2": GPT2Config,
    "gpt-neox": GPTNeoXConfig,
    "opt": OPTConfig,
}
FAMILIES = tuple(CONFIGS)
SLIDING = ("qwen3-sliding", "mistral", "gemma2", "gemma3")
"""The families with an attention window, in all of their layers or in some."""

SENTENCES = (
    "The river rose over night and took the old bridge with it.",
    "A decoder reads its text from left to right, one token after another.",
    "Search engines keep vectors, and vectors keep the meaning of sentences.",
    "Nobody had expected that the committee would vote for the smaller budget.",
    "Café owners in Zürich pay more rent than those in Łódź.",
    "Padding must never change what a model says about a sentence!",
    "Two texts may look alike and still be about different things.",
    "Is the last layer of a language model the best one to read from?",
)


def sliding_layers(family: str, layers: int = LAYERS) -> list[bool]:
    """Which layers of a tiny model see no further than the window."""
    if family == "qwen3-sliding":
        return [index % 2 == 1 for index in range(layers)]
    if family == "gemma2":
        return [index % 2 == 0 for index in range(layers)]
    if family == "gemma3":
        return [index % 4 != 3 for index in range(layers)]
    return [family == "mistral"] * layers


def tiny_config(family: str, vocabulary: int = VOCABULARY, layers: int = LAYERS, **changes: Any) -> PreTrainedConfig:
    """The configuration of a small model; the weights are wide enough for every layer to matter."""
    options: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 4}
    options |= {"max_position_embeddings": POSITIONS, "initializer_range": 0.2}
    options |= {"ffn_dim" if family == "opt" else "intermediate_size": 64}
    if family == "gpt2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        names |= {"max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}
        options = {names.get(name, name): value for name, value in options.items()}
    elif family == "opt":
        options["init_std"] = 0.2
    elif family != "gpt-neox":
        options["num_key_value_heads"] = 2
        if family not in ("qwen2", "phi3"):
            options["head_dim"] = HIDDEN // 4
    if family in ("gemma2", "gemma3"):
        options["query_pre_attn_scalar"] = HIDDEN // 4
    if family == "gemma2":
        options["attn_logit_softcapping"] = 3.0
    if family in SLIDING:
        options["sliding_window"] = WINDOW
    if family in ("qwen3-sliding", "gemma2", "gemma3"):
        kinds = ["sliding_attention" if sliding else "full_attention" for sliding in sliding_layers(family, layers)]
        options["layer_types"] = kinds
    if family == "qwen3-sliding":
        options["use_sliding_window"] = True
    if family == "mistral-full":
        options["sliding_window"] = None
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return CONFIGS[family](**{"vocab_size": vocabulary, **special, **options, **changes})


def tiny_model(
    family: str, attention: str | None = "sdpa", seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any
) -> PreTrainedModel:
    """A seeded random model of the family, in eval mode; `attention` is "eager", "sdpa", or None for the model's own choice."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would prepare graphics cards, too, which takes longer
        config = tiny_config(family, vocabulary, **changes)
        model: PreTrainedModel = AutoModel.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:  # biases and norms start as 0 and 1, which would hide a mistake in them
                    weight.add_(torch.randn_like(weight) * 0.1)
    model.eval()
    return model


@cache
def attentions(family: str) -> tuple[str, ...]:
    """Those of "eager" and "sdpa" that transformers has for the family."""
    try:
        tiny_model(family, "sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return ("eager",)
    return ("eager", "sdpa")


def combinations() -> list[tuple[str, str]]:
    """Every family with each of its attention implementations."""
    return [(family, attention) for family in FAMILIES for attention in attentions(family)]


def tiny_tokenizer(size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that reads any text; the padding token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_encoder_directory(path: Path, family: str = "llama", layers: int = LAYERS, seed: int = 0) -> Path:
    """Save a tiny model and its tokenizer in `path`, for AutoModel and AutoTokenizer to load."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in _encoder_files(family, layers, seed).items():
        (path / name).unlink(missing_ok=True)  # not written into: a model that was loaded from it may still read it
        (path / name).write_bytes(content)
    return path


@cache
def _encoder_files(family: str, layers: int, seed: int) -> dict[str, bytes]:
    tokenizer = tiny_tokenizer()
    vocabulary = len(tokenizer) + 1  # AutoTokenizer gives Qwen2's a token of its own
    model = tiny_model(family, None, seed=seed, vocabulary=vocabulary, layers=layers, pad_token_id=tokenizer.pad_token_id)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


LENGTH = 7
"""Tokens of a text, more than the attention window."""

BATCHES = [("left", 1), ("left", 3), ("short", 1), ("right", 3), ("none", 1), ("none", 3), ("ones", 3)]
"""Kinds of batches for `make_batch`, with their sizes."""


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


def make_batch(padding: str, size: int) -> tuple[Tensor, Tensor | None]:
    """A batch of texts: without a mask, with a mask of ones, or padded on one side; "short" ones fit in the window."""
    if padding in ("left", "right"):
        return pad(texts(*[LENGTH, LENGTH - 2, LENGTH + 2][:size]), LENGTH + 2, padding)
    ids = torch.stack(texts(*[WINDOW - 1 if padding == "short" else LENGTH] * size))
    return ids, torch.ones_like(ids) if padding == "ones" else None


def real_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def run(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = bellm.forward(model, ids, mask, **options).last_hidden_state
    return output


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    stack: Any = getattr(model, "decoder", model)
    return list(stack.h if hasattr(stack, "h") else stack.layers)


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
    batch, length, _ = outputs[0].shape
    direction = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))
    one_position = (torch.eye(length)[:, None, :, None] * direction).expand(length, batch, length, HIDDEN)
    gradients = torch.autograd.grad(outputs, inputs, [one_position] * LAYERS, is_grads_batched=True)
    return [(gradient != 0).any(dim=-1).transpose(0, 1) for gradient in gradients]


def assert_reach(seen: list[Tensor], real: Tensor, start: int, family: str, case: str = "") -> None:
    """What `reach` must be where the query is a real token."""
    position = torch.arange(real.shape[1])
    back = position[:, None] - position
    for index, sliding in enumerate(sliding_layers(family)):
        expected = real[:, None, :] & ((back >= 0) | (index >= start))
        if sliding:
            expected = expected & (back.abs() < WINDOW)
        assert torch.equal(seen[index][real], expected[real]), f"{case}: layer {index} sees other tokens than it should"
