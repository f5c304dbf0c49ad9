"""Adapts a pack to a base: what kinds its layers have there, which a folder that PEFT wrote leaves open."""

from __future__ import annotations

import dataclasses

from ..base import compatibility
from ..base.checkpoint import Checkpoint
from ..errors import Unsupported
from .fits import kinds_on
from .pack import Pack


def on(pack: Pack, base: Checkpoint) -> Pack:
    """The pack with the kinds that its layers have in ``base``; nothing that is written of it, and not its id, is another.

    Raises:
        Unsupported: nothing shows how the base stores a layer, and the pack was not made on that base.
    """
    kinds = kinds_on(base, pack)
    unknown = [path for path, kind in kinds.items() if kind is None]
    if unknown and not any(compatibility.recorded_fingerprint(pack.manifest.base)):
        raise Unsupported("nothing shows which way round the base stores the weight of this layer, and the adapter does not say it",
                          where=f"pack '{pack.name}', {unknown[0]}", expected="[out, in] or [in, out]",
                          found=f"a square weight of {base.where}",
                          remedy="attach it to the model and save that (adapterpack.attach, adapterpack.save): a pack knows its layers")
    changed = {group.path: kind for group in pack.manifest.groups if (kind := kinds.get(group.path)) not in {None, group.kind}}
    return dataclasses.replace(pack, kinds=changed) if changed else pack
