"""Rules and keep policies against brute force over small random graphs."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embell import UsageError
from embell.engine import rules
from embell.engine.rules import KEEP, RULES, Decision, check_keep, check_rule, decide, ranks

Array = np.ndarray[Any, Any]


class Graph(NamedTuple):
    """Pairs of rows with scores, and a rank for each row."""

    rank: list[int]
    pairs: list[tuple[int, int, float]]

    def decided(self, rule: str) -> Decision:
        first, second = (np.array([pair[end] for pair in self.pairs], np.int64) for end in (0, 1))
        return decide(rule, np.array(self.rank, np.int64), first, second, np.array([pair[2] for pair in self.pairs], np.float64))

    def score(self, one: int, other: int) -> float | None:
        """The best score of the pairs that join two rows."""
        return max((score for first, second, score in self.pairs if {first, second} == {one, other}), default=None)

    def near(self, row: int) -> set[int]:
        return {first + second - row for first, second, _ in self.pairs if row in (first, second)}


@st.composite
def graphs(draw: st.DrawFn, distinct: bool = False) -> Graph:
    """Graphs with ties and with the same pair twice, as of two kinds; or, `distinct`, with neither."""
    rows = draw(st.integers(0, 11))
    places = [(first, second) for second in range(rows) for first in range(second)]
    chosen = draw(st.lists(st.sampled_from(places), unique=distinct, max_size=40)) if places else []
    if distinct:
        scores = [0.5 + place / 100 for place in draw(st.permutations(range(len(chosen))))]
    else:
        scores = draw(st.lists(st.sampled_from([0.5, 0.75, 0.9, 1.0]), min_size=len(chosen), max_size=len(chosen)))
    below = draw(st.sampled_from([0, rows]))  # rows that others are compared against have negative ranks
    rank = [place - below for place in draw(st.permutations(range(rows)))]
    return Graph(rank, [(*pair, score) for pair, score in zip(chosen, scores, strict=True)])


@given(graphs())
@settings(max_examples=70)
def test_cover_is_the_greedy_walk(graph: Graph) -> None:
    kept: list[int] = []
    expected = {}
    for row in sorted(range(len(graph.rank)), key=graph.rank.__getitem__):
        near = [other for other in kept if graph.score(row, other) is not None]
        if near:
            expected[row] = max(near, key=lambda other: (graph.score(row, other), -graph.rank[other]))
        else:
            kept.append(row)
    found = graph.decided("cover")
    assert found.kept_by.tolist() == [expected.get(row, row) for row in range(len(graph.rank))]
    for row, number in enumerate(found.pair.tolist()):
        if row in expected:
            first, second, score = graph.pairs[number]
            assert {first, second} == {row, expected[row]}
            assert score == graph.score(row, expected[row])
        else:
            assert number == -1


@given(graphs())
@settings(max_examples=70)
def test_cover_keeps_its_promises(graph: Graph) -> None:
    found = graph.decided("cover")
    rows = range(len(graph.rank))
    kept = {row for row in rows if found.kept_by[row] == row}
    for row in kept:
        assert not graph.near(row) & kept
    for row in set(rows) - kept:
        by = int(found.kept_by[row])
        assert by in kept & graph.near(row)
        assert graph.rank[by] < graph.rank[row]
        better = [other for other in graph.near(row) & kept if graph.rank[other] < graph.rank[row]]
        assert graph.score(row, by) == max(graph.score(row, other) or 0 for other in better)


@given(graphs())
@settings(max_examples=70)
def test_components_are_what_hangs_together(graph: Graph) -> None:
    found = graph.decided("components")
    for row in range(len(graph.rank)):
        part, new = {row}, {row}
        while new:
            new = set().union(*(graph.near(one) for one in new)) - part
            part |= new
        kept = min(part, key=graph.rank.__getitem__)
        assert found.kept_by[row] == kept
        number = int(found.pair[row])
        if row == kept:
            assert number == -1
            continue
        first, second, score = graph.pairs[number]
        other = first + second - row
        assert row in (first, second)
        if kept in graph.near(row):
            assert (other, score) == (kept, graph.score(row, kept))
        else:
            assert score == max(graph.score(row, one) or 0 for one in graph.near(row))


def linked(graph: Graph) -> list[set[int]]:
    """Complete linkage: the two groups are put together whose furthest rows are nearest, while all are pairs."""
    groups = [{row} for row in range(len(graph.rank))]
    while True:
        best: tuple[float, int, int] | None = None
        for one in range(len(groups)):
            for other in range(one):
                scores = [graph.score(row, there) for row in groups[one] for there in groups[other]]
                if None not in scores:
                    best = max(best or (-1.0, 0, 0), (min(score for score in scores if score is not None), one, other))
        if best is None:
            return groups
        groups[best[2]] |= groups.pop(best[1])


@given(graphs(distinct=True))
@settings(max_examples=60)
def test_complete_is_complete_linkage(graph: Graph) -> None:
    found = graph.decided("complete")
    for group in linked(graph):
        assert {int(found.kept_by[row]) for row in group} == {min(group, key=graph.rank.__getitem__)}


@given(graphs())
@settings(max_examples=60)
def test_in_complete_groups_every_two_rows_are_a_pair(graph: Graph) -> None:
    found = graph.decided("complete")
    rows = range(len(graph.rank))
    for one in rows:
        for other in range(one):
            if found.kept_by[one] == found.kept_by[other]:
                assert other in graph.near(one)
        kept = int(found.kept_by[one])
        assert found.kept_by[kept] == kept
        if kept == one:
            assert found.pair[one] == -1
        else:
            first, second, score = graph.pairs[int(found.pair[one])]
            assert ({first, second}, score) == ({one, kept}, graph.score(one, kept))
            assert graph.rank[kept] < graph.rank[one]


def test_complete_refuses_what_cannot_be_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_DENSE", 3)
    chain = Graph([0, 1, 2, 3], [(0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.9)])
    with pytest.raises(UsageError, match=r"'complete': 4 rows hang together, more than the 3 .* threshold.*'cover'"):
        chain.decided("complete")
    assert Graph([0, 1, 2, 3], chain.pairs[:2]).decided("complete").kept_by.tolist() in ([0, 0, 2, 3], [0, 1, 1, 3])


def test_a_chain_shows_what_the_rules_differ_in() -> None:
    chain = Graph([0, 1, 2, 3], [(0, 1, 0.9), (1, 2, 0.8), (2, 3, 0.95)])
    assert chain.decided("cover").kept_by.tolist() == [0, 0, 2, 2]
    found = chain.decided("components")
    assert (found.kept_by.tolist(), found.pair.tolist()) == ([0, 0, 0, 0], [-1, 0, 2, 2])
    assert chain.decided("complete").kept_by.tolist() == [0, 0, 2, 2]
    turned = Graph([3, 2, 1, 0], chain.pairs)
    assert turned.decided("cover").kept_by.tolist() == [1, 1, 3, 3]
    assert turned.decided("components").kept_by.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_decided_of_no_rows_and_of_no_pairs(rule: str) -> None:
    for rows in (0, 1, 4):
        found = Graph(list(range(rows)), []).decided(rule)
        assert found.kept_by.tolist() == list(range(rows))
        assert found.pair.tolist() == [-1] * rows


@pytest.mark.parametrize("rule", ["", "Cover", "single", "first"])
def test_unknown_rules_are_refused(rule: str) -> None:
    for refuse in (lambda: check_rule(rule), lambda: Graph([0], []).decided(rule)):
        with pytest.raises(UsageError, match=rf"rule '{rule}' is not known; there are cover, components, complete$"):
            refuse()


@pytest.mark.parametrize("keep", ["", "First", "max", ":max", ":min", "year", "year:", "year:most", "year:MAX", "max:"])
def test_unknown_policies_are_refused(keep: str) -> None:
    for refuse in (lambda: check_keep(keep), lambda: ranks(keep, 3)):
        with pytest.raises(UsageError, match=rf"keep '{keep}' is not known; there are first, .*FIELD:max and FIELD:min$"):
            refuse()


def preferred(rank: Array) -> list[int]:
    assert sorted(rank.tolist()) == list(range(len(rank)))
    return np.argsort(rank).tolist()  # type: ignore[no-any-return]


@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.integers(0, 3).map(lambda n: n / 4), min_size=12, max_size=12))
def test_policies_order_rows(lengths: list[int], partners: list[float]) -> None:
    rows = range(len(lengths))
    partners = partners[: len(rows)]
    expected = {
        "first": list(rows),
        "last": list(reversed(rows)),
        "longest": sorted(rows, key=lambda row: (-lengths[row], row)),
        "shortest": sorted(rows, key=lambda row: (lengths[row], row)),
        "central": sorted(rows, key=lambda row: (-partners[row], row)),
    }
    assert expected.keys() == set(KEEP)
    for keep, order in expected.items():
        rank = ranks(keep, len(rows), lengths=np.array(lengths, np.int64), partners=np.array(partners))
        assert preferred(rank) == order, keep


VALUES = st.one_of(
    *(
        st.lists(st.none() | kind, max_size=12)
        for kind in (
            st.integers(-3, 3) | st.sampled_from([0.5, math.nan, math.inf, -math.inf]) | st.booleans(),
            st.sampled_from(["", "a", "b", "B", "é"]),
            st.dates(datetime.date(2000, 1, 1), datetime.date(2000, 1, 5)),
            st.datetimes(datetime.datetime(2000, 1, 1), datetime.datetime(2000, 1, 2)),
        )
    )
)


@given(VALUES)
@settings(max_examples=60)
def test_rows_go_by_a_field_and_those_without_a_value_come_last(values: list[Any]) -> None:
    for end in ("max", "min"):
        there = {row: value for row, value in enumerate(values) if value is not None and value == value}
        order: list[int] = []
        for value in sorted(set(there.values()), reverse=end == "max"):
            order += [row for row in there if there[row] == value]
        order += [row for row in range(len(values)) if row not in there]
        assert preferred(ranks(f"n:{end}", len(values), values=values)) == order


def test_the_field_may_have_a_colon_and_the_values_be_in_an_array() -> None:
    assert preferred(ranks("a:b:max", 3, values=(1, 3, 2))) == [1, 2, 0]
    assert preferred(ranks("min:min", 3, values=[2, None, 1])) == [2, 0, 1]
    assert preferred(ranks("n:max", 4, values=np.array([1.0, np.nan, 3.0, 2.0]))) == [2, 3, 0, 1]  # type: ignore[arg-type]
    assert preferred(ranks("n:max", 1, values=np.array([0]))) == [0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        [1, "a"],
        [None, "a", 2.0, 3],
        [{"a": 1}, {"a": 2}],
        [1j, 2j],
        [datetime.datetime(2000, 1, 1), datetime.datetime(2000, 1, 1, tzinfo=datetime.timezone.utc)],
        [[1], ["a"]],
    ],
)
@pytest.mark.parametrize("end", ["max", "min"])
def test_values_without_an_order_are_refused_in_one_line(values: Sequence[Any], end: str) -> None:
    with pytest.raises(UsageError, match=rf"^keep 'n:{end}': the values of this field have no order \(.*\)$"):
        ranks(f"n:{end}", len(values), values=values)
