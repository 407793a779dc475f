"""Encoder: texts to unit vectors, with BeLLM over any Hugging Face decoder, and with the encoders people already use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from embell.engine import backbone, bellm, head, sentence_format, static
from embell.engine.adapter import Adapter
from embell.engine.fast_files import FastNetwork
from embell.engine.loading import SETTINGS, Loaded, ModelNames, load_model
from embell.engine.packed import Packing, pool_packed
from embell.engine.pooling import pool
from embell.engine.presets import PRESETS
from embell.engine.spec import EncoderSpec, Prompt
from embell.engine.tokens import Kind, TextTokens, Tokenised, TokenRow
from embell.errors import EncoderError, TextError
from embell.indexers.workers import each_on_a_core, submit

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]

WINDOW = 8192
"""Texts that are sorted by length and encoded together. Of a stream, the next window is read and tokenised meanwhile."""


class _FromModel:
    """Marks an option that was not given: the preset or the model's own files decide."""


_FROM_MODEL: Any = _FromModel()


@dataclass
class EncodeReport:
    """Counts of one or several `encode` calls. Texts that were too long were cut, or encoded in pieces (`chunked`)."""

    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    chunked: int = 0


@dataclass(frozen=True)
class Batch:
    """Token rows as tensors, `(n, length)` each: ids, real tokens (bool), tokens to pool (bool); placeholders `(n,)`."""

    input_ids: Tensor
    real: Tensor
    pooled: Tensor
    placeholder: Tensor


class Encoder:
    """Turns texts into float32 rows of length 1. Make one with `Encoder.load`."""

    def __init__(self, loaded: Loaded, batch_tokens: int | None = None) -> None:
        """`load` makes one; `batch_tokens` limits the tokens of a batch, counting padding where there is any.

        Raises EncoderError if a narrower width is asked for than the model has.
        """
        self._loaded = loaded
        self.head = loaded.head
        self.decoder = loaded.decoder
        """Whether the layers below the start layer are causal; those of BERT and its kin look both ways by nature."""
        self.notes = loaded.notes
        """What a user should know of how the model was loaded: what was assumed, because no file says it."""
        self._batch_tokens = batch_tokens
        longest = loaded.fast[0].longest if loaded.fast else None
        self._fast = loaded.fast if longest is None or longest >= loaded.spec.max_length else ()
        pad = loaded.tokenizer.pad_token_id
        if pad is None and not self._fast:
            pad = getattr(getattr(loaded.reference.network(), "config", None), "pad_token_id", None)
        self._pad = pad or 0
        known = loaded.vocabulary
        self._beyond = known if known is not None and len(loaded.tokenizer) > known else None
        self.spec = loaded.spec
        place = 0 if loaded.prepending is not None else -1
        token = int(self._pad == 0)  # padding without a mask would be warned of
        width = self._encode_batch([TokenRow([token, token], 0, 2, place)]).shape[1]
        if loaded.settings.dim is not None and loaded.settings.dim > width:
            raise EncoderError(f"dim {loaded.settings.dim} is more than the model's vectors have: {width}")
        self.spec = replace(loaded.spec, dim=loaded.settings.dim or width)
        tokenizer = loaded.reference.tokenizer() if loaded.reference.tokenizer_taken else loaded.tokenizer
        self.tokens = TextTokens(tokenizer, self.spec, loaded.special_tokens, loaded.unknown)

    @property
    def network(self) -> torch.nn.Module:
        """The model as transformers has it. Whoever takes it may change it, so from then on `encode` runs it too."""
        network = self._loaded.reference.network()
        self._loaded.reference.taken = True
        self._fast = ()  # no more of use, and as large as the network
        self._loaded = replace(self._loaded, fast=())
        return network

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as transformers has it; from then on `encode` uses it too."""
        tokenizer = self._loaded.reference.tokenizer()
        self._loaded.reference.tokenizer_taken = True
        if self.tokens.tokenizer is not tokenizer:
            self.tokens = TextTokens(tokenizer, self.spec, self._loaded.special_tokens, self._loaded.unknown)
        return tokenizer

    @property
    def fast(self) -> tuple[FastNetwork, ...]:
        """What `encode` computes with, one a device; empty where that is transformers' own network."""
        return () if self._loaded.reference.taken else self._fast

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.spec.dim

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        return self._loaded.device

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        adapter_revision: str | None = None,
        merge_adapter: bool = False,
        preset: str | None = None,
        start_layer: int | None = _FROM_MODEL,
        pooling: str = _FROM_MODEL,
        pooled_tokens: str = _FROM_MODEL,
        query_prompt: Prompt = _FROM_MODEL,
        document_prompt: Prompt = _FROM_MODEL,
        cleanup: str = _FROM_MODEL,
        token_prepending: tuple[int, int] | None = _FROM_MODEL,
        max_length: int = _FROM_MODEL,
        on_long: str = _FROM_MODEL,
        layers: int | None = _FROM_MODEL,
        dim: int | None = _FROM_MODEL,
        languages: tuple[str, ...] = _FROM_MODEL,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        batch_tokens: int | None = None,
    ) -> Encoder:
        """Load an encoder: the embedded model, a directory, or a hub id.

        The directory may hold a decoder as transformers saves it, an encoder of sentence-transformers, a static model
        of model2vec, an encoder that `save` wrote, or a LoRA adapter, over the base model that it names or over
        `model` if given as `adapter`; `merge_adapter` adds it to the weights.

        What is not given comes from the `preset` ("bellm", "prompteol", "summarize", "knowledge", "cot", "metaeol",
        "echo"), then from the model's own files; a decoder whose files say nothing gets its last layer bidirectional
        and mean pooling. The settings are those of `ModelSettings`. `dtype` is "float32", "bfloat16" or "float16"; by
        default bf16 where the hardware computes in it, else float32. Without a `device`, all graphics cards of the
        machine take part, or else the processor. `threads` sets the CPU threads of this process.

        Raises EncoderError if the model cannot be read, does not fit its tokenizer, cannot be made bidirectional as
        asked, or if settings contradict each other, such as a start layer that would change nothing (the last layer
        with last-token pooling).
        """
        given = {name: value for name, value in locals().items() if name in SETTINGS and value is not _FROM_MODEL}
        if threads is not None:
            if threads < 1:
                raise EncoderError(f"threads must be at least 1, not {threads}")
            torch.set_num_threads(threads)
        names = ModelNames(model, revision, adapter, adapter_revision)
        loaded = load_model(names, given, preset=preset, merge_adapter=merge_adapter, device=device, dtype=dtype)
        return cls(loaded, batch_tokens)

    @classmethod
    def from_spec(cls, spec: EncoderSpec, **options: Any) -> Encoder:
        """Load the encoder that a spec describes, as a collection recorded it; `options` of `load` override it.

        Raises what `load` raises. Whether the weights are still the same is for the caller to compare.
        """
        model = None if spec.backbone == backbone.EMBEDDED_NAME else spec.backbone
        settings = {name: getattr(spec, name) for name in SETTINGS}
        if not spec.layers:  # a static model
            del settings["layers"]
        if options.get("preset"):  # what it says, it says instead of the spec
            settings = {name: value for name, value in settings.items() if name not in PRESETS.get(options["preset"], {})}
        recorded = {"revision": spec.revision, "adapter": spec.adapter, "adapter_revision": spec.adapter_revision}
        if "adapter" in options:
            del recorded["adapter_revision"]
        return cls.load(model, **{**recorded, **settings, **options})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and settings; `Encoder.load(directory)` gives the same vectors.

        So does `SentenceTransformer(directory, trust_remote_code=True)`, where embell is installed. An adapter that was
        not merged is written alone, with the name of its base model. Weights are written in the dtype that they were
        loaded in: load with dtype="float32" to keep those of a float32 model as they are.

        Raises EncoderError if the directory holds a model of the other kind, adapter or whole, or if the files that the
        encoder was loaded from are others by now.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        network, tokenizer = self._loaded.reference.network(), self._loaded.reference.tokenizer()
        with backbone.quietly():
            if self._loaded.adapter is not None:
                self._loaded.adapter.save(network, target, self.spec.backbone, self.spec.revision)
            elif (target / "adapter_config.json").is_file():
                raise EncoderError(f"{target}: holds an adapter, which the model would be mixed up with; save to a new directory")
            else:
                network.save_pretrained(target)  # type: ignore[operator]
        if not isinstance(network, static.StaticNetwork):
            tokenizer.save_pretrained(target)
        if hasattr(tokenizer, "backend_tokenizer"):
            tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"), pretty=False)  # half the size
            backbone.keep_normalizer(target, tokenizer)
        head.save(self.head, target)
        self._loaded.settings.write(target)
        sentence_format.write(target)

    def add_adapter(self, rank: int, alpha: int | None = None, dropout: float = 0.0) -> None:
        """Put a new LoRA adapter into all linear layers, to be trained; the other weights are frozen.

        Until it is trained it changes nothing. `save` then writes it alone, with the name of the base model.

        Raises EncoderError for a static model and for one that has an adapter.
        """
        if not self.spec.layers:
            raise EncoderError("a static model has no linear layers for an adapter")
        if self._loaded.adapter is not None:
            raise EncoderError("this encoder has an adapter already; merge it first")
        adapter = Adapter.fresh(self.network, rank, alpha, dropout)
        settings = replace(self._loaded.settings, layers=self.spec.layers)  # the base may have more
        self._loaded = replace(self._loaded, adapter=adapter, settings=settings)

    def merge_adapter(self) -> None:
        """Add the adapter to the weights of the model, if there is one; `save` then writes the whole model."""
        if self._loaded.adapter is not None:
            self._loaded.adapter.merge()
            settings = replace(self._loaded.settings, layers=None)
            self._loaded = replace(self._loaded, adapter=None, settings=settings)

    def with_max_length(self, tokens: int) -> Encoder:
        """The same encoder, sharing the network, with another limit on the length of texts.

        Raises EncoderError if a prompt leaves no room within it.
        """
        spec, settings = replace(self.spec, max_length=tokens), replace(self._loaded.settings, max_length=tokens)
        settings.check()
        return Encoder(replace(self._loaded, spec=spec, settings=settings), self._batch_tokens)

    def to_sentence_transformers(self) -> SentenceTransformer:
        """This encoder as a SentenceTransformer; both share the network.

        Raises MissingExtraError if sentence-transformers is not installed.
        """
        from embell.engine.sentence_transformer import wrap

        return wrap(self)

    def encode(
        self,
        texts: str | Sequence[str],
        kind: Kind = "document",
        *,
        normalize: bool = True,
        report: EncodeReport | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Vectors:
        """Encode texts to a float32 array `(n, dim)` of rows of length 1, in the order given.

        A single string gives one row. `normalize=False` leaves rows the length that the model itself gives them.
        `report` collects counts; `progress` is called with the number of texts done since the last call.

        Raises TextError for a text that has no tokens, or is too long for an encoder with on_long="error".
        """
        listed = [texts] if isinstance(texts, str) else texts
        out = np.empty((len(listed), self.dim), dtype=np.float32)
        done = 0
        for block in self.encode_stream(listed, kind, normalize=normalize, report=report, progress=progress):
            out[done : done + len(block)] = block
            done += len(block)
        return out

    def encode_stream(
        self,
        texts: Iterable[str],
        kind: Kind = "document",
        *,
        normalize: bool = True,
        report: EncodeReport | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Vectors]:
        """Encode a stream of texts; yields blocks of rows `(m, dim)` in order.

        Memory holds two windows of texts, however long the stream is. If the iterable raises, what it gave before is
        encoded first.
        """
        source = iter(texts)
        counts = report if report is not None else EncodeReport()
        window, failure = _read(source)
        position = len(window)
        prepared = self._prepare(window, kind, 0) if window else None
        with ThreadPoolExecutor(1, "embell-tokens") as ahead:
            while prepared is not None:
                following = None
                if len(window) == WINDOW and failure is None:
                    window, failure = _read(source)
                    if window:
                        following = submit(ahead, partial(self._prepare, window, kind, position))
                        position += len(window)
                vectors = self._encode_window(prepared, counts, progress)[:, : self.dim]
                if normalize:
                    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
                yield vectors
                prepared = None if following is None else following.result()
        if failure is not None:
            raise failure

    def tokenise(self, texts: Sequence[str], kind: Kind) -> Tokenised:
        """The token rows of texts, as they are to be run.

        Raises TextError for texts without tokens, with one that the model has no vector for, or longer than an encoder
        with on_long="error" takes.
        """
        tokenised = self.tokens(texts, kind)
        if self._beyond and (
            strange := {o for row, o in zip(tokenised.rows, tokenised.owners, strict=True) if max(row.ids) >= self._beyond}
        ):
            raise TextError(sorted(strange), "holds a token that the tokenizer knows and the model does not")
        if empty := {owner for row, owner in zip(tokenised.rows, tokenised.owners, strict=True) if row.end <= row.begin}:
            raise TextError(sorted(empty), "is empty: it has no tokens to encode")
        if tokenised.long and self.spec.on_long == "error":
            raise TextError(
                tokenised.long,
                f"is longer than the {self.spec.max_length} tokens that are encoded; raise max_length, "
                "or let long texts be cut or encoded in pieces (on_long 'truncate' or 'chunk')",
            )
        return tokenised

    def _prepare(self, texts: list[str], kind: Kind, position: int) -> _Window:
        """The token rows of one window, which begins at the `position`th text; equal texts stand in it once."""
        unique: dict[str, int] = {}
        inverse = np.array([unique.setdefault(text, len(unique)) for text in texts])
        try:
            return _Window(inverse, self.tokenise(list(unique), kind))
        except TextError as error:
            places = np.flatnonzero(np.isin(inverse, error.positions))
            raise TextError([position + int(at) for at in places], error.reason) from None

    def _encode_window(self, window: _Window, report: EncodeReport, progress: Callable[[int], None] | None) -> Vectors:
        """Vectors `(n, width)` of one window, before they are cut to `dim` and normalised."""
        inverse, tokenised = window.inverse, window.tokenised
        rows, owners = tokenised.rows, np.array(tokenised.owners)
        lengths = np.array([len(row.ids) for row in rows])
        repeats = np.bincount(inverse)
        report.texts += len(inverse)
        report.tokens += int((lengths * repeats[owners]).sum())
        if tokenised.long:
            name = "chunked" if self.spec.on_long == "chunk" else "truncated"
            setattr(report, name, getattr(report, name) + int(repeats[tokenised.long].sum()))

        left = np.bincount(owners, minlength=len(repeats))  # rows of each text that are still to be done
        vectors: Any = None
        for batch, block in self._encode_batches(rows, lengths):
            if vectors is None:
                vectors = np.zeros((len(rows), block.shape[1]), dtype=np.float32)
            vectors[batch] = block
            if progress is not None:
                np.subtract.at(left, owners[batch], 1)
                finished = np.unique(owners[batch])
                progress(int(repeats[finished[left[finished] == 0]].sum()))
        if len(rows) > len(repeats):
            parts = vectors * np.array(tokenised.weights, dtype=np.float32)[:, None]
            vectors = np.zeros((len(repeats), vectors.shape[1]), dtype=np.float32)
            np.add.at(vectors, owners, parts)
        spread: Vectors = vectors[inverse]
        return spread

    def _encode_batches(self, rows: list[TokenRow], lengths: np.ndarray) -> Iterator[tuple[np.ndarray, Vectors]]:
        """Indices of rows and their vectors, batch by batch, each row once."""
        cuda, fast = self.device.type == "cuda", self.fast
        budget = self._batch_tokens or (65_536 if cuda else 1024 if fast else 4096)
        batches = batches_by_length(lengths.tolist(), budget, padded=not fast)
        if fast and not cuda:
            yield from each_on_a_core(lambda batch: self._encode_batch([rows[row] for row in batch]), batches)
            return
        # A graphics card computes while the next batch is made ready, and several cards take turns.
        ahead = 2 * max(1, len(fast)) if cuda else 0
        waiting: deque[tuple[np.ndarray, Tensor]] = deque()
        for turn, batch in enumerate(batches):
            waiting.append((batch, self._launch([rows[row] for row in batch], turn)))
            while len(waiting) > ahead:
                done, vectors = waiting.popleft()
                yield done, vectors.cpu().numpy()
        for done, vectors in waiting:
            yield done, vectors.cpu().numpy()

    def _encode_batch(self, rows: list[TokenRow]) -> Vectors:
        """Vectors of rows, which stand longest first."""
        out: Vectors = self._launch(rows).cpu().numpy()
        return out

    @torch.inference_mode()
    def _launch(self, rows: list[TokenRow], turn: int = 0) -> Tensor:
        """Vectors of rows, on the device; where there are several cards, on that whose turn it is."""
        fast = self.fast
        if not fast:
            return self.vectors(self.collate(rows))
        which = turn % len(fast)
        network, head = fast[which], self._loaded.heads[which - 1] if which else self.head
        ids = torch.tensor(list(chain.from_iterable(row.ids for row in rows)), device="cpu")
        if network.device.type == "cuda":
            ids = ids.pin_memory().to(network.device, non_blocking=True)
        packing = Packing(tuple(len(row.ids) for row in rows), network.device)
        for states in network.states(ids, packing):  # noqa: B007  (only the last are needed)
            pass
        begins, ends = ([getattr(row, border) for row in rows] for border in ("begin", "end"))
        return after_pooling(pool_packed(states, packing, begins, ends, self.spec.pooling), head)

    def collate(self, rows: Sequence[TokenRow]) -> Batch:
        """The rows as one right-padded batch on the encoder's device."""
        lengths = torch.tensor([len(row.ids) for row in rows])
        longest = int(lengths.max())
        ids = torch.tensor([row.ids + [self._pad] * (longest - len(row.ids)) for row in rows])
        columns = torch.arange(longest)
        first, last = torch.tensor([row.begin for row in rows]), torch.tensor([row.end for row in rows])
        pooled = (columns >= first.unsqueeze(1)) & (columns < last.unsqueeze(1))
        tensors = (ids, columns < lengths.unsqueeze(1), pooled, torch.tensor([row.placeholder for row in rows]))
        return Batch(*(tensor.to(self.device) for tensor in tensors))

    def vectors(self, batch: Batch) -> Tensor:
        """The float32 vectors `(n, width)` of a batch's rows, as the head leaves them; gradients flow."""
        states = self.forward(batch).last_hidden_state
        # Weights by place count from the text's first token, whatever is left out of the pooling.
        return after_pooling(pool(states, batch.pooled, self.spec.pooling, batch.real.long().argmax(dim=1)), self.head)

    def forward(self, batch: Batch, **options: Any) -> Any:
        """What the network returns for a batch; `options` are those of its own forward, such as output_hidden_states."""
        network: Any = self._loaded.reference.network()
        if not self.decoder:
            return network(input_ids=batch.input_ids, attention_mask=batch.real.long(), **options)
        attention = None if bool(batch.real.all()) else batch.real.long()
        around = (
            nullcontext()
            if self._loaded.prepending is None
            else self._loaded.prepending.at(batch.placeholder, batch.real.sum(dim=1) - 1)
        )
        with around:
            return bellm.forward(network, batch.input_ids, attention, **options)


@dataclass(frozen=True)
class _Window:
    """Texts that are encoded together: their token rows, each text once, and which of those each text is."""

    inverse: np.ndarray
    tokenised: Tokenised


def _read(source: Iterator[str]) -> tuple[list[str], Exception | None]:
    """The next window of texts, and what kept it from being read to its end."""
    window: list[str] = []
    try:
        for text in islice(source, WINDOW):
            window.append(text)  # one by one: what came before a failure is kept
    except Exception as error:
        return window, error
    return window, None


def after_pooling(pooled: Tensor, head: torch.nn.Sequential) -> Tensor:
    """What the head makes of pooled states, float32."""
    if len(head):
        weight = next(head.parameters(), None)
        pooled = head(pooled if weight is None else pooled.to(weight.dtype)).float()
    return pooled


def batches_by_length(lengths: Sequence[int], budget: int, padded: bool = True) -> list[np.ndarray]:
    """Rows grouped by similar length, longest first, at most `budget` tokens a batch, counting padding if they are `padded`.

    A row that is longer than the budget is a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    ends = np.cumsum(np.asarray(lengths)[order])
    batches = []
    begin = 0
    while begin < len(order):
        if padded:
            size = budget // lengths[order[begin]]
        else:
            size = int(np.searchsorted(ends, budget + (ends[begin - 1] if begin else 0), side="right")) - begin
        batches.append(order[begin : begin + max(1, size)])
        begin += len(batches[-1])
    return batches
