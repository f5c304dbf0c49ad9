"""Checks open graphs against the manifest: their inputs, outputs, and the shapes of all slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...bundle.decoder_graph import CACHE_LENGTHS, DECODER, LOGITS_POSITIONS, LONGEST
from ...bundle.manifest import ADAPTER_IDS, ADAPTER_POSITIONS, ENCODED, PAST, Bundle, MappedSite
from ...bundle.signature import GraphSignature, Port
from ...errors import FormatError
from ...slots.fields import FIELDS, extents
from ...slots.values import PEFT_NAMES, slot_shapes
from ...tasks.task import MAIN, get_task
from .model import TYPES, OrtModel


def require_contract(bundle: Bundle, part: str, graph: OrtModel) -> None:
    """Checks that a graph is the one that the manifest describes.

    Raises:
        FormatError: an input, an output or a slot is missing or has another type or shape.
    """
    for what, expected, found in _differences(bundle, part, graph):
        raise FormatError(
            f"the graph is not the one that the bundle's manifest describes: {what}",
            where=graph.path,
            expected=expected,
            found=found,
            remedy="do not use this bundle; export it again",
        )


Difference = tuple[str, object, object]


def _differences(bundle: Bundle, part: str, graph: OrtModel) -> Iterator[Difference]:
    own = {
        path: site
        for path, site in bundle.sites.items()
        if site.part == (MAIN if part == DECODER else part) and site.fields
    }
    if part == DECODER:
        yield from _decoder_differences(bundle, own, graph)
        return
    if own or bundle.mode != "bank":  # a bank that holds only prompts may declare ids that no node reads
        yield from _switch(graph, ADAPTER_IDS, bundle.mode == "bank")
    yield from _switch(graph, ADAPTER_POSITIONS, any(site.positional for site in own.values()))
    first = next(one for one in get_task(bundle.task).parts if one.name == part).inputs[0]
    if first not in graph.inputs:
        yield f"it has no input {first!r}", first, ", ".join(graph.inputs)[:200] or "none"
    signature = bundle.io if part == bundle.parts[-1] else bundle.io_before.get(part, GraphSignature())
    yield from _ports("inputs", signature.inputs, graph.inputs.values())
    yield from _ports("outputs", signature.outputs, graph.results.values())
    if bundle.mode == "bank":
        for name, shape in slot_shapes(own, bundle.max_rank).items():
            yield from _slot(graph, name, own[name.rpartition(".")[0]].dtype, (bundle.slots, *shape))
    elif bundle.mode == "inputs":
        for path, site in own.items():
            for field in site.fields:
                names = [f"{path}.{name}" for name in (field, PEFT_NAMES.get(field, field))]
                name = next((name for name in names if name in graph.slots), names[0])
                yield from _slot(graph, name, site.dtype, (None,) * len(FIELDS[field].axes))


def _decoder_differences(
    bundle: Bundle, sites: Mapping[str, MappedSite], graph: OrtModel
) -> Iterator[Difference]:
    """Yields differences of the engine's graph, which takes cache lengths in place of a mask and every slot
    as an input.
    """
    for name in ("input_ids", CACHE_LENGTHS, LONGEST, LOGITS_POSITIONS):
        yield from _switch(graph, name, True)
    yield from _switch(graph, ADAPTER_POSITIONS, any(site.positional for site in sites.values()))
    logits = graph.results.get("logits")
    if (
        logits is None
        or logits.type not in TYPES
        or len(logits.shape) != 3
        or not isinstance(logits.shape[2], int)
    ):
        yield "its output 'logits'", "[batch, positions, vocabulary]", ", ".join(graph.results)[:200]
    for name, value in graph.inputs.items():
        if name.startswith((PAST, ENCODED)) and (
            len(value.shape) != 4
            or value.type not in TYPES
            or not all(isinstance(value.shape[axis], int) for axis in (1, 3))
        ):
            yield f"its cache {name!r}", "[rows, heads, length, width]", value.shape
    joined = {
        member for path, site in sites.items() if f"{path}.up" in graph.inputs for member in site.members
    }
    for path, site in sites.items():
        for field in site.fields if bundle.mode == "bank" else ():
            if field == "up" and path in joined:
                continue
            name = f"{path}.{field}"
            shape = extents(field, site, lambda axis: None)  # type: ignore[arg-type, return-value]
            if name not in graph.inputs or not _fits(site.dtype, (None, *shape), graph.inputs[name]):
                yield (
                    f"the slot {name!r}",
                    (site.dtype, shape),
                    "none" if name not in graph.inputs else graph.inputs[name].shape,
                )


def _switch(graph: OrtModel, name: str, wanted: bool) -> Iterator[Difference]:
    if (name in graph.inputs) != wanted:
        yield f"the input {name!r}", "one" if wanted else "none", "none" if wanted else "one"


def _slot(graph: OrtModel, name: str, dtype: str, shape: tuple[int | None, ...]) -> Iterator[Difference]:
    if name not in graph.slots:
        yield f"it has no slot {name!r}", (dtype, shape), "none"
        return
    found = graph.slots[name]
    if not _fits(dtype, shape, found):
        yield f"the slot {name!r}", (dtype, shape), (found.type, found.shape)


def _ports(kind: str, ports: Iterable[Port], found: Iterable[Any]) -> Iterator[Difference]:
    expected: Mapping[str, Port] = {port.name: port for port in ports}
    if not expected:  # older bundles do not record their signature
        return
    values = {value.name: value for value in found}
    if expected.keys() != values.keys():
        yield f"its {kind}", ", ".join(sorted(expected))[:300], ", ".join(sorted(values))[:300] or "none"
        return
    for name, port in expected.items():
        if not _fits(port.dtype, port.shape, values[name]):
            yield (
                f"its {kind[:-1]} {name!r}",
                (port.dtype, port.shape),
                (values[name].type, values[name].shape),
            )


def _fits(dtype: str, shape: tuple[int | str | None, ...], found: Any) -> bool:
    """Returns whether a value of ONNX Runtime has this type and shape; variable extents match anything."""
    return (
        TYPES.get(found.type, found.type) == dtype
        and len(shape) == len(found.shape)
        and all(
            not (type(one) is int and type(two) is int) or one == two
            for one, two in zip(shape, found.shape, strict=True)
        )
    )
