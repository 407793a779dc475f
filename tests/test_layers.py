"""The layer sweep: every depth is the pruned encoder, causal layers depend on nothing later, and the advice follows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from conftest import Ran
from embell.cli.layers import layers, sentences
from embell.engine.encoder import Encoder
from embell.engine.evaluation import evaluate_sts, read_pairs
from embell.engine.layers import Depth, LayerSweep, States, choose, later_tokens, sweep, vectors_at
from embell.errors import CorpusError, EncoderError
from plain_path import tiny_bert_directory, tiny_static_directory
from tiny_models import LAYERS, SENTENCES, tiny_encoder_directory

Run = Callable[..., Ran]
TOL = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of tiny models, made when they are first asked for."""
    root = tmp_path_factory.mktemp("models")

    def directory(family: str) -> Path:
        path = root / family
        if not path.exists():
            tiny_bert_directory(path) if family == "bert" else tiny_encoder_directory(path, family)
        return path

    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    halves = [sentence[: len(sentence) // 2] for sentence in SENTENCES]
    rows = [(one, other, score) for score, (one, other) in enumerate(zip(SENTENCES, halves[3:] + halves[:3], strict=True))]
    text = "".join(f"{one}\t{other}\t{score}\n" for one, other, score in rows)
    path.write_text("sentence1\tsentence2\tscore\n" + text, encoding="utf-8")
    return path


def load(directory: Path, **options: Any) -> Encoder:
    return Encoder.load(directory, **{"device": "cpu", "dtype": "float32", **options})


def swept_vectors(encoder: Encoder, pooling: str) -> np.ndarray:
    """Unit vectors `(L, n, hidden)` of the sentences at every depth, with the final norm."""
    states = States(encoder)
    batch = encoder.collate(encoder.tokens(SENTENCES, "document").rows)
    with torch.inference_mode():
        found = [next(vectors_at(encoder, states, state, batch, pooling)) for state in states.before_norm(batch)[1:]]
    return torch.nn.functional.normalize(torch.stack(found), dim=-1).numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "gemma2", "bert"])
def test_each_depth_is_the_pruned_encoder(models: Callable[[str], Path], family: str) -> None:
    directory = models(family)
    causal: dict[str, Any] = {} if family == "bert" else {"start_layer": None}
    for pooling in ("mean", "last"):
        found = swept_vectors(load(directory, pooling=pooling, **causal), pooling)
        for depth, vectors in enumerate(found, 1):
            if pooling == "last" and depth in (1, 3):
                continue  # a depth is the same whatever pools its states
            pruned = load(directory, pooling=pooling, layers=depth, **causal)
            np.testing.assert_allclose(vectors, pruned.encode(SENTENCES), **TOL)


def test_depths_above_the_start_layer_are_the_pruned_encoder_with_that_start_layer(models: Callable[[str], Path]) -> None:
    found = swept_vectors(load(models("llama"), start_layer=1), "mean")
    for depth in (1, 2, 3, 4):
        pruned = load(models("llama"), layers=depth, start_layer=1 if depth > 1 else None)
        np.testing.assert_allclose(found[depth - 1], pruned.encode(SENTENCES), **TOL)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_scores_are_those_of_evaluating_each_pruned_encoder(models: Callable[[str], Path], pairs: Path, family: str) -> None:
    causal: dict[str, Any] = {} if family == "bert" else {"start_layer": None}
    found = sweep(load(models(family), **causal), read_pairs(pairs), batch_tokens=64)
    assert [depth.depth for depth in found.depths] == list(range(1, len(found.depths) + 1))
    for depth in found.depths:
        for pooling, score in depth.spearman.items():
            pruned = load(models(family), layers=depth.depth, pooling=pooling, **causal)
            assert score == pytest.approx(evaluate_sts(pruned, pairs).spearman)
    assert found.final_norm == (family != "bert")
    if not found.final_norm:
        assert all(depth.spearman == depth.unnormed for depth in found.depths)


def test_prompts_pieces_and_width_count_as_they_do_in_the_encoder(models: Callable[[str], Path], pairs: Path) -> None:
    options: dict[str, Any] = {
        "document_prompt": ("Summary of {text}:", "About {text}"), "pooling": "weighted-mean", "on_long": "chunk",
        "max_length": 24, "dim": 20, "start_layer": 2,
    }  # fmt: skip
    encoder = load(models("llama"), **options)
    last = sweep(encoder, read_pairs(pairs)).depths[-1]
    assert set(last.spearman) == {"mean", "last", "weighted-mean"}
    assert last.spearman["weighted-mean"] == pytest.approx(evaluate_sts(encoder, pairs).spearman)


def test_token_prepending_is_on_in_the_sweep(models: Callable[[str], Path], pairs: Path) -> None:
    prompt = "<PST> means: {text}"
    options: dict[str, Any] = {"document_prompt": prompt, "query_prompt": prompt, "token_prepending": (1, 3), "start_layer": None}
    found = sweep(load(models("llama"), **options), read_pairs(pairs))
    for depth in (3, 4):
        pruned = load(models("llama"), layers=depth, **options)
        assert found.depths[depth - 1].spearman["mean"] == pytest.approx(evaluate_sts(pruned, pairs).spearman)
    assert found.first == 3
    assert found.recommend(1000).exit == 3
    assert found.depths[0].later == 0 < found.depths[1].later


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-sliding", "gpt-neox"])
@pytest.mark.parametrize("start", [None, 0, 2, 3])
def test_states_depend_on_later_tokens_from_the_start_layer_on_and_not_before(
    models: Callable[[str], Path], family: str, start: int | None
) -> None:
    encoder = load(models(family), start_layer=start)
    rows = encoder.tokens([*SENTENCES, "Hm", "A"], "document").rows
    later, added = later_tokens(encoder, rows, batch_tokens=100)
    first = LAYERS if start is None else start
    assert later[:first] == added[:first] == [0.0] * first
    assert all(value > 1e-4 for value in later[first:] + added[first:])


def test_dependence_is_the_formula_text_by_text(models: Callable[[str], Path]) -> None:
    encoder = load(models("llama"), start_layer=2)
    rows = encoder.tokens(SENTENCES, "document").rows
    expected = np.zeros((2, LAYERS))
    for row in rows:
        count, half = len(row.ids), -(-len(row.ids) // 2)
        states = []
        for shown in (count, half):
            with torch.inference_mode():
                states.append(States(encoder).before_norm(encoder.collate([replace(row, ids=row.ids[:shown], end=shown)])))
        for layer in range(LAYERS):
            one, other = ((h[layer + 1][0, :half], h[layer + 1][0, :half] - h[layer][0, :half]) for h in states)
            for kind in (0, 1):
                expected[kind, layer] += float(((one[kind] - other[kind]).norm(dim=1) / one[kind].norm(dim=1)).mean()) / len(rows)
    np.testing.assert_allclose(later_tokens(encoder, rows), expected, **TOL)


def test_a_text_of_one_token_says_nothing_about_later_ones(models: Callable[[str], Path]) -> None:
    encoder = load(models("llama"))
    row = encoder.tokens(["a"], "document").rows[0]
    assert len(row.ids) == 1
    later, added = later_tokens(encoder, [row])
    assert np.isnan(later + added).all()


def test_a_static_model_has_no_layers(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="static model has no layers"):
        States(Encoder.load(tiny_static_directory(tmp_path / "static")))


def test_a_final_norm_that_is_no_module_is_refused(models: Callable[[str], Path]) -> None:
    encoder = load(models("llama"))
    norm = encoder.network.norm
    encoder.network.norm = torch.nn.Identity()
    encoder.network.norm.forward = lambda states: norm(states) * 2
    inner = encoder.network.forward
    encoder.network.forward = lambda **options: _doubled(inner(**options))
    with pytest.raises(EncoderError, match="what follows the last layer of this llama model"):
        States(encoder)


def _doubled(output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * 2
    return output


SCORES = st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), min_size=1, max_size=12)


@given(SCORES, st.floats(0, 20), st.integers(1, 4))
def test_best_and_exit_follow_their_definition(scores: list[float], tolerance: float, first: int) -> None:
    usable = [depth for depth in range(first, len(scores) + 1) if not math.isnan(scores[depth - 1])]
    if not usable:
        with pytest.raises(EncoderError, match="no depth has a score"):
            choose(scores, tolerance, first)
        return
    best, exit_ = choose(scores, tolerance, first)
    assert all(scores[depth - 1] < scores[best - 1] for depth in usable if depth < best)
    assert all(scores[depth - 1] <= scores[best - 1] for depth in usable)
    assert exit_ == next(depth for depth in usable if scores[depth - 1] >= scores[best - 1] - tolerance)
    assert first <= exit_ <= best


def made(scores: list[float], pooling: str = "mean", start: int | None = None, decoder: bool = True) -> LayerSweep:
    depths = tuple(Depth(n, {pooling: score}, {pooling: score}, 0.0, 0.0) for n, score in enumerate(scores, 1))
    return LayerSweep("made", 9, 9, "float32", start, decoder, True, pooling, 1, depths)


def test_the_start_layer_is_the_first_after_the_turning_point() -> None:
    advice = made([50, 60, 70, 69, 61, 55]).recommend()
    assert (advice.best, advice.start_layer, advice.turning_point, advice.start_options) == (3, 3, True, "--start-layer 3")
    assert (advice.exit, advice.exit_options) == (3, "--layers 3 --start-layer none")
    assert advice.fall == 15


def test_a_curve_that_rises_to_the_end_has_no_turning_point() -> None:
    found = made([50, 60, 70, 75])
    advice = found.recommend()
    assert (advice.best, advice.start_layer, advice.turning_point) == (4, 3, False)
    assert (advice.exit, advice.exit_options) == (4, "")
    says = " ".join(sentences(found, advice))
    assert "no turning point" in says
    assert "keep all layers" in says


def test_a_fall_within_the_tolerance_is_no_turning_point() -> None:
    scores = [50.0, 70.3, 70.1, 70.0]
    assert made(scores).recommend().turning_point is False
    assert made(scores).recommend().start_layer == 3
    assert made(scores).recommend(0.1).start_layer == 2


def test_the_last_layer_with_last_token_pooling_is_never_suggested() -> None:
    assert made([50, 60, 70], "last").recommend().start_options == "--start-layer 2 --pooling mean"
    assert made([50, 70, 60], "last").recommend().start_options == "--start-layer 2 --pooling mean"
    assert made([70, 50, 60], "last").recommend().start_options == "--start-layer 1"


def test_the_start_layer_of_an_encoder_that_has_one_is_left_alone() -> None:
    found = made([50, 60, 70, 69], start=1)
    advice = found.recommend()
    assert (advice.start_layer, advice.turning_point, advice.start_options) == (None, None, "")
    assert found.options(1) == "--layers 1 --start-layer none"
    assert found.options(2) == "--layers 2 --start-layer 1"
    assert "measure it with --start-layer none" in sentences(found, advice)[-1]
    assert made([50, 60, 70], "last", 1).options(2) == "--layers 2 --start-layer none"
    assert made([50, 60], start=0, decoder=False).options(1) == "--layers 1"


def test_the_suggested_options_load(models: Callable[[str], Path], pairs: Path) -> None:
    for pooling, start in (("mean", None), ("mean", 2), ("last", 2), ("last", None)):
        found = sweep(load(models("llama"), pooling=pooling, start_layer=start), read_pairs(pairs))
        for depth in found.depths[: LAYERS - 1]:
            said = found.options(depth.depth).split()
            options = {"layers": int(said[1]), "start_layer": None if said[3] == "none" else int(said[3])}
            pruned = load(models("llama"), pooling=pooling, **options)
            assert evaluate_sts(pruned, pairs).spearman == pytest.approx(depth.spearman[pooling])


@pytest.mark.parametrize(
    ("rows", "says"),
    [("a\tb\t1\nc\td\t1\n", "every score is 1"), ("a\tb\tnan\nc\td\t1\n", r"pairs.tsv:2: score is 'nan', not a number")],
)
def test_scores_that_correlate_with_nothing_are_refused(tmp_path: Path, rows: str, says: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("sentence1\tsentence2\tscore\n" + rows, encoding="utf-8")
    with pytest.raises(CorpusError, match=says):
        read_pairs(path)


def test_the_command_writes_lines_and_a_plot(inside: Run, models: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.SVG"
    plot.write_text("an older plot")
    done = inside("layers", pairs, "--model", models("llama"), "--start-layer", "2", "--plot", plot, "--json")
    assert done.status == 0, done
    *depths, last = done.lines
    assert [line["depth"] for line in depths] == [1, 2, 3, 4]
    assert [line["later"] > 0 for line in depths] == [False, False, True, True]
    advice = last["recommendation"]
    assert depths[advice["best"] - 1]["spearman"]["mean"] == max(line["spearman"]["mean"] for line in depths)
    assert (last["bidirectional_from"], advice["start_layer"]) == (2, None)
    assert all(line["dataset"] == "pairs" for line in done.lines)
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.SVG"]


def test_the_command_prints_a_table_and_the_options_to_use(models: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    arguments = [pairs, "--model", models("llama"), "--start-layer", "2", "--dtype", "float32", "--device", "cpu", "--plot", plot]
    done = CliRunner().invoke(layers, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done
    lines = done.stdout.splitlines()
    assert " ".join(lines[0].split()) == "pairs 8 pairs 4 layers, both ways from layer 2 on float32"
    table = [line for line in lines if line[:5].strip().isdigit()]
    assert len(table) == LAYERS
    assert sum("best" in line for line in table) == sum("exit" in line for line in table) == 1
    assert lines[-1].endswith("--start-layer none")
    assert max(map(len, lines[:-3])) <= 100
    head = plot.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(head[16:20], "big") == 800


def test_the_command_explains_itself_and_its_errors_are_one_line(
    inside: Run, models: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    done = inside("layers", "--help")
    assert done.status == 0
    assert max(map(len, done.out.splitlines())) <= 100
    assert "  embell layers " in done.out
    inside("layers", pairs, "--plot", tmp_path / "plot.pdf").fails(2, "plot.pdf", ".png or .svg")
    inside("layers", pairs, "--plot", tmp_path / "no" / "plot.png").fails(2, "there is no directory")
    inside("layers", tmp_path / "none.tsv").fails(1, "none.tsv", "no such file")
    inside("layers", pairs, "--tolerance", "-1").fails(2, "--tolerance")


def test_without_matplotlib_the_command_names_the_extra(models: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "embell", "layers", str(pairs), "--plot", str(tmp_path / "plot.png")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    Ran(done.returncode, done.stdout, done.stderr).fails(1, "matplotlib", "pip install 'embell[plot]'")
