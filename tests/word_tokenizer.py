"""Writes a tokenizer whose words are ``w0`` ``w1`` and so on."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 96


def write_tokenizer(folder: Path) -> None:
    """Four special tokens, and a word for each other id of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{number}" for number in range(VOCABULARY - 4))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)
