"""Putting a model together: files, preset and the caller's settings, adapter, direction of the layers, head."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch
from torch import nn

from embell.engine import backbone, source, static
from embell.engine.adapter import WEIGHTS, Adapter, base_revision, deciding
from embell.engine.direction import check_both_ways, check_start, direct, looks_both_ways
from embell.engine.fast_files import FastNetwork, probe, read_network
from embell.engine.fast_llama import FastLlama
from embell.engine.hardware import other_devices, pick_device, pick_dtype
from embell.engine.prepending import TokenPrepending
from embell.engine.presets import preset as find_preset
from embell.engine.reference import Reference
from embell.engine.spec import EncoderSpec, ModelSettings
from embell.engine.tokenizer import TextTokenizer, read_tokenizer
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

    `fast` computes the same as the reference's network, on each device, if the model is of a family that it knows; `heads`
    are copies of the head for those beside the first. `decoder` tells whether
    the network is a decoder, whose positions are counted for it. `vocabulary` is the number of tokens that the network
    knows, `unknown` a token that a static model leaves out.
    """

    reference: Reference
    head: nn.Sequential
    tokenizer: TextTokenizer
    spec: EncoderSpec
    settings: ModelSettings
    device: torch.device
    fast: tuple[FastNetwork, ...] = ()
    heads: tuple[nn.Sequential, ...] = ()
    decoder: bool = False
    prepending: TokenPrepending | None = None
    adapter: Adapter | None = None
    vocabulary: int | None = None
    special_tokens: bool = True
    unknown: int | None = None
    notes: tuple[str, ...] = ()


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
    own_code = backbone.own_code(found.network)
    if own_code and found.recorded:
        raise EncoderError(
            f"{places.model}: comes with code of its own ({own_code}), which is never run, and with transformers' code its vectors would be others"
        )
    named = {} if preset is None else find_preset(preset, bool(given.get("token_prepending")))
    asked: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in {**named, **given}.items()
    }
    settings = replace(found.settings, **asked)
    settings.check()
    target = pick_device(device)
    others = other_devices(target) if device is None else []
    if found.static:
        loaded = _static(found, settings, asked, target)
    else:
        loaded = _transformer(found, settings, asked, places, merge_adapter, target, others, pick_dtype(dtype, target))
    notes = [*found.notes, *loaded.notes]
    if own_code:
        notes.append(f"the model comes with code of its own ({own_code}), which is not run: transformers' own of that name is")
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

    def fingerprint() -> str:
        return backbone.fingerprint(found.network, files, orjson.dumps(said) if said else b"")

    spec = replace(
        loaded.spec,
        backbone=backbone.recorded_name(places.names.model, places.model),
        revision=places.names.revision,
        adapter=None if adapter is None or places.adapter is None else backbone.recorded_name(adapter, places.adapter),
        adapter_revision=places.names.adapter_revision,
        fingerprint=fingerprint(),
    )

    def unchanged() -> None:
        if fingerprint() != spec.fingerprint:
            raise EncoderError(f"{places.model}: its files have changed since it was loaded; load it again")

    loaded.reference.unchanged = unchanged
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
    revision = None if Path(base).is_dir() else base_revision(directory)
    try:
        found = backbone.find(base, revision)
    except EncoderError as error:
        raise EncoderError(
            f"{directory}: an adapter over {base}, which is not at hand ({error}); give the base as the model and this as the adapter"
        ) from error
    return _Places(ModelNames(base, revision, names.model, names.revision), found, directory)


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
    if found.lower_case:
        _lower_case(tokenizer)
    network.to(device).eval()
    reference = Reference(lambda: network, lambda: tokenizer)
    return Loaded(reference, head, tokenizer, spec, settings, device, special_tokens=False, unknown=unknown)


def _transformer(
    found: source.Source,
    settings: ModelSettings,
    asked: dict[str, Any],
    places: _Places,
    merge_adapter: bool,
    device: torch.device,
    others: Sequence[torch.device],
    dtype: torch.dtype,
) -> Loaded:
    files = places.adapter if places.adapter is not None and backbone.has_tokenizer(places.adapter) else found.network

    def whole_tokenizer() -> PreTrainedTokenizerBase:
        tokenizer = backbone.load_tokenizer(files)
        if found.lower_case:
            _lower_case(tokenizer)
        return tokenizer

    said = found.recorded or "start_layer" in asked

    def load() -> _Network:
        return _network(found, settings, said, places, merge_adapter, device, dtype)

    fast: tuple[FastNetwork, ...] = ()
    if places.adapter is None and settings.token_prepending is None:
        fast = _fast_networks(found.network, dtype, (device, *others), settings)
    if fast:
        network = fast[0]
        known = _Network(nn.Module(), network.layers, network.start, network.decoder, network.vocabulary, network.positions)
        if isinstance(network, FastLlama):
            check_start(settings, network.layers)
        else:
            check_both_ways(settings, network.layers, said, network.shape.family)
        probe(network)
        reference = Reference(lambda: load().module, whole_tokenizer)
    else:
        known = load()
        reference = Reference(lambda: known.module, whole_tokenizer)
    read_from_files = read_tokenizer(files) if fast and not found.lower_case else None
    tokenizer: TextTokenizer = read_from_files if read_from_files is not None else reference.tokenizer()
    # Gemma 3 names a token for images beyond the table: as long as no text holds it, it does no harm.
    beyond = [name for name, token in tokenizer.get_vocab().items() if token >= known.tokens]
    if not set(beyond) <= {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        raise EncoderError(f"{places.model}: the tokenizer has {len(tokenizer)} tokens, the model only {known.tokens}")
    limits = [settings.max_length, known.positions]
    if found.fits_tokenizer and isinstance(tokenizer.model_max_length, int):
        limits.append(tokenizer.model_max_length)
    spec = _spec(
        settings,
        layers=known.layers,
        start_layer=known.start if known.start < known.layers else None,
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
    return Loaded(
        reference, head, tokenizer, spec, settings, device, fast, tuple(copy.deepcopy(head).to(one.device) for one in fast[1:]),
        known.decoder, known.prepending, known.adapter, known.tokens, notes=notes,
    )  # fmt: skip


def _fast_networks(
    directory: Path, dtype: torch.dtype, devices: Sequence[torch.device], settings: ModelSettings
) -> tuple[FastNetwork, ...]:
    """The network on each device; a graphics card beside the first that has no room for it is left out."""
    networks: list[FastNetwork] = []
    for device in devices:
        try:
            network = read_network(directory, dtype, device, settings.layers, settings.start_layer)
        except torch.OutOfMemoryError:
            if not networks:
                raise
            continue
        if network is None:
            return ()
        networks.append(network)
    return tuple(networks)


@dataclass(frozen=True)
class _Network:
    """A network and what is to be known of it; `module` is empty where only the fast path has read it."""

    module: nn.Module
    layers: int
    start: int
    decoder: bool
    tokens: int
    positions: int | None
    prepending: TokenPrepending | None = None
    adapter: Adapter | None = None


def _network(
    found: source.Source,
    settings: ModelSettings,
    said: bool,
    places: _Places,
    merge_adapter: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> _Network:
    """The network in transformers' form, its layers directed; `said` tells whether anybody asked for the start layer."""
    loaded, total = backbone.load_network(found.network, dtype, settings.layers)
    network: Any = loaded
    layers = int(network.config.get_text_config().num_hidden_layers)
    adapter = None
    if places.adapter is not None:
        adapter = Adapter(network, places.adapter, range(layers, total))
        if merge_adapter:
            adapter.merge()
            adapter = None
    network.eval().to(device)
    decoder = not looks_both_ways(network, settings, said)
    start = direct(network, settings, layers) if decoder else 0
    prepending = None if settings.token_prepending is None else TokenPrepending(network, *settings.token_prepending)
    tokens = network.get_input_embeddings().num_embeddings
    return _Network(network, layers, start, decoder, tokens, backbone.position_limit(network), prepending, adapter)


def _lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import normalizers

    inner = tokenizer.backend_tokenizer
    before = [] if inner.normalizer is None else [inner.normalizer]
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
