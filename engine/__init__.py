"""The engine: BeLLM, Encoder, Collection, search and duplicates. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embell.engine.collection import Collection
    from embell.engine.duplicates import Duplicates
    from embell.engine.encoder import Encoder
    from embell.engine.hits import Hit
    from embell.engine.spec import EncoderSpec
    from embell.engine.text_duplicates import deduplicate

_HOMES = {
    "Collection": "collection",
    "Duplicates": "duplicates",
    "Encoder": "encoder",
    "EncoderSpec": "spec",
    "Hit": "hits",
    "deduplicate": "text_duplicates",
}

__all__ = ["Collection", "Duplicates", "Encoder", "EncoderSpec", "Hit", "deduplicate"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"embell.engine.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'embell.engine' has no attribute {name!r}")
