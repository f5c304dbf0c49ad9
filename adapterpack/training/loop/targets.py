"""Finds the layers that a configuration names in the manner of PEFT: by a pattern of their paths, or by names
of which some may be missing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from ...torch_adapters.layers.sites import ALL, targetable_sites
from ...torch_adapters.layers.wrapper import as_list, base_modules, is_named
from ..config.patterns import matched

log = logging.getLogger(__name__)


def named_layers(model: Any, targets: str | Sequence[str], as_peft: bool) -> tuple[str, ...]:
    """Returns the targets with each pattern replaced by the paths of the layers that it matches as a whole.

    ``as_peft``: names of which the model has no layer are left out while others have some, and a name stands
    for layers alone, not for the parameters of fused experts.

    Raises:
        ConfigError, FormatError: a pattern cannot be matched, or matches no layer.
    """
    sites = targetable_sites(model)
    layers = {path for path, _ in base_modules(model)} & {path for path, found in sites.items() if found}
    chosen, missing = list[str](), list[str]()
    for name in map(str, as_list(targets)):
        here = [path for path in layers if is_named(path, [name])]
        if not re.fullmatch(r"[\w.-]+", name):
            chosen += matched(name, sorted(layers))
        elif name in ALL or not as_peft:
            chosen.append(name)
        elif not here:
            missing.append(name)
        elif len(here) < sum(is_named(path, [name]) for path in sites):
            chosen += sorted(here)
        else:
            chosen.append(name)
    if missing and chosen:
        log.warning("the model has no layer %s, so targets leave these names out", ", ".join(missing))
    return tuple(dict.fromkeys(chosen or missing))
