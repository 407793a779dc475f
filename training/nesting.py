"""Which smaller vectors a model is trained to give besides its own: Matryoshka widths and early exits."""

from __future__ import annotations

from dataclasses import dataclass

from embell.errors import UsageError


@dataclass(frozen=True)
class NestingOptions:
    """Vectors that are to be good as well: the first components of the whole vector, and those after fewer layers.

    Attributes:
        widths: numbers of leading components that are to work as vectors of their own (Matryoshka)
        depths: numbers of layers after which the vectors are to work already (2DMSE)
    """

    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()

    def check(self, width: int) -> None:
        """Raises UsageError for a width that vectors of so many components do not have."""
        for wrong in (one for one in self.widths if not 1 <= one < width):
            raise UsageError(f"width {wrong} is not one of the widths 1 to {width - 1} of a model whose vectors have {width}")
