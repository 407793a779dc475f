"""What decides a vector: the EncoderSpec, saved as `embell.json` with a model and in each collection."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from embell.errors import EncoderError

POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides the vector of a text.

    `start_layer` is the first bidirectional layer, counted from 0; None means a causal model.
    Prompts are templates with `{text}` in them. `dtype` and `backbone` are recorded but do not
    decide whether vectors may meet: bf16 and float32 agree to cosine 0.9999, and the weights are
    known by their `fingerprint`, not by where they lie.
    """

    backbone: str
    revision: str | None
    fingerprint: str
    layers: int
    start_layer: int | None
    pooling: str
    query_prompt: str
    document_prompt: str
    max_length: int
    dim: int
    dtype: str

    def differences(self, other: EncoderSpec) -> list[str]:
        """The names of the fields that keep vectors of the two encoders from meeting."""
        free = ("backbone", "revision", "dtype")
        return [f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != getattr(other, f.name)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> EncoderSpec:
        """The spec written as `values`.

        Raises EncoderError for a missing or an unknown key, naming `where` it stands.
        """
        known = [f.name for f in fields(cls)]
        check_keys(values, known, where)
        missing = [name for name in known if name not in values]
        if missing:
            raise EncoderError(f"{where}: {missing[0]} is missing")
        return cls(**values)


@dataclass(frozen=True)
class ModelSettings:
    """The part of a spec that a model's own files do not record: the content of `embell.json`."""

    start_layer: int | None = -1
    pooling: str = "mean"
    query_prompt: str = "{text}"
    document_prompt: str = "{text}"
    max_length: int = 512

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
        try:
            values = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise EncoderError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(values, dict) or values.pop("format", None) != 1:
            raise EncoderError(f"{path}: not a format that this version of embell reads (1)")
        check_keys(values, [f.name for f in fields(cls)], str(path))
        return cls(**values)


def check_keys(values: dict[str, Any], known: list[str], where: str) -> None:
    """Refuse a key that is not known, with the nearest one that is."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise EncoderError(
                f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}")
            )
