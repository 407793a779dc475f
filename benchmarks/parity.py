"""The same model through embell and through sentence-transformers: STS figures, and the largest difference of a component.

    python benchmarks/parity.py --model DIR --data DIR/sts

In float32, on one machine, in one run.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from embell import Encoder
from embell.engine.evaluation import read_pairs


@click.command()
@click.option("--model", required=True, help="A sentence-transformers directory or hub id.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of TSV files.")
@click.option("--threads", type=int, default=None, help="CPU threads.")
def main(model: str, data: Path, threads: int | None) -> None:
    """Compare both on every TSV file under --data with sentence1, sentence2 and a score."""
    encoder = Encoder.load(model, dtype="float32", threads=threads)
    theirs = SentenceTransformer(model, device="cpu")
    click.echo(f"{'':<28}{'pairs':>7}{'embell':>9}{'s-t':>9}{'difference':>12}{'components':>12}")
    for path in sorted(data.glob("*.tsv")):
        pairs = read_pairs(path)
        figures, apart = [], 0.0
        vectors = []
        for texts in (pairs.first, pairs.second):
            vectors.append((encoder.encode(texts), theirs.encode(texts, normalize_embeddings=True)))
            apart = max(apart, float(np.abs(vectors[-1][0] - vectors[-1][1]).max()))
        for first, second in zip(*vectors, strict=True):
            cosine = np.einsum("ij,ij->i", first.astype(np.float64), second.astype(np.float64))
            figures.append(100 * float(spearmanr(cosine, pairs.gold).statistic))
        click.echo(
            f"{path.stem:<28}{len(pairs.gold):>7,}{figures[0]:>9.3f}{figures[1]:>9.3f}{figures[0] - figures[1]:>12.4f}{apart:>12.1e}"
        )


if __name__ == "__main__":
    main()
