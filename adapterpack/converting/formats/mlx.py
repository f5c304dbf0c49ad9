"""Reads and writes mlx-lm's adapters: ``adapters.safetensors`` (``adapters.npz`` before 0.14, only read) and
``adapter_config.json``.

A module has ``lora_a`` [in, r] and ``lora_b`` [r, out], with DoRA also ``m`` [out]. The change is ``scale *
(lora_a lora_b)^T``, with one scale and one rank for the whole file. Modules have the names of mlx-lm's
models, which are those of transformers for most families.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter_methods import Method, get
from ...errors import FormatError, Unsupported, excerpt
from ...io import SafetensorsFile, npz_file, safetensors, strict_json
from ...manifest import MethodSites
from ...pack import Pack
from ...peft import layout, read_config, site_of
from .. import (
    FORMATS,
    BaseModel,
    ConversionSource,
    Format,
    Notes,
    Reading,
    SiteFactors,
    beside_config,
    bind_to_base,
    check_pair,
    dequantize,
    drop_targets,
    finite_number,
    foreign_pack,
    group_leaves,
    list_first,
    pad_to_one_rank,
    refuse_full_modules,
    require_pairs,
    site_factors,
    split_key,
)
from ..tensor_files import as_file

_FILE, _OLD = "adapters.safetensors", "adapters.npz"
_A = "lora_a"
_B = "lora_b"
_M = "m"
_LOOKUPS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings")
"""Suffixes of the names of embeddings; in mlx-lm an adapter of an embedding also changes the output layer
tied to it.
"""
_METHODS = ("lora", "dora")
"""The values of ``fine_tune_type`` that are read; our methods have the same names."""


def _read(source: ConversionSource) -> Reading:
    method, rank, scale = _settings(read_config(source.path / layout.CONFIG), source.path / layout.CONFIG)
    alpha = finite_number(scale * rank, f"{source.path / layout.CONFIG}#/lora_parameters/scale")
    file = _open(source.path)
    leaves = (_A, _B, _M) if method.name == "dora" else (_A, _B)
    modules = group_leaves(
        file.tensors,
        lambda key: split_key(key, leaves),
        file.path,
        ", ".join(leaves),
        "fuse it with mlx_lm.fuse",
    )
    require_pairs(modules, leaves, file.path)
    sites = {}
    for path, keys in modules.items():
        where = f"{file.path}, {path}"
        tensors = {leaf: file.read(key) for leaf, key in keys.items()}
        if any(tensors[leaf].ndim == 3 for leaf in (_A, _B)):
            raise Unsupported(
                "an adapter of all experts of a layer in one tensor",
                where=where,
                expected="matrices",
                found=list(tensors[_A].shape),
                remedy="fuse it with mlx_lm.fuse",
            )
        if path.rpartition(".")[2] in _LOOKUPS:
            raise Unsupported(
                "mlx-lm's adapter of an embedding changes the output layer that is tied to it, too",
                where=where,
                remedy="fuse it with mlx_lm.fuse, or train without it",
            )
        down, up = (np.ascontiguousarray(tensors[leaf].T) for leaf in (_A, _B))
        check_pair(down, up, where)
        if down.shape[0] != rank:
            raise FormatError(
                "the rank that the file states is not that of its tensors",
                where=where,
                expected=rank,
                found=down.shape[0],
            )
        params = {
            "lora_A": down,
            "lora_B": up,
            **({"lora_magnitude_vector": tensors[_M]} if _M in tensors else {}),
        }
        cfg = drop_targets(method.config(r=rank, alpha=alpha))
        site, params = site_of(method, cfg, path, "linear", params, file.path)
        sites[site] = (cfg, params)
    pack = foreign_pack(source, [MethodSites(method, sites)], "mlx")
    return Reading(bind_to_base(pack, source.base))


def _open(folder: Path) -> SafetensorsFile:
    """Opens the tensors, which mlx-lm before 0.14 wrote as numpy does."""
    if (folder / _FILE).is_file():
        return SafetensorsFile(folder / _FILE, private=True)
    return as_file(npz_file.read(folder / _OLD), folder / _OLD)


def _settings(config: Mapping[str, Any], where: Path) -> tuple[Method, int, float]:
    """Returns the method, the rank, and the scale.

    Raises:
        Unsupported: the file holds full weights, or a scale that two versions of mlx-lm read differently.
        FormatError: a setting is missing.
    """
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    parameters = config.get("lora_parameters")
    if not isinstance(kind, str) or kind not in _METHODS:
        raise Unsupported(
            "mlx-lm trained the weights themselves, or in a way that is not known",
            where=f"{where}#/fine_tune_type",
            expected=", ".join(_METHODS),
            found=excerpt(kind),
            remedy="fuse it with mlx_lm.fuse, and extract the difference with adapterpack extract",
        )
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    if not isinstance(parameters, dict) or type(rank) is not int or not 0 < rank <= 1 << 16:
        raise FormatError(
            "the configuration has no rank",
            where=f"{where}#/lora_parameters/rank",
            expected="a whole number",
            found=excerpt(rank),
        )
    return get(kind), rank, _scale(config, parameters, rank, where)


def _scale(config: Mapping[str, Any], parameters: Mapping[str, Any], rank: int, where: Path) -> float:
    """Returns the scale that the adapter was trained with.

    Until June 2024 mlx-lm multiplied ``scale`` by ``alpha / rank``; since then it ignores alpha, although its
    defaults contained one for another year. The other keys show which version wrote a file: ``num_layers`` is
    newer, ``lora_layers`` alone is older, and ``lora_layers`` beside ``use_dora`` may be either.

    Raises:
        Unsupported: both versions are possible.
    """
    scale = finite_number(parameters.get("scale"), f"{where}#/lora_parameters/scale")
    if "alpha" not in parameters or "num_layers" in config:
        return scale
    alpha = finite_number(parameters["alpha"], f"{where}#/lora_parameters/alpha")
    if alpha != rank and ("lora_layers" not in config or "use_dora" in config):
        raise Unsupported(
            "older versions of mlx-lm multiply the scale by alpha / rank, newer ones take no notice of "
            "alpha, and this file may be of either",
            where=where,
            found=f"alpha {alpha!r:.40}, scale {scale!r:.40}",
            expected="num_layers, or lora_layers without use_dora, which say the version",
            remedy="write the factor that was meant as scale, and take alpha out",
        )
    return scale * alpha / rank


def _write(pack: Pack, folder: Path, base: BaseModel | None) -> Notes:
    refuse_full_modules(pack, "mlx")
    plain, notes = dequantize(pack)
    decomposed = {
        adapter.site.path: adapter.params["lora_magnitude_vector"]
        for adapter in plain.adapters()
        if adapter.method.name == "dora" and adapter.site.kind in ("linear", "transposed")
    }
    sites = _decompose(plain) if decomposed else list(site_factors(plain, "mlx"))
    if looked_up := [site.path for site in sites if site.path.rpartition(".")[2] in _LOOKUPS]:
        raise Unsupported(
            "mlx-lm's adapter of an embedding changes the output layer that is tied to it, too",
            where=pack.where,
            found=list_first(looked_up),
            remedy="train without it, or merge the pack",
        )
    padded, rank, scale, scale_notes = pad_to_one_rank(sites, "mlx-lm", _B)
    tensors = {
        f"{path}.{leaf}": np.ascontiguousarray(value.T)
        for path, pair in padded.items()
        for leaf, value in zip((_A, _B), pair, strict=True)
    }
    tensors |= {f"{path}.{_M}": value for path, value in decomposed.items()}
    safetensors.write(folder / _FILE, tensors, {"format": "mlx"})
    config = {
        "fine_tune_type": "dora" if decomposed else "lora",
        "num_layers": len(sites),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted(site.path for site in sites),
        },
    }
    (folder / layout.CONFIG).write_bytes(strict_json.canonical(config))
    return notes + scale_notes


def _decompose(pack: Pack) -> list[SiteFactors]:
    """Returns the factors of a pack in which every site is DoRA."""
    if [method.name for method in pack.methods] != ["dora"]:
        raise Unsupported(
            "an adapter of mlx-lm is LoRA throughout or DoRA throughout",
            where=pack.where,
            found=", ".join(method.name for method in pack.methods),
            remedy="keep the pack as it is, or merge it",
        )
    return [
        SiteFactors(a.site.path, a.params["lora_A"], a.params["lora_B"], float(a.config.scale))
        for a in pack.adapters()
    ]


MLX = FORMATS.register(
    Format(
        "mlx",
        "mlx-lm's adapters.safetensors and adapter_config.json",
        True,
        beside_config(_FILE, _OLD),
        _read,
        _write,
        rank=20,
        tensors=(_FILE, _OLD),
    )
)
