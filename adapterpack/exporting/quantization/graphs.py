"""Weight-only quantization of a bundle's graphs: the base's MatMuls become MatMulNBits, the adapters stay float; the error is measured.

What two accuracies of the products give is measured on the same rows, and the faster one is taken where it keeps to the scheme's bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...bundle.decoder_graph import graphs_of
from ...bundle.files import require_files, unlisted
from ...bundle.manifest import Bundle, MappedSite, graph_file, manifest_bytes, read_bundle
from ...bundle.proofs import Proofs
from ...engine_graph.int8_cache import quantize_cache
from ...engine_graph.parity import with_decoder
from ...errors import FormatError, NothingToDo, ParityError
from ...io.atomic import output_folder
from ...io.safe_open import copy_folder
from ...onnx_graph.products import make_fast
from ...pack.pack import SIGNATURE
from ...runtime import canary as replay
from ...runtime.opened_before import require_openable
from ...runtime.session import Session
from ...tasks.task import MAIN
from . import measure
from .activations import Moments
from .calibration_rows import token_rows
from .compensation import Compensator
from .experts import unstack_experts
from .options import ACCURACIES, Quantization
from .scheme import SCHEMES
from .search import searched
from .weights import quantize_file

_SUFFIXES = ("", "_Q2", "_Q4", "_Q8")
"""What may be put behind the name of a node."""


def quantize_bundle(source: Path, out: Path, wanted: Quantization) -> Bundle:
    """A quantized copy of the bundle at ``source``; its manifest says how far base and adapters moved.

    Raises:
        NothingToDo: it is quantized already, or has no MatMul to quantize.
        FormatError: a file of the bundle was altered, is missing, or is not in its manifest.
        ParityError: a site was lost on the way, or a pack's canary fails on the quantized graph.
    """
    bundle = read_bundle(source)
    if bundle.quantization is not None:
        raise NothingToDo("the bundle is quantized already", where=source, remedy="start from the float bundle")
    require_files(source, bundle, "cached")  # new digests must not hide an old change
    require_openable(Path(source), bundle, Proofs(manifest_bytes(source)), graphs_of(bundle))
    if extra := unlisted(source, bundle):
        raise FormatError("a file in the bundle is not in its manifest", where=source / extra[0], remedy="remove it, or export again")
    with output_folder(out) as folder:
        copy_folder(Path(source), folder)
        (folder / SIGNATURE).unlink(missing_ok=True)  # it is one of other bytes
        quantize_in_place(folder, wanted)
        Proofs(manifest_bytes(folder)).keep_opened(*graphs_of(bundle))
    return read_bundle(out)


def quantize_in_place(folder: Path, wanted: Quantization) -> None:
    """Quantizes the graphs of an unpublished bundle folder and rewrites its manifest."""
    scheme, bundle = SCHEMES[wanted.scheme], read_bundle(folder)
    for part in bundle.parts if wanted.stored is None else ():
        unstack_experts(folder / graph_file(part))
    before, float_canaries, session = _measured(folder, mapped=True)
    rows = [] if wanted.calibration is None else [ids for ids, _ in token_rows(session, wanted.calibration)]
    del session  # so that its files can be replaced
    second = Moments(folder, rows).of if rows else None
    compensator = Compensator(bundle, wanted.compensate, second) if wanted.compensate else None
    choose, choices = searched(folder, bundle.parts, wanted, second) if scheme.budgeted else ((lambda name: wanted.setting), {})
    count, sites = 0, dict(bundle.sites)
    for part in bundle.parts:
        path = folder / graph_file(part)
        count += quantize_file(path, wanted.scheme, choose, wanted.head_setting, second if part == MAIN else None,
                               compensator if part == MAIN else None, wanted.stored)
        sites |= _relocated({key: site for key, site in sites.items() if site.part == part}, ir.load(path))
    if count == 0 and wanted.stored is None:
        raise NothingToDo("the graph has no MatMul on a constant weight", where=folder.name)
    said: dict[str, Any] = {"scheme": wanted.scheme, "quantized": count, **choices}
    if (setting := wanted.setting) is not None:
        said |= {"block_size": setting.block_size, "symmetric": setting.symmetric, "algorithm": setting.algorithm, "head": wanted.head}
    if wanted.stored is not None:
        said["stored"] = wanted.stored.report()
    if rows:
        said["calibration"] = {"rows": len(rows), "tokens": sum(map(len, rows))}
    moved = dataclasses.replace(bundle, sites=sites)
    if compensator is not None:
        said["compensation"] = compensator.report()
    moved.write(folder, draft=True)
    proof: dict[str, Any] = {}
    if bundle.decoder:
        proof = with_decoder(folder, lambda text: None)
        moved = dataclasses.replace(moved, parity={**moved.parity, "decoder": proof})
    graphs = [folder / graph_file(part) for part in graphs_of(bundle)]
    exact_graphs = [path.read_bytes() for path in graphs]
    dataclasses.replace(moved, decoder=False).write(folder, draft=True)  # the ordinary graphs are measured, and no other is opened
    exact, exact_canaries = _measured(folder)[:2]
    measure.require_small(before, exact, scheme.tolerance, folder.name)  # a wrong graph; what fast adds is recorded
    for path in graphs:
        make_fast(path)
    fast, fast_canaries, session = _measured(folder)
    errors = measure.relative(before, exact), measure.relative(before, fast)
    accuracy = wanted.accuracy or ("fast" if setting is not None and measure.worst(before, fast) <= scheme.tolerance else "exact")
    after, canaries = (fast, fast_canaries) if accuracy == "fast" else (exact, exact_canaries)
    if accuracy == "exact":
        for path, graph in zip(graphs, exact_graphs, strict=True):
            path.write_bytes(graph)
    if "cache" in bundle.parity.get("decoder", {}):
        moved.write(folder, draft=True)
        moved = dataclasses.replace(moved, parity={**moved.parity, "decoder": {**proof, "cache": quantize_cache(folder)}})
    report = {**said, "accuracy": accuracy, "error_by_accuracy": dict(zip(ACCURACIES, errors, strict=True)),
              **measure.report(before, after)}
    shift = replay.drift(float_canaries, canaries)
    parity = {**moved.parity, "canary": {**replay.judge(session, canaries, shift), "moved": shift}}
    dataclasses.replace(moved, quantization=report, parity=parity).write(folder)


def _measured(folder: Path, *, mapped: bool = False) -> tuple[dict[str, measure.Answer], dict[str, replay.Replay], Session]:
    """The answers and canaries of a folder's graphs, and the session that gave them."""
    session = Session(folder, provider="cpu", mapped=mapped, verify="off")
    return measure.answers(session), replay.replay(session), session


def _relocated(sites: Mapping[str, MappedSite], model: Any) -> dict[str, MappedSite]:
    """The site map after quantization: the node and weight of a quantized site have new names."""
    nodes = {node.name: node for node in model.graph if node.name}
    relocated = {}
    for path, site in sites.items():
        node = next((nodes[name] for name in (site.node + suffix for suffix in _SUFFIXES) if name in nodes), None)
        if node is None:
            raise ParityError("quantization lost a site of the graph", where=path, expected=site.node)
        weight = _stored(node.inputs[0 if site.kind == "lookup" else 1]).name
        relocated[path] = dataclasses.replace(site, node=node.name, weight=weight if site.weight else "")
    return relocated


def _stored(value: Any) -> Any:
    """The initializer that a value is a wider form of, or the value."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Cast" and node.inputs[0].is_initializer() else value
