"""Search and joins beside FAISS, hnswlib and usearch, on the same stored vectors in the same run.

    python benchmarks/search.py --data DATA --work FOLDER [--rows 200000] [--only exact join tuned filters]

Encodes sentences of the shared corpora with the embedded model (once; kept in FOLDER), and makes clustered synthetic vectors. Runs alternate
between us and the peer, `--repeat` times; medians are printed. hnswlib and usearch take part where they are installed.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import orjson

Array = np.ndarray[Any, Any]
WIDE = 384
"""Width of the synthetic vectors."""


def sentences(data: Path, count: int) -> list[str]:
    """Different sentences and short texts of the sources that may be trained on."""
    from embell.training import sources

    found: list[str] = []
    groups, _ = sources.collect(data, sources.select(None), count / 350_000, 1)
    for group in groups:
        found += [text for text in group if 20 <= len(text) <= 300]
    if len(found) < count:
        raise SystemExit(f"{len(found):,} texts only; ask for fewer --rows")
    return found[:count]


def vectors(data: Path, work: Path, rows: int) -> tuple[Array, Array]:
    """Stored rows `(rows, dim)` in float16, and 2 000 queries `(2000, dim)` in float32 of length 1."""
    from embell.engine import Encoder
    from embell.indexers.codes import renormalise

    path = work / f"sentences-{rows}.npy"
    if not path.is_file():
        np.save(path, Encoder.load().encode(sentences(data, rows + 2000)).astype(np.float16))
    stored = np.load(path)
    return stored[:rows], renormalise(stored[rows:])


def synthetic(rows: int) -> tuple[Array, Array]:
    """Rows around 4 000 centres, and queries around the same."""
    from embell.indexers.codes import renormalise

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4000, WIDE), np.float32)

    def some(count: int) -> Array:
        return renormalise(centres[rng.integers(0, 4000, count)] + 0.7 * rng.standard_normal((count, WIDE), np.float32))

    stored = np.concatenate([some(min(50_000, rows - begin)).astype(np.float16) for begin in range(0, rows, 50_000)])
    return stored, some(2000)


def seconds(*works: Callable[[], Any], repeat: int) -> list[float]:
    """The median time of each, run in turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeat):
        for taken, work in zip(times, works, strict=True):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return [float(np.median(taken)) for taken in times]


def awake(work: Callable[[], Any]) -> float:
    """Its time, begun when OpenMP's threads of the work before have gone to sleep, and this one has not."""
    until = time.perf_counter() + 0.02
    while time.perf_counter() < until:
        pass
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"


def exact(name: str, rows: Array, queries: Array, repeat: int) -> None:
    """Exact top ten, one query at a time and in batches, against IndexFlatIP."""
    from embell.indexers.codes import Codes, renormalise
    from embell.indexers.exact import ExactIndex
    from embell.indexers.faiss_index import load_faiss

    faiss = load_faiss()

    began = time.perf_counter()
    ours = ExactIndex(rows.shape[1])
    ours.add(np.arange(len(rows)), rows)
    ours._segments[0].codes = Codes.of(rows)  # those that an index has in its files, on any processor
    print(f"\n{name}: {len(rows):,} rows; codes made in {time.perf_counter() - began:.1f} s, peak memory {peak()}")
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(renormalise(rows))
    print(
        "| queries at a time | embell, ms | IndexFlatIP, ms | ratio | rows that differ from float64 |\n| --- | --- | --- | --- | --- |"
    )
    for size in (1, 256, 1000):
        batches = [queries[begin : begin + size] for begin in range(0, 20 if size == 1 else size, size)]
        one, other = seconds(
            lambda b=batches: [ours.search(batch, 10) for batch in b], lambda b=batches: [flat.search(batch, 10) for batch in b],  # type: ignore[misc]
            repeat=repeat,
        )  # fmt: skip
        wrong = differing(ours, rows, np.concatenate(batches)[:64])
        print(
            f"| {size} | {1e3 * one / len(batches):.1f} | {1e3 * other / len(batches):.1f} | {other / one:.1f} | {wrong} |",
            flush=True,
        )
    print(f"peak memory with both indices {peak()}")


def differing(index: Any, rows: Array, queries: Array) -> int:
    """Answers of an exact index that are not those of float64 scores of all rows, ties by position."""
    from embell.indexers.codes import renormalise

    _, keys = index.search(queries, 10)
    wide = queries.astype(np.float64)
    scores = np.concatenate(
        [wide @ renormalise(rows[begin : begin + 20_000]).astype(np.float64).T for begin in range(0, len(rows), 20_000)], axis=1
    )
    top = np.argpartition(-scores, 30, axis=1)[:, :30]
    order = np.lexsort((top, -np.take_along_axis(scores, top, axis=1)))[:, :10]
    return int((np.take_along_axis(top, order, axis=1) != keys).sum())


def join(rows: Array, repeat: int) -> None:
    """All pairs with cosine 0.9 or more, against IndexFlatIP.range_search of every row."""
    from embell.indexers.codes import renormalise
    from embell.indexers.exact import ExactIndex
    from embell.indexers.faiss_index import load_faiss

    faiss = load_faiss()

    print("\n| rows | pairs at 0.9 | embell, s | range_search, s | ratio | same pairs |\n| --- | --- | --- | --- | --- | --- |")
    for count in sorted({min(100_000, len(rows)), len(rows)}):
        some = rows[:count]
        ours = ExactIndex(rows.shape[1])
        ours.add(np.arange(count), some)
        unit = renormalise(some)
        flat = faiss.IndexFlatIP(rows.shape[1])
        flat.add(unit)
        found: dict[str, set[tuple[int, int]]] = {}

        def one(index: ExactIndex = ours, into: dict[str, set[tuple[int, int]]] = found) -> None:
            into["ours"] = {
                pair for later, earlier, *_ in index.join(0.9) for pair in zip(earlier.tolist(), later.tolist(), strict=True)
            }

        def other(index: Any = flat, unit: Array = unit, into: dict[str, set[tuple[int, int]]] = found) -> None:
            into["theirs"] = set()
            for begin in range(0, len(unit), 10_000):
                limits, _, labels = index.range_search(unit[begin : begin + 10_000], 0.9)
                asked = np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64))) + begin
                earlier = asked < labels
                into["theirs"].update(zip(asked[earlier].tolist(), labels[earlier].tolist(), strict=True))

        mine, theirs = seconds(one, other, repeat=max(1, repeat // 3))
        apart = found["ours"] ^ found["theirs"]
        border = sum(abs(float(unit[a].astype(np.float64) @ unit[b].astype(np.float64)) - 0.9) < 1e-6 for a, b in apart)
        same = "yes" if not apart else f"{len(apart)} differ, {border} of them within 1e-6 of 0.9"
        print(f"| {count:,} | {len(found['ours']):,} | {mine:.1f} | {theirs:.1f} | {theirs / mine:.1f} | {same} |", flush=True)


def rivals(rows: Array) -> Iterator[tuple[str, float, float, list[tuple[str, Callable[[Array], Array]]]]]:
    """Of each peer: its name, seconds to build, bytes a vector, and its settings as searches that return `(q, 10)` positions."""
    from embell.indexers.codes import renormalise
    from embell.indexers.faiss_index import load_faiss

    faiss = load_faiss()
    unit = renormalise(rows)
    for factory in ("HNSW32", f"IVF{1024 if len(rows) > 100_000 else 256},PQ{rows.shape[1] // 4}x4fs,RFlat"):
        began = time.perf_counter()
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(unit[:: max(1, len(unit) // 100_000)])
        index.add(unit)
        took = time.perf_counter() - began
        ways: list[tuple[str, Callable[[Array], Array]]] = []
        if factory.startswith("HNSW"):
            for breadth in (16, 32, 64, 96, 128, 192, 256, 384):
                made = faiss.SearchParametersHNSW(efSearch=breadth)
                ways.append((f"efSearch {breadth}", lambda q, i=index, p=made: i.search(q, 10, params=p)[1]))
        else:
            for probes in (16, 32, 64, 96, 128, 192, 256, 512):
                for factor in (4, 8, 16):
                    made = faiss.IndexRefineSearchParameters(
                        k_factor=factor, base_index_params=faiss.SearchParametersIVF(nprobe=probes)
                    )
                    ways.append((f"nprobe {probes}, refined {factor}", lambda q, i=index, p=made: i.search(q, 10, params=p)[1]))
        yield f"FAISS {factory}", took, len(faiss.serialize_index(index)) / len(rows), ways
    try:
        import hnswlib

        began = time.perf_counter()
        graph = hnswlib.Index("ip", rows.shape[1])
        graph.init_index(len(rows), M=16, ef_construction=200, random_seed=0)
        graph.add_items(unit)
        took = time.perf_counter() - began

        def with_ef(queries: Array, breadth: int) -> Array:
            graph.set_ef(breadth)
            found: Array = graph.knn_query(queries, 10)[0].astype(np.int64)
            return found

        yield "hnswlib", took, graph.index_file_size() / len(rows), [
            (f"ef {breadth}", lambda q, b=breadth: with_ef(q, b)) for breadth in (16, 32, 64, 96, 128, 192, 256, 384)
        ]  # fmt: skip
    except ImportError:
        print("hnswlib is not installed")
    try:
        from usearch.index import Index

        began = time.perf_counter()
        near = Index(ndim=rows.shape[1], metric="ip", dtype="bf16")
        near.add(np.arange(len(rows)), unit)
        took = time.perf_counter() - began

        def expanding(queries: Array, breadth: int) -> Array:
            near.expansion_search = breadth
            found: Array = near.search(queries, 10).keys.astype(np.int64)
            return found

        yield "usearch bf16", took, near.serialized_length / len(rows), [
            (f"expansion {breadth}", lambda q, b=breadth: expanding(q, b)) for breadth in (16, 32, 64, 96, 128, 192, 256, 384)
        ]  # fmt: skip
    except ImportError:
        print("usearch is not installed")


def tuned(rows: Array, queries: Array, repeat: int) -> None:
    """Our index tuned to a certified recall against the fastest settings of each peer that reach it, and that reach what ours has measured.

    Ours is tuned on rows that stand in for queries, as `embell tune` does, and on other queries, as with `--queries`; a peer's settings are the
    fastest on the queries measured.
    """
    from embell.engine.tuning import exact_qps, nearest, tune
    from embell.indexers.exact import ExactIndex
    from embell.indexers.faiss_index import FaissIndex, _parameters, _turned, factory_for

    ours = ExactIndex(rows.shape[1])
    ours.add(np.arange(len(rows)), rows)
    ask = queries[1000:2000]
    _, truth = ours.search(ask, 10)

    def recall(found: Array) -> float:
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth.tolist(), found.tolist(), strict=True)]))

    began = time.perf_counter()
    factory = factory_for(len(rows), rows.shape[1])
    index = FaissIndex(rows.shape[1], factory)
    index.add(np.arange(len(rows)), rows)
    print(
        f"\nembell {factory}: built in {time.perf_counter() - began:.0f} s; exact search answers {exact_qps(ours, None):,.0f} queries/s"
    )
    searches: list[tuple[str, float, Callable[[], Array]]] = [
        ("embell, exact", float(rows.shape[1]), lambda: ours.search(ask, 10)[1])
    ]
    targets = [0.95, 0.99]
    turned_ask, beside = _turned(ask), []
    for target, (of, given) in product((0.95, 0.99), {"rows": None, "queries": queries[:1000]}.items()):
        chosen, _ = tune(ours, index, factory, target, given)
        if chosen is not None:

            def search(c: Any = chosen) -> Array:
                asked, _, positions = nearest(ours, index, ask, 10, c.settings, c.depth)
                found = np.full((len(ask), 10), -1)
                found[asked, np.arange(len(asked)) - np.searchsorted(asked, asked)] = positions
                return found

            given_to_faiss = _parameters(index._index, chosen.settings, (chosen.depth * 10 + 0.5) / 10)

            def raw(p: Any = given_to_faiss) -> Any:
                return index._index.search(turned_ask, 10, params=p)

            targets.append(recall(search()))
            pairs = [(awake(raw), awake(search)) for _ in range(3 * repeat)]
            one, other = (1e3 * float(np.median(times)) for times in zip(*pairs, strict=True))
            ratio = float(np.median([b / a for a, b in pairs]))
            beside.append(f"| {target} on {of}: {chosen.settings}, {chosen.depth} | {one:.1f} | {other:.1f} | {ratio:.2f} |")
            searches.append(
                (f"embell, {target} certified on {of}: {chosen.settings}, {chosen.depth}", chosen.bytes_per_vector, search)
            )
    print("| certified | FAISS's own call, ms | with exact scores, ms | ratio |\n| --- | --- | --- | --- |")
    print("\n".join(beside), flush=True)
    for name, took, size, ways in rivals(rows):
        print(f"{name}: built in {took:.0f} s", flush=True)
        reached = [(label, way, recall(way(ask))) for label, way in ways]
        for target in sorted(targets):
            enough = [(label, way) for label, way, found in reached if found >= target]
            speeds = [(seconds(lambda w=way: w(ask), repeat=1)[0], label, way) for label, way in enough]  # type: ignore[misc]
            if speeds:
                _, label, way = min(speeds, key=lambda speed: speed[0])
                searches.append((f"{name}, {target:.3g}: {label}", size, lambda w=way: w(ask)))  # type: ignore[misc]
    times = seconds(*(search for _, _, search in searches), repeat=repeat)
    print("| index | recall@10 | queries/s | bytes a vector beyond rows |\n| --- | --- | --- | --- |")
    for (name, size, search), taken in zip(searches, times, strict=True):
        print(f"| {name} | {recall(search()):.3f} | {len(ask) / taken:,.0f} | {size:,.0f} |", flush=True)


def filters(work: Path, rows: Array, queries: Array, repeat: int) -> None:
    """One query with a condition on a collection, beside the same query without; adding rows; texts of the answers included."""
    from embell.document import Document
    from embell.engine import Collection

    path = work / f"filters-{len(rows)}.embell"
    if not path.exists():
        collection = Collection.create(path, None, dim=rows.shape[1])
        collection.add(
            Document(str(number), f"text {number}", {"share": number * 7919 % 1000}, vector=row)
            for number, row in enumerate(rows)
        )
    collection = Collection.open(path)
    collection.search(queries[:1])
    share = np.arange(len(rows)) * 7919 % 1000
    conditions = {1000: None, 500: "share < 500", 50: "share < 50", 10: "share < 10", 1: "share < 1"}
    times: dict[int, list[list[float]]] = {most: [[] for _ in range(6)] for most in conditions}
    mixed = random.Random(0)
    for number in range(40 * repeat):
        for most, where in mixed.sample(list(conditions.items()), len(conditions)):  # a scan leaves the caches to what comes next
            collection._look().conditions.clear()  # as if the condition were new
            for taken in times[most]:
                began = time.perf_counter()
                collection.search(queries[number % 1000 : number % 1000 + 1], where=where)
                taken.append(time.perf_counter() - began)
    from embell.indexers.codes import renormalise

    print(
        "\n| condition lets through | first asked, ms (p50) | p99 | second time | third time | fourth time | sixth time | exact |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for most, where in conditions.items():
        collection._look().conditions.clear()
        hits = [collection.search(query[None], where=where)[0] for query in queries[:20]]
        together = collection.search(queries[:20], where=where)
        allowed = np.flatnonzero(share < most)
        scores = queries[:20].astype(np.float64) @ renormalise(rows[allowed]).astype(np.float64).T
        right = all(
            [int(hit.id) for hit in found] == allowed[np.lexsort((allowed, -row))[:10]].tolist()
            for found, row in zip(hits + together, [*scores, *scores], strict=True)
        )
        first, second, third, fourth, _, sixth = (1e3 * float(np.median(taken)) for taken in times[most])
        late = 1e3 * float(np.quantile(times[most][0], 0.99))
        print(
            f"| {most / 10:g} % | {first:.1f} | {late:.1f} | {second:.1f} | {third:.1f} | {fourth:.1f} | {sixth:.1f} | {right} |",
            flush=True,
        )
    tuned = work / f"tuned-{len(rows)}.embell"
    if not tuned.exists():
        shutil.copytree(path, tuned)
        Collection.open(tuned).tune(0.95, queries[:1000])
    collection = Collection.open(tuned)
    alone = []
    for number in range(100 * repeat):
        began = time.perf_counter()
        collection.search(queries[1000 + number % 1000 : 1001 + number % 1000])
        alone.append(time.perf_counter() - began)
    print(
        f"\ntuned to 0.95, one query without a condition: p50 {1e3 * np.median(alone):.1f} ms, p99 {1e3 * np.quantile(alone, 0.99):.1f} ms"
    )
    began = time.perf_counter()
    extra = Collection.open(path)
    extra.add(Document(f"new {number}", f"text {number}", {"share": 1}, vector=queries[number]) for number in range(1000))
    found = extra.search(queries[5:6], 1)[0][0].id
    print(f"\n1 000 rows added to {len(rows):,} and found ({found}) after {time.perf_counter() - began:.2f} s")
    extra.delete(where="id LIKE 'new %'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--synthetic", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["exact", "join", "tuned", "filters"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    parts = options.only or ["exact", "join", "tuned", "filters"]
    rows, queries = vectors(options.data, options.work, options.rows)
    if "exact" in parts:
        exact("sentences", rows, queries, options.repeat)
    if "join" in parts:
        join(rows, options.repeat)
    if "tuned" in parts:
        tuned(rows, queries, options.repeat)
    if "filters" in parts:
        filters(options.work, rows, queries, options.repeat)
    if "exact" in parts and options.synthetic:
        exact("synthetic clusters", *synthetic(options.synthetic), options.repeat)
    print(orjson.dumps({"peak": peak()}).decode())


if __name__ == "__main__":
    main()
