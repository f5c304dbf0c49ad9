"""Finds the layers that a configuration names in the manner of PEFT: by a pattern of their paths, by names
of which some may be missing, or in some of the model's blocks alone.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any

from ...adapter_methods import SiteConfig, method_of
from ...errors import ConfigError
from ...torch_adapters.adapter_kinds import KINDS
from ...torch_adapters.layers import as_list, base_modules, is_named
from ...torch_adapters.layers.sites import ALL, targetable_sites
from ..config.patterns import matched

log = logging.getLogger(__name__)
_BLOCK = re.compile(r"(?:.*?\.)?([^.]*)\.(\d+)\..*")
"""A path below a block: the name of the outermost list of blocks, and the block's number."""


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


def in_blocks(model: Any, config: SiteConfig, numbers: Sequence[int], lists: Sequence[str]) -> SiteConfig:
    """Returns a method's config whose targets are the layers that it names in blocks of these numbers, in
    lists of blocks of these names if there are any: PEFT's ``layers_to_transform`` and ``layers_pattern``.

    Raises:
        ConfigError: no layer that it names lies in such a block.
        SiteNotFound, Unsupported: a target matches nothing, or what the method does not support.
    """
    method = method_of(config)
    whole = tuple(path for path, _ in base_modules(model) if is_named(path, config.modules_to_save))
    named = KINDS[method.kind].select(model, config.targets, method.traits, whole)
    blocks = ((site.path, _BLOCK.fullmatch(site.path)) for site in named)
    paths = [
        path
        for path, block in blocks
        if block and int(block[2]) in numbers and (not lists or block[1] in lists)
    ]
    if not paths:
        raise ConfigError(
            "no layer of the targets lies in these blocks",
            where="layers_to_transform",
            found=", ".join(map(str, numbers)),
            expected=f"the number of a block, as in {named[-1].path}",
        )
    return dataclasses.replace(config, targets=tuple(paths))
