"""Reads and writes llama.cpp's LoRA files (GGUF): ``<tensor>.lora_a`` [r, in] and ``<tensor>.lora_b`` [out,
r] under llama.cpp's tensor names.

llama.cpp multiplies ``B A`` by ``alpha / r`` with **one** alpha for the whole file and the rank of each
tensor, and by one where alpha is zero. The rows of ``lora_b`` are permuted where llama.cpp permutes those of
queries and keys for its rotary embedding. Tensor names come from the ``gguf`` package.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from ...base.gguf import MAGIC
from ...base.gguf.names import FAMILIES, GGUFFamily, rope_row_order
from ...base.gguf.package import library
from ...errors import BaseMismatch, FormatError, SiteNotFound, Unsupported, nearest, storage_errors
from ...io import dtype_name, write_parts
from ...io.safetensors import raw
from ...manifest import manifest as m
from ...pack import Pack
from ...readable import things
from .. import (
    FORMATS,
    BaseModel,
    ConversionSource,
    Format,
    Notes,
    Reading,
    SiteFactors,
    bind_to_base,
    dequantize,
    first_bytes,
    group_leaves,
    list_first,
    lora_pack,
    refuse_full_modules,
    require_base,
    require_pairs,
    scale_factor,
    site_factors,
    split_key,
)
from ..gguf_file import GGUFAdapter, read_gguf
from ..numbers import most_frequent

_ROLES = ("lora_a", "lora_b")
_WHY = "its architecture, its layers and its heads decide the names and the order of rows"
_KEPT = {"F32", "F16", "BF16"}
"""Dtypes that the file stores as they are; others become F32."""


class _Layout(NamedTuple):
    """The tensor names and the order of rows in GGUF for one base."""

    family: GGUFFamily
    names: Any
    heads: int
    groups: int

    def gguf_name(self, path: str) -> str | None:
        """Returns llama.cpp's tensor name; a path may have one prefix more or less than the table of
        names.
        """
        for candidate in (path, f"model.{path}", path.partition(".")[2]):
            name = self.names.get_name(candidate) if candidate else None
            if name is not None:
                return f"{name}.weight"
        return None

    def row_order(self, path: str, rows: int) -> np.ndarray | None:
        """Returns for each row of the file the row of the model, or None if the order is the same.

        Raises:
            Unsupported: the rows do not divide into heads.
        """
        head = rope_row_order(self.family, path, rows, self.heads, self.groups)
        return None if head is None else (np.arange(0, rows, len(head))[:, None] + head).reshape(-1)


def _layout(base: BaseModel) -> _Layout:
    gguf = library()
    config = base.config
    if base.model_type not in FAMILIES:
        raise Unsupported(
            "no GGUF names are known for this kind of base",
            where=base.folder,
            expected=", ".join(FAMILIES),
            found=base.model_type,
            remedy="convert to peft and use llama.cpp's own converter",
        )
    family = FAMILIES[base.model_type]
    numbers: list[Any] = [
        config.get("num_hidden_layers"),
        config.get("num_attention_heads"),
        config.get("num_key_value_heads") or config.get("num_attention_heads"),
    ]
    if not all(type(number) is int and 0 < number <= 1 << 16 for number in numbers):
        raise FormatError(
            "the base's configuration lacks its layers or heads",
            where=base.folder / "config.json",
            found=numbers,
            expected="num_hidden_layers, num_attention_heads, num_key_value_heads",
        )
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.name)
    return _Layout(family, gguf.get_tensor_name_map(arch, numbers[0]), numbers[1], numbers[2])


def _write(pack: Pack, out: Path, base: BaseModel | None) -> Notes:
    base = require_base(base, pack.where, _WHY)
    refuse_full_modules(pack, "gguf")
    layout = _layout(base)
    gguf = library()
    plain, notes = dequantize(pack)
    named = {site.path: (site, _named(layout, base, site.path)) for site in site_factors(plain, "gguf")}
    if not named:
        raise FormatError("the pack holds no adapter", where=pack.where)
    counts = Counter(name for _, name in named.values())
    if repeated := [path for path, (_, name) in named.items() if counts[name] > 1]:
        raise Unsupported("two modules have one name in GGUF", where=pack.where, found=list_first(repeated))
    alpha, alpha_notes = common_alpha([site for site, _ in named.values()])
    writer = gguf.GGUFWriter(out, layout.family.name)
    writer.add_type("adapter")
    writer.add_name(pack.name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    named_base = pack.manifest.base.name or base.checkpoint.name
    if named_base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, named_base)
    writer.add_string("adapterpack.pack", pack.id)
    for path, (site, name) in sorted(named.items(), key=lambda item: item[1][1]):
        up = scale_factor(site.up, site.alpha / alpha, path)
        order = layout.row_order(path, up.shape[0])
        _add(gguf, writer, f"{name}.lora_a", site.down)
        _add(gguf, writer, f"{name}.lora_b", up if order is None else up[order])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with storage_errors(out):
        write_parts(out, _pad(writer, out.stat().st_size), "ab")
    return notes + alpha_notes


def _pad(writer: Any, before: int) -> Iterator[bytes | memoryview]:
    """Yields the bytes of the tensors after a header of ``before`` bytes. The gguf package's own method
    ignores a full disk: it writes with numpy's ``tofile``, which does not check the result of closing the
    file.
    """
    yield bytes(-before % writer.data_alignment)
    for info in writer.tensors[0].values():
        yield raw(info.tensor)
        yield bytes(-info.nbytes % writer.data_alignment)


def _named(layout: _Layout, base: BaseModel, path: str) -> str:
    name = layout.gguf_name(path)
    if name is None:
        raise Unsupported(
            "llama.cpp has no tensor for this module",
            where=path,
            found=layout.family.name,
            remedy="train without it, or merge the pack",
        )
    if name in ("token_embd.weight", "output.weight") and (
        name != "output.weight" or base.config.get("tie_word_embeddings")
    ):
        raise Unsupported(
            "an adapter of an embedding, or of an output layer that is tied to it, has no place in GGUF LoRA",
            where=path,
            remedy="train without it, or merge the pack and convert the whole model",
        )
    return name


def common_alpha(sites: Sequence[SiteFactors]) -> tuple[float, Notes]:
    """Returns the alpha for the file, a float32: the alpha of most sites, so that most factors keep their
    bytes; and a note if others differ.

    Raises:
        Unsupported: all scales are zero, since llama.cpp treats alpha 0 as scale 1.
    """
    alphas = [float(np.float32(site.alpha)) for site in sites]
    alpha = most_frequent(alphas)
    if alpha is None:
        raise Unsupported(
            "every scale of the pack is zero or beyond float32, which one alpha cannot say",
            found=sorted(set(alphas)),
        )
    differing = sum(value != alpha for value in alphas)
    notes = (
        ()
        if not differing
        else (
            f"GGUF has one alpha for all modules: the scale of {differing} of {len(sites)} modules is "
            f"written into lora_b (alpha {alpha:g})",
        )
    )
    return alpha, notes


def _add(gguf: Any, writer: Any, name: str, value: np.ndarray) -> None:
    kept = dtype_name(value.dtype)
    array = np.ascontiguousarray(value if kept in _KEPT else value.astype(np.float32))
    if kept == "BF16":  # numpy has no bfloat16, so the package takes raw bytes
        writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, array)


def _read(source: ConversionSource) -> Reading:
    """Reads the file; without a base with its own order of rows and its own tensor names as module names."""
    file = read_gguf(source.path)
    base = source.base
    pairs, notes = _pairs(file, source)
    if base is None:
        pack = lora_pack(source, {name.removesuffix(".weight"): pair for name, pair in pairs.items()}, "gguf")
        stated = [file.values.get(key) for key in ("general.base_model.0.name", "general.architecture")]
        name, family = (value if isinstance(value, str) else None for value in stated)
        manifest = replace(pack.manifest, base=m.Base(name, model_type=family))
        return Reading(dataclasses.replace(pack, manifest=manifest), notes)
    layout = _layout(base)
    if file.values.get("general.architecture") != layout.family.name:
        raise BaseMismatch(
            "the adapter was made for another kind of model",
            where=source.path,
            expected=layout.family.name,
            found=file.values.get("general.architecture"),
            remedy="name the base that it was made for",
        )
    paths = {layout.gguf_name(path): path for path, shape in base.modules().items() if len(shape) == 2}
    sites = {}
    for target, pair in pairs.items():
        if target not in paths or target == "token_embd.weight":
            raise SiteNotFound(
                "the base has no linear layer for this tensor",
                where=source.path,
                found=target,
                remedy=nearest(target, [name for name in paths if name]),
            )
        path = paths[target]
        order = layout.row_order(path, pair.up.shape[0])
        sites[path] = pair._replace(path=path, up=pair.up if order is None else pair.up[np.argsort(order)])
    return Reading(bind_to_base(lora_pack(source, sites, "gguf"), base), notes)


def _pairs(file: GGUFAdapter, source: ConversionSource) -> tuple[dict[str, SiteFactors], Notes]:
    """Returns the factors by the name of the tensor that they change, in the file's order of rows."""
    _require_lora(file.values, source)
    alpha, notes = _alpha(file.values, source)
    if packed := sorted(name for name, kind in file.types.items() if kind == "Q8_0"):
        notes += (f"read as float32, with the error that they have: {things(len(packed), 'tensor')} in Q8_0",)
    pairs = group_leaves(
        file.tensors,
        lambda key: split_key(key, _ROLES),
        source.path,
        "...lora_a and ...lora_b",
        "merge this adapter with llama.cpp",
    )
    require_pairs(pairs, _ROLES, source.path)
    sites = {}
    for target, keys in pairs.items():
        down, up = (file.tensors[keys[role]] for role in _ROLES)
        scale = 1.0 if alpha is None else alpha / max(1, down.shape[0])
        sites[target] = SiteFactors(target, down, up, scale)
    return sites, notes


def _require_lora(values: dict[str, Any], source: ConversionSource) -> None:
    wanted = {"general.type": "adapter", "adapter.type": "lora"}
    for key, value in wanted.items():
        if values.get(key) != value:
            raise FormatError(
                "this GGUF file is not a LoRA adapter",
                where=f"{source.path}, {key}",
                expected=value,
                found=values.get(key),
            )
    if "adapter.alora.invocation_tokens" in values:
        raise Unsupported(
            "the adapter is switched on by tokens (activated LoRA), which a pack cannot say",
            where=source.path,
            found="adapter.alora.invocation_tokens",
        )


def _alpha(values: dict[str, Any], source: ConversionSource) -> tuple[float | None, Notes]:
    alpha = values.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(
            "alpha must be a finite number", where=f"{source.path}, adapter.lora.alpha", found=alpha
        )
    ignored = ("adapter.lora.task_name", "adapter.lora.prompt_prefix")
    notes = [f"{key} is not carried: {values[key]!r:.80}" for key in ignored if key in values]
    if not alpha:
        notes.append("the file states no alpha: alpha = r, the scale is one, as llama.cpp has it")
    return (float(alpha) or None), tuple(notes)


GGUF = FORMATS.register(
    Format(
        "gguf",
        "a LoRA adapter of llama.cpp, one file",
        False,
        lambda path: first_bytes(path, 4) == MAGIC,
        _read,
        _write,
        _WHY,
        suffix=".gguf",
    )
)
