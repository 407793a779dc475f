"""Long texts cut into chunks that fit an encoder, at the best boundary there is: heading, paragraph, sentence, word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from semantic_text_splitter import MarkdownSplitter, TextSplitter
from tokenizers import Tokenizer

from embell.errors import UsageError

FEWEST_TOKENS = 8
"""The smallest chunks that can be asked for."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The characters of a document from `start` up to `end`."""

    start: int
    end: int
    text: str


class Chunker:
    """Cuts texts into chunks of at most `tokens` tokens, special tokens not counted.

    Only a single character that takes more tokens than that exceeds it. Raises UsageError if `tokens` is less than 8.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: int) -> None:
        if tokens < FEWEST_TOKENS:
            raise UsageError(f"chunks of {tokens} tokens are too small to mean anything; ask for {FEWEST_TOKENS} or more")
        # A tokenizer that truncates or pads would miscount; the caller's own stays as it is.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.tokens = tokens
        self._plain = TextSplitter.from_huggingface_tokenizer(self._tokenizer, tokens)
        self._markdown = MarkdownSplitter.from_huggingface_tokenizer(self._tokenizer, tokens)

    def split(self, text: str, markdown: bool = False) -> list[Chunk]:
        """The chunks of a text, in order and without overlap; none only if the text is all white space."""
        whole = text.strip()
        if not whole:
            return []
        if self._count(whole) <= self.tokens:
            start = text.index(whole)
            return [Chunk(start, start + len(whole), whole)]
        splitter = self._markdown if markdown else self._plain
        return [chunk for start, piece in self._pieces(text, splitter) for chunk in self._fitted(start, piece)]

    def _pieces(self, text: str, splitter: TextSplitter | MarkdownSplitter) -> Iterator[tuple[int, str]]:
        """The splitter's pieces, found window by window.

        The splitter takes quadratic time over text without spaces or line ends (40 000 CJK characters: half a
        minute). The end of a window may have cut its last piece short, so the next window begins with that piece.
        """
        width = usual = max(4096, 32 * self.tokens)
        at = 0
        while at < len(text):
            pieces = splitter.chunk_indices(text[at : at + width])
            if at + width >= len(text):
                yield from ((at + offset, piece) for offset, piece in pieces)
                return
            if len(pieces) == 1:
                width *= 2
                continue
            yield from ((at + offset, piece) for offset, piece in pieces[:-1])
            at += pieces[-1][0] if pieces else width
            width = usual

    def _fitted(self, start: int, piece: str) -> Iterator[Chunk]:
        """The piece as one chunk, or halved until it fits: the splitter's own count can fall short."""
        kept = piece.strip()
        if not kept:
            return
        start += piece.index(kept)
        if len(kept) == 1 or self._count(kept) <= self.tokens:
            yield Chunk(start, start + len(kept), kept)
            return
        middle = len(kept) // 2
        yield from self._fitted(start, kept[:middle])
        yield from self._fitted(start + middle, kept[middle:])

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
