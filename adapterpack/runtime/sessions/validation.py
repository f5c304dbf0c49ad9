"""Validates a bundle: reports whatever a session would refuse in its files, packs, slots, tokenizer and base,
and with ``full`` also runs the canaries on its graphs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from ...base import Checkpoint, Verdict, chat_template_in, chat_template_of, compatibility
from ...bundle import (
    DECODER,
    FILE_NAME,
    GRAPH,
    Bundle,
    BundledAdapter,
    adapter_files,
    differences,
    graph_file,
    graphs_of,
    has_other_tokenizer,
    proof_sentence,
    read_bundle,
    require_in_list,
    required_files,
)
from ...errors import AdapterpackError, BaseMismatch, FormatError, ProviderError
from ...manifest import Manifest
from ...onnx_graph import GraphFile
from ...pack import SIGNATURE, Budget, Pack
from ...pack.revoked import require_unrevoked_signer
from ...pack.validate import NO_BASE, Finding, Report, examine
from ...pack.validate.checks import Spent, cost_problem, entries
from ...tasks import MAIN, get_task
from ..adapters import (
    SlotValues,
    reads_weights,
    require_base_slots,
    require_file_contents,
    require_pack_slots,
)
from ..media import FILES
from ..providers import Device, Kernels, get_provider, kernels_of, list_unfit, nodes_without_kernel, remedy_of
from ..text import context_length, read_object
from .canary_process import replay_apart

_NOT_RUN = "graph and canaries: replayed with full, where there is no error"


def validate_bundle(
    folder: Path,
    base: Path | Checkpoint | None = None,
    *,
    full: bool = False,
    budget: Budget | None = None,
    allow_structural: bool = False,
    provider: str | None = None,
) -> Report:
    """Checks a bundle's files, digests and packs, and with ``base`` that it was made from that base, within
    ``budget``, and returns the report.

    ``full`` also opens every graph, replays the canaries of its packs, and with ``base`` searches the graphs
    for every matrix of the base. A bundle with an error is not run. With ``provider`` it compares the nodes
    of the graphs with the table of that provider's kernels, which needs no GPU, and replays the canaries on
    the provider.

    Raises:
        ProviderError: there is no provider of that name, or no table of what it implements.

    A valid bundle is complete and consistent: its files are the listed ones, its slots hold the packs that it
    names, its tokenizer, chat template and configuration can be used, and with ``full`` its graphs have the
    inputs and outputs in the manifest. With ``base`` and ``full`` its matrices are the base's, and the
    canaries' logits are right. No check can show that the graphs compute nothing else; only the signature of
    a trusted person can.
    """
    findings: list[Finding] = []
    left_open: list[str] = []
    notes: list[str] = []
    verdict: Verdict | None = None
    table = None if provider is None else _table(provider)
    try:
        for result in _findings(folder, base, budget or Budget(), allow_structural, full, table):
            if isinstance(result, Finding):
                findings.append(result)
            elif isinstance(result, Verdict):
                verdict = result
            else:
                (notes if isinstance(result, Note) else left_open).append(str(result))
    except Spent as spent:
        left_open.append(str(spent))
    except AdapterpackError as error:
        findings.append(Finding("AB001", "error", FILE_NAME, error.sentence, error.remedy or ""))
        return Report("bundle", str(folder), None, tuple(findings))
    if full and provider is not None:
        left_open.extend(_not_here(provider))
    incomplete = bool(left_open) or (full and base is None)
    sound = not left_open and not any(finding.severity == "error" for finding in findings)
    broken, about_graph = _replay(folder, provider or "cpu") if full and sound else ([], (_NOT_RUN,))
    open_questions = (*left_open, *([] if base else [NO_BASE]), *notes, *about_graph, _signature(folder))
    return Report("bundle", str(folder), None, (*findings, *broken), open_questions, incomplete, verdict)


class Note(str):
    """A check that was skipped because there is nothing to compare with; it does not make the report
    incomplete.
    """


def _signature(folder: Path) -> str:
    """Returns the question that no check of a bundle's bytes can answer."""
    named = "its signature was not verified" if (folder / SIGNATURE).is_file() else "it is not signed"
    return (
        f"who made the graphs, and that they compute nothing else than the base and its adapters: {named} "
        "(adapterpack verify --key)"
    )


def _findings(
    folder: Path,
    base: Path | Checkpoint | None,
    budget: Budget,
    allow_structural: bool,
    full: bool,
    table: Kernels | None,
) -> Iterator[Finding | Verdict | str]:
    """Yields findings, the verdict on the base, and as strings the checks that were skipped, for lack of
    budget or of anything to compare.
    """
    bundle = read_bundle(folder)
    require_unrevoked_signer(folder)
    yield from _about_proof(bundle)
    irregular = False
    for finding in _file_list(folder, bundle, budget):
        irregular |= finding.rule == "AB101"
        yield finding
    if irregular:
        return  # nothing is opened that may lead out of the folder
    wrong = list(_digests(folder, bundle, budget))
    yield from wrong
    whole = all(finding.rule != "AB103" for finding in wrong)
    unsafe = list(_safe(folder, bundle)) if whole else []
    yield from unsafe
    if whole and table is not None and not unsafe:
        yield from _kernels(folder, table)
    readable = not wrong and not unsafe
    values = SlotValues(bundle, folder, cache(lambda part: GraphFile(folder / graph_file(part)).stored))
    if readable and bundle.mode == "bank":
        yield from _find_refusal("AB202", GRAPH, partial(require_base_slots, values))
    for adapter in bundle.adapters:
        budget.require_time(f"the adapter {adapter.name}")
        report, pack = examine(folder / adapter.path, budget=budget)
        for one in report.findings:
            yield one._replace(
                where=f"{adapter.path}/{one.where}", file=one.file and f"{adapter.path}/{one.file}"
            )
        if report.incomplete:
            yield f"{adapter.path}: {report.not_checked[0]}"
        elif pack is not None and pack.id != adapter.pack:
            yield Finding(
                "AB201",
                "error",
                adapter.path,
                "the pack is not the one that the bundle names",
                "export again",
            )
        elif pack is not None and report.valid and readable:
            yield from _slots(values, adapter, pack.called(adapter.name))
    if readable:
        budget.require_time("tokenizer, chat template and configuration")
        yield from about_texts(folder, bundle)
    if base is not None:
        budget.require_time("the base")
        checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
        yield from about_base(bundle, checkpoint, budget, allow_structural)
        yield from texts_of_base(folder, bundle, checkpoint)
        if full and whole and checkpoint.has_weights:
            budget.require_time("the weights of the graphs")
            yield from _weights(folder, bundle, checkpoint, allow_structural)


def _about_proof(bundle: Bundle) -> Iterator[Finding | Note]:
    """AB601: the export proved nothing; also yields what a proof by layers left open."""
    proof = bundle.parity.get("proof", {"depth": "full"})
    sentence = proof_sentence(proof, len(bundle.adapters))
    if proof["depth"] == "none":
        yield Finding("AB601", "warning", f"{FILE_NAME}#/parity/proof", sentence, "export with a proof")
    elif proof["depth"] != "full":
        yield Note(f"the rest of the graphs against torch: {sentence}")


def _slots(values: SlotValues, adapter: BundledAdapter, pack: Pack) -> Iterator[Finding | Note]:
    """AB202: slots that do not hold the values of the pack; also yields AB203."""
    bundle = values.bundle
    yield from other_tokenizer(bundle, adapter, pack.manifest)
    if reads_weights(pack) and bundle.mode != "folded":
        yield Note(f"the slots of {adapter.name}, which are made with the base's weights: compared with full")
    elif bundle.mode == "bank":
        yield from _find_refusal("AB202", adapter.path, partial(require_pack_slots, values, pack))
    elif bundle.mode == "inputs":
        from ..adapters.files import read_adapter_file  # noqa: PLC0415 - ONNX Runtime, whose own format it is

        files = adapter_files(values.folder, bundle, adapter)
        yield from _find_refusal(
            "AB202",
            adapter.path,
            lambda: require_file_contents(
                pack, bundle.sites, files, {part: read_adapter_file(path) for part, path in files.items()}
            ),
        )


def other_tokenizer(bundle: Bundle, adapter: BundledAdapter, pack: Manifest) -> Iterator[Finding]:
    """AB203: the pack was trained with another tokenizer."""
    if has_other_tokenizer(bundle, pack):
        yield Finding(
            "AB203",
            "warning",
            adapter.path,
            "the pack was trained with another tokenizer.json",
            "export again from the base that the pack was trained on",
        )


def _find_refusal(
    rule: str, where: str, require: Callable[[], object], remedy: str = "export again"
) -> Iterator[Finding]:
    """Calls a check and yields its error as a finding."""
    try:
        require()
    except AdapterpackError as error:
        yield Finding(rule, "error", where, error.sentence, error.remedy or remedy, type(error))


def about_texts(folder: Path, bundle: Bundle) -> Iterator[Finding]:
    """AB106: tokenizer, chat template and configuration, each read as a session reads it and used once."""
    refused = partial(_find_refusal, "AB106", remedy="copy the file from the base again")
    config = folder / "config.json"
    chats = get_task(bundle.task).pads_left
    yield from refused(config.name, lambda: context_length(read_object(config), config))
    for name in ("generation_config.json", *FILES):
        yield from refused(name, partial(read_object, folder / name))
    if (folder / "tokenizer.json").is_file():
        yield from refused("tokenizer.json", partial(_use, folder, chats))


def _use(folder: Path, chats: bool) -> None:
    """Encodes and decodes a text. For a chat model, renders messages in the first form that the template
    accepts.

    Raises:
        FormatError: tokenizing fails, or the template accepts no form of messages or takes too much time or
            memory.
    """
    from ..text.tokenizer import Tokenizer  # noqa: PLC0415 - tokenizers

    tokenizer = Tokenizer(folder)
    tokenizer.decode(tokenizer.encode("a"))
    template = tokenizer.template
    if template is None or not chats:
        return
    if reason := cost_problem(template, ()):
        raise FormatError(f"the chat template does not render: {reason}", where=folder, remedy="remove it")
    refused: FormatError | None = None
    for messages in _MESSAGES:
        try:
            tokenizer.render(messages)
            return
        except FormatError as error:
            refused = refused or error
    assert refused is not None
    raise refused


_USER = {"role": "user", "content": "a"}
_MESSAGES: tuple[list[Mapping[str, Any]], ...] = (
    [_USER],
    [{**_USER, "content": [{"type": "text", "text": "a"}]}],
    [{"role": "system", "content": "a"}, _USER],
)
"""Forms of a prompt: some templates require a list of parts, or a system message."""


def texts_of_base(folder: Path, bundle: Bundle, checkpoint: Checkpoint) -> Iterator[Finding]:
    """AB303: a tokenizer or a chat template that differs from the base's."""
    for entry in (entry for entry in bundle.files if entry.path in ("tokenizer.json", "added_tokens.json")):
        if checkpoint.has_file(entry.path, entry.sha256) is False:
            yield Finding("AB303", "error", entry.path, "it is not the base's", "export again")
    with contextlib.suppress(FormatError):  # which is a finding already
        if chat_template_in(folder) != chat_template_of(checkpoint):
            yield Finding("AB303", "error", "chat template", "it is not the base's", "export again")


def about_base(
    bundle: Bundle, checkpoint: Checkpoint, budget: Budget, allow_structural: bool
) -> Iterator[Finding | Verdict]:
    """AB301: the bundle belongs to another base. Also yields the verdict on the base, by its headers only if
    its weights are elsewhere.
    """
    remedy = "name the base that it was exported from"
    with checkpoint.watched(lambda: budget.require_time("the bytes of the base")):
        fingerprint = compatibility.deciding_fingerprint(checkpoint, bundle.base)
    try:
        verdict = compatibility.require(
            "the bundle",
            bundle.base,
            fingerprint,
            name=checkpoint.name,
            where=checkpoint.where,
            model_type=checkpoint.config.get("model_type"),
            allow_structural=allow_structural or not checkpoint.has_weights,
        )
    except BaseMismatch as error:
        yield Finding("AB301", "error", "base", error.sentence, error.remedy or remedy)
        yield compatibility.compare(bundle.base, fingerprint)
        return
    verdict = verdict._replace(means=f"of the base and the one that the manifest names, {verdict.means}")
    if verdict.name == "structural" and checkpoint.has_weights:
        yield Finding("AB301", "warning", "base", verdict.means, remedy)
    yield verdict


def _weights(
    folder: Path, bundle: Bundle, checkpoint: Checkpoint, allow_structural: bool
) -> Iterator[Finding | Note]:
    """AB302: matrices of the base that the graphs do not contain. Checks the ordinary graphs together, then
    those with the engine's graph.
    """
    reasons = {
        "the graphs were quantized": bundle.quantization is not None,
        "another base is allowed": allow_structural,
        "adapters are folded into them": bundle.mode == "folded" and bundle.adapters,
    }
    if any(reasons.values()):
        reason = next(reason for reason, holds in reasons.items() if holds)
        yield Note(f"the weights of the graphs against the base's: {reason}")
        return
    from ...onnx_graph.match import match_all  # noqa: PLC0415 - onnx, and packs have no graph

    files = {part: GraphFile(folder / graph_file(part)) for part in graphs_of(bundle)}
    found = dict(zip(files, match_all(files.values(), checkpoint), strict=True))
    for main in (MAIN, DECODER) if bundle.decoder else (MAIN,):
        graphs = [found[part] for part in (*bundle.parts[:-1], main)]
        tensors = frozenset.intersection(*(one.tensors for one in graphs))
        shapes = frozenset.union(*(one.shapes for one in graphs))
        yield from _other_weights(bundle, checkpoint, main, tensors, shapes)


def _other_weights(
    bundle: Bundle,
    checkpoint: Checkpoint,
    main: str,
    tensors: frozenset[str],
    shapes: frozenset[tuple[int, ...]],
) -> Iterator[Finding]:
    sites = {
        checkpoint.tensor_name(f"{path}.weight")
        for path, site in bundle.sites.items()
        if site.role == "adapter" and site.kind == "linear" and site.weight
    }
    wrong = [
        name
        for name in sorted(tensors)
        if name in sites or {(shape := tuple(checkpoint.tensors[name].shape)), shape[::-1]} & shapes
    ]
    if wrong:
        some = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        yield Finding(
            "AB302",
            "error",
            graph_file(main),
            f"the graph has other numbers in the place of weights of the base: {some}",
            "do not use this bundle; export it again",
        )


def _table(provider: str) -> Kernels | None:
    """Returns the kernels of a provider; None for the CPU, on which every graph was tested."""
    get_provider(provider)
    table = kernels_of(provider)
    if table is None and provider != "cpu":
        raise ProviderError(
            "there is no table of what this provider implements",
            found=provider,
            expected="cpu, cuda",
            remedy="open a session on it: that names the nodes which it leaves to the CPU",
        )
    return table


def _not_here(provider: str) -> Iterator[str]:
    """Yields why no canary can be replayed on a provider on this machine."""
    # ONNX Runtime, which a look at files does not need
    from ..providers.resolved_device import resolve  # noqa: PLC0415

    try:
        resolve(Device(provider=provider))
    except ProviderError as error:
        yield f"canaries on {provider}: {error.what}"


def _kernels(folder: Path, table: Kernels) -> Iterator[Finding]:
    """AB501: nodes for which a provider has no kernel."""
    for path in sorted(folder.glob("*.onnx")):
        nodes = list(nodes_without_kernel(GraphFile(path).model, table))
        if nodes:
            yield Finding(
                "AB501",
                "error",
                path.name,
                f"nodes without a kernel in {table.provider} of ONNX Runtime {table.onnxruntime}: "
                f"{list_unfit(nodes)}",
                remedy_of(nodes),
                ProviderError,
            )


def _replay(folder: Path, provider: str) -> tuple[list[Finding], tuple[str, ...]]:
    """AB401: a canary fails. Also returns the canaries that do not apply to these graphs."""
    try:
        not_replayed = replay_apart(folder, provider=provider)["not_replayed"]
    except AdapterpackError as error:
        where = (error.where or GRAPH).removeprefix(f"{folder.resolve()}{os.sep}")
        return [
            Finding("AB401", "error", where, error.sentence, error.remedy or "export again", type(error))
        ], ()
    return [], tuple(f"canary of {name}: {reason}" for name, reason in not_replayed.items())


IRREGULAR = Finding("AB101", "error", "", "only regular files may lie in a bundle", "remove it")


def _file_list(folder: Path, bundle: Bundle, budget: Budget) -> Iterator[Finding]:
    listed = {FILE_NAME, SIGNATURE, *(entry.path for entry in bundle.files)}
    for name in sorted(required_files(bundle) - listed):
        yield Finding(
            "AB102",
            "error",
            name,
            "a file that the bundle needs, and that the manifest does not list",
            "export again",
        )
    for path in (path for top in entries(folder) for path in (top, *sorted(top.rglob("*")))):
        budget.require_time("the list of files")
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield IRREGULAR._replace(where=relative)
        elif path.is_file() and relative not in listed:
            yield Finding(
                "AB102",
                "error",
                relative,
                "a file that the manifest does not list",
                "remove it, or export again",
            )


def _safe(folder: Path, bundle: Bundle) -> Iterator[Finding]:
    """AB105: a graph with an operator or a file reference that is not safe."""
    from ...onnx_graph.confine import require_safe  # noqa: PLC0415 - onnx, and packs have no graph

    for path in sorted(folder.glob("*.onnx")):
        try:
            require_in_list(folder, bundle, require_safe(GraphFile(path)))
        except AdapterpackError as error:
            yield Finding(
                "AB105", "error", path.name, error.sentence, error.remedy or "do not use this bundle"
            )


def _digests(folder: Path, bundle: Bundle, budget: Budget) -> Iterator[Finding]:
    """AB103 and AB104: files that are missing or altered. Hashes every file again, regardless of cached
    digests.
    """
    for wrong in differences(
        folder, bundle, again=True, watch=lambda: budget.require_time("the digests of the files")
    ):
        if wrong.found is None:
            yield Finding("AB103", "error", wrong.path, "a listed file is missing", "copy the bundle again")
        else:
            message = "the file is not the one that the manifest lists: it was altered or truncated"
            yield Finding("AB104", "error", wrong.path, message, "copy the bundle again")
