"""An embell encoder as a module of sentence-transformers, so that its files open there too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embell.engine.encoder import Batch, Encoder
from embell.errors import MissingExtraError

try:
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise MissingExtraError("sentence-transformers is needed for this: pip install 'sentence-transformers>=6'") from error

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class EmbellModule(InputModule):  # type: ignore[misc]
    """The whole encoder as one module: prompts, network, pooling, head, width, length 1.

    Texts encoded with `encode_query` get the prompt for queries, all others that for documents.
    """

    save_in_root = True

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.network = encoder.network  # as submodules, so that device, dtype and training reach them
        self.head = encoder.head
        self.tokenizer = encoder.tokenizer

    @property
    def max_seq_length(self) -> int:
        return self.encoder.spec.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.encoder = self.encoder.with_max_length(value)

    def get_embedding_dimension(self) -> int:
        return self.encoder.dim

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Token rows as tensors. `prompt` goes in front of each text, inside the encoder's own prompt."""
        if not inputs:
            return {}
        kind = "query" if kwargs.get("task") == "query" else "document"
        tokenised = self.encoder.tokenise([(prompt or "") + text for text in inputs], kind)  # type: ignore[arg-type]
        batch = self.encoder.collate(tokenised.rows)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.real.long(),
            "pooled": batch.pooled,
            "placeholder": batch.placeholder,
            "owners": torch.tensor(tokenised.owners),
            "weights": torch.tensor(tokenised.weights),
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding`, `(texts, dim)`."""
        real, owners = features["attention_mask"].bool(), features["owners"]
        vectors = self.encoder.vectors(Batch(features["input_ids"], real, features["pooled"], features["placeholder"]))
        if len(owners) > int(owners.max()) + 1:
            joined = vectors.new_zeros(int(owners.max()) + 1, vectors.shape[1])
            vectors = joined.index_add(0, owners, vectors * features["weights"].unsqueeze(1).to(vectors))
        unit: Tensor = torch.nn.functional.normalize(vectors[:, : self.encoder.dim], dim=-1)
        features["sentence_embedding"] = unit
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the encoder as `Encoder.save` does; the library adds its own files after that."""
        self.encoder.save(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, revision: str | None = None, **kwargs: Any) -> EmbellModule:
        """Load what `save` wrote, in float32 unless `model_kwargs` names a dtype."""
        options = kwargs.get("model_kwargs") or {}
        dtype = options.get("dtype") or options.get("torch_dtype") or "float32"
        return cls(Encoder.load(model_name_or_path, revision=revision, device="cpu", dtype=str(dtype).removeprefix("torch.")))


def wrap(encoder: Encoder) -> SentenceTransformer:
    """A SentenceTransformer that shares the encoder's network."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(modules=[EmbellModule(encoder)], device=str(encoder.device), similarity_fn_name="cosine")
