"""The reference path: a model as transformers computes it, which the fast path is tested against."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reference:
    """The model and its tokenizer as transformers has them, loaded when they are first asked for.

    `taken` says that the network was handed out: whoever has it may change it, so nothing else may stand for it any more.
    """

    def __init__(self, network: Callable[[], nn.Module], tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._load, self._read = network, tokenizer
        self._network: nn.Module | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lock = threading.Lock()
        self.taken = False

    def network(self) -> nn.Module:
        with self._lock:
            if self._network is None:
                self._network = self._load()
            return self._network

    def tokenizer(self) -> PreTrainedTokenizerBase:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._read()
            return self._tokenizer
