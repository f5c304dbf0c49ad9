"""Replays the canaries of a bundle's packs on its graphs, without torch.

A canary is a few input rows with the outputs that the trainer recorded, with the adapter and without. A
replay shows that a graph holds the right base model and each adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..bundle import ADAPTER_IDS, Bundle
from ..manifest import Canary
from ..pack import Pack, canary
from ..slots import DEFAULT, PRECISIONS, Values, head_values, in_slots, pad_slots, stack_slots
from ..tasks import MAIN, SOUNDS, Arrays, get_task
from .media import PIXELS
from .open_bundle import OpenBundle
from .pipeline import run_parts, values

Rows = list[np.ndarray]
NONE = "the pack carries none"


class Replay(NamedTuple):
    """The outputs of one canary on a session. ``base`` is None if the adapter is folded in and the base
    cannot run alone.
    """

    recorded: Canary
    base: Rows | None
    adapter: Rows


def replay(session: OpenBundle) -> dict[str, Replay]:
    """Runs the canaries of a session's packs and returns their outputs by pack name. It skips canaries that
    do not apply to the graph.
    """
    return {
        name: replay_one(session, pack, name)
        for name, pack in session.packs.items()
        if not_replayable(session.bundle, pack) is None
    }


def replay_one(session: OpenBundle, pack: Pack, name: str) -> Replay:
    """Runs the canary of a pack, which must have one, through the task's graphs; ``name`` is the pack's name
    in the session.
    """
    recorded = pack.manifest.canary
    assert recorded is not None
    return Replay(recorded, _bare(session, pack, recorded), rows(session, recorded, name))


def drift(before: Mapping[str, Replay], after: Mapping[str, Replay]) -> dict[str, float]:
    """Returns the largest difference between two graphs in the values that each canary compares."""
    return {
        name: max(
            float(np.abs(one - two).max())
            for one, two in zip(_compared_values(before[name]), _compared_values(after[name]), strict=True)
        )
        for name in after
    }


def widen_canary(bundle: Bundle, recorded: Canary, moved: float = 0.0, by_engine: bool = False) -> Canary:
    """Returns the canary with a tolerance wide enough for the precision of a bundle's graphs; with
    ``by_engine``, also for the rounding of the engine's KV cache.
    """
    coarse = PRECISIONS[bundle.dtype].tolerance if bundle.dtype != DEFAULT else 0.0
    cached = bundle.parity.get("decoder", {}).get("cache", {}).get("max_relative", 0.0) if by_engine else 0.0
    return canary.widen(recorded, coarse=max(coarse, cached), moved=moved)


def judge(
    session: OpenBundle, replays: Mapping[str, Replay], moved: Mapping[str, float], by_engine: bool = False
) -> dict[str, Any]:
    """Compares replayed canaries with their records and returns the report for the bundle's manifest:
    ``replayed`` with ``max_abs`` and ``tolerance``, ``not_replayed`` with the reason.

    ``moved`` is the measured difference between the quantized graph and the float graph on these rows. The
    tolerance grows by that much, so that a quantized graph passes if its float form does. An adapter without
    any effect fails at every tolerance.

    Raises:
        BaseMismatch, NothingToDo, ParityError: a canary fails; see :func:`adapterpack.pack.canary.check`.
    """
    replayed = {}
    reasons = {
        name: reason
        for name, pack in session.packs.items()
        if (reason := not_replayable(session.bundle, pack))
    }
    for name, (recorded, base, adapter) in replays.items():
        # Quantized products of the engine's graph round other activations than those that were measured.
        wide = widen_canary(
            session.bundle, recorded, moved.get(name, 0.0) * (2 if by_engine else 1), by_engine
        )
        if session.bundle.quantization is not None and name not in moved:
            reasons[name] = "the graph was quantized, and it is not known by how much that moved its logits"
        elif wide.tolerance > canary.QUANTIZED * canary.size(recorded):
            reasons[name] = (
                "quantization moves its logits by more than half of their size, so another base would "
                "pass as well"
            )
        else:
            error = canary.check(wide, base, adapter, where=f"{session.folder.name}, {name}")
            replayed[name] = {"max_abs": error, "tolerance": wide.tolerance}
    return {"replayed": replayed, "not_replayed": reasons}


def verify(session: OpenBundle) -> dict[str, Any]:
    """Replays and judges every canary of a session. A quantized graph may differ by as much as was measured
    when it was quantized.

    Raises:
        BaseMismatch, NothingToDo, ParityError: a canary fails.
    """
    return judge(session, replay(session), get_drift(session.bundle))


def get_drift(bundle: Bundle) -> Mapping[str, float]:
    """Returns the differences that were measured when the bundle was quantized, by pack; nothing for a float
    bundle.
    """
    moved: Mapping[str, float] = bundle.parity.get("canary", {}).get("moved", {})
    return moved if bundle.quantization is not None else {}


def rows(session: OpenBundle, recorded: Canary, name: str | None) -> Rows:
    """Runs the rows of a canary one by one with an adapter. Without a name the session's default applies."""
    return [canary.row_of(run_parts(session, inputs, name)) for inputs in _feeds(session, recorded)]


def _feeds(session: OpenBundle, recorded: Canary) -> Iterator[Arrays]:
    """Yields the rows as the session takes them; each image token is repeated for every position of the
    image.
    """
    return canary.feeds(recorded, image_in_text(session, recorded), session.sound_input)


def image_in_text(session: OpenBundle, recorded: Canary) -> tuple[int, int] | None:
    """Returns the token of an image and how many positions one of the canary takes; None for a canary without
    images in texts.
    """
    if recorded.pixels is None or "image_features" not in session.task.main.inputs:
        return None
    one = {PIXELS: np.zeros((1, *recorded.pixels.shape[1:]), np.float32)}
    return session.image_token, session.image_lengths(one)[0]


def _bare(session: OpenBundle, pack: Pack, recorded: Canary) -> Rows | None:
    """Runs the rows with the modules that the pack trained in full, but without its adapters: this is what a
    canary records as the base.
    """
    if session.bundle.mode == "folded":
        return None
    modules = _fed_modules(session.bundle, pack)
    sites = session.bundle.sites

    def run(feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None) -> dict[str, Any]:
        fixed = {
            name: array for name, array in modules.items() if sites[name.rpartition(".")[0]].part == part
        }
        if ADAPTER_IDS in session.graph(part).inputs:
            fixed[ADAPTER_IDS] = np.zeros(1 if rows is None else len(rows), np.int64)
        return session.graph(part).call({**feeds, **values(fixed)})

    row = session.pin([None])._replace(run=run)
    return [canary.row_of(run_parts(session, inputs, pinned=row)) for inputs in _feeds(session, recorded)]


def trained_modules(bundle: Bundle, pack: Pack) -> Values:
    """Returns slot values that hold only the modules that the pack trained in full."""
    values = {
        name: array
        for path, params in pack.full().items()
        for name, array in head_values(path, params).items()
    }
    return in_slots(values, bundle.sites)


def _fed_modules(bundle: Bundle, pack: Pack) -> Values:
    """Returns the trained modules as a graph takes them: in a bank every slot has them, slot 0 included."""
    values = trained_modules(bundle, pack)
    if bundle.mode != "bank" or not values:
        return values
    sites = {path: site for path, site in bundle.sites.items() if f"{path}.head" in values}
    return stack_slots([pad_slots(values, sites, bundle.max_rank, {})] * bundle.slots)


def _compared_values(one: Replay) -> Rows:
    """Returns the components that were recorded. If a row is too short, its last component is repeated;
    ``canary.check`` then refuses the row.
    """
    pairs = [
        *zip(one.recorded.base, one.base or (), strict=False),
        *zip(one.recorded.adapter, one.adapter, strict=True),
    ]
    return [np.take(row, kept["ids"], mode="clip") for kept, row in pairs]


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
    mine = pack.manifest.base.content
    other = bundle.base.content
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
    sound = next((name for name in SOUNDS if name in ports), "input_features")
    for name, recipe in (("pixel_values", recorded.pixels), (sound, recorded.features)):
        taken = ports.get(name, ())[1:]
        made = recipe.shape[1:] if recipe is not None else ()
        made = made[1:] if made[:1] == (1,) and name == sound else made
        if recipe and (
            len(taken) != len(made)
            or any(isinstance(one, int) and one != two for one, two in zip(taken, made, strict=True))
        ):
            yield f"its {name} are of {made}, the graph's of {taken}"
