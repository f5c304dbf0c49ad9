"""A pair of frozen random matrices that all sites of an adapter share (VeRA and its relatives): drawn from a
seed, or stored if no seed reproduces it.

The pair is as wide as the widest site and as tall as the tallest; each site uses its upper left part, as in
PEFT. The numbers depend on those widths, so every config holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .base import Shared, Storage, require_widths
from .config import PositiveInt, Seed, SiteConfig
from .peft_form import PeftContent
from .site import Arrays, Shape, Site


@dataclass(frozen=True, kw_only=True)
class Projected(SiteConfig):
    """A config whose ``projection_prng_key`` is the seed of the shared pair of matrices.

    ``width`` and ``height`` are the largest input and output width among the adapter's sites; None means the
    site's own. With ``save_projection`` the pack stores the pair although the seed determines it.
    """

    projection_prng_key: Seed = 0
    save_projection: bool = False
    width: PositiveInt | None = None
    height: PositiveInt | None = None


def resolve(configs: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """Returns the configs with the largest widths filled in, except widths they already have and widths that
    some site does not know.
    """
    wide = [site.in_features for site in sites]
    tall = [site.out_features for site in sites]
    width, height = (max(sizes) if all(sizes) else None for sizes in (wide, tall))
    return [replace(cfg, width=cfg.width or width, height=cfg.height or height) for cfg in configs]


class Projection(NamedTuple):
    """The shared pair of one method. ``shapes`` and ``make`` take a config with both widths; the last axis of
    the first matrix is the input width, the first axis of the second one the output width.
    """

    names: tuple[str, str]
    shapes: Callable[[Any], tuple[Shape, ...]]
    make: Callable[[Any], tuple[np.ndarray, ...]]

    def constants(self, cfg: Any, site: Site) -> Arrays:
        """Returns the pair, or nothing if the pack stores it; every site of an adapter gets the same
        arrays.
        """
        if cfg.save_projection:
            return {}
        require_widths(site)
        return dict(zip(self.names, self.make(resolve([cfg], [site])[0]), strict=True))

    def expanded_size(self, cfg: Any, site: Site) -> int:
        """Returns how many numbers the pair has."""
        resolved = resolve([cfg], [site])[0]
        return sum(
            map(
                math.prod,
                self.shapes(replace(resolved, width=resolved.width or 0, height=resolved.height or 0)),
            )
        )

    @property
    def storage(self) -> Storage:
        """What a pack stores of the pair, and what the reader draws."""
        return Storage(
            constants=self.constants, expanded_size=self.expanded_size, shared=self.shared, resolve=resolve
        )

    @property
    def shared(self) -> Shared:
        """The pair as shared parameters, for configs that store it."""

        def stored(
            values: Callable[[Any], tuple[Any, ...]], cfg: Any, sites: Sequence[Site]
        ) -> dict[str, Any]:
            return (
                dict(zip(self.names, values(resolve([cfg], sites)[0]), strict=True))
                if cfg.save_projection
                else {}
            )

        return Shared(
            lambda cfg, sites: stored(self.shapes, cfg, sites),
            lambda cfg, sites, rng: stored(self.make, cfg, sites),
        )

    def from_peft_file(self, content: PeftContent) -> PeftContent:
        """Drops a pair that PEFT stored if the seed gives the same bits, and drops the copies of it at the
        sites.

        Raises:
            ValueError: the config says that the pair is stored and it is missing, its shapes do not fit
                together, or a copy differs.
        """
        cfg, shared = content.config, content.shared
        if not cfg.save_projection and not shared:
            return content
        pair = [shared[name] for name in self.names if name in shared]
        if len(pair) != 2:
            raise ValueError(f"expected {' and '.join(self.names)}, found {', '.join(shared) or 'neither'}")
        width = pair[0].shape[-1]
        height = pair[1].shape[0]
        stored_cfg = replace(cfg, width=width, height=height, save_projection=True)
        if tuple(value.shape for value in pair) != self.shapes(stored_cfg):
            raise ValueError(
                f"expected the shapes {self.shapes(stored_cfg)}, found {[value.shape for value in pair]}"
            )
        if any(
            name in params and not _equal(params[name], shared[name])
            for params in content.sites.values()
            for name in self.names
        ):
            raise ValueError(f"two sites have another {' or '.join(self.names)}")
        content = content.change_sites(
            lambda params: {name: value for name, value in params.items() if name not in self.names}
        )
        # The seed reproduces the stored pair bit for bit, so the pack need not store it.
        if not content.packed and all(map(_equal, pair, self.make(stored_cfg))):
            return content._replace(config=replace(stored_cfg, save_projection=False), shared={})
        return content._replace(config=stored_cfg)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.tobytes() == second.tobytes()
