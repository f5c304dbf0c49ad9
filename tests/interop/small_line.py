"""A tiny random model with a tokenizer, two LoRA packs on it, and a bank bundle of both: ``small_line.py
FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import adapterpack
from adapterpack import LoRA

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{number}" for number in range(60))]


def main(folder: Path) -> None:
    """Writes ``base``, ``packs/a``, ``packs/b`` and ``bundle`` into a new folder."""
    set_seed(3)
    base = folder / "base"
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(base)
    for name, rank in (("a", 3), ("b", 5)):
        model = adapterpack.adapt(
            LlamaForCausalLM.from_pretrained(base), LoRA(r=rank, targets="all-linear"), name
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        adapterpack.save(model, folder / "packs" / name, base=base)
    adapterpack.export(base, [folder / "packs" / name for name in "ab"], folder / "bundle", mode="bank")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
