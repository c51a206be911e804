"""A tiny random MoE with a byte-level tokenizer, saved as users save theirs.

from tests.tiny_checkpoint import byte_tokenizer, save_checkpoint
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import tiny_model

END = "<|end|>"
VOCABULARY = 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one that ends a text; nothing is put before or after one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {symbol: number for number, symbol in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def closing_tokenizer(template: str = f"$A {END}") -> PreTrainedTokenizerFast:
    """The same, as one saved with add_eos_token: it ends every text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(END, 0)]
    )
    return tokenizer


def byte_model(family: str = "olmoe", **overrides: Any) -> PreTrainedModel:
    """A tiny model of `family` that reads bytes."""
    ends = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
    return tiny_model(family, vocab_size=VOCABULARY, **(ends | overrides))


def save_checkpoint(directory: Path, family: str = "olmoe", **overrides: Any) -> Path:
    """Writes model and tokenizer; returns the directory."""
    byte_model(family, **overrides).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
