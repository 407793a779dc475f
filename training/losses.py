"""Training objectives: what a batch of vectors is told to become.

Plain functions of tensors, each a scalar that gradients flow through. They take vectors as the model gives them
and bring them to length 1 themselves, so that their length does not matter; `depth_agreement` alone reads them
as they are. A row of zeros has cosine 0 with everything. bfloat16 and float16 are computed in float32, float64
in float64; under autocast, matrix products would still be rounded, so leave it before you come here.

A batch has `n` pairs or queries, `m` extra negatives, and vectors of width `d`. No function has units: cosines run
from -1 to 1, temperatures divide them, and `tau` multiplies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from embell.errors import UsageError


def contrastive(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    temperature: float = 0.05,
    masked: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of finding each query's positive among all positives and negatives of the batch.

    `queries` and `positives` are `(n, d)`, row by row belonging together; `negatives` are `(m, d)`, offered to every query.
    Row i has the logits cos(q_i, candidate) / `temperature` over `[positives; negatives]`, and the target i. Where
    `masked`, bool `(n, n + m)`, is True, a candidate is left out (its logit is -inf, so it gets no gradient from that
    query); a query's own positive never is, whatever the mask says.

    This is supervised SimCSE (temperature 0.05) and AnglE's contrastive loss with hard negatives (scale 20,
    the same number). The mask is that of MultiCSR, stage 3, whose code multiplies logits by 0 instead and sums binary
    cross-entropies: not done here. Raises UsageError if the shapes do not fit.
    """
    _require_same(queries, positives, "queries and positives")
    candidates = positives if negatives is None else torch.cat([positives, negatives])
    logits = _unit(queries) @ _unit(candidates).T / temperature
    if masked is not None:
        _require_same(masked, logits, "the mask and the similarities")
        logits = logits.masked_fill(masked & ~_own(logits), float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))


@torch.no_grad()
def false_negatives(queries: Tensor, positives: Tensor, negatives: Tensor | None, above: float) -> Tensor:
    """Candidates too similar to a query to count as wrong answers: the mask of `contrastive`, bool `(n, n + m)`.

    The vectors are a frozen guide model's, of the texts that `contrastive` gets the trained model's vectors of:
    `(n, d)`, `(n, d)` and `(m, d)` or None. True where the guide's cosine of query i and candidate j is larger than `above`;
    a query's own positive is never True. Cosines are cut at 1, so that 1 marks nothing and the loss is the unmasked one.
    Texts that are equal have cosine 1 but for rounding; to leave those out at any threshold, join a mask of your own with `|`.

    Source: MultiCSR, stage 3 (its code: a frozen SimCSE, `above` 0.95). Raises UsageError if the shapes do not fit.
    """
    _require_same(queries, positives, "queries and positives")
    candidates = positives if negatives is None else torch.cat([positives, negatives])
    cosines = (_unit(queries) @ _unit(candidates).T).clamp(max=1.0)
    return (cosines > above) & ~_own(cosines)


def cosent(cosines: Tensor, labels: Tensor, tau: float = 20.0) -> Tensor:
    """Pairs ranked as their labels rank them: log(1 + sum of exp(`tau` (cos_i - cos_j)) over all i, j with label_i < label_j).

    `cosines` and `labels` are `(n,)`; only the order of the labels counts. 0 if no label is smaller than another.
    Source: CoSENT, as in AnglE's code (tau 20). Raises UsageError if the shapes differ.
    """
    _require_same(cosines, labels, "cosines and labels")
    scores = cosines.to(_precise(cosines)) * tau
    wrong = (scores.unsqueeze(1) - scores)[labels.unsqueeze(1) < labels]
    return torch.logsumexp(torch.cat([scores.new_zeros(1), wrong]), dim=0)


def angle_similarity(first: Tensor, second: Tensor) -> Tensor:
    """AnglE's similarity of the rows of `first` and `second`, both `(n, d)`: `(n,)`, from 0 to the root of 2.

    With the halves of a vector as real and imaginary parts, u / v divided by the ratio of their lengths has the sum s of
    its real and imaginary parts; the result is |s|, which is |cos(u, v) + cos(u, Jv)| where v = [a; b] and Jv = [-b; a].
    (The division is by the squared length of all of v, not component by component.) Higher is more similar. It is not
    symmetric, and u is as similar to -u as to u: 1.

    Source: AnglE's code, pooling "sum". Raises UsageError if d is odd or the shapes differ.
    """
    _require_same(first, second, "the two sides of the pairs")
    width = first.shape[-1]
    if width % 2:
        raise UsageError(f"the angle loss needs vectors of even width, and these have {width}: choose another width or loss")
    u, v = _unit(first), _unit(second)
    real, imaginary = v.chunk(2, dim=-1)
    return (u * (v + torch.cat([-imaginary, real], dim=-1))).sum(dim=-1).abs()


def angle(first: Tensor, second: Tensor, labels: Tensor, tau: float = 20.0) -> Tensor:
    """`cosent` over `angle_similarity`: pairs `(n, d)` and `(n, d)` with labels `(n,)`.

    Source: AnglE's code (tau 20 since v0.5). Raises UsageError if d is odd or the shapes do not fit.
    """
    return cosent(angle_similarity(first, second), labels, tau)


def graded(first: Tensor, second: Tensor, labels: Tensor, tau: float = 20.0, angle_weight: float = 0.02) -> Tensor:
    """For pairs `(n, d)` and `(n, d)` with graded labels `(n,)`: `cosent` + `angle_weight` * `angle`.

    With weight 0 the angle is left out, and d may be odd. Source: AnglE's combination (angle weight 0.02 in v0.6.1).
    Raises UsageError if the shapes do not fit.
    """
    loss = cosent(_cosines(first, second), labels, tau)
    return loss + angle_weight * angle(first, second, labels, tau) if angle_weight else loss


def to_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine between the rows of `student` and `teacher`, both `(n, d)`; the teacher gets no gradient.

    Source: the recipe of embell-mini. Raises UsageError if the shapes differ.
    """
    return (1 - _cosines(student, teacher.detach())).mean()


def batch_view(vectors: Tensor, temperature: float = 0.05) -> Tensor:
    """How each text sees the others of its batch: log softmax `(n, n)` of its cosines to them, divided by `temperature`.

    `vectors` is `(n, d)`. A text's view of itself is left out: -1e9, for with -inf a divergence would be 0 * (inf - inf).
    """
    unit = _unit(vectors)
    table = (unit / temperature) @ unit.T
    return F.log_softmax(table.masked_fill(_own(table), -1e9), dim=-1)


def to_similarities(student: Tensor, view: Tensor, temperature: float = 0.05) -> Tensor:
    """How far the student's view of the batch, row by row, is from the teacher's.

    `student` is `(n, d)`; `view` is the teacher's `batch_view` `(n, n)` at the same temperature, whose vectors may have another width. The result
    is the mean over texts of the Kullback-Leibler divergence of the student's view from the teacher's, which gets no gradient. 0 if n < 2.

    Source: the recipe of embell-mini. Raises UsageError if the numbers of rows differ.
    """
    if len(student) != len(view):
        raise UsageError(f"student and teacher must have the same number of rows, not {len(student)} and {len(view)}")
    if len(student) < 2:
        return (student * 0).sum()
    return F.kl_div(batch_view(student, temperature), view.detach(), log_target=True, reduction="batchmean")


def to_near_cosines(student: Tensor, teacher: Tensor, above: float = 0.5) -> Tensor:
    """Mean squared difference between the student's and the teacher's cosines of those pairs of a batch that the teacher finds near.

    `student` and `teacher` are `(n, d)` and `(n, e)`; near is a cosine of the teacher's of more than `above`; each pair counts once. 0 if no
    pair is near. In a softmax over a batch (`to_similarities`) a near text outweighs all others as soon as it is near at all; how near it is
    hardly counts. Here it does.

    Source: the recipe of embell-mini. Raises UsageError if the numbers of rows differ.
    """
    if len(student) != len(teacher):
        raise UsageError(f"student and teacher must have the same number of rows, not {len(student)} and {len(teacher)}")
    unit = _unit(teacher.detach())
    wanted = unit @ unit.T
    first, second = (wanted > above).triu(1).nonzero(as_tuple=True)
    if not len(first):
        return (student * 0).sum()
    vectors = _unit(student)
    return (vectors @ vectors.T - wanted)[first, second].square().mean()


def to_scores(cosines: Tensor, scores: Tensor) -> Tensor:
    """Mean squared difference between the student's cosines and a cross-encoder's scores of the same pairs, both `(n,)`.

    The scores are to be mapped into [-1, 1] before; they get no gradient. Source: DSE, which compares logits and adds
    half of this to half of the task's own loss; a cosine takes the place of its head here, so that vectors can be indexed.
    Raises UsageError if the shapes differ.
    """
    _require_same(cosines, scores, "cosines and scores")
    precise = cosines.to(_precise(cosines))
    return (precise - scores.detach().to(precise.dtype)).square().mean()


def depth_agreement(deep: Tensor, shallow: Tensor, temperature: float = 1.0) -> Tensor:
    """Agreement of a shallow exit with the full depth, T² KL(softmax(deep / T) || softmax(shallow / T)), mean over rows.

    Both are `(n, d)`, of the same texts; the softmax is over the d features, as they are: this loss does change with the length
    of the vectors, and vectors of length 1 make it close to 0. As in the authors' code, the deep side is not
    detached: it learns to agree, too. Detach it before the call if it should not.

    Source: 2DMSE, as in AnglE's code v0.3.5 (T = 1). Raises UsageError if the shapes differ.
    """
    _require_same(deep, shallow, "deep and shallow vectors")
    log_deep, log_shallow = (F.log_softmax(v.to(_precise(v)) / temperature, dim=-1) for v in (deep, shallow))
    return temperature**2 * F.kl_div(log_shallow, log_deep, log_target=True, reduction="batchmean")


def nested(
    loss: Callable[[list[Tensor]], Tensor],
    deep: list[Tensor],
    shallow: Mapping[int, list[Tensor]],
    widths: Sequence[int],
) -> Tensor:
    """Any loss, asked of narrower vectors and shallower exits as well: Matryoshka and 2DMSE.

    `deep` holds the columns of the batch at full depth, such as `[queries, positives, negatives]`, each `(rows, d)`, and
    `shallow` the same columns at smaller depths, by depth. `loss` takes such a list. The sum, all weights 1, of

    * the loss of `deep`, and of `deep` cut to its first w components, for each width w;
    * for each depth, the same of its columns, and their `depth_agreement` with `deep`, averaged over the columns.

    2DMSE samples one depth and one width each step; here the caller chooses which and how many. A cut vector is
    brought to length 1 again by the loss. With no width and no depth, this is `loss(deep)` to the bit.

    Sources: Matryoshka; 2DMSE, as in AnglE's code v0.3.5, where the columns are rows of one batch, which for columns of equal
    length is the same average. Raises UsageError if a width is not in 1 to d - 1, or a depth's columns are not those of `deep`.
    """
    for width in widths:
        for column in deep:
            if not 0 < width < column.shape[-1]:
                raise UsageError(
                    f"width {width} is not between 1 and {column.shape[-1] - 1}: the vectors have {column.shape[-1]}"
                )
    total = loss(deep)
    for width in widths:
        total = total + loss([column[:, :width] for column in deep])
    for depth, columns in shallow.items():
        if len(columns) != len(deep):
            raise UsageError(f"depth {depth} has {len(columns)} columns, the full depth has {len(deep)}")
        agreement = [depth_agreement(whole, early) for whole, early in zip(deep, columns, strict=True)]
        total = total + loss(columns) + torch.stack(agreement).mean()
        for width in widths:
            total = total + loss([column[:, :width] for column in columns])
    return total


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length 1, but for rows of zeros, which stay, and get a finite gradient (`F.normalize` has 1e12 there)."""
    precise = vectors.to(_precise(vectors))
    length: Tensor = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
    return precise / length.masked_fill(length == 0, 1.0)


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of each row of `first` with that of `second`: `(n, d)` and `(n, d)` to `(n,)`."""
    _require_same(first, second, "the two sides of the pairs")
    return (_unit(first) * _unit(second)).sum(dim=-1)


def _own(table: Tensor) -> Tensor:
    """The diagonal of a table, as a mask of its shape."""
    return torch.eye(*table.shape, dtype=torch.bool, device=table.device)


def _require_same(first: Tensor, second: Tensor, what: str) -> None:
    """Broadcasting would turn a shape that does not fit into a wrong loss."""
    if first.shape != second.shape:
        raise UsageError(f"{what} must have the same shape, not {tuple(first.shape)} and {tuple(second.shape)}")
