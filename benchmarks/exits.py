"""The embedded model and its early exit, encoding the same texts in turns.

    python benchmarks/exits.py --data DATA

Texts are those of `encode.py`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from encode import slices

from embell import Encoder


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    encoders = {"whole": Encoder.load(), "exit": Encoder.load(layers=1, start_layer=None)}
    print("| | whole, texts/s | exit after layer 0, texts/s | ratio |\n| --- | --- | --- | --- |")
    for corpus, each in (("short", 1000), ("abstracts", 200)):
        warm, *rounds = slices(corpus, options.data, options.rounds, each)
        seconds: dict[str, list[float]] = {name: [] for name in encoders}
        for encoder in encoders.values():
            encoder.encode(warm)
        for number, texts in enumerate(rounds):
            for name in sorted(encoders, reverse=number % 2 == 0):
                began = time.perf_counter()
                encoders[name].encode(texts)
                seconds[name].append(time.perf_counter() - began)
        whole, exit = (np.array(seconds[name]) for name in ("whole", "exit"))
        rates = " | ".join(f"{each / np.median(taken):,.0f}" for taken in (whole, exit))
        print(f"| {corpus} | {rates} | {np.median(whole / exit):.2f} |", flush=True)


if __name__ == "__main__":
    main()
