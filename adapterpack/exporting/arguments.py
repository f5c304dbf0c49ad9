"""The arguments of an export as one value, shared by the library call and the command, and the checks on them
before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..base import Checkpoint, DequantizedCheckpoint
from ..bundle import PROOFS
from ..errors import ConfigError, Unsupported, require_among
from ..graph_passes import MODES
from ..hub import folder_of
from ..io import Say
from ..manifest import BaseQuantization
from ..merging.base_kind import is_gguf, is_graph
from ..merging.gguf.base_model import GGUFBase
from ..pack import Pack, load, match_layers, named_on, require_task
from ..paths import StrPath
from ..quantizing.graphs import (
    CACHES,
    STORED,
    TRAINED,
    GraphOptions,
    GraphQuantization,
    codes_of_base,
    quantization,
    require_no_options,
)
from ..slots import DEFAULT, require_slots, virtual_tokens
from ..slots.precision import precision
from ..tasks import NO_TASK, POOLING, Task, get_task, require_encoder, task_of
from .quantize_base import trained_form
from .targets import TARGETS, Target


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of one export; :func:`adapterpack.export` takes these fields and documents them.

    ``base`` is a checkpoint, an ONNX or GGUF file made from the ``checkpoint``, or a finished bundle.
    """

    base: StrPath
    packs: Sequence[Pack | StrPath] = ()
    out: StrPath = "bundle"
    _: KW_ONLY
    mode: str = "bank"
    """``folded``, ``inputs`` or ``bank``."""
    task: str | None = None
    """A Hugging Face pipeline name; by default that of the packs, or of the base's architecture."""
    slots: int | None = None
    """The number of slots of a bank, including slot 0 for the base."""
    max_rank: int | None = None
    """The largest rank that a slot of a bank can hold."""
    quantize: str | None = None
    """The scheme of the graph's weights."""
    dequantize: bool = False
    """Whether to store the weights of a quantized base as floats."""
    dtype: str = DEFAULT
    """The float type of graph and slots."""
    in_place: bool | None = None
    """Whether the engine's graph, which has a static cache, is required (True), left out (False), or built
    where possible (None).
    """
    cache: str = CACHES[0]
    """The type of keys and values in the engine's graph."""
    frontend: str | None = None
    """The frontend that builds the graph; by default the first whose graph agrees with torch."""
    target: str = "ort"
    """The product that runs the bundle."""
    proof: str | None = None
    """How much is proved: ``full``, ``layers`` or ``none``; by default large models by layers."""
    pooling: str | None = None
    """How to pool hidden states into one vector, for tasks that return them."""
    checkpoint: StrPath | None = None
    """The checkpoint from which an ONNX or GGUF ``base`` was made."""
    allow_structural: bool = False
    """Whether to accept a base that only matches the packs' base in names, dtypes and shapes."""
    split: int | None = None
    """Size limit in bytes for the data files of a web site."""
    progress: Say | None = None
    """A function that receives a message at each step."""
    accuracy: str | None = None
    """This field and the following ones control how graphs are quantized; :func:`adapterpack.quantize`
    documents them.
    """
    head: str | None = None
    block_size: int | None = None
    symmetric: bool | None = None
    algorithm: str | None = None
    calibration: StrPath | None = None
    compensate: int | None = None
    error_budget: float | None = None
    size_budget: int | None = None

    @property
    def graph_options(self) -> GraphOptions:
        """The options of a quantized graph."""
        options: Any = {name: getattr(self, name) for name in GraphOptions.__annotations__}
        return cast(GraphOptions, options)


class ExportJob(NamedTuple):
    """A checked :class:`.ExportRequest` with its inputs opened. ``file`` is the ONNX file to export from, if
    any. ``static_cache`` None: the engine's graph is built if the family's attention allows it. ``decoded``
    holds the weights where they are stored as codes; ``trained`` is the form in which to quantize the base
    first.
    """

    request: ExportRequest
    base: Checkpoint
    file: Path | None
    packs: list[Pack]
    task: Task
    slots: int
    quantize: GraphQuantization | None
    dtype: str
    static_cache: bool | None
    target: Target
    decoded: DequantizedCheckpoint | None = None
    trained: BaseQuantization | None = None

    @property
    def attached(self) -> list[Pack]:
        """The packs that the graph gets slots for."""
        return [] if self.request.mode == "folded" else self.packs


def prepare(request: ExportRequest) -> ExportJob:
    """Checks that the parts of a request fit together, and opens the base and the packs.

    Raises:
        BaseMismatch: a pack belongs to another base.
        UnknownName, ConfigError: an argument has no such value, or does not go with another.
        Unsupported: the mode cannot carry one of the packs, the target cannot run it, or the base is a model
            for another task.
    """
    base = request.base
    checkpoint = request.checkpoint
    mode = request.mode
    require_among("unknown mode", mode, MODES)
    require_among("unknown pooling", request.pooling, POOLING)
    require_among("unknown depth of a proof", request.proof, PROOFS)
    gguf = is_gguf(base)
    file = None if gguf else _graph_file(base, checkpoint)
    if gguf and checkpoint is None:
        raise ConfigError(
            "a GGUF file is exported together with the checkpoint that it was made from",
            where=base,
            remedy="name it with --base: its configuration and its tokenizer are needed",
        )
    folder = folder_of(base if checkpoint is None else checkpoint)
    model = Checkpoint(folder) if file is not None else DequantizedCheckpoint(folder)
    packs = [pack if isinstance(pack, Pack) else load(folder_of(pack)) for pack in request.packs]
    task = _task(request.task, packs, model)
    dtype = precision(request.dtype).name
    packs = _on_base(packs, model, request.allow_structural)
    for pack in packs if mode != "folded" else ():
        require_slots(pack)
    target = TARGETS[request.target]
    target.require(mode, task)
    require_split(target, request.split)
    for pack in packs:
        if pack.method.kind == "prompt":
            _require_room(pack, task)
    static_cache = _require_cache(request, task, dtype)
    if static_cache and not task.generates:
        raise Unsupported(
            "only decoders have a static cache",
            found=task.name,
            remedy="leave --static-cache out",
        )
    if static_cache and mode == "inputs":
        raise Unsupported(
            "the engine's rows have adapters of their own, and a graph of this mode has one at a time",
            found=f"--mode {mode}",
            expected="bank or folded",
            remedy="leave --static-cache out, or export with --mode bank",
        )
    if static_cache is None and not (task.generates and mode != "inputs" and target.engine):
        static_cache = False
    decoded = _codes_source(model, Path(base) if gguf else None, packs, request.allow_structural)
    trained = trained_form(packs, decoded or model) if request.quantize == TRAINED else None
    quantize = _quantization(request, decoded, dtype)
    slots = _slots(request, len(packs) + 1)
    return ExportJob(
        request, model, file, packs, task, slots, quantize, dtype, static_cache, target, decoded, trained
    )


def _require_room(pack: Pack, task: Task) -> None:
    """Checks that a graph of this task has a place for a prompt: a decoder's cache, or the space before
    tokens that are all read at once.

    Raises:
        Unsupported: the graph has no such place.
    """
    virtual = virtual_tokens(pack)
    if task.main.form == "decoder" or (task.reads_at_once and (virtual or task.generates)):
        return
    if task.reads_at_once:
        raise Unsupported(
            "keys and values go into a decoder's cache, and the graph of this task has none",
            where=pack.where,
            found=f"{pack.method.name} for {task.name}",
            expected="text-generation, text2text-generation",
            remedy=(
                "train virtual embeddings, as prompt_tuning and p_tuning do, or attach this adapter in torch"
            ),
        )
    raise Unsupported(
        "a graph has room for prompts where it reads a row at once, or in the cache of a decoder alone",
        where=pack.where,
        found=f"{pack.method.name} for {task.name}",
        expected="text-generation, text2text-generation, or an encoder of texts",
        remedy=(
            "train a method of linear layers, such as lora, or attach this adapter in torch: "
            "adapterpack.attach"
        ),
    )


def _codes_source(
    model: Checkpoint, gguf: Path | None, packs: Sequence[Pack], allow_structural: bool
) -> DequantizedCheckpoint | None:
    """Returns the source of weights that are stored as codes: the base, or a GGUF file made from it; None for
    float weights.

    Raises:
        BaseMismatch: the file's numbers are not those of the packs' base, within its grid.
    """
    if gguf is None:
        return model if isinstance(model, DequantizedCheckpoint) and model.quantized else None
    file = GGUFBase(gguf, model.folder)
    for pack in packs:
        file.require(pack, content=None, allow_structural=allow_structural)
    return file


def require_split(target: Target, split: int | None) -> None:
    """Checks that a target writes data files of a configurable size.

    Raises:
        ConfigError: the target writes one file, or the size is too small.
    """
    if split is not None and not target.splits:
        raise ConfigError(
            "this target writes its data into one file",
            found=f"split {split}, target {target.name}",
            remedy="leave it out, or export with --target web",
        )
    if split is not None and split < 1:
        raise ConfigError(
            "the largest size of a data file is too small",
            where="split",
            expected="a number from 1",
            found=split,
        )


def _quantization(
    request: ExportRequest, decoded: DequantizedCheckpoint | None, floats: str
) -> GraphQuantization | None:
    """Decides how the graph stores its weights: those of a quantized base keep their stored form unless the
    request says otherwise.

    Raises:
        UnknownName, ConfigError: an option has no such value, or has no effect together with the others.
        Unsupported: no graph can be written in this scheme.
    """
    scheme = request.quantize
    options = request.graph_options
    dequantize = request.dequantize
    if scheme is None and decoded is not None and not dequantize and floats == DEFAULT:
        scheme = STORED
    if scheme == TRAINED or (scheme == STORED and decoded is not None):
        if floats != DEFAULT or dequantize:
            raise ConfigError(
                "only a graph in float32 can hold the codes of its base",
                found=f"--dtype {floats}" if floats != DEFAULT else "--dequantize",
                remedy="leave it out, or --quantize",
            )
        require_no_options(
            "the graph has the codes of its base",
            **{name: value for name, value in options.items() if name != "accuracy"},
        )
        return codes_of_base(scheme, decoded, request.accuracy)
    if scheme is not None:
        return quantization(scheme, **options)
    require_no_options("the graph is not quantized", **options)
    return None


def _require_cache(request: ExportRequest, task: Task, floats: str) -> bool | None:
    """Returns whether the request requires the engine's graph, which has caches of this type.

    Raises:
        UnknownName, ConfigError, Unsupported: there is no such type, or the graph would not have it.
    """
    cache, static_cache = request.cache, request.in_place
    require_among("unknown type of caches", cache, CACHES)
    if cache == CACHES[0]:
        return static_cache
    if static_cache is False:
        raise ConfigError(
            "only the engine's graph has caches of this type, and it is left out",
            found=cache,
            remedy="leave --no-static-cache out, or --cache",
        )
    if len(task.parts) > 1 or not task.generates or floats != DEFAULT:
        raise Unsupported(
            "caches can be in eight bits only for text generation in float32",
            found=f"{task.name}, {floats}",
            remedy="leave --cache out",
        )
    return True


def _graph_file(base: StrPath, checkpoint: StrPath | None) -> Path | None:
    """Returns the ONNX file to export from, if ``base`` is one."""
    file = Path(base) if is_graph(base) else None
    if (file is None) != (checkpoint is None):
        raise ConfigError(
            "an ONNX file is exported together with the checkpoint that it was made from",
            where=base,
            found=checkpoint,
            remedy="name it with --base" if checkpoint is None else "leave --base out",
        )
    return file


def _task(name: str | None, packs: list[Pack], base: Checkpoint) -> Task:
    types = {pack.manifest.task.type for pack in packs} - {NO_TASK}
    if name is None and len(types) > 1:
        raise Unsupported(
            "the packs are for different tasks",
            found=", ".join(sorted(types)),
            remedy="export one bundle a task",
        )
    architecture = base.architecture or ""
    chosen = get_task(name or types.pop()) if name or types else task_of(architecture, base.config)
    require_encoder(chosen, architecture, base.config)
    for pack in packs:
        # a caller who names the task has chosen it for these packs
        require_task(pack, chosen, accepted=types)
    return chosen


def _on_base(packs: list[Pack], base: Checkpoint, allow_structural: bool) -> list[Pack]:
    """Returns the packs bound to this base, each under a unique name."""
    names = [pack.name for pack in packs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            "two packs have the same name", found=", ".join(twice), remedy="rename one: NAME=PATH"
        )
    for pack in packs:
        pack.require_base(base, allow_structural=allow_structural)
    return [match_layers(named_on(pack, base), base) for pack in packs]


def _slots(request: ExportRequest, needed: int) -> int:
    """Returns the number of slots of the graph; it must hold at least ``needed``, including the base's
    slot.
    """
    if request.mode != "bank" and (request.slots is not None or request.max_rank is not None):
        raise ConfigError(
            "only a bank has slots and a largest rank",
            found=f"mode {request.mode}",
            remedy="leave them out, or export with --mode bank",
        )
    if request.slots is not None and request.slots < needed:
        raise ConfigError(
            "too few slots",
            expected=f"at least {needed}: one for the base and one for each pack",
            found=request.slots,
        )
    return request.slots or needed
