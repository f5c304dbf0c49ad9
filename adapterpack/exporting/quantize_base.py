"""Quantizes a base in the form in which the packs were trained on it, with the library that training used."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ..base import Checkpoint, DequantizedCheckpoint, copy_carried
from ..errors import MissingExtra, Unsupported
from ..manifest import BaseQuantization
from ..pack import Pack
from ..tasks import Task

_SCHEMES = ("nf4", "fp4", "int8")
_BLOCK = 64
"""The block size that transformers sets for bitsandbytes."""


def trained_form(packs: Sequence[Pack], base: Checkpoint) -> BaseQuantization:
    """Returns the quantization of the base on which all of the packs were trained.

    Raises:
        Unsupported: the packs do not record it, or disagree; it is not a bitsandbytes format; or the base is
            quantized already.
        MissingExtra: bitsandbytes is not installed.
    """
    forms = [pack.manifest.base_quantization for pack in packs]
    form = forms[0] if forms else None
    if form is None or any(other != form for other in forms):
        raise Unsupported(
            "the packs do not record one and the same quantized form of the base that they were trained on",
            where="--quantize as-trained",
            found=", ".join(sorted({"floats" if one is None else one.scheme for one in forms})) or "no packs",
            expected="packs that were all trained with load_in_4bit, or all with load_in_8bit",
            remedy="name such packs, or another scheme",
        )
    if isinstance(base, DequantizedCheckpoint) and base.quantized:
        raise Unsupported(
            "the base is quantized already",
            where=base.folder,
            remedy="leave --quantize out: its codes are kept as they are",
        )
    block = form.params.get("block_size", _BLOCK)
    if form.params.get("library") != "bitsandbytes" or form.scheme not in _SCHEMES or block != _BLOCK:
        raise Unsupported(
            "export cannot quantize a base in this form",
            where="--quantize as-trained",
            found=f"{form.scheme} of {form.params.get('library')}, in blocks of {block}",
            expected=f"{', '.join(_SCHEMES)} of bitsandbytes, in blocks of {_BLOCK}",
            remedy="save the quantized base with its library, and export that",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(
            "the base was quantized by bitsandbytes, which is not installed",
            where="--quantize as-trained",
            remedy="pip install bitsandbytes",
        )
    return form


def quantize_base(
    form: BaseQuantization, task: Task, base: Path, folder: Path
) -> tuple[DequantizedCheckpoint, list[str]]:
    """Quantizes the base in that form with the code that training uses, writes it to the new ``folder``, and
    opens it. Also returns the paths of modules that the base lacks, such as a head, which are initialized at
    random there.
    """
    import torch  # noqa: PLC0415 - heavy, and only this scheme needs it here
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    from ..torch_adapters.models.load import load_for_task, quiet_transformers, stored_dtype  # noqa: PLC0415

    dtype = form.params.get("dtype")
    held = dtype if dtype in {"float32", "float16", "bfloat16"} else stored_dtype(base)
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if form.scheme == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form.scheme,
            bnb_4bit_use_double_quant=bool(form.params.get("double")),
            bnb_4bit_compute_dtype=getattr(torch, str(held)),
        )
    )
    folder.mkdir()
    copy_carried(base, folder)
    model, new = load_for_task(task, base, dtype=str(held), quantization=settings)
    with quiet_transformers():
        model.save_pretrained(folder)
    return DequantizedCheckpoint(folder), new
