"""An embell encoder as LangChain's Embeddings."""

from __future__ import annotations

from embell.engine.encoder import Encoder
from embell.errors import MissingExtraError

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise MissingExtraError("LangChain is needed for this: pip install 'langchain-core>=0.3'") from error


class EmbellEmbeddings(Embeddings):  # type: ignore[misc]
    """Unit vectors as lists of floats: queries with the encoder's prompt for queries, documents with that for documents."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector a text, in order.

        Raises TextError for a text that has no tokens.
        """
        vectors: list[list[float]] = self.encoder.encode(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query.

        Raises TextError if it has no tokens.
        """
        vector: list[float] = self.encoder.encode(text, "query")[0].tolist()
        return vector
