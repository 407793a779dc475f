"""Generative De-duplication beside embell's duplicates, on the same labelled pairs: precision, recall and F1, and seconds.

    python benchmarks/generative.py --data DATA/dup [--sets mrpc quora] [--train citations quora] [--model DIR]

Generative De-duplication (Findings of EMNLP 2024, arXiv 2401.05883) trains a small seq2seq model to emit each text's keywords. Texts
whose keywords it reproduces count as memorised; those of them with the same keywords are a group, of which the first is kept.

The first table needs no training. Two texts can be of one group only if their keywords are the same, so the method finds a part of the
pairs with the same keywords. "At most" is the F1 of the best part there is: every true pair of them and no other.

The second table is the method, after one epoch and more. Its model is T5 as in the paper, but small and with random weights, not
flan-t5-small: so it needs more than the paper's one epoch, and a larger learning rate.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from duplicate_sets import PRIMARY, LabelledSet, load
from duplicates import versions
from labelled_duplicates import Pairs, by_rule, embell_scores, figures, tune_rule
from sklearn.feature_extraction.text import CountVectorizer
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from embell import Encoder, deduplicate
from embell.engine.pair_list import THRESHOLDS

Array = np.ndarray[Any, Any]

WORDS = 2
"""Keywords of a text, as in the paper's code."""
KINDS = {"top 2": (2, False), "top 2, any order": (2, True), "top 1": (1, False), "top 3": (3, False)}
"""How many keywords of two texts must be the same, and whether in any order."""
SHAPE = {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 512, "num_layers": 2, "dropout_rate": 0.1}
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
BATCH = 32
NOISE = 0.1
"""The share of the tokens whose encoding is replaced by noise, and the variance of that."""
TOKENS = 128
"""Of a text, the model reads no more."""
PAD, END = 0, 1


def keywords(texts: Sequence[str], encoder: Encoder, most: int = 3) -> list[list[str]]:
    """Of each text its words with the largest cosine to all of it, the largest first, as KeyBERT has them by default.

    Words are those of scikit-learn's CountVectorizer: two letters or more, lower case, without English stop words.
    """
    texts = [text.lower() for text in texts]
    taken = CountVectorizer(stop_words="english").build_analyzer()
    candidates = [sorted(set(taken(text))) for text in texts]
    words = sorted(set().union(*candidates))
    place = {word: position for position, word in enumerate(words)}
    vectors = encoder.encode(words, "document")
    found = []
    for document, own in zip(encoder.encode(texts, "document"), candidates, strict=True):
        cosine = vectors[[place[word] for word in own]] @ document
        found.append([own[position] for position in np.argsort(cosine, kind="stable")[::-1][:most]])
    return found


def groups(labels: Sequence[Any]) -> Array:
    """A number for each label, the same for the same."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])


def same_group(pairs: Pairs, group: Array) -> Array:
    """The pairs whose texts are of one group."""
    same: Array = group[pairs.first] == group[pairs.second]
    return same


def bound(one: LabelledSet, encoder: Encoder, chooser: Encoder) -> Array:
    """P, R and F1 of embell tuned and with its defaults, and of the same keywords of each kind; `chooser` chooses these."""
    train, test = Pairs.of(one.train), Pairs.of(one.test)
    shown, ours = (embell_scores(part, encoder.encode(part.texts, "document")) for part in (train, test))
    chosen = keywords(test.texts, chooser)
    answers = [by_rule(tune_rule(train.labels, shown), ours), by_rule(THRESHOLDS, ours)]
    for count, any_order in KINDS.values():
        labels = [tuple(sorted(words[:count]) if any_order else words[:count]) for words in chosen]
        answers.append(same_group(test, groups(labels)))
    return np.array([figures(answer, test.labels) for answer in answers])


def noisy(hidden: torch.Tensor) -> torch.Tensor:
    """Encodings of which some tokens' are replaced by noise, one number a token, as in the paper's code."""
    shape = (*hidden.shape[:2], 1)
    mask = torch.bernoulli(torch.full(shape, NOISE))
    return hidden * (1 - mask) / (1 - NOISE) + mask * NOISE**0.5 * torch.randn(shape)


def padded(rows: Sequence[list[int]], pad: int = PAD) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def reproduced(
    texts: Sequence[str], targets: Sequence[str], tokenizer: Any, after: Sequence[int]
) -> Iterator[tuple[int, Array, float, float]]:
    """After each of these epochs: which texts' keywords the model reproduces, and the CPU seconds of training so far and of decoding."""
    torch.manual_seed(0)
    read, said = (tokenizer(list(part), truncation=True, max_length=TOKENS)["input_ids"] for part in (texts, targets))
    # tokens that no text has are not computed: the rest are numbered anew, behind PAD and END
    kept = sorted({token for row in (*read, *said) for token in row})
    number = {token: position + 2 for position, token in enumerate(kept)}
    source, target = ([[number[token] for token in row] + [END] for row in rows] for rows in (read, said))

    def words(row: Sequence[int]) -> list[str]:
        """The first words, up to the end."""
        found = [*row, END][: [*row, END].index(END)]
        decoded: str = tokenizer.decode([kept[token - 2] for token in found if token > END])
        return decoded.split()[:WORDS]

    ends = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(kept) + 2, **SHAPE, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    longest = max(map(len, target))
    trained = 0.0
    for epoch in range(1, max(after) + 1):
        began = time.process_time()
        model.train()
        losses = []
        for batch in torch.randperm(len(source)).split(BATCH):
            ids = padded([source[place] for place in batch])
            hidden = model.encoder(input_ids=ids, attention_mask=ids != PAD).last_hidden_state
            loss = model(
                encoder_outputs=BaseModelOutput(noisy(hidden)),
                attention_mask=ids != PAD,
                labels=padded([target[place] for place in batch], -100),  # not counted
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        trained += time.process_time() - began
        print(f"    epoch {epoch}: loss {np.mean(losses):.3f}, {trained:.0f} s", file=sys.stderr, flush=True)
        if epoch in after:
            began = time.process_time()
            model.eval()
            found = []
            for begin in range(0, len(source), 256):
                ids = padded(source[begin : begin + 256])
                made = model.generate(ids, attention_mask=ids != PAD, do_sample=False, max_new_tokens=longest)
                found += [words(row[1:]) for row in made.tolist()]
            right = [one == words(other) for one, other in zip(found, target, strict=True)]
            yield epoch, np.array(right), trained, time.process_time() - began


def line(*cells: Any) -> None:
    """A row of a table; three figures are P / R / F1."""
    shown = [cell if isinstance(cell, str) else " / ".join(f"{value:.1f}" for value in cell) for cell in cells]
    print(f"| {' | '.join(shown)} |", flush=True)


def at_most(recall: float) -> str:
    """The F1 if no pair found were a wrong one."""
    return f"{200 * recall / (100 + recall):.1f}"


def report_bound(sets: Sequence[LabelledSet], encoder: Encoder, chooser: Encoder) -> None:
    print("\nPairs with the same keywords, P / R / F1\n")
    line("set", "embell, tuned", "embell, defaults", *KINDS, "top 2: F1 at most")
    print("|" + " --- |" * (len(KINDS) + 4))
    rows = {one.name: bound(one, encoder, chooser) for one in sets}
    for name, row in rows.items():
        line(name, *row, at_most(row[2, 1]))
    for name, of in (("mean of the primary sets", [key for key in rows if key in PRIMARY]), ("mean of all", list(rows))):
        if of:
            most = np.mean([float(at_most(rows[key][2, 1])) for key in of])
            line(f"**{name}**", *np.mean([rows[key] for key in of], axis=0), f"{most:.1f}")


def report_method(sets: Sequence[LabelledSet], encoder: Encoder, chooser: Encoder, after: Sequence[int]) -> None:
    print("\nThe method; seconds of CPU: keywords + training + decoding\n")
    line("set", "", "reproduced", "dropped", "P / R / F1", "seconds")
    print("|" + " --- |" * 6)
    tokenizer = Encoder.load().tokenizer  # of another encoder: the one that is timed stays as it is
    for one in sets:
        pairs = Pairs.of(one.test)
        began = time.process_time()
        found = deduplicate(pairs.texts, encoder=encoder)
        took = time.process_time() - began
        scores = embell_scores(pairs, encoder.encode(pairs.texts, "document"))
        name = f"{one.name}, {len(pairs.texts):,} texts"
        line(
            name,
            "embell, defaults",
            "",
            f"{len(found.dropped):,}",
            figures(by_rule(THRESHOLDS, scores), pairs.labels),
            f"{took:.1f}",
        )
        began = time.process_time()
        targets = [" ".join(words) for words in keywords(pairs.texts, chooser, WORDS)]
        took = time.process_time() - began
        group = groups(targets)
        same = figures(same_group(pairs, group), pairs.labels)
        line(name, "the same keywords", "100 %", f"{len(group) - len(set(group)):,}", same, f"{took:.1f}")
        for epoch, right, trained, decoded in reproduced([text.lower() for text in pairs.texts], targets, tokenizer, after):
            # a text that is not reproduced is a group of its own
            those = np.where(right, group, len(group) + np.arange(len(group)))
            line(
                name, f"{epoch} epoch{'s' * (epoch > 1)}", f"{100 * right.mean():.1f} %", f"{len(those) - len(set(those)):,}",
                figures(same_group(pairs, those), pairs.labels), f"{took:.1f} + {trained:.0f} + {decoded:.0f}",
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="*", help="of the first table; all sets unless given")
    parser.add_argument("--train", nargs="*", default=["citations", "quora"], help="sets of the second table")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--model", help="chooses the keywords; embell-mini unless given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder = Encoder.load(threads=1)
    chooser = Encoder.load(options.model, threads=1) if options.model else encoder
    print(f"{versions()}, transformers {version('transformers')}, scikit-learn {version('scikit-learn')}")
    print(f"\n    python {' '.join(sys.argv)}", flush=True)
    if options.sets is None or options.sets:
        report_bound(list(load(options.data, options.sets)), encoder, chooser)
    if options.train:
        report_method(list(load(options.data, options.train)), encoder, chooser, options.epochs)


if __name__ == "__main__":
    main()
