"""Texts as sets of shingles: runs of `n` words, or of `n` characters.

Shingles are compared by hashes of 63 bits, the same in every process: of ten million distinct shingles, no two share one but for
a chance of 1 in 180 000.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import Any

import numpy as np
import rensa
from scipy.sparse import csr_array

from embell.engine.normalise import normalise
from embell.errors import UsageError

Array = np.ndarray[Any, Any]

_SEED = 1
_BITS = 2**63 - 1
_HASHED = 2**16
"""Tokens after which those gathered so far are made shingles of."""
_REMEMBERED = 2**20
"""Words whose hashes are held."""
_ELEMENTS = 2**23
"""Shingles of pairs in work at a time."""

# Scripts written without spaces between words (Unicode Standard Annex 14, classes SA and ID, but not Hangul, which has spaces).
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA980, 0xA9DF),  # Javanese
    (0xAA60, 0xAADF),  # Burmese, Tai Viet
    (0xF900, 0xFAFF),
    (0x1B000, 0x1B16F),
    (0x20000, 0x323AF),
)
_LAST_LETTER = 0x323AF


@dataclass(frozen=True)
class Shingles:
    """What a text is a set of: runs of `size` words, or of `size` characters, of the normalised text.

    A word is a run of letters, digits, marks and underscores. Of scripts without spaces, each two neighbouring characters are a word
    (as in Lucene's CJKBigramFilter). A text with fewer words or characters than `size` has one shingle, all of it; so has one
    without words, such as a line of dashes; an empty one has none.
    """

    kind: str = "words"
    size: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("words", "characters"):
            raise UsageError(f"shingles are of words or of characters, not of {self.kind!r}")
        if self.size < 1:
            raise UsageError(f"a shingle has at least 1 of the {self.kind}, not {self.size}")

    def hashes(self, text: str) -> Array:
        """The set of the text's shingles: int64, ascending, none negative."""
        hashes: Array = LexicalSets.of([text], self).hashes
        return hashes


@dataclass(frozen=True)
class LexicalSets:
    """The shingle sets of texts: that of text i is `hashes[starts[i] : starts[i + 1]]`.

    `starts` is int64 (n + 1,); `hashes` is int64, ascending and distinct within a text, and none is negative.
    """

    starts: Array
    hashes: Array

    @classmethod
    def of(cls, texts: Iterable[str], shingles: Shingles | None = None) -> LexicalSets:
        """The sets of these texts, which are read once."""
        parts, counts = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
        for tokens, lengths in _tokens(texts, (shingles or Shingles()).kind):
            values, sizes = _distinct(*_shingled(tokens, lengths, (shingles or Shingles()).size))
            parts.append(values)
            counts.append(sizes)
        return cls(np.cumsum(np.concatenate(counts)), np.concatenate(parts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of_texts(self, chosen: Array) -> LexicalSets:
        """The sets of the texts at these positions, ascending."""
        sizes = self.sizes[chosen]
        hashes = self.hashes[np.repeat(self.starts[chosen], sizes) + within(sizes)]
        return LexicalSets(np.concatenate([[0], np.cumsum(sizes)]), hashes)

    @cached_property
    def sizes(self) -> Array:
        """How many shingles each text has, int64 (n,)."""
        return np.diff(self.starts)

    @cached_property
    def _matrix(self) -> Any:
        """A row a text, a column a hash: the columns are never laid out."""
        return csr_array((np.ones(len(self.hashes), bool), self.hashes, self.starts), shape=(len(self), _BITS))

    def shared(self, one: Array, other: Array) -> Array:
        """How many shingles the texts at these positions have in common, int64 (m,)."""
        counts = np.empty(len(one), np.int64)
        ends = np.cumsum(self.sizes[one] + self.sizes[other])
        for begin, end in spans(ends, _ELEMENTS):
            both = self._matrix[one[begin:end]].multiply(self._matrix[other[begin:end]])
            counts[begin:end] = np.diff(both.indptr)
        return counts

    def at_most_shared(self, one: Array, other: Array) -> Array:
        """More than or as many as `shared`, int64 (m,), in much less time: what is not in a bitmap is not in the set."""
        left, right = self._bitmaps[one], self._bitmaps[other]
        bounds: Array = np.minimum(
            self.sizes[one] - np.bitwise_count(left & ~right), self.sizes[other] - np.bitwise_count(right & ~left)
        )
        return bounds

    @cached_property
    def _bitmaps(self) -> Array:
        """A bit for each of 64 classes of shingles that a text has one of, uint64 (n,)."""
        bits = np.uint64(1) << (self.hashes.view(np.uint64) & np.uint64(63))
        maps = np.zeros(len(self), np.uint64)
        filled = np.flatnonzero(self.sizes)
        if len(filled):
            maps[filled] = np.bitwise_or.reduceat(bits, self.starts[filled])
        return maps

    def jaccard(self, one: Array, other: Array) -> Array:
        """|A∩B| / |A∪B| of the texts at these positions, float64 (m,); 0 where both are empty."""
        return jaccard(self.shared(one, other), self.sizes[one], self.sizes[other])

    def containment(self, one: Array, other: Array) -> Array:
        """|A∩B| / min(|A|, |B|) of the texts at these positions, float64 (m,); 0 where one is empty."""
        return containment(self.shared(one, other), self.sizes[one], self.sizes[other])

    def signatures(self, permutations: int, begin: int = 0, end: int | None = None) -> Array:
        """MinHash signatures of the texts from `begin` to `end`: uint32 (m, permutations), the same in every process."""
        starts = self.starts[begin : (len(self) if end is None else end) + 1]
        hashes = self.hashes[starts[0] : starts[-1]].view(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, (starts - starts[0]).astype(np.uint64), permutations, _SEED
        )
        flat = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint32, (len(starts) - 1) * permutations)
        return np.reshape(flat, (-1, permutations))


def jaccard(shared: Array, one: Array, other: Array) -> Array:
    """The score of sets of these sizes."""
    scores: Array = shared / np.maximum(one + other - shared, 1)
    return scores


def containment(shared: Array, one: Array, other: Array) -> Array:
    """The score of sets of these sizes."""
    scores: Array = shared / np.maximum(np.minimum(one, other), 1)
    return scores


class _Hashes(dict[str, int]):
    """Words to their hashes, those met of late."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        value = self[word] = _hash(word)
        return value


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") & _BITS


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What matches a word, or else a run of a script without spaces; and what matches the latter.

    Python's `\\w` lacks the vowel signs of Indic scripts, at which it would cut words, hence a class of our own.
    """
    unspaced = np.zeros(_LAST_LETTER + 1, bool)
    for begin, end in _UNSPACED:
        unspaced[begin : end + 1] = True
    word = np.zeros(_LAST_LETTER + 1, bool)
    for code in range(_LAST_LETTER + 1):
        character = chr(code)
        word[code] = character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
    spaced, run = _ranges(word & ~unspaced), _ranges(word & unspaced)
    return re.compile(f"[{spaced}]+|[{run}]+"), re.compile(f"[{run}]")


def _ranges(members: Array) -> str:
    edges = np.flatnonzero(np.diff(members, prepend=False, append=False))
    return "".join(f"\\U{begin:08x}-\\U{end - 1:08x}" for begin, end in edges.reshape(-1, 2))


_ASCII_WORD = re.compile(r"\w+", re.ASCII)


def _words(text: str) -> list[str]:
    if text.isascii():
        return _ASCII_WORD.findall(text)
    either, unspaced = _patterns()
    found = either.findall(text)
    if not unspaced.search(text):
        return found
    words = []
    for run in found:
        if unspaced.match(run) and len(run) > 2:
            words += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            words.append(run)
    return words


def _tokens(texts: Iterable[str], kind: str) -> Iterator[tuple[Array, Array]]:
    """The hashed words or characters of some texts at a time, uint64, and how many each has, int64."""
    known = _Hashes()
    values: list[int] = []
    characters: list[str] = []
    lengths: list[int] = []
    gathered = 0

    def part() -> tuple[Array, Array]:
        if kind == "words":
            hashes = np.array(values, np.int64).view(np.uint64)
        else:
            hashes = _mixed(np.frombuffer("".join(characters).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64))
        return hashes, np.array(lengths, np.int64)

    for text in texts:
        plain = normalise(text)
        if kind == "characters":
            characters.append(plain)
            lengths.append(len(plain))
        elif words := _words(plain):
            values += map(known.__getitem__, words)
            lengths.append(len(words))
        else:
            values += [_hash(plain)] if plain else []
            lengths.append(1 if plain else 0)
        gathered += lengths[-1] + 1
        if gathered >= _HASHED:
            yield part()
            values, characters, lengths, gathered = [], [], [], 0
    if lengths:
        yield part()


def _mixed(values: Array) -> Array:
    """SplitMix64's finaliser: every bit of each uint64 changes every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values = values ^ (values >> np.uint64(31))
    return values


def chained(first: Array, then: Array) -> Array:
    """A hash of two hashes, in their order."""
    return _mixed(first * np.uint64(0x9E3779B97F4A7C15) + then + np.uint64(1))


def _shingled(tokens: Array, lengths: Array, size: int) -> tuple[Array, Array]:
    """The hashes of each text's runs of `size` tokens, int64 and none negative, and how many there are of each."""
    counts = np.where(lengths > 0, np.maximum(lengths - size + 1, 1), 0)
    begins = np.repeat(np.cumsum(lengths) - lengths, counts) + within(counts)
    widths = np.repeat(np.minimum(lengths, size), counts)
    values = tokens[begins]
    for place in range(1, size):
        more = np.flatnonzero(widths > place)
        values[more] = chained(values[more], tokens[begins[more] + place])
    return (values & np.uint64(_BITS)).view(np.int64), counts


def _distinct(values: Array, counts: Array) -> tuple[Array, Array]:
    """The values of each text in order and without repetitions, and how many are left."""
    rows = np.repeat(np.arange(len(counts)), counts)
    values = values[np.lexsort((values, rows))]
    new = np.ones(len(values), bool)
    new[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
    return values[new], np.bincount(rows[new], minlength=len(counts))


def within(counts: Array) -> Array:
    """0 to count - 1 for each count, one after the other."""
    places: Array = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def spans(ends: Array, size: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover all rows, each of at most `size`, or of one row, when `ends` are the sums of the sizes of rows so far."""
    begin, done = 0, 0
    while begin < len(ends):
        end = max(begin + 1, int(np.searchsorted(ends, done + size, "right")))
        yield begin, end
        begin, done = end, int(ends[end - 1])
