"""When two texts are the same text."""

from __future__ import annotations

import hashlib
import unicodedata


def normalise(text: str) -> str:
    """The text without differences of Unicode form, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_mark(text: str) -> bytes:
    """A 128-bit hash of the normalised text."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
