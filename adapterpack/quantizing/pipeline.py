"""Quantizes a pack or a bundle."""

from __future__ import annotations

from pathlib import Path

from ..artifacts import kind_of
from ..bundle import Bundle
from ..errors import ConfigError, Unsupported
from ..io import refuse_existing
from ..pack import Pack, load
from ..paths import StrPath
from .graphs import GraphOptions, quantization, require_no_options
from .packs import quantize_pack


def quantize(
    source: StrPath | Pack,
    out: StrPath,
    *,
    scheme: str = "int8",
    accuracy: str | None = None,
    head: str | None = None,
    rank_budget: float | None = None,
    block_size: int | None = None,
    symmetric: bool | None = None,
    algorithm: str | None = None,
    calibration: StrPath | None = None,
    compensate: int | None = None,
    error_budget: float | None = None,
    size_budget: int | None = None,
) -> Pack | Bundle:
    """Writes a quantized copy of a pack or of a bundle; the error is in its manifest.

    ``rank_budget`` first reduces the rank of each site of a pack as far as the change there stays within that
    relative error.

    Schemes of graphs are ``int8``, ``int4`` and ``int2``, whose products become ``MatMulNBits``; ``mixed``,
    which has eight, four or two bits for each product, as few as ``error_budget`` (the root mean square of
    the products' relative errors) or ``size_budget`` (bytes of the products without the head) allows; and
    ``fp16`` and ``bf16``, whose weights are stored in half of the bytes. Of schemes of codes, ``block_size``
    weights (16, 32, 64, 128 or 256; by default 32) share a scale, and a zero point unless they are
    ``symmetric``; ``algorithm`` is ``rtn``, ``k-quant`` or ``hqq``, or ``gptq`` or ``awq``, which look at the
    rows of ``calibration``, a JSONL file of ``text``, ``messages``, or ``prompt`` and ``completion``.

    ``compensate`` is the rank of a correction of each layer's error, which the graph adds in eight bits: the
    best for the weights, or for the outputs on the rows of ``calibration``.

    ``accuracy`` says how a graph multiplies with codes: ``exact``, or ``fast`` with activations rounded to
    int8; by default ``fast`` where it adds at most a tenth to the error of the scheme. ``head`` is the scheme
    of the product that gives the logits, or ``float``; by default ``int8``. An embedding on the same table
    shares it.

    Raises:
        UnknownName: no such scheme for this kind of artifact, or no such accuracy, head or algorithm.
        ConfigError: an option that says nothing for a pack, ``rank_budget`` of a bundle, options of graphs
            that do not go together, or calibration rows that cannot be read.
        Unsupported: ONNX Runtime runs no graph in this scheme, or the algorithm does not round to such codes.
        NothingToDo: it is quantized already.
        OutputExists: ``out`` is taken.

    Example:
        >>> quantize("packs/tickets", "packs/tickets-int8", scheme="int8")  # doctest: +SKIP
        >>> quantize("bundle", "bundle-int4", scheme="int4", algorithm="gptq",
        ...     calibration="rows.jsonl")  # doctest: +SKIP
    """
    refuse_existing(out)
    kind = "pack" if isinstance(source, Pack) else kind_of(source)
    options = GraphOptions(
        accuracy=accuracy,
        head=head,
        block_size=block_size,
        symmetric=symmetric,
        algorithm=algorithm,
        calibration=calibration,
        compensate=compensate,
        error_budget=error_budget,
        size_budget=size_budget,
    )
    if kind != "bundle":
        require_no_options("only a bundle has products to compute", **options)
    if isinstance(source, Pack):
        return quantize_pack(source, scheme=scheme, rank_budget=rank_budget, name=Path(out).name).write(out)
    if kind == "bundle":
        if rank_budget is not None:
            raise ConfigError(
                "only the ranks of a pack can be cut",
                where=source,
                found=f"rank_budget {rank_budget}",
                remedy="quantize the packs, and export again",
            )
        from .graphs.quantize_bundle import quantize_bundle  # noqa: PLC0415 - packs do not need ONNX

        return quantize_bundle(Path(source), Path(out), quantization(scheme, **options))
    if kind == "adapter":
        raise Unsupported(
            "only packs and bundles are quantized", where=source, remedy="convert the file to a pack first"
        )
    if kind == "base":
        raise Unsupported(
            "a base checkpoint is quantized when it is exported", where=source, remedy="use export --quantize"
        )
    return quantize(load(source), out, scheme=scheme, rank_budget=rank_budget)
