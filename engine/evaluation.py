"""Measuring an encoder: Spearman on sentence pairs, nDCG@10 and recall@100 on judged queries."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from embell.errors import CorpusError
from embell.indexers.corpora import CorpusOptions, CorpusReport, read_corpus
from embell.indexers.exact import ExactIndex

if TYPE_CHECKING:
    from embell.engine.encoder import Encoder

_SCORES = ("score", "relatedness", "similarity", "label", "is_duplicate", "duplicate")
_SIDES = (("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"))
_OTHER_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz", ".xz", ".zst")
_DEPTH = 100


@dataclass(frozen=True)
class StsResult:
    """Spearman correlation (times 100) of cosine with the given score, over all pairs of one file."""

    dataset: str
    pairs: int
    spearman: float


@dataclass(frozen=True)
class RetrievalResult:
    """Means over judged queries (those with a relevant document): nDCG@10 with linear gain, recall@100."""

    dataset: str
    documents: int
    queries: int
    ndcg_at_10: float
    recall_at_100: float
    empty: int


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of sentences, how alike they are in human eyes (any unit), and the line of the file each stands on."""

    path: Path
    first: list[str]
    second: list[str]
    gold: list[float]
    lines: list[int]

    @property
    def dataset(self) -> str:
        return self.path.name.split(".")[0]


def read_pairs(path: Path, score_field: str | None = None) -> SentencePairs:
    """The pairs of a TSV file with a header line: `sentence1`, `sentence2`, and `score`, `relatedness`, `label` or `score_field`.

    The columns of the sentences may also be `question1` and `question2`, or `text1` and `text2`.

    Raises CorpusError for a file of another kind or without these columns, with a score that is no number, or with nothing to correlate.
    """
    if path.suffix in _OTHER_KINDS:
        raise CorpusError(f"{path}: scored pairs are read from plain TSV files with a header line, not from {path.suffix}")
    rows = _tsv(path)
    if not rows:
        raise CorpusError(f"{path}: empty")
    name = score_field or next((known for known in _SCORES if known in rows[0][1]), _SCORES[0])
    one, other = next((sides for sides in _SIDES if sides[0] in rows[0][1]), _SIDES[0])
    for wanted in (one, other, name):
        if wanted not in rows[0][1]:
            raise CorpusError(f"{path}: has no column {wanted!r}; its columns are {', '.join(rows[0][1])}")
    gold = []
    for line, row in rows:
        try:
            gold.append(float(row[name]))
        except (TypeError, ValueError) as error:
            raise CorpusError(f"{path}:{line}: {name} is {row[name]!r}, not a number") from error
        if not math.isfinite(gold[-1]):
            raise CorpusError(f"{path}:{line}: {name} is {row[name]!r}, not a number")
        if not (row[one] or "").strip() or not (row[other] or "").strip():
            raise CorpusError(f"{path}:{line}: a sentence is empty")
    if len(gold) < 2:
        raise CorpusError(f"{path}: one pair is not enough for a correlation")
    if len(set(gold)) == 1:
        raise CorpusError(f"{path}: every {name} is {gold[0]:g}; there is nothing to correlate with")
    first, second = [row[one] for _, row in rows], [row[other] for _, row in rows]
    return SentencePairs(path, first, second, gold, [line for line, _ in rows])


def evaluate_sts(encoder: Encoder, path: Path, score_field: str | None = None) -> StsResult:
    """Encode both sentences of each pair of a TSV file and correlate cosine with the score.

    Raises what `read_pairs` raises.
    """
    pairs = read_pairs(path, score_field)
    first, second = encoder.encode(pairs.first), encoder.encode(pairs.second)
    cosine = np.einsum("ij,ij->i", first.astype(np.float64), second.astype(np.float64))
    return StsResult(pairs.dataset, len(pairs.gold), 100 * float(spearmanr(cosine, pairs.gold).statistic))


def evaluate_retrieval(encoder: Encoder, folder: Path) -> RetrievalResult:
    """Rank the corpus for each judged query and measure against the judgements, with trec_eval's measures.

    The folder holds `corpus.jsonl`, `queries.jsonl` (id and text) and `qrels.tsv` (query-id, corpus-id, score).
    Judgements at or below 0 are not relevant. Text is title and text.

    Raises CorpusError if a file is missing or a judgement names an unknown query.
    """
    import pytrec_eval

    qrels: dict[str, dict[str, int]] = {}
    for line, row in _tsv(folder / "qrels.tsv"):
        values = list(row.values())
        try:
            qrels.setdefault(values[0], {})[values[1]] = max(0, int(float(values[2])))
        except (IndexError, ValueError, TypeError) as error:
            raise CorpusError(f"{folder / 'qrels.tsv'}:{line}: not query-id, corpus-id, score") from error
    qrels = {query: judged for query, judged in qrels.items() if any(judged.values())}
    queries = {d.id: d.text for d in read_corpus([str(folder / "queries.jsonl")], CorpusOptions(), CorpusReport())}
    lost = sorted(set(qrels) - set(queries))
    if lost:
        raise CorpusError(f"{folder / 'qrels.tsv'}: judges the query {lost[0]!r}, which is not in queries.jsonl")
    asked = list(qrels)

    report = CorpusReport()
    ids: list[str] = []

    def texts() -> Any:
        for document in read_corpus([str(folder / "corpus.jsonl")], CorpusOptions(), report):
            ids.append(document.id)
            yield document.text

    index = ExactIndex(encoder.dim)
    for block in encoder.encode_stream(texts()):
        start = len(index)
        index.add(np.arange(start, start + len(block)), block.astype(np.float16))
    scores, found = index.search(encoder.encode([queries[query] for query in asked], "query"), min(_DEPTH, len(ids)))
    run = {
        query: {ids[key]: float(score) for key, score in zip(keys.tolist(), row.tolist(), strict=True) if key >= 0}
        for query, keys, row in zip(asked, found, scores, strict=True)
    }
    measured = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", f"recall.{_DEPTH}"}).evaluate(run)
    ndcg = float(np.mean([values["ndcg_cut_10"] for values in measured.values()]))
    recall = float(np.mean([values[f"recall_{_DEPTH}"] for values in measured.values()]))
    return RetrievalResult(folder.resolve().name, len(ids), len(asked), ndcg, recall, report.empty)


def _tsv(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows of a tab-separated file with their line numbers; quotes mean nothing."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(enumerate(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 2))
    except FileNotFoundError as error:
        raise CorpusError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path}: cannot be read ({error})") from error
