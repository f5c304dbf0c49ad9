"""Writes a bundle's folder: attaches slots to the graphs, writes graphs, packs and the base's small files,
and proves the result against torch.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from ..adapter_methods import LoRA, get
from ..base import CONFIG, Checkpoint, copy_carried, pooling_of, read_json, said_in, write_json
from ..bundle import (
    DECODER,
    Bundle,
    BundledAdapter,
    MappedSite,
    SiteMap,
    VerificationCache,
    adapter_file,
    bundle_in,
    graph_file,
    graphs_of,
    manifest_bytes,
    signature_of,
)
from ..engine_graph.int8_cache import quantize_cache
from ..engine_graph.parity import with_decoder, with_report
from ..errors import Unsupported
from ..graph_passes import (
    MODES,
    AttachPlan,
    give_zeros,
    holds_stacks,
    pack_siblings,
    require_sites,
    slot_names,
)
from ..io import Say
from ..manifest.manifest import Base
from ..merging.checkpoint import require_space
from ..onnx_graph import SlicedTensor, in_order, save_graph
from ..quantizing.graphs import CACHES, find_products, finish_directly, quantize_directly, quantize_in_place
from ..readable import StepCounter, size
from ..runtime.adapters import write_adapter_file
from ..slots import FIELDS, FIXED, LABELS, group_slots, nothing
from ..tasks import MAIN, Task
from ..tasks.data import ONE, problem_in
from ..torch_adapters import empty_model
from ..torch_adapters.layers import select
from .arguments import ExportJob
from .attach_plan import plans_of, sites_of
from .frontends import BaseGraph, ExportSource
from .proof.parity import prove_bundle
from .proof.plan import ProofPlan
from .tracing.example_inputs import config_of

_OF_IMAGES = ("image_token_id", "image_grid_pinpoints", "vision_aspect_ratio", "spatial_merge_size")
"""Fields of a configuration that say how images become tokens."""
_SECONDS = 2.0
"""Seconds between two progress messages."""
_IN_FLIGHT = 256 << 20
"""Bytes of weights in memory at a time while weights are written; a larger weight is in memory alone."""


def write_bundle(
    root: Path,
    job: ExportJob,
    source: ExportSource,
    graph: BaseGraph,
    plan: ProofPlan,
    say: Say,
    small: Bundle | None = None,
) -> None:
    """Fills the folder ``root``, in which the target places the bundle; ``small`` is the bundle of a few
    layers, where these were proved before.

    Raises:
        ParityError: the graph disagrees with the model.
        SiteNotFound, Unsupported: the graph has no site for a module that a pack changes, or ONNX Runtime
            cannot read it.
        StorageError: the disk has no room for it.
    """
    say("attach")
    sites = sites_of(graph, job.attached)
    attach_plans = plans_of(
        graph,
        Checkpoint(source.folder),
        job.attached,
        sites,
        (job.slots, job.request.max_rank),
        _default_sites(job, source),
    )
    attached = [_attach(graph.parts[part], job, sites, of_part) for part, of_part in attach_plans.items()]
    bundle = _manifest(
        job,
        source,
        graph,
        attach_plans[MAIN],
        {path: site for slots in attached for path, site in slots.sites.items()},
    )
    folder = root / job.target.place(bundle)
    folder.mkdir(parents=True, exist_ok=True)
    every = {path: site for slots in attached for path, site in slots.every.items()}
    direct = job.quantize if plan.direct and not any(map(holds_stacks, graph.parts.values())) else None
    plan = plan._replace(direct=direct is not None)
    if direct is not None:
        say(f"quantize to {direct.scheme}, weight by weight")
        products = sum(len(find_products(model)) for model in graph.parts.values())
        tick = StepCounter(products, say, "quantize").tick
        bundle, every = quantize_directly(folder, bundle, graph.parts, direct, every, tick)
    else:
        write_graphs(folder, graph.parts, say)
    for pack in job.packs:
        (folder / "adapters" / pack.name).mkdir(parents=True)
        pack.write_into(folder / "adapters" / pack.name)
    if job.request.mode == "inputs":
        for slots in attached:
            _write_adapters(folder, slots)
    copy_carried(source.folder, folder)
    _say_defaults(folder / CONFIG, source)
    job.target.write(folder, bundle)
    bundle = prove_bundle(bundle, folder, source, graph.paddings, plan, say, every, small)
    if job.static_cache is not False:
        bundle = _with_decoder(bundle, folder, job, say)
    job.base.require_unchanged()
    if direct is not None:
        bundle = finish_directly(folder, bundle, direct, small, 0 if plan.stack is None else plan.stack.kept)
    bundle.write(folder, draft=job.quantize is not None and direct is None)
    if job.quantize is not None and direct is None:
        say(
            "hold the weights as the base stores them"
            if job.quantize.stored
            else f"quantize to {job.quantize.scheme}"
        )
        quantize_in_place(folder, job.quantize)
    if job.target.finish is not None:
        job.target.finish(folder, job.request.split)
    VerificationCache(manifest_bytes(bundle_in(root))).remember(*graphs_of(bundle))


def _say_defaults(path: Path, source: ExportSource) -> None:
    """Writes what only the transformers class knows into the bundle's configuration: attention windows, from
    which the engine's graph is built without transformers, and the sizes of images.
    """
    written = read_json(path)
    resolved = config_of(source.folder).to_dict()
    said = said_in(written, resolved)
    if "image_features" in source.task.main.inputs:
        vision = {**resolved["vision_config"], **said.get("vision_config", {})}
        said = {**{key: resolved[key] for key in _OF_IMAGES if key in resolved}, **said}
        said["vision_config"] = vision
    if said != written:
        write_json(path, said)


def _with_decoder(bundle: Bundle, folder: Path, job: ExportJob, say: Say) -> Bundle:
    """Adds the engine's graph and returns the manifest; for a family without such a graph, returns a manifest
    that states the reason.

    Raises:
        Unsupported: the family has no such graph, and the request requires it.
        ParityError: the engine's graph disagrees with the ordinary one.
    """
    try:
        made = with_decoder(bundle, folder, say)
    except Unsupported as error:
        if job.static_cache:
            raise
        (folder / graph_file(DECODER)).unlink(missing_ok=True)
        say(f"the engine's graph is left out: {error.sentence}")
        return with_report(bundle, left_out=error.what[:400])
    except Exception as error:
        error.add_note("The engine's graph was being made: export --no-static-cache leaves it out.")
        raise
    if job.request.cache == CACHES[0]:
        return made
    cache = quantize_cache(folder) if job.quantize is None else {"type": job.request.cache}
    return with_report(made, cache=cache)


def write_graphs(folder: Path, graphs: Mapping[str, ir.Model], say: Say) -> None:
    """Writes the graph of each part, with its weights in a separate data file, holding only a few weights in
    memory at a time.

    Raises:
        StorageError: the disk has no room for them.
    """
    values = [
        value
        for model in graphs.values()
        for inner in model.graphs()
        for value in inner.initializers.values()
        if value.const_value is not None
    ]
    total = sum(value.const_value.nbytes for value in values)
    require_space(folder, total)
    for value in values:
        value.const_value = _row_by_row(value.const_value)
    written = 0
    last = time.monotonic()

    def tell(tensor: ir.TensorProtocol, info: object) -> None:
        nonlocal written, last
        if time.monotonic() - last >= _SECONDS:
            last = time.monotonic()
            say(f"write {size(written)} of {size(total)}")
        written += tensor.nbytes

    for part, model in graphs.items():
        save_graph(
            model,
            folder / graph_file(part),
            callback=tell,
            max_workers=min(4, os.cpu_count() or 1),
            max_in_flight_bytes=_IN_FLIGHT,
        )


def _row_by_row(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Returns a tensor that is copied to file order when it is read; numpy would write a transposed matrix
    number by number.
    """
    if (
        len(tensor.shape) != 2
        or tensor.dtype.itemsize < 1
        or isinstance(tensor, (ir.ExternalTensor, SlicedTensor))
    ):
        return tensor

    def copy() -> ir.Tensor:
        return ir.tensor(in_order(tensor.numpy()), tensor.dtype, name=tensor.name)

    return ir.LazyTensor(copy, tensor.dtype, tensor.shape, name=tensor.name)


def _attach(model: ir.Model, job: ExportJob, sites: SiteMap, plan: AttachPlan) -> AttachPlan:
    """Packs siblings of one graph and attaches the graph's part of the packs; returns what it attached."""
    mode = job.request.mode
    plan = plan._replace(slot_name=job.target.slot_name)
    slots = slot_names(model)
    plan = pack_siblings(
        model,
        {path: site for path, site in sites.items() if site.part == plan.part},
        plan,
        mode == "bank" and job.target.groups,
    )
    require_sites("packing", model, plan.sites, slots)
    plan = MODES[mode](model, plan)
    slots |= {plan.slot_name(path, field) for path, site in plan.sites.items() for field in site.fields}
    require_sites("attaching", model, plan.sites, slots)
    give_zeros(model, next(part.optional for part in job.task.parts if part.name == plan.part))
    require_readable(model)
    return plan


def _write_adapters(folder: Path, plan: AttachPlan) -> None:
    """Writes ``adapters/NAME.onnx_adapter`` for every pack in ONNX Runtime's own file format. A graph without
    slots gets no files, unless it is the main graph.
    """
    if not plan.sites and plan.part != MAIN:
        return
    for pack, values in zip(plan.packs, plan.values, strict=True):
        complete = group_slots(values, plan.sites)
        # ONNX Runtime wants every input of variable length: write fields that the adapter lacks with length 0
        for site in plan.sites.values():
            for field in site.fields:
                if set(FIELDS[field].axes) - FIXED - {LABELS}:
                    complete.setdefault(f"{site.path}.{field}", nothing(field, site))
        named = {plan.slot_name(*name.rsplit(".", 1)): array for name, array in complete.items()}
        write_adapter_file(folder / adapter_file(f"adapters/{pack.name}", plan.part), named)


def _default_sites(job: ExportJob, source: ExportSource) -> frozenset[str] | None:
    """Returns the sites that get slots when there are no packs: the layers that ``targets="all-linear"``
    selects, without the output embedding and the task's heads. Builds the model without its weights.
    """
    if job.request.mode == "folded" or job.packs:
        return None
    model = empty_model(source.folder, job.task)
    heads = tuple(head for head in job.task.heads if hasattr(model, head))
    return frozenset(site.path for site in select(model, LoRA().targets, get("lora").traits, heads))


def _manifest(
    job: ExportJob, source: ExportSource, graph: BaseGraph, plan: AttachPlan, sites: dict[str, MappedSite]
) -> Bundle:
    """Returns the manifest without the fields that are known later: the padding side, the proof, and the
    digests of the files.
    """
    base = job.base
    task = job.task
    is_bank = job.request.mode == "bank"
    return Bundle(
        mode=job.request.mode,
        task=task.name,
        base=Base(
            base.name,
            base.commit,
            base.config.get("model_type"),
            base.structure,
            base.content,
            probe=base.probe,
        ),
        frontend=graph.version,
        sites=sites,
        adapters=tuple(
            BundledAdapter(
                pack.name,
                pack.id,
                f"adapters/{pack.name}",
                slot if is_bank else None,
                pack.manifest.task.labels,
            )
            for slot, pack in enumerate(job.packs, 1)
        ),
        files=(),
        slots=plan.slots if is_bank else 0,
        max_rank=plan.max_rank if is_bank else 0,
        max_labels=max((site.labels for site in sites.values()), default=0),
        base_labels=_labels(source.folder, task),
        base_problem=problem_in(Checkpoint(source.folder).config) if task.labelled else ONE.name,
        base_head_trained=not task.heads
        or any(name.partition(".")[0] in task.heads for name in Checkpoint(source.folder).tensors),
        io=signature_of(graph.model),
        io_before={part: signature_of(model) for part, model in graph.before.items()},
        target=job.target.name,
        pooling=job.request.pooling or pooling_of(source.folder),
        dtype=job.dtype,
    )


def _labels(folder: Path, task: Task) -> tuple[str, ...] | None:
    """Returns the labels of the base's own head, named as transformers names them."""
    if not task.labelled:
        return None
    table = Checkpoint(folder).config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(table[key] for key in sorted(table, key=int))


_LARGEST = 2**31 - 1
"""The largest size of a protobuf message in bytes."""
_INLINE = 1024
"""Initializers up to this many bytes are stored in the message."""


def require_readable(model: ir.Model) -> None:
    """Opens a one-node model with the same IR version and operator sets, and adds up the size of the protobuf
    message.

    Raises:
        Unsupported: the installed ONNX Runtime does not know these versions, or the message would be too
            large to write.
    """
    reason = _refusal(model.ir_version, dict(model.opset_imports))
    if reason is not None:
        versions = f"IR version {model.ir_version}, " + ", ".join(
            f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items())
        )
        limit = re.search(r"(?:is till opset|max supported)[^0-9]*([0-9]+)", reason)
        raise Unsupported(
            "the installed ONNX Runtime cannot read this graph",
            where=f"onnxruntime {ort.__version__}",
            found=versions,
            expected=f"at most {limit.group(1)}" if limit else reason[:200],
            remedy="install a newer onnxruntime, or choose another --frontend",
        )
    inline_bytes = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes <= _INLINE
    )
    inline_bytes += sum(
        attribute.value.nbytes
        for node in model.graph
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR
    )
    if inline_bytes > _LARGEST:
        raise Unsupported(
            "the graph holds too much in its constants to be one file",
            found=f"{inline_bytes} bytes",
            expected=f"at most {_LARGEST}",
            remedy="export it with its constants as initializers",
        )


def _refusal(version: int, imports: dict[str, int]) -> str | None:
    """Returns why ONNX Runtime does not open an empty model of these versions, or None."""
    opsets = ", ".join(f'"{domain}": {number}' for domain, number in {"": 17, **imports}.items())
    probe = ir.from_onnx_text(
        f"<ir_version: {version}, opset_import: [{opsets}]> probe (float[1] x) => (float[1] y)"
        "{ y = Identity(x) }"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(
            ir.to_proto(probe).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises its own exception classes
        return str(error).partition("\n")[0]
    return None
