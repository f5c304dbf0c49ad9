"""Quantizes the weights of a bundle's graphs: the base's MatMuls become MatMulNBits, the adapters stay float;
measures the error.

Measures both accuracies of the products on the same rows, and takes the faster one if its error stays within
the scheme's bound.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from ...bundle import (
    Bundle,
    MappedSite,
    SiteMap,
    VerificationCache,
    graph_file,
    graphs_of,
    manifest_bytes,
    read_bundle,
    refuse_other_files,
    require_files,
    sites_in,
)
from ...engine_graph.int8_cache import quantize_cache
from ...engine_graph.parity import with_decoder, with_report
from ...errors import NothingToDo, ParityError
from ...graph_passes import share_bytes, unstack_experts
from ...io import Json, copy_folder, output_folder
from ...onnx_graph import int8_columns, make_fast
from ...pack import SIGNATURE
from ...runtime import Session, require_openable
from ...runtime import canary as replay
from ...tasks import MAIN
from . import measure
from .calibration_rows import token_rows
from .compensation import Compensator
from .moments import Moments
from .options import ACCURACIES, GraphQuantization
from .product import RoundingSetting, Second
from .scheme import GRAPH_SCHEMES, Choose, Rewriting
from .search import choose_bits
from .stored_weights import StoredWeights
from .tensor_file import TensorFile

_SUFFIXES = ("", "_Q2", "_Q4", "_Q8")
"""Suffixes that quantizers may add to the name of a node."""


def quantize_bundle(source: Path, out: Path, wanted: GraphQuantization) -> Bundle:
    """Writes a quantized copy of the bundle at ``source``; its manifest states how far the outputs of base
    and adapters moved.

    Raises:
        NothingToDo: the bundle is quantized already, or has no MatMul to quantize.
        FormatError: a file of the bundle was altered, is missing, or is not in its manifest.
        ParityError: a site was lost on the way, or a pack's canary fails on the quantized graph.
    """
    bundle = read_bundle(source)
    if bundle.quantization is not None:
        raise NothingToDo(
            "the bundle is quantized already", where=source, remedy="start from the float bundle"
        )
    require_files(source, bundle, "cached")  # new digests must not hide an old change
    proofs = VerificationCache(manifest_bytes(source))
    for part in graphs_of(bundle):
        require_openable(Path(source), bundle, proofs, part)
    refuse_other_files(source, bundle)
    with output_folder(out) as folder:
        copy_folder(Path(source), folder)
        (folder / SIGNATURE).unlink(missing_ok=True)  # the signature covers the old bytes
        quantize_in_place(folder, wanted)
        VerificationCache(manifest_bytes(folder)).remember(*graphs_of(bundle))
    return read_bundle(out)


def quantize_in_place(folder: Path, wanted: GraphQuantization) -> None:
    """Quantizes the graphs of an unpublished bundle folder and rewrites its manifest.

    Raises:
        NothingToDo: no graph has a product to quantize.
        ParityError: a site was lost on the way, an output moved further than the scheme allows, or a pack's
            canary fails.
    """
    bundle = read_bundle(folder)
    for part in bundle.parts if wanted.stored is None else ():
        unstack_experts(folder / graph_file(part))
    floats, session = _measure(folder, mapped=True)
    calibration = wanted.calibration
    rows = [] if calibration is None else [ids for ids, _ in token_rows(session, calibration)]
    del session  # so that its files can be replaced
    quantized, report = _with_codes(folder, bundle, wanted, rows)
    quantized.write(folder, draft=True)
    if bundle.decoder:
        quantized = with_decoder(quantized, folder, lambda text: None)
    measured, session, accuracies = _with_accuracy(folder, quantized, wanted, floats.answers)
    if "cache" in bundle.parity.get("decoder", {}):
        quantized.write(folder, draft=True)
        quantized = with_report(quantized, cache=quantize_cache(folder))
    shift = replay.drift(floats.canaries, measured.canaries)
    canary = {**replay.judge(session, measured.canaries, shift), "moved": shift}
    dataclasses.replace(
        quantized,
        quantization={**report, **accuracies, **measure.report(floats.answers, measured.answers)},
        parity={**quantized.parity, "canary": canary},
    ).write(folder)


class _Measured(NamedTuple):
    """The outputs of a folder's graphs on the measured rows and on the packs' canaries."""

    answers: dict[str, measure.MeasuredOutputs]
    canaries: dict[str, replay.Replay]


def _measure(folder: Path, *, mapped: bool = False) -> tuple[_Measured, Session]:
    """Runs a folder's graphs in their current form; returns their outputs and the session."""
    session = Session(folder, provider="cpu", mapped=mapped, verify="off")
    return _Measured(measure.answers(session), replay.replay(session)), session


def _with_codes(
    folder: Path, bundle: Bundle, wanted: GraphQuantization, rows: list[Any]
) -> tuple[Bundle, Json]:
    """Rewrites the graphs; returns the bundle with its updated site map, and the manifest's entry on the
    quantization.
    """
    second: Second = Moments(folder, rows).of if rows else lambda name: None
    compensator = Compensator(bundle, wanted.compensate, second) if wanted.compensate else None
    choose, choices = (
        choose_bits(folder, bundle.parts, wanted, second)
        if GRAPH_SCHEMES[wanted.scheme].budgeted
        else ((lambda name: wanted.setting), {})
    )
    count = 0
    sites = dict(bundle.sites)
    for part in bundle.parts:
        path = folder / graph_file(part)
        count += quantize_file(
            path,
            wanted.scheme,
            choose,
            wanted.head_setting,
            second if part == MAIN else lambda name: None,
            compensator if part == MAIN else None,
            wanted.stored,
        )
        sites |= _relocate(sites_in(part, sites), ir.load(path))
    if wanted.stored is None:
        _require_any(count, folder)
    report = {**_report(wanted, count), **choices}
    if wanted.stored is not None:
        report["stored"] = wanted.stored.report()
    if rows:
        report["calibration"] = {"rows": len(rows), "tokens": sum(map(len, rows))}
    if compensator is not None:
        report["compensation"] = compensator.report()
    return dataclasses.replace(bundle, sites=sites), report


def _require_any(count: int, folder: Path) -> None:
    if count == 0:
        raise NothingToDo("the graph has no MatMul on a constant weight", where=folder.name)


def _report(wanted: GraphQuantization, count: int) -> Json:
    """Returns the manifest's entry on a scheme in which so many weights are quantized."""
    report: Json = {"scheme": wanted.scheme, "quantized": count}
    if (setting := wanted.setting) is not None:
        report |= {"block_size": setting.block_size} if setting.block_size else {}
        report |= {
            "symmetric": setting.symmetric,
            "algorithm": setting.algorithm,
            "head": wanted.head,
        }
    return report


def quantize_file(
    path: Path,
    scheme: str,
    choose: Choose,
    head: RoundingSetting | None = None,
    second: Second = lambda name: None,
    compensator: Compensator | None = None,
    stored: StoredWeights | None = None,
) -> int:
    """Quantizes the graph at ``path`` by a scheme, replaces its file and its data, and returns the number of
    quantized weights.

    ``choose`` returns the setting of each product, ``head`` is the setting of the product that computes the
    logits, and a ``compensator`` corrects the error. ``stored`` are the codes of a quantized base.
    """
    model = ir.load(path)
    data = f"{path.name}.data"
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=path.parent) as name:
        scratch = Path(name)
        count = write_quantized(model, scratch / path.name, scheme, choose, head, second, compensator, stored)
        for file in (data, path.name):
            path.with_name(file).unlink(missing_ok=True)
            if (scratch / file).exists():  # a graph of small tensors has no data file
                (scratch / file).rename(path.with_name(file))
    return count


def write_quantized(
    model: ir.Model,
    path: Path,
    scheme: str,
    choose: Choose,
    head: RoundingSetting | None,
    second: Second = lambda name: None,
    compensator: Compensator | None = None,
    stored: StoredWeights | None = None,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Quantizes a graph as :func:`quantize_file` does, and writes it to ``path``: each weight is read once
    and written once. ``tick`` is called for each product.
    """
    rewrite = GRAPH_SCHEMES[scheme].rewrite
    assert rewrite is not None
    if compensator is not None:
        compensator.remember(model)
    tensors = TensorFile(path.with_name(f"{path.name}.data"))
    count = rewrite(Rewriting(model, tensors, choose, head, second, stored, tick))
    if compensator is not None:
        compensator.apply(model, tensors)
    tensors.take_rest(model)
    ir.save(model, path)
    share_bytes(path)
    return count


def quantizes_directly(wanted: GraphQuantization | None) -> bool:
    """Whether graphs can be written in these codes without a float graph that runs before."""
    return (
        wanted is not None
        and wanted.stored is None
        and wanted.calibration is None
        and not wanted.compensate
        and not GRAPH_SCHEMES[wanted.scheme].budgeted
    )


def quantize_directly(
    folder: Path,
    bundle: Bundle,
    models: Mapping[str, ir.Model],
    wanted: GraphQuantization,
    sites: SiteMap,
    tick: Callable[[], None],
) -> tuple[Bundle, dict[str, MappedSite]]:
    """Writes the graphs of a new bundle in codes, one weight at a time; returns the bundle and the ``sites``
    of its graphs, both as they are then. The products are exact.

    Raises:
        NothingToDo: no graph has a product to quantize.
        ParityError: a site was lost on the way.
    """
    count = 0
    own = dict(bundle.sites)
    every = dict(sites)
    for part, model in models.items():
        path = folder / graph_file(part)
        count += write_quantized(
            model, path, wanted.scheme, lambda name: wanted.setting, wanted.head_setting, tick=tick
        )
        written = ir.load(path)
        own |= _relocate(sites_in(part, own), written)
        every |= _relocate(sites_in(part, every), written)
    _require_any(count, folder)
    none = {"max_error": {}, "label_agreement": {}, "accuracy": ACCURACIES[0]}
    report = {**_report(wanted, count), **none}
    return dataclasses.replace(bundle, sites=own, quantization=report), every


def finish_directly(
    folder: Path, bundle: Bundle, wanted: GraphQuantization, small: Bundle | None, layers: int
) -> Bundle:
    """Makes the graphs of a bundle that was quantized directly exact or fast, as requested or as those of the
    ``small`` bundle of so many ``layers`` are, whose errors it reports; and the engine's caches int8 if they
    are to be.
    """
    report = dict(bundle.quantization or {})
    if small is not None and small.quantization is not None:
        keys = ("max_error", "label_agreement", "accuracy", "error_by_accuracy")
        report |= {key: small.quantization[key] for key in keys} | {"measured_layers": layers}
    report["accuracy"] = wanted.accuracy or report["accuracy"]
    if report["accuracy"] != ACCURACIES[0]:
        for part in graphs_of(bundle):
            make_fast(folder / graph_file(part))
    bundle = dataclasses.replace(bundle, quantization=report)
    if "cache" in bundle.parity.get("decoder", {}):
        bundle.write(folder, draft=True)
        bundle = with_report(bundle, cache=quantize_cache(folder))
    return bundle


def _with_accuracy(
    folder: Path,
    bundle: Bundle,
    wanted: GraphQuantization,
    before: dict[str, measure.MeasuredOutputs],
) -> tuple[_Measured, Session, Json]:
    """Makes the graphs exact or fast, as requested or by the measured errors of both; returns their outputs
    then, and both errors.
    """
    scheme = GRAPH_SCHEMES[wanted.scheme]
    graphs = [folder / graph_file(part) for part in graphs_of(bundle)]
    exact_graphs = [path.read_bytes() for path in graphs]
    # opens and measures the ordinary graphs alone
    dataclasses.replace(bundle, decoder=False).write(folder, draft=True)
    exact = _measure(folder)[0]
    # catches a wrong graph; the additional error of fast products is only recorded
    measure.require_small(before, exact.answers, scheme.tolerance, folder.name)
    for path in graphs:
        make_fast(path)
    fast, session = _measure(folder)
    errors = [measure.relative(before, measured.answers) for measured in (exact, fast)]
    near = wanted.setting is not None and measure.worst(before, fast.answers) <= scheme.tolerance
    accuracy = wanted.accuracy or scheme.accuracy or ("fast" if near else "exact")
    if accuracy == "exact":
        for path, graph in zip(graphs, exact_graphs, strict=True):
            path.write_bytes(graph)
    return (
        (fast if accuracy == "fast" else exact),
        session,
        {"accuracy": accuracy, "error_by_accuracy": dict(zip(ACCURACIES, errors, strict=True))},
    )


def _relocate(sites: SiteMap, model: ir.Model) -> dict[str, MappedSite]:
    """Returns the site map after quantization: the node and weight of a quantized site have new names."""
    nodes = {node.name: node for node in model.graph if node.name}
    relocated = {}
    for path, site in sites.items():
        node = next(
            (nodes[name] for name in (site.node + suffix for suffix in _SUFFIXES) if name in nodes), None
        )
        if node is None:
            raise ParityError("quantization lost a site of the graph", where=path, expected=site.node)
        columns = int8_columns.codes_of(node)
        place = 0 if site.kind == "lookup" else 1
        stored = columns[0] if columns else _initializer_of(node.inputs[place])
        weight = stored.name if site.weight else ""
        relocated[path] = dataclasses.replace(site, node=node.name, weight=weight)
    return relocated


def _initializer_of(value: ir.Value) -> ir.Value:
    """Returns the initializer that a value widens, or the value itself."""
    node = value.producer()
    return (
        node.inputs[0]
        if node is not None and node.op_type == "Cast" and node.inputs[0].is_initializer()
        else value
    )
