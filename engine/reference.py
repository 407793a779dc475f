"""The reference path: a model as transformers computes it, which the fast path is tested against."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOADING = threading.Lock()


class Reference:
    """The model and its tokenizer as transformers has them, loaded when they are first asked for.

    `taken` and `tokenizer_taken` say that they were handed out: whoever has them may change them, so nothing else may stand
    for them any more.
    """

    def __init__(self, network: Callable[[], nn.Module], tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._load, self._read = network, tokenizer
        self._network: nn.Module | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.taken = False
        self.tokenizer_taken = False
        self.unchanged: Callable[[], None] = lambda: None
        """Raises EncoderError if the files are no longer those that the encoder was made from."""

    def network(self) -> nn.Module:
        with _LOADING:
            if self._network is None:
                self.unchanged()
                self._network = self._load()
            return self._network

    def tokenizer(self) -> PreTrainedTokenizerBase:
        with _LOADING:
            if self._tokenizer is None:
                self.unchanged()
                self._tokenizer = self._read()
            return self._tokenizer
