"""The token table of a new decoder, fitted to a teacher before there are layers, and which neighbouring tokens earn a row of their own.

A mean of token vectors is a linear model: it learns from a text in microseconds what layers learn in milliseconds. What it cannot
know is that "not asleep" is not the mean of "not" and "asleep". Rows for such pairs are chosen by what they would explain.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from embell.training import losses
from embell.training.teacher import Teacher

FIT_BATCH, FIT_RATE = 2048, 4e-2
"""Texts of a step of `fit`, and its learning rate at the start."""
LEAST = 12
"""Times that a pair of tokens must stand in the texts to be joined."""
PRIOR = 12
"""Occurrences that explain nothing, added to each pair's: rare pairs explain much by chance."""


class Bags:
    """Texts as bags of tokens: all token ids in a row, and where each text begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], longest: int) -> None:
        """Texts are cut at `longest` tokens."""
        parts, lengths = [], []
        for at in range(0, len(texts), 10_000):
            encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts[at : at + 10_000]))
            listed = [one.ids[:longest] for one in encoded]  # truncation would be a setting that is saved with the tokenizer
            lengths += [len(ids) for ids in listed]
            parts.append(np.array([token for ids in listed for token in ids], dtype=np.int32))
        self.ids = np.concatenate(parts)
        self.lengths = np.array(lengths)
        self.begins = self.lengths.cumsum() - self.lengths

    def means(self, rows: Tensor, chosen: Sequence[int] | np.ndarray) -> Tensor:
        """Means `(n, width)` of the rows of these texts' tokens."""
        lengths = self.lengths[chosen]
        ids = np.concatenate(
            [self.ids[begin : begin + length] for begin, length in zip(self.begins[chosen], lengths, strict=True)]
        )
        return functional.embedding_bag(torch.from_numpy(ids), rows, torch.from_numpy(lengths.cumsum() - lengths), mode="mean")


def normed(table: Tensor, epsilon: float) -> Tensor:
    """The rows after the decoder's final norm (Zhang and Sennrich, 2019), whose weights are 1 at the start."""
    return table * torch.rsqrt(table.square().mean(dim=1, keepdim=True) + epsilon)


def fit(table: Tensor, bags: Bags, teacher: Teacher, epsilon: float, steps: int, seed: int) -> Tensor:
    """The table `(vocabulary, hidden)` whose means over texts, after the final norm, come nearest to the teacher's vectors.

    How near they came in the last step, which is not how near they come for other texts, is said on stderr.

    Lengths of rows are free: common words become short, which is what weights them in a mean. Texts are drawn with replacement,
    at most `FIT_BATCH` a step.
    """
    table = nn.Parameter(table.clone())
    optimizer = torch.optim.Adam([table], lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = torch.Generator().manual_seed(seed)
    texts = len(bags.lengths)
    for _ in range(steps):
        chosen = torch.randint(texts, (min(FIT_BATCH, texts),), generator=order).unique().numpy()
        loss = losses.to_teacher(bags.means(normed(table, epsilon), chosen), teacher(chosen.tolist())[:, : table.shape[1]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(
        f"token table: {len(table):,} tokens, {bags.lengths.mean():.1f} a text, cosine {1 - loss.item():.3f} to the teacher",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return table.detach()


@torch.no_grad()
def worth_joining(table: Tensor, bags: Bags, teacher: Teacher, epsilon: float, most: int) -> list[tuple[int, int]]:
    """Pairs of neighbouring tokens, at most `most`, that explain best what the fitted table misses; the best first.

    With r the part of the teacher's unit vector that is orthogonal to the student's, and w the share that a pair has of a
    text's tokens, a row d for the pair that is added to the means lessens Σ ‖r − w d‖² by ‖Σ w r‖² / Σ w² at most: a step of
    matching pursuit (Mallat and Zhang, 1993), with `PRIOR` occurrences more in the divisor.
    Holds a float32 row of the table's width for each text and for each pair that stands `LEAST` times in them.
    """
    rows = normed(table, epsilon)
    missed = np.empty((len(bags.lengths), table.shape[1]), dtype=np.float32)
    for begin in range(0, len(missed), 20_000):
        chosen = np.arange(begin, min(begin + 20_000, len(missed)))
        ours = functional.normalize(bags.means(rows, chosen), dim=-1)
        wanted = functional.normalize(teacher(chosen.tolist())[:, : table.shape[1]], dim=-1)
        missed[chosen] = (wanted - (wanted * ours).sum(dim=-1, keepdim=True) * ours).numpy()
    owners = np.repeat(np.arange(len(bags.lengths)), bags.lengths)
    together = owners[1:] == owners[:-1]
    keys = bags.ids[:-1][together].astype(np.int64) * len(table) + bags.ids[1:][together]
    pairs, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
    often = np.flatnonzero(counts >= LEAST)
    place = np.full(len(pairs), -1)
    place[often] = np.arange(len(often))
    taken = place[numbers] >= 0
    texts = owners[1:][together][taken]
    shares = sparse.csr_matrix(
        ((1 / bags.lengths[texts]).astype(np.float32), (place[numbers][taken], texts)), shape=(len(often), len(missed))
    )
    squares = np.asarray(shares.multiply(shares).sum(axis=1)).ravel()
    explained = np.square(shares @ missed).sum(axis=1) / (squares * (1 + PRIOR / counts[often]))
    best = often[np.argsort(-explained, kind="stable")[:most]]
    return [divmod(int(key), len(table)) for key in pairs[best]]
