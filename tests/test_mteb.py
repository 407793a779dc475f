"""An encoder under mteb: its own evaluation gives the scores that embell computes itself."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import EncoderProtocol
from mteb.types import PromptType

from embell import Encoder, EncoderError
from embell.engine.evaluation import evaluate_retrieval, evaluate_sts
from embell.engine.mteb import MtebEncoder
from tiny_models import SENTENCES, tiny_encoder_directory

GOLD = (0.5, 3.0, 4.5, 1.0, 2.0, 5.0, 0.0)
QUERIES = {"q0": "a river and a bridge", "q1": "vectors of sentences", "q2": "rent in Zürich"}
JUDGED = {"q0": {"d0": 1}, "q1": {"d2": 2, "d7": 1}, "q2": {"d4": 1, "d0": 1, "d3": 0}}


def metadata(kind: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        type=kind, name=f"Tiny{kind}", main_score=score, description="Made in the test", reference=None,
        dataset={"path": "none", "revision": "none"}, eval_splits=["test"], eval_langs=["eng-Latn"],
    )  # fmt: skip


class TinySts(AbsTaskSTS):
    metadata = metadata("STS", "cosine_spearman")

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        pairs = {"sentence1": SENTENCES[:-1], "sentence2": SENTENCES[1:], "score": GOLD}
        self.dataset = DatasetDict({"test": Dataset.from_dict(pairs)})
        self.data_loaded = True


class TinyQueriedSts(TinySts):
    metadata = metadata("STS", "cosine_spearman").model_copy(update={"name": "TinyQueriedSTS"})
    input1_prompt_type = PromptType.query
    input2_prompt_type = PromptType.document


class TinyRetrieval(AbsTaskRetrieval):
    metadata = metadata("Retrieval", "ndcg_at_10")

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        corpus = [{"id": f"d{at}", "text": text, "title": ""} for at, text in enumerate(SENTENCES)]
        queries = [{"id": name, "text": text} for name, text in QUERIES.items()]
        split = RetrievalSplitData(
            queries=Dataset.from_list(queries), corpus=Dataset.from_list(corpus), relevant_docs=JUDGED, top_ranked=None
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_directory(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def encoder(directory: Path) -> Encoder:
    return Encoder.load(directory, start_layer=-2, query_prompt="Find this: {text}", dtype="float32")


def score(encoder: Encoder, task: Any, name: str) -> float:
    result = mteb.evaluate(MtebEncoder(encoder), task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 3})
    return float(result.task_results[0].scores["test"][0][name])


def test_it_is_an_encoder_in_the_sense_of_mteb(encoder: Encoder) -> None:
    assert isinstance(MtebEncoder(encoder), EncoderProtocol)


def test_the_score_of_sentence_pairs_is_embell_s_own(encoder: Encoder, tmp_path: Path) -> None:
    with (tmp_path / "pairs.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerows([("sentence1", "sentence2", "score"), *zip(SENTENCES, SENTENCES[1:], GOLD, strict=False)])
    ours = evaluate_sts(encoder, tmp_path / "pairs.tsv").spearman
    assert 100 * score(encoder, TinySts(), "cosine_spearman") == pytest.approx(ours, abs=1e-3)
    assert 100 * score(encoder, TinySts(), "spearman") == pytest.approx(ours, abs=1e-3)
    first, second = encoder.encode(SENTENCES[:-1], "query"), encoder.encode(SENTENCES[1:])
    pearson = np.corrcoef((first * second).sum(axis=1), GOLD)[0, 1]
    assert score(encoder, TinyQueriedSts(), "cosine_pearson") == pytest.approx(pearson, abs=1e-4)
    assert abs(pearson - score(encoder, TinySts(), "cosine_pearson")) > 1e-3


def test_the_score_of_a_retrieval_is_embell_s_own(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"id": f"d{at}", "text": text} for at, text in enumerate(SENTENCES)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"id": name, "text": text} for name, text in QUERIES.items()]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    judged = [f"{query}\t{document}\t{grade}\n" for query, some in JUDGED.items() for document, grade in some.items()]
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    ours = evaluate_retrieval(encoder, tmp_path)
    assert 0 < ours.ndcg_at_10 < 1
    assert score(encoder, TinyRetrieval(), "ndcg_at_10") == pytest.approx(ours.ndcg_at_10, abs=1e-4)


def test_queries_get_their_prompt_and_all_else_that_of_documents(encoder: Encoder) -> None:
    model = MtebEncoder(encoder)
    batches: Any = [{"text": list(SENTENCES[:3]), "title": ["", "", ""]}, {"text": list(SENTENCES[3:])}]
    where: Any = {"task_metadata": TinySts.metadata, "hf_split": "test", "hf_subset": "default"}
    for prompt_type, kind in ((PromptType.query, "query"), (PromptType.document, "document"), (None, "document")):
        vectors = model.encode(batches, prompt_type=prompt_type, batch_size=2, **where)
        np.testing.assert_array_equal(vectors, encoder.encode(SENTENCES, kind))  # type: ignore[arg-type]
    with pytest.raises(EncoderError, match="int8"):
        model.encode(batches, precision="int8", **where)


def test_similarities_are_cosines(encoder: Encoder) -> None:
    model = MtebEncoder(encoder)
    one, two = encoder.encode(SENTENCES[:3]), encoder.encode(SENTENCES[3:6])
    np.testing.assert_allclose(model.similarity(3 * one, two), one @ two.T, atol=1e-6)
    np.testing.assert_allclose(model.similarity(one[0], two), one[:1] @ two.T, atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(one, 2 * two), (one * two).sum(axis=1), atol=1e-6)


def test_no_encoder_is_given_the_results_of_another(directory: Path, encoder: Encoder, tmp_path: Path) -> None:
    cache = mteb.ResultCache(tmp_path)
    other = Encoder.load(directory, start_layer=None, query_prompt="Find this: {text}", dtype="float32")
    found = []
    for model in (encoder, other, encoder):
        result = mteb.evaluate(MtebEncoder(model), TinySts(), cache=cache, show_progress_bar=False)
        found.append(result.task_results[0].scores["test"][0]["cosine_pearson"])
    assert found[2] == pytest.approx(found[0], abs=1e-6)  # out of the cache
    assert abs(found[1] - found[0]) > 1e-3
    assert found[1] == pytest.approx(score(other, TinySts(), "cosine_pearson"), abs=1e-6)
    meta = MtebEncoder(encoder).mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.max_tokens) == (f"embell/{directory.name}", encoder.dim, encoder.spec.max_length)
    assert MtebEncoder(encoder, "someone/model").mteb_model_meta.name == "someone/model"
