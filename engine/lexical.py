"""Near-duplicates by the shingles that two texts share.

A text is the set of its shingles: runs of `n` words, or of `n` characters. Two scores compare sets: *Jaccard*,
`|A∩B| / |A∪B|`, which is 1 for equal sets, and *containment*, `|A∩B| / min(|A|, |B|)`, which is 1 where one text is part of
another. Both are of the real sets; nothing that is yielded is an estimate.

- `lexical_pairs` looks for Jaccard among the candidates of MinHash with banding (Leskovec, Rajaraman, Ullman, *Mining of
  Massive Datasets*, sections 3.3 and 3.4). It finds a pair at the threshold with at least the probability asked for, a pair
  above it with a greater one.
- `contained_pairs` looks for containment by prefix filtering (Chaudhuri, Ganti, Kaushik, *A Primitive Operator for Similarity
  Joins in Data Cleaning*, 2006; Bayardo, Ma, Srikant, *Scaling Up All Pairs Similarity Search*, 2007). It finds every pair:
  MinHash would miss those of a short and a long text, for their Jaccard is small.

Shingles are compared by hashes of 63 bits, the same in every process: of ten million distinct shingles, no two share one but for
a chance of 1 in 180 000.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import rensa
from scipy.sparse import csr_array

from embell.engine.normalise import normalise
from embell.errors import UsageError

Array = np.ndarray[Any, Any]

PARTNERS = 1000
"""Earlier partners of one document that are listed as pairs; with more, only its links to the first few are."""
FEW = 32
"""Links that are listed of a document with more partners than that."""
PERMUTATIONS = 128
RECALL = 0.99
FEWEST = 5
"""Shingles of the smallest set that is looked for in others."""
_SEED = 1
_BITS = 2**63 - 1
_HASHED = 2**16
"""Tokens after which those gathered so far are made shingles of."""
_REMEMBERED = 2**20
"""Words whose hashes are held."""
_SIGNED = 1024
"""Rows that are signed together: their signatures come as Python integers, which should stay in the cache."""
_CODES = 2**21
"""Candidate pairs in work at a time."""
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
class Banding:
    """How signatures are cut: `bands` of them, each of `rows` values; texts that agree in a whole band are candidates."""

    bands: int
    rows: int

    def chance(self, jaccard: float) -> float:
        """The probability that two sets of this Jaccard become candidates: `1 - (1 - s^r)^b`."""
        alike = jaccard**self.rows
        return 1.0 if alike >= 1 else -math.expm1(self.bands * math.log1p(-alike))


def banding(threshold: float, permutations: int = PERMUTATIONS, recall: float = RECALL) -> Banding:
    """The bands with the most rows, hence the fewest false candidates, that find a pair at the threshold with at least `recall`.

    Of as many rows, the fewest bands that suffice. The probability is that of Leskovec, Rajaraman, Ullman, *Mining of Massive
    Datasets*, section 3.4.2: `1 - (1 - s^r)^b`; `bands * rows` is at most `permutations`.
    """
    _check(threshold)
    if not 0 < recall < 1:
        raise UsageError(f"recall must lie between 0 and 1, not {recall}")
    if permutations < 1:
        raise UsageError(f"permutations must be at least 1, not {permutations}")
    for rows in range(permutations, 0, -1):
        most = permutations // rows
        if Banding(most, rows).chance(threshold) >= recall:
            return next(found for bands in range(1, most + 1) if (found := Banding(bands, rows)).chance(threshold) >= recall)
    raise UsageError(f"{permutations} permutations cannot find pairs at {threshold} with a recall of {recall}: use more of them")


class Pairs(NamedTuple):
    """Pairs of positions and their scores, by the later and then the earlier of the two, and the positions that were capped."""

    later: Array
    earlier: Array
    scores: Array
    capped: Array


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
        hashes = self.hashes[np.repeat(self.starts[chosen], sizes) + _within(sizes)]
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
        for begin, end in _spans(ends, _ELEMENTS):
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
        return _jaccard(self.shared(one, other), self.sizes[one], self.sizes[other])

    def containment(self, one: Array, other: Array) -> Array:
        """|A∩B| / min(|A|, |B|) of the texts at these positions, float64 (m,); 0 where one is empty."""
        return _containment(self.shared(one, other), self.sizes[one], self.sizes[other])

    def signatures(self, permutations: int, begin: int = 0, end: int | None = None) -> Array:
        """MinHash signatures of the texts from `begin` to `end`: uint32 (m, permutations), the same in every process."""
        starts = self.starts[begin : (len(self) if end is None else end) + 1]
        hashes = self.hashes[starts[0] : starts[-1]].view(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, (starts - starts[0]).astype(np.uint64), permutations, _SEED
        )
        flat = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint32, (len(starts) - 1) * permutations)
        return np.reshape(flat, (-1, permutations))


def lexical_pairs(
    sets: LexicalSets,
    threshold: float,
    *,
    first_of_second: int | None = None,
    most: int = PARTNERS,
    few: int = FEW,
    permutations: int = PERMUTATIONS,
    recall: float = RECALL,
) -> Iterator[Pairs]:
    """The pairs whose Jaccard reaches the threshold, in parts; the later positions ascend, over all parts.

    With `first_of_second`, only pairs of a position before it and one from it on. A text without shingles has no partner.

    Of a text with more than `most` earlier partners only the pairs with the earliest `few` are yielded, and it is named in `capped`.
    So is one that agrees with more than `most` earlier texts in a single band, for looking at them all would take as many
    comparisons as there are pairs: of each of its bands only the earliest `most / bands` are compared with it.
    """
    cut = banding(threshold, permutations, recall)
    lists = _banded(sets, cut, first_of_second)
    longest = np.zeros(len(sets), np.int64)
    for found in lists:
        np.maximum(longest, found.counts, out=longest)
    crowded = longest > most
    limits = np.where(crowded, max(1, most // cut.bands), len(sets))
    for begin, end in _spans(_work(lists, limits), _CODES):
        pairs = _reaching(sets, _candidates(lists, begin, end, limits), begin, threshold, _jaccard)
        yield from _capped(pairs, begin, end, most, few, crowded)


def contained_pairs(
    sets: LexicalSets,
    threshold: float,
    *,
    fewest: int = FEWEST,
    first_of_second: int | None = None,
    most: int = PARTNERS,
    few: int = FEW,
) -> Iterator[Pairs]:
    """The pairs whose containment reaches the threshold, in parts; the later positions ascend, over all parts.

    Every pair is found of which neither text has fewer than `fewest` shingles: nearly every text contains the word "the".
    With `first_of_second`, only pairs of a position before it and one from it on.

    Of a text with more than `most` earlier partners only the pairs with the earliest `few` are yielded, and it is named in `capped`.
    So is one with a shingle that more than `most` earlier texts have, if among the `4 * few` earliest of these, or of those in
    which it is among the rarest, `3 * few` are partners; then its `few` links are with the earliest of these. What is found of a
    text that is not capped is everything.

    The time goes with the number of texts in which the rarest words of a text occur: it is long where texts are short, words
    common and the threshold low.
    """
    _check(threshold)
    n = len(sets)
    lists = _prefixes(sets, threshold, fewest, first_of_second)
    # Texts with very many partners would take as many comparisons as there are pairs. A look at some of them tells.
    first_look = [found.shortest_above(most) for found in lists]
    limits = np.full(n, 4 * few)
    crowded = np.zeros(n, bool)
    links = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for begin, end in _spans(_work(first_look, limits), _CODES):
        later, earlier, scores = _reaching(sets, _candidates(first_look, begin, end, limits), begin, threshold, _containment)
        crowded[begin:end] = np.bincount(later - begin, minlength=end - begin) >= 3 * few
        chosen = np.flatnonzero(crowded[later] & (_ranks(later) < few))
        links.append((later[chosen], earlier[chosen], scores[chosen]))
    known = [np.concatenate(part) for part in zip(*links, strict=True)]

    limits = np.where(crowded, 0, n)
    for begin, end in _spans(_work(lists, limits) + few * np.cumsum(crowded), _CODES):
        found = _reaching(sets, _candidates(lists, begin, end, limits), begin, threshold, _containment)
        some = slice(*np.searchsorted(known[0], [begin, end]))
        later, earlier, scores = (np.concatenate([old[some], new]) for old, new in zip(known, found, strict=True))
        order = np.lexsort((earlier, later))
        yield from _capped((later[order], earlier[order], scores[order]), begin, end, most, few, crowded)


def every_pair_of(
    sets: LexicalSets, chosen: Array, kind: str, threshold: float, first_of_second: int | None = None
) -> Iterator[Pairs]:
    """The pairs of the chosen texts (a bool array) with earlier ones, as `lexical_pairs` or `contained_pairs` (the `kind`), but however many."""
    if kind == "lexical":
        lists, score = _banded(sets, banding(threshold), first_of_second), _jaccard
    else:
        lists, score = _prefixes(sets, threshold, FEWEST, first_of_second), _containment
    limits = np.where(chosen, len(sets), 0)
    for begin, end in _spans(_work(lists, limits), _CODES):
        found = _reaching(sets, _candidates(lists, begin, end, limits), begin, threshold, score)
        yield Pairs(*found, np.empty(0, np.int64))


def _jaccard(shared: Array, one: Array, other: Array) -> Array:
    """The score of sets of these sizes."""
    scores: Array = shared / np.maximum(one + other - shared, 1)
    return scores


def _containment(shared: Array, one: Array, other: Array) -> Array:
    """The score of sets of these sizes."""
    scores: Array = shared / np.maximum(np.minimum(one, other), 1)
    return scores


def _check(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold must lie above 0 and be at most 1, not {threshold}")


# Texts to sets.


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


def _chained(first: Array, then: Array) -> Array:
    """A hash of two hashes, in their order."""
    return _mixed(first * np.uint64(0x9E3779B97F4A7C15) + then + np.uint64(1))


def _shingled(tokens: Array, lengths: Array, size: int) -> tuple[Array, Array]:
    """The hashes of each text's runs of `size` tokens, int64 and none negative, and how many there are of each."""
    counts = np.where(lengths > 0, np.maximum(lengths - size + 1, 1), 0)
    begins = np.repeat(np.cumsum(lengths) - lengths, counts) + _within(counts)
    widths = np.repeat(np.minimum(lengths, size), counts)
    values = tokens[begins]
    for place in range(1, size):
        more = np.flatnonzero(widths > place)
        values[more] = _chained(values[more], tokens[begins[more] + place])
    return (values & np.uint64(_BITS)).view(np.int64), counts


def _distinct(values: Array, counts: Array) -> tuple[Array, Array]:
    """The values of each text in order and without repetitions, and how many are left."""
    rows = np.repeat(np.arange(len(counts)), counts)
    values = values[np.lexsort((values, rows))]
    new = np.ones(len(values), bool)
    new[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
    return values[new], np.bincount(rows[new], minlength=len(counts))


# Sets to candidates.


@dataclass(frozen=True)
class _Lists:
    """For each row, stretches of lists of rows that come before it.

    Row i has the entries `starts[i]` to `starts[i + 1]`; entry e is the stretch of `counts[e]` from `firsts[e]` on in `members`,
    in which positions ascend.
    """

    starts: Array
    firsts: Array
    counts: Array
    members: Array

    def shortest_above(self, count: int) -> _Lists:
        """Only the shortest stretch of each row, of those longer than `count`: it says most about the row."""
        owners = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        entries = np.flatnonzero(self.counts > count)
        entries = entries[np.lexsort((self.counts[entries], owners[entries]))]
        entries = entries[np.diff(owners[entries], prepend=-1) != 0]
        starts = np.concatenate([[0], np.cumsum(np.bincount(owners[entries], minlength=len(self.starts) - 1))])
        return _Lists(starts, self.firsts[entries], self.counts[entries], self.members)

    def expanded(self, begin: int, end: int, limits: Array) -> tuple[Array, Array]:
        """Rows from `begin` to `end`, less `begin`, and their candidates, at most `limits` (n,) of a stretch: int64 (m,) each."""
        some = slice(self.starts[begin], self.starts[end])
        owners = np.repeat(np.arange(end - begin), np.diff(self.starts[begin : end + 1]))
        counts = np.minimum(self.counts[some], limits[begin:end][owners])
        return np.repeat(owners, counts), self.members[np.repeat(self.firsts[some], counts) + _within(counts)]


def _banded(sets: LexicalSets, cut: Banding, first_of_second: int | None) -> list[_Lists]:
    """A list of buckets for each band: the rows that agree in it."""
    n = len(sets)
    keys = np.empty((cut.bands, n), np.uint64)
    for begin in range(0, n, _SIGNED):
        end = min(begin + _SIGNED, n)
        signed = sets.signatures(cut.bands * cut.rows, begin, end).reshape(end - begin, cut.bands, cut.rows).astype(np.uint64)
        key = signed[:, :, 0]
        for row in range(1, cut.rows):
            key = _chained(key, signed[:, :, row])
        keys[:, begin:end] = key.T
    filled = np.flatnonzero(sets.sizes)
    lists, own = [], np.arange(n + 1)
    for key in keys:
        order = filled[np.argsort(key[filled], kind="stable")]
        run, ends = _runs(key[order])
        place = np.arange(len(order)) if first_of_second is None else ends
        firsts, counts = np.zeros(n, np.int32), np.zeros(n, np.int32)
        firsts[order] = run
        counts[order] = _before(order, run, place, None, first_of_second)
        lists.append(_Lists(own, firsts, counts, order.astype(np.int32)))
    return lists


def _prefixes(sets: LexicalSets, threshold: float, fewest: int, first_of_second: int | None) -> list[_Lists]:
    """Two lists of the rows that have a shingle: all rows, for those of a row's prefix; rows with it in their prefix, for all.

    If a set shares `c` of its shingles with another, then of any `|A| - c + 1` of them at least one: that is its prefix. The
    rarest ones make it, for they are in the fewest other sets. Nothing of the kind holds for the larger set, hence two lists.
    """
    n = len(sets)
    sizes = np.where(sets.sizes >= fewest, sets.sizes, 0)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    owners = np.repeat(np.arange(n, dtype=np.int32), sizes)
    hashes = sets.hashes[np.repeat(sizes > 0, sets.sizes)]
    order = np.argsort(hashes, kind="stable")
    run, end = _runs(hashes[order])
    members = owners[order]
    del hashes

    rarity = np.empty(len(order), np.int64)
    rarity[order] = end - run
    # Rounding may make the number of shared shingles one too small, never too large: the prefix is then longer than it need be.
    length = sizes - np.ceil(threshold * sizes - 1e-6).astype(np.int64).clip(1) + 1
    by_rarity = np.argsort((owners.astype(np.int64) << 32) | rarity)
    prefix = np.empty(len(order), bool)
    prefix[by_rarity] = _within(sizes) < np.repeat(length, sizes)
    del rarity, by_rarity

    place: Array = np.arange(len(order)) if first_of_second is None else end
    firsts, counts = np.empty(len(order), np.int64), np.empty(len(order), np.int32)
    firsts[order] = run
    counts[order] = _before(members, run, place, None, first_of_second)
    of_prefix = np.concatenate([[0], np.cumsum(prefix)])[starts]
    everywhere = _Lists(of_prefix, firsts[prefix], counts[prefix], members)

    chosen = prefix[order]
    seen = np.concatenate([[0], np.cumsum(chosen)])
    firsts[order] = seen[run]
    counts[order] = _before(members, run, place, chosen, first_of_second)
    return [everywhere, _Lists(starts, firsts, counts, members[chosen])]


def _before(members: Array, run: Array, place: Array, chosen: Array | None, first_of_second: int | None) -> Array:
    """How many of each member's list come before it, or with `first_of_second` in the first part if it is in the second itself.

    `run` is where the list of each begins, `place` up to where it is looked at; with `chosen`, only members in that mask count.
    """
    if first_of_second is None and chosen is None:
        return place - run
    wanted = np.ones(len(members), bool) if chosen is None else chosen
    if first_of_second is not None:
        wanted = wanted & (members < first_of_second)
    seen = np.concatenate([[0], np.cumsum(wanted)])
    counts = seen[place] - seen[run]
    return counts if first_of_second is None else np.where(members < first_of_second, 0, counts)


def _runs(values: Array) -> tuple[Array, Array]:
    """Where the run of equal values begins in which each stands, and where it ends: int64 (m,) each."""
    edges = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]])) if len(values) else np.zeros(1, np.int64)
    lengths = np.diff(edges)
    return np.repeat(edges[:-1], lengths), np.repeat(edges[1:], lengths)


def _work(lists: list[_Lists], limits: Array) -> Array:
    """How many candidates, with repetitions, each row and those before it have when at most `limits` (n,) of a stretch are taken."""
    work = np.zeros(len(limits), np.int64)
    for part in lists:
        counts = np.minimum(part.counts, np.repeat(limits, np.diff(part.starts)))
        work += np.diff(np.concatenate([[0], np.cumsum(counts)])[part.starts])
    return np.cumsum(work)


def _candidates(lists: list[_Lists], begin: int, end: int, limits: Array) -> Array:
    """The distinct candidates of the rows from `begin` to `end`, as `(row - begin) * n + candidate`, ascending."""
    n = len(lists[0].starts) - 1
    codes = np.concatenate([owners * n + found for owners, found in (part.expanded(begin, end, limits) for part in lists)])
    codes.sort()
    return codes[np.concatenate([[True], codes[1:] != codes[:-1]])] if len(codes) else codes


# Candidates to pairs.


def _reaching(
    sets: LexicalSets, codes: Array, begin: int, threshold: float, score: Callable[[Array, Array, Array], Array]
) -> tuple[Array, Array, Array]:
    """Those candidates that reach the threshold: the later, the earlier and their scores."""
    rows, earlier = np.divmod(codes, len(sets))
    later = rows + begin
    possible = np.flatnonzero(score(sets.at_most_shared(later, earlier), sets.sizes[later], sets.sizes[earlier]) >= threshold)
    later, earlier = later[possible], earlier[possible]
    scores = score(sets.shared(later, earlier), sets.sizes[later], sets.sizes[earlier])
    enough = np.flatnonzero(scores >= threshold)
    return later[enough], earlier[enough], scores[enough]


def _capped(pairs: tuple[Array, Array, Array], begin: int, end: int, most: int, few: int, crowded: Array) -> Iterator[Pairs]:
    """The pairs of the rows from `begin` to `end`, only the first few of those that are crowded or have too many; if there are any."""
    later, earlier, scores = pairs
    capped = crowded[begin:end] | (np.bincount(later - begin, minlength=end - begin) > most)
    kept = np.flatnonzero(~capped[later - begin] | (_ranks(later) < few))
    if len(kept) or capped.any():
        yield Pairs(later[kept], earlier[kept], scores[kept], np.flatnonzero(capped) + begin)


def _ranks(ascending: Array) -> Array:
    """How many equal values stand before each."""
    before: Array = np.arange(len(ascending)) - np.searchsorted(ascending, ascending)
    return before


def _within(counts: Array) -> Array:
    """0 to count - 1 for each count, one after the other."""
    places: Array = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def _spans(ends: Array, size: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover all rows, each of at most `size`, or of one row, when `ends` are the sums of the sizes of rows so far."""
    begin, done = 0, 0
    while begin < len(ends):
        end = max(begin + 1, int(np.searchsorted(ends, done + size, "right")))
        yield begin, end
        begin, done = end, int(ends[end - 1])
