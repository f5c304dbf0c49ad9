"""Base + packs -> bundle: build, map, attach, write, prove, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.checkpoint import Checkpoint, carried_files, read_json
from ..base.quantization import require_plain
from ..bundle.manifest import Bundle, BundledAdapter, MappedSite, read_bundle
from ..bundle.signature import signature_of
from ..errors import AdapterpackError, ConfigError, FormatError, ParityError, SiteNotFound, StorageError, UnknownName, Unsupported, nearest
from ..hub.resolve import folder_of
from ..io.atomic import refuse_existing
from ..io.hashing import identity
from ..manifest.manifest import Base
from ..merging.base_kind import is_graph
from ..merging.pipeline import merge
from ..onnx_graph.graph_file import GraphFile
from ..pack.on_base import on
from ..pack.pack import Pack
from ..pack.validate.validation import load
from ..slots.precision import DEFAULT, precision
from ..slots.values import require_slots
from ..tasks.feature_extraction import POOLING
from ..tasks.task import MAIN, NO_TASK, Task, require_encoder, task_named, task_of
from .attach_plan import plans_of, sites_of
from .bundle_writer import growing
from .frontends import FRONTENDS, BaseGraph, Frontend
from .frontends.external import external
from .graph.packing import SHARED, pack_siblings
from .graph.passes import checked, slots_of
from .limits import require_readable
from .modes import MODES, Attached, Plan
from .proof.parity import prove
from .quantization.schemes import require_scheme
from .targets import TARGETS, Target

if TYPE_CHECKING:
    from .proof.reference import Reference

Progress = Callable[[str], None]


def export(
    base: str | os.PathLike[str],
    packs: Sequence[Pack | str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] = "bundle",
    *,
    mode: str = "bank",
    task: str | None = None,
    slots: int | None = None,
    max_rank: int | None = None,
    quantize: str | None = None,
    dtype: str = DEFAULT,
    in_place: bool = False,
    frontend: str | None = None,
    target: str = "ort",
    pooling: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    allow_structural: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Writes a bundle: an ONNX graph of ``base`` with ``packs`` in it, its site map, the packs and the tokenizer.

    ``mode``: ``folded`` (weights changed), ``inputs`` (ONNX Runtime's optional inputs, one adapter a run) or ``bank`` (another adapter
    for every row). ``slots`` counts slot 0, the base; it and ``max_rank`` are the capacity of a bank. Every graph is compared with the
    torch model, base and each adapter, on a ragged padded batch, before it is published. ``dtype`` is the float type that graph and slots
    are made in, ``float32`` or ``float16``. ``in_place`` adds a decoder's graph for one token a step, on the same weights, whose cache
    stays where it is: ``generate`` uses it. ``target`` says who serves it: ``ort``,
    ``ort-genai`` (the folder that onnxruntime-genai loads) or ``triton`` (a model repository, which holds the bundle). ``base`` may be an
    ONNX file that another tool made of ``checkpoint``: its weights are found there by their bytes. ``pooling`` (``mean``, ``cls``
    or ``last``) is recorded for tasks that give hidden states; by default what the base says. ``allow_structural``
    accepts a base that has the names, dtypes and shapes of the packs', whatever its weights.

    Raises:
        BaseMismatch: a pack belongs to another base.
        ParityError: no frontend made a graph that agrees with the model.
        Unsupported: the mode cannot carry one of the packs, the target cannot run it, or the base is a model for another task.
        OutputExists: ``out`` is taken.

    Example:
        >>> export("MiniLM", ["packs/tickets"], "bundle", mode="bank")  # doctest: +SKIP
    """
    say = progress or (lambda text: None)
    refuse_existing(Path(out))
    if mode not in MODES:
        raise UnknownName("unknown mode", found=repr(mode), remedy=nearest(mode, MODES))
    if pooling is not None and pooling not in POOLING:
        raise UnknownName("unknown pooling", found=repr(pooling), remedy=nearest(pooling, POOLING))
    file = _graph_file(base, checkpoint)
    folder = folder_of(base if file is None else checkpoint)  # type: ignore[arg-type]
    loaded = [pack if isinstance(pack, Pack) else load(folder_of(pack)) for pack in packs]
    model = Checkpoint(folder)
    chosen, floats = _task(task, loaded, model), precision(dtype).name
    loaded = _check(loaded, model, allow_structural)
    for pack in loaded if mode != "folded" else ():
        require_slots(pack)
    product = TARGETS[target]
    product.require(mode, chosen)
    _require_cache(loaded, chosen)
    if in_place and "position_ids" not in chosen.main.inputs:
        raise Unsupported("only a decoder's cache can stay where it is", found=chosen.name, remedy="leave --in-place out")
    capacity = _capacity(mode, loaded, slots, max_rank)
    if quantize is not None:
        require_scheme(quantize)
    with contextlib.ExitStack() as stack:
        source, origin = folder, [] if file is None else [str(identity(each)) for each in GraphFile(file).files]
        if mode == "folded" and loaded:
            say("merge")
            source = stack.enter_context(_merged(folder, loaded, allow_structural))
            if file is not None:
                file = stack.enter_context(_folded_into(file, folder, loaded, allow_structural))
        failed: dict[str, AdapterpackError] = {}
        attached = [] if mode == "folded" else loaded
        candidates = _candidates(frontend, model, chosen) if file is None else [_of_file(file, attached)]
        for candidate in candidates:
            say(f"build the graph with {candidate.name}")
            try:
                graph = _built(candidate, source, chosen, floats)
                say("attach")
                return _publish(Path(out), graph, candidate, mode, chosen, model, source, loaded, capacity, quantize, product,
                                pooling, floats, in_place, origin, say)
            except (ParityError, SiteNotFound, Unsupported) as error:  # another frontend's graph may be right, or have what this one lacks
                failed[candidate.name] = error
                say(f"{candidate.name} is left out: {error.told}")
    refusals = [error for error in failed.values() if not isinstance(error, ParityError)]
    if refusals:
        raise refusals[-1]
    reasons = "; ".join(f"{name}: {error.told}" for name, error in failed.items())
    raise ParityError("no frontend made a graph that agrees with the model", where=folder, found=reasons,
                      remedy="report this architecture, or try another --frontend")


def _built(frontend: Frontend, source: Path, task: Task, dtype: str) -> BaseGraph:
    """The frontend's graph; that it cannot make one is as good a reason to try the next as a wrong graph."""
    try:
        return frontend.build(source, task.name, dtype)
    except (FormatError, SiteNotFound, StorageError, Unsupported):  # of a file that was named there is no other
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
        raise ParityError(f"this architecture cannot be built: {reason}", where=frontend.name) from error


def _publish(
    out: Path, graph: BaseGraph, frontend: Frontend, mode: str, task: Task, base: Checkpoint, source: Path, packs: list[Pack],
    capacity: tuple[int, int | None], quantize: str | None, target: Target, pooling: str | None, dtype: str, in_place: bool,
    origin: Sequence[str], say: Progress,
) -> Bundle:
    """Attaches, writes beside the output's place, proves the graph there, and only then gives it its name."""
    attached = [] if mode == "folded" else packs
    made_from = [base.content, graph.version, *(pack.id for pack in packs), *origin]
    every = sites_of(graph, attached)
    plans = plans_of(graph, base, attached, every, capacity, _default_sites(task, source) if mode != "folded" and not packs else None)
    done = [_attached(graph.parts[part], mode, target, every, plan) for part, plan in plans.items()]
    sites = {path: site for one in done for path, site in one.sites.items()}
    plan, labels = plans[MAIN], _labels(source, task)
    bundle = Bundle(
        mode=mode,
        task=task.name,
        base=Base(base.name, base.commit, base.config.get("model_type"), base.structure, base.content, probe=base.probe),
        frontend=graph.version,
        sites=sites,
        adapters=tuple(BundledAdapter(pack.name, pack.id, f"adapters/{pack.name}", slot + 1 if mode == "bank" else None,
                                      pack.manifest.task.labels) for slot, pack in enumerate(packs)),
        files=(),
        slots=plan.slots if mode == "bank" else 0,
        max_rank=plan.max_rank if mode == "bank" else 0,
        max_labels=max((site.labels for site in sites.values()), default=0),
        base_labels=labels,
        base_head_trained=not task.heads or _has_head(Checkpoint(source), task),
        io=signature_of(graph.model),
        io_before={part: signature_of(model) for part, model in graph.before.items()},
        target=target.name,
        pooling=pooling or _pooling(source),
        dtype=dtype,
    )
    place = target.place(bundle)
    with growing(out, place, graph.parts, made_from, say) as grown:
        folder = grown.folder
        for pack in packs:
            own = folder / "adapters" / pack.name
            own.mkdir(parents=True)
            pack.write_into(own)
        for one in done:
            one.write(folder)
        for path in carried_files(source):
            shutil.copyfile(path, folder / path.name)
        target.write(folder, bundle)
        started = time.perf_counter()
        say("load the model in torch, beside the writing, and prove parity")
        models = functools.cache(lambda whole: _reference(task, source, whole))
        try:
            bundle = _proved(bundle, folder, graph.paddings,
                             lambda: prove(folder, source, task, attached, lambda: models(False).model, grown.wait))
        except (ParityError, RuntimeError):
            if not models(False).light:
                raise
            # A model that looks at its weights itself may want them in float32.
            bundle = _proved(bundle, folder, graph.paddings, lambda: prove(folder, source, task, attached, lambda: models(True).model))
        say(f"proved; writing, the model in torch and the proof took {time.perf_counter() - started:.1f} s")
        if in_place:
            from .proof.cache_parity import with_steps  # noqa: PLC0415 - only where it is asked for

            bundle = dataclasses.replace(bundle, in_place=True)
            bundle.write(folder, draft=True)
            bundle = dataclasses.replace(bundle, parity={**bundle.parity, "in_place": with_steps(folder, say)})
        if quantize is None:
            bundle.write(folder, known=grown.digests())
        else:
            from .quantization.graphs import quantize_in_place  # noqa: PLC0415 - only where it is asked for

            say(f"quantize to {quantize}")
            bundle.write(folder, draft=True)
            grown.close()
            quantize_in_place(folder, quantize)
    return read_bundle(out / place)


def _default_sites(task: Task, source: Path) -> frozenset[str]:
    from .default_sites import default_sites  # noqa: PLC0415 - torch and transformers

    return default_sites(task, source)


def _reference(task: Task, source: Path, whole: bool) -> Reference:
    from .proof.reference import reference  # noqa: PLC0415 - seconds of imports, which the writing goes on beside

    return reference(task, source, whole)


def _proved(bundle: Bundle, folder: Path, paddings: Sequence[str], proof: Callable[[], dict[str, Any]]) -> Bundle:
    """The bundle with its proof, on the first side of padding on which the graph is right.

    Raises:
        ParityError: it is on none.
    """
    for number, padding in enumerate(paddings, 1):
        bundle = dataclasses.replace(bundle, padding=padding)
        bundle.write(folder, draft=True)
        try:
            return dataclasses.replace(bundle, parity=_run(proof))
        except ParityError:
            if number == len(paddings):
                raise
    raise AssertionError("a graph has a side of padding")


def _run(proof: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A graph that does not take what the task gives is as wrong as one that computes something else."""
    try:
        return proof()
    except ConfigError as error:
        raise ParityError(f"the graph cannot run the task: {error.told}") from error


def _attached(model: Any, mode: str, target: Target, every: Mapping[str, MappedSite], plan: Plan) -> Attached:
    """Packs siblings of one graph, and puts its part of the packs into it."""
    plan, slots = plan._replace(slot_name=target.slot_name), slots_of(model)
    plan = pack_siblings(model, {path: site for path, site in every.items() if site.part == plan.part}, plan,
                         SHARED[mode] if target.groups else ())
    checked("packing", model, plan.sites, slots)
    done = MODES[mode](model, plan)
    slots |= {plan.slot_name(path, field) for path, site in done.sites.items() for field in site.fields}
    checked("attaching", model, done.sites, slots)
    require_readable(model)
    return done


def _check(packs: list[Pack], base: Checkpoint, allow_structural: bool) -> list[Pack]:
    names = [pack.name for pack in packs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError("two packs have the same name", found=", ".join(twice), remedy="rename one: NAME=PATH")
    for pack in packs:
        pack.require_base(base, allow_structural=allow_structural)
    return [on(pack, base) for pack in packs]


def _require_cache(packs: list[Pack], task: Task) -> None:
    for pack in packs:
        if pack.method.kind == "prompt" and task.main.form != "decoder":
            raise Unsupported("a prompt goes into a decoder's cache, and the graph of this task has none", where=f"pack '{pack.name}'",
                              found=task.name, expected="text-generation", remedy="run this adapter under torch")


def _task(name: str | None, packs: list[Pack], base: Checkpoint) -> Task:
    told = {pack.manifest.task.type for pack in packs} - {NO_TASK}
    if name is None and len(told) > 1:
        raise Unsupported("the packs are for different tasks", found=", ".join(sorted(told)), remedy="export one bundle a task")
    architecture = base.architecture or ""
    found = task_named(name or told.pop()) if name or told else task_of(architecture, base.config)
    require_encoder(found, architecture, base.config)
    return found


def _capacity(mode: str, packs: list[Pack], slots: int | None, max_rank: int | None) -> tuple[int, int | None]:
    if mode != "bank" and (slots is not None or max_rank is not None):
        raise ConfigError("only a bank has slots and a largest rank", found=f"mode {mode}",
                          remedy="leave them out, or export with --mode bank")
    needed = len(packs) + 1
    if slots is not None and slots < needed:
        raise ConfigError("too few slots", expected=f"at least {needed}: one for the base and one for each pack", found=slots)
    return slots or needed, max_rank


def _graph_file(base: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None) -> Path | None:
    """The ONNX file that is to be exported from, if it is one."""
    file = Path(base) if is_graph(base) else None
    if file is not None and file.is_dir():
        raise ConfigError("a bundle is exported already", where=file,
                          remedy="name the checkpoint, or the .onnx file with --base CHECKPOINT")
    if (file is None) != (checkpoint is None):
        raise ConfigError("an ONNX file is exported beside the checkpoint that it was made from", where=base, found=checkpoint,
                          remedy="name it with --base" if checkpoint is None else "leave --base out")
    return file


def _of_file(path: Path, packs: Sequence[Pack]) -> Frontend:
    return Frontend("external", lambda config, task: True, lambda source, task, dtype: external(path, Checkpoint(source), packs, dtype))


@contextlib.contextmanager
def _folded_into(path: Path, base: Path, packs: list[Pack], allow_structural: bool) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="adapterpack-fold-") as scratch:
        report = merge(path, packs, Path(scratch) / "graph", checkpoint=base, allow_structural=allow_structural)
        yield Path(scratch) / "graph" / report.graph  # type: ignore[union-attr]


def _candidates(name: str | None, base: Checkpoint, task: Task) -> list[Frontend]:
    by_name = {frontend.name: frontend for frontend in FRONTENDS}
    if name is not None and name not in by_name:
        raise UnknownName("unknown frontend", found=repr(name), remedy=nearest(name, by_name))
    found = [frontend for frontend in FRONTENDS if name in {None, frontend.name} and frontend.supports(base.config, task.name)]
    if not found:
        raise Unsupported("no frontend exports this task", found=f"{base.config.get('model_type')}, {task.name}",
                          expected=", ".join(by_name), remedy="choose another --task or --frontend")
    return found


@contextlib.contextmanager
def _merged(base: Path, packs: list[Pack], allow_structural: bool) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="adapterpack-fold-") as scratch:
        target = Path(scratch) / base.resolve().name
        require_plain(Checkpoint(base))  # a merge would keep its format, and frontends build graphs of plain numbers
        merge(base, packs, target, allow_structural=allow_structural)
        yield target


def _pooling(folder: Path) -> str:
    """What the base says of its embeddings, as sentence-transformers writes it beside a model; the mean where it says nothing."""
    told = folder / "1_Pooling" / "config.json"
    config = read_json(told) if told.is_file() else {}
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
    chosen = [name for key, name in known.items() if isinstance(config, dict) and config.get(key) is True]
    return chosen[0] if len(chosen) == 1 else "mean"


def _labels(folder: Path, task: Task) -> tuple[str, ...] | None:
    """The labels of the base's own head, as transformers would name them."""
    if not task.labelled:
        return None
    table = Checkpoint(folder).config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(table[key] for key in sorted(table, key=int))


def _has_head(base: Checkpoint, task: Task) -> bool:
    return any(name.partition(".")[0] in task.heads for name in base.tensors)
