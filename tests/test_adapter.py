"""LoRA adapters over a base model, and the layout in which the BeLLM checkpoint is published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from embell import Encoder, EncoderError
from embell.engine import backbone, bellm
from tiny_models import tiny_encoder_directory
from training_parts import bert_directory

TEXTS = ["A cat.", "The river rose over night and took the old bridge with it.", "é 漢字 🙂"]
BELLM = 'The representative word for sentence {text} is:"'


def write_adapter(base: Path, target: Path, **changes: object) -> Path:
    """A random LoRA adapter, trained (so to speak) around the model with its language-model head."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    gpt2 = model.config.model_type == "gpt2"
    names = ["c_attn", "c_proj"] if gpt2 else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        **{
            "r": 4, "lora_alpha": 8, "target_modules": names, "init_lora_weights": False, "task_type": "CAUSAL_LM",
            "fan_in_fan_out": gpt2, **changes,
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        get_peft_model(model, config).save_pretrained(target)
    return target


def bellm_layout(base: Path, target: Path) -> Path:
    """The files of `SeanLee97/bellm-llama-7b-nli`."""
    write_adapter(base, target, r=4, lora_alpha=4, lora_dropout=0.1)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    angle = {
        "model_name_or_path": str(base), "max_length": 75, "pooling_strategy": "cls", "apply_lora": True,
        "lora_config_kwargs": {"task_type": "CAUSAL_LM", "r": 64, "lora_alpha": 16, "lora_dropout": 0.1},
    }  # fmt: skip
    (target / "angle.config").write_text(json.dumps(angle))
    (target / "training_args.bin").write_bytes(b"a pickle, which nobody opens")
    return target


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_encoder_directory(tmp_path_factory.mktemp(family), family) for family in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_adapter(base, tmp_path_factory.mktemp("adapter")) for family, base in bases.items()}


@pytest.fixture(scope="module")
def published(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bellm_layout(bases["llama"], tmp_path_factory.mktemp("published"))


def by_peft(
    base: Path, adapter: Path, prompt: str = "{text}", start: int = 4, pooling: str = "mean", texts: Sequence[str] = TEXTS
) -> np.ndarray:
    """The vectors as PEFT itself gives them, text by text."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
    inner = model.get_base_model().base_model
    bellm.make_bidirectional(inner, start)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(prompt.replace("{text}", text))["input_ids"]])
        with torch.no_grad():
            states = inner(input_ids=ids, use_cache=False).last_hidden_state[0]
        vector = states.mean(dim=0) if pooling == "mean" else states[-1]
        rows.append((vector / vector.norm()).numpy())
    return np.array(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("start", "pooling"), [(None, "last"), (2, "mean")])
def test_an_adapter_gives_the_vectors_of_peft(
    bases: dict[str, Path], adapters: dict[str, Path], family: str, merge: bool, start: int | None, pooling: str
) -> None:
    encoder = Encoder.load(
        bases[family], adapter=adapters[family], merge_adapter=merge, start_layer=start, pooling=pooling, dtype="float32"
    )
    expected = by_peft(bases[family], adapters[family], start=4 if start is None else start, pooling=pooling)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    plain = Encoder.load(bases[family], start_layer=start, pooling=pooling, dtype="float32")
    assert np.abs(plain.encode(TEXTS) - expected).max() > 1e-2
    assert encoder.spec.differences(plain.spec) == ["fingerprint"]
    lora = [name for name, _ in encoder.network.named_parameters() if "lora" in name]
    assert bool(lora) is not merge


@pytest.mark.parametrize("merge", [False, True])
def test_saved_and_loaded_again_it_is_the_same(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, merge: bool
) -> None:
    encoder = Encoder.load(
        bases["llama"], adapter=adapters["llama"], merge_adapter=merge, start_layer=2, query_prompt="q: {text}", dtype="float32"
    )
    encoder.save(tmp_path)
    assert (tmp_path / "config.json").is_file() is merge
    assert (tmp_path / "adapter_model.safetensors").is_file() is not merge
    for again in (Encoder.load(tmp_path, dtype="float32"), Encoder.from_spec(encoder.spec, dtype="float32")):
        assert again.spec.start_layer == 2
        np.testing.assert_allclose(again.encode(TEXTS, "query"), encoder.encode(TEXTS, "query"), atol=1e-6)


def test_an_adapter_directory_alone_finds_its_base(bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path) -> None:
    options = {"start_layer": 2, "dtype": "float32"}
    both = Encoder.load(bases["llama"], adapter=adapters["llama"], **options)  # type: ignore[arg-type]
    alone = Encoder.load(adapters["llama"], **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(alone.encode(TEXTS), both.encode(TEXTS))
    assert alone.spec == both.spec
    with pytest.raises(EncoderError, match="an adapter itself; give its base model as the model"):
        Encoder.load(adapters["llama"], adapter=adapters["llama"])
    config = json.loads((adapters["llama"] / "adapter_config.json").read_text())
    for base, message in (
        ("somewhere/else/entirely", "is not at hand .* give the base as the model"),
        (None, "names no base model"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(EncoderError, match=message):
            Encoder.load(tmp_path)


def test_fewer_layers_take_the_part_of_the_adapter_that_belongs_to_them(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    full = Encoder.load(bases["llama"], adapter=adapters["llama"], start_layer=None, dtype="float32")
    kept = Encoder.load(bases["llama"], adapter=adapters["llama"], start_layer=None, layers=3, dtype="float32")
    ids = torch.tensor([full.tokenizer(TEXTS[1])["input_ids"]])
    states = bellm.forward(full.network, ids, None, output_hidden_states=True).hidden_states[3]
    vector = full.network.norm(states)[0].mean(dim=0)  # type: ignore[operator]
    np.testing.assert_allclose(kept.encode(TEXTS[1])[0], (vector / vector.norm()).detach().numpy(), atol=1e-5)


def test_the_revision_of_the_base_is_kept(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    find = backbone.find

    def hub(name: Any, revision: str | None) -> Path:
        asked.append((name, revision))
        return find(bases["llama"] if name == "owner/base" else name, None)

    monkeypatch.setattr(backbone, "find", hub)  # there is no hub here
    Encoder.load("owner/base", revision="abc", adapter=adapters["llama"]).save(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("owner/base", "abc")
    asked.clear()
    assert Encoder.load(tmp_path / "saved").spec.revision == "abc"
    assert ("owner/base", "abc") in asked


def test_an_adapter_over_the_first_layers_of_bert(tmp_path: Path) -> None:
    base = bert_directory(tmp_path / "bert")
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(base, dtype=torch.float32), config).save_pretrained(tmp_path / "adapter")
    whole = Encoder.load(base, adapter=tmp_path / "adapter", dtype="float32")
    first = Encoder.load(base, adapter=tmp_path / "adapter", layers=1, dtype="float32")
    ids = torch.tensor([whole.tokenizer(TEXTS[1])["input_ids"]])
    vector = whole.network(ids, output_hidden_states=True).hidden_states[1][0].mean(dim=0)
    np.testing.assert_allclose(first.encode(TEXTS[1])[0], (vector / vector.norm()).detach().numpy(), atol=1e-5)


def changed(adapter: Path, target: Path, change: str) -> tuple[Path, str]:
    """A copy of an adapter with one key too few, too many, or of another shape; and the key."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in tensors if "layers.2.self_attn.v_proj.lora_B" in key)
    if change == "missing":
        del tensors[name]
    elif change == "extra layer":
        name = name.replace("layers.2", "layers.9")
        tensors[name] = torch.zeros(16, 4)
    elif change == "extra module":
        name = name.replace("v_proj", "w_proj")
        tensors[name] = torch.zeros(16, 4)
    elif change == "head":
        name = "base_model.model.lm_head.lora_A.weight"
        tensors[name] = torch.zeros(4, 32)
    elif change == "shape":
        tensors[name] = torch.zeros(16, 5)
    (target / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file(tensors, target / "adapter_model.safetensors")
    return target, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "lacks layers.2.self_attn.v_proj.lora_B.weight;"),
        ("extra layer", "for which the model has no place"),
        ("extra module", "for which the model has no place"),
        ("head", "for which the model has no place"),
        ("shape", "is 16 × 5, but 16 × 4 is what the model and adapter_config.json ask for"),
    ],
)
def test_a_key_too_few_too_many_or_of_another_shape_is_refused_by_name(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, change: str, message: str
) -> None:
    adapter, name = changed(adapters["llama"], tmp_path, change)
    with pytest.raises(EncoderError) as caught:
        Encoder.load(bases["llama"], adapter=adapter)
    assert message in str(caught.value)
    assert (name if change != "missing" else "v_proj") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_keys_of_layers_that_are_not_kept_do_not_hide_a_stray_one(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter, _ = changed(adapters["llama"], tmp_path, "missing")
    with pytest.raises(EncoderError, match="lacks"):
        Encoder.load(bases["llama"], adapter=adapter, layers=3)
    Encoder.load(bases["llama"], adapter=adapter, layers=2)  # the layer that lacks it is gone


def test_what_is_no_lora_adapter_of_this_model_is_refused(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(tmp_path / "tuning")
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    scaled = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(model, scaled).save_pretrained(tmp_path / "ia3")
    for folder in ("tuning", "ia3"):
        with pytest.raises(EncoderError, match="embell loads LoRA adapters"):
            Encoder.load(bases["llama"], adapter=tmp_path / folder)
    with pytest.raises(EncoderError, match="does not fit the model"):
        Encoder.load(bases["gpt2"], adapter=adapters["llama"])
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text((adapters["llama"] / "adapter_config.json").read_text())
    (pickled / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(EncoderError, match="pickled weights are never loaded"):
        Encoder.load(bases["llama"], adapter=pickled)
    (pickled / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        Encoder.load(bases["llama"], adapter=pickled)
    (pickled / "adapter_config.json").write_text("{")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        Encoder.load(bases["llama"], adapter=pickled)


# --- the published checkpoint


def test_the_published_layout_loads_through_its_preset_and_says_what_it_assumed(bases: dict[str, Path], published: Path) -> None:
    encoder = Encoder.load(published, preset="bellm", dtype="float32")
    spec = encoder.spec
    assert (spec.start_layer, spec.pooling, spec.document_prompt, spec.max_length) == (None, "last", BELLM, 75)
    said = " ".join(encoder.notes)
    for part in ("75 tokens", "representative word", "last token", "causal", "equals"):
        assert part in said
    clean = [text if text[-1] in ".?\"'" else f"{text}." for text in TEXTS]
    expected = by_peft(bases["llama"], published, BELLM, pooling="last", texts=clean)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)


def test_the_official_start_with_the_last_token_is_the_causal_model(bases: dict[str, Path], published: Path) -> None:
    causal = Encoder.load(published, preset="bellm", dtype="float32").encode(TEXTS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32), str(published))
    inner = model.eval().get_base_model().base_model
    bellm.make_bidirectional(inner, 3)  # 31 of 32, in a model of 4
    tokenizer = AutoTokenizer.from_pretrained(published)
    for text, vector in zip(["A cat.", TEXTS[1], "é 漢字 🙂."], causal, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(BELLM.replace("{text}", text))["input_ids"]])
            last = inner(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, (last / last.norm()).numpy(), atol=1e-5)
    with pytest.raises(EncoderError, match="equals the causal model"):
        Encoder.load(published, preset="bellm", start_layer=-1)


def test_the_published_layout_is_not_guessed_at(published: Path) -> None:
    with pytest.raises(EncoderError, match=r"records neither start layer, prompt nor pooling; preset 'bellm' supplies"):
        Encoder.load(published)
    with pytest.raises(EncoderError, match="preset 'bellm' supplies"):
        Encoder.load(published, start_layer=1, pooling="mean")
    said = Encoder.load(published, start_layer=1, pooling="mean", query_prompt="{text}", document_prompt=BELLM)
    assert said.spec.start_layer == 1
