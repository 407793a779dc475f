"""What a model directory says about how to encode with it, in whichever of the known formats it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from embell.engine import adapter, head, sentence_format, static
from embell.engine.spec import ModelSettings, read_json
from embell.errors import EncoderError

if TYPE_CHECKING:
    from torch import nn

_ANGLE = "angle.config"


@dataclass(frozen=True)
class Source:
    """A model directory, read: where the network lies, how to encode, and what the files leave open.

    `recorded` tells whether the files say how to encode at all. `fits_tokenizer` asks for the tokenizer's own
    length limit. `files` are weights outside the network's directory that decide the vectors too.
    """

    network: Path
    settings: ModelSettings
    recorded: bool
    static: bool = False
    head: nn.Sequential | None = None
    files: tuple[Path, ...] = ()
    lower_case: bool = False
    fits_tokenizer: bool = False
    notes: tuple[str, ...] = ()


def read(directory: Path) -> Source:
    """Read a model directory: embell's own, sentence-transformers', model2vec's, or a plain transformers one.

    Raises EncoderError if the files are damaged, or ask for something that embell does not do.
    """
    own = ModelSettings.read(directory)
    if own is not None:
        sentence_format.check_own(directory)
        parts = head.load(own.head, directory) if own.head else None
        return Source(directory, own, True, static.is_static(directory), parts, (directory / head.FILE,) if own.head else ())
    if sentence_format.is_sentence_model(directory):
        model = sentence_format.read(directory)
        table = static.is_static(model.network)
        settings = model.settings
        if table:
            settings = replace(settings, max_length=static.settings(model.network).max_length)
        return Source(
            model.network, settings, True, table, model.head, model.head_files, model.lower_case,
            fits_tokenizer=not model.own_length and not table, notes=model.notes,
        )  # fmt: skip
    if static.is_static(directory):
        settings = static.settings(directory)
        return Source(directory, settings, True, True, head.build(settings.head, str(directory)))
    return Source(directory, ModelSettings(), False)


def with_adapter(base: Source, directory: Path, preset: str | None, given: set[str]) -> Source:
    """What holds when the adapter of `directory` is put over a base model; `given` names the settings that the caller has set.

    Raises EncoderError for an adapter of BeLLM or AnglE whose files leave the method open while nobody says it.
    """
    if base.static:
        raise EncoderError(f"{directory}: a static model has no layers that an adapter could work in")
    own = ModelSettings.read(directory)
    if own is not None:
        layers = base.settings.layers if own.layers is None else own.layers
        parts = head.load(own.head, directory) if own.head else None
        return replace(
            base, settings=replace(own, layers=layers), recorded=True, head=parts, lower_case=False, fits_tokenizer=False,
            files=(directory / head.FILE,) if own.head else (),
        )  # fmt: skip
    if sentence_format.is_sentence_model(directory):  # sentence-transformers saves a model with an adapter so
        model = sentence_format.read(directory)
        settings = replace(model.settings, layers=base.settings.layers)
        return replace(
            base, settings=settings, recorded=True, head=model.head, files=model.head_files, lower_case=model.lower_case,
            fits_tokenizer=not model.own_length, notes=model.notes,
        )  # fmt: skip
    notes = list(base.notes)
    settings = base.settings
    path = directory / _ANGLE
    if path.is_file():
        asked = {"start_layer", "pooling", "query_prompt", "document_prompt"}
        if preset is None and not asked <= given:
            raise EncoderError(
                f"{directory}: records neither start layer, prompt nor pooling; preset 'bellm' supplies those of BeLLM "
                "(or give start_layer, pooling, query_prompt and document_prompt)"
            )
        longest = read_json(path).get("max_length")
        if isinstance(longest, int) and longest > 0:
            settings = replace(settings, max_length=longest)
        if settings.max_length == longest and "max_length" not in given:
            notes.append(f"texts are cut at {longest} tokens, prompt included: {_ANGLE} says so")
        if preset == "bellm" and not {"start_layer", "pooling", "query_prompt", "document_prompt"} & given:
            notes.append(
                "preset bellm supplies what the adapter's files lack: the prompt 'The representative word for sentence … is:\"', "
                "the last token, and causal layers; BeLLM's own start, its last layer, equals them for the last token"
            )
    return replace(base, settings=settings, notes=tuple(notes))


def base_of(directory: Path) -> str | None:
    """The base model that a directory with an adapter alone names; None if the directory holds a model itself.

    Raises EncoderError if it holds an adapter and names none.
    """
    if not (directory / adapter.CONFIG).is_file():
        return None
    if (directory / "config.json").is_file():
        raise EncoderError(
            f"{directory}: holds a model and an adapter; move the adapter's files to a directory of their own, and give that as the adapter"
        )
    base = adapter.base_of(directory)
    if base == "":
        raise EncoderError(
            f"{directory / adapter.CONFIG}: names no base model; give the base as the model and this as the adapter"
        )
    return base
