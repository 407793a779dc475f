"""The tokens of a new decoder: byte-level BPE, and tokens that join neighbours, across words if need be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from embell.errors import UsageError

PAD = "<pad>"


def train_tokenizer(texts: Iterable[str], size: int, longest: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on NFKC-normalised, lower-cased text with white space folded; no token is ever unknown.

    Raises UsageError for a vocabulary with no room for the 256 bytes.
    """
    if size < 258:
        raise UsageError(f"vocabulary must be at least 258, not {size}: the bytes alone take 256 tokens")
    tokenizer = Tokenizer(models.BPE())
    fold = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *fold])
    # The prefix space makes a word at the start of a text the same token as elsewhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, longest)


def join(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[int, int]], most: int
) -> tuple[PreTrainedTokenizerFast, list[tuple[int, int]]]:
    """The tokenizer with one more token for each of the first `most` pairs of neighbouring tokens, and these pairs.

    They are merges like all others and come after them; the text is not split into words any more, so that a merge may
    reach over a space. A pair whose string is a token already is left out.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    taken: list[tuple[int, int]] = []
    for first, second in pairs:
        name = names[first] + names[second]
        if len(taken) < most and name not in vocabulary:
            vocabulary[name] = len(vocabulary)
            merges.append((names[first], names[second]))
            taken.append((first, second))
    joined = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    joined.model = models.BPE(vocabulary, merges)
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    return _wrapped(joined, tokenizer.model_max_length), taken


def _wrapped(tokenizer: Tokenizer, longest: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        padding_side="right",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
