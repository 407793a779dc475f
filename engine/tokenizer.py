"""A tokenizer straight from its files, for models whose files say all that transformers would make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer

from embell.engine.spec import read_json
from embell.errors import EncoderError

_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # those that take tokenizer.json as it is
_NAMED = ("bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token", "unk_token")
_NO_MATTER = ("backend", "clean_up_tokenization_spaces", "padding_side", "tokenizer_class")
_MORE = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja")


class TextTokenizer(Protocol):
    """What embell reads of a tokenizer: transformers' fast tokenizers have it, and so has `FileTokenizer`."""

    truncation_side: str
    model_max_length: int

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]: ...

    @property
    def backend_tokenizer(self) -> Tokenizer: ...

    @property
    def pad_token_id(self) -> int | None: ...

    def get_vocab(self) -> dict[str, int]: ...

    def __len__(self) -> int: ...


class FileTokenizer:
    """A `TextTokenizer` from tokenizer.json and tokenizer_config.json alone."""

    def __init__(self, backend: Tokenizer, special: dict[str, int], longest: int, truncation_side: str) -> None:
        self.backend_tokenizer = backend
        self.pad_token_id = special.get("pad_token")
        self.all_special_ids = sorted(set(special.values()))
        self.added_tokens_decoder: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self.model_max_length = longest
        self.truncation_side = truncation_side

    def get_vocab(self) -> dict[str, int]:
        """Tokens and their ids, added ones included."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def __len__(self) -> int:
        """The number of tokens, added ones included."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))


def read_tokenizer(directory: Path) -> FileTokenizer | None:
    """The tokenizer of a model directory, or None if its files leave something to transformers."""
    if any((directory / name).exists() for name in _MORE):
        return None
    try:
        config = read_json(directory / "tokenizer_config.json")
        if config.get("tokenizer_class") not in _CLASSES or read_json(directory / "config.json").get("model_type") != "llama":
            return None  # for some other models transformers corrects the files
        backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except EncoderError:
        return None
    except Exception:  # whatever the Rust side raises for a damaged file: transformers' path says what is wrong
        return None
    added = {token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    special: dict[str, int] = {}
    longest: Any = int(1e30)
    side: Any = "right" if backend.truncation is None else backend.truncation["direction"]
    for name, value in config.items():
        if name in _NAMED and (value is None or (isinstance(value, str) and value in added)):
            special.update({} if value is None else {name: added[value]})
        elif name == "model_max_length" and (type(value) is int or (type(value) is float and value >= 2**63)):
            longest = int(value)  # "no limit" is a whole number beyond 64 bits
        elif name == "truncation_side" and value in ("left", "right"):
            side = value
        elif name not in _NO_MATTER:
            return None
    if backend.post_processor is None or (backend.padding is not None and "pad_token" not in config):
        return None  # transformers then makes one, or takes the other
    return FileTokenizer(backend, special, longest, side)
