"""Quantizes a pack or a bundle."""

from __future__ import annotations

import os
from pathlib import Path

from ..artifacts import kind_of
from ..bundle.manifest import Bundle
from ..errors import ConfigError, Unsupported
from ..exporting.quantization.schemes import quantization, require_no_options
from ..io.atomic import refuse_existing
from ..pack.pack import Pack
from ..pack.validate.validation import load
from .packs import quantize_pack


def quantize(source: str | os.PathLike[str] | Pack, out: str | os.PathLike[str], *, scheme: str = "int8",
             accuracy: str | None = None, head: str | None = None, rank_budget: float | None = None) -> Pack | Bundle:
    """Writes a quantized copy of a pack (``int8``, ``int4``, ``fp8``, ``mixed``) or of a bundle's graph (``int4``, ``int8``); the error is
    in its manifest.

    ``rank_budget`` cuts the rank of each site of a pack first, as far as the change there stays within that relative error.

    ``accuracy`` says how a graph multiplies with quantized weights: ``exact``, or ``fast`` with activations rounded to int8; by default
    ``fast`` where it adds at most a tenth to the error of the scheme. ``head`` is the scheme of the product that gives the logits, or
    ``float``; by default ``int8``. An embedding on the same table shares it.

    Raises:
        UnknownName: no such scheme for this kind of artifact, or no such accuracy or head.
        ConfigError: ``accuracy`` or ``head`` of a pack, ``rank_budget`` of a bundle.
        NothingToDo: it is quantized already.
        OutputExists: ``out`` is taken.

    Example:
        >>> quantize("packs/tickets", "packs/tickets-int8", scheme="int8")  # doctest: +SKIP
    """
    refuse_existing(Path(out))
    kind = "pack" if isinstance(source, Pack) else kind_of(source)
    if kind != "bundle":
        require_no_options("only a bundle has products to compute", accuracy, head)
    if isinstance(source, Pack):
        return quantize_pack(source, scheme=scheme, rank_budget=rank_budget, name=Path(out).name).write(out)
    if kind == "bundle":
        if rank_budget is not None:
            raise ConfigError("only the ranks of a pack can be cut", where=source, found=f"rank_budget {rank_budget}",
                              remedy="quantize the packs, and export again")
        from ..exporting.quantization.graphs import quantize_bundle  # noqa: PLC0415 - packs do not need ONNX

        return quantize_bundle(Path(source), Path(out), quantization(scheme, accuracy, head))
    if kind == "adapter":
        raise Unsupported("only packs and bundles are quantized", where=source, remedy="convert the file to a pack first")
    if kind == "base":
        raise Unsupported("a base checkpoint is quantized when it is exported", where=source, remedy="use export --quantize")
    return quantize(load(source), out, scheme=scheme, rank_budget=rank_budget)
