"""Validates a bundle: its closed file list, every pack in it, its base, and with ``full`` the canaries on its graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..base import compatibility
from ..base.checkpoint import Checkpoint
from ..base.compatibility import Verdict
from ..bundle.files import differences, needed, require_listed
from ..bundle.manifest import FILE_NAME, GRAPH, Bundle, graph_file, read_bundle
from ..errors import AdapterpackError, BaseMismatch, ProviderError
from ..pack.pack import SIGNATURE
from ..pack.validate.budget import Budget, Spent
from ..pack.validate.checks.folder import entries
from ..pack.validate.open_questions import NO_BASE
from ..pack.validate.validation import Finding, Report, examine
from .canary_process import replay_apart
from .providers.device import Device
from .providers.kernels import Kernels, kernels_of, listed, nodes_without_kernel, remedy_of
from .providers.provider import require_known

_NOT_RUN = "graph and canaries: replayed with full, where there is no error"


def validate_bundle(
    folder: Path, base: Path | Checkpoint | None = None, *, full: bool = False, budget: Budget | None = None,
    allow_structural: bool = False, provider: str | None = None,
) -> Report:
    """The report on a bundle: files, digests, packs, and with ``base`` that it was made from that base; within ``budget``.

    ``full`` also runs the graph: the canaries of its packs are replayed, and with ``base`` every matrix of it is looked for in the graphs.
    A bundle with an error is not run. With ``provider`` the nodes of its graphs are compared with the table of what that provider
    implements, which needs no card, and the canaries are replayed on it.

    Raises:
        ProviderError: there is no provider of that name, or no table of what it implements.

    A valid bundle is whole and agrees with itself: its files are the listed ones, its graphs take and give what the manifest says, and its
    slots hold the packs that it names. With ``base`` and ``full`` its matrices are the base's, and the canaries' logits are right. That its
    graphs compute nothing else besides is shown by no check, only by the signature of somebody whom one trusts.
    """
    findings: list[Finding] = []
    left_open: list[str] = []
    verdict: Verdict | None = None
    table = None if provider is None else _table(provider)
    try:
        for result in _findings(folder, base, budget or Budget(), allow_structural, full, table):
            if isinstance(result, Finding):
                findings.append(result)
            elif isinstance(result, Verdict):
                verdict = result
            else:
                left_open.append(result)
    except Spent as spent:
        left_open.append(str(spent))
    except AdapterpackError as error:
        findings.append(Finding("AB001", "error", FILE_NAME, error.sentence, error.remedy or ""))
        return Report("bundle", str(folder), None, tuple(findings))
    if full and provider is not None:
        left_open.extend(_not_here(provider))
    incomplete = bool(left_open) or (full and base is None)
    sound = not left_open and not any(finding.severity == "error" for finding in findings)
    broken, about_graph = _replayed(folder, provider or "cpu") if full and sound else ([], (_NOT_RUN,))
    open_questions = (*left_open, *([] if base else [NO_BASE]), *about_graph, _signature(folder))
    return Report("bundle", str(folder), None, (*findings, *broken), open_questions, incomplete, verdict)


def _signature(folder: Path) -> str:
    """What no check of a bundle's bytes can show."""
    named = "its signature was not verified" if (folder / SIGNATURE).is_file() else "it is not signed"
    return f"who made the graphs, and that they compute nothing else than the base and its adapters: {named} (adapterpack verify --key)"


def _findings(folder: Path, base: Path | Checkpoint | None, budget: Budget, allow_structural: bool, full: bool,
              table: Kernels | None) -> Iterator[Finding | Verdict | str]:
    """Findings, the verdict on the base, and as texts what the budget was too small for."""
    bundle = read_bundle(folder)
    irregular = False
    for finding in _file_list(folder, bundle, budget):
        irregular |= finding.rule == "AB101"
        yield finding
    if irregular:
        return  # nothing is opened that may lead out of the folder
    whole = True
    for finding in _digests(folder, bundle, budget):
        whole &= finding.rule != "AB103"
        yield finding
    if whole:
        unsafe = list(_safe(folder, bundle))
        yield from unsafe
        if table is not None and not unsafe:
            yield from _kernels(folder, table)
    for adapter in bundle.adapters:
        budget.require_time(f"the adapter {adapter.name}")
        report, pack = examine(folder / adapter.path, budget=budget)
        for one in report.findings:
            yield one._replace(where=f"{adapter.path}/{one.where}", file=one.file and f"{adapter.path}/{one.file}")
        if report.incomplete:
            yield f"{adapter.path}: {report.not_checked[0]}"
        elif pack is not None and pack.id != adapter.pack:
            yield Finding("AB201", "error", adapter.path, "the pack is not the one that the bundle names", "export again")
    if base is not None:
        budget.require_time("the base")
        checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
        yield from about_base(bundle, checkpoint, budget, allow_structural)
        if full and whole and checkpoint.has_weights and not allow_structural:
            budget.require_time("the weights of the graph")
            yield from _weights(folder, bundle, checkpoint)


def about_base(bundle: Bundle, checkpoint: Checkpoint, budget: Budget, allow_structural: bool) -> Iterator[Finding | Verdict]:
    """AB301, and the verdict on the base; of one whose weights are elsewhere, what its headers say."""
    remedy = "name the base that it was exported from"
    with checkpoint.watched(lambda: budget.require_time("the bytes of the base")):
        fingerprint = compatibility.deciding_fingerprint(checkpoint, bundle.base)
    try:
        verdict = compatibility.require("the bundle", bundle.base, fingerprint, name=checkpoint.name, where=checkpoint.where,
                                         model_type=checkpoint.config.get("model_type"),
                                         allow_structural=allow_structural or not checkpoint.has_weights)
    except BaseMismatch as error:
        yield Finding("AB301", "error", "base", error.sentence, error.remedy or remedy)
        yield compatibility.compare(bundle.base, fingerprint)
        return
    verdict = verdict._replace(means=f"of the base and the one that the manifest names, {verdict.means}")
    if verdict.name == "structural" and checkpoint.has_weights:
        yield Finding("AB301", "warning", "base", verdict.means, remedy)
    yield verdict


def _weights(folder: Path, bundle: Bundle, checkpoint: Checkpoint) -> Iterator[Finding]:
    """AB302: a matrix of the base for which a graph has another one. Quantization and folded adapters change matrices."""
    if bundle.quantization is not None or bundle.mode == "folded":
        return
    from ..onnx_graph.graph_file import GraphFile  # noqa: PLC0415 - onnx, and packs have no graph
    from ..onnx_graph.match import unmatched  # noqa: PLC0415

    tensors, shapes = unmatched([GraphFile(folder / graph_file(part)) for part in bundle.parts], checkpoint)
    sites = {checkpoint.tensor_name(f"{path}.weight") for path, site in bundle.sites.items()
             if site.role == "adapter" and site.kind == "linear" and site.weight}
    wrong = [name for name in sorted(tensors)
             if name in sites or {(shape := tuple(checkpoint.tensors[name].shape)), shape[::-1]} & shapes]
    if wrong:
        some = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        yield Finding("AB302", "error", GRAPH, f"the graph has other numbers in the place of weights of the base: {some}",
                      "do not use this bundle; export it again")


def _table(provider: str) -> Kernels | None:
    """What a provider implements; None for the CPU, for which every graph was proved."""
    require_known(provider)
    table = kernels_of(provider)
    if table is None and provider != "cpu":
        raise ProviderError("there is no table of what this provider implements", found=provider, expected="cpu, cuda",
                            remedy="open a session on it: that names the nodes which it leaves to the CPU")
    return table


def _not_here(provider: str) -> Iterator[str]:
    """Why no canary can be replayed on a provider on this machine."""
    from .providers.starting import start  # noqa: PLC0415 - ONNX Runtime, which a look at files does not need

    try:
        start(Device(provider=provider))
    except ProviderError as error:
        yield f"canaries on {provider}: {error.what}"


def _kernels(folder: Path, table: Kernels) -> Iterator[Finding]:
    """AB501: nodes for which a provider has no kernel."""
    from ..onnx_graph.graph_file import GraphFile  # noqa: PLC0415 - onnx, and packs have no graph

    for path in sorted(folder.glob("*.onnx")):
        nodes = list(nodes_without_kernel(GraphFile(path).model, table))
        if nodes:
            yield Finding("AB501", "error", path.name, f"nodes without a kernel in {table.provider} of ONNX Runtime {table.onnxruntime}: "
                          f"{listed(nodes)}", remedy_of(nodes), ProviderError)


def _replayed(folder: Path, provider: str) -> tuple[list[Finding], tuple[str, ...]]:
    """AB401, and which canaries say nothing of this graph."""
    try:
        not_replayed = replay_apart(folder, provider=provider)["not_replayed"]
    except AdapterpackError as error:
        where = (error.where or GRAPH).removeprefix(f"{folder.resolve()}{os.sep}")
        return [Finding("AB401", "error", where, error.sentence, error.remedy or "export again", type(error))], ()
    return [], tuple(f"canary of {name}: {reason}" for name, reason in not_replayed.items())


IRREGULAR = Finding("AB101", "error", "", "only regular files may lie in a bundle", "remove it")


def _file_list(folder: Path, bundle: Bundle, budget: Budget) -> Iterator[Finding]:
    listed = {FILE_NAME, SIGNATURE, *(entry.path for entry in bundle.files)}
    for name in sorted(needed(bundle) - listed):
        yield Finding("AB102", "error", name, "a file that the bundle needs, and that the manifest does not list", "export again")
    for path in (path for top in entries(folder) for path in (top, *sorted(top.rglob("*")))):
        budget.require_time("the list of files")
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield IRREGULAR._replace(where=relative)
        elif path.is_file() and relative not in listed:
            yield Finding("AB102", "error", relative, "a file that the manifest does not list", "remove it, or export again")


def _safe(folder: Path, bundle: Bundle) -> Iterator[Finding]:
    """AB105."""
    from ..onnx_graph.confine import require_safe  # noqa: PLC0415 - onnx, and packs have no graph
    from ..onnx_graph.graph_file import GraphFile  # noqa: PLC0415

    for path in sorted(folder.glob("*.onnx")):
        try:
            require_listed(folder, bundle, require_safe(GraphFile(path)))
        except AdapterpackError as error:
            yield Finding("AB105", "error", path.name, error.sentence, error.remedy or "do not use this bundle")


def _digests(folder: Path, bundle: Bundle, budget: Budget) -> Iterator[Finding]:
    """AB103-AB104. Every file is hashed, whatever was found before."""
    for wrong in differences(folder, bundle, again=True, watch=lambda: budget.require_time("the digests of the files")):
        if wrong.found is None:
            yield Finding("AB103", "error", wrong.path, "a listed file is missing", "copy the bundle again")
        else:
            message = "the file is not the one that the manifest lists: it was altered or truncated"
            yield Finding("AB104", "error", wrong.path, message, "copy the bundle again")
