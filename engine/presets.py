"""Named settings of published methods that need no training. A preset fills in what was not given otherwise.

Templates that hold the placeholder `<PST>` lose it unless token prepending is switched on.
"""

from __future__ import annotations

import difflib
from typing import Any

from embell.engine.spec import PLACEHOLDER
from embell.errors import EncoderError

_KNOWLEDGE = (
    "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
    'additional but less central details. With this in mind , this sentence : <PST> "{text}" means in one word:"'
)

_META_TASKS = (
    'Sort the statement into the broad category it belongs to. For this task, this sentence : "{text}" belongs in one word:"',
    'Name the field of life that the statement is about. For this task, this sentence : "{text}" is about in one word:"',
    'Tell whether the statement is a fact or an opinion. For this task, this sentence : "{text}" states in one word:"',
    'Name the feeling that the statement carries most. For this task, this sentence : "{text}" expresses in one word:"',
    'Say the same thing in other and fewer words. For this task, this sentence : "{text}" can be rephrased in one word:"',
    'Decide what another sentence must say to mean the same. For this task, this sentence : "{text}" means in one word:"',
    'Pick out the key fact that a report would open with. For this task, this sentence : "{text}" reports in one word:"',
    'Find who or what acts, and on what. For this task, this sentence : "{text}" is centred in one word:"',
)


def _one_word(template: str) -> dict[str, Any]:
    """Settings for a prompt whose last token is to say it all: read there, in a causal model."""
    return {
        "query_prompt": template,
        "document_prompt": template,
        "cleanup": "period-quotes",
        "pooling": "last",
        "start_layer": None,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Li & Li, BeLLM, NAACL 2024: the prompt of training and evaluation. Their last layer looks both ways, which
    # changes nothing for the last token: served as the causal model that it equals.
    "bellm": {**_one_word('The representative word for sentence {text} is:"'), "cleanup": "period"},
    # PromptEOL (github.com/kongds/scaling_sentemb)
    "prompteol": _one_word('This sentence : <PST> "{text}" means in one word:"'),
    # the prompt of AnglE's and BeLLM's layer analysis
    "summarize": _one_word('Summarize sentence <PST> "{text}" in one word:"'),
    # two longer prompts, as in Token Prepending (arXiv 2412.11556)
    "knowledge": _one_word(_KNOWLEDGE),
    "cot": _one_word('After thinking step by step , this sentence : <PST> "{text}" means in one word:"'),
    # MetaEOL (github.com/Yibin-Lei/MetaEOL): two prompts for each of four tasks, averaged; the wording is our own
    "metaeol": {**_one_word(""), "query_prompt": _META_TASKS, "document_prompt": _META_TASKS},
    # Echo (github.com/jakespringer/echo-embeddings): the second copy of the text has seen the whole of it
    "echo": {
        "query_prompt": "Query:{text}\nQuery again:{text}",
        "document_prompt": "Document:{text}\nDocument again:{text}",
        "pooling": "mean",
        "pooled_tokens": "text",
        "start_layer": None,
    },
}


def preset(name: str, token_prepending: bool) -> dict[str, Any]:
    """The settings of a preset.

    Raises EncoderError for an unknown name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise EncoderError(
            f"unknown preset {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(PRESETS)}")
        )
    settings = dict(PRESETS[name])
    if not token_prepending:
        for key in ("query_prompt", "document_prompt"):
            if isinstance(settings[key], str):
                settings[key] = settings[key].replace(f"{PLACEHOLDER} ", "")
    return settings
