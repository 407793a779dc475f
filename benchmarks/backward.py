"""What the backward dependency buys: one small decoder, the same data and steps, and layers that look both ways from another one on.

    python benchmarks/backward.py --data DATA --work FOLDER

First a decoder is pre-trained (once) and scored at every depth. Then each combination of start layer and pooling is trained contrastively with three
seeds, each run on one core, as many at a time as there are cores, and measured on STS. What is finished is kept in FOLDER; the same
command goes on from there. Prints a table, and writes FOLDER/backward.png and FOLDER/backward.svg.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a run is measured in minutes of one core

import numpy as np
import orjson

SHAPE = {"new_layers": 6, "hidden": 192, "inner": 512, "heads": 6, "vocabulary": 8192, "positions": 256}
STARTS = {"causal": None, "last layer": 5, "last two": 4, "all": 0}
SETS = ("sts12.tsv", "sts14.tsv", "sts15.tsv", "stsb-test.tsv", "sick-test.tsv")
SEEDS = (0, 1, 2)


def texts(data: Path, target: Path, count: int) -> Path:
    """Sentences of the shippable sources, without those that scores are measured on."""
    from embell.training import sources

    if not target.is_file():
        chosen = sources.select(
            ["text/enwiki_b.jsonl.xz", "text/enwiki_a.jsonl.xz", "pairs/snli-dev.tsv.xz", "pairs/snli-test.tsv.xz"]
        )
        groups, _ = sources.collect(data, chosen, count / 275_000, 0)
        lines = [orjson.dumps({"texts": group}, option=orjson.OPT_APPEND_NEWLINE) for group in groups]
        target.write_bytes(b"".join(lines))
    return target


def pretrained(data: Path, work: Path, steps: int) -> Path:
    from embell.training.fresh import ShapeOptions
    from embell.training.pretrain import pretrain
    from embell.training.run import RunOptions

    run = RunOptions(steps=steps, batch=96, learning_rate=1.5e-3, optimizer="muon", epochs=4, threads=1, report_every=50)
    return pretrain(
        (texts(data, work / "texts.jsonl", 110_000),), work / "decoder", piece=128, shape=ShapeOptions(**SHAPE), run=run
    )


def trained(job: tuple[Path, Path, str, str, int, int]) -> dict[str, Any]:
    """One run: contrastive training on natural language inference, then STS."""
    data, work, start, pooling, seed, steps = job
    result = work / f"{start.replace(' ', '-')}-{pooling}-{seed}.json"
    if result.is_file():
        return dict(orjson.loads(result.read_bytes()))
    from embell.engine import Encoder
    from embell.engine.evaluation import evaluate_sts
    from embell.training.contrastive import contrastive
    from embell.training.run import RunOptions
    from embell.training.student import EncoderOptions

    began = time.process_time()
    first = STARTS[start]
    model = contrastive(
        tuple(
            data / "pairs" / name
            for name in ("snli-dev.tsv.xz", "snli-test.tsv.xz", "xnli-en-validation.tsv", "xnli-en-test.tsv.xz")
        ),
        work / "runs" / result.stem,
        model=str(work / "decoder" / "model"),
        nli=True,
        encoder=EncoderOptions(start_layer=first, causal=first is None, pooling=pooling),
        run=RunOptions(steps=steps, epochs=20, batch=128, learning_rate=5e-4, seed=seed, threads=1, report_every=50),
    )
    minutes = (time.process_time() - began) / 60
    encoder = Encoder.load(model, dtype="float32", threads=1)
    scores = {name: evaluate_sts(encoder, data / "sts" / name).spearman for name in SETS}
    found = {"start": start, "pooling": pooling, "seed": seed, "minutes": minutes, "scores": scores}
    result.write_bytes(orjson.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    decoder = pretrained(options.data, options.work, options.pretrain_steps)

    from embell.engine import Encoder
    from embell.engine.evaluation import read_pairs
    from embell.engine.layers import sweep

    curve = sweep(Encoder.load(decoder, start_layer=None, dtype="float32"), read_pairs(options.data / "sts" / "stsb-dev.tsv"))
    jobs = [
        (options.data, options.work, start, pooling, seed, options.steps)
        for seed in SEEDS
        for pooling in ("mean", "last")
        for start in STARTS
        if (start, pooling) != ("last layer", "last")  # equals the causal model (methods: the last token sees all others anyway)
    ]
    random.Random(0).shuffle(jobs)  # so that a slow hour of the machine does not fall on one row
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(trained, jobs))

    print(
        "| layers that look both ways | pooling | "
        + " | ".join(name.partition(".")[0] for name in SETS)
        + " | mean (seeds) | CPU minutes |"
    )
    print("| --- " * (len(SETS) + 4) + "|")
    rows: dict[tuple[str, str], tuple[float, float]] = {}
    for pooling in ("mean", "last"):
        for start in STARTS:
            chosen = [run for run in runs if (run["start"], run["pooling"]) == (start, pooling)]
            if not chosen:
                continue
            means = [float(np.mean(list(run["scores"].values()))) for run in chosen]
            rows[start, pooling] = float(np.mean(means)), float(np.std(means, ddof=1))
            each = " | ".join(f"{np.mean([run['scores'][name] for run in chosen]):.1f}" for name in SETS)
            minutes = np.mean([run["minutes"] for run in chosen])
            print(
                f"| {start} | {pooling} | {each} | {rows[start, pooling][0]:.2f} ± {rows[start, pooling][1]:.2f} | {minutes:.1f} |"
            )
    print("\n| depth | mean pooling | last token | dependence on later tokens |\n| --- | --- | --- | --- |")
    for depth in curve.depths:
        print(f"| {depth.depth} | {depth.spearman['mean']:.1f} | {depth.spearman['last']:.1f} | {depth.later:.3f} |")
    draw(curve, rows, options.work / "backward")


def draw(curve: Any, rows: dict[tuple[str, str], tuple[float, float]], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    depths = [depth.depth for depth in curve.depths]
    for pooling in ("mean", "last"):
        left.plot(depths, [depth.spearman[pooling] for depth in curve.depths], marker="o", label=f"{pooling} pooling")
    left.set(xlabel="layers kept of the pre-trained decoder", ylabel="STS-B dev, Spearman × 100", title="before training")
    left.legend()
    for at, pooling in enumerate(("mean", "last")):
        places = [place for place, start in enumerate(STARTS) if (start, pooling) in rows]
        found = [rows[start, pooling] for start in STARTS if (start, pooling) in rows]
        right.errorbar(
            [place + 0.1 * at for place in places], [mean for mean, _ in found], [spread for _, spread in found], marker="o",
            linestyle="none", capsize=4, label=f"{pooling} pooling",
        )  # fmt: skip
    right.set_xticks(range(len(STARTS)), list(STARTS))
    right.set(
        xlabel="layers that look both ways", ylabel="mean of five STS sets", title="after contrastive training, three seeds"
    )
    right.legend()
    for suffix in ("png", "svg"):
        figure.savefig(target.with_suffix(f".{suffix}"), dpi=110)


if __name__ == "__main__":
    main()
