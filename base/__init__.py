"""embell: semantic search and near-duplicate detection with BeLLM encoders.

    from embell import Collection, Document, Encoder

    encoder = Encoder.load()
    notes = Collection.create("notes.embell", encoder)
    notes.add([Document("1", "The cat sleeps."), Document("2", "Shares fell.")])
    notes.search("a tired animal", k=1)

Importing the package loads nothing heavy; each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embell._version import __version__
from embell.document import Document
from embell.errors import (
    CollectionError,
    CorpusError,
    EmbellError,
    EncoderError,
    MissingExtraError,
    TextError,
    UsageError,
)

if TYPE_CHECKING:
    from embell.engine import Collection, Duplicates, Encoder, EncoderSpec, Hit, deduplicate

_LAZY = ("Collection", "Duplicates", "Encoder", "EncoderSpec", "Hit", "deduplicate")

__all__ = [
    "Collection",
    "CollectionError",
    "CorpusError",
    "Document",
    "Duplicates",
    "EmbellError",
    "Encoder",
    "EncoderError",
    "EncoderSpec",
    "Hit",
    "MissingExtraError",
    "TextError",
    "UsageError",
    "__version__",
    "deduplicate",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module("embell.engine"), name)
    raise AttributeError(f"module 'embell' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
