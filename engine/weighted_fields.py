"""Vectors of records whose fields weigh differently: title and body, or name and maker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from embell.engine.encoder import Encoder

Array = np.ndarray[Any, Any]


def weighted_vectors(encoder: Encoder, records: Sequence[Mapping[str, str]], weights: Mapping[str, float]) -> Array:
    """A vector `(n, fields * dim)` of length 1 for each record: the cosine of two is the weighted mean of the cosines of their fields.

    Each field's vector, times the root of its weight, stands in a part of its own. A field without text is left out of the record's length, so
    that two records that both lack it are compared by the others; one that only one of them has counts as unlike.
    """
    vectors = np.zeros((len(records), len(weights), encoder.dim), np.float32)
    for at, (name, weight) in enumerate(weights.items()):
        filled = [row for row, record in enumerate(records) if record.get(name, "").strip()]
        if filled:
            vectors[filled, at] = np.sqrt(weight) * encoder.encode([records[row][name] for row in filled], "document")
    flat = vectors.reshape(len(records), -1)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    found: Array = flat / np.where(lengths > 0, lengths, 1)
    return found
