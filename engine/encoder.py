"""Encoder: texts to unit vectors, with BeLLM over any Hugging Face decoder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from embell.engine import bellm
from embell.engine.spec import POOLINGS, EncoderSpec, ModelSettings
from embell.errors import EncoderError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["document", "query"]
Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]

EMBEDDED_NAME = "embell-mini"
EMBEDDED_MODEL = Path(__file__).parent / "models" / EMBEDDED_NAME
WINDOW = 8192
"""Texts that are read ahead, sorted by length and encoded together."""


class _FromModel:
    """Marks an option that was not given: the model's own `embell.json` decides."""


_FROM_MODEL: Any = _FromModel()


@dataclass
class EncodeReport:
    """Counts of one or several `encode` calls."""

    texts: int = 0
    tokens: int = 0
    truncated: int = 0


class Encoder:
    """Turns texts into float32 rows of length 1. Make one with `Encoder.load`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: EncoderSpec, batch_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self.spec = spec

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.spec.dim

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, as transformers knows it."""
        return self._tokenizer

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        start_layer: int | None = _FROM_MODEL,
        pooling: str = _FROM_MODEL,
        query_prompt: str = _FROM_MODEL,
        document_prompt: str = _FROM_MODEL,
        max_length: int = _FROM_MODEL,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        batch_tokens: int | None = None,
    ) -> Encoder:
        """Load an encoder: the embedded model, a directory, or a hub id.

        What is not given comes from the model's `embell.json`; a model without one gets its last
        layer bidirectional and mean pooling. `start_layer` counts from 0, or from the end when
        negative; None leaves the model causal. `dtype` is "float32", "bfloat16" or "float16"; by default bf16 where the
        hardware computes in it, else float32. `threads` sets the CPU threads of this process.

        Raises EncoderError if the model cannot be read, does not fit its tokenizer, cannot be made
        bidirectional as asked, or if the start layer would change nothing (the last layer with
        last-token pooling).
        """
        directory = _model_directory(model, revision)
        saved = ModelSettings.read(directory) or ModelSettings()
        given: dict[str, Any] = {
            "start_layer": start_layer,
            "pooling": pooling,
            "query_prompt": query_prompt,
            "document_prompt": document_prompt,
            "max_length": max_length,
        }
        settings = replace(saved, **{name: value for name, value in given.items() if value is not _FROM_MODEL})
        _check_settings(settings)
        if threads is not None:
            if threads < 1:
                raise EncoderError(f"threads must be at least 1, not {threads}")
            torch.set_num_threads(threads)
        target = _device(device)
        kind = _dtype(dtype, target)
        network, tokenizer = _load_model(directory, kind)
        layers = int(network.config.num_hidden_layers)
        start = bellm.resolve_start(settings.start_layer, layers)
        if start == layers - 1 and settings.pooling == "last":
            raise EncoderError(
                f"start layer {start} with last-token pooling equals the causal model: the last token already sees every "
                f"other, and no layer follows. Use mean pooling, or a start layer of at most {layers - 2}"
            )
        network.to(target)  # type: ignore[arg-type]
        bellm.make_bidirectional(network, start)
        bellm.probe(network, start)
        positions = getattr(network.config, "max_position_embeddings", None)
        spec = EncoderSpec(
            backbone=_backbone(model, directory),
            revision=revision,
            fingerprint=fingerprint(directory),
            layers=layers,
            start_layer=start if start < layers else None,
            pooling=settings.pooling,
            query_prompt=settings.query_prompt,
            document_prompt=settings.document_prompt,
            max_length=min(settings.max_length, positions) if positions else settings.max_length,
            dim=int(network.config.hidden_size),
            dtype=str(kind).removeprefix("torch."),
        )
        return cls(network, tokenizer, spec, batch_tokens or (65_536 if target.type == "cuda" else 4096))

    @classmethod
    def from_spec(cls, spec: EncoderSpec, **options: Any) -> Encoder:
        """Load the encoder that a spec describes, as a collection recorded it; `options` of `load` override it.

        Raises what `load` raises. Whether the weights are still the same is for the caller to compare.
        """
        model = None if spec.backbone == EMBEDDED_NAME else spec.backbone
        settings = {f.name: getattr(spec, f.name) for f in fields(ModelSettings)}
        return cls.load(model, **{"revision": spec.revision, **settings, **options})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and `embell.json`; `Encoder.load(directory)` gives the same vectors."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        self._model.save_pretrained(target)
        self._tokenizer.save_pretrained(target)
        ModelSettings(**{f.name: getattr(self.spec, f.name) for f in fields(ModelSettings)}).write(target)

    def encode(
        self,
        texts: str | Sequence[str],
        kind: Kind = "document",
        *,
        report: EncodeReport | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Vectors:
        """Encode texts to a float32 array `(n, dim)` of rows of length 1, in the order given.

        A single string gives one row. `report` collects counts; `progress` is called with the
        number of texts done since the last call.

        Raises EncoderError for a text that has no tokens.
        """
        listed = [texts] if isinstance(texts, str) else texts
        out = np.empty((len(listed), self.dim), dtype=np.float32)
        done = 0
        for block in self.encode_stream(listed, kind, report=report, progress=progress):
            out[done : done + len(block)] = block
            done += len(block)
        return out

    def encode_stream(
        self,
        texts: Iterable[str],
        kind: Kind = "document",
        *,
        report: EncodeReport | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Vectors]:
        """Encode a stream of texts; yields blocks of rows `(m, dim)` in order.

        Memory holds one window of texts, however long the stream is.
        """
        source = iter(texts)
        counts = report if report is not None else EncodeReport()
        position = 0
        while window := list(islice(source, WINDOW)):
            yield self._encode_window(window, kind, counts, progress, position)
            position += len(window)

    def _encode_window(
        self, texts: list[str], kind: Kind, report: EncodeReport, progress: Callable[[int], None] | None, position: int
    ) -> Vectors:
        rows: dict[str, int] = {}
        inverse = np.array([rows.setdefault(text, len(rows)) for text in texts])
        unique = list(rows)
        ids, cut = self._tokenize(unique, kind)
        repeats = np.bincount(inverse, minlength=len(unique))
        for row, tokens in enumerate(ids):
            if not tokens:
                raise EncoderError(f"text {position + int(np.argmax(inverse == row)) + 1} is empty: it has no tokens to encode")
        report.texts += len(texts)
        report.tokens += int(sum(len(tokens) * int(count) for tokens, count in zip(ids, repeats, strict=True)))
        report.truncated += int(repeats[cut].sum()) if cut else 0
        vectors: Vectors = np.empty((len(unique), self.dim), dtype=np.float32)
        for batch in batches_by_length([len(tokens) for tokens in ids], self._batch_tokens):
            vectors[batch] = self._encode_batch([ids[row] for row in batch])
            if progress is not None:
                progress(int(repeats[batch].sum()))
        spread: Vectors = vectors[inverse]
        return spread

    def _tokenize(self, texts: list[str], kind: Kind) -> tuple[list[list[int]], list[int]]:
        """Token ids of each prompted text, and the rows that were cut.

        The text is cut, never the prompt around it: a prompt's tail is what last-token pooling reads.
        """
        if kind not in ("document", "query"):
            raise EncoderError(f"kind is 'document' or 'query', not {kind!r}")
        prompt = self.spec.query_prompt if kind == "query" else self.spec.document_prompt
        longest = self.spec.max_length
        ids: list[list[int]] = self._token_ids([prompt.replace("{text}", text) for text in texts])
        cut = [row for row, tokens in enumerate(ids) if len(tokens) > longest]
        for row in cut:
            ids[row] = self._cut(texts[row], prompt, len(ids[row]))
        return ids, cut

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: the tokenizer's own length warning is about a limit that is handled here
        encoded = self._tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _cut(self, text: str, prompt: str, length: int) -> list[int]:
        """Ids of the longest beginning of the text that fits, prompt included."""
        longest = self.spec.max_length
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        keep = len(ends) - (length - longest)
        while keep > 0:
            ids = self._token_ids([prompt.replace("{text}", text[: ends[keep - 1]])])[0]
            if len(ids) <= longest:
                return ids
            keep -= max(1, len(ids) - longest)  # a cut can split a merge into more tokens than it had
        raise EncoderError(f"the prompt alone fills the maximum length of {longest} tokens; shorten it or raise max_length")

    @torch.inference_mode()
    def _encode_batch(self, ids: list[list[int]]) -> Vectors:
        """Vectors of one batch of token id rows."""
        lengths = [len(tokens) for tokens in ids]
        longest = max(lengths)
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in ids])
        mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
        device = self._model.device
        padded, mask = padded.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        attention = None if min(lengths) == longest else mask.long()
        states = bellm.forward(self._model, padded, attention).last_hidden_state
        pooled = pool(states, mask, self.spec.pooling)
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One float32 vector a text: `(n, length, hidden)` and bool `(n, length)` to `(n, hidden)`.

    "mean" averages the real tokens, "last" takes the last real one, on whichever side the padding stands.
    """
    if pooling == "last":
        last = mask.shape[1] - 1 - mask.long().flip(1).argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), last].float()
    # masked_fill, not a product: a padding state may be NaN, and NaN times 0 is NaN
    real = mask.unsqueeze(-1)
    return states.float().masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)


def batches_by_length(lengths: Sequence[int], budget: int) -> list[np.ndarray]:
    """Rows grouped by similar length, longest first, at most `budget` tokens a batch, padding included."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches = []
    begin = 0
    while begin < len(order):
        size = max(1, budget // lengths[order[begin]])
        batches.append(order[begin : begin + size])
        begin += size
    return batches


def fingerprint(directory: Path) -> str:
    """A hash of weights and tokenizer: each file's size, its first 64 KiB and 4 KiB of every MiB.

    Sampling keeps large models quick to open; a fine-tuned model differs in every tensor, so it
    does not slip through.
    """
    digest = hashlib.blake2b(digest_size=16)
    names = [*sorted(directory.glob("*.safetensors")), directory / "tokenizer.json"]
    for path in names:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.suffix}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            for offset in range(1 << 20, size, 1 << 20):
                file.seek(offset)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _check_settings(settings: ModelSettings) -> None:
    if settings.pooling not in POOLINGS:
        raise EncoderError(f"unknown pooling {settings.pooling!r}; known are {', '.join(POOLINGS)}")
    for prompt in (settings.query_prompt, settings.document_prompt):
        if prompt.count("{text}") != 1:
            raise EncoderError(f"prompt {prompt!r} must contain {{text}} exactly once")
    if settings.max_length < 1:
        raise EncoderError(f"max_length must be at least 1, not {settings.max_length}")


def _backbone(model: str | os.PathLike[str] | None, directory: Path) -> str:
    """How to find the model again: a hub id as it is, a directory by its full path."""
    if model is None or directory == EMBEDDED_MODEL:
        return EMBEDDED_NAME
    return str(Path(model).resolve()) if Path(model).is_dir() else os.fspath(model)


def _model_directory(model: str | os.PathLike[str] | None, revision: str | None) -> Path:
    if model is None:
        if not (EMBEDDED_MODEL / "model.safetensors").is_file():
            raise EncoderError("the embedded model is missing from this installation; install embell again, or give a model")
        return EMBEDDED_MODEL
    directory = Path(model)
    if os.fspath(model) == EMBEDDED_NAME and not directory.is_dir():
        return _model_directory(None, None)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise EncoderError(f"{directory}: not a model directory, it has no config.json")
        return directory
    name = os.fspath(model)
    if directory.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise EncoderError(f"{name}: no such model directory; give a directory or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model"]
            )
        )
    except Exception as error:
        # Whatever the network stack raises, the user's question is the same: where is the model?
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EncoderError(f"{name}: neither a directory here nor to be had from the hub ({reason})") from error


def _load_model(directory: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The decoder without its language-model head, and its tokenizer; weights from safetensors only."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if not any(directory.glob("*.safetensors")):
        raise EncoderError(f"{directory}: no safetensors weights; convert the model first (pickled weights are never loaded)")
    with _without_bars():
        try:
            config = AutoConfig.from_pretrained(directory)
            tokenizer = AutoTokenizer.from_pretrained(directory)
            try:
                model, loading = AutoModel.from_pretrained(
                    directory, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
                )
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                model, loading = AutoModel.from_pretrained(
                    directory, config=config, dtype=dtype, attn_implementation="eager", output_loading_info=True
                )
        except Exception as error:  # a damaged file raises whatever its reader likes
            raise EncoderError(f"{directory}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    lost = sorted(loading["missing_keys"])
    if lost:
        raise EncoderError(f"{directory}: the weights lack {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""))
    if not tokenizer.is_fast:
        raise EncoderError(f"{directory}: embell needs a fast tokenizer (tokenizer.json)")
    if not hasattr(model.config, "num_hidden_layers"):
        raise EncoderError(f"{directory}: a {config.model_type} model is not a decoder that embell knows how to read")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise EncoderError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model only {model.get_input_embeddings().num_embeddings}"
        )
    return model.eval(), tokenizer


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading shows no progress bars of transformers; the caller's setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return target


def _dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None:
        if dtype not in known:
            raise EncoderError(f"unknown dtype {dtype!r}; known are {', '.join(known)}")
        return known[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX or AVX512-BF16), by capability, not by name."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
