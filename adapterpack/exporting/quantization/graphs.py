"""Weight-only quantization of a bundle's graph: the base's MatMuls become MatMulNBits, the adapters stay float; the error is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...bundle.files import require_files, unlisted
from ...bundle.manifest import Bundle, MappedSite, graph_file, read_bundle
from ...errors import FormatError, NothingToDo, ParityError
from ...io.atomic import output_folder
from ...io.safe_open import copy_folder
from ...pack.pack import SIGNATURE
from ...runtime import canary as replay
from ...runtime.session import Session
from ..proof.decoder_parity import with_decoder
from . import measure
from .schemes import require_scheme
from .weights import quantize_file

_SUFFIXES = ("_Q4", "_Q8")
"""What the quantizer puts behind a node's name."""


def quantize_bundle(source: Path, out: Path, scheme: str) -> Bundle:
    """A quantized copy of the bundle at ``source``; its manifest says how far base and adapters moved.

    Raises:
        NothingToDo: it is quantized already, or has no MatMul to quantize.
        FormatError: a file of the bundle was altered, is missing, or is not in its manifest.
        ParityError: a site was lost on the way, or a pack's canary fails on the quantized graph.
    """
    require_scheme(scheme)
    bundle = read_bundle(source)
    if bundle.quantization is not None:
        raise NothingToDo("the bundle is quantized already", where=source, remedy="start from the float bundle")
    require_files(source, bundle, "cached")  # new digests must not hide an old change
    if extra := unlisted(source, bundle):
        raise FormatError("a file in the bundle is not in its manifest", where=source / extra[0], remedy="remove it, or export again")
    with output_folder(out) as folder:
        copy_folder(Path(source), folder)
        (folder / SIGNATURE).unlink(missing_ok=True)  # it is one of other bytes
        quantize_in_place(folder, scheme)
    return read_bundle(out)


def quantize_in_place(folder: Path, name: str) -> None:
    """Quantizes the graph of an unpublished bundle folder and rewrites its manifest."""
    scheme, bundle = require_scheme(name), read_bundle(folder)
    before, float_canaries = _rows(folder)
    count, sites = 0, dict(bundle.sites)
    for part in bundle.parts:
        path = folder / graph_file(part)
        count += quantize_file(path, scheme)
        sites |= _relocated({key: site for key, site in sites.items() if site.part == part}, ir.load(path))
    if count == 0:
        raise NothingToDo("the graph has no MatMul on a constant weight", where=folder.name)
    moved = dataclasses.replace(bundle, sites=sites)
    moved.write(folder, draft=True)
    if bundle.decoder:
        proof = with_decoder(folder, lambda text: None)
        moved = dataclasses.replace(moved, parity={**moved.parity, "decoder": proof})
    session = Session(folder, provider="cpu", verify="off")
    after, canaries = measure.answers(session), replay.replay(session)
    report = {"scheme": name, "block_size": scheme.block_size, "quantized": count, **measure.report(before, after)}
    measure.require_small(before, after, scheme.tolerance, folder.name)
    shift = replay.drift(float_canaries, canaries)
    parity = {**moved.parity, "canary": {**replay.judge(session, canaries, shift), "moved": shift}}
    dataclasses.replace(moved, quantization=report, parity=parity).write(folder)


def _rows(folder: Path) -> tuple[dict[str, measure.Answer], dict[str, replay.Replay]]:
    """The answers and canaries of a float graph; its session is closed on return, so that the file can be replaced."""
    session = Session(folder, provider="cpu", mapped=True, verify="off")  # its weights stay in their file
    return measure.answers(session), replay.replay(session)


def _relocated(sites: Mapping[str, MappedSite], model: Any) -> dict[str, MappedSite]:
    """The site map after quantization: the node and weight of a quantized site have new names."""
    nodes = {node.name: node for node in model.graph if node.name}
    relocated = {}
    for path, site in sites.items():
        node = next((nodes[name] for name in (site.node, *(site.node + suffix for suffix in _SUFFIXES)) if name in nodes), None)
        if node is None:
            raise ParityError("quantization lost a site of the graph", where=path, expected=site.node)
        relocated[path] = dataclasses.replace(site, node=node.name, weight=node.inputs[1].name if site.weight else "")
    return relocated
