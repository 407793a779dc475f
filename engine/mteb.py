"""An embell encoder as a model of mteb 2, for `mteb.evaluate`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from embell.engine.encoder import Encoder, Vectors
from embell.errors import EncoderError, MissingExtraError


class MtebEncoder:
    """Queries are encoded with the encoder's prompt for queries, all else with that for documents; scores are cosines.

    mteb's own prompts and instructions are not used. mteb keeps results by `mteb_model_meta.name` and its revision;
    the revision is a hash of weights and settings, so that no encoder is given another's scores.
    """

    def __init__(self, encoder: Encoder, name: str | None = None) -> None:
        """`name` is "owner/name"; by default the hub id, or "embell/" and the name of the directory.

        Raises MissingExtraError if mteb is not installed.
        """
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction
        except ImportError as error:
            raise MissingExtraError("mteb is needed for this: pip install 'mteb>=2'") from error
        self.encoder = encoder
        spec = encoder.spec
        local = "/" not in spec.backbone or Path(spec.backbone).is_absolute()
        settings = orjson.dumps(spec.to_dict(), option=orjson.OPT_SORT_KEYS)
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name or (f"embell/{Path(spec.backbone).name}" if local else spec.backbone),
                "revision": hashlib.blake2b(settings, digest_size=16).hexdigest(),
                "embed_dim": encoder.dim,
                "max_tokens": spec.max_length,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
                "use_instructions": (spec.query_prompt, spec.document_prompt) != ("{text}", "{text}"),
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Vectors:
        """Vectors of the texts of all batches, in order.

        Raises EncoderError if mteb asks for another precision than float32, TextError for a text that has no tokens.
        """
        if (precision := kwargs.get("precision")) not in (None, "float32"):
            raise EncoderError(f"vectors come as float32, not as {precision}")
        texts = [text for batch in inputs for text in batch["text"]]
        return self.encoder.encode(texts, "query" if prompt_type == "query" else "document")

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines `(n1, n2)`; either side may be a single vector."""
        one, two = (normalize(torch.atleast_2d(torch.as_tensor(given).float()), dim=-1) for given in (embeddings1, embeddings2))
        return one @ two.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines `(n,)` of rows that stand at the same place."""
        return cosine_similarity(torch.as_tensor(embeddings1).float(), torch.as_tensor(embeddings2).float(), dim=-1)
