"""Reads torchtune's own adapters: ``adapter_config.json`` and ``adapter_model.pt`` (``adapter_0.pt`` before
0.5), of which only the tensors are read: no code in it runs.

A module has ``lora_a.weight`` [r, in] and ``lora_b.weight`` [out, r], with DoRA also ``magnitude`` [out],
under torchtune's names. Its models of some families rotate neighbouring numbers of a head, where those of
transformers rotate its halves, so that the outputs of queries and keys have another order.

Names and order: https://github.com/pytorch/torchtune/blob/main/torchtune/models/convert_weights.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter_methods import Arrays, Site, get
from ...errors import FormatError, Unsupported
from ...io import TENSORS, torch_file
from ...manifest import MethodSites
from ...peft import PICKLES, TORCHTUNE, layout, read_config, site_of
from .. import (
    FORMATS,
    BaseModel,
    ConversionSource,
    Format,
    Reading,
    bind_to_base,
    check_pair,
    drop_targets,
    finite_number,
    first_bytes,
    foreign_pack,
    group_leaves,
    require_pairs,
    split_key,
)

_FILE = "adapter_model.pt"
_LEAVES = {"lora_a.weight": "lora_A", "lora_b.weight": "lora_B", "magnitude": "lora_magnitude_vector"}
"""torchtune's leaf -> ours."""
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""A module of a layer: torchtune's name -> transformers'."""
_LAYER = re.compile(r"layers\.([0-9]{1,5})\.(.+)")
_HEADS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
"""A module whose outputs are rotated -> the setting with the number of its heads."""
_NEIGHBOURS = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2"), True),
    **dict.fromkeys(("qwen2", "qwen3", "phi3"), False),
}
"""``model_type`` of a base -> whether torchtune's model of it rotates neighbouring numbers."""
_FIRST = 1 << 16
"""Bytes from the beginning of a file, where torch writes the names of its tensors."""


def _files(folder: Path) -> list[Path]:
    named = [path for path in sorted(folder.iterdir()) if TORCHTUNE.fullmatch(path.name)]
    return [folder / _FILE] if (folder / _FILE).is_file() else named


def _detect(path: Path) -> bool:
    if not path.is_dir() or (path / TENSORS).exists() or (path / PICKLES[0]).exists():
        return False  # beside its own form, torchtune writes PEFT's
    return any(b".lora_a.weight" in first_bytes(file, _FIRST) for file in _files(path))


def _read(source: ConversionSource) -> Reading:
    file, *others = _files(source.path)
    if others:
        raise Unsupported(
            "the folder holds the adapters of several epochs",
            where=source.path,
            found=f"{file.name}, {', '.join(other.name for other in others)}"[:200],
            remedy="move the one that you want into a folder of its own, with adapter_config.json",
        )
    alpha = _alpha(source.path / layout.CONFIG)
    tensors = torch_file.read(file)
    modules = group_leaves(
        tensors,
        lambda key: split_key(key, _LEAVES),
        file,
        ", ".join(_LEAVES),
        "merge it in torchtune, and extract the difference with adapterpack extract",
    )
    require_pairs(modules, ("lora_a.weight", "lora_b.weight"), file)
    sites: dict[str, dict[Site, tuple[Any, Arrays]]] = {"lora": {}, "dora": {}}
    for name, keys in modules.items():
        path = _path(name, file)
        where = f"{file}, {name}"
        params = {_LEAVES[leaf]: tensors[key] for leaf, key in keys.items()}
        check_pair(params["lora_A"], params["lora_B"], where)
        order = _order(path, params["lora_B"].shape[0], source.base, where)
        params |= {leaf: params[leaf][order] for leaf in params if leaf != "lora_A"}
        method = get("dora" if "lora_magnitude_vector" in params else "lora")
        cfg = drop_targets(method.config(r=params["lora_A"].shape[0], alpha=alpha))
        site, params = site_of(method, cfg, path, "linear", params, file)
        sites[method.name][site] = (cfg, params)
    parts = [MethodSites(get(name), of_method) for name, of_method in sites.items() if of_method]
    note = f"{file.name} is a pickle: its tensors were read, and nothing of it was run"
    return Reading(bind_to_base(foreign_pack(source, parts, "torchtune"), source.base), (note,))


def _alpha(config: Path) -> float:
    """Reads alpha from the configuration, which torchtune's checkpointers for other forms than
    transformers' do not write.

    Raises:
        FormatError: it is missing.
    """
    if not config.is_file():
        raise FormatError(
            "torchtune wrote no configuration beside this adapter, and its tensors do not tell alpha",
            where=config.parent,
            expected=config.name,
            remedy=f'write {config.name} with the lora_alpha of the recipe, {{"lora_alpha": 16}}, and '
            "convert the folder: adapterpack convert FOLDER --base BASE --to pack -o OUT",
        )
    return finite_number(read_config(config).get("lora_alpha"), f"{config}#/lora_alpha")


def _path(name: str, file: Path) -> str:
    """Returns the path of a module in transformers' model.

    Raises:
        Unsupported: torchtune's module has no counterpart that is known.
    """
    if name == "output":
        return "lm_head"
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[2] not in _MODULES:
        raise Unsupported(
            "a module of torchtune's whose name in transformers is not known",
            where=file,
            found=name,
            expected=f"layers.N. with {', '.join(_MODULES)}, or output",
            remedy="merge it in torchtune, and extract the difference with adapterpack extract",
        )
    return f"model.layers.{int(layer[1])}.{_MODULES[layer[2]]}"


def _order(path: str, width: int, base: BaseModel | None, where: str) -> np.ndarray:
    """Returns where in torchtune's order the outputs of a module are, in transformers' order.

    Raises:
        Unsupported: the order of this family is not known.
        FormatError: the heads of the base do not make up the outputs.
    """
    heads_of = next((key for module, key in _HEADS.items() if path.endswith(f".{module}")), None)
    order = np.arange(width)
    if heads_of is None or base is None:
        return order
    if base.model_type not in _NEIGHBOURS:
        raise Unsupported(
            "in which order torchtune has the outputs of queries and keys is not known for this base",
            where=base.folder,
            found=base.model_type,
            expected=", ".join(_NEIGHBOURS),
            remedy="let torchtune's checkpointer write PEFT's form, where it can",
        )
    if not _NEIGHBOURS[base.model_type]:
        return order
    heads = base.config.get(heads_of, base.config.get("num_attention_heads"))
    if type(heads) is not int or heads < 1 or width % (2 * heads):
        raise FormatError(
            "the heads of the base do not make up the outputs of this module",
            where=where,
            expected=f"a multiple of 2 * {heads} ({heads_of})",
            found=width,
        )
    return order.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


FORMATS.register(
    Format(
        "torchtune",
        "torchtune's adapter_model.pt and adapter_config.json",
        True,
        _detect,
        _read,
        None,
        needs_base="the outputs of a head have another order in torchtune's models",
        rank=30,
        tensors=(_FILE,),
    )
)
