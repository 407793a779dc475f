"""Texts to token rows: the prompt around each text, the cut of long ones, and which tokens pooling reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from embell.engine.spec import PLACEHOLDER, all_prompts
from embell.errors import EncoderError, TextError

if TYPE_CHECKING:
    from tokenizers import Encoding

    from embell.engine.spec import EncoderSpec
    from embell.engine.tokenizer import TextTokenizer

Kind = Literal["document", "query"]
_SLOT = "{text}"

_TOKENIZING = threading.Lock()
"""A tokenizer's limit on length is part of its state: whoever sets it must be alone until the texts are through."""


def _after_fork() -> None:
    global _TOKENIZING
    _TOKENIZING = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(slots=True)
class TokenRow:
    """The tokens of one prompted text, or of one piece of it.

    Pooling reads `ids[begin:end]`. `placeholder` is the place of token prepending's token, -1 if there is none.
    """

    ids: list[int]
    begin: int
    end: int
    placeholder: int = -1


@dataclass(slots=True)
class Tokenised:
    """Rows of a list of texts; text `owners[i]` takes the vector of row i with `weights[i]`, which sum to 1 for each text."""

    rows: list[TokenRow] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    long: list[int] = field(default_factory=list)
    """The texts that are longer than the model takes: cut, or encoded in pieces."""


class Template:
    """A prompt, taken apart once: what stands before, between and after the copies of the text."""

    def __init__(self, template: str) -> None:
        marked = template.replace(f"{PLACEHOLDER} ", PLACEHOLDER)
        before, *between = marked.split(_SLOT)
        self.placeholder = marked.find(PLACEHOLDER)
        self.before = before.replace(PLACEHOLDER, "")
        self.between = between[0] if len(between) == 2 else None
        self.after = between[-1]

    @property
    def copies(self) -> int:
        return 1 if self.between is None else 2

    @property
    def plain(self) -> bool:
        """Whether nothing follows the text, so that the tokenizer's own truncation cuts the text and nothing else."""
        return self.copies == 1 and not self.after

    def fill(self, text: str) -> str:
        # put together, not replaced: the text itself may contain what looks like a slot
        first = "" if self.between is None else text + self.between
        return self.before + first + text + self.after

    def slot(self, text: str) -> tuple[int, int]:
        """Where the last copy of the text stands in what `fill` gives, in characters."""
        begin = len(self.before) + (0 if self.between is None else len(text) + len(self.between))
        return begin, begin + len(text)


def clean_up(text: str, how: str) -> str:
    """Put the end of a sentence in order, as prompts for language models want it (PromptEOL, BeLLM)."""
    if how == "none":
        return text
    text = text.strip()
    if text and text[-1] not in ".?\"'":
        text += "."
    if how == "period-quotes":
        text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


class TextTokens:
    """Turns texts into token rows as a spec says."""

    def __init__(
        self, tokenizer: TextTokenizer, spec: EncoderSpec, special_tokens: bool = True, unknown: int | None = None
    ) -> None:
        """`unknown` is a token id that is left out where a text has others (static models)."""
        self.tokenizer = tokenizer
        self._spec = spec
        self._special = special_tokens
        self._unknown = unknown
        self._templates = {
            "query": [Template(prompt) for prompt in all_prompts(spec.query_prompt)],
            "document": [Template(prompt) for prompt in all_prompts(spec.document_prompt)],
        }
        self._prompt_lengths: dict[str, int] = {}
        self._placeholder_id = int(tokenizer.pad_token_id == 0)  # which token it is does not matter: its state is replaced
        templates = [template for listed in self._templates.values() for template in listed]
        # Some models want the end of a long text, not its beginning. With a prompt in front that would cut the prompt.
        self._unprompted = all(template.fill("") == "" for template in templates)
        if any(self._length("", template) >= spec.max_length for template in templates if template.fill("")):
            raise EncoderError(
                f"the prompt alone fills the maximum length of {spec.max_length} tokens; shorten it or raise max_length"
            )

    def __call__(self, texts: Sequence[str], kind: Kind) -> Tokenised:
        """The rows of all texts, in order.

        Raises TextError for a long text of which no beginning fits.
        """
        if kind not in self._templates:
            raise EncoderError(f"kind is 'document' or 'query', not {kind!r}")
        templates = self._templates[kind]
        cleaned = [clean_up(text, self._spec.cleanup) for text in texts]
        out = Tokenised()
        long: set[int] = set()
        for template in templates:
            pieces, owners, too_long = self._pieces(cleaned, template)
            if self._unknown is not None:
                pieces = [_without(row, self._unknown) for row in pieces]
            long.update(too_long)
            counts = [0] * len(texts)
            for row, owner in zip(pieces, owners, strict=True):
                counts[owner] += row.end - row.begin
            for row, owner in zip(pieces, owners, strict=True):
                share = (row.end - row.begin) / counts[owner] if counts[owner] else 1.0
                out.rows.append(row)
                out.owners.append(owner)
                out.weights.append(share / len(templates))
        out.long = sorted(long)
        return out

    def _pieces(self, texts: list[str], template: Template) -> tuple[list[TokenRow], list[int], list[int]]:
        longest = self._spec.max_length
        rows = self._rows(texts, template)
        long = [at for at, row in enumerate(rows) if len(row.ids) > longest]
        if not long:
            return rows, list(range(len(rows))), long
        pieces: list[TokenRow] = []
        owners: list[int] = []
        cut = set(long)
        for at, row in enumerate(rows):
            parts = [row]
            if at in cut:
                try:
                    if self._spec.on_long == "chunk":
                        parts = self._rows(self._split(texts[at], template), template)
                    else:
                        parts = [self._cut(texts[at], template, len(row.ids))]
                except _NoRoomError:
                    reason = f"has no room beside the prompt in the maximum length of {longest} tokens; raise max_length"
                    raise TextError([at], reason) from None
            pieces += parts
            owners += [at] * len(parts)
        return pieces, owners, long

    def _rows(self, texts: list[str], template: Template, cut: bool = False) -> list[TokenRow]:
        """A row for each text; only with `cut` are they held to the maximum length."""
        offsets = template.placeholder >= 0 or self._spec.pooled_tokens == "text"
        encoded = self._encode([template.fill(text) for text in texts], offsets, cut)
        skip = self._prompt_length(template) if self._spec.pooled_tokens == "after-prompt" else 0
        rows = []
        for text, encoding in zip(texts, encoded, strict=True):
            ids = encoding.ids
            begin, end, place = min(skip, max(0, len(ids) - 1)), len(ids), -1
            if offsets:
                spans = encoding.offsets
                if self._spec.pooled_tokens == "text":
                    begin, end = _text_span(spans, *template.slot(text), bool(template.after))
                if template.placeholder >= 0:
                    place = next((i for i, (_, last) in enumerate(spans) if last > template.placeholder), len(ids))
                    ids = [*ids[:place], self._placeholder_id, *ids[place:]]
                    begin += self._spec.pooled_tokens != "all" and begin >= place
                    end += end >= place
            rows.append(TokenRow(ids, begin, end, place))
        return rows

    def _encode(self, texts: list[str], offsets: bool, cut: bool = False, special: bool | None = None) -> list[Encoding]:
        backend = self.tokenizer.backend_tokenizer
        encode = backend.encode_batch if offsets else backend.encode_batch_fast
        with _TOKENIZING:
            if backend.padding is not None:  # other users of the tokenizer may have set it
                backend.no_padding()
            if cut:
                backend.enable_truncation(self._spec.max_length, direction=self.tokenizer.truncation_side)
            elif backend.truncation is not None:
                backend.no_truncation()
            encodings: list[Encoding] = encode(texts, add_special_tokens=self._special if special is None else special)
        return encodings

    def _length(self, text: str, template: Template) -> int:
        return len(self._encode([template.fill(text)], False)[0].ids) + (template.placeholder >= 0)

    def _prompt_length(self, template: Template) -> int:
        """Tokens of the prompt alone, without a special token at its end: how sentence-transformers counts them."""
        if template.before not in self._prompt_lengths:
            ids = self._encode([template.before], False)[0].ids if template.before else []
            special = bool(ids) and ids[-1] in self.tokenizer.all_special_ids
            self._prompt_lengths[template.before] = len(ids) - special
        return self._prompt_lengths[template.before]

    def _cut(self, text: str, template: Template, length: int) -> TokenRow:
        """The row of the longest beginning of the text that fits. The text is cut, never the prompt around it."""
        its_own = self.tokenizer.truncation_side == "right" or self._unprompted
        if template.plain and template.placeholder < 0 and its_own:
            return self._rows([text], template, cut=True)[0]
        ends = self._ends(text)
        keep = len(ends) - -(-(length - self._spec.max_length) // template.copies)
        return self._fit(text, template, ends, 0, keep)[1]

    def _fit(self, text: str, template: Template, ends: list[int], begin: int, keep: int) -> tuple[int, TokenRow]:
        """The row of at most `keep` tokens of the text from token `begin` on, and how many of them fit."""
        start = ends[begin - 1] if begin else 0
        while keep > 0:
            row = self._rows([text[start : ends[begin + keep - 1]]], template)[0]
            if len(row.ids) <= self._spec.max_length:
                return keep, row
            # a cut can split a merge into more tokens than it had
            keep -= max(1, (len(row.ids) - self._spec.max_length) // template.copies)
        raise _NoRoomError

    def _split(self, text: str, template: Template) -> list[str]:
        """The text in pieces that fit, cut between words where there is one in the last quarter of a piece."""
        ends = self._ends(text)
        room = max(1, (self._spec.max_length - self._length("", template)) // template.copies)
        pieces = []
        begin = 0
        while begin < len(ends):
            keep, _ = self._fit(text, template, ends, begin, min(room, len(ends) - begin))
            while begin + keep < len(ends) and ends[begin + keep] == ends[begin + keep - 1]:
                keep += 1  # further tokens of a character that the piece holds already
            if begin + keep < len(ends):
                for shorter in range(keep, keep - keep // 4, -1):
                    at = ends[begin + shorter - 1]
                    if text[at - 1].isspace() or text[at].isspace():
                        keep = shorter
                        break
            pieces.append(text[ends[begin - 1] if begin else 0 : ends[begin + keep - 1]])
            begin += keep
        return [piece for piece in pieces if piece.strip()] or pieces[:1]

    def _ends(self, text: str) -> list[int]:
        """Where each token of the text ends, in characters."""
        return [end for _, end in self._encode([text], True, special=False)[0].offsets]


class _NoRoomError(Exception):
    """Not even the first character of a text fits beside the prompt."""


def _without(row: TokenRow, token: int) -> TokenRow:
    """The row without a token, unless pooling would be left with nothing."""
    kept = [at for at, other in enumerate(row.ids) if other != token]
    begin, end = (sum(at < border for at in kept) for border in (row.begin, row.end))
    return TokenRow([row.ids[at] for at in kept], begin, end) if end > begin else row


def _text_span(spans: list[tuple[int, int]], first: int, last: int, followed: bool) -> tuple[int, int]:
    """The tokens of the characters from `first` to `last`, and the special ones after them if no prompt follows."""
    inside = [at for at, (begin, end) in enumerate(spans) if end > first and begin < last and end > begin]
    if not inside:
        return 0, 0
    return inside[0], inside[-1] + 1 if followed else len(spans)
