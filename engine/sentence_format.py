"""The format of sentence-transformers: `modules.json` and what it points to, read and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from embell.engine import head as heads
from embell.engine.spec import ModelSettings, check_keys, read_json
from embell.errors import EncoderError

MODULES = "modules.json"
CONFIG = "config_sentence_transformers.json"
_OWN = "embell.engine.sentence_transformer.EmbellModule"
_INDENTED = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
_TRANSFORMER = "sentence_bert_config.json"
_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean-sqrt-length",
    "weightedmean": "weighted-mean",
    "lasttoken": "last",
}
# Older files have a switch for each mode; several are put side by side in this order.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean-sqrt-length",
    "pooling_mode_weightedmean_tokens": "weighted-mean",
    "pooling_mode_lasttoken": "last",
}
_AS_USUAL = {"method": "forward", "method_output_name": "last_hidden_state"}
_HARMLESS = {
    "max_seq_length", "do_lower_case", "model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args",
    "config_kwargs", "modality_config", "module_output_name", "transformer_task", "unpad_inputs",
}  # fmt: skip


@dataclass(frozen=True)
class SentenceModel:
    """What the files say: where network and tokenizer lie, the settings, the head, whether text is lower-cased first."""

    network: Path
    settings: ModelSettings
    head: Any
    head_files: tuple[Path, ...]
    lower_case: bool
    own_length: bool
    """Whether the files name a length; else that of the tokenizer and the positions holds."""
    notes: tuple[str, ...]


def is_sentence_model(directory: Path) -> bool:
    """Whether a directory carries the files of this format; embell's own encoders do too."""
    return (directory / MODULES).is_file()


def read(directory: Path) -> SentenceModel:
    """Read the modules of an encoder.

    Raises EncoderError for a module or an option that embell does not know, rather than giving other vectors.
    """
    path = directory / MODULES
    modules = _modules(directory)
    foreign = next((name for name, _ in modules if not name.startswith("sentence_transformers.")), None)
    if foreign is not None:
        raise EncoderError(f"{path}: {foreign} is code of the model's own, which embell does not run")
    kinds = [(name.split(".")[-1], folder) for name, folder in modules]
    if not kinds or kinds[0][0] not in ("Transformer", "StaticEmbedding"):
        raise EncoderError(
            f"{path}: begins with {kinds[0][0] if kinds else 'nothing'}; embell reads Transformer and StaticEmbedding"
        )
    static = kinds[0][0] == "StaticEmbedding"
    poolings = [at for at, (kind, _) in enumerate(kinds) if kind == "Pooling"]
    if not static and poolings != [1]:
        raise EncoderError(f"{path}: embell reads one Pooling, right after the Transformer")
    options = {} if static else _transformer(kinds[0][1])
    pooling, pooled, parts, layers, files = "mean", "all", [], [], []
    for kind, folder in kinds[1:]:
        optional = kind in ("Normalize", "Dropout") and not (folder / "config.json").is_file()
        config = {} if optional else read_json(folder / "config.json")
        if kind == "Pooling" and not static:
            pooling, pooled = _pooling(config, folder)
        elif kind == "Dense":
            part = _dense(config, folder)
            layers.append(heads.build([part], str(folder))[0])
            heads.fill(layers[-1], folder / "model.safetensors")
            parts.append(part)
            files.append(folder / "model.safetensors")
        elif kind == "LayerNorm":
            part = {"kind": "layer-norm", "width": config.get("dimension")}
            layers.append(heads.build([part], str(folder))[0])
            heads.fill(layers[-1], folder / "model.safetensors")
            parts.append(part)
            files.append(folder / "model.safetensors")
        elif kind == "Normalize":
            _on_sentences(config, folder)
            parts.append({"kind": "normalise"})
            layers.append(heads.Normalise())
        elif kind != "Dropout":  # which does nothing outside training
            raise EncoderError(f"{path}: a module of type {kind} is not supported")
    card = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    query, document, notes = _prompts(card, directory)
    similarity = card.get("similarity_fn_name") or "cosine"
    if similarity != "cosine" and {"kind": "normalise"} not in parts:
        notes.append(f"this model was made for {similarity} similarity; embell compares by cosine")
    from torch import nn

    settings = ModelSettings(
        start_layer=None,
        pooling=pooling,
        pooled_tokens=pooled,
        query_prompt=query + "{text}",
        document_prompt=document + "{text}",
        max_length=options.get("max_seq_length") or 1_000_000,
        dim=card.get("truncate_dim"),
        head=tuple(parts),
    )
    return SentenceModel(
        kinds[0][1], settings, nn.Sequential(*layers), tuple(files), bool(options.get("do_lower_case")),
        bool(options.get("max_seq_length")), tuple(notes),
    )  # fmt: skip


def write(directory: Path) -> None:
    """Write the files by which sentence-transformers finds an embell encoder (see sentence_transformer.py)."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": _OWN}]
    (directory / MODULES).write_bytes(orjson.dumps(modules, option=_INDENTED))
    if not (directory / CONFIG).is_file():
        card = {"model_type": "SentenceTransformer", "prompts": {}, "similarity_fn_name": "cosine"}
        (directory / CONFIG).write_bytes(orjson.dumps(card, option=_INDENTED))


def check_own(directory: Path) -> None:
    """Refuse an embell encoder to which sentence-transformers has added what `embell.json` does not say.

    Raises EncoderError.
    """
    names = [name for name, _ in _modules(directory)] if (directory / MODULES).is_file() else [_OWN]
    if names != [_OWN]:
        other = next((name for name in names if name != _OWN), "nothing")
        raise EncoderError(f"{directory / MODULES}: lists {other} besides the encoder; only sentence-transformers can run that")
    card = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if prompt := next(filter(None, _named_prompts(card, directory).values()), None):
        raise EncoderError(
            f"{directory / CONFIG}: has a prompt of its own, {prompt!r}; put it into the prompts of {ModelSettings.FILE}"
        )
    if card.get("truncate_dim"):
        raise EncoderError(f"{directory / CONFIG}: sets truncate_dim; put it into {ModelSettings.FILE} as dim")


def _transformer(folder: Path) -> dict[str, Any]:
    names = [folder / _TRANSFORMER, *sorted(folder.glob("sentence_*_config.json"))]
    path = next((name for name in names if name.is_file()), None)
    options = read_json(path) if path is not None else {}
    for key, value in options.items():
        if key not in _HARMLESS and value not in (None, {}, [], ""):
            raise EncoderError(f"{path}: {key} is not supported")
    if options.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise EncoderError(f"{path}: made for {options['transformer_task']}, not for encoding")
    ways = options.get("modality_config") or {"text": _AS_USUAL}
    if "message" in ways:
        raise EncoderError(f"{path}: texts go through a chat template, which is not supported")
    if ways.get("text") != _AS_USUAL or options.get("module_output_name") not in (None, "token_embeddings"):
        raise EncoderError(f"{path}: reads {ways.get('text')} of the model, not its last hidden states")
    for key in ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs"):
        if not isinstance(options.get(key) or {}, dict):
            raise EncoderError(f"{path}: {key} is {options[key]!r}, not a table")
        changing = set(options.get(key) or {}) - {"dtype", "torch_dtype", "attn_implementation", "trust_remote_code"}
        if changing:
            raise EncoderError(f"{path}: {key} sets {sorted(changing)[0]}, which is not supported")
    return options


def _pooling(config: dict[str, Any], folder: Path) -> tuple[str, str]:
    known = ["embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt", *_SWITCHES]
    check_keys(config, known, str(folder / "config.json"))
    modes = config.get("pooling_mode") or [_SWITCHES[key] for key in _SWITCHES if config.get(key)] or "mean"
    listed = modes if isinstance(modes, list) else [modes]
    unknown = [mode for mode in listed if mode not in (*_MODES, *_MODES.values())]
    if unknown:
        raise EncoderError(f"{folder / 'config.json'}: unknown pooling mode {unknown[0]!r}")
    return "+".join(_MODES.get(mode, mode) for mode in listed), "all" if config.get("include_prompt", True) else "after-prompt"


def _dense(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not str(activation).startswith("torch.nn."):
        raise EncoderError(f"{folder / 'config.json'}: the activation {activation} is not one of torch's own")
    _on_sentences(config, folder)
    return {
        "kind": "dense",
        "inputs": config.get("in_features"),
        "outputs": config.get("out_features"),
        "bias": config.get("bias", True),
        "activation": activation.split(".")[-1],
        "residual": config.get("use_residual", False),
    }


def _on_sentences(config: dict[str, Any], folder: Path) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise EncoderError(f"{folder / 'config.json'}: works on {config[key]}; embell encodes to one vector a text")


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """The type and the folder of each module."""
    path = directory / MODULES
    try:
        return [(str(module["type"]), directory / module["path"]) for module in orjson.loads(path.read_bytes())]
    except (orjson.JSONDecodeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{path}: damaged ({error})") from error


def _named_prompts(card: dict[str, Any], directory: Path) -> dict[str, str]:
    prompts = card.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
        raise EncoderError(f"{directory / CONFIG}: prompts must be texts with names")
    return prompts


def _prompts(card: dict[str, Any], directory: Path) -> tuple[str, str, list[str]]:
    """The prompts for queries and documents, and notes: what `encode_query` and `encode_document` of that library take.

    Neither takes the default prompt, nor those named "passage" or "corpus".
    """
    path = directory / CONFIG
    prompts = _named_prompts(card, directory)
    default = card.get("default_prompt_name") or ""
    if default and str(default) not in {"query", "document", *prompts}:
        raise EncoderError(f"{path}: the default prompt {default!r} is not among the prompts")
    query, document = prompts.get("query") or "", prompts.get("document") or ""
    for prompt in (query, document):
        if "{text}" in prompt:
            raise EncoderError(f"{path}: the prompt {prompt!r} contains {{text}}")
    meant = next(
        (name for name in ("passage", "corpus", default) if name not in ("query", "document") and prompts.get(name)), None
    )
    notes = []
    if meant is not None and not document:
        notes.append(
            f"documents get no prompt, as with encode_document of sentence-transformers; if the model's prompt {meant!r} "
            f"is meant for them, give document_prompt={prompts[meant] + '{text}'!r}"
        )
    return query, document, notes
