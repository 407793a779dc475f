"""Training texts as token rows."""

from __future__ import annotations

from collections.abc import Sequence

from embell.engine import Encoder
from embell.engine.tokens import Kind, TokenRow
from embell.errors import EncoderError


class TokenisedTexts:
    """Gives the token row of each text, as the encoder would run it; what is too long is cut."""

    def __init__(self, encoder: Encoder) -> None:
        """Raises EncoderError for an encoder that makes several rows of a text: averaged prompts, texts in pieces."""
        self._encoder = encoder
        spec = encoder.spec
        if spec.on_long == "chunk" or not all(isinstance(prompt, str) for prompt in (spec.query_prompt, spec.document_prompt)):
            raise EncoderError(
                "an encoder that averages several prompts, or the pieces of long texts, cannot be trained; choose one prompt"
            )

    def __call__(self, texts: Sequence[str], kind: Kind) -> list[TokenRow]:
        """One row a text, in order. Raises TextError for a text without tokens."""
        return self._encoder.tokenise(texts, kind).rows
