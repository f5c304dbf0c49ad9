"""Lists where AdapterHub's library puts its adapters in each family of models, and which of adapterpack's
sites each place is.
"""

from __future__ import annotations

import msgspec

from ...errors import Unsupported, printable
from ...io import FrozenStruct
from ...resources import table


class Family(FrozenStruct):
    """One layout of layers. ``blocks`` maps the suffixes of AdapterHub's places of bottlenecks to those of
    adapterpack's sites; the last one is the feed-forward's.

    ``norm_first``: a layer's output is the residual stream itself. ``entry``: the module whose input a
    parallel adapter reads (``source`` of adapterpack's bottleneck). ``linear`` maps the suffixes of linear
    layers to their names in AdapterHub's config. ``outer`` is the name of the model within the task model
    that the library always wraps around it.
    """

    blocks: dict[str, str]
    norm_first: bool
    entry: str
    linear: dict[str, str]
    outer: str = ""

    def block(self, place: str) -> tuple[str, str, bool] | None:
        """Returns (path of the layer, suffix of adapterpack's site, whether it is the feed-forward's) of one
        of AdapterHub's places, or None.
        """
        for their, ours in self.blocks.items():
            layer = place.removesuffix(f".{their}")
            if layer != place and layer.rpartition(".")[2].isdecimal():
                return layer, ours, their == list(self.blocks)[-1]
        return None


class Families(FrozenStruct):
    """The contents of ``families.toml``."""

    models: dict[str, tuple[str, str]]
    layouts: dict[str, Family]


_TABLE = table("converting/adapterhub/families.toml", Families)
FAMILIES = {
    model_type: msgspec.structs.replace(_TABLE.layouts[layout], outer=outer)
    for model_type, (layout, outer) in _TABLE.models.items()
}
"""``model_type`` -> its layout, for the models that were compared with the library."""


def family_of(model_type: object, where: object) -> Family:
    """Returns the layout of a model type.

    Raises:
        Unsupported: the layout is not known.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise Unsupported(
            "where AdapterHub puts its adapters in this kind of model is not known here",
            where=where,
            expected=", ".join(sorted(FAMILIES)),
            found=printable(str(model_type)[:80]),
            remedy="merge it with the library that made it (LoRA alone can be merged), or keep it there",
        )
    return FAMILIES[model_type]
