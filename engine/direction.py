"""In which direction the layers of a model are to look, and whether the other settings agree with that."""

from __future__ import annotations

from typing import Any

from embell.engine import bellm
from embell.engine.spec import ModelSettings, all_prompts
from embell.errors import EncoderError


def looks_both_ways(network: Any, settings: ModelSettings, said: bool) -> bool:
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
    check_both_ways(settings, len(ahead), said, name)
    return True


def check_both_ways(settings: ModelSettings, layers: int, said: bool, name: str) -> None:
    """Raises EncoderError for settings of a decoder, where all `layers` of a model look both ways by nature."""
    means_nothing = {
        "a start layer": said and settings.start_layer not in (None, 0, -layers),
        "token prepending": settings.token_prepending is not None,
        "an echo": _echoes(settings),
    }
    for what, wanted in means_nothing.items():
        if wanted:
            raise EncoderError(f"{what} is for decoders; every layer of this {name} model looks both ways already")


def direct(network: Any, settings: ModelSettings, layers: int) -> int:
    """Let the layers of a decoder look as the settings ask, and prove it; returns the first that looks both ways.

    Raises EncoderError for settings that would change nothing, or work against each other.
    """
    start = check_start(settings, layers)
    bellm.make_bidirectional(network, start)
    bellm.probe(network, start)
    return start


def check_start(settings: ModelSettings, layers: int) -> int:
    """The first layer of a decoder that is to look both ways.

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
    return start


def _echoes(settings: ModelSettings) -> bool:
    prompts = (*all_prompts(settings.query_prompt), *all_prompts(settings.document_prompt))
    return any(prompt.count("{text}") == 2 for prompt in prompts)
