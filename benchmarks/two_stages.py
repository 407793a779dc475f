"""Two stages for another language, as L3Cube made MahaSBERT and HindSBERT: pairs, then scored pairs; on Hindi and Marathi STS.

    python benchmarks/two_stages.py --data DATA --work FOLDER

One small decoder is pre-trained on the text in both languages that there is, made an encoder by `training/presets/pairs.toml`, and by
`training/presets/graded.toml` for each language. Spearman × 100 on the translated STS-B test sets after each stage, and with the second
stage alone. About half an hour on two cores; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import orjson

PRESETS = Path(__file__).parent.parent / "training" / "presets"


def sentences(data: Path) -> Iterator[str]:
    from embell.training.sources import read_rows

    columns = {
        "xnli-hi-validation.tsv.xz": ("premise", "hypothesis"), "xnli-hi-test.tsv.xz": ("premise", "hypothesis"),
        "stsb-hi-train.tsv.xz": ("sentence1", "sentence2"), "stsb-mr-train.tsv.xz": ("sentence1", "sentence2"),
        "mahaparaphrase-train.tsv.xz": ("sentence1", "sentence2"), "tatoeba-en-hi.tsv": ("hi",), "tatoeba-en-mr.tsv.xz": ("mr",),
        "xquad/hi.corpus.jsonl": ("text",),
    }  # fmt: skip
    seen = set()
    for name, wanted in columns.items():
        for row in read_rows(data / "multi" / name):
            for column in wanted:
                if row[column] and row[column] not in seen:
                    seen.add(row[column])
                    yield row[column]


def pairs(data: Path) -> Iterator[dict[str, str]]:
    """Entailments of Hindi XNLI with a contradiction of the same premise, and Marathi paraphrases."""
    from embell.training.pairs import read_nli
    from embell.training.sources import read_rows

    for triplet in read_nli([data / "multi" / name for name in ("xnli-hi-validation.tsv.xz", "xnli-hi-test.tsv.xz")]):
        row = {"query": triplet.query, "positive": triplet.positive}
        yield {**row, "negative": triplet.negatives[0]} if triplet.negatives else row
    for table_row in read_rows(data / "multi" / "mahaparaphrase-train.tsv.xz"):
        if table_row["label"] == "P" and table_row["sentence1"] != table_row["sentence2"]:
            yield {"query": table_row["sentence1"], "positive": table_row["sentence2"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    data, work = options.data, options.work
    work.mkdir(parents=True, exist_ok=True)

    from embell.engine import Encoder
    from embell.engine.evaluation import evaluate_sts
    from embell.training.contrastive import contrastive
    from embell.training.graded import graded
    from embell.training.pretrain import pretrain
    from embell.training.recipe import configure

    shared = {"threads": options.threads}
    text, paired = work / "text.jsonl", work / "pairs.jsonl"
    if not paired.is_file():
        text.write_bytes(b"".join(orjson.dumps({"text": one}) + b"\n" for one in sentences(data)))
        paired.write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in pairs(data)))
    shape = {"new_layers": 4, "hidden": 192, "inner": 512, "heads": 6, "vocabulary": 8192, "positions": 256}
    settings = {
        "data": [str(text)],
        "output": str(work / "decoder"),
        "batch": 128,
        "steps": 300,
        "learning_rate": 1.5e-3,
        "optimizer": "muon",
    }
    decoder = pretrain(**configure(pretrain, None, {**settings, **shape, **shared}))
    settings = {"data": [str(paired)], "output": str(work / "pairs"), "model": str(decoder)}
    first = contrastive(**configure(contrastive, PRESETS / "pairs.toml", {**settings, **shared}))

    print("| language | pre-trained decoder | pairs | pairs, then scored | scored alone |\n| --- | --- | --- | --- | --- |")
    for language in ("hi", "mr"):
        scored = [str(data / "multi" / f"stsb-{language}-train.tsv.xz")]
        made = [decoder, first]
        for name, start in (("both", first), ("graded-alone", decoder)):
            settings = {"data": scored, "output": str(work / f"{language}-{name}"), "model": str(start)}
            if start == decoder:
                settings |= {"start_layer": -2, "pooling": "mean"}
            made.append(graded(**configure(graded, PRESETS / "graded.toml", {**settings, **shared})))
        test = data / "multi" / f"stsb-{language}-test.tsv"
        scores = [evaluate_sts(Encoder.load(model, dtype="float32", pooling="mean"), test).spearman for model in made]
        print(f"| {language} | " + " | ".join(f"{score:.1f}" for score in scores) + " |", flush=True)


if __name__ == "__main__":
    main()
