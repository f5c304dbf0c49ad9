"""Graphs of random small configurations: what an exported bundle answers is what transformers does, at
lengths on all sides of what the configuration draws a line at.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from kills import _tokenizer
from processes_of_trials import done

import adapterpack

CLOSE = 1e-3
"""Of the largest logit; float32 on both sides, whose sums are added up in other orders."""


def _decoder(dice: random.Random) -> tuple[str, dict[str, Any]]:
    heads = dice.choice((1, 2, 3, 4))
    groups = dice.choice([number for number in range(1, heads + 1) if heads % number == 0])
    size = dice.choice((8, 16))
    common: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": heads * size,
        "intermediate_size": dice.choice((8, 24, 33)),
        "num_attention_heads": heads,
        "num_hidden_layers": dice.choice((1, 2, 3)),
        "num_key_value_heads": groups,
        "max_position_embeddings": dice.choice((64, 128)),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": dice.random() < 0.5,
        "rms_norm_eps": dice.choice((1e-5, 1e-6)),
    }
    kind = dice.choice(
        ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma", "olmo2", "phi3", "granite", "gpt2")
    )
    if kind in ("llama", "mistral", "qwen3") and dice.random() < 0.3:
        common["head_dim"] = dice.choice((8, 16, 24))
    if kind == "llama":
        common |= {"attention_bias": dice.random() < 0.3, "mlp_bias": dice.random() < 0.3}
        if dice.random() < 0.4:
            common["rope_parameters"] = dice.choice(
                (
                    {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
                    {
                        "rope_type": "llama3",
                        "factor": 4.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 32,
                        "rope_theta": 10000.0,
                    },
                )
            )
    if kind in ("mistral", "gemma2"):
        common["sliding_window"] = dice.choice((8, 20, 40))
    if kind == "gpt2":
        common = {
            "vocab_size": 40,
            "n_embd": heads * size,
            "n_head": heads,
            "n_layer": dice.choice((1, 2)),
            "n_positions": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    return kind, common


def _saved(folder: Path, kind: str, settings: dict[str, Any], seed: int) -> None:
    import torch
    import transformers

    transformers.set_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for value in model.parameters():  # norms and biases too, of a size at which a lost one shows
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    _tokenizer(folder)


def graph(dice: random.Random, folder: Path) -> None:
    """A decoder with an adapter at random layers: the logits of each row alone and beside others, and the
    next tokens.
    """
    kind, settings = _decoder(dice)
    (folder / "settings.txt").write_text(f"{kind} {settings}")
    try:
        done(lambda: _saved(folder / "base", kind, settings, dice.randrange(99)), folder)
        done(lambda: _packed(folder, dice.randrange(99)), folder)
        done(lambda: adapterpack.export(folder / "base", [folder / "pack"], folder / "bundle"), folder)
        lengths = [1, 7, *(dice.randrange(2, 60) for _ in range(3))]
        rows = [[dice.randrange(3, 40) for _ in range(length)] for length in lengths]
        done(lambda: _compared(folder, rows), folder)
    except AssertionError as error:
        raise AssertionError(f"{kind} {settings}\n{error}") from error


def _packed(folder: Path, seed: int) -> None:
    import torch

    from adapterpack.base.checkpoint import Checkpoint

    base, rng = Checkpoint(folder / "base"), np.random.default_rng(seed)
    linear = [
        name for name, info in base.tensors.items() if len(info.shape) == 2 and name.endswith("_proj.weight")
    ]
    chosen = sorted(rng.choice(linear, min(3, len(linear)), replace=False)) if linear else []
    shapes: dict[str, tuple[int, int]] = {
        name.removesuffix(".weight"): base.tensors[name].shape for name in chosen
    }  # type: ignore[misc]
    if not shapes:  # GPT-2 stores them turned
        name = next(name for name in base.tensors if name.endswith("attn.c_proj.weight"))
        rows, columns = base.tensors[name].shape
        shapes = {f"transformer.{name.removesuffix('.weight').removeprefix('transformer.')}": (columns, rows)}
    model = _transformers(folder)
    adapterpack.adapt(
        model, adapterpack.LoRA(r=2, targets=tuple({path.rpartition(".")[2] for path in shapes})), "one"
    )
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(
                    0.1 * torch.from_numpy(rng.standard_normal(tuple(value.shape)).astype(np.float32))
                )
    adapterpack.save(model, folder / "pack", base=folder / "base")


def _transformers(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype="float32", attn_implementation="eager"
    ).eval()


def _compared(folder: Path, rows: list[list[int]]) -> None:
    import torch

    model = _transformers(folder)
    session = adapterpack.Session(folder / "bundle")
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    for name in (None, "pack"):
        if name is not None:
            adapterpack.attach(model, adapterpack.load(folder / "pack"), check_base=False)
        together = session.run({"input_ids": ids, "attention_mask": mask}, [name] * len(rows))["logits"]
        for number, row in enumerate(rows):
            with torch.no_grad():
                wanted = model(torch.tensor([row])).logits[0].numpy()
            alone = session.run(
                {"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), np.int64)}, [name]
            )["logits"]
            size = float(np.abs(wanted).max())
            for how, found in (("alone", alone[0]), ("with others", together[number, : len(row)])):
                off = float(np.abs(found - wanted).max()) / size
                assert off < CLOSE, (
                    f"{name}, a row of {len(row)} {how}: off by {off:.2g} of the largest logit"
                )
            first, second = np.sort(wanted[-1])[[-1, -2]]
            (answer,) = session.generate([row], [name], max_new_tokens=1)
            if first - second > CLOSE * size:
                assert answer.ids[:1] in ((), (int(wanted[-1].argmax()),)), (
                    f"{name}, a row of {len(row)}: another token"
                )


TRIALS: dict[str, Callable[[random.Random, Path], None]] = {"graph": graph}
