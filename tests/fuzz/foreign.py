"""Folders of adapters as other tools write them, one of each form: what is fuzzed is their configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapterpack.adapter_methods import Site, get
from adapterpack.adapter_methods.lora import LoRA
from adapterpack.composing.pipeline import compose
from adapterpack.converting.format import ConversionSource
from adapterpack.converting.pipeline import convert, detect
from adapterpack.errors import AdapterpackError
from adapterpack.io.safetensors import SafetensorsFile, write
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.peft.layout import CONFIG

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"
MLX = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0.0},
    "seed": 0,
}
BOTTLENECK = {
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 4,
    "non_linearity": "swish",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_rank": 1,
    "phm_bias": True,
}
COMPACTER = {"phm_layer": True, "phm_dim": 2, "reduction_factor": 3, "non_linearity": "gelu"}
LORA = {
    "architecture": "lora",
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": 2,
    "alpha": 3,
    "dropout": 0.0,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "init_weights": "lora",
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
    "dtype": None,
}
HEAD = {
    "config": {
        "head_type": "classification",
        "num_labels": 2,
        "layers": 2,
        "activation_function": "tanh",
        "label2id": {"no": 0, "yes": 1},
        "use_pooler": False,
        "bias": True,
        "dropout_prob": None,
    },
    "hidden_size": 12,
    "model_class": "X",
    "model_name": "",
    "model_type": "bert",
    "name": "a",
    "version": "adapters.1.3.0",
}
HEAD_FILE = "head_config.json"


class Foreign(NamedTuple):
    """An adapter of another tool: where it lies, its settings as JSON, and what puts others in their
    place.
    """

    path: Path
    settings: bytes
    put: Callable[[bytes], object]


def _folder(path: Path, config: Mapping[str, Any], file: str, tensors: Mapping[str, np.ndarray]) -> None:
    path.mkdir(parents=True)
    (path / CONFIG).write_text(json.dumps(config))
    write(path / file, dict(tensors))


def _hub(
    path: Path, family: str, name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    saved = {
        **{key: value for key, value in HEAD.items() if key != "config"},
        "config": config,
        "model_type": family,
        "name": name,
    }
    _folder(path, saved, "adapter.safetensors", tensors)


def _lora(name: str) -> Pack:
    params = {"lora_A": np.ones((2, 12), np.float32), "lora_B": np.ones((6, 2), np.float32)}
    return build(
        name,
        get("lora"),
        {Site("net.q", 12, 6): (LoRA(r=2, alpha=4), params)},
        task=m.PackTask("text-generation"),
        base=m.Base("org/base"),
    )


def write_adapters(root: Path, packs: Path) -> dict[str, Foreign]:
    """Adapters by name: of mlx-lm, AdapterHub and diffusers, an X-LoRA, and of PEFT for each of the ``packs``
    that it has a form for.
    """
    ones = {f"{MODULE}.lora_a": np.ones((7, 3), np.float32), f"{MODULE}.lora_b": np.ones((3, 5), np.float32)}
    _folder(root / "mlx", MLX, "adapters.safetensors", ones)
    _folder(
        root / "mlx-dora",
        {**MLX, "fine_tune_type": "dora"},
        "adapters.safetensors",
        {**ones, f"{MODULE}.m": np.ones(5, np.float32)},
    )
    kept = SafetensorsFile(GOLDEN)
    for name, config in (("houlsby", BOTTLENECK), ("compacter", {**BOTTLENECK, **COMPACTER})):
        start = f"bert/{name}/"
        _hub(
            root / f"adapterhub-{name}",
            "bert",
            name,
            config,
            {key.removeprefix(start): kept.read(key) for key in kept.tensors if key.startswith(start)},
        )
    place = "bert.encoder.layer.0.attention.self.query.loras.a"
    factors = {
        f"{place}.lora_A": np.ones((2, 12), np.float32),
        f"{place}.lora_B": np.ones((12, 2), np.float32),
    }
    for name in ("lora", "head"):
        _hub(root / f"adapterhub-{name}", "bert", "a", LORA, factors)
    (root / "adapterhub-head" / HEAD_FILE).write_text(json.dumps(HEAD))
    write(
        root / "adapterhub-head" / "model_head.safetensors",
        {
            f"heads.a.{key}": np.ones(shape, np.float32)
            for key, shape in (
                ("1.weight", (12, 12)),
                ("1.bias", (12,)),
                ("4.weight", (2, 12)),
                ("4.bias", (2,)),
            )
        },
    )
    for folder in sorted(packs.iterdir()):
        with suppress(AdapterpackError):  # PEFT has no such method
            convert(folder, root / f"peft-{folder.name}", to="peft")
    experts = [_lora("expert0"), _lora("expert1")]
    convert(compose(experts, tree="xlora(expert0, expert1, hidden=4)"), root / "xlora", to="xlora")
    found = {
        folder.name: _with_file(folder, HEAD_FILE if folder.name == "adapterhub-head" else CONFIG)
        for folder in sorted(root.iterdir())
    }
    found["diffusers"] = _of_diffusers(root / "diffusers.safetensors")
    for one in found.values():
        read(one.path)
    return found


def _with_file(folder: Path, name: str) -> Foreign:
    return Foreign(folder, (folder / name).read_bytes(), (folder / name).write_bytes)


def _of_diffusers(path: Path) -> Foreign:
    tensors = {
        "unet.net.q.lora_A.weight": np.ones((2, 12), np.float32),
        "unet.net.q.lora_B.weight": np.ones((6, 2), np.float32),
    }
    settings = {
        f"unet.{key}": value
        for key, value in (
            ("r", 2),
            ("lora_alpha", 4),
            ("use_rslora", False),
            ("rank_pattern", {}),
            ("target_modules", ["net.q"]),
        )
    }

    def put(data: bytes) -> None:
        path.unlink(missing_ok=True)
        write(path, tensors, {"format": "pt", "lora_adapter_metadata": data.decode("utf-8", "replace")})

    put(json.dumps(settings).encode())
    return Foreign(path, json.dumps(settings).encode(), put)


def read(path: Path) -> Pack:
    """The pack that an adapter is converted to, its numbers looked at."""
    pack = detect(path).read(ConversionSource(path, "a")).pack
    m.parse(pack.manifest.to_bytes(), "converted")
    for group in pack.manifest.groups:
        pack.params(group.path)
    return pack
