"""Finding a model's files, and loading its network and tokenizer from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embell.errors import EncoderError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_NAME = "embell-mini"
EMBEDDED_MODEL = Path(__file__).parent / "models" / EMBEDDED_NAME
_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "angle.config"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def find(model: str | os.PathLike[str] | None, revision: str | None) -> Path:
    """The directory of a model: the embedded one, one on disk, or a hub id's after downloading it.

    Raises EncoderError if there is none.
    """
    if model is None:
        if not (EMBEDDED_MODEL / "model.safetensors").is_file():
            raise EncoderError("the embedded model is missing from this installation; install embell again, or give a model")
        return EMBEDDED_MODEL
    directory = Path(model)
    if os.fspath(model) == EMBEDDED_NAME and not directory.is_dir():
        return find(None, None)
    if directory.is_dir():
        if not any((directory / name).is_file() for name in ("config.json", "modules.json", "adapter_config.json")):
            raise EncoderError(f"{directory}: not a model directory, it has no config.json")
        return directory
    name = os.fspath(model)
    if directory.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise EncoderError(f"{name}: no such model directory; give a directory or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        # Whatever the network stack raises, the user's question is the same: where is the model?
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EncoderError(f"{name}: neither a directory here nor to be had from the hub ({reason})") from error


def recorded_name(model: str | os.PathLike[str] | None, directory: Path) -> str:
    """How to find the model again: a hub id as it is, a directory by its full path."""
    if model is None or directory == EMBEDDED_MODEL:
        return EMBEDDED_NAME
    return str(Path(model).resolve()) if Path(model).is_dir() else os.fspath(model)


def fingerprint(directory: Path, others: Sequence[Path] = (), said: bytes = b"") -> str:
    """A hash of weights and tokenizer: each file's size, its first 64 KiB and 4 KiB of every MiB.

    Sampling keeps large models quick to open; a fine-tuned model differs in every tensor, so it
    does not slip through. `others` are further files that decide the vectors, `said` is what else does.
    """
    digest = hashlib.blake2b(said, digest_size=16)
    words = (
        ["tokenizer.json"]
        if (directory / "tokenizer.json").is_file()
        else ["vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"]
    )
    for path in [*sorted(directory.glob("*.safetensors")), *(directory / name for name in words), *others]:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.suffix}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            for offset in range(1 << 20, size, 1 << 20):
                file.seek(offset)
                digest.update(file.read(4096))
    return digest.hexdigest()


def load_network(directory: Path, dtype: torch.dtype, layers: int | None) -> tuple[PreTrainedModel, int]:
    """The transformer without a head, weights from safetensors only; with `layers`, the first of its layers alone.

    Also says how many layers there are in the files.

    Raises EncoderError if it cannot be read, lacks weights, or has fewer layers.
    """
    from transformers import AutoConfig, AutoModel

    if not any(directory.glob("*.safetensors")):
        raise EncoderError(f"{directory}: no safetensors weights; convert the model first (pickled weights are never loaded)")
    with quietly():
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # a damaged file raises whatever its reader likes
            raise EncoderError(f"{directory}: cannot be loaded: {_short(error)}") from error
        total = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if layers is not None:
            _keep(config, layers, directory)
        try:
            # Some architectures have no sdpa; they say so in their own words.
            try:
                model, loading = _load(AutoModel, directory, config, dtype, "sdpa")
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                model, loading = _load(AutoModel, directory, config, dtype, "eager")
        except Exception as error:
            raise EncoderError(f"{directory}: cannot be loaded: {_short(error)}") from error
    lost = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))  # a pooler is not read
    if lost:
        raise EncoderError(f"{directory}: the weights lack {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""))
    if not hasattr(model.config.get_text_config(), "num_hidden_layers"):
        raise EncoderError(f"{directory}: a {model.config.model_type} model is not one that embell knows how to read")
    network: PreTrainedModel = model.eval()
    return network, int(total)


def _load(auto: Any, directory: Path, config: Any, dtype: torch.dtype, attention: str) -> tuple[Any, dict[str, Any]]:
    model, loading = auto.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model, loading


def _keep(config: Any, layers: int, directory: Path) -> None:
    """Make the configuration one of a model with the first layers alone: the rest is then not even read."""
    text = config.get_text_config()
    total = getattr(text, "num_hidden_layers", 0)
    if not 1 <= layers <= total:
        raise EncoderError(f"{directory}: cannot keep {layers} layers of a model that has {total}")
    text.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, list(getattr(text, name))[:layers])


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises EncoderError if it cannot be read, or is not a fast one.
    """
    from transformers import AutoTokenizer

    with quietly():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:
            raise EncoderError(f"{directory}: its tokenizer cannot be loaded: {_short(error)}") from error
    if not tokenizer.is_fast:
        raise EncoderError(f"{directory}: embell needs a fast tokenizer (tokenizer.json)")
    return tokenizer


def own_code(directory: Path) -> str:
    """The class that a model directory brings code of its own for, "" if there is none: transformers takes its own of that type instead."""
    for name, auto in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        try:
            said = json.loads((directory / name).read_bytes())
            code = said["auto_map"][auto]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        code = next((one for one in code if one), "") if isinstance(code, list) else code
        if code:
            return str(code)
    return ""


def keep_normalizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a saved tokenizer folds text as it does now.

    Classes of transformers that make their own normalizer do so again when they are loaded, whatever their file says; the plain class does not.
    """

    def normalizer(one: Any) -> Any:
        return json.loads(one.backend_tokenizer.to_str())["normalizer"]

    if normalizer(load_tokenizer(directory)) != normalizer(tokenizer):
        path = directory / "tokenizer_config.json"
        said = json.loads(path.read_bytes())
        path.write_text(json.dumps({**said, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False))


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory brings a tokenizer of its own."""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def position_limit(network: torch.nn.Module) -> int | None:
    """The longest text, in tokens, that the model has positions for; None if nothing says so.

    Models of the RoBERTa family count their positions from the padding token's id plus 1.
    """
    limit: int | None = getattr(network.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    if limit is None or limit < 1:
        return None
    for module in network.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            return limit - padding - 1
    return limit


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def quietly() -> Iterator[None]:
    """Loading shows no progress bars or reports of transformers; the caller's settings are put back."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
