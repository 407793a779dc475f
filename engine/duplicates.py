"""Near-duplicates: what is kept and what is dropped, decided from a list of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embell.engine.pair_list import KINDS, LOOKED_FOR, OVERLAP, PAIR, THRESHOLDS, PairList, check_thresholds, in_order
from embell.engine.rules import check_keep, decide, ranks
from embell.errors import UsageError

if TYPE_CHECKING:
    from embell.engine.threshold_choice import Decision

Array = np.ndarray[Any, Any]

DEFAULT_KINDS = ("exact", "lexical", "semantic")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A dropped document: the kept one it goes with, and the score and kind of the pair that says why.

    The pair is with the kept document, but for the rule "components": there it may be with another one, `via`.
    """

    id: str
    kept_id: str
    score: float
    kind: str
    via: str | None = None


@dataclass(frozen=True)
class Rows:
    """What is known of the rows that were compared: ids, and what keep policies may ask for."""

    ids: Sequence[str]
    lengths: Array | None = None
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Duplicates:
    """The result of near-duplicate detection, ids in the order of the documents.

    `thresholds` are those by kind; `capped` counts documents with more than 1 000 earlier partners, of which only the links to a few, and to
    a kept one, are among the pairs. `rank` is the place of each document in the order of preference. `reduced` is the lowest score of those
    that were dropped to reach a number of documents (`reduction.reduce_to`), None if none was.
    """

    thresholds: dict[str, float]
    keep: str
    rule: str
    kept: list[str]
    dropped: list[Dropped]
    kept_positions: Array
    rows: Rows
    found: PairList
    rank: Array
    reduced: float | None = None

    @property
    def capped(self) -> int:
        return len(self.found.capped)

    @cached_property
    def pairs(self) -> pa.Table:
        """Every pair at or above the thresholds: `id_a` (the earlier document), `id_b`, `score` and `kind`.

        A text that stands several times stands for its copies, which have the link to it only, of the kind "exact".
        """
        cut, original = self.found.at(self.thresholds), self.found.original
        copies = np.flatnonzero(original != np.arange(len(original)))
        if self.found.split is not None:
            # Copies within a corpus are no pairs here, but a copy has the pairs of its text with the other corpus.
            split = self.found.split
            mine = copies[original[copies] >= split]
            copies = copies[(original[copies] < split) & (copies >= split)]
            starts, ends = (np.searchsorted(cut["second"], original[mine], side) for side in ("left", "right"))
            more = cut[np.repeat(starts, ends - starts) + _counted(ends - starts)].copy()
            more["second"] = np.repeat(mine, ends - starts)
            cut = np.concatenate([cut, more])
        one, other = np.concatenate([original[copies], cut["first"]]), np.concatenate([copies, cut["second"]])
        first, second = np.minimum(one, other), np.maximum(one, other)
        score = np.concatenate([np.ones(len(copies)), cut["score"]])
        kind = np.concatenate([np.zeros(len(copies), np.int8), cut["kind"]])
        order = np.lexsort((kind, first, second))
        names = pa.array(self.rows.ids, pa.string())
        return pa.table(
            {
                "id_a": names.take(pa.array(first[order])),
                "id_b": names.take(pa.array(second[order])),
                "score": pa.array(score[order]),
                "kind": pa.array(np.array(KINDS, object)[kind[order]], pa.string()),
            }
        )

    @property
    def groups(self) -> list[list[str]]:
        """Each kept document that has duplicates, with those dropped for it."""
        found: dict[str, list[str]] = {}
        for row in self.dropped:
            found.setdefault(row.kept_id, [row.kept_id]).append(row.id)
        return [*found.values()]

    def to_arrow(self) -> pa.Table:
        """The dropped documents: `id`, `kept_id`, `score`, `kind`, and `via` (null unless the pair is with another document)."""
        names = ("id", "kept_id", "score", "kind", "via")
        columns: dict[str, Any] = {name: [getattr(row, name) for row in self.dropped] for name in names}
        types = [pa.string(), pa.string(), pa.float64(), pa.string(), pa.string()]
        return pa.table(columns, pa.schema(zip(names, types, strict=True)))

    def rethreshold(
        self,
        threshold: float | None = None,
        *,
        thresholds: Mapping[str, float] | None = None,
        keep: str | None = None,
        rule: str | None = None,
    ) -> Duplicates:
        """Decide again from the same pairs; `threshold` is the semantic one, what is not given stays. A reduction is not made again.

        Raises UsageError below the thresholds that pairs were looked for with, and where capped rows lack the pairs for it.
        """
        wanted = {**self.thresholds, **(thresholds or {})}
        if threshold is not None:
            wanted["semantic"] = threshold
        reason = self.found.lacks(check_thresholds(wanted), keep or self.keep)
        if reason:
            raise UsageError(f"{reason}; look for duplicates anew")
        return judge(self.found, self.rows, wanted, keep or self.keep, rule or self.rule)

    def decided(self, decisions: Iterable[Decision]) -> Duplicates:
        """Decide again as people have judged: pairs that are no duplicates go, those that are count whatever they score. A reduction is not made again.

        A decision is about two texts: it holds for their copies too. Copies remain copies. Of a result of `leaks`, `id_a` is the other
        collection's, as in `pairs`. Raises UsageError for an id that is not there.
        """
        split = self.found.split or 0
        mine = {name: at for at, name in enumerate(self.rows.ids[split:], split)}
        others = {name: at for at, name in enumerate(self.rows.ids[:split])} if split else mine
        original = self.found.original
        pairs = self.found.pairs
        gone, more = set(), []
        for one in decisions:
            names = (one.id_a, one.id_b)
            if names[0] not in others or names[1] not in mine:
                names = (one.id_b, one.id_a)  # written the other way round
            for name, place in zip(names, (others, mine), strict=True):
                if name not in place:
                    raise UsageError(f"decisions: there is no document with the id {name!r}")
            a, b = sorted((int(original[others[names[0]]]), int(original[mine[names[1]]])))
            if a != b:
                gone.add((a, b))
                if one.duplicate and b >= split:  # else it is a copy of a row of the other collection, and drops anyway
                    more.append((a, b, 1.0, 1.0, KINDS.index("reviewed")))
        judged = np.fromiter(
            ((a, b) in gone for a, b in zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True)), bool, len(pairs)
        )
        found = replace(self.found, pairs=in_order(np.concatenate([pairs[~judged], np.array(more, PAIR)])))
        return judge(found, self.rows, {**self.thresholds, "reviewed": 1.0}, self.keep, self.rule)


def _counted(lengths: Array) -> Array:
    """0, 1, … up to each of these lengths, one after the other."""
    found: Array = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return found


def judge(found: PairList, rows: Rows, thresholds: Mapping[str, float], keep: str = "first", rule: str = "cover") -> Duplicates:
    """Apply thresholds, a keep policy and a rule to a list of pairs.

    Raises UsageError for a policy or a rule that does not exist, or a field that no row has.
    """
    check_keep(keep)
    cut, original, count = found.at(thresholds), found.original, found.rows
    first, second, score = cut["first"], cut["second"], cut["score"]
    rank = _ranked(rows, keep, _partners(found, cut))
    if keep == "central" and len(found.capped) and found.keep == "central" and found.rank is not None:
        rank = found.rank.copy()  # what is listed of capped rows fits this order
    split = found.split or 0
    rank[:split] -= count  # what is compared against is preferred
    order = np.lexsort((rank, original))
    starts = np.flatnonzero(np.diff(original[order], prepend=-1))
    leader = np.arange(count)  # of each text, the copy that is preferred
    leader[original[order[starts]]] = order[starts]
    decision = decide(rule if found.split is None else "cover", rank[leader], first, second, score)

    kept_text = decision.kept_by[original]
    target = leader[kept_text]
    stays = target == np.arange(count) if found.split is None else target >= split
    kept = split + np.flatnonzero(stays[split:])
    dropped = []
    ids = rows.ids
    for row in (split + np.flatnonzero(~stays[split:])).tolist():
        text = int(original[row])
        if kept_text[row] == text:
            dropped.append(Dropped(ids[row], ids[target[row]], 1.0, "exact"))
            continue
        pair = int(decision.pair[text])
        other = int(first[pair] + second[pair] - text)
        via = None if other == kept_text[row] else ids[leader[other]]
        dropped.append(Dropped(ids[row], ids[target[row]], float(score[pair]), KINDS[cut["kind"][pair]], via))
    return Duplicates(dict(thresholds), keep, rule, [ids[row] for row in kept.tolist()], dropped, kept - split, rows, found, rank)


def chosen_thresholds(
    semantic: float | None = None,
    *,
    lexical: float | None = None,
    contained: float | None = None,
    overlap: float | None = None,
    kinds: Sequence[str] | None = None,
) -> dict[str, float]:
    """The thresholds of the kinds that are looked for.

    With nothing given, the usual ones: exact copies, texts with nearly the same words, and texts that are near in meaning and share most words. A semantic
    threshold alone looks for exact copies and for cosines; `overlap` asks of semantic pairs a containment too. `kinds` chooses.

    Raises UsageError for a kind that does not exist, or a threshold outside (0, 1].
    """
    given = {"exact": 1.0, "lexical": lexical, "contained": contained, "semantic": semantic}
    if kinds is None:
        asked = {kind for kind in LOOKED_FOR if given[kind] is not None}
        kinds = sorted(asked if semantic is not None else asked | set(DEFAULT_KINDS))
    for kind in kinds:
        if kind not in LOOKED_FOR:
            raise UsageError(f"kind {kind!r} is not known; there are {', '.join(LOOKED_FOR)}")
    for kind, value in given.items():
        if value is not None and kind not in kinds and kind != "exact":
            raise UsageError(f"a {kind} threshold is given, but {kind} duplicates are not among the kinds looked for")
    found = {
        kind: value if (value := given[kind]) is not None else THRESHOLDS[kind]
        for kind in KINDS
        if kind in kinds or kind == "exact"
    }
    if "semantic" in found:
        if overlap is None and semantic is None:
            overlap = THRESHOLDS[OVERLAP]
        if overlap:
            found[OVERLAP] = overlap
    return check_thresholds(found)


def found_in_order(
    search: Callable[[Array | None], PairList], rows: Rows, thresholds: Mapping[str, float], keep: str
) -> PairList:
    """The pairs that a search finds among rows in the order (their positions, `(n,)`) in which a keep policy prefers them.

    So rows with too many partners are linked to those that are preferred. What is central is known after a first search.
    """
    if keep == "first":
        return search(None)
    partners = None
    if keep == "central":
        found = search(None)
        if not len(found.capped):
            return found
        partners = _partners(found, found.at(thresholds))
    order = np.argsort(_ranked(rows, keep, partners))
    return search(order).renumbered(order, keep)


def _ranked(rows: Rows, keep: str, partners: Array | None) -> Array:
    name = keep.rpartition(":")[0]
    if name and name not in rows.values:
        raise UsageError(f"keep {keep!r}: there is no field {name!r}")
    if keep in ("longest", "shortest") and rows.lengths is None:
        raise UsageError(f"keep {keep!r}: the texts were not read; look for duplicates anew")
    return ranks(keep, len(rows.ids), lengths=rows.lengths, values=rows.values.get(name), partners=partners)


def _partners(found: PairList, pairs: Array) -> Array:
    """For each row the sum of the scores of its text's pairs."""
    sums = np.bincount(pairs["first"], pairs["score"], found.rows) + np.bincount(pairs["second"], pairs["score"], found.rows)
    of_rows: Array = sums[found.original]
    return of_rows
