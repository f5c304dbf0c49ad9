"""A random model with a real tokenizer and chat template, packs of it, and their bundle: for servers of tests
and of scripts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

NAMES = ("alpha", "beta", "gamma")


def write_model(folder: Path, tokenizer: Path, kind: str = "llama", seed: int = 5, **fields: Any) -> Path:
    """A model of two narrow layers that knows nothing, with the tokens of SmolLM2; a Llama, or of another
    ``kind`` with these ``fields``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=49_152,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        tie_word_embeddings=True,
        eos_token_id=2,
        **{"max_position_embeddings": 512, **fields},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder)
    return folder


def write_packs(folder: Path, model: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Packs of LoRA with ranks from 2 on, each in a folder of its name."""
    import torch

    from adapterpack import LoRA, adapt, save
    from adapterpack.tasks.task import get_task
    from adapterpack.torch_adapters.models.load import load_model

    for rank, name in enumerate(names, 2):
        adapted = adapt(load_model(get_task("text-generation"), model, None), LoRA(r=rank, alpha=8), name)
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        save(adapted, folder / name, base=model)
    return folder


def write_bundle(folder: Path, model: Path, packs: list[Path]) -> Path:
    """A bundle for the engine with these packs; servers may load more."""
    from adapterpack import export

    export(model, packs, folder, mode="bank", in_place=True, slots=4, max_rank=6)
    return folder
