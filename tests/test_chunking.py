"""Chunks: their offsets, their sizes, and that no word of a text is lost between them."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from embell.errors import UsageError
from embell.indexers import chunking
from embell.indexers.chunking import Chunk, Chunker

PROSE = "The quick brown fox jumps over the lazy dog. It rests, größer and wiser, by the old river bank!\n\n"


@functools.cache
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer that does all that could spoil a count: special tokens, truncation, padding, NFKC."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([PROSE] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    made.enable_truncation(6)
    made.enable_padding(length=40)
    return made


@functools.cache
def chunker(tokens: int) -> Chunker:
    return Chunker(tokenizer(), tokens)


def count(text: str) -> int:
    counting = Tokenizer.from_str(tokenizer().to_str())
    counting.no_truncation()
    counting.no_padding()
    return len(counting.encode(text, add_special_tokens=False).ids)


def check(text: str, chunks: list[Chunk], tokens: int) -> None:
    """Chunks are pieces of the text, in order, within the limit; what lies between them is white space."""
    at = 0
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end]
        assert chunk.text.strip()
        assert chunk.start >= at
        assert not text[at : chunk.start].strip()
        assert len(chunk.text) == 1 or count(chunk.text) <= tokens
        at = chunk.end
    assert not text[at:].strip()


# Letters that bytes, UTF-16 units and graphemes count differently, signs that NFKC makes long, and structure.
LETTERS = st.sampled_from(
    list("abc XY.,!?#*>-`[]()|\n\r\t\x00\x1c\u200b\ufeffé日本ﬁ㍿ﷺ🎉\u200d\u0301 ") + ["the ", "\n\n", "\n# ", "```\n", "fox. "]
)
TEXTS = st.lists(LETTERS, max_size=120).map("".join)


@given(text=TEXTS, tokens=st.sampled_from([8, 13, 64]), markdown=st.booleans())
@settings(deadline=None, max_examples=150)
def test_chunks_cover_the_text_within_the_limit(text: str, tokens: int, markdown: bool) -> None:
    chunks = chunker(tokens).split(text, markdown)
    check(text, chunks, tokens)
    assert bool(chunks) == bool(text.strip())
    if text.strip() and count(text.strip()) <= tokens:
        assert [chunk.text for chunk in chunks] == [text.strip()]


@pytest.mark.parametrize("markdown", [False, True])
def test_windows_do_not_change_the_chunks(markdown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"Paragraph {number}: {PROSE * (1 + number % 3)}" for number in range(40))
    whole = chunker(32).split(text, markdown)
    monkeypatch.setattr(chunking, "_WINDOW", 1)  # the least width is then 32 characters a token
    windowed = chunker(32).split(text, markdown)
    check(text, windowed, 32)
    assert len(whole) > 100
    assert windowed == whole


def test_a_window_of_white_space_or_without_boundary_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_WINDOW", 1)
    text = PROSE + " " * 3000 + PROSE + "\n" * 3000 + "ab" * 3000 + PROSE
    check(text, chunker(8).split(text), 8)


def test_markdown_breaks_at_headings() -> None:
    text = "# One\n\nThe quick brown fox.\n\n# Two\n\nThe lazy dog rests.\n"
    limit = count(text) - 5
    assert [chunk.text.splitlines()[0] for chunk in chunker(limit).split(text, markdown=True)] == ["# One", "# Two"]


def test_chunks_are_filled() -> None:
    chunks = chunker(64).split(PROSE * 50)
    assert sum(count(chunk.text) for chunk in chunks) / len(chunks) > 40


def test_the_splitter_sees_no_more_than_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes quadratic time over text without boundaries."""
    cut = Chunker(tokenizer(), 64)
    splitter, seen = cut._text, []

    class Watched:
        def chunk_indices(self, text: str) -> list[tuple[int, str]]:
            seen.append(len(text))
            return splitter.chunk_indices(text)

    monkeypatch.setattr(cut, "_text", Watched())
    text = "日本語" * 15_000
    check(text, cut.split(text), 64)
    assert max(seen) == chunking._WINDOW


def test_the_tokenizer_is_left_as_it_was() -> None:
    before = tokenizer().to_str()
    Chunker(tokenizer(), 8).split(PROSE * 9)
    assert tokenizer().to_str() == before
    assert tokenizer().truncation is not None


@pytest.mark.parametrize("tokens", [7, 0, -1])
def test_chunks_too_small_are_refused(tokens: int) -> None:
    with pytest.raises(UsageError, match="too small"):
        Chunker(tokenizer(), tokens)


@pytest.mark.parametrize("text", ["", " \n\t", "\x1c", "\u3000\u2029"])
def test_no_content_no_chunk(text: str) -> None:
    assert chunker(8).split(text) == []
