"""From texts to token rows: prompts, clean-up, the cut of long texts, and texts in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embell import Encoder, EncoderError
from embell.engine.encoder import EncodeReport
from embell.engine.pooling import pool
from embell.engine.presets import preset
from embell.engine.tokens import clean_up
from embell.errors import TextError
from plain_path import decoded, last_states, stock, tiny_static_directory, tokens_of, unit
from tiny_models import SENTENCES, tiny_encoder_directory

LONG = "river bridge night " * 40
KNOWLEDGE = (
    "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
    "additional but less central details. With this in mind , this sentence : "
)
ONE_WORD = {
    "bellm": ("The representative word for sentence ", ' is:"'),
    "prompteol": ('This sentence : "', '" means in one word:"'),
    "summarize": ('Summarize sentence "', '" in one word:"'),
    "knowledge": (KNOWLEDGE + '"', '" means in one word:"'),
    "cot": ('After thinking step by step , this sentence : "', '" means in one word:"'),
}
"""What stands before and after the text, as published."""
PREPENDED = {
    "prompteol": 'This sentence : <PST> "{text}" means in one word:"',
    "summarize": 'Summarize sentence <PST> "{text}" in one word:"',
    "knowledge": KNOWLEDGE + '<PST> "{text}" means in one word:"',
    "cot": 'After thinking step by step , this sentence : <PST> "{text}" means in one word:"',
}

any_texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip)
long_texts = (
    st.lists(
        st.sampled_from(
            ["a", "b ", " ", "\n", "river ", "the", "bridge", "🙂", "👩‍👩‍👧", "漢字", "é", "{text}", "<PST>", '"', "?", "１２"]
        ),
        min_size=1,
        max_size=120,
    )
    .map("".join)
    .filter(str.strip)
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_encoder_directory(tmp_path_factory.mktemp("llama"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1000}))  # room for long prompts
    return path


def load(directory: Path, **options: Any) -> Encoder:
    return Encoder.load(directory, dtype="float32", **options)


ways = pytest.mark.parametrize(
    "options",
    [
        {},
        {"document_prompt": "x: {text}"},
        {"document_prompt": "x: {text}", "pooled_tokens": "after-prompt"},
        {"document_prompt": "of {text} it", "pooled_tokens": "text"},
        {"preset": "prompteol"},
        {"preset": "prompteol", "token_prepending": (1, 3)},
        {"preset": "echo"},
    ],
    ids=["plain", "prefix", "after-prompt", "text", "prompteol", "prepending", "echo"],
)


@pytest.mark.parametrize("name", ONE_WORD)
def test_a_one_word_preset_is_the_published_prompt_read_at_its_last_token(directory: Path, name: str) -> None:
    spec = load(directory, preset=name).spec
    before, after = ONE_WORD[name]
    assert spec.document_prompt == spec.query_prompt == f"{before}{{text}}{after}"
    assert (spec.pooling, spec.pooled_tokens, spec.start_layer) == ("last", "all", None)
    assert spec.cleanup == ("period" if name == "bellm" else "period-quotes")


@pytest.mark.parametrize("name", PREPENDED)
def test_with_token_prepending_a_preset_keeps_its_placeholder(directory: Path, name: str) -> None:
    spec = load(directory, preset=name, token_prepending=(1, 3)).spec
    assert spec.document_prompt == spec.query_prompt == PREPENDED[name]


def test_the_echo_preset_reads_the_second_copy_in_a_causal_model(directory: Path) -> None:
    spec = load(directory, preset="echo").spec
    assert spec.query_prompt == "Query:{text}\nQuery again:{text}"
    assert spec.document_prompt == "Document:{text}\nDocument again:{text}"
    assert (spec.pooling, spec.pooled_tokens, spec.start_layer, spec.cleanup) == ("mean", "text", None, "none")


def test_the_metaeol_preset_asks_eight_questions_for_one_word(directory: Path) -> None:
    spec = load(directory, preset="metaeol").spec
    assert spec.query_prompt == spec.document_prompt
    assert isinstance(spec.document_prompt, tuple)
    assert len(set(spec.document_prompt)) == len(spec.document_prompt) == 8
    for prompt in spec.document_prompt:
        assert 'this sentence : "{text}" ' in prompt
        assert prompt.endswith(' in one word:"')
    assert (spec.pooling, spec.start_layer, spec.cleanup) == ("last", None, "period-quotes")


def test_what_the_caller_says_goes_before_the_preset_and_an_unknown_preset_is_named(directory: Path) -> None:
    spec = load(directory, preset="prompteol", pooling="mean", query_prompt="q {text}").spec
    assert (spec.pooling, spec.query_prompt) == ("mean", "q {text}")
    assert spec.document_prompt == "{text}".join(ONE_WORD["prompteol"])
    with pytest.raises(EncoderError, match="unknown preset 'promteol', did you mean 'prompteol'"):
        preset("promteol", False)


@pytest.mark.parametrize(
    ("text", "period", "quotes"),
    [
        ("A cat", "A cat.", "A cat."),
        ("A cat.", "A cat.", "A cat."),
        ("  A cat\n", "A cat.", "A cat."),
        ("Why?", "Why.", "Why."),
        ("Why? Because", "Why? Because.", "Why? Because."),
        ('He said "no"', 'He said "no"', "He said 'no'"),
        ("it's 'so'", "it's 'so'", "it's 'so'"),
        ('"Why?" he said', '"Why?" he said.', "'Why?' he said."),
        ("Stop!", "Stop!.", "Stop!."),
        ("", "", ""),
    ],
)
def test_clean_up_puts_the_end_of_a_sentence_in_order(text: str, period: str, quotes: str) -> None:
    assert clean_up(text, "period") == period
    assert clean_up(text, "period-quotes") == quotes
    assert clean_up(text, "none") == text


@pytest.mark.parametrize("name", ONE_WORD)
def test_the_last_token_is_the_prompts_and_its_state_is_the_vector(directory: Path, name: str) -> None:
    encoder = load(directory, preset=name)
    before, after = ONE_WORD[name]
    texts = ["A cat", 'Is "it" true?', "漢字 🙂", *SENTENCES[:2]]
    rows = encoder.tokens(texts, "document").rows
    assert {row.ids[-1] for row in rows} == {tokens_of(encoder, '"')[0]}
    for text, row, vector in zip(texts, rows, encoder.encode(texts), strict=True):
        ids = tokens_of(encoder, before + clean_up(text, encoder.spec.cleanup) + after)
        assert row.ids == ids
        assert row.end == len(ids)
        np.testing.assert_allclose(vector, unit(last_states(directory, ids)[-1]), atol=1e-5)


def test_last_token_pooling_reads_the_prompts_end_on_either_side_of_padding(directory: Path) -> None:
    encoder = load(directory, preset="prompteol")
    texts = ["A cat", "Is it true?", "The river rose"]
    rows = [row.ids for row in encoder.tokens(texts, "document").rows]
    length = max(map(len, rows)) + 3
    for side in ("left", "right"):
        gaps = [[0] * (length - len(row)) for row in rows]
        ids = torch.tensor([gap + row if side == "left" else row + gap for gap, row in zip(gaps, rows, strict=True)])
        real = [[False] * len(gap) + [True] * len(row) for gap, row in zip(gaps, rows, strict=True)]
        mask = torch.tensor([flags if side == "left" else flags[::-1] for flags in real])
        with torch.no_grad():
            states = stock(directory)(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        for vector, expected in zip(pool(states, mask, "last"), encoder.encode(texts), strict=True):
            np.testing.assert_allclose(unit(vector), expected, atol=1e-5)


def test_queries_and_documents_have_their_own_prompts(directory: Path) -> None:
    encoder = load(directory, query_prompt="query: {text}", document_prompt="passage: {text}!")
    assert decoded(encoder, encoder.tokens(["a cat"], "query").rows[0].ids) == "query: a cat"
    assert decoded(encoder, encoder.tokens(["a cat"], "document").rows[0].ids) == "passage: a cat!"
    with pytest.raises(EncoderError, match="kind is 'document' or 'query', not 'passage'"):
        encoder.tokens(["a cat"], "passage")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["{text}", "a {text} b", "<PST>", 'x <PST> "{text}" y {text}'])
def test_what_looks_like_a_slot_in_a_text_is_text(directory: Path, text: str) -> None:
    plain = load(directory, document_prompt="of {text} it")
    assert decoded(plain, plain.tokens([text], "document").rows[0].ids) == f"of {text} it"
    echo = load(directory, preset="echo")
    assert decoded(echo, echo.tokens([text], "query").rows[0].ids) == f"Query:{text}\nQuery again:{text}"
    prepending = load(directory, document_prompt="of <PST> {text} it", query_prompt="<PST> {text}", token_prepending=(1, 3))
    for kind, before, after in (("document", "of ", " it"), ("query", "", "")):
        row = prepending.tokens([text], kind).rows[0]  # type: ignore[arg-type]
        place = row.placeholder
        assert decoded(prepending, row.ids[:place]).strip() == before.strip()  # the space may have joined the text
        assert decoded(prepending, row.ids[:place] + row.ids[place + 1 :]) == before + text + after


@ways
@given(text=long_texts)
@settings(max_examples=15)
def test_a_long_text_is_cut_to_its_beginning_and_the_prompt_stays_whole(
    directory: Path, options: dict[str, Any], text: str
) -> None:
    encoder = remembered(directory, **options, max_length=70)
    (template,) = encoder.tokens._templates["document"]
    cleaned = clean_up(text, encoder.spec.cleanup)
    tokenised = encoder.tokens([text], "document")
    (row,) = tokenised.rows
    assert len(row.ids) <= 70
    assert 0 <= row.begin < row.end <= len(row.ids)
    ids = row.ids if row.placeholder < 0 else row.ids[: row.placeholder] + row.ids[row.placeholder + 1 :]
    whole = tokens_of(encoder, template.fill(cleaned))
    assert tokenised.long == ([0] if len(whole) + (row.placeholder >= 0) > 70 else [])
    if not tokenised.long:
        assert ids == whole
    elif template.plain and row.placeholder < 0:
        assert ids == whole[:70]
    else:
        read = decoded(encoder, ids)
        kept = read[len(template.before) :].removesuffix(template.after)
        kept = kept[: len(kept) // 2 - len(template.between or "") // 2] if template.copies == 2 else kept
        assert cleaned.startswith(kept)
        assert read == template.fill(kept)
        assert len(row.ids) > 70 - 15 * template.copies, "far more was cut than had to be"


@ways
def test_cut_texts_are_counted_and_read_like_the_text_that_was_kept(directory: Path, options: dict[str, Any]) -> None:
    encoder = remembered(directory, **options, max_length=70)
    report = EncodeReport()
    vectors = encoder.encode([LONG, "short", LONG, "river " * 90], report=report)
    assert (report.texts, report.truncated, report.chunked) == (4, 3, 0)
    (template,) = encoder.tokens._templates["document"]
    (row,) = encoder.tokens([LONG], "document").rows
    assert len(row.ids) > 70 - 2 * template.copies
    ids = row.ids if row.placeholder < 0 else row.ids[: row.placeholder] + row.ids[row.placeholder + 1 :]
    kept = decoded(encoder, ids)[len(template.before) :].removesuffix(template.after)
    if template.between is not None:
        kept = kept.split(template.between)[0]
    if encoder.spec.cleanup == "none":  # others would put a full stop after the words that were kept
        np.testing.assert_allclose(encoder.encode(kept)[0], vectors[0], atol=1e-5)


def test_a_tokenizer_that_cuts_at_the_left_does_not_cut_the_prompt(directory: Path) -> None:
    encoder = load(directory, document_prompt="passage: {text}", max_length=40)
    expected = encoder.tokens([LONG], "document").rows
    encoder.tokenizer.truncation_side = "left"
    assert encoder.tokens([LONG], "document").rows == expected
    assert decoded(encoder, expected[0].ids).startswith("passage: river")


def test_a_prompt_that_leaves_no_room_is_refused(directory: Path) -> None:
    for on_long in ("truncate", "chunk"):
        with pytest.raises(EncoderError, match="the prompt alone fills the maximum length of 10 tokens"):
            load(directory, preset="prompteol", max_length=10, on_long=on_long).encode(LONG)


_encoders: dict[str, Encoder] = {}


def remembered(directory: Path, **options: Any) -> Encoder:
    """Encoders for tests with many examples."""
    key = f"{directory} {sorted(options.items())}"
    if key not in _encoders:
        _encoders[key] = load(directory, **options)
    return _encoders[key]


@ways
@given(text=long_texts)
@settings(max_examples=25)
def test_the_pieces_of_a_text_fit_and_hold_each_character_once(directory: Path, options: dict[str, Any], text: str) -> None:
    encoder = remembered(directory, **options, on_long="chunk", max_length=52)
    assert np.isfinite(encoder.encode([text, "a"])).all()
    tokenised = encoder.tokens([text], "document")
    assert sum(tokenised.weights) == pytest.approx(1)
    assert all(len(row.ids) <= 52 and row.begin < row.end for row in tokenised.rows)
    if tokenised.long:
        (template,) = encoder.tokens._templates["document"]
        cleaned = clean_up(text, encoder.spec.cleanup)
        pieces = encoder.tokens._split(cleaned, template)
        assert len(pieces) == len(tokenised.rows)
        assert "".join("".join(pieces).split()) == "".join(cleaned.split())


def test_a_piece_may_end_within_the_tokens_of_the_last_character(directory: Path) -> None:
    encoder = load(directory, preset="echo", on_long="chunk", max_length=41)
    text = "字👩\u200d👩\u200d👧"
    (template,) = encoder.tokens._templates["document"]
    pieces = encoder.tokens._split(text, template)
    assert "".join(pieces) == text
    assert [decoded(encoder, row.ids) for row in encoder.tokens([text], "document").rows] == list(map(template.fill, pieces))


@ways
def test_a_text_in_pieces_is_their_mean_weighted_by_tokens(directory: Path, options: dict[str, Any]) -> None:
    encoder = remembered(directory, **options, on_long="chunk", max_length=60)
    text = LONG[:400] + "bridge"
    report = EncodeReport()
    vectors = encoder.encode(["short", text, text], report=report)
    assert (report.texts, report.truncated, report.chunked) == (3, 0, 2)
    whole = remembered(directory, **options, max_length=1000)  # reads each piece alone
    (template,) = encoder.tokens._templates["document"]
    cleaned = clean_up(text, encoder.spec.cleanup)
    pieces = encoder.tokens._split(cleaned, template)
    assert len(pieces) > 3
    rows = whole.tokens._rows(pieces, template)
    counts = [row.end - row.begin for row in rows]
    with torch.inference_mode():
        raw = np.concatenate([whole.vectors(whole.collate([row])).numpy() for row in rows])
    np.testing.assert_allclose(vectors[1], unit(np.average(raw, axis=0, weights=counts)), atol=1e-5)
    if not options:
        states = [last_states(directory, tokens_of(encoder, piece), 3) for piece in pieces]
        np.testing.assert_allclose(vectors[1], unit(torch.cat(states).mean(dim=0)), atol=1e-5)


def test_pieces_end_between_words_where_they_can(directory: Path) -> None:
    encoder = load(directory, on_long="chunk", max_length=40)
    (template,) = encoder.tokens._templates["document"]
    pieces = encoder.tokens._split(" ".join(SENTENCES), template)
    assert [word for piece in pieces for word in piece.split()] == " ".join(SENTENCES).split()


def test_every_word_of_a_long_text_influences_its_vector_only_in_pieces(directory: Path) -> None:
    words = " ".join(SENTENCES[:5]).split()
    texts = [" ".join([*words[:at], "zebra", *words[at + 1 :]]) for at in range(len(words))]
    for on_long, all_of_them in (("chunk", True), ("truncate", False)):
        encoder = load(directory, on_long=on_long, max_length=60)
        changed = np.abs(encoder.encode(texts) - encoder.encode(" ".join(words))).max(axis=1) > 1e-4
        assert changed.all() == all_of_them
        assert changed[:5].all()


def test_long_texts_are_an_error_where_they_shall_be_and_all_are_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(directory, on_long="error", max_length=40)
    texts = ["short", LONG, "x", "bridge " * 60, LONG]
    with pytest.raises(TextError) as raised:
        encoder.encode(texts)
    assert raised.value.positions == [1, 3, 4]
    message = str(raised.value)
    assert message.startswith("text 2 is longer than the 40 tokens")
    assert "raise max_length" in message
    assert len(message.splitlines()) == 1
    assert len(encoder.encode(texts[:1])) == 1
    monkeypatch.setattr("embell.engine.encoder.WINDOW", 2)
    with pytest.raises(TextError) as raised:
        encoder.encode(["a", "b", "c", LONG])
    assert raised.value.positions == [3]


@given(text=any_texts)
@settings(max_examples=15)
def test_pooling_over_the_text_reads_its_tokens_alone(directory: Path, text: str) -> None:
    encoder = remembered(directory, document_prompt="about {text} said", pooled_tokens="text", start_layer=None)
    row = encoder.tokens([text], "document").rows[0]
    encoded = encoder.tokenizer(f"about {text} said", return_offsets_mapping=True)
    first, last = len("about "), len("about ") + len(text)
    inside = [at for at, (begin, end) in enumerate(encoded["offset_mapping"]) if begin < last and end > first]
    assert list(range(row.begin, row.end)) == inside
    expected = last_states(directory, encoded["input_ids"])[inside].mean(dim=0)
    np.testing.assert_allclose(encoder.encode(text)[0], unit(expected), atol=1e-5)


def test_pooling_after_the_prompt_leaves_its_tokens_out(directory: Path) -> None:
    encoder = load(directory, document_prompt="passage: {text}", pooled_tokens="after-prompt", start_layer=None)
    ids, prompt = tokens_of(encoder, "passage: xylophone"), tokens_of(encoder, "passage: ")
    expected = last_states(directory, ids)[len(prompt) :].mean(dim=0)
    np.testing.assert_allclose(encoder.encode("xylophone")[0], unit(expected), atol=1e-5)


def test_a_static_model_pools_the_words_it_knows_of_the_text_alone(tmp_path: Path) -> None:
    directory = tiny_static_directory(tmp_path)
    encoder = load(directory, document_prompt="search vectors never {text} of", pooled_tokens="text")
    table = encoder.network.table.detach().numpy()  # type: ignore[union-attr, operator]
    texts = ["engines zzz keep", "yyy zzz texts texts keep", "engines"]
    known = [[2, 3], [6, 6, 3], [2]]
    for vector, ids in zip(encoder.encode(texts), known, strict=True):
        np.testing.assert_allclose(vector, unit(table[ids].mean(axis=0)), atol=1e-6)
