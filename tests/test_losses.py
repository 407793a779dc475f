"""The training objectives, each against its formula written out in float64 loops, and what must hold of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embell import UsageError
from embell.training import losses

Rows = list[np.ndarray]


def vectors(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows, of lengths from about 0.1 to 10 times the usual."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(-1, 1, rows)[torch.randperm(rows, generator=generator)].unsqueeze(1)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * lengths).to(dtype)


def numbers(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def cos(u: np.ndarray, v: np.ndarray) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(u, v, strict=True))
    return dot / (math.hypot(*u.tolist()) * math.hypot(*v.tolist()))


def softmax_by_hand(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def divergence_by_hand(target: list[float], other: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(target, other, strict=True))


def contrastive_by_hand(
    queries: Rows, positives: Rows, negatives: Rows, temperature: float, left_out: set[tuple[int, int]]
) -> float:
    losses = []
    for i, query in enumerate(queries):
        right = math.exp(cos(query, positives[i]) / temperature)
        total = sum(
            math.exp(cos(query, candidate) / temperature)
            for j, candidate in enumerate([*positives, *negatives])
            if j == i or (i, j) not in left_out
        )
        losses.append(-math.log(right / total))
    return sum(losses) / len(losses)


def cosent_by_hand(cosines: list[float], labels: list[float], tau: float) -> float:
    pairs = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if labels[i] < labels[j]]
    return math.log(1 + sum(math.exp(tau * (cosines[i] - cosines[j])) for i, j in pairs))


def angle_by_hand(u: np.ndarray, v: np.ndarray) -> float:
    """The sum of real and imaginary parts of u / v, once the ratio of their lengths is divided out."""
    half = len(u) // 2
    u, v = u[:half] + 1j * u[half:], v[:half] + 1j * v[half:]
    quotient = u * np.conj(v) / (np.abs(v) ** 2).sum()
    quotient /= np.sqrt((np.abs(u) ** 2).sum()) / np.sqrt((np.abs(v) ** 2).sum())
    return abs(float(quotient.real.sum() + quotient.imag.sum()))


def similarities_by_hand(student: Rows, teacher: Rows, temperature: float) -> float:
    total = 0.0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        views = [softmax_by_hand([cos(side[i], side[j]) / temperature for j in others]) for side in (teacher, student)]
        total += divergence_by_hand(*views)
    return total / len(student)


def agreement_by_hand(deep: Rows, shallow: Rows, temperature: float) -> float:
    parts = [
        divergence_by_hand(softmax_by_hand(list(u / temperature)), softmax_by_hand(list(v / temperature)))
        for u, v in zip(deep, shallow, strict=True)
    ]
    return temperature**2 * sum(parts) / len(parts)


def rows_of(table: Tensor) -> Rows:
    return list(table.detach().double().numpy())


SIZES = {"n": st.integers(1, 5), "half": st.integers(1, 4), "seed": st.integers(0, 10_000)}


# --- contrastive ---


@given(m=st.integers(0, 4), temperature=st.sampled_from([0.05, 0.2, 1.0]), data=st.data(), **SIZES)
@settings(max_examples=60)
def test_contrastive(n: int, m: int, half: int, seed: int, temperature: float, data: st.DataObject) -> None:
    queries, positives, negatives = (vectors(rows, half + 1, seed + part) for part, rows in enumerate((n, n, m)))
    given_negatives = negatives if m else data.draw(st.sampled_from([negatives, None]))
    by_hand = partial(contrastive_by_hand, rows_of(queries), rows_of(positives), rows_of(negatives), temperature)
    plain = losses.contrastive(queries, positives, given_negatives, temperature)
    assert plain.item() == pytest.approx(by_hand(set()), abs=1e-9)

    left_out = data.draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n + m - 1))))
    masked = torch.zeros(n, n + m, dtype=torch.bool)
    for place in left_out:
        masked[place] = True
    loss = losses.contrastive(queries, positives, given_negatives, temperature, masked)
    assert loss.item() == pytest.approx(by_hand(left_out), abs=1e-9)
    assert loss.item() <= plain.item() + 1e-12


def test_contrastive_defaults_to_the_temperature_of_simcse() -> None:
    queries, positives = vectors(4, 6, 1), vectors(4, 6, 2)
    assert torch.equal(losses.contrastive(queries, positives), losses.contrastive(queries, positives, None, 0.05))


def test_masked_candidates_get_no_gradient() -> None:
    queries, positives, negatives = (vectors(rows, 6, rows).requires_grad_() for rows in (4, 4, 3))
    masked = torch.zeros(4, 7, dtype=torch.bool)
    masked[:, 5] = True  # the second negative, for every query
    losses.contrastive(queries, positives, negatives, masked=masked).backward()
    assert negatives.grad is not None
    assert torch.count_nonzero(negatives.grad[1]) == 0
    assert all(torch.count_nonzero(negatives.grad[row]) == 6 for row in (0, 2))

    # one query alone: of a masked entry, neither side hears
    masked = torch.zeros(4, 7, dtype=torch.bool)
    masked[2, [0, 1, 3, 4, 5, 6]] = True
    queries.grad = None
    losses.contrastive(queries, positives, negatives, masked=masked).backward()
    assert queries.grad is not None
    assert torch.count_nonzero(queries.grad[2]) == 0
    assert torch.count_nonzero(queries.grad[0]) == 6


def test_a_querys_own_positive_is_never_masked() -> None:
    queries, positives, negatives = vectors(4, 6, 1), vectors(4, 6, 2), vectors(3, 6, 3)
    everything = torch.ones(4, 7, dtype=torch.bool)
    assert losses.contrastive(queries, positives, negatives, masked=everything).item() == 0
    diagonal = torch.eye(4, 7, dtype=torch.bool)
    plain = losses.contrastive(queries, positives, negatives)
    assert torch.equal(losses.contrastive(queries, positives, negatives, masked=diagonal), plain)


# --- false_negatives ---


@given(m=st.integers(0, 4), above=st.floats(-1.2, 1.2), **SIZES)
@settings(max_examples=60)
def test_false_negatives(n: int, m: int, half: int, seed: int, above: float) -> None:
    queries, positives, negatives = (vectors(rows, half + 1, seed + part) for part, rows in enumerate((n, n, m)))
    mask = losses.false_negatives(queries, positives, negatives if m else None, above)
    assert mask.shape == (n, n + m)
    assert mask.dtype == torch.bool
    for i, query in enumerate(rows_of(queries)):
        for j, candidate in enumerate(rows_of(positives) + rows_of(negatives)):
            if abs(cos(query, candidate) - above) > 1e-9:
                assert mask[i, j].item() is (j != i and cos(query, candidate) > above), (i, j)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_threshold_of_1_is_the_unmasked_loss_even_with_equal_texts(dtype: torch.dtype) -> None:
    queries = vectors(20, 33, 5, dtype)
    positives, negatives = queries.roll(1, 0), queries.clone()
    assert not losses.false_negatives(queries, positives, negatives, 1.0).any()
    loss = losses.contrastive(queries, positives, negatives)
    mask = losses.false_negatives(queries, positives, negatives, 1.0)
    assert torch.equal(losses.contrastive(queries, positives, negatives, masked=mask), loss)
    # below 1, each query's equal among the negatives, and among the others' positives, is found
    mask = losses.false_negatives(queries, positives, negatives, 0.95)
    assert mask[:, 20:].diagonal().all()
    assert mask[torch.arange(20), (torch.arange(20) + 1) % 20].all()
    assert not mask.diagonal().any()


def test_the_mask_has_no_gradient_and_can_be_joined_with_one_for_equal_texts() -> None:
    guide = vectors(4, 6, 1).requires_grad_()
    mask = losses.false_negatives(guide, guide, None, 0.95)
    assert not mask.requires_grad
    texts = ["a", "b", "a", "c"]
    equal = torch.tensor([[one == other for other in texts] for one in texts])
    trained, positives = vectors(4, 6, 2), vectors(4, 6, 3)
    expected = contrastive_by_hand(rows_of(trained), rows_of(positives), [], 0.05, {(0, 2), (2, 0)})
    assert losses.contrastive(trained, positives, masked=mask | equal).item() == pytest.approx(expected)


# --- cosent, angle, graded ---


@given(
    labels=st.lists(st.sampled_from([0.0, 0.5, 1.0, 4.0]), min_size=1, max_size=6),
    tau=st.sampled_from([1.0, 20.0]),
    seed=SIZES["seed"],
)
@settings(max_examples=60)
def test_cosent(labels: list[float], tau: float, seed: int) -> None:
    cosines = numbers(len(labels), seed)
    loss = losses.cosent(cosines, torch.tensor(labels), tau)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(cosent_by_hand(cosines.tolist(), labels, tau), rel=1e-9, abs=1e-12)


def test_cosent_defaults_to_tau_20() -> None:
    cosines, labels = numbers(5, 1), numbers(5, 2)
    assert losses.cosent(cosines, labels).item() == pytest.approx(cosent_by_hand(cosines.tolist(), labels.tolist(), 20.0))
    pairs = vectors(5, 6, 1), vectors(5, 6, 2)
    assert torch.equal(losses.angle(*pairs, labels), losses.angle(*pairs, labels, 20.0))
    assert torch.equal(losses.graded(*pairs, labels), losses.graded(*pairs, labels, 20.0, 0.02))


@pytest.mark.parametrize("count", [1, 4])
def test_where_no_label_is_smaller_the_loss_is_exactly_0(count: int) -> None:
    first, second = vectors(count, 6, 1).requires_grad_(), vectors(count, 6, 2)
    labels = torch.ones(count)
    loss = losses.graded(first, second, labels, 20.0, 1.0)
    assert loss.item() == 0
    assert losses.cosent(numbers(count, 3), labels).item() == 0
    assert losses.angle(first, second, labels).item() == 0
    loss.backward()
    assert first.grad is not None
    assert torch.count_nonzero(first.grad) == 0


def test_only_the_order_of_labels_counts() -> None:
    cosines = numbers(6, 4)
    labels = torch.tensor([0, 3, 1, 3, 2, 0])
    assert torch.equal(losses.cosent(cosines, labels), losses.cosent(cosines, labels.double() ** 3 / 7 - 2))


def test_labels_against_the_order_of_cosines_cost_more() -> None:
    cosines = torch.tensor([0.9, 0.6, 0.2, -0.3])
    labels = torch.tensor([3.0, 2.0, 1.0, 0.0])
    right = losses.cosent(cosines, labels).item()
    for i in range(4):
        for j in range(i):
            swapped = labels.clone()
            swapped[[i, j]] = labels[[j, i]]
            assert losses.cosent(cosines, swapped).item() > right + 1
    # pairs that are equal and pairs that are at a right angle, for the other two
    first = torch.eye(4).repeat(2, 1)
    second = torch.cat([first[:4], first[:4].roll(1, 0)])
    labels = torch.tensor([1.0] * 4 + [0.0] * 4)
    assert losses.angle(first, second, labels) < losses.angle(first, second, 1 - labels) - 5
    assert losses.graded(first, second, labels) < losses.graded(first, second, 1 - labels) - 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [20.0, 1000.0])
def test_cosent_is_stable_where_cosines_are_extreme(dtype: torch.dtype, tau: float) -> None:
    cosines = torch.tensor([1.0, -1.0], dtype=dtype, requires_grad=True)
    wrong = losses.cosent(cosines, torch.tensor([0, 1]), tau)
    assert wrong.item() == pytest.approx(2 * tau)
    wrong.backward()
    assert cosines.grad is not None
    assert cosines.grad.tolist() == pytest.approx([tau, -tau])
    assert 0 <= losses.cosent(cosines, torch.tensor([1, 0]), tau).item() < 1e-9


@given(**SIZES)
@settings(max_examples=60)
def test_angle_similarity_is_complex_division(n: int, half: int, seed: int) -> None:
    first, second = vectors(n, 2 * half, seed), vectors(n, 2 * half, seed + 1)
    found = losses.angle_similarity(first, second)
    assert found.shape == (n,)
    for s, u, v in zip(found.tolist(), rows_of(first), rows_of(second), strict=True):
        turned = np.concatenate([-v[half:], v[:half]])
        assert s == pytest.approx(angle_by_hand(u, v), abs=1e-12)
        assert s == pytest.approx(abs(cos(u, v) + cos(u, turned)), abs=1e-12)
        assert 0 <= s <= math.sqrt(2) + 1e-12
        if half == 1:  # one complex number: Python's own division
            quotient = complex(*u) / complex(*v)
            quotient /= abs(complex(*u)) / abs(complex(*v))
            assert s == pytest.approx(abs(quotient.real + quotient.imag), abs=1e-12)


def test_angle_similarity_is_not_symmetric_and_blind_to_sign() -> None:
    first, second = vectors(8, 6, 1), vectors(8, 6, 2)
    one, other = losses.angle_similarity(first, second), losses.angle_similarity(second, first)
    assert (one - other).abs().min() > 1e-3
    for sign in (1, -1):
        torch.testing.assert_close(losses.angle_similarity(first, sign * first), torch.ones(8, dtype=torch.float64))


@given(tau=st.sampled_from([1.0, 20.0]), weight=st.sampled_from([0.0, 0.02, 1.0]), **SIZES)
@settings(max_examples=60)
def test_angle_and_graded(n: int, half: int, seed: int, tau: float, weight: float) -> None:
    first, second = vectors(n, 2 * half, seed), vectors(n, 2 * half, seed + 1)
    labels = (numbers(n, seed + 2) * 3).round()
    pairs = list(zip(rows_of(first), rows_of(second), strict=True))
    by_angle = cosent_by_hand([angle_by_hand(u, v) for u, v in pairs], labels.tolist(), tau)
    by_cosine = cosent_by_hand([cos(u, v) for u, v in pairs], labels.tolist(), tau)
    assert losses.angle(first, second, labels, tau).item() == pytest.approx(by_angle, rel=1e-9, abs=1e-12)
    found = losses.graded(first, second, labels, tau, weight).item()
    assert found == pytest.approx(by_cosine + weight * by_angle, rel=1e-9, abs=1e-12)


def test_an_odd_width_has_no_angle() -> None:
    first, second, labels = vectors(3, 5, 1), vectors(3, 5, 2), numbers(3, 3)
    for call in (
        lambda: losses.angle_similarity(first, second),
        lambda: losses.angle(first, second, labels),
        lambda: losses.graded(first, second, labels, 20.0, 0.02),
    ):
        with pytest.raises(UsageError, match=r"^the angle loss needs vectors of even width, and these have 5: .*$"):
            call()
    assert losses.graded(first, second, labels, 20.0, 0.0).item() > 0


# --- distillation ---


@given(seed=SIZES["seed"], n=SIZES["n"], width=st.integers(1, 6))
@settings(max_examples=40)
def test_to_teacher(n: int, width: int, seed: int) -> None:
    student, teacher = vectors(n, width, seed), vectors(n, width, seed + 1)
    expected = sum(1 - cos(u, v) for u, v in zip(rows_of(student), rows_of(teacher), strict=True)) / n
    assert losses.to_teacher(student, teacher).item() == pytest.approx(expected, abs=1e-12)
    assert losses.to_teacher(student, 3 * student).item() == pytest.approx(0, abs=1e-12)
    assert losses.to_teacher(student, -student).item() == pytest.approx(2)


def to_similarities(student: Tensor, teacher: Tensor, temperature: float = 0.05) -> Tensor:
    return losses.to_similarities(student, losses.batch_view(teacher, temperature), temperature)


@given(
    seed=SIZES["seed"],
    n=st.integers(2, 5),
    width=st.integers(1, 6),
    other=st.integers(1, 6),
    temperature=st.sampled_from([0.05, 0.3]),
)
@settings(max_examples=40)
def test_to_similarities(n: int, width: int, other: int, seed: int, temperature: float) -> None:
    student, teacher = vectors(n, width, seed), vectors(n, other, seed + 1)
    expected = similarities_by_hand(rows_of(student), rows_of(teacher), temperature)
    assert to_similarities(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # a rotation changes every vector and no similarity
    rotation = torch.linalg.qr(vectors(width, width, seed)).Q
    assert to_similarities(student, student @ rotation, temperature).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_texts_have_no_similarities(n: int) -> None:
    student = torch.randn(n, 4, requires_grad=True)
    loss = to_similarities(student, torch.randn(n, 6))
    assert loss.item() == 0
    loss.backward()
    assert student.grad is not None
    assert torch.count_nonzero(student.grad) == 0


def test_they_are_the_recipe_of_embell_mini() -> None:
    """The number is what the loss that embell-mini was distilled with, 5 (1 - cosine) + divergence, gave for these rows."""
    student = torch.cos(torch.outer(torch.arange(8.0, dtype=torch.float64), torch.arange(1.0, 7.0, dtype=torch.float64)))
    student /= student.norm(dim=1, keepdim=True)
    other = torch.sin(torch.outer(torch.arange(1.0, 9.0, dtype=torch.float64), torch.arange(2.0, 8.0, dtype=torch.float64)))
    teacher = student + 0.3 * other
    loss = 5 * losses.to_teacher(student, teacher) + to_similarities(student, teacher)
    assert loss.item() == pytest.approx(3.6925130316472288, rel=1e-12)


def test_a_teacher_gets_no_gradient() -> None:
    for loss in (losses.to_teacher, to_similarities, partial(losses.to_near_cosines, above=-1.0)):
        student, teacher = vectors(4, 6, 1).requires_grad_(), vectors(4, 6, 2).requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad is not None
        assert torch.count_nonzero(student.grad) > 0
    cosines, scores = numbers(4, 1).requires_grad_(), numbers(4, 2).requires_grad_()
    losses.to_scores(cosines, scores).backward()
    assert scores.grad is None
    assert cosines.grad is not None


@given(
    n=st.integers(0, 6),
    width=st.integers(1, 5),
    other=st.integers(1, 5),
    seed=SIZES["seed"],
    above=st.sampled_from([-1.0, 0.2, 0.6]),
)
@settings(max_examples=50)
def test_to_near_cosines(n: int, width: int, other: int, seed: int, above: float) -> None:
    student, teacher = vectors(n, width, seed), vectors(n, other, seed + 1)
    theirs, ours = rows_of(teacher), rows_of(student)
    errors = [
        (cos(ours[i], ours[j]) - cos(theirs[i], theirs[j])) ** 2
        for i in range(n)
        for j in range(i)
        if cos(theirs[i], theirs[j]) > above
    ]
    expected = sum(errors) / len(errors) if errors else 0
    assert losses.to_near_cosines(student, teacher, above).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_how_near_a_near_text_is_counts_for_near_cosines_alone() -> None:
    """Two near texts among others: at temperature 0.05 the batch's view is nearly blind to their cosine, 0.95 instead of 0.75."""

    def batch(near: float) -> torch.Tensor:
        found = torch.eye(6, dtype=torch.float64)
        found[1, 0], found[1, 1] = near, (1 - near**2) ** 0.5
        return found

    assert to_similarities(batch(0.95), batch(0.75)).item() < 1e-4
    assert losses.to_near_cosines(batch(0.95), batch(0.75)).item() == pytest.approx(0.04)


@given(n=SIZES["n"], seed=SIZES["seed"])
@settings(max_examples=30)
def test_to_scores(n: int, seed: int) -> None:
    cosines, scores = numbers(n, seed), numbers(n, seed + 1)
    expected = sum((a - b) ** 2 for a, b in zip(cosines.tolist(), scores.tolist(), strict=True)) / n
    assert losses.to_scores(cosines, scores).item() == pytest.approx(expected, abs=1e-12)
    assert losses.to_scores(cosines, cosines).item() == 0


def test_a_student_learns_the_scores_of_a_fixed_bilinear_teacher() -> None:
    left, right, form = vectors(6, 4, 1), vectors(6, 4, 2), vectors(4, 4, 3)
    scores = torch.tanh((left @ form * right).sum(dim=1) / 20)
    weights = [vectors(4, 8, seed).requires_grad_() for seed in (4, 5)]
    optimizer = torch.optim.Adam(weights, lr=0.05)
    seen = []
    for _ in range(300):
        cosines = torch.cosine_similarity(left @ weights[0], right @ weights[1])
        loss = losses.to_scores(cosines, scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 1e-4 < 0.05 < seen[0]


# --- depth and width ---


@given(n=SIZES["n"], seed=SIZES["seed"], width=st.integers(1, 6), temperature=st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=40)
def test_depth_agreement(n: int, width: int, seed: int, temperature: float) -> None:
    deep, shallow = vectors(n, width, seed), vectors(n, width, seed + 1)
    expected = agreement_by_hand(rows_of(deep), rows_of(shallow), temperature)
    assert losses.depth_agreement(deep, shallow, temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert losses.depth_agreement(deep, deep, temperature).item() == pytest.approx(0, abs=1e-12)
    if temperature == 1:
        assert torch.equal(losses.depth_agreement(deep, shallow), losses.depth_agreement(deep, shallow, temperature))


def test_both_depths_learn_to_agree() -> None:
    deep, shallow = vectors(3, 6, 1).requires_grad_(), vectors(3, 6, 2).requires_grad_()
    losses.depth_agreement(deep, shallow).backward()
    for side in (deep, shallow):
        assert side.grad is not None
        assert torch.count_nonzero(side.grad) == side.numel()


def as_contrastive(columns: list[Tensor]) -> Tensor:
    return losses.contrastive(*columns)


@given(
    seed=SIZES["seed"],
    widths=st.lists(st.integers(1, 5), max_size=3, unique=True),
    depths=st.lists(st.integers(1, 11), max_size=3, unique=True),
    m=st.integers(1, 3),
)
@settings(max_examples=40)
def test_nested(seed: int, widths: list[int], depths: list[int], m: int) -> None:
    shapes = (3, 3, m)  # columns of different lengths: their agreement is averaged over columns, not rows
    deep = [vectors(rows, 6, seed + part) for part, rows in enumerate(shapes)]
    shallow = {depth: [vectors(rows, 6, seed + 10 * depth + part) for part, rows in enumerate(shapes)] for depth in depths}
    expected = 0.0
    for columns in (deep, *shallow.values()):
        for width in (6, *widths):
            cut = [[row[:width] for row in rows_of(column)] for column in columns]
            expected += contrastive_by_hand(cut[0], cut[1], cut[2], 0.05, set())
    for columns in shallow.values():
        parts = [agreement_by_hand(rows_of(one), rows_of(other), 1.0) for one, other in zip(deep, columns, strict=True)]
        expected += sum(parts) / len(parts)
    assert losses.nested(as_contrastive, deep, shallow, widths).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nested_in_nothing_is_the_loss_itself(dtype: torch.dtype) -> None:
    deep = [vectors(rows, 6, rows, dtype) for rows in (4, 4, 3)]
    assert torch.equal(losses.nested(as_contrastive, deep, {}, []), as_contrastive(deep))


def test_a_cut_and_renormalised_vector_has_the_loss_of_the_narrow_one() -> None:
    first, second, labels = vectors(5, 8, 1), vectors(5, 8, 2), numbers(5, 3)
    found = losses.nested(lambda columns: losses.graded(columns[0], columns[1], labels), [first, second], {}, [4])
    narrow = [torch.nn.functional.normalize(side[:, :4]) for side in (first, second)]
    torch.testing.assert_close(found, losses.graded(first, second, labels) + losses.graded(narrow[0], narrow[1], labels))


@pytest.mark.parametrize("width", [0, -1, 6, 7])
def test_a_width_that_is_no_cut_is_refused(width: int) -> None:
    deep = [vectors(4, 6, 1), vectors(4, 6, 2)]
    with pytest.raises(UsageError, match=rf"^width {width} is not between 1 and 5: the vectors have 6$"):
        losses.nested(as_contrastive, deep, {}, [2, width])


def test_a_depth_with_other_columns_is_refused() -> None:
    deep = [vectors(4, 6, 1), vectors(4, 6, 2)]
    with pytest.raises(UsageError, match=r"^depth 3 has 1 columns, the full depth has 2$"):
        losses.nested(as_contrastive, deep, {3: deep[:1]}, [])
    with pytest.raises(UsageError, match=r"^deep and shallow vectors must have the same shape, not \(4, 6\) and \(4, 5\)$"):
        losses.nested(as_contrastive, deep, {3: [column[:, :5] for column in deep]}, [])


# --- all of them ---

LABELS = torch.tensor([0.0, 2.0, 1.0, 2.0])
MASK = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1, 0, 0], [0] * 8, [1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
ALL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrastive": losses.contrastive,
    "contrastive with negatives": lambda first, second: losses.contrastive(first, second, first.flip(0) + second),
    "contrastive masked": lambda first, second: losses.contrastive(first, second, first.flip(0) - second, masked=MASK),
    "angle": lambda first, second: losses.angle(first, second, LABELS),
    "graded": lambda first, second: losses.graded(first, second, LABELS, 20.0, 0.5),
    "to_teacher": losses.to_teacher,
    "to_similarities": to_similarities,
    "to_near_cosines": partial(losses.to_near_cosines, above=-0.9),
    "to_scores": lambda first, second: losses.to_scores(torch.cosine_similarity(first, second), LABELS - 1),
    "depth_agreement": losses.depth_agreement,
    "nested": lambda first, second: losses.nested(as_contrastive, [first, second], {1: [second, first]}, [2, 4]),
}
OF_TEACHERS = ("to_teacher", "to_similarities", "to_near_cosines")
BLIND_TO_LENGTH = [name for name in ALL if name not in ("depth_agreement", "nested")]


@pytest.mark.parametrize("name", BLIND_TO_LENGTH)
def test_the_length_of_a_vector_does_not_matter(name: str) -> None:
    first, second = vectors(4, 6, 1), vectors(4, 6, 2)
    lengths = [torch.logspace(-4, 4, 4, dtype=torch.float64).unsqueeze(1) for _ in range(2)]
    if "negatives" in name or "masked" in name:  # those columns are made from the other two: one length for all
        lengths = [torch.full((4, 1), 1e3, dtype=torch.float64)] * 2
    torch.testing.assert_close(ALL[name](first * lengths[0], second * lengths[1].flip(0)), ALL[name](first, second))


def test_the_length_of_negatives_and_guides_does_not_matter() -> None:
    queries, positives, negatives = (vectors(4, 6, seed) for seed in (1, 2, 3))
    lengths = torch.logspace(-4, 4, 4, dtype=torch.float64).unsqueeze(1)
    expected = losses.contrastive(queries, positives, negatives)
    torch.testing.assert_close(losses.contrastive(queries, positives, negatives * lengths), expected)
    mask = losses.false_negatives(queries, positives, negatives, 0.2)
    assert torch.equal(losses.false_negatives(queries * lengths, positives, negatives * lengths.flip(0), 0.2), mask)
    assert mask.any()


def test_depth_agreement_reads_the_length() -> None:
    deep, shallow = vectors(4, 6, 1), vectors(4, 6, 2)
    unit = [torch.nn.functional.normalize(side) for side in (deep, shallow)]
    assert losses.depth_agreement(*unit) < losses.depth_agreement(deep, shallow) / 10


@pytest.mark.parametrize("name", [name for name in ALL if name not in OF_TEACHERS])
def test_gradients(name: str) -> None:
    sides = vectors(4, 6, 1).requires_grad_(), vectors(4, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(ALL[name], sides)


@pytest.mark.parametrize("name", OF_TEACHERS)
def test_gradients_of_the_student(name: str) -> None:
    teacher = vectors(4, 6, 2)
    assert torch.autograd.gradcheck(lambda student: ALL[name](student, teacher), (vectors(4, 6, 1).requires_grad_(),))


@pytest.mark.parametrize("name", ALL)
def test_rows_of_zeros_do_no_harm(name: str) -> None:
    sides = [vectors(4, 6, seed, torch.float32) for seed in (1, 2)]
    sides[0][1] = 0
    sides[1][1] = 0
    sides[1][2] = 0
    for side in sides:
        side.requires_grad_()
    loss = ALL[name](*sides)
    assert loss.isfinite()
    loss.backward()
    for side in sides:
        if side.grad is not None:
            assert side.grad.isfinite().all()
            assert side.grad.abs().max() < 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    sides = [vectors(4, 6, seed, dtype) for seed in (1, 2)]
    if name == "to_scores":  # of cosines
        cosines = numbers(4, 1).to(dtype)
        torch.testing.assert_close(losses.to_scores(cosines, LABELS), losses.to_scores(cosines.float(), LABELS))
    elif name not in ("contrastive with negatives", "contrastive masked"):  # those add, in half precision, here
        found = ALL[name](*sides)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, ALL[name](*(side.float() for side in sides)))


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_goes_downhill(name: str) -> None:
    first, second = vectors(4, 6, 1).requires_grad_(), vectors(4, 6, 2)
    loss = ALL[name](first, second)
    (gradient,) = torch.autograd.grad(loss, first)
    assert ALL[name](first - 1e-5 * gradient / gradient.norm(), second) < loss


def test_shapes_that_would_broadcast_are_refused() -> None:
    rows, column = torch.zeros(4), torch.zeros(4, 1)
    table, other = torch.ones(4, 6), torch.ones(1, 6)
    for call in (
        lambda: losses.contrastive(table, other),
        lambda: losses.contrastive(table, table, masked=torch.zeros(4, 1, dtype=torch.bool)),
        lambda: losses.false_negatives(table, other, None, 0.9),
        lambda: losses.cosent(rows, column),
        lambda: losses.angle_similarity(table, other),
        lambda: losses.angle(table, table, column),
        lambda: losses.graded(table, other, rows),
        lambda: losses.to_teacher(table, other),
        lambda: to_similarities(table, other),
        lambda: losses.to_near_cosines(table, other),
        lambda: losses.to_scores(rows, column),
        lambda: losses.depth_agreement(table, other),
    ):
        with pytest.raises(UsageError, match=r"must have the same .*, not .* and "):
            call()
