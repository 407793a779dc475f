"""One record of a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """One record of a corpus: an id, its text, and typed metadata.

    `vector` is given only for corpora that bring their own vectors. `place` says where the record
    stands ("corpus.jsonl:7") and `ordinal` counts the rows of the source before it, skipped ones
    included; both serve messages and lining up with other files, and are not part of the record.
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    vector: Sequence[float] | None = field(default=None, compare=False)
    place: str = field(default="", compare=False)
    ordinal: int = field(default=-1, compare=False)
