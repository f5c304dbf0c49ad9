"""Adapters that mlx-lm makes, and what its models give with them: ``python make_mlx.py FOLDER [back]``, in an
environment with mlx-lm.

``FOLDER/bases/FAMILY`` are checkpoints. It writes ``adapters/FAMILY/NAME`` and ``made.safetensors``
(FAMILY/NAME -> logits); with ``back`` it loads ``back/FAMILY/NAME`` instead, as ``mlx_lm.generate
--adapter-path`` does, and writes ``back.safetensors``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config

CASES = {
    "lora": (2, {"rank": 3, "scale": 2.5, "dropout": 0.0}, False),
    "dora": (
        1,
        {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
        True,
    ),
    "old": (2, {"rank": 4, "scale": 3.0, "dropout": 0.0}, False),
}
"""Name -> layers, ``lora_parameters``, and whether it is DoRA."""


def logits(base: Path, adapter: Path, ids: mx.array) -> mx.array:
    """What the base gives with an adapter on the disk, in float32."""
    model, _ = load_model(base)
    load_adapters(model, str(adapter))
    model.eval()
    return model(ids).astype(mx.float32)


def make(base: Path, adapter: Path, name: str) -> None:
    """A random adapter, saved as the trainer saves it."""
    layers, parameters, dora = CASES[name]
    model, _ = load_model(base)
    model.freeze()
    linear_to_lora_layers(model, layers, parameters, use_dora=dora)
    moved = [
        (key, value + 0.3 * mx.random.normal(value.shape))
        for key, value in tree_flatten(model.trainable_parameters())
    ]
    adapter.mkdir(parents=True)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), dict(moved))
    save_config(
        {
            "model": str(base),
            "train": True,
            "fine_tune_type": "dora" if dora else "lora",
            "num_layers": layers,
            "seed": 0,
            "optimizer_config": {"adam": {}},
            "lora_parameters": parameters,
            "learning_rate": 1e-5,
        },
        adapter / "adapter_config.json",
    )


def age(adapter: Path, parameters: dict[str, object]) -> None:
    """Rewrites a LoRA as mlx-lm before 0.14 wrote it: arrays of numpy, and a configuration with alpha."""
    new = adapter / "adapters.safetensors"
    mx.savez(str(adapter / "adapters.npz"), **dict(mx.load(str(new))))
    new.unlink()
    older = {"alpha": parameters["rank"], "keys": None, **parameters}
    save_config({"lora_layers": 2, "lora_parameters": older, "seed": 0}, adapter / "adapter_config.json")


def main(folder: Path, back: bool) -> None:
    """Every case of every family."""
    mx.random.seed(0)
    ids = mx.load(str(folder / "ids.safetensors"))["ids"]
    kept = {}
    for family in ("llama", "qwen2"):
        for name in CASES:
            adapter = folder / ("back" if back else "adapters") / family / name
            if not back:
                make(folder / "bases" / family, adapter, name)
            kept[f"{family}/{name}"] = logits(folder / "bases" / family, adapter, ids)
            if name == "old" and not back:
                age(adapter, CASES[name][1])
    mx.save_safetensors(str(folder / ("back.safetensors" if back else "made.safetensors")), kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["back"])
