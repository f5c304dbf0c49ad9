"""Slots of virtual tokens that a graph without a cache puts before the tokens of each row.

``virtual`` [n, in] are embeddings; ``virtual_here`` [n] is 1 for each that the row's adapter has;
``virtual_cut`` [n] is 1 for each that is removed before the head. Callers count only the rows' own tokens. A
row without a prompt has its usual length, with padding after it.
"""

from __future__ import annotations

import numpy as np

from ..adapter_methods import PROMPT, Arrays
from ..adapter_methods.forms.prompt import CacheConfig, PromptForm
from ..bundle import SiteMap
from ..pack import Pack

LENGTH = "virtual"
"""The name of the number of virtual tokens among the ranks of a site."""
LEAVES: dict[str, tuple[str, ...]] = {
    "virtual": (LENGTH, "in"),
    "virtual_here": (LENGTH,),
    "virtual_cut": (LENGTH,),
}
"""Field -> its axes."""


def virtual_arrays(form: PromptForm, pooled: str) -> Arrays:
    """Converts a normal form to its fields, as float32 arrays; none if the prompt consists of keys and
    values. ``pooled`` is that of the adapter's config.
    """
    if form.embeds is None:
        return {}
    embeds = np.asarray(form.embeds, np.float32)
    embeds = np.ascontiguousarray(embeds[form.task] if embeds.ndim == 3 else embeds)
    here = np.ones(len(embeds), np.float32)
    return {"virtual": embeds, "virtual_here": here, "virtual_cut": 0 * here if pooled == "prompt" else here}


def virtual_tokens(pack: Pack) -> int:
    """Returns how many virtual tokens a pack puts before a row's own tokens; 0 if its prompt consists of keys
    and values.
    """
    configs = [pack.config_at(group) for group in pack.manifest.groups if group.kind == "prompt"]
    return sum(config.num_virtual_tokens for config in configs if not isinstance(config, CacheConfig))


def virtual_room(sites: SiteMap) -> int:
    """Returns how many positions of every row a graph with these sites reserves for virtual tokens."""
    return sites[PROMPT].ranks.get(LENGTH, 0) if PROMPT in sites else 0
