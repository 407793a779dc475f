"""An encoder as LangChain's Embeddings."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from embell import Encoder
from embell.engine.langchain import EmbellEmbeddings
from tiny_models import SENTENCES, tiny_encoder_directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    directory = tiny_encoder_directory(tmp_path_factory.mktemp("llama"), "llama")
    return Encoder.load(directory, query_prompt="Find: {text}", document_prompt="{text}", dtype="float32")


def test_documents_and_queries_get_the_encoder_s_vectors(encoder: Encoder) -> None:
    embeddings = EmbellEmbeddings(encoder)
    assert isinstance(embeddings, Embeddings)
    documents, query = embeddings.embed_documents(list(SENTENCES)), embeddings.embed_query(SENTENCES[0])
    assert [type(documents), type(documents[0]), type(documents[0][0]), type(query), type(query[0])] == [
        list,
        list,
        float,
        list,
        float,
    ]
    np.testing.assert_array_equal(np.array(documents, dtype=np.float32), encoder.encode(SENTENCES))
    np.testing.assert_array_equal(np.array(query, dtype=np.float32), encoder.encode(SENTENCES[0], "query")[0])
    assert np.abs(np.array(query) - documents[0]).max() > 1e-3
    assert embeddings.embed_documents([]) == []
    assert asyncio.run(embeddings.aembed_query(SENTENCES[0])) == query


def test_a_vector_store_finds_the_nearest_documents(encoder: Encoder) -> None:
    store = InMemoryVectorStore(EmbellEmbeddings(encoder))
    store.add_documents([Document(text) for text in SENTENCES])
    found = store.similarity_search_with_score("Padding and sentences", k=3)
    cosines = encoder.encode(SENTENCES) @ encoder.encode("Padding and sentences", "query")[0]
    assert [document.page_content for document, _ in found] == [SENTENCES[at] for at in np.argsort(-cosines)[:3]]
    np.testing.assert_allclose([score for _, score in found], np.sort(cosines)[::-1][:3], atol=1e-5)


@pytest.mark.parametrize(
    ("missing", "call", "line"),
    [
        ("langchain_core", "import embell.engine.langchain", "pip install 'langchain-core>=0.3'"),
        ("mteb", "from embell.engine.mteb import MtebEncoder; MtebEncoder(None)", "pip install 'mteb>=2'"),
        ("sentence_transformers", "import embell.engine.sentence_transformer", "pip install 'sentence-transformers>=6'"),
    ],
)
def test_a_missing_library_is_named_with_the_line_that_installs_it(tmp_path: Path, missing: str, call: str, line: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom embell import MissingExtraError\n"
    code += f"try:\n    {call}\nexcept MissingExtraError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith(line), done.stderr
    assert done.stdout.count("\n") == 1
