"""transformers' Trainer for students: batches of token rows, gradients in chunks, checkpoints of what is trained alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from embell.engine.tokens import TokenRow
from embell.indexers.workers import each_on_a_core
from embell.training.batches import Batches, Examples
from embell.training.progress import Progress

CORE_TOKENS = 1000
"""Tokens of a batch for each core, from which on the cores run parts of it side by side."""

COMPLETED = "completed.json"
"""In a checkpoint: the sizes of its files, written when it was whole."""

Loss = Callable[[list[Tensor], dict[int, list[Tensor]], dict[str, Tensor]], Tensor]
"""The loss of a batch from its vectors, a tensor a column: at full depth, by smaller depth, and the batch's targets."""


class StudentTrainer(Trainer):
    """The Trainer with batches of token rows, chunked gradients, and checkpoints of what is trained alone."""

    def __init__(self, batches: Batches, loss: Loss, chunk: int | None, report: Progress, **options: Any) -> None:
        self._loss, self._chunk, self._report, self._batches = loss, chunk, report, batches
        super().__init__(train_dataset=batches, **options)
        self.model_accepts_loss_kwargs = False
        self._module: nn.Module = options["model"]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self._batches)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        examples: Examples = inputs["examples"]
        rows = examples.rows
        sizes = [len(column) for column in examples.columns]
        share = 1 / self.current_gradient_accumulation_steps
        processes = self.args.world_size  # all of which are at batches of about this size
        self._report.count(processes * len(rows), processes * sum(len(row.ids) for row in rows))
        targets = {name: tensor.to(self.args.device) for name, tensor in examples.targets.items()}

        def loss_of(deep: Tensor, shallow: dict[int, Tensor]) -> Tensor:
            by_depth = {depth: list(vectors.split(sizes)) for depth, vectors in shallow.items()}
            return self._loss(list(deep.split(sizes)), by_depth, targets)

        if self._chunk is None and (parts := self._parts(model, rows)):
            return self._each_on_a_core(model, rows, parts, loss_of, share)
        if self._chunk is None or self._chunk >= len(rows):
            with self.compute_loss_context_manager():
                found = model(rows)
            loss = loss_of(*found)
            self.accelerator.backward(loss * share)
            return loss.detach() * share
        return self._chunked(model, rows, loss_of, share)

    def _parts(self, model: nn.Module, rows: list[TokenRow]) -> list[list[int]]:
        """Numbers of the rows that each core is to run, about as many tokens each; none where the batch is better run as a whole.

        A product over a thousand tokens keeps one core busy, and elementwise work and attention gain nothing from a second one.
        Dropout draws from a generator that all threads would share.
        """
        cores = torch.get_num_threads()
        tokens = sum(len(row.ids) for row in rows)
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
        packed = model is self._module and getattr(
            model, "packed", False
        )  # others are watched through hooks, which threads would mix
        if self.args.device.type != "cpu" or not packed or cores < 2 or drops or tokens < cores * CORE_TOKENS:
            return []
        parts: list[list[int]] = [[] for _ in range(cores)]
        loads = [0] * cores
        for at in sorted(range(len(rows)), key=lambda at: -len(rows[at].ids)):
            least = loads.index(min(loads))
            parts[least].append(at)
            loads[least] += len(rows[at].ids)
        return parts if all(parts) else []

    def _each_on_a_core(
        self,
        model: nn.Module,
        rows: list[TokenRow],
        parts: list[list[int]],
        loss_of: Callable[[Tensor, dict[int, Tensor]], Tensor],
        share: float,
    ) -> Tensor:
        """Gradients of a batch whose parts run side by side; the loss is that of the whole batch.

        The parts' gradients are added in their order, not as they come: the same sums in every run.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        back = torch.empty(len(rows), dtype=torch.long)
        back[torch.tensor([at for part in parts for at in part])] = torch.arange(len(rows))

        def run(part: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
            with self.compute_loss_context_manager():
                found: tuple[Tensor, dict[int, Tensor]] = model([rows[at] for at in part])
            return found

        found = [result for _, result in each_on_a_core(run, parts)]
        ends = [[vectors, *by_depth.values()] for vectors, by_depth in found]
        leaves = [[one.detach().requires_grad_() for one in listed] for listed in ends]
        whole = [torch.cat(listed)[back] for listed in zip(*leaves, strict=True)]
        loss = loss_of(whole[0], dict(zip(found[0][1], whole[1:], strict=True))) * share
        loss.backward()

        def gradients(at: int) -> tuple[Tensor | None, ...]:
            pairs = [(end, leaf.grad) for end, leaf in zip(ends[at], leaves[at], strict=True) if leaf.grad is not None]
            return torch.autograd.grad([end for end, _ in pairs], trained, [grad for _, grad in pairs], allow_unused=True)

        for _, flowing in each_on_a_core(gradients, range(len(parts))):
            for parameter, gradient in zip(trained, flowing, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss.detach()

    def _chunked(
        self, model: nn.Module, rows: list[TokenRow], loss_of: Callable[[Tensor, dict[int, Tensor]], Tensor], share: float
    ) -> Tensor:
        """Gradients of a batch that memory could not hold at once (GradCache).

        All vectors are computed without a graph, then the loss and its gradient with respect to the vectors, then each
        chunk once more with a graph that this gradient flows into. Dropout is that of the first time.
        """
        assert self._chunk is not None
        chunks = [rows[begin : begin + self._chunk] for begin in range(0, len(rows), self._chunk)]
        states, found = [], []
        with torch.no_grad(), self.compute_loss_context_manager():
            for chunk in chunks:
                states.append(_random_state())
                found.append(model(chunk))
        deep = torch.cat([vectors for vectors, _ in found]).requires_grad_()
        shallow = {depth: torch.cat([at[depth] for _, at in found]).requires_grad_() for depth in found[0][1]}
        loss = loss_of(deep, shallow) * share
        loss.backward()
        begin = 0
        after = _random_state()
        for at, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            _set_random_state(state)
            with self.compute_loss_context_manager():
                vectors, by_depth = model(chunk)
            here = slice(begin, begin + len(chunk))
            parts = [(vectors, deep)] + [(by_depth[depth], shallow[depth]) for depth in shallow]
            flowing = sum((one * whole.grad[here]).sum() for one, whole in parts if whole.grad is not None)
            last = at == len(chunks) - 1
            waiting = getattr(model, "no_sync", None)  # of several cards: gradients are exchanged once, with the last chunk
            with waiting() if waiting is not None and not last else _nothing():
                self.accelerator.backward(flowing)
            begin += len(chunk)
        _set_random_state(after)
        return loss.detach()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            target = Path(output_dir or str(self.args.output_dir))
            target.mkdir(parents=True, exist_ok=True)
            save_file(_trained(self._module), target / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(stored[name])


class Completed(TrainerCallback):
    """Puts the sizes of its files into a checkpoint when the Trainer has written all of it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sizes = {path.name: path.stat().st_size for path in folder.iterdir() if not path.name.startswith("rng_state_")}
            (folder / COMPLETED).write_bytes(orjson.dumps(sizes))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
