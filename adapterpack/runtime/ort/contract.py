"""Checks open graphs against the manifest: their inputs, outputs, and the shapes of all slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...bundle import (
    ADAPTER_IDS,
    ADAPTER_POSITIONS,
    CACHE_LENGTHS,
    DECODER,
    ENCODED,
    LOGITS_POSITIONS,
    LONGEST,
    PAST,
    PRESENT,
    Bundle,
    GraphSignature,
    Port,
    SiteMap,
    replaced_states,
)
from ...errors import FormatError
from ...slots import FIELDS, extents, slot_shapes, split_slot
from ...tasks import MAIN, get_task
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
"""What differs, what was expected, and what was found."""
Values = Mapping[str, Any]
"""Name -> input, output or slot of a graph, with its ``type`` and ``shape``."""


def _differences(bundle: Bundle, part: str, graph: OrtModel) -> Iterator[Difference]:
    own = {
        path: site
        for path, site in bundle.sites.items()
        if site.part == (MAIN if part == DECODER else part) and site.fields
    }
    yield from _switch(graph, ADAPTER_POSITIONS, any(site.positional for site in own.values()))
    if part == DECODER:
        yield from _decoder_differences(bundle, own, graph)
        return
    if own or bundle.mode != "bank":  # a bank that holds only prompts may declare ids that no node reads
        yield from _switch(graph, ADAPTER_IDS, bundle.mode == "bank")
    first = next(one for one in get_task(bundle.task).parts if one.name == part).first(graph.inputs)
    if first not in graph.inputs:
        yield f"it has no input {first!r}", first, ", ".join(graph.inputs)[:200] or "none"
    signature = bundle.io if part == bundle.parts[-1] else bundle.io_before.get(part, GraphSignature())
    yield from _ports("input", signature.inputs, graph.inputs)
    yield from _ports("output", signature.outputs, graph.results)
    if bundle.mode == "bank":
        for name, shape in slot_shapes(own, bundle.max_rank).items():
            dtype = own[name.rpartition(".")[0]].dtype
            yield from _value(graph.slots, "slot", name, dtype, (bundle.slots, *shape))
    elif bundle.mode == "inputs":
        names = {split_slot(name): name for name in graph.slots}
        for path, site in own.items():
            for field in site.fields:
                name = names.get((path, field), f"{path}.{field}")
                yield from _value(graph.slots, "slot", name, site.dtype, (None,) * len(FIELDS[field].axes))


def _decoder_differences(bundle: Bundle, sites: SiteMap, graph: OrtModel) -> Iterator[Difference]:
    """Yields differences of the engine's graph, which takes cache lengths in place of a mask and every slot
    as an input.
    """
    for name in ("input_ids", CACHE_LENGTHS, LONGEST, LOGITS_POSITIONS):
        yield from _switch(graph, name, True)
    logits = graph.results.get("logits")
    if logits is None or not _is_fixed(logits, 3, [2]):
        yield "its output 'logits'", "[batch, positions, vocabulary]", ", ".join(graph.results)[:200]
    states = replaced_states(graph.inputs)
    for name, value in graph.inputs.items():
        if name.startswith((PAST, ENCODED)) and name not in states and not _is_fixed(value, 4, [1, 3]):
            yield f"its cache {name!r}", "[rows, heads, length, width]", value.shape
    for name in states:
        kept = graph.inputs[name]
        yield from _value(
            graph.results,
            "output",
            PRESENT + name.removeprefix(PAST),
            TYPES.get(kept.type, "float32"),
            (None, *kept.shape[1:]),
        )
    joined = {
        member for path, site in sites.items() if f"{path}.up" in graph.inputs for member in site.members
    }
    for path, site in sites.items() if bundle.mode == "bank" else ():
        for field in site.fields:
            if field != "up" or path not in joined:
                shape = extents(field, site, lambda axis: None)  # type: ignore[arg-type, return-value]
                yield from _value(graph.inputs, "slot", f"{path}.{field}", site.dtype, (None, *shape))


def _is_fixed(value: Any, axes: int, fixed: Sequence[int]) -> bool:
    """Returns whether a value has so many axes, of which these have a fixed length, and a known type."""
    shape = value.shape
    return value.type in TYPES and len(shape) == axes and all(isinstance(shape[at], int) for at in fixed)


def _switch(graph: OrtModel, name: str, wanted: bool) -> Iterator[Difference]:
    if (name in graph.inputs) != wanted:
        yield f"the input {name!r}", "one" if wanted else "none", "none" if wanted else "one"


def _ports(kind: str, ports: Iterable[Port], found: Values) -> Iterator[Difference]:
    expected = {port.name: port for port in ports}
    if not expected:  # older bundles do not record their signature
        return
    if expected.keys() != found.keys():
        yield f"its {kind}s", ", ".join(sorted(expected))[:300], ", ".join(sorted(found))[:300] or "none"
        return
    for name, port in expected.items():
        yield from _value(found, kind, name, port.dtype, port.shape)


def _value(
    values: Values, kind: str, name: str, dtype: str, shape: Sequence[int | str | None]
) -> Iterator[Difference]:
    """Yields a difference unless a value has this type and shape; variable extents match anything."""
    value = values.get(name)
    if value is None:
        yield f"it has no {kind} {name!r}", (dtype, shape), "none"
    elif (
        TYPES.get(value.type, value.type) != dtype
        or len(shape) != len(value.shape)
        or any(
            type(one) is int and type(two) is int and one != two
            for one, two in zip(shape, value.shape, strict=True)
        )
    ):
        yield f"the {kind} {name!r}", (dtype, shape), (value.type, value.shape)
