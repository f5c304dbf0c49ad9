"""Writes a tokenizer whose words are ``w0`` ``w1`` and so on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

VOCABULARY = 96


def write_tokenizer(folder: Path, named: Sequence[str] = (), template: str | None = None) -> None:
    """Four special tokens, and a word for each other id of the vocabulary; the last words are the ``named``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{number}" for number in range(VOCABULARY - 4))]
    words[len(words) - len(named) :] = named
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
