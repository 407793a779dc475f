"""Vectors on their way into a file: rows that are safe on disk, and a record of what they are and how many.

FILE.part/
  record.json   what the rows are made of, and how many are safe; written last, by one rename
  vectors       an .npy file whose header is written at the end
  ids           an id a line, as JSON
  whole         the output, while it is put together
  lock          held by the process that writes
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import filelock
import numpy as np
import orjson

from embell.cli.console import counted
from embell.cli.outputs import whole_file
from embell.cli.vector_files import npy_header, write_vector_file
from embell.engine.spec import EncoderSpec
from embell.errors import EmbellError, EncoderError, UsageError

if TYPE_CHECKING:
    from embell.document import Document
    from embell.engine.encoder import EncodeReport, Vectors

FORMAT = 1
RECORD, VECTORS, IDS, WHOLE, LOCK = "record.json", "vectors", "ids", "whole", "lock"


@dataclass(frozen=True)
class Record:
    """The content of `record.json`. `digest` is the hash of the ids and texts of the rows; `ids_bytes` the size of `ids`."""

    encoder: EncoderSpec
    kind: str
    id_field: str | None
    text_fields: tuple[str, ...]
    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    chunked: int = 0
    ids_bytes: int = 0
    digest: str = ""

    def differences(self, now: Record) -> list[str]:
        """What keeps rows made as `now` says from being put behind these, a phrase each."""
        names = self.encoder.differences(now.encoder)
        if self.encoder.dtype != now.encoder.dtype:
            names.append("dtype")
        if self.truncated and now.encoder.on_long == "error" and "on_long" not in names:
            names.append("on_long")  # some were cut, and none is to be now
        pairs = [(name, getattr(self.encoder, name), getattr(now.encoder, name)) for name in names if name != "fingerprint"]
        pairs += [(name, getattr(self, name), getattr(now, name)) for name in ("kind", "id_field", "text_fields")]
        said = [f"{name.replace('_', '-')} was {_shown(was)}, is {_shown(new)}" for name, was, new in pairs if was != new]
        if "fingerprint" in names:
            said.insert(0, f"the model was {self.encoder.backbone}, is {now.encoder.backbone} with other weights")
        return said

    def write(self, folder: Path) -> None:
        """Put the record in place by one rename, after its bytes have reached the disk."""
        part = folder / f"{RECORD}.part"
        with part.open("wb") as file:
            file.write(orjson.dumps({"format": FORMAT, **asdict(self)}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / RECORD)

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record in a folder; None if there is none yet. Raises EmbellError if it cannot be used."""
        path = folder / RECORD
        if not path.exists():
            return None
        try:
            values = orjson.loads(path.read_bytes())
            if values.pop("format") == FORMAT:
                values["encoder"] = EncoderSpec.from_dict(values["encoder"], str(path))
                values["text_fields"] = tuple(values["text_fields"])
                return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError, EncoderError) as error:
            raise EmbellError(f"{path}: damaged; begin anew with --restart") from error
        raise EmbellError(f"{path}: written by another version of embell; go on with that one, or begin anew with --restart")


def _shown(value: Any) -> str:
    """A setting as a message shows it."""
    if value in (None, ()):
        return "not given"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Unfinished:
    """The rows that are there, and more of them. Made by `unfinished`, used after `begin`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: Record
        self._hash = hashlib.blake2b(digest_size=16)
        self._files: dict[str, IO[bytes]] = {}

    @property
    def rows(self) -> int:
        """How many are safe."""
        return self.record.rows

    def begin(self, new: Record, restart: bool) -> None:
        """Go on from what is there, or begin with nothing.

        Raises UsageError if what is there was made otherwise, EmbellError if it is damaged.
        """
        found = None if restart else Record.read(self.folder)
        if found is None:
            self._empty()
        elif different := found.differences(new):
            raise UsageError(
                f"{self.folder}: holds {counted(found.rows, 'row')} of another run: {'; '.join(different)}; "
                "give the same options again, or begin anew with --restart"
            )
        self.record = new if found is None else replace(found, encoder=new.encoder)
        header = len(npy_header(0, new.encoder.dim))
        for name, size in {VECTORS: header + 4 * new.encoder.dim * self.rows, IDS: self.record.ids_bytes}.items():
            path = self.folder / name
            if found is not None and (not path.is_file() or path.stat().st_size < size):
                raise EmbellError(f"{path}: damaged, it lacks rows that {RECORD} counts; begin anew with --restart")
            (self.folder / WHOLE).unlink(missing_ok=True)
            if found is not None and path.stat().st_nlink > 1:
                # A run that was killed as it finished: the output is this very file, and must not change with it.
                shutil.copyfile(path, self.folder / WHOLE)
                (self.folder / WHOLE).replace(path)
            file = self._files[name] = path.open("wb" if found is None else "r+b")
            file.truncate(size)  # what is behind was written by a run that did not come to count it
            file.seek(size)

    def skip(self, documents: Iterator[Document]) -> bool:
        """Read past the documents whose rows are there; whether they are the same as then."""
        count = 0
        for document in islice(documents, self.rows):
            self._take(document)
            count += 1
        return count == self.rows and (not count or self._hash.hexdigest() == self.record.digest)

    def append(self, documents: Sequence[Document], vectors: Vectors) -> None:
        """Write the rows of these documents, which come next."""
        for document in documents:
            self._take(document)
        # An id may hold what is no text in UTF-8; it is shown by its number, as in paths.
        ids = (document.id.encode("utf-8", "backslashreplace").decode() for document in documents)
        self._files[IDS].write(b"".join(orjson.dumps(name) + b"\n" for name in ids))
        self._files[VECTORS].write(np.ascontiguousarray(vectors, "<f4").tobytes())

    def commit(self, rows: int, counts: EncodeReport) -> None:
        """Make `rows` more of them safe; `counts` are theirs."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        done = self.record
        self.record = replace(
            done,
            rows=done.rows + rows,
            tokens=done.tokens + counts.tokens,
            truncated=done.truncated + counts.truncated,
            chunked=done.chunked + counts.chunked,
            ids_bytes=self._files[IDS].tell(),
            digest=self._hash.hexdigest(),
        )
        self.record.write(self.folder)

    def finish(self, target: Path, suffix: str, ids_file: str | None) -> None:
        """Put the output, and the ids if they are wanted, under their names, and remove the folder.

        Killed within, the next run finds everything in the folder still, and does this again.
        """
        spec = self.record.encoder
        file = self._files[VECTORS]
        file.seek(0)
        file.write(npy_header(self.rows, spec.dim))
        self.close()
        metadata = {"embell": orjson.dumps(spec.to_dict()), "embell.kind": self.record.kind.encode()}
        write_vector_file(suffix, self.folder / WHOLE, self.folder / VECTORS, self._ids(), spec.dim, metadata)
        if ids_file is not None:
            with whole_file(ids_file) as out:
                for name in self._ids():
                    out.write(name.replace("\n", " ") + "\n")
        (self.folder / WHOLE).replace(target)
        self.remove()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def remove(self) -> None:
        """Remove the folder."""
        self._empty()
        (self.folder / LOCK).unlink()
        self.folder.rmdir()

    def _empty(self) -> None:
        # The record goes first: without it the rest counts for nothing.
        for name in (RECORD, f"{RECORD}.part", WHOLE, VECTORS, IDS):
            (self.folder / name).unlink(missing_ok=True)

    def _take(self, document: Document) -> None:
        for part in (document.id, document.text):
            content = part.encode("utf-8", "surrogatepass")
            self._hash.update(len(content).to_bytes(8, "little") + content)

    def _ids(self) -> Iterator[str]:
        with (self.folder / IDS).open("rb") as file:
            yield from map(orjson.loads, file)


@contextmanager
def unfinished(target: Path) -> Iterator[Unfinished]:
    """The folder `target`.part, for this process alone. After an error it stays if it holds rows that are safe.

    Raises EmbellError if another process writes there, UsageError if it is something else's.
    """
    folder = target.with_name(f"{target.name}.part")
    ours = {RECORD, f"{RECORD}.part", VECTORS, IDS, WHOLE, LOCK}
    if (folder.exists() and not folder.is_dir()) or (folder.is_dir() and not ours.issuperset(os.listdir(folder))):
        raise UsageError(f"{folder}: is in the way, rows that are finished are kept there; move it, or name another output")
    folder.mkdir(exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise EmbellError(f"{target}: another process is writing it; let it finish, or name another output") from None
    part = Unfinished(folder)
    try:
        yield part
    except BaseException:
        part.close()
        if (folder / LOCK).exists() and not (folder / RECORD).exists():
            part.remove()
        raise
    finally:
        lock.release()
