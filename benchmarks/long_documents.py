"""Retrieval among documents of more than 256 tokens, read whole and cut there.

    python benchmarks/long_documents.py --data DATA

Of each corpus only those documents stay, and the queries that have a relevant one among them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from embell import Encoder
from embell.engine.evaluation import evaluate_retrieval
from embell.indexers.corpora import CorpusOptions, CorpusReport, read_corpus

CUT = 256


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    whole = Encoder.load(options.model, dtype=options.dtype)
    cut = Encoder.load(options.model, dtype=options.dtype, max_length=CUT)
    print(f"| | queries | documents | read whole | cut at {CUT} tokens |\n| --- | ---: | ---: | ---: | ---: |")
    found = []
    for name, part in (("cranfield", ""), ("med", ""), ("cisi", ""), ("scifact", "_train")):
        source = options.data / "ir" / name
        with tempfile.TemporaryDirectory() as folder:
            to = Path(folder)
            documents = list(read_corpus([str(source / "corpus.jsonl")], CorpusOptions(), CorpusReport()))
            lengths = [len(row.ids) for row in whole.tokenise([one.text for one in documents], "document").rows]
            long = {one.id: one.text for one, length in zip(documents, lengths, strict=True) if length > CUT}
            lines = [json.dumps({"id": id, "text": text}) for id, text in long.items()]
            (to / "corpus.jsonl").write_text("\n".join(lines))
            judged, *lines = (source / f"qrels{part}.tsv").read_text().splitlines()
            (to / "qrels.tsv").write_text("\n".join([judged, *(line for line in lines if line.split("\t")[1] in long)]))
            (to / "queries.jsonl").write_text((source / f"queries{part}.jsonl").read_text())
            results = [evaluate_retrieval(encoder, to) for encoder in (whole, cut)]
        found.append([result.ndcg_at_10 for result in results])
        scores = " | ".join(f"{score:.3f}" for score in found[-1])
        print(f"| {name} | {results[0].queries} | {results[0].documents} | {scores} |", flush=True)
    print("| mean | | | " + " | ".join(f"{sum(column) / len(column):.3f}" for column in zip(*found, strict=True)) + " |")


if __name__ == "__main__":
    main()
