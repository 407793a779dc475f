"""BeLLM: the last attention layers of a decoder language model look in both directions.

Layers below `start` stay causal, layers from `start` on see every real token of their own text
(Li & Li, BeLLM, NAACL 2024: backward dependency enhanced large language models). Padding stays
invisible everywhere.

The model's own code is left alone. Each attention module of a bidirectional layer gets two
changes, and both are needed: `is_causal` is switched off, because SDPA applies it when there is
no mask; and the causal mask, where there is one, is replaced by its symmetric form.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from embell.errors import EncoderError


def symmetrise(mask: Tensor | None) -> Tensor | None:
    """Turn a causal attention mask into the same mask in both directions.

    `mask` is `(batch, 1, queries, keys)`: bool with True for "attend", or additive with the
    dtype's minimum for "do not". Windows and the borders of packed texts stay intact, padding
    keys stay hidden. None means "no mask" and is returned as it is.

    Raises EncoderError for masks of another kind (flash and flex attention, one mask per head).
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise EncoderError("bidirectional layers need eager or sdpa attention; load the model with attn_implementation='sdpa'")
    keep = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if keep.shape[1] != 1:  # ALiBi biases are part of such a mask, and they only make sense backwards
        raise EncoderError("this model has a separate attention mask for each head; it cannot be made bidirectional")
    if keep.shape[-1] != keep.shape[-2]:
        raise EncoderError("bidirectional layers cannot read from a key-value cache; call the model with use_cache=False")
    real_key = keep.any(dim=-2, keepdim=True)  # a key that somebody may see is a real token
    both = (keep | keep.transpose(-1, -2)) & real_key
    # A padding query that sees nothing would turn into NaN in some kernels.
    both = both | (~both.any(dim=-1, keepdim=True) & real_key)
    if mask.dtype == torch.bool:
        return both
    return torch.zeros_like(mask).masked_fill(~both, torch.finfo(mask.dtype).min)


class _Symmetriser:
    """Symmetrises each mask once per forward pass, though many layers receive the same one."""

    def __init__(self) -> None:
        # One tuple, so that threads which share the model never meet the mask of one with the result of another.
        self._last: tuple[weakref.ref[Tensor] | None, Tensor | None] = (None, None)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "attention_mask" not in kwargs:
            raise EncoderError(
                f"{type(module).__name__} does not take its attention_mask by name; it cannot be made bidirectional"
            )
        changed = {**kwargs, "attention_mask": self._symmetric(kwargs["attention_mask"])}
        if "is_causal" in kwargs:  # from the model's configuration; SDPA heeds it more than the module
            changed["is_causal"] = False
        return args, changed

    def _symmetric(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        source, result = self._last
        if source is None or source() is not mask:
            result = symmetrise(mask)
            self._last = (weakref.ref(mask, self._forget), result)
        return result

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if source is self._last[0]:
            self._last = (None, None)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention module of each layer that has one which can be made bidirectional, by layer index."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if hasattr(module, "is_causal") and index is not None and not getattr(module, "is_cross_attention", False):
            found[int(index)] = module
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order.

    Raises EncoderError if they cannot be told.
    """
    count = int(_text_config(model).num_hidden_layers)
    inside = attention_modules(model)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and inside:
            layers = list(module)
            if all(any(part is attention for part in layers[index].modules()) for index, attention in inside.items()):
                return layers
    raise EncoderError(f"the layers of this {getattr(model.config, 'model_type', '')} model cannot be told from outside")


def resolve_start(start: int | None, layers: int) -> int:
    """The first bidirectional layer as a number from 0 to `layers`; `layers` means none.

    `start` counts from 0, or from the end when negative (-1 is the last layer); None means that
    every layer stays causal.

    Raises EncoderError when it lies outside the model.
    """
    if start is None:
        return layers
    resolved = start + layers if start < 0 else start
    if not 0 <= resolved < layers:
        raise EncoderError(
            f"start layer {start} lies outside the model, which has {layers} layers: "
            f"use 0 to {layers - 1}, -{layers} to -1, or none"
        )
    return resolved


def make_bidirectional(model: nn.Module, start: int) -> Callable[[], None]:
    """Let layers `start` to L-1 of a Hugging Face decoder attend in both directions, in place.

    `start` is absolute, from 0 (all layers) to L (none). Returns a function that undoes it.
    Gradients, gradient checkpointing and LoRA adapters work as before.

    Raises EncoderError if the model has no such layers, or uses an attention kernel whose masks
    cannot be made symmetric.
    """
    config = _text_config(model)
    layers = int(config.num_hidden_layers)
    if not 0 <= start <= layers:
        raise EncoderError(f"start layer {start} lies outside the model, which has {layers} layers")
    found = {index: module for index, module in attention_modules(model).items() if index >= start}
    kinds = getattr(config, "layer_types", None) or [""] * layers  # a "hybrid" layer has a state space beside its attention
    missing = [index for index in range(start, layers) if index not in found or kinds[index].startswith("hybrid")]
    if missing:
        raise EncoderError(
            f"layer {missing[0]} of this {config.model_type} model has no attention that can be made bidirectional "
            "(state-space and linear-attention layers are not supported)"
        )
    kernel = getattr(config, "_attn_implementation", None)
    if found and kernel not in ("eager", "sdpa"):
        raise EncoderError(
            f"bidirectional layers need eager or sdpa attention, not {kernel!r}: load the model with attn_implementation='sdpa'"
        )
    hook = _Symmetriser()
    handles = []
    before = {index: module.is_causal for index, module in found.items()}
    for module in found.values():
        module.is_causal = False  # type: ignore[assignment]
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for index, module in found.items():
            module.is_causal = before[index]

    return undo


def forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """Run the decoder on a padded batch; padding may stand on either side.

    `input_ids` and `attention_mask` (1 for real tokens) are `(batch, length)` int64. Positions count
    real tokens only, which models with absolute positions need under left padding.
    """
    if attention_mask is not None:
        options["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)


_SEES_PADDING = (0.1, 1e-3)
"""What states of real tokens may be off beside padding, as a share of their length: in half precision, and in float32."""


@torch.no_grad()
def looks_ahead(model: nn.Module) -> list[bool]:
    """For each layer of a model as it is, whether its output at a token depends on later tokens through that layer.

    Only the first layer that looks ahead can be told for certain: after it all states depend on later tokens.

    Raises EncoderError if the layers look in another direction with padding than without, or compute something else.
    """
    first, second = _differing(model)
    device, last = next(model.parameters()).device, first.shape[1] - 2
    pad = getattr(_text_config(model), "pad_token_id", None) or 0
    found = []
    ends: list[Tensor] = []
    for padding in (0, 2):
        states = []
        for pair in ((first, second), (second, first)):  # see `probe`
            ids = torch.nn.functional.pad(torch.cat(pair), (0, padding), value=pad)
            mask = torch.nn.functional.pad(torch.ones_like(torch.cat(pair)), (0, padding))
            with _evaluating(model):
                output = model(input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True)
            states.append([hidden[0, last] for hidden in output.hidden_states[1:]])
        ends.append(output.hidden_states[-1][0, : last + 2].float())
        found.append([not torch.equal(one, other) for one, other in zip(*states, strict=True)])
    if found[0] != found[1]:
        raise EncoderError("probe failed: this model looks in one direction with padding and in another without")
    off = float((ends[1] - ends[0]).norm() / ends[0].norm().clamp(min=1e-9))
    if off > _SEES_PADDING[next(model.parameters()).dtype == torch.float32]:
        raise EncoderError(
            f"padding changes what this {getattr(model.config, 'model_type', '')} model computes: the vector of a text would depend on its neighbours"
        )
    return found[0]


@torch.no_grad()
def probe(model: nn.Module, start: int) -> None:
    """Check that the loaded model really looks the way `start` says.

    Two texts that differ in their last token only: before it, the inputs of layers up to `start`
    must agree, and the outputs of layers from `start` on must differ. After the first layer that looks
    ahead all states differ, so each later layer is also run by itself, on states that differ in the
    last token only. Without padding and with a padded row, because a model can turn silently causal
    on either path.

    Raises EncoderError if a layer looks in another direction than it should.
    """
    layers = int(_text_config(model).num_hidden_layers)
    device = next(model.parameters()).device
    first, second = _differing(model)
    length = first.shape[1]
    after = list(enumerate(decoder_layers(model)))[start + 1 :] if start + 1 < layers else []

    def check(layer: int, sees_later: bool, padded: bool) -> None:
        if sees_later != (layer >= start):
            wrong = "looks ahead" if sees_later else "is causal"
            raise EncoderError(
                f"probe failed: layer {layer} of {layers} {wrong} {'on padded batches' if padded else 'without padding'}, "
                f"but the start layer is {start}; this transformers version or attention kernel is not supported"
            )

    for padded in (False, True):
        states = []
        for pair in ((first, second), (second, first)):
            # Both texts are in both batches: an expert layer then computes on the same tokens, hence rounds the same.
            ids, mask = torch.cat(pair), None
            if padded:  # the texts have two pads on the right, their neighbour has none
                neighbour = torch.cat([first, first[:, :2]], dim=1)
                ids = torch.cat([torch.nn.functional.pad(ids, (0, 2)), neighbour])
                mask = torch.ones_like(ids)
                mask[:2, length:] = 0
            with _evaluating(model), _recorded([layer for _, layer in after]) as calls:
                output = forward(model, ids.to(device), None if mask is None else mask.to(device), output_hidden_states=True)
            hidden = getattr(output, "hidden_states", None) or ()
            if len(hidden) != layers + 1:
                raise EncoderError(f"probe failed: the model has {layers} layers but returns {len(hidden)} hidden states")
            states.append([h[0, length - 2].float() for h in hidden])
        if not torch.equal(states[0][0], states[1][0]):
            raise EncoderError("probe failed: the embeddings of this model look ahead")
        for index, (one, other) in enumerate(zip(states[0][1:], states[1][1:], strict=True)):
            check(index, not torch.equal(one, other), padded)
        with _evaluating(model):
            for (index, layer), (args, kwargs) in zip(after, calls, strict=True):
                check(index, _looks_ahead_itself(layer, args, kwargs, length), padded)


_Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextlib.contextmanager
def _recorded(layers: list[nn.Module]) -> Iterator[list[_Call]]:
    """The arguments of each call of these layers, in order."""
    calls: list[_Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _looks_ahead_itself(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> bool:
    """Whether a layer's output before the last of `length` tokens changes with that token's input alone."""
    states = args[0] if args else kwargs["hidden_states"]
    changed = states[0].clone()
    changed[length - 1] = states[1, length - 1]
    seen = []
    for pair in ((states[0], changed), (changed, states[0])):
        batch = torch.cat([torch.stack(pair), states[2:]])
        output = layer(batch, *args[1:], **kwargs) if args else layer(**{**kwargs, "hidden_states": batch})
        seen.append((output if isinstance(output, Tensor) else output[0])[0, length - 2])
    return not torch.equal(*seen)


def _differing(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Two random texts of six tokens, `(1, 6)` each, that differ in their last token only, to the model as well: tokens may have equal rows."""
    vocabulary = int(_text_config(model).vocab_size)
    first = torch.randint(0, vocabulary, (1, 6), generator=torch.Generator().manual_seed(0))
    second = first.clone()
    network: Any = model
    rows, last = network.get_input_embeddings().weight, int(first[0, -1])
    for step in range(vocabulary):
        second[0, -1] = (last + vocabulary // 2 + step) % vocabulary
        if not torch.equal(rows[second[0, -1]], rows[last]):
            break
    return first, second


def _text_config(model: nn.Module) -> Any:
    """The configuration of the language model itself, which a multimodal model nests inside its own."""
    config: Any = model.config
    if config.is_encoder_decoder:
        raise EncoderError(
            f"a {config.model_type} model has an encoder and a decoder; only plain decoders can be made bidirectional"
        )
    text = config.get_text_config()
    if not hasattr(text, "num_hidden_layers"):
        raise EncoderError(f"a {config.model_type} model is not one stack of decoder layers; it cannot be made bidirectional")
    return text


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
