"""Chunks: where they lie in the document, and that they fit."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from embell.errors import UsageError
from embell.indexers.chunking import Chunk, Chunker


def byte_tokenizer() -> Tokenizer:
    """One token for each byte of UTF-8, so that characters and tokens differ."""
    tokenizer = Tokenizer(
        models.BPE(vocab={sign: at for at, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


TOKENIZER = byte_tokenizer()
CHUNKERS = {tokens: Chunker(TOKENIZER, tokens) for tokens in (8, 13, 64)}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PIECES = st.lists(
    st.sampled_from(
        [
            "word ",
            "Größe ",
            "漢字",
            "👩\u200d👧 ",
            "End. ",
            "\n",
            "\r\n",
            "\n\n",
            "# Head\n",
            "- item\n",
            "```\ncode\n```\n",
            "\t",
            "e\u0301",
        ]
    ),
    max_size=60,
).map("".join)


def check(text: str, chunks: list[Chunk], tokens: int) -> None:
    assert bool(chunks) == bool(text.strip())
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text == chunk.text.strip() != ""
        assert len(chunk.text) == 1 or len(TOKENIZER.encode(chunk.text).ids) <= tokens
    for one, other in itertools.pairwise(chunks):
        assert one.end <= other.start
    covered = {at for chunk in chunks for at in range(chunk.start, chunk.end)}
    assert not "".join(sign for at, sign in enumerate(text) if at not in covered).strip(), "only white space is left out"


@settings(deadline=None)
@given(text=st.one_of(TEXTS, PIECES), tokens=st.sampled_from(sorted(CHUNKERS)), markdown=st.booleans())
def test_chunks_lie_in_the_document_fit_and_leave_nothing_out(text: str, tokens: int, markdown: bool) -> None:
    check(text, CHUNKERS[tokens].split(text, markdown), tokens)


@pytest.mark.parametrize("markdown", [False, True])
@pytest.mark.parametrize("unit", ["漢字仮名交", "A plain sentence. ", "# Head\n\n- item *one*\n\n", " " * 3000 + "x"])
def test_texts_longer_than_a_window(unit: str, markdown: bool) -> None:
    text = (unit * 10_000)[:12_345]
    chunker = CHUNKERS[64]
    started = time.process_time()
    chunks = chunker.split(text, markdown)
    assert time.process_time() - started < 20
    check(text, chunks, 64)
    assert len(chunks) < 2 * len(TOKENIZER.encode("".join(text.split())).ids) / 64 + 40, "chunks are filled"


def test_windows_cut_where_the_whole_text_would_be_cut() -> None:
    text = "".join(f"This is sentence number {number} of a long story.\n" + "\n" * (number % 3) for number in range(400))
    chunker = CHUNKERS[64]
    whole = [(start, start + len(piece), piece) for start, piece in chunker._plain.chunk_indices(text)]
    assert [(chunk.start, chunk.end, chunk.text) for chunk in chunker.split(text)] == whole


def test_a_text_that_fits_is_one_trimmed_chunk() -> None:
    assert CHUNKERS[64].split("  \n Größe, 漢字.\n") == [Chunk(4, 14, "Größe, 漢字.")]
    assert CHUNKERS[64].split(" \n\t ") == []


def test_sentences_are_kept_whole() -> None:
    assert [chunk.text for chunk in CHUNKERS[64].split("Rivers rise over night. " * 5)] == [
        "Rivers rise over night. Rivers rise over night.",
        "Rivers rise over night. Rivers rise over night.",
        "Rivers rise over night.",
    ]


def test_markdown_is_cut_at_headings() -> None:
    text = "# One\n\nSome words here.\nAnd more words.\n\n# Two\n\nOther words, some of them rather long.\n"
    assert [chunk.text.splitlines()[0] for chunk in CHUNKERS[64].split(text, markdown=True)] == ["# One", "# Two"]


def test_a_character_larger_than_a_chunk_stands_alone() -> None:
    # One token a byte, and each byte spelt out again by the normalizer: more than 8 tokens for one sign.
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Replace("漢", "x" * 20)
    assert [chunk.text for chunk in Chunker(tokenizer, 8).split("漢漢")] == ["漢", "漢"]


def test_truncation_and_padding_of_the_tokenizer_do_not_count() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=32)
    text = "word " * 40
    assert Chunker(tokenizer, 13).split(text) == CHUNKERS[13].split(text)
    assert tokenizer.truncation is not None, "the caller's tokenizer stays as it is"


@pytest.mark.parametrize("tokens", [7, 0, -1])
def test_too_few_tokens(tokens: int) -> None:
    with pytest.raises(UsageError, match=f"{tokens} tokens are too small.*ask for 8"):
        Chunker(TOKENIZER, tokens)
