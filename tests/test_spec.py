"""The EncoderSpec: it leads back to its encoder, survives JSON, and says what keeps vectors apart."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embell import Encoder, EncoderError
from embell.engine.spec import CLEANUPS, ON_LONG, POOLED_TOKENS, POOLINGS, EncoderSpec, ModelSettings
from plain_path import tiny_bert_directory, tiny_static_directory
from tiny_models import SENTENCES, tiny_encoder_directory

TEXTS = ["A cat", *SENTENCES[:3], "river bridge night " * 20]
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"start_layer": None},
    "start": {"start_layer": 1, "pooling": "last"},
    "pooling": {"pooling": "max+weighted-mean"},
    "text": {"pooled_tokens": "text", "document_prompt": "of {text} it"},
    "after-prompt": {"pooled_tokens": "after-prompt", "document_prompt": "passage: {text}"},
    "prompts": {"query_prompt": "query: {text}", "document_prompt": "passage: {text}"},
    "several": {"query_prompt": ("one {text}", "two {text}"), "document_prompt": ("three {text}", "four {text}")},
    "cleanup": {"cleanup": "period-quotes"},
    "prepending": {"preset": "prompteol", "token_prepending": (1, 3)},
    "echo": {"preset": "echo"},
    "max_length": {"max_length": 20},
    "chunk": {"max_length": 20, "on_long": "chunk"},
    "layers": {"layers": 2},
    "dim": {"dim": 5},
    "languages": {"languages": ("en", "de")},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_directory(tmp_path_factory.mktemp("qwen3"), "qwen3")


def load(directory: Path, **options: Any) -> Encoder:
    return Encoder.load(directory, dtype="float32", **options)


@cache
def plain(directory: Path) -> Encoder:
    return load(directory)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_spec_leads_back_to_its_encoder_and_so_does_a_saved_one(directory: Path, name: str, tmp_path: Path) -> None:
    encoder = load(directory, **OPTIONS[name])
    written = EncoderSpec.from_dict(orjson.loads(orjson.dumps(encoder.spec.to_dict())), "here")
    assert written == encoder.spec
    again = Encoder.from_spec(written, dtype="float32")
    assert again.spec == encoder.spec
    assert not encoder.spec.differences(again.spec)
    encoder.save(tmp_path)
    saved = load(tmp_path)
    assert set(encoder.spec.differences(saved.spec)) <= {"fingerprint"}  # weights that were left out
    for kind in ("query", "document"):
        expected = encoder.encode(TEXTS, kind)  # type: ignore[arg-type]
        np.testing.assert_array_equal(again.encode(TEXTS, kind), expected)  # type: ignore[arg-type]
        np.testing.assert_array_equal(saved.encode(TEXTS, kind), expected)  # type: ignore[arg-type]
    if name not in ("nothing", "languages"):
        vectors = plain(directory).encode(TEXTS)
        assert vectors.shape != expected.shape or np.abs(vectors - expected).max() > 1e-4, "the option does nothing"


@pytest.mark.parametrize("make", [tiny_bert_directory, tiny_static_directory])
def test_so_does_that_of_a_model_that_is_no_decoder(make: Any, tmp_path: Path) -> None:
    encoder = load(make(tmp_path / "model"), max_length=9, on_long="chunk", dim=3, query_prompt="search {text}")
    again = Encoder.from_spec(encoder.spec, dtype="float32")
    assert again.spec == encoder.spec
    np.testing.assert_array_equal(again.encode(["search engines"] * 2), encoder.encode(["search engines"] * 2))
    encoder.save(tmp_path / "saved")
    assert set(encoder.spec.differences(load(tmp_path / "saved").spec)) <= {"fingerprint"}


def test_several_prompts_may_be_given_as_a_list(directory: Path) -> None:
    prompts = ["three {text}", "four {text}"]
    assert load(directory, document_prompt=prompts).spec == load(directory, document_prompt=tuple(prompts)).spec


SPEC = EncoderSpec("there", None, "0a", 4, 3, "mean", "{text}", "{text}", 512, 32, "float32")
OTHER: dict[str, Any] = {
    "fingerprint": "0b", "layers": 3, "start_layer": None, "pooling": "max", "query_prompt": "q {text}",
    "document_prompt": ("d {text}",), "max_length": 511, "dim": 31, "pooled_tokens": "text", "cleanup": "period",
    "token_prepending": (1, 2), "on_long": "chunk",
}  # fmt: skip
FREE: dict[str, Any] = {
    "backbone": "here", "revision": "main", "dtype": "bfloat16", "languages": ("de",), "adapter": "a", "adapter_revision": "b",
    "on_long": "error",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_what_decides_a_vector_keeps_two_encoders_apart(name: str) -> None:
    other = replace(SPEC, **{name: OTHER[name]})
    assert SPEC.differences(other) == other.differences(SPEC) == [name]


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_decide_a_vector_lets_them_meet(name: str) -> None:
    other = replace(SPEC, **{name: FREE[name]})
    assert SPEC.differences(other) == other.differences(SPEC) == []


def test_every_field_of_a_spec_is_judged() -> None:
    assert {*OTHER, *FREE} == {f.name for f in fields(EncoderSpec)}
    error, chunk = replace(SPEC, on_long="error"), replace(SPEC, on_long="chunk")
    assert error.differences(chunk) == chunk.differences(error) == ["on_long"]
    assert error.differences(error) == []


def test_a_spec_without_the_newer_keys_is_one_with_their_defaults() -> None:
    newer = {f.name for f in fields(EncoderSpec)} - {f.name for f in fields(EncoderSpec)[:11]}
    assert newer >= {"pooled_tokens", "cleanup", "token_prepending", "on_long", "languages", "adapter"}
    old = {name: value for name, value in SPEC.to_dict().items() if name not in newer}
    assert EncoderSpec.from_dict(old, "here") == SPEC


def test_a_spec_with_other_keys_is_refused() -> None:
    values = SPEC.to_dict()
    with pytest.raises(EncoderError, match=r"^there: unknown key 'poling', did you mean 'pooling'\?$"):
        EncoderSpec.from_dict({**values, "poling": "mean"}, "there")
    with pytest.raises(EncoderError, match=r"^there: unknown key 'xyz'; known are backbone, "):
        EncoderSpec.from_dict({**values, "xyz": 1}, "there")
    del values["fingerprint"]
    with pytest.raises(EncoderError, match=r"^there: fingerprint is missing$"):
        EncoderSpec.from_dict(values, "there")


prompts = st.sampled_from(["{text}", "q {text}"]) | st.lists(st.sampled_from(["a {text}", "{text} b"]), min_size=1).map(tuple)
choices: dict[str, st.SearchStrategy[Any]] = {
    "pooling": st.sampled_from(POOLINGS), "pooled_tokens": st.sampled_from(POOLED_TOKENS), "cleanup": st.sampled_from(CLEANUPS),
    "on_long": st.sampled_from(ON_LONG), "query_prompt": prompts, "document_prompt": prompts,
    "token_prepending": st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)), "start_layer": st.none() | st.integers(0, 9),
    "languages": st.lists(st.sampled_from(["en", "de"])).map(tuple), "max_length": st.integers(1, 9999),
}  # fmt: skip


@given(values=st.fixed_dictionaries({}, optional=choices))
def test_specs_and_settings_survive_json(values: dict[str, Any], tmp_path: Path) -> None:
    spec = replace(SPEC, **values)
    for text in (json.dumps(spec.to_dict()), orjson.dumps(spec.to_dict())):
        assert EncoderSpec.from_dict(json.loads(text), "here") == spec
    options = ModelSettings(**values, layers=2, dim=3, head=({"kind": "normalise"},))
    options.write(tmp_path)
    assert ModelSettings.read(tmp_path) == options


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "max_lenght": 5}', "unknown key 'max_lenght', did you mean 'max_length'"),
        ('{"format": 2}', "not a format that this version of embell reads"),
        ('{"start_layer": 1}', "not a format that this version of embell reads"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
    ],
)
def test_damaged_settings_are_refused_with_their_place(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / ModelSettings.FILE).write_text(content)
    with pytest.raises(EncoderError, match=message) as raised:
        ModelSettings.read(tmp_path)
    assert str(tmp_path / ModelSettings.FILE) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_layer": -1, "pooling": "last"}, "equals the causal model: the last token already sees every other"),
        ({"start_layer": None, "pooling": "cls"}, "cls pooling reads the first token, which sees no other"),
        (
            {"start_layer": None, "pooling": "last", "pooled_tokens": "text", "query_prompt": 'of {text} is:"'},
            r"never reads the end of the prompt, ' is:\"'",
        ),
        ({"pooled_tokens": "after-prompt", "query_prompt": "of {text} it"}, r"needs a prompt that ends in \{text\}"),
        ({"query_prompt": "{text} {text} {text}"}, "exactly once, or twice for an echo"),
        ({"query_prompt": ("of {text}", "of")}, "exactly once, or twice for an echo"),
        ({"query_prompt": ()}, r"query_prompt is \(\), not a template"),
        ({"pooling": "mean+medium"}, "unknown pooling 'medium'"),
        ({"pooled_tokens": "txt"}, "unknown pooled_tokens 'txt', did you mean 'text'"),
        ({"cleanup": "periods"}, "unknown cleanup 'periods', did you mean 'period'"),
        ({"on_long": "chunks"}, "unknown on_long 'chunks', did you mean 'chunk'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(directory: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EncoderError, match=message) as raised:
        load(directory, **options)
    assert len(str(raised.value).splitlines()) == 1
