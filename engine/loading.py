"""Putting a model together: files, preset and the caller's settings, adapter, direction of the layers, head."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch
from torch import nn

from embell.engine import backbone, bellm, source, static
from embell.engine.adapter import WEIGHTS, Adapter, deciding
from embell.engine.hardware import pick_device, pick_dtype
from embell.engine.prepending import TokenPrepending
from embell.engine.presets import preset as find_preset
from embell.engine.spec import EncoderSpec, ModelSettings, all_prompts
from embell.errors import EncoderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = tuple(f.name for f in fields(ModelSettings) if f.name != "head")
"""The settings that a caller can give."""


@dataclass(frozen=True)
class ModelNames:
    """Which model, and which adapter over it: directories or hub ids. None is the embedded model, and no adapter."""

    model: str | os.PathLike[str] | None
    revision: str | None = None
    adapter: str | os.PathLike[str] | None = None
    adapter_revision: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run. `spec.dim` is not known yet; `settings` are what `embell.json` is to say.

    `decoder` tells whether the network is a decoder, whose positions are counted for it. `vocabulary` is the number of
    tokens that the network knows, `unknown` a token that a static model leaves out.
    """

    network: nn.Module
    head: nn.Sequential
    tokenizer: PreTrainedTokenizerBase
    spec: EncoderSpec
    settings: ModelSettings
    decoder: bool = False
    prepending: TokenPrepending | None = None
    adapter: Adapter | None = None
    vocabulary: int | None = None
    special_tokens: bool = True
    unknown: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


@dataclass(frozen=True)
class _Places:
    """Where the files are: the model's, and the adapter's if there is one."""

    names: ModelNames
    model: Path
    adapter: Path | None


def load_model(
    names: ModelNames,
    given: dict[str, Any],
    *,
    preset: str | None,
    merge_adapter: bool,
    device: str | None,
    dtype: str | None,
) -> Loaded:
    """Load what `Encoder.load` describes; `given` holds the settings that the caller names.

    Raises EncoderError.
    """
    places = _find(names)
    if merge_adapter and places.adapter is None:
        raise EncoderError("there is no adapter to merge; give one, or leave merge_adapter out")
    found = source.read(places.model)
    if places.adapter is not None:
        found = source.with_adapter(found, places.adapter, preset, set(given))
    named = {} if preset is None else find_preset(preset, bool(given.get("token_prepending")))
    asked: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in {**named, **given}.items()
    }
    settings = replace(found.settings, **asked)
    settings.check()
    target = pick_device(device)
    if found.static:
        loaded = _static(found, settings, asked, target)
    else:
        loaded = _transformer(found, settings, asked, places, merge_adapter, target, pick_dtype(dtype, target))
    if found.lower_case:
        _lower_case(loaded.tokenizer)
    notes = [*found.notes, *loaded.notes]
    if not found.recorded and not {"start_layer", "pooling"} <= set(asked):
        notes.append(
            "nothing in the model's files says how to encode with it: assumed "
            + ("" if loaded.spec.start_layer == 0 or "start_layer" in asked else "a bidirectional last layer and ")
            + "the mean of all tokens, where you did not say otherwise; only training makes such a model good"
        )
    files, said = list(found.files), {"head": settings.head, "lower_case": found.lower_case}
    if places.adapter is not None:
        files += [places.adapter / WEIGHTS, places.adapter / "tokenizer.json"]
        said["adapter"] = deciding(places.adapter)
    said = {name: value for name, value in said.items() if value}
    adapter = places.names.adapter
    spec = replace(
        loaded.spec,
        backbone=backbone.recorded_name(places.names.model, places.model),
        revision=places.names.revision,
        adapter=None if adapter is None or places.adapter is None else backbone.recorded_name(adapter, places.adapter),
        adapter_revision=places.names.adapter_revision,
        fingerprint=backbone.fingerprint(found.network, files, orjson.dumps(said) if said else b""),
    )
    layers = None if loaded.adapter is None else settings.layers  # saved alone, an adapter leaves the base all its layers
    kept = replace(settings, start_layer=spec.start_layer, max_length=spec.max_length, layers=layers)
    return replace(loaded, spec=spec, settings=kept, notes=tuple(notes))


def _find(names: ModelNames) -> _Places:
    for name, revision in ((names.model, names.revision), (names.adapter, names.adapter_revision)):
        if revision is not None and (name is None or Path(name).is_dir()):
            raise EncoderError(f"a revision is for models of the hub; {name or backbone.EMBEDDED_NAME} is on this machine")
    directory = backbone.find(names.model, names.revision)
    base = source.base_of(directory)
    if base is None:
        adapter = None if names.adapter is None else backbone.find(names.adapter, names.adapter_revision)
        return _Places(names, directory, adapter)
    if names.adapter is not None:
        raise EncoderError(f"{directory}: an adapter itself; give its base model as the model")
    try:
        found = backbone.find(base, None)
    except EncoderError as error:
        raise EncoderError(
            f"{directory}: an adapter over {base}, which is not at hand ({error}); give the base as the model and this as the adapter"
        ) from error
    return _Places(ModelNames(base, None, names.model, names.revision), found, directory)


def _spec(settings: ModelSettings, **known: Any) -> EncoderSpec:
    shared = {f.name for f in fields(EncoderSpec)} & set(SETTINGS)
    values = {name: getattr(settings, name) for name in shared}
    return EncoderSpec(**{**values, "backbone": "", "revision": None, "fingerprint": "", "dim": 0, **known})


def _static(found: source.Source, settings: ModelSettings, asked: dict[str, Any], device: torch.device) -> Loaded:
    for name, idle in (("start_layer", None), ("layers", None), ("token_prepending", None), ("pooling", "mean")):
        if asked.get(name, idle) != idle:
            raise EncoderError(f"{found.network}: a static model has no layers; {name} means nothing for it")
    network, tokenizer, unknown = static.load(found.network)
    spec = _spec(settings, layers=0, start_layer=None, dtype="float32")
    head = (found.head if found.head is not None else nn.Sequential()).to(device).eval()
    return Loaded(network.to(device).eval(), head, tokenizer, spec, settings, special_tokens=False, unknown=unknown)


def _transformer(
    found: source.Source,
    settings: ModelSettings,
    asked: dict[str, Any],
    places: _Places,
    merge_adapter: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Loaded:
    loaded, total = backbone.load_network(found.network, dtype, settings.layers)
    network: Any = loaded
    brings = places.adapter is not None and backbone.has_tokenizer(places.adapter)
    tokenizer = backbone.load_tokenizer(places.adapter if places.adapter is not None and brings else found.network)
    tokens = network.get_input_embeddings().num_embeddings
    # Gemma 3 names a token for images beyond the table: as long as no text holds it, it does no harm.
    beyond = [name for name, token in tokenizer.get_vocab().items() if token >= tokens]
    if not set(beyond) <= {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        raise EncoderError(f"{places.model}: the tokenizer has {len(tokenizer)} tokens, the model only {tokens}")
    layers = int(network.config.get_text_config().num_hidden_layers)
    adapter = None
    if places.adapter is not None:
        adapter = Adapter(network, places.adapter, range(layers, total))
        if merge_adapter:
            adapter.merge()
            adapter = None
    network.eval().to(device)
    decoder = not _looks_both_ways(network, settings, found.recorded or "start_layer" in asked)
    start = _direct(network, settings, layers) if decoder else 0
    prepending = None
    if settings.token_prepending is not None:
        prepending = TokenPrepending(network, *settings.token_prepending)
    limits = [settings.max_length, backbone.position_limit(network)]
    if found.fits_tokenizer and isinstance(tokenizer.model_max_length, int):
        limits.append(tokenizer.model_max_length)
    spec = _spec(
        settings,
        layers=layers,
        start_layer=start if start < layers else None,
        max_length=min(limit for limit in limits if limit is not None),
        dtype=str(dtype).removeprefix("torch."),
    )
    head = (found.head if found.head is not None else nn.Sequential()).to(device, dtype).eval()
    notes: tuple[str, ...] = ()
    if tokenizer.truncation_side == "left":
        plain = settings.query_prompt == settings.document_prompt == "{text}"
        end = (
            "lose their beginning: its tokenizer asks for that"
            if plain
            else "lose their end, or the tokenizer would cut off the prompt"
        )
        notes = (f"texts that are too long for this model {end}",)
    return Loaded(network, head, tokenizer, spec, settings, decoder, prepending, adapter, tokens, notes=notes)


def _looks_both_ways(network: Any, settings: ModelSettings, said: bool) -> bool:
    """Whether the model is no decoder: every layer looks both ways by itself.

    `said` tells whether anybody asked for the start layer. Raises EncoderError if only some layers do, or if the
    settings are those of a decoder.
    """
    name, ahead = network.config.model_type, bellm.looks_ahead(network)
    if not any(ahead):
        return False
    if not all(ahead):
        raise EncoderError(
            f"layer {ahead.index(True)} of this {name} model looks both ways and layer {ahead.index(False)} does not; "
            "embell makes layers bidirectional itself, from causal ones"
        )
    means_nothing = {
        "a start layer": said and settings.start_layer not in (None, 0, -len(ahead)),
        "token prepending": settings.token_prepending is not None,
        "an echo": _echoes(settings),
    }
    for what, wanted in means_nothing.items():
        if wanted:
            raise EncoderError(f"{what} is for decoders; every layer of this {name} model looks both ways already")
    return True


def _direct(network: Any, settings: ModelSettings, layers: int) -> int:
    """Let the layers of a decoder look as the settings ask, and prove it; returns the first that looks both ways.

    Raises EncoderError for settings that would change nothing, or work against each other.
    """
    start = bellm.resolve_start(settings.start_layer, layers)
    if start == layers - 1 and settings.pooling == "last":
        raise EncoderError(
            f"start layer {start} with last-token pooling equals the causal model: the last token already sees every "
            f"other, and no layer follows. Use mean pooling, or a start layer of at most {layers - 2}"
        )
    if start == layers and settings.pooling == "cls":
        raise EncoderError("cls pooling reads the first token, which sees no other in a causal model; use mean or last")
    if start == 0 and _echoes(settings):
        raise EncoderError("with start layer 0 every token sees all others; an echo would only double the length")
    if settings.token_prepending is not None and start < settings.token_prepending[1] <= layers:
        raise EncoderError(
            f"token prepending up to layer {settings.token_prepending[1]} reaches into the bidirectional layers from {start} on, "
            "which need no such help; end it at the start layer or before"
        )
    bellm.make_bidirectional(network, start)
    bellm.probe(network, start)
    return start


def _echoes(settings: ModelSettings) -> bool:
    prompts = (*all_prompts(settings.query_prompt), *all_prompts(settings.document_prompt))
    return any(prompt.count("{text}") == 2 for prompt in prompts)


def _lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import normalizers

    inner = tokenizer.backend_tokenizer
    before = [] if inner.normalizer is None else [inner.normalizer]
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
