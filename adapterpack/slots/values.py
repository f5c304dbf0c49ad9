"""Computes the values of slots from packs: each adapter's normal form as arrays, padded for a bank or at
their own size for inputs.

Slot names are ``<module path>.<field>``. Fields of an adapted layer::

    x' = x * pre
    x" = x' + x' turn + (x' turn_down) turn_up
    y  = (base(x") + (x down) up + x delta) * scale
    y' = y + y mix + shift

``pre`` [in], ``turn`` [in, in], ``turn_down`` [in, t], ``turn_up`` [t, in], ``down`` [in, r], ``up`` [r,
out], ``delta`` [in, out], ``scale`` [out], ``mix`` [out, out], ``shift`` [out]; of a module that was trained
in full: ``head`` [in, labels], ``head_bias`` [labels]. In a bank a first axis selects the slot. Zeros are
neutral for all but ``pre`` and ``scale``, whose neutral value is 1, and ``head_bias``.

A stack of experts has ``experts_down`` [experts, in, r], ``experts_up`` [experts, r, out] and
``experts_delta`` [experts, in, out], which change the product of each token with each of its experts. Other
fields: blocks in :mod:`~adapterpack.slots.blocks`, routers in :mod:`~adapterpack.slots.routes`, prompts
in :mod:`~adapterpack.slots.prompt_kv` and :mod:`~adapterpack.slots.prompt_rows`;
:mod:`~adapterpack.slots.fields` lists the axes of all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from ..adapter_methods import (
    LAYOUTS,
    PROMPT,
    Arrays,
    Diagonal,
    IdentityPlusLowRank,
    NormalForm,
    Site,
    Tensors,
    complete,
    is_bare,
    is_stacked,
)
from ..adapter_methods.core.arrays import block_diagonal
from ..bundle import MappedSite, SiteMap
from ..errors import BaseMismatch, NonFinite, Unsupported
from ..io import all_finite
from ..pack import Adapter, Pack
from .blocks import block_arrays
from .fields import EXPERTS, FIELDS, FIXED, LABELS, extents, neutral
from .precision import DEFAULT, balance, convert
from .prompt_kv import Project, attended_arrays
from .prompt_rows import virtual_arrays
from .routes import route_arrays

HEAD_FIELDS = {"weight": "head", "bias": "head_bias"}
"""Parameter of a linear layer that was trained in full -> its slot field."""

_SLOTTED = tuple(
    kind
    for kind, layout in LAYOUTS.items()
    if layout.linear or layout.bare or kind in {"embedding", "table", "conv"}
)
"""Kinds of layers at which a graph can have slots."""
_ADDED = frozenset({"down", "up", "delta"})
"""Fields that are added to a product: all that a change of a bare parameter may have, since a scale would
reach what the module adds to the product.
"""

PEFT_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight"}
"""Slot field -> its name in adapter files for onnxruntime-genai, as ``olive convert-adapters``
writes them.
"""

_OF_PEFT = re.compile(r"(.*)\.(lora_[AB])\.(?:[\w-]+\.)*weight")
_FIELDS = {name.partition(".")[0]: field for field, name in PEFT_NAMES.items()}

Values = Arrays
"""Slot name -> array."""

Weights = Callable[[Adapter], "tuple[np.ndarray, np.ndarray | None]"]
"""Adapter -> the base's weight ``[out, in]`` and bias ``[out]`` at its site."""


def split_slot(name: str) -> tuple[str, str]:
    """Returns the module's path and the field of a slot by its name in a graph, whoever made it.

    Example:
        >>> split_slot("layers.0.q_proj.up"), split_slot("layers.0.q_proj.lora_A.MatMul.weight")
        (('layers.0.q_proj', 'up'), ('layers.0.q_proj', 'down'))
    """
    named = _OF_PEFT.fullmatch(name)
    path, _, field = name.rpartition(".") if named is None else (named[1], "", _FIELDS[named[2]])
    return path, field


def form_arrays(form: NormalForm, out_features: int) -> Values:
    """Converts a normal form to its fields, as float32 arrays. A low-rank ``up`` includes the scale."""
    fields = {}
    if form.down is not None and form.up is not None:
        fields["down"], fields["up"] = np.asarray(form.down.dense()).T, np.asarray(form.up.dense()).T
    elif form.down is not None:
        fields["delta"] = np.asarray(form.down.dense()).T
    if form.output_scale is not None:
        fields["scale"] = np.broadcast_to(np.asarray(form.output_scale), (out_features,))
    if form.shift is not None:
        fields["shift"] = np.broadcast_to(np.asarray(form.shift), (out_features,))
    if isinstance(form.pre, Diagonal):
        fields["pre"] = np.asarray(form.pre.vector)
    elif isinstance(form.pre, IdentityPlusLowRank):
        fields["turn_down"], fields["turn_up"] = np.asarray(form.pre.down).T, np.asarray(form.pre.up).T
    elif form.pre is not None:
        dense = np.asarray(form.pre.dense())
        fields["turn"] = (dense - np.eye(len(dense), dtype=dense.dtype)).T
    if form.post is not None:
        dense = np.asarray(form.post.dense())
        fields["mix"] = (dense - np.eye(len(dense), dtype=dense.dtype)).T
    fields |= route_arrays(form.routes)
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in fields.items()}


ARRAYS: dict[str, Callable[[Any, Site, Project | None], Values]] = {
    "weight": lambda form, site, project: form_arrays(form, site.out_features or 1),
    "activation": lambda form, site, project: block_arrays(form),
    "attention": lambda form, site, project: attended_arrays(form, site.path, project),
}
"""Kind of a method -> the function that converts its normal form at a site to fields. The third argument
projects prompts with the base's weights.
"""


def require_slots(pack: Pack) -> None:
    """Checks that a graph can have slots for every change of the pack.

    Raises:
        Unsupported: the method cannot be attached, or a site of a weight method is of a kind at which graphs
            have no slots.
    """
    if pack.method.kind == "prompt":  # prompts enter through the cache, or as virtual tokens before the row
        return
    for method in pack.methods:
        if reason := method.reason_against("graph"):
            raise Unsupported(reason, where=pack.name, remedy="attach it to a torch model")
        if not method.traits.batchable or method.kind not in ARRAYS:
            raise Unsupported(
                "this method cannot be attached to a graph",
                where=pack.name,
                found=method.name,
                remedy="export with --mode folded"
                if method.kind == "weight"
                else "run this adapter under torch",
            )
    for group in pack.manifest.adapter_groups if pack.method.kind == "weight" else ():
        if group.kind not in _SLOTTED:
            raise Unsupported(
                "a graph has slots at linear layers, embeddings, patches of images and parameters",
                where=f"{pack.name}, {group.path}",
                found=group.kind,
                expected=" or ".join(_SLOTTED),
                remedy="export with --mode folded",
            )


class NoRoom(Unsupported):
    """An adapter has a larger rank, or more labels, than the slots of a bank's graph. The engine's graph has
    as many as the adapters of a batch need.
    """

    code = "no-room"


def pack_values(
    pack: Pack,
    weights: Weights | None = None,
    sites: SiteMap | None = None,
    project: Project | None = None,
) -> Values:
    """Returns every slot value of a pack, by slot name, without padding. ``weights`` and ``project`` are
    called for methods that read the base model.

    ``sites`` are those of the graph; they supply widths that files of other libraries leave out.

    Raises:
        Unsupported: the method needs the base's weights and ``weights`` is None, or a head consists of more
            than linear layers.
        NonFinite: a value is NaN or infinite.
    """
    require_slots(pack)
    values: Values = {}
    in_cache = pack.method.kind == "prompt" and PROMPT not in (sites or {})
    adapters: Iterable[Adapter] = () if in_cache else pack.adapters()
    if readers := [method.name for method in pack.methods if method.traits.reads_weight and weights is None]:
        raise Unsupported(
            "this method needs the base's own weights, which this graph does not hold",
            where=pack.name,
            found=readers[0],
            remedy="export the bundle again with this adapter among the packs",
        )
    for adapter in adapters:
        site = _with_widths(adapter.site, sites or {})
        mapped = (sites or {}).get(site.path)
        if weights is not None:
            site = _with_weight(adapter, site, weights)
        fields = _fields_at(adapter._replace(site=site), mapped, project)
        placed = {f"{site.path}.{field}": array for field, array in fields.items()}
        if site.kind == "table":
            placed = _of_table(site.path, fields, mapped if adapter.method.traits.tied else None)
        if both := sorted(placed.keys() & values.keys()):
            raise Unsupported(
                "two changes of one adapter meet at a head that is tied to its embedding",
                where=pack.name,
                found=both[0],
                remedy="export with --mode folded",
            )
        values.update(placed)
    for path, params in pack.full().items():
        values.update(head_values(path, params))
    for name, array in values.items():
        if not all_finite(array):
            raise NonFinite(
                "what the adapter makes of its numbers is too large for float32",
                where=f"{pack.name}, {name}",
                remedy="train it again with a smaller learning rate",
            )
    return in_slots(values, sites or {})


def _with_weight(adapter: Adapter, site: Site, weights: Weights) -> Site:
    """Returns the site with the base's weight and bias if the method reads them, and with the weight's widths
    where its own are unknown.

    Raises:
        Unsupported: the method reads a stack.
    """
    reads = adapter.method.traits.reads_weight
    if reads and is_stacked(site.kind):
        _require_added(site.path, {adapter.method.name})
    if not reads and site.in_features and site.out_features:
        return site
    weight, bias = weights(adapter)
    site = dataclasses.replace(site, out_features=weight.shape[-2], in_features=weight.shape[-1])
    if not reads:
        return site
    wide = None if bias is None else bias.astype(np.float32)
    return dataclasses.replace(site, weight=weight.astype(np.float32), base_bias=wide)


def _fields_at(adapter: Adapter, mapped: MappedSite | None, project: Project | None) -> Values:
    """Returns the fields of an adapter at its site. Those of a stack are those of each of its matrices,
    stacked; its factors change places where the graph's site says so.
    """
    config = adapter.config
    method = adapter.method
    site = adapter.site
    every = adapter.wide

    def form_of(params: Tensors) -> Any:
        return method.normal_form(config, complete(method, config, params, site), site)

    if not is_stacked(site.kind):
        form = form_of(every)
        if method.kind == "prompt":
            return virtual_arrays(form, getattr(config, "pooled", "input"))
        fields = ARRAYS[method.kind](form, site, project)
        if is_bare(site.kind):
            _require_added(site.path, fields)
        return fields
    matrices = [
        form_arrays(form_of({name: value[number] for name, value in every.items()}), site.out_features)
        for number in range(site.stack)
    ]
    fields = {field: np.stack([matrix[field] for matrix in matrices]) for field in matrices[0]}
    _require_added(site.path, fields)
    if mapped is not None and mapped.layout == "out_in":
        fields = {_OTHER.get(field, field): array.transpose(0, 2, 1) for field, array in fields.items()}
    return {f"{EXPERTS}{field}": np.ascontiguousarray(array) for field, array in fields.items()}


_OTHER = {"down": "up", "up": "down"}


def _require_added(path: str, fields: Collection[str]) -> None:
    """Checks that the fields of a change of a parameter are added to its product.

    Raises:
        Unsupported: some are not.
    """
    if others := sorted(set(fields) - _ADDED):
        raise Unsupported(
            "at a bare parameter a graph has slots only for what is added to its product",
            where=path,
            found=", ".join(others),
            expected=", ".join(sorted(_ADDED)),
            remedy="export with --mode folded",
        )


def _of_table(path: str, fields: Values, mapped: MappedSite | None) -> Values:
    """Returns the slots of an embedding layer. The graph looks entries up, so ``down`` and ``up`` swap their
    roles; a tied output head that changes with the table gets them unswapped.

    Raises:
        Unsupported: the change of the layer is not low-rank.
    """
    if fields.keys() != {"down", "up"}:
        raise Unsupported(
            "a graph looks entries up in a table, and has slots for changes of low rank there",
            where=path,
            found=", ".join(sorted(fields)),
            expected="down, up",
            remedy="export with --mode folded",
        )
    head = (
        {}
        if mapped is None or mapped.head is None
        else {f"{mapped.head}.{field}": array for field, array in fields.items()}
    )
    return {
        f"{path}.down": np.ascontiguousarray(fields["up"].T),
        f"{path}.up": np.ascontiguousarray(fields["down"].T),
        **head,
    }


def in_slots(values: Values, sites: SiteMap) -> Values:
    """Converts values to the dtypes of their sites' slots; float32 where a site is unknown.

    Raises:
        Unsupported: a number is too large for its slot.
    """
    types = {
        name: sites[path].dtype if (path := name.rpartition(".")[0]) in sites else DEFAULT for name in values
    }
    narrow = {name: array for name, array in values.items() if types[name] != DEFAULT}
    # Only narrow float types need it; in float32 both factors have enough range.
    for down, up in _FACTORS:
        narrow = balance(narrow, down, up)
    return {**values, **{name: convert(array, types[name], name) for name, array in narrow.items()}}


_FACTORS = (("down", "up"), ("turn_down", "turn_up"), (f"{EXPERTS}down", f"{EXPERTS}up"))
"""Pairs of fields of which only the product matters."""


def _with_widths(site: Site, sites: SiteMap) -> Site:
    """Returns the site with the graph's widths where its own are unknown."""
    if site.path not in sites:
        return site
    mapped = sites[site.path]
    wide = {side: getattr(site, side) or getattr(mapped, side) for side in ("in_features", "out_features")}
    return dataclasses.replace(site, **wide)


def head_values(path: str, params: Tensors) -> Values:
    """Returns the slot values of a module that was trained in full: its linear layers' weights, transposed,
    and biases.
    """
    values: Values = {}
    for param, array in params.items():
        owner, _, leaf = param.rpartition(".")
        site = f"{path}.{owner}" if owner else path
        if leaf not in HEAD_FIELDS or array.ndim != (2 if leaf == "weight" else 1):
            raise Unsupported(
                "a trained module that is not made of linear layers has no slot form",
                where=f"{path}.{param}",
                remedy="export with --mode folded",
            )
        values[f"{site}.{HEAD_FIELDS[leaf]}"] = np.ascontiguousarray(array.T, dtype=np.float32)
        # labels that an adapter lacks are switched off through the bias, so there must be one
        if leaf == "weight":
            values.setdefault(f"{site}.head_bias", np.zeros(array.shape[0], np.float32))
    return values


def pad_slots(
    values: Tensors,
    sites: SiteMap,
    max_rank: int,
    heads: Tensors,
) -> Values:
    """Returns one adapter's values for every slot of the graph, padded with neutral values: zeros up to
    ``max_rank``, and labels that are switched off.

    ``heads`` are the slot values of the base's own heads, for an adapter without one.

    Raises:
        BaseMismatch: the adapter was made for a layer of another width.
        NoRoom: the adapter has a larger rank, or more labels, than the graph's slots.
        Unsupported: the adapter needs a slot that the graph does not have.
    """
    shapes = slot_shapes(sites, max_rank)
    values = group_slots(values, sites, max_rank)
    for name in values:
        if name not in shapes:
            raise Unsupported(
                "the graph has no slot for a part of this adapter",
                found=name,
                remedy="export the bundle again with this adapter among the packs",
            )
    result: Values = {}
    for name, shape in shapes.items():
        path, _, field = name.rpartition(".")
        value = values.get(name)
        if value is None and f"{path}.head" not in values:
            value = heads.get(name)
        dtype = sites[path].dtype
        result[name] = np.full(shape, neutral(field, dtype), dtype)
        if value is not None:
            _fill(result[name], convert(value, dtype, name), name)
    return result


def group_slots(values: Tensors, sites: SiteMap, width: int | None = None) -> Values:
    """Concatenates the ``down`` factors of siblings, each padded to ``width``, by default that of the widest.

    The siblings' ``up`` factors get as many rows, padded with neutral zeros, so that all parts have one size.
    If siblings share the ``up`` slot as well, their factors become the blocks of one matrix.

    Raises:
        Unsupported: a factor is wider than ``width``.
    """
    result = dict(values)
    for path, site in sites.items():
        if not site.members or f"{path}.down" in result:  # values from a bank are concatenated already
            continue
        downs = {
            member: result.pop(f"{member}.down") for member in site.members if f"{member}.down" in result
        }
        wide = max((down.shape[-1] for down in downs.values()), default=0) if width is None else width
        parts: dict[str, list[np.ndarray]] = {"down": [], "up": []}
        for member in site.members:
            for field, value, room in (
                ("down", downs.get(member), (site.in_features, wide)),
                ("up", result.get(f"{member}.up"), (wide, sites[member].out_features)),
            ):
                filled = np.zeros(room, site.dtype)
                if value is not None:
                    _fill(filled, value, f"{member}.{field}")
                parts[field].append(filled)
        result[f"{path}.down"] = np.concatenate(parts["down"], axis=1)
        ups = dict(zip(site.members, parts["up"], strict=True))
        if "up" in site.fields:
            result = {name: value for name, value in result.items() if name.rpartition(".up")[0] not in ups}
            result[f"{path}.up"] = block_diagonal(parts["up"])
        else:
            result |= {f"{member}.up": up for member, up in ups.items()}
    return result


def _fill(slot: np.ndarray, value: np.ndarray, name: str) -> None:
    """Writes a value into the beginning of its slot.

    Raises:
        BaseMismatch, Unsupported: as of :func:`pad_slots`.
    """
    found = value.shape
    room = slot.shape
    free = FIELDS[name.rpartition(".")[2]].free
    if len(found) != len(room) or any(
        a != b for axis, (a, b) in enumerate(zip(found, room, strict=True)) if axis not in free
    ):
        raise BaseMismatch(
            "the adapter was made for a layer of another width",
            where=name,
            expected=room,
            found=found,
            remedy="export a bundle of the base that the adapter was made for",
        )
    for axis in (one for one in free if found[one] > room[one]):
        raise NoRoom(
            "the adapter does not fit its slot",
            where=name,
            expected=f"at most {room[axis]} on axis {axis}",
            found=found[axis],
            remedy="export with a larger --max-rank or with this adapter among the packs, or resize it",
        )
    slot[tuple(slice(0, extent) for extent in found)] = value


def slot_shapes(sites: SiteMap, max_rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of one slot for every field of the graph."""
    shapes = {}
    for path, site in sites.items():
        room = {LABELS: site.labels or site.out_features, **site.ranks}
        for field in site.fields:
            length: Any = lambda axis, room=room: room.get(axis, max_rank)  # noqa: E731
            shapes[f"{path}.{field}"] = tuple(extents(field, site, length))
        if site.members and "down" in site.fields:  # the members' factors are concatenated
            shapes[f"{path}.down"] = (site.in_features, max_rank * len(site.members))
    return shapes


def largest_ranks(values: Iterable[Values]) -> dict[str, int]:
    """Returns the largest length of every free axis except the labels, by name: ranks, numbers of experts and
    of tokens.
    """
    ranks: dict[str, int] = {}
    for name, array in ((name, array) for one in values for name, array in one.items()):
        field = FIELDS[name.rpartition(".")[2]]
        for axis, extent in zip(field.axes, array.shape, strict=True):
            if axis not in FIXED and axis != LABELS:
                ranks[axis] = max(ranks.get(axis, 0), extent)
    return ranks


def stack_slots(slots: Iterable[Values]) -> Values:
    """Builds a bank: stacks every field of these slots along a new first axis."""
    ready = list(slots)
    return {name: np.stack([slot[name] for slot in ready]) for name in ready[0]}
