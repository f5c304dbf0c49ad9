"""Carries a pack to a base that continues its own, site by site, and says how far the two bases are apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import Site, to_matrix
from ..adapter_methods.lora import lora
from ..base import Checkpoint, require_plain
from ..composing.arguments import chosen_name, opened_base
from ..composing.full_modules import CombinedModules
from ..composing.result import as_lora, build_composed
from ..composing.sites import JointSite, SiteValues, gather
from ..converting import BaseModel
from ..errors import BaseMismatch, Unsupported
from ..io import Progress, Ticker, in_order, refuse_existing
from ..lowrank import Cut, Factors, recompress_all, weighted_sum
from ..lowrank.factors import inner
from ..pack import Pack, as_pack, descend, seal
from ..paths import StrPath
from ..torch_adapters.attached.load_for import load_for
from ..torch_adapters.canaries.canary import make_canary
from .layers import in_layer, layer_of, layer_sources
from .units import closest

VERDICTS = {"carried": 0.04, "doubtful": 0.25}
REFUSED = "refused"
"""What an adapter is worth up to a distance of the weights, by ``benchmarks/port.py``: most of what it
gained, or a part of it.
"""
_MOST = 4 << 30
"""The most bytes of a weight that is compared."""
_RETRAIN = "train the adapter on the new base"


class SitePort(NamedTuple):
    """A change at its ``site`` in the new base, whose tensor is ``weight``, and what the lineage says of it:
    ``source``, ``verdict``, ``distance`` and ``share``.
    """

    site: Site
    weight: str
    change: Factors
    figures: dict[str, Any]


def port(
    pack: Pack | StrPath,
    old: StrPath,
    new: StrPath,
    *,
    rank: int | None = None,
    name: str | None = None,
    out: StrPath | None = None,
    progress: Progress | None = None,
) -> Pack:
    """Carries a pack from its base ``old`` to ``new``, which was made from ``old``: trained further, or
    without some layers or hidden units.

    Needs no data and trains nothing. Each layer of the new base takes the changes of the old layer whose
    weights are most like its own. They stay as they are where the weight is near the old one; elsewhere its
    outputs or inputs are looked for by their weights, in case they were reordered or removed. The distance of
    the weights says what the result can be worth, since a change that was trained against one weight does not
    act in another. Weights are read a pair at a time.

    Args:
        pack: a pack, or its folder. Any method whose change can be held by factors; the result is a LoRA.
        old: the checkpoint folder of the base that the pack was made for.
        new: the checkpoint folder of the base that it is carried to.
        rank: the most that any site keeps; needed for changes without a low rank.
        name: the new pack's name; by default that of ``out``, or the old one after ``port-``.
        out: a new folder to write the pack to.
        progress: called with (bytes done, bytes in all).

    Returns:
        The pack, float32, of scale 1, with a canary of the new base if ``pack`` has one.
            ``manifest.lineage.params`` say what it is worth: the ``verdict``, which is ``carried``, or
            ``doubtful`` where only a measurement can tell; at each site the ``distance`` of the weights, the
            ``share`` of the change that is left, and its ``source``. ``missing`` lists the sites of the pack
            that are left out, because the new base has no such weight or one that is too far away.

    Raises:
        BaseMismatch: the new base does not continue the old one, or ``old`` is not the pack's base.
        Unsupported: another architecture or quantized weights; a change that no factors hold; a module of
            the base that was trained whole.

    Example:
        >>> ported = port("packs/tickets", "models/base", "models/base-v2", out="packs/v2")  # doctest: +SKIP
        >>> ported.manifest.lineage.params["verdict"]  # doctest: +SKIP
        'carried'
    """
    refuse_existing(out)
    parent, before, after = as_pack(pack), Checkpoint(old), Checkpoint(new)
    for base in (before, after):
        require_plain(base)
    on_old = opened_base(old, [parent])[1]
    cut = None if rank is None else Cut(rank)
    joints = gather(on_old, lambda _: SiteValues([1.0], [{}]), base=before, cut=cut)
    _require_portable(parent, before, after)
    sources = cache(partial(layer_sources, before, after))
    places = [(joint, *place) for joint in joints for place in _places(joint, before, after, sources)]
    ticker = Ticker(sum(after.tensors[weight].nbytes for *_, weight in places), progress)

    def carry(place: tuple[JointSite, str, str, str]) -> SitePort:
        joint, tensor, path, weight = place
        matrix = _matrix(after, weight, joint.site)
        distance, units = closest(_matrix(before, tensor, joint.site), matrix, VERDICTS["carried"])
        change = weighted_sum(joint.terms).joined()
        moved, (rows, columns) = units.transfer(change), matrix.shape
        share = math.sqrt(inner(moved, moved) / (inner(change, change) + 1e-300))
        site = dataclasses.replace(joint.site, path=path, out_features=rows, in_features=columns)
        verdict = next((word for word, most in VERDICTS.items() if distance <= most), REFUSED)
        figures = {"source": joint.site.path, "verdict": verdict, "distance": distance, "share": share}
        return SitePort(site, weight, moved, figures)

    ports = []
    for one in in_order(carry, places):
        ticker.add(after.tensors[one.weight].nbytes)
        ports.append(one)
    kept = [one for one in ports if one.figures["verdict"] != REFUSED]
    missing = {joint.site.path for joint in joints} - {one.figures["source"] for one in kept}
    if 2 * len(missing) > len(joints):
        distances = [one.figures["distance"] for one in ports] or [1.0]
        raise BaseMismatch(
            "the new base does not continue the old one: a change that was trained against one weight does "
            "nothing of use in another",
            where=new,
            expected=f"at half of the sites a weight at most {max(VERDICTS.values())} away, of its norm",
            found=f"a median of {np.median(distances):.2g} at {len(ports)} sites",
            remedy=_RETRAIN,
        )
    changes = [one.change for one in kept]
    if cut is not None:
        changes = [change for change, _ in recompress_all(changes, cut)]
    whole = not missing and all(one.figures["verdict"] == "carried" for one in ports)
    details = {
        "verdict": "carried" if whole else "doubtful",
        "sites": {one.site.path: one.figures for one in ports},
        "missing": sorted(missing),
    }
    made = build_composed(
        chosen_name(name, out, "port", [parent]),
        lora,
        {one.site: as_lora(change) for one, change in zip(kept, changes, strict=True)},
        BaseModel(after).identity(),
        CombinedModules(parent.manifest.task, parent.full(), parent.manifest.problem),
        [parent],
        {one.site.path: one.weight for one in kept},
        descend("port", [parent], details),
    )
    if parent.manifest.canary is not None:
        canary = make_canary(load_for(made, new, check_canary=False), made.name)
        made = seal(replace(made.manifest, canary=canary, files=()), made.tensors)
    return made if out is None else made.write(out)


def _require_portable(pack: Pack, old: Checkpoint, new: Checkpoint) -> None:
    """Checks that both bases are of one architecture, and that of the base's own modules none was trained
    whole.
    """
    types = [base.config.get("model_type") for base in (old, new)]
    if types[0] != types[1]:
        raise Unsupported(
            "the bases are of different architectures: no weight of one is a weight of the other",
            where=new.folder,
            expected=types[0],
            found=types[1],
            remedy=_RETRAIN,
        )
    if own := [path for path in pack.full() if old.weight_name(path) or old.tied_to(path)]:
        raise Unsupported(
            "a module that was trained whole would replace what the new base has learned since",
            where=own[0],
            remedy=_RETRAIN,
        )


def _places(
    joint: JointSite, old: Checkpoint, new: Checkpoint, sources: Callable[[str], list[int]]
) -> Iterator[tuple[str, str, str]]:
    """Yields a site's tensor in the old base, and its path and tensor in the new one: in no layer, in one or
    in several.
    """
    tensor = old.require_weight(joint.site.path, joint.weight)
    path = joint.site.path
    found = {path: tensor}
    if (layer := layer_of(tensor)) is not None:
        numbers = [number for number, source in enumerate(sources(layer[0])) if source == layer[1]]
        found = {in_layer(path, number): in_layer(tensor, number) for number in numbers}
    for place, name in found.items():
        if (weight := new.tensor_name(name)) is not None:
            yield tensor, place, weight


def _matrix(base: Checkpoint, name: str, site: Site) -> np.ndarray:
    """Reads a weight as ``[out, in]``, float32.

    Raises:
        Unsupported: it is too large.
    """
    if (size := base.tensors[name].nbytes) > _MOST:
        raise Unsupported(
            "the weight is too large to be compared in memory",
            where=f"{base.folder}, {name}",
            expected=f"at most {_MOST} bytes",
            found=size,
            remedy=_RETRAIN,
        )
    return np.asarray(to_matrix(site.kind, base.read(name)), np.float32)
