"""LoRA adapters over a base model (PEFT files), loaded key by key: nothing is missing, nothing left over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from embell.engine.spec import read_json
from embell.errors import EncoderError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


_DECIDING = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "layers_to_transform",
    "fan_in_fan_out", "exclude_modules",
)  # fmt: skip


def deciding(directory: Path) -> dict[str, Any]:
    """The part of an adapter's configuration that decides the vectors, in a settled order."""
    config = read_json(directory / CONFIG)
    values = {name: config.get(name) for name in _DECIDING}
    return {name: sorted(value) if isinstance(value, list) else value for name, value in values.items() if value}


def base_of(directory: Path) -> str | None:
    """The base model that an adapter directory names; None if it is no adapter directory.

    Raises EncoderError if its configuration is damaged.
    """
    path = directory / CONFIG
    if not path.is_file():
        return None
    base = read_json(path).get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise EncoderError(f"{path}: base_model_name_or_path is {base!r}, not a name")
    return base


def base_revision(directory: Path) -> str | None:
    """The revision of the base model that an adapter directory names; None if it names none."""
    found = read_json(directory / CONFIG).get("revision")
    return found if isinstance(found, str) and found else None


class Adapter:
    """An adapter that is at work inside a model."""

    def __init__(self, model: nn.Module, directory: Path, left_out: range) -> None:
        """Put the adapter of `directory` into `model`, without its part for the layers that are `left_out`.

        Raises EncoderError if it is not LoRA, if a weight is missing, unknown, or of another shape.
        """
        from peft import LoraConfig, LoraModel, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

        if not (directory / WEIGHTS).is_file():
            raise EncoderError(f"{directory}: no {WEIGHTS}; convert the adapter first (pickled weights are never loaded)")
        try:
            config = PeftConfig.from_pretrained(str(directory))
            stored = load_file(directory / WEIGHTS)
        except Exception as error:  # a damaged file raises what its reader likes
            raise EncoderError(f"{directory}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        if not isinstance(config, LoraConfig):
            raise EncoderError(f"{directory}: an adapter of type {config.peft_type}; embell loads LoRA adapters")
        config.inference_mode = True
        try:
            self._tuner = LoraModel(model, {"default": config}, "default")
        except Exception as error:
            raise EncoderError(f"{directory}: does not fit the model: {' '.join(str(error).split())[:300]}") from error
        self._config = config
        expected = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
        given = {_short(name, expected): tensor for name, tensor in stored.items()}
        given = {name: tensor for name, tensor in given.items() if name in expected or _layer(name) not in left_out}
        back = {_short(name, expected): name for name in stored}
        where = directory / WEIGHTS
        if lost := sorted(set(expected) - set(given)):
            raise EncoderError(f"{where}: lacks {lost[0]}{_more(lost)}; it does not belong to this model or configuration")
        if strange := sorted(set(given) - set(expected)):
            raise EncoderError(f"{where}: holds {back[strange[0]]}{_more(strange)}, for which the model has no place")
        for name, tensor in given.items():
            if tensor.shape != expected[name].shape:
                raise EncoderError(
                    f"{where}: {back[name]} is {_shape(tensor)}, but {_shape(expected[name])} is what the model and {CONFIG} ask for"
                )
        set_peft_model_state_dict(model, given, adapter_name="default")
        for name, tensor in get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False).items():
            if not torch.equal(tensor.cpu(), given[name].to(tensor.dtype)):
                raise EncoderError(f"{where}: {back[name]} did not reach the model; this version of peft is not supported")

    @classmethod
    def fresh(cls, model: nn.Module, rank: int, alpha: int | None, dropout: float) -> Adapter:
        """Put a new adapter into every linear layer of `model` and freeze the rest; it changes nothing until it is trained.

        `alpha` scales it by alpha / rank, by default 1.

        Raises EncoderError for a model without linear layers.
        """
        from peft import LoraConfig, LoraModel

        linear = sorted(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        if not linear:
            raise EncoderError(f"a {type(model).__name__} has no linear layers for an adapter; train all of its weights")
        made = cls.__new__(cls)
        made._config = LoraConfig(
            r=rank, lora_alpha=alpha or rank, lora_dropout=dropout, target_modules=_suffixes(linear), bias="none"
        )
        made._tuner = LoraModel(model, {"default": made._config}, "default")
        return made

    def merge(self) -> None:
        """Add the adapter to the weights of the base model and take it out."""
        self._tuner.merge_and_unload()

    def save(self, model: nn.Module, directory: Path, base: str, revision: str | None) -> None:
        """Write the adapter alone, with the name of its base model and the revision of that.

        Raises EncoderError if the directory holds a whole model.
        """
        if (directory / "config.json").is_file():
            raise EncoderError(
                f"{directory}: holds a model already, which the adapter would be mixed up with; save to a new directory"
            )
        from peft import get_peft_model_state_dict

        weights: dict[str, Any] = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
        save_file({_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
        self._config.base_model_name_or_path, self._config.revision = base, revision
        self._config.save_pretrained(str(directory))


def _suffixes(names: list[str]) -> list[str]:
    """The last parts of module names (q_proj, down_proj), each once, as adapters list their targets."""
    return sorted({name.rpartition(".")[2] for name in names})


def _short(name: str, expected: dict[str, Any]) -> str:
    """A stored key as the bare model knows it: adapters are mostly trained around a model with a language-model head."""
    name = name.removeprefix(_PREFIX)
    if name not in expected:
        head = name.partition(".")[2]
        if head in expected or not any(key.split(".")[0] == name.split(".")[0] for key in expected):
            return head
    return name


def _layer(name: str) -> int:
    """The number of the layer that a key belongs to, -1 if to none."""
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _shape(tensor: torch.Tensor) -> str:
    return " × ".join(map(str, tensor.shape))
