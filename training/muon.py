"""Muon: momentum whose matrix is made orthogonal before it is applied (Jordan et al. 2024), AdamW for what is no matrix of a layer.

torch has a Muon that orthogonalises in bfloat16 whatever the hardware; on a CPU without bf16 units its products are emulated
and take longer than the rest of a step. This one computes in the precision that the run computes in, all matrices of one shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 5
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic Newton-Schulz iteration, as in torch.optim.Muon."""


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and with `muon` Muon for the matrices of the layers.

    A step of Muon is scaled by 0.2 times the root of the larger side, which gives it the root mean square of a step of AdamW
    ("match_rms_adamw" in torch.optim.Muon), so that one learning rate serves both.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, weight_decay: float, *, muon: bool, table_rate: float = 1.0,
        momentum: float = 0.95, precision: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """Trains what has gradients in `model`; only the matrices of linear layers decay.

        `table_rate` multiplies the learning rate of token tables, whose rows are large beside the weights of a layer. Matrices are made
        orthogonal in `precision`.
        """
        self._precision = precision
        matrices, tables, others = sort(model)
        groups: list[dict[str, Any]] = [
            {"params": others, "weight_decay": 0.0, "momentum": None},
            {"params": tables, "weight_decay": 0.0, "momentum": None, "lr": table_rate * learning_rate},
            {"params": matrices, "weight_decay": weight_decay, "momentum": momentum if muon else None},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=learning_rate, betas=(0.9, 0.98 if muon else 0.999), fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            if group["momentum"] is None:
                continue
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    state["step"] = torch.zeros(())  # AdamW looks for one wherever a state is loaded
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                step = parameter.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
                by_shape[parameter.shape].append((parameter, step))
                parameter.grad = None  # so that AdamW passes it over
            for shape, pairs in by_shape.items():
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                steps = orthogonal(torch.stack([one for _, one in pairs]).to(self._precision))
                for (parameter, _), step in zip(pairs, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=scale)
        return super().step(closure)  # type: ignore[no-any-return]


def sort(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The trained parameters of a model: the matrices of its linear layers, its tables, and all others."""
    kinds = {
        id(module.weight): kind
        for kind, of in enumerate((nn.Linear, nn.Embedding))
        for module in model.modules()
        if isinstance(module, of)
    }
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            found[kinds.get(id(parameter), 2)].append(parameter)
    return found


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices `(n, rows, columns)` with their singular values moved near 1 (Newton-Schulz, five steps)."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = wide @ wide.transpose(1, 2)
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    found: Tensor = wide if matrices.shape[1] <= matrices.shape[2] else wide.transpose(1, 2)
    return found
