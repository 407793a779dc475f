"""The layer sweep: what an encoder is worth at each depth, and how much each layer's states depend on later tokens.

It answers where a decoder's layers should begin to look both ways (the turning point of Li & Li, BeLLM, NAACL 2024),
and how many layers can be left out (early exit, pruning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from embell.engine.encoder import Batch, after_pooling, batches_by_length
from embell.engine.pooling import pool
from embell.engine.tokens import TokenRow
from embell.errors import CorpusError, EncoderError

if TYPE_CHECKING:
    from embell.engine.encoder import Encoder
    from embell.engine.evaluation import SentencePairs

TOLERANCE = 0.5
"""Points of Spearman × 100 that an early exit may lose."""

SAMPLE = 256
"""Texts that the dependence on later tokens is measured on."""

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included; its states of all depths are in memory at once."""


@dataclass(frozen=True)
class Depth:
    """The first `depth` layers (1 to L) as an encoder, and layer `depth - 1`, the last of them.

    `spearman` holds, for each pooling, the correlation × 100 of cosine and human score, as `Encoder.load(layers=depth)`
    gives it: with the model's final norm, its head and its `dim`. `unnormed` is without these. NaN means that all
    cosines are equal. `later` and `later_added` are the dependence on later tokens, see `later_tokens`.
    """

    depth: int
    spearman: dict[str, float]
    unnormed: dict[str, float]
    later: float
    later_added: float


@dataclass(frozen=True)
class Recommendation:
    """What a sweep suggests; the option strings are ready for the command line.

    `best` is the depth with the highest score, `exit` the smallest within `tolerance` points of it; `fall` is what
    the last depth lacks of the best. `start_layer` counts from 0; it is None if the sweep was not of a causal model,
    and so is `turning_point`, which tells whether the score falls by more than the tolerance. `exit_options` is empty
    if no layer can go.
    """

    pooling: str
    tolerance: float
    best: int
    best_spearman: float
    exit: int
    exit_spearman: float
    exit_options: str
    fall: float
    start_layer: int | None
    start_options: str
    turning_point: bool | None


@dataclass(frozen=True)
class LayerSweep:
    """The scores of every depth on one labelled set.

    `start_layer` is the first layer that looked both ways, None for a causal model; `decoder` is False for BERT and
    its kin, whose layers look both ways by nature. `final_norm` tells whether anything stands between the last layer
    and pooling. `pooling` is the encoder's own. `texts` counts those that dependence was measured on. Depths below
    `first` cannot be loaded as an encoder of their own with the encoder's other settings.
    """

    dataset: str
    pairs: int
    texts: int
    dtype: str
    start_layer: int | None
    decoder: bool
    final_norm: bool
    pooling: str
    first: int
    depths: tuple[Depth, ...]

    def recommend(self, tolerance: float = TOLERANCE) -> Recommendation:
        """Best depth, early exit and start layer by the scores of the encoder's own pooling.

        If the score of a causal model falls after its best prefix by more than `tolerance`, that is the turning point,
        and the start layer is the first one after it: those from there on are the layers to make bidirectional. If it
        does not, the start layer is the last one, which changes something with mean pooling only.

        Raises EncoderError if there is no score to go by.
        """
        scores = [depth.spearman[self.pooling] for depth in self.depths]
        best, exit_ = choose(scores, tolerance, self.first)
        total = len(self.depths)
        fall = scores[best - 1] - scores[-1]
        start, options, turning = None, "", None
        if self.decoder and self.start_layer is None:
            turning = best < total and not fall <= tolerance
            start = best if turning else total - 1
            options = f"--start-layer {start}"
            if start == total - 1 and self.pooling == "last":  # the last token sees all others anyway
                options += " --pooling mean"
        return Recommendation(
            self.pooling, tolerance, best, scores[best - 1], exit_, scores[exit_ - 1],
            "" if exit_ == total else self.options(exit_), fall, start, options, turning,
        )  # fmt: skip

    def options(self, depth: int) -> str:
        """The options that load the first `depth` layers as they were in the sweep."""
        if not self.decoder:
            return f"--layers {depth}"
        start = self.start_layer
        kept = start is not None and start < depth and not (start == depth - 1 and self.pooling == "last")
        return f"--layers {depth} --start-layer {start if kept else 'none'}"


def choose(scores: Sequence[float], tolerance: float, first: int = 1) -> tuple[int, int]:
    """The best depth and the smallest within `tolerance` of it, from the scores of depths 1, 2, …; NaN is no score.

    Of equal scores the smaller depth is the best. Depths below `first` are left out.

    Raises EncoderError if no score is left.
    """
    known = {depth: score for depth, score in enumerate(scores, 1) if depth >= first and np.isfinite(score)}
    if not known:
        raise EncoderError("no depth has a score: all pairs look equally alike at every one of them")
    best = max(known, key=lambda depth: (known[depth], -depth))
    return best, min(depth for depth, score in known.items() if score >= known[best] - tolerance)


class States:
    """The states that an encoder's layers leave, and what its network makes of the last ones before they are pooled."""

    def __init__(self, encoder: Encoder) -> None:
        """Raises EncoderError for a static model, or one whose layers cannot be read from outside."""
        self._encoder = encoder
        self.layers = encoder.spec.layers
        if not self.layers:
            raise EncoderError("a static model has no layers: its tokens have one vector each, whatever stands beside them")
        self._ending = self._find_ending()

    @property
    def final_norm(self) -> bool:
        return bool(self._ending)

    def before_norm(self, batch: Batch) -> list[Tensor]:
        """States h_0 (the embeddings) to h_L of a batch, `(n, length, hidden)` each, none of them normed by the final norm."""
        taken: list[Tensor] = []
        hook = None
        if self._ending:  # of h_L, transformers returns what the final norm made of it
            hook = self._ending[0].register_forward_pre_hook(lambda module, args: taken.append(args[0]))
        try:
            output = self._encoder.forward(batch, output_hidden_states=True)
        finally:
            if hook is not None:
                hook.remove()
        last = taken[0] if taken else output.last_hidden_state
        return [*output.hidden_states[: self.layers], last]

    def normed(self, states: Tensor) -> Tensor:
        """States of any depth as the network would return them if it ended there."""
        for module in self._ending:
            states = module(states)
        return states

    @torch.inference_mode()
    def _find_ending(self) -> list[nn.Module]:
        """The modules between the last layer and what the network returns: a norm, perhaps a projection, or nothing.

        Architectures name them each in their own way (norm, ln_f, final_layer_norm), so they are found by what they
        are given and what they make of it.
        """
        encoder, network = self._encoder, self._encoder.network
        stacks = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        layers = {layer for stack in stacks for layer in stack}
        inside = {part for stack in stacks for part in stack.modules()}
        calls: list[tuple[nn.Module, Tensor | None, Tensor]] = []

        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            given = args[0] if args and isinstance(args[0], Tensor) else None
            if isinstance(made, Tensor):
                calls.append((module, given, made))

        hooks = [
            module.register_forward_hook(record)
            for module in network.modules()
            if module in layers or not (module in inside or any(isinstance(part, nn.ModuleList) for part in module.modules()))
        ]
        place = 0 if encoder.spec.token_prepending is not None else -1
        try:
            output = encoder.forward(encoder.collate([TokenRow([1, 2, 3], 0, 3, place)]), output_hidden_states=True)
        finally:
            for hook in hooks:
                hook.remove()
        name = network.config.model_type  # type: ignore[union-attr]
        hidden = getattr(output, "hidden_states", None) or ()
        if len(hidden) != self.layers + 1:
            raise EncoderError(f"this {name} model has {self.layers} layers but returns {len(hidden)} hidden states")
        state, ending = output.last_hidden_state, list[nn.Module]()
        for module, given, made in reversed(calls):
            if made.shape != state.shape or made.dtype != state.dtype or not torch.equal(made, state):
                continue
            if module in layers:
                return ending
            if given is None:
                break
            ending.insert(0, module)
            state = given
        raise EncoderError(f"what follows the last layer of this {name} model cannot be told from outside")


@torch.inference_mode()
def sweep(
    encoder: Encoder,
    pairs: SentencePairs,
    *,
    batch_tokens: int = BATCH_TOKENS,
    sample: int = SAMPLE,
    progress: Callable[[int], None] | None = None,
) -> LayerSweep:
    """Score every depth of an encoder on labelled pairs, in one pass over them, and measure dependence on later tokens.

    Texts are encoded as documents are. Only the cosines are kept, not the states: memory holds those of one batch of
    `batch_tokens`. Poolings are mean, last token, and the encoder's own. `progress` is called with the number of
    texts done since the last call.

    Raises EncoderError for a static model, CorpusError for a sentence that cannot be encoded.
    """
    states = States(encoder)
    poolings = tuple(dict.fromkeys(("mean", "last", encoder.spec.pooling)))
    rows = _rows(encoder, pairs)
    count = len(pairs.gold)
    cosines = np.empty((count, states.layers, len(poolings), 2))
    sizes = [sum(map(len, both)) * max(len(row.ids) for part in both for row, _ in part) for both in rows]
    for batch in batches_by_length(sizes, batch_tokens):
        cosines[batch] = _cosines(encoder, states, [rows[at] for at in batch], poolings)
        if progress is not None:
            progress(2 * len(batch))

    texts = [text for both in rows for text in both]
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(sample, len(texts))).round().astype(int))
    later, added = later_tokens(encoder, [row for at in chosen for row, _ in texts[at]], batch_tokens, states)

    def spearman(index: int, variant: int) -> dict[str, float]:
        return {name: _spearman(cosines[:, index, at, variant], pairs.gold) for at, name in enumerate(poolings)}

    depths = tuple(
        Depth(index + 1, spearman(index, 0), spearman(index, 1), later[index], added[index]) for index in range(states.layers)
    )
    return LayerSweep(
        pairs.dataset, count, len(chosen), encoder.spec.dtype, encoder.spec.start_layer, encoder.decoder, states.final_norm,
        encoder.spec.pooling, _first(encoder), depths,
    )  # fmt: skip


def _first(encoder: Encoder) -> int:
    """The smallest depth that can be an encoder with the other settings as they are."""
    spec = encoder.spec
    first = 1 if spec.token_prepending is None else spec.token_prepending[1]
    if encoder.decoder and spec.pooling == "cls" and spec.start_layer is not None:
        first = max(first, spec.start_layer + 1)  # the first token of a causal model sees no other
    return first


Weighted = list[tuple[TokenRow, float]]
"""The rows that a text's vector is the weighted sum of: one for each prompt, or for each piece of a long text."""


def _rows(encoder: Encoder, pairs: SentencePairs) -> list[tuple[Weighted, Weighted]]:
    """Both sentences of each pair as token rows."""
    found: list[list[Weighted]] = []
    for sentences in (pairs.first, pairs.second):
        tokenised = encoder.tokens(sentences, "document")
        if tokenised.long and encoder.spec.on_long == "error":
            where = f"{pairs.path}:{pairs.lines[tokenised.long[0]]}"
            raise CorpusError(f"{where}: a sentence is longer than the {encoder.spec.max_length} tokens that are encoded")
        texts: list[Weighted] = [[] for _ in sentences]
        for row, owner, weight in zip(tokenised.rows, tokenised.owners, tokenised.weights, strict=True):
            if row.end <= row.begin:
                raise CorpusError(f"{pairs.path}:{pairs.lines[owner]}: a sentence has no tokens to encode")
            texts[owner].append((row, weight))
        found.append(texts)
    return list(zip(*found, strict=True))


def _cosines(
    encoder: Encoder, states: States, rows: list[tuple[Weighted, Weighted]], poolings: Sequence[str]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Cosines `(pairs, L, poolings, 2)` of some pairs at every depth: with the final norm and head, and without."""
    texts = [both[side] for side in (0, 1) for both in rows]
    batch = encoder.collate([row for text in texts for row, _ in text])
    owners = torch.tensor([at for at, text in enumerate(texts) for _ in text])
    weights = torch.tensor([weight for text in texts for _, weight in text])
    out = np.empty((len(rows), states.layers, len(poolings), 2))
    for index, state in enumerate(states.before_norm(batch)[1:]):
        for at, pooling in enumerate(poolings):
            vectors = vectors_at(encoder, states, state, batch, pooling)
            for variant, vector in enumerate(vectors):
                parts = vector.cpu() * weights.unsqueeze(1)
                whole = torch.zeros(len(texts), parts.shape[1]).index_add_(0, owners, parts).double()
                unit = nn.functional.normalize(whole, dim=1, eps=1e-12)
                out[:, index, at, variant] = (unit[: len(rows)] * unit[len(rows) :]).sum(dim=1).numpy()
    return out


def vectors_at(encoder: Encoder, states: States, state: Tensor, batch: Batch, pooling: str) -> Iterator[Tensor]:
    """Vectors of a batch's rows from the states of one depth: as the encoder would give them if it ended there, and raw.

    `state` is `(n, length, hidden)` before the final norm. The first tensor yielded is `(n, dim)` and holds what
    `Encoder.load(layers=depth)` gives before it is made length 1; the second is `(n, hidden)`, the pooled states
    themselves. A head that reads several poolings side by side is left out where it does not fit `pooling`.
    """
    first = batch.real.long().argmax(dim=1)
    normed = pool(states.normed(state), batch.pooled, pooling, first)
    if pooling.count("+") == encoder.spec.pooling.count("+"):
        normed = after_pooling(normed, encoder.head)
    yield normed[:, : encoder.spec.dim]
    yield pool(state, batch.pooled, pooling, first)


@torch.inference_mode()
def later_tokens(
    encoder: Encoder, rows: Sequence[TokenRow], batch_tokens: int = BATCH_TOKENS, states: States | None = None
) -> tuple[list[float], list[float]]:
    """How much the output of each layer depends on later tokens, as two lists of L shares.

    Each text is run twice in the same shape, padded on the right: with all its tokens, and with those of its second
    half hidden (attention mask 0). For layer i and a token t of the first half, with h_i the layer's input and
    h_{i+1} its output,

        later       = ‖h_{i+1}[t; all] − h_{i+1}[t; half]‖ / ‖h_{i+1}[t; all]‖
        later_added = the same for h_{i+1} − h_i, what the layer adds to the state

    each averaged over the tokens of a text's first half (of m tokens the first ⌈m/2⌉), then over texts. Causal layers give
    exactly 0; layers that look both ways, and all after them, do not. Texts of one token are left out; NaN if none
    is left. Token prepending shows early layers the last token, which counts as well.
    """
    states = States(encoder) if states is None else states
    rows = [row for row in rows if len(row.ids) > 1]
    sums = np.zeros((2, states.layers))
    for batch in batches_by_length([len(row.ids) + 1 for row in rows], batch_tokens) if rows else []:
        shown = _one_column_more(encoder.collate([rows[at] for at in batch]))
        early = torch.arange(shown.real.shape[1], device=shown.real.device) < (shown.real.sum(dim=1, keepdim=True) + 1) // 2
        whole = states.before_norm(shown)
        half = states.before_norm(replace(shown, real=early))
        for index, ((before, after), (half_before, half_after)) in enumerate(zip(pairwise(whole), pairwise(half), strict=True)):
            sums[0, index] += _change(after, half_after, early)
            sums[1, index] += _change(after - before, half_after - half_before, early)
    later, added = (sums / len(rows)).tolist() if rows else np.full_like(sums, np.nan).tolist()
    return later, added


def _one_column_more(batch: Batch) -> Batch:
    """The batch with one more column of padding, so that both runs have a mask and go through the same kernels."""
    wider = {
        name: nn.functional.pad(getattr(batch, name), (0, 1), mode="constant", value=0)
        for name in ("input_ids", "real", "pooled")
    }
    return replace(batch, **wider)


def _change(whole: Tensor, half: Tensor, where: Tensor) -> float:
    """The relative change of the marked states, averaged over each text's tokens, summed over texts."""
    whole, half = whole.float(), half.float()
    change = torch.linalg.vector_norm(whole - half, dim=-1) / torch.linalg.vector_norm(whole, dim=-1).clamp(min=1e-12)
    return float((change.masked_fill(~where, 0.0).sum(dim=1) / where.sum(dim=1)).sum())


def _spearman(cosines: np.ndarray[Any, np.dtype[np.float64]], gold: list[float]) -> float:
    if not np.isfinite(cosines).all() or np.ptp(cosines) == 0:
        return float("nan")
    return 100 * float(spearmanr(cosines, gold).statistic)
