"""Token Prepending: a placeholder before the text is handed the last token's state in some early layers.

All tokens of the text then know a summary of the whole text, though the model is causal (arXiv 2412.11556, section 3).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from embell.engine import bellm
from embell.errors import EncoderError


class TokenPrepending:
    """Before each layer from `first` up to, not including, `end`, the placeholder's state becomes the last token's.

    Before the first layer it gets a random state, the same in every run: the method does not depend on it. Use
    `at` around a forward pass. Raises EncoderError if the layers do not fit the model.
    """

    def __init__(self, model: nn.Module, first: int, end: int) -> None:
        layers = bellm.decoder_layers(model)
        if end > len(layers):
            raise EncoderError(f"token_prepending ends at layer {end}, but the model has {len(layers)} layers")
        self._places = threading.local()  # threads that share a model have a batch each
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        self._initial = torch.randn(weight.shape[1], generator=generator) * float(weight.detach().float().std())
        for index, layer in enumerate(layers):
            if index == 0:
                layer.register_forward_pre_hook(self._begin, with_kwargs=True)
            if first <= index < end:
                layer.register_forward_pre_hook(self._hand_on, with_kwargs=True)

    @contextlib.contextmanager
    def at(self, placeholder: Tensor, last: Tensor) -> Iterator[None]:
        """Columns of the placeholder and of the last real token, `(n,)` each, for the forward passes inside."""
        self._places.now = (placeholder, last)
        try:
            yield
        finally:
            del self._places.now

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._replaced(args, kwargs, lambda states, last: self._initial.to(states).expand(len(states), -1))

    def _hand_on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._replaced(args, kwargs, lambda states, last: states[torch.arange(len(states), device=states.device), last])

    def _replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        if not hasattr(self._places, "now"):  # a forward pass without a placeholder: the load-time probe
            return None
        placeholder, last = self._places.now
        states = args[0] if args else kwargs["hidden_states"]
        rows = torch.arange(len(states), device=states.device)
        # a new tensor: writing in place would change the hidden states that were already recorded
        new = states.index_put((rows, placeholder), value(states, last))
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})
