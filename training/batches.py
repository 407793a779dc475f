"""The batches of a run: planned beforehand, so that a run can be taken up again, and made when they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

from embell.engine.tokens import TokenRow


@dataclass(frozen=True)
class Examples:
    """One batch: the token rows of its texts, column by column (queries, positives, …), and what else its loss needs."""

    columns: list[list[TokenRow]]
    targets: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> list[TokenRow]:
        return [row for column in self.columns for row in column]


class Batches(Dataset[Examples]):
    """All batches of a run in order, made when they are asked for; planned beforehand, so that a run can be taken up again."""

    def __init__(self, plan: Sequence[Sequence[int]], make: Callable[[Sequence[int]], Examples]) -> None:
        """`plan` holds the row numbers of each batch; `make` turns them into a batch."""
        self._plan, self._make = plan, make

    def __len__(self) -> int:
        return len(self._plan)

    def first(self, count: int) -> Batches:
        """The first so many of them."""
        return Batches(self._plan[:count], self._make)

    def __getitem__(self, index: int) -> Examples:
        return self._make(self._plan[index])


def plan_batches(
    texts: Sequence[Sequence[str]], batch: int, epochs: float, seed: int, negatives: Sequence[Sequence[str]] | None = None
) -> list[list[int]]:
    """Row numbers of each batch over all epochs, shuffled anew in each.

    `texts` holds the texts of each row. A text never stands twice in a batch, where it would be its own negative (the
    collator of AnglE drops such rows; here they go into a later batch). `negatives` are further texts of each row: rows may share those among
    each other, but they are no text of another row's. What is left of an epoch is left out when it fills
    less than half of the epoch's first batch.
    """
    order = torch.Generator().manual_seed(seed)
    whole, part = int(epochs), epochs - int(epochs)
    planned: list[list[int]] = []
    for epoch in range(whole + (part > 0)):
        rows = torch.randperm(len(texts), generator=order).tolist()
        waiting = deque(rows if epoch < whole else rows[: max(1, round(part * len(rows)))])
        found: list[list[int]] = []
        while waiting:
            taken: list[int] = []
            seen: set[str] = set()
            wrong: set[str] = set()
            put_off: list[int] = []
            while waiting and len(taken) < batch:
                row = waiting.popleft()
                others = negatives[row] if negatives is not None else ()
                if seen.isdisjoint(texts[row]) and wrong.isdisjoint(texts[row]) and seen.isdisjoint(others):
                    taken.append(row)
                    seen.update(texts[row])
                    wrong.update(others)
                else:
                    put_off.append(row)
            if found and 2 * len(taken) < len(found[0]):
                break  # what is left repeats itself
            found.append(taken)
            waiting.extendleft(reversed(put_off))
        planned += found
    return planned
