"""Finds out whether the canary of a pack applies to a bundle's graph, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator

from ..bundle.manifest import Bundle
from ..manifest.structs import Canary
from ..pack import canary
from ..pack.pack import Pack
from ..tasks.task import get_task

NONE = "the pack carries none"


def not_replayable(bundle: Bundle, pack: Pack) -> str | None:
    """Returns why the canary of ``pack`` does not apply to this graph, or None if it does."""
    recorded = pack.manifest.canary
    return NONE if recorded is None else canary.flaw(recorded) or next(_reasons(bundle, pack, recorded), None)


def _reasons(bundle: Bundle, pack: Pack, recorded: Canary) -> Iterator[str]:
    architecture = pack.manifest.task.architecture
    yield from foreign_inputs(bundle, recorded)
    if architecture is not None and not architecture.endswith(get_task(bundle.task).suffixes):
        yield f"it was recorded on {architecture}, the graph is for {bundle.task}"
    yield from of_graph(bundle, pack, recorded)


def foreign_inputs(bundle: Bundle, recorded: Canary) -> Iterator[str]:
    """Yields a reason if the canary has inputs that no graph of the bundle's task takes."""
    if not canary.input_names(recorded) <= set(get_task(bundle.task).inputs):
        yield f"it has inputs that a graph for {bundle.task} does not take"


def of_graph(bundle: Bundle, pack: Pack, recorded: Canary) -> Iterator[str]:
    """Yields the reasons in the bundle's own graphs that prevent a replay, for a pack of the right task."""
    mine, other = pack.manifest.base.content, bundle.base.content
    if bundle.mode == "folded" and len(bundle.adapters) > 1:
        yield "it is folded together with others"
    if mine is not None and other is not None and mine != other:
        yield "the graph's base has other bytes than the one that it was recorded on"
    yield from _other_shapes(bundle, recorded)


def _other_shapes(bundle: Bundle, recorded: Canary) -> Iterator[str]:
    """Yields a reason if the canary's images or speech have another shape than the graphs take; checked
    before any are generated.
    """
    ports = {port.name: port.shape for io in (*bundle.io_before.values(), bundle.io) for port in io.inputs}
    for name, recipe in (("pixel_values", recorded.pixels), ("input_features", recorded.features)):
        taken, made = ports.get(name, ())[1:], recipe.shape[1:] if recipe is not None else ()
        if recipe and (
            len(taken) != len(made)
            or any(isinstance(one, int) and one != two for one, two in zip(taken, made, strict=True))
        ):
            yield f"its {name} are of {made}, the graph's of {taken}"
