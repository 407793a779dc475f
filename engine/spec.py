"""What decides a vector: the EncoderSpec, saved as `embell.json` with a model and in each collection."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import orjson

from embell.errors import EncoderError

Prompt = str | tuple[str, ...]

POOLINGS = ("mean", "last", "cls", "max", "weighted-mean", "mean-sqrt-length")
POOLED_TOKENS = ("all", "text", "after-prompt")
CLEANUPS = ("none", "period", "period-quotes")
ON_LONG = ("truncate", "chunk", "error")


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides the vector of a text.

    `layers` counts those that are kept, 0 for a static model. `start_layer` is the first layer that looks both
    ways, counted from 0; None means a causal model. The other fields are those of `ModelSettings`. `backbone`,
    `adapter`, `dtype` and `languages` are recorded but do not decide whether vectors may meet: bf16 and float32
    agree to cosine 0.9999, and the weights are known by their `fingerprint`, not by where they lie.
    """

    backbone: str
    revision: str | None
    fingerprint: str
    layers: int
    start_layer: int | None
    pooling: str
    query_prompt: Prompt
    document_prompt: Prompt
    max_length: int
    dim: int
    dtype: str
    pooled_tokens: str = "all"
    cleanup: str = "none"
    token_prepending: tuple[int, int] | None = None
    on_long: str = "truncate"
    languages: tuple[str, ...] = ()
    adapter: str | None = None
    adapter_revision: str | None = None

    def differences(self, other: EncoderSpec) -> list[str]:
        """The names of the fields that keep vectors of the two encoders from meeting."""
        free = ("backbone", "revision", "dtype", "languages", "adapter", "adapter_revision")
        one, two = (
            replace(spec, on_long="truncate") if spec.on_long == "error" else spec  # what it lets through is the same
            for spec in (self, other)
        )
        return [f.name for f in fields(self) if f.name not in free and getattr(one, f.name) != getattr(two, f.name)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> EncoderSpec:
        """The spec written as `values`.

        Raises EncoderError for a missing or an unknown key, naming `where` it stands.
        """
        check_keys(values, [f.name for f in fields(cls)], where)
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise EncoderError(f"{where}: {missing[0]} is missing")
        return cls(**{name: _tupled(value) for name, value in values.items()})


@dataclass(frozen=True)
class ModelSettings:
    """The part of a spec that a model's own files do not record: the content of `embell.json`.

    `start_layer` counts from 0, or from the end when negative; None leaves a decoder causal. `pooling` is one of
    `POOLINGS`, or several joined by "+" whose vectors are put side by side. `pooled_tokens` says which tokens it
    reads: "all", "text" (those of the text's last copy in the prompt), or "after-prompt" (as sentence-transformers
    counts them). A prompt is a template with `{text}` in it; several are averaged (MetaEOL); `{text}` twice is an
    echo; `<PST>` is the placeholder of token prepending, whose layers `token_prepending` gives as (first, end).
    `cleanup` puts the end of a sentence in order: "period" appends a full stop and makes one of a final question
    mark, "period-quotes" turns double quotes into single ones as well. `layers` keeps that many layers, `dim` that
    many components. `languages` are those that the model was trained on (ISO 639-1), empty if not known. `head`
    describes what follows pooling (see head.py).
    """

    start_layer: int | None = -1
    pooling: str = "mean"
    pooled_tokens: str = "all"
    query_prompt: Prompt = "{text}"
    document_prompt: Prompt = "{text}"
    cleanup: str = "none"
    token_prepending: tuple[int, int] | None = None
    max_length: int = 512
    on_long: str = "truncate"
    layers: int | None = None
    dim: int | None = None
    languages: tuple[str, ...] = ()
    head: tuple[dict[str, Any], ...] = ()

    FILE = "embell.json"

    def write(self, directory: Path) -> None:
        content = {"format": 1, **asdict(self)}
        (directory / self.FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    @classmethod
    def read(cls, directory: Path) -> ModelSettings | None:
        """The settings saved with a model; None if it has none.

        Raises EncoderError if the file is damaged, of a newer format, or holds an unknown key.
        """
        path = directory / cls.FILE
        if not path.is_file():
            return None
        values = read_json(path)
        if values.pop("format", None) != 1:
            raise EncoderError(f"{path}: not a format that this version of embell reads (1)")
        check_keys(values, [f.name for f in fields(cls)], str(path))
        settings = cls(**{name: _tupled(value) for name, value in values.items()})
        settings.check_types(f"{path}: ")
        return settings

    def check_types(self, where: str = "") -> None:
        """Raises EncoderError for a value of the wrong type; `where` begins the message."""
        for name, (what, fits) in _FIELDS.items():
            if not fits(getattr(self, name)):
                raise EncoderError(f"{where}{name} is {getattr(self, name)!r}, not {what}")

    def check(self) -> None:
        """Refuse settings that mean nothing or contradict each other, whatever the model.

        Raises EncoderError.
        """
        self.check_types()
        for pooling in self.pooling.split("+"):
            _one_of("pooling", pooling, POOLINGS)
        _one_of("pooled_tokens", self.pooled_tokens, POOLED_TOKENS)
        _one_of("cleanup", self.cleanup, CLEANUPS)
        _one_of("on_long", self.on_long, ON_LONG)
        if self.max_length < 1:
            raise EncoderError(f"max_length must be at least 1, not {self.max_length}")
        if self.dim is not None and self.dim < 1:
            raise EncoderError(f"dim must be at least 1, not {self.dim}")
        prompts = [prompt for given in (self.query_prompt, self.document_prompt) for prompt in all_prompts(given)]
        for prompt in prompts:
            if prompt.count("{text}") not in (1, 2):
                raise EncoderError(f"prompt {prompt!r} must contain {{text}} exactly once, or twice for an echo")
            if self.token_prepending is None and PLACEHOLDER in prompt:
                raise EncoderError(f"prompt {prompt!r} holds {PLACEHOLDER}, which only means something with token_prepending")
            if self.token_prepending is not None and prompt.count(PLACEHOLDER) != 1:
                raise EncoderError(
                    f"token prepending needs {PLACEHOLDER} once in each prompt, before {{text}}; {prompt!r} has not"
                )
            if self.token_prepending is not None and prompt.index(PLACEHOLDER) > prompt.rindex("{text}"):
                raise EncoderError(f"prompt {prompt!r}: {PLACEHOLDER} must stand before {{text}}, whose tokens are to see it")
            after = prompt[prompt.rindex("{text}") + len("{text}") :]
            if after and self.pooling == "last" and self.pooled_tokens == "text":
                raise EncoderError(
                    f"last-token pooling over the text alone never reads the end of the prompt, {after!r}: "
                    "use pooled_tokens='all', or a prompt that ends in {text}"
                )
            if self.pooled_tokens == "after-prompt" and not prompt.endswith("{text}"):
                raise EncoderError(f"pooled_tokens='after-prompt' needs a prompt that ends in {{text}}, not {prompt!r}")
        if self.token_prepending is not None:
            if not 0 <= self.token_prepending[0] <= self.token_prepending[1]:
                raise EncoderError(
                    f"token_prepending is (first layer, end layer) with 0 <= first <= end, not {self.token_prepending}"
                )
            if any(prompt.count("{text}") == 2 for prompt in prompts):
                raise EncoderError(
                    "token prepending and an echo do the same work twice: each lets early tokens know of later ones; use one of them"
                )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, str) for one in value)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("pooling", "pooled_tokens", "cleanup", "on_long"), ("a word", lambda value: isinstance(value, str))),
    **dict.fromkeys(
        ("query_prompt", "document_prompt"),
        ("a template, or a list of them", lambda value: isinstance(value, str) or (value != () and _texts(value))),
    ),
    **dict.fromkeys(
        ("start_layer", "layers", "dim"), ("a whole number or nothing", lambda value: value is None or _whole(value))
    ),
    "max_length": ("a whole number", _whole),
    "languages": ("a list of language codes", _texts),
    "head": ("a list of layers", lambda value: isinstance(value, tuple) and all(isinstance(part, dict) for part in value)),
    "token_prepending": (
        "a pair of layers or nothing",
        lambda value: value is None or (isinstance(value, tuple) and len(value) == 2 and all(map(_whole, value))),
    ),
}
"""What each setting must be, in words and as a test."""

PLACEHOLDER = "<PST>"
"""Where the placeholder of token prepending stands in a prompt."""


def all_prompts(prompt: Prompt) -> tuple[str, ...]:
    """The templates of a prompt, one or several."""
    return (prompt,) if isinstance(prompt, str) else tuple(prompt)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises EncoderError if it is damaged or holds something else.
    """
    try:
        values = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise EncoderError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(values, dict):
        raise EncoderError(f"{path}: not a JSON object")
    return values


def check_keys(values: dict[str, Any], known: list[str], where: str) -> None:
    """Refuse a key that is not known, with the nearest one that is."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise EncoderError(
                f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}")
            )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, 1)
        raise EncoderError(
            f"unknown {name} {value!r}" + (f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}")
        )


def _tupled(value: Any) -> Any:
    """JSON has lists where the dataclasses have tuples."""
    return tuple(value) if isinstance(value, list) else value
