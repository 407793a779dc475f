"""Choices behind the embedded model, each at the same small budget: layers, where they look both ways, pooling, causal pre-training first.

    python -m embell.training.mini --data DATA --output texts.jsonl --scale 0.22
    python benchmarks/mini_choices.py --data DATA --texts texts.jsonl --teacher TEACHER --work FOLDER

All start from one token table, fitted as training/presets/embell-mini.toml has it, and read the same groups of texts once, in an order that the seed decides. Measured on sets that
choices are made on, and as the mean cosine to the teacher's vectors of texts that none has read. What is finished is kept in FOLDER; the same command goes on from there; another --texts, --steps or --teacher wants another folder.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tomllib
import torch
from transformers import LlamaForCausalLM, LlamaModel

from embell.engine import Encoder, backbone
from embell.engine.evaluation import evaluate_retrieval, evaluate_sts
from embell.training import pretrain as next_token
from embell.training.batches import Batches, Examples, plan_batches
from embell.training.distill import distill
from embell.training.fresh import RESIDUAL, ShapeOptions, fresh_student
from embell.training.nesting import NestingOptions
from embell.training.run import RunOptions, train
from embell.training.run_directory import begin, finish
from embell.training.student import EncoderOptions
from embell.training.teacher import Teacher
from embell.training.texts import TokenisedTexts

PRESET = Path(__file__).parents[1] / "training" / "presets" / "embell-mini.toml"
PAIRS = ("stsb-dev", "sick-trial", "sts12-train", "stsb-train", "sick-train")
FOLDERS = ("adi", "lisa")
HELD = 5000
# name: layers, first that looks both ways (None: causal), pooling, pre-trained first, seed
VARIANTS: dict[str, tuple[int, int | None, str, bool, int]] = {
    "as shipped": (2, 1, "mean", False, 0),
    "another seed": (2, 1, "mean", False, 1),
    "both look both ways": (2, 0, "mean", False, 0),
    "causal": (2, None, "mean", False, 0),
    "weighted mean": (2, 1, "weighted-mean", False, 0),
    "weighted mean, another seed": (2, 1, "weighted-mean", False, 1),
    "last token": (2, 0, "last", False, 0),
    "pre-trained first": (2, 1, "mean", True, 0),
    "one layer": (1, 0, "mean", False, 0),
    "three layers": (3, 2, "mean", False, 0),
}


def preset(*names: str) -> dict[str, Any]:
    settings = tomllib.loads(PRESET.read_text())
    return {name: settings[name] for name in names}


def start(teacher: Teacher, texts: list[str], work: Path, layers: int) -> Path:
    """A student of so many untrained layers over the one fitted table."""
    shape = ShapeOptions(**preset("new_layers", "hidden", "inner", "heads", "vocabulary", "positions", "epsilon"))
    fitted = Path(fresh_student(shape, teacher, texts, work / "fitted", 0, *preset("fit_steps", "phrases").values()))
    folder = work / f"start-{layers}"
    if not folder.is_dir():
        with backbone.quietly():
            table = LlamaModel.from_pretrained(fitted).embed_tokens.weight
            torch.manual_seed(0)
            network = LlamaModel(replace(shape, new_layers=layers).config())
            with torch.no_grad():
                network.embed_tokens.weight.copy_(table)
                for name, weight in network.named_parameters():
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        weight.mul_(RESIDUAL)
            part = folder.with_suffix(".part")
            backbone.load_tokenizer(fitted).save_pretrained(part)
            network.save_pretrained(part)
            part.replace(folder)
    return folder


def pretrained(decoder: Path, texts: list[str], work: Path, steps: int) -> Path:
    """The student's layers after predicting next tokens over the fitted table, which stays as it is; the output has a table of its own."""
    folder = work / "pretrained"
    with begin(folder, f"steps = {steps}\n", ()) as found:
        if found:
            return found
        with backbone.quietly():
            network = LlamaForCausalLM.from_pretrained(decoder, tie_word_embeddings=False)
        network.lm_head.weight.data.copy_(network.model.embed_tokens.weight.data)
        network.model.embed_tokens.requires_grad_(False)
        shape = ShapeOptions(**preset("new_layers", "hidden", "inner", "heads", "vocabulary", "positions", "epsilon"))
        tokens = TokenisedTexts(Encoder.load(decoder, dtype="float32"))

        def make(numbers: Any) -> Examples:
            return Examples([[row for row in tokens([texts[at] for at in numbers], "document") if len(row.ids) > 1]])

        def loss(deep: list[torch.Tensor], shallow: Any, targets: Any) -> torch.Tensor:
            return deep[0][:, 0].sum() / deep[0][:, 1].sum()

        def save(directory: Path) -> None:
            with backbone.quietly():
                network.model.save_pretrained(directory)
                backbone.load_tokenizer(decoder).save_pretrained(directory)

        run = RunOptions(steps=steps, batch=256, learning_rate=1.5e-3, optimizer="muon", report_every=25)
        plan = plan_batches([()] * len(texts), run.batch, run.epochs, run.seed)
        train(next_token._NextToken(network, shape), Batches(plan, make), loss, folder, run, {})
        return finish(folder, save)


def measured(name: str, options: argparse.Namespace, teacher: Teacher, texts: list[str], held: list[str]) -> dict[str, float]:
    """Train one variant and measure it."""
    layers, first, pooling, before, seed = VARIANTS[name]
    work = options.work
    folder = work / name.replace(" ", "-")
    result = folder.with_suffix(".json")
    if result.is_file():
        return dict(orjson.loads(result.read_bytes()))
    model = start(teacher, texts, work, layers)
    if before:
        model = pretrained(model, texts, work, options.pretrain_steps)
    if not folder.exists():  # teacher and texts are the same for all
        folder.mkdir()
        (folder / "config.toml").touch()
        (folder / "teacher").symlink_to((work / "teacher").resolve())
    settings = preset("optimizer", "learning_rate", "table_rate", "batch", "schedule")
    trained = distill(
        (work / "train.jsonl",), folder, model=str(model), teacher=options.teacher, teacher_length=256, principal=True,
        near_weight=20.0, encoder=EncoderOptions(start_layer=first, causal=first is None, pooling=pooling),
        nesting=NestingOptions(widths=(64, 128, 256), depths=(1,) if layers > 1 else ()),
        run=RunOptions(**settings, steps=options.steps, seed=seed, checkpoint_every=100_000, report_every=25),
    )  # fmt: skip
    encoder = Encoder.load(trained, dtype="float32")
    wanted = teacher.turned(torch.from_numpy(np.asarray(teacher.encoder.encode(held), np.float32)))[:, : encoder.dim]
    ours = torch.from_numpy(np.asarray(encoder.encode(held), np.float32))
    found = {"cosine": float(torch.cosine_similarity(ours, wanted).mean())}
    for pairs in PAIRS:
        found[pairs] = evaluate_sts(encoder, options.data / "sts" / f"{pairs}.tsv").spearman
    for questions in FOLDERS:
        found[questions] = evaluate_retrieval(encoder, options.data / "ir" / questions).ndcg_at_10
    result.write_bytes(orjson.dumps(found))
    shutil.rmtree(folder)
    return found


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--only", action="append", choices=list(VARIANTS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    needed = options.steps * preset("batch")["batch"]
    with options.texts.open("rb") as file:
        lines = [line for _, line in zip(range(needed + HELD), file, strict=False)]
    if len(lines) < needed + HELD:
        raise SystemExit(f"{options.texts}: {len(lines):,} groups of texts; {needed + HELD:,} are needed")
    (options.work / "train.jsonl").write_bytes(b"".join(lines[:needed]))
    texts = list(dict.fromkeys(chain.from_iterable(orjson.loads(line)["texts"] for line in lines[:needed])))
    seen = set(texts)
    held = [text for line in lines[needed:] for text in orjson.loads(line)["texts"][:1] if text not in seen]
    teacher = Teacher(options.teacher, 256, options.work / "teacher", texts, True, None, (options.work / "teacher").is_dir())
    columns = ("cosine", *PAIRS, "mean", *FOLDERS)
    print("| | " + " | ".join(columns) + " |\n| ---" + " | ---:" * len(columns) + " |")
    for name in options.only or VARIANTS:
        found = measured(name, options, teacher, texts, held)
        found["mean"] = float(np.mean([found[pairs] for pairs in PAIRS]))
        shown = [f"{found[one]:.1f}" if one in (*PAIRS, "mean") else f"{found[one]:.3f}" for one in columns]
        print(f"| {name} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
