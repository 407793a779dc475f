"""The manifest of a collection: what it is made with and how far it has come. Written last, atomically."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson

from embell.engine.spec import EncoderSpec, check_keys
from embell.errors import CollectionError, UsageError

FORMAT = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    `encoder` is None if the vectors were given and no model is known for queries; `own_vectors` says
    that they were given. `chunk` is the chunk size in tokens, None if documents are stored whole.
    `generation` is the number of the current index, 0 if there is none; `next_key` the first key that
    was never used. `recall` is the measured recall@10 of the index, 1.0 where search is exact
    (also while a FAISS index has too few rows to be trained on), None if it was not measured. `approximate` says whether the
    current generation holds an index other than the exact one, `target` is the recall@10 that was asked for, and `tuned`
    what was chosen and certified for it (`engine/tuning.py`). `changed` names the keys whose metadata is newer than the index's copy of
    the documents, None if there is no such copy, or too much of it is old. `memory` is how many bytes an index "auto" may hold.
    `identity` is a random text that tells the collection from another one that is made in its place. `files` is what `intact.noted_files`
    says of the current generation.
    """

    encoder: EncoderSpec | None
    own_vectors: bool
    dim: int
    chunk: int | None
    index: str
    generation: int = 0
    rows: int = 0
    next_key: int = 0
    table_version: int = 0
    recall: float | None = None
    approximate: bool = False
    target: float | None = None
    tuned: dict[str, Any] | None = None
    changed: list[int] | None = None
    memory: int | None = None
    identity: str = ""
    files: dict[str, list[int]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of index that searches ask: that which "auto" chose, or "exact" where search is exact."""
        if not self.approximate:
            return "exact"
        return str(self.tuned["index"]) if self.index == "auto" and self.tuned else self.index

    def write(self, directory: Path) -> None:
        """Put the manifest in place by one rename, after its bytes have reached the disk."""
        content = {"format": FORMAT, **asdict(self)}
        part = directory / f"{FILE}.part"
        with part.open("wb") as file:
            file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())
        part.replace(directory / FILE)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a collection.

        Raises CollectionError if there is none, or if it is damaged or of a newer format.
        """
        path = directory / FILE
        if not directory.exists():
            raise CollectionError(f"{directory}: no such collection; make it with: embell index SOURCE --to {directory}")
        if not path.is_file():
            raise CollectionError(f"{directory}: not a collection, it has no {FILE}")
        try:
            values: Any = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise CollectionError(f"{path}: damaged ({error}); restore it, or index again into a new directory") from error
        if not isinstance(values, dict) or "format" not in values:
            raise CollectionError(f"{directory}: not a collection, its {FILE} is something else")
        if values.pop("format") != FORMAT:
            raise CollectionError(f"{path}: written by a newer embell; this one reads format {FORMAT}")
        names = [f.name for f in fields(cls)]
        check_keys(values, names, str(path))
        if "approximate" not in values:  # written before FAISS indices held turned rows: theirs are left alone, search is exact
            values.update(approximate=False, recall=1.0, target=None, tuned=None)
        # As written before there were such things.
        for name, value in (("changed", None), ("memory", None), ("identity", ""), ("files", {})):
            values.setdefault(name, value)
        if missing := [name for name in names if name not in values]:
            raise CollectionError(f"{path}: damaged, {missing[0]} is missing")
        encoder = values.pop("encoder")
        return cls(encoder=None if encoder is None else EncoderSpec.from_dict(encoder, str(path)), **values)


def same_identity(directory: Path, one: Manifest, other: Manifest) -> None:
    """Raises CollectionError if a collection is not the one that was opened."""
    if one.identity != other.identity:
        raise CollectionError(f"{directory}: deleted and made anew since it was opened here; open it again")


def check_promise(recall: float | None, memory: int | None) -> None:
    """Raises UsageError for a recall that cannot be promised, or a memory in bytes that nothing fits into."""
    if recall is not None and not 0 < recall < 1:
        raise UsageError(f"recall must lie between 0 and 1, not {recall}; for all of it use the index exact")
    if memory is not None and memory < 1:
        raise UsageError(f"the memory for an index must be at least 1 byte, not {memory}")
