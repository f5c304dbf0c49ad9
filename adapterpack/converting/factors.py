"""Turns packs into low-rank factors and back, for formats that store factors (GGUF, kohya, diffusers)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import LoRA, Site, Tensors, complete, method_of
from ..errors import FormatError, NonFinite, Unsupported
from ..io import FLOATS, all_finite, dtype_name
from ..manifest import MethodSites
from ..pack import Adapter, Pack
from .format import ConversionSource, Notes, list_first
from .numbers import most_frequent, scale_factor
from .packs import drop_targets, foreign_pack

_LEAVES = ("lora_A", "lora_B")


class SiteFactors(NamedTuple):
    """The factors at one site: ``down`` [r, in], ``up`` [out, r], and the scale of their product."""

    path: str
    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def alpha(self) -> float:
        """``scale * r``, the value that other tools divide by the rank."""
        return float(self.scale * self.down.shape[0])


def site_factors(pack: Pack, form: str, but: Collection[str] = ()) -> Iterator[SiteFactors]:
    """Yields the change at every site of a pack as factors; in the stored dtype if the pack's own tensors are
    the factors. Skips sites of the methods ``but``.

    Raises:
        Unsupported: the change is not a product of low rank, or a site is not a linear layer.
    """
    for method in pack.methods:
        if method.is_positional:
            raise Unsupported(
                f"the format {form} cannot say that an adapter acts at some positions of a row only",
                where=pack.where,
                found=method.name,
                remedy="keep the pack as it is",
            )
        if method.name in but:
            continue
        if not method.traits.low_rank or not method.traits.independent:
            raise Unsupported(
                f"the format {form} holds low-rank factors, which the method {method.name} is not made of",
                where=pack.where,
                remedy="merge the pack, or keep it as it is",
            )
    for adapter in pack.adapters():
        if adapter.method.name not in but:
            require_linear(adapter, form)
            yield _factors(adapter)


def require_linear(adapter: Adapter, form: str) -> None:
    """Checks that the site is a linear layer.

    Raises:
        Unsupported: it is not.
    """
    if adapter.site.kind != "linear":
        raise Unsupported(
            f"the format {form} is written for linear layers only",
            where=adapter.site.path,
            found=adapter.site.kind,
            remedy="keep the pack as it is, or merge it",
        )


def _factors(adapter: Adapter) -> SiteFactors:
    wide = {
        name: value.astype(np.float32)
        if dtype_name(value.dtype) in FLOATS and value.dtype.itemsize < 4
        else value
        for name, value in adapter.params.items()
    }
    form = adapter.method.normal_form(
        adapter.config, complete(adapter.method, adapter.config, wide, adapter.site), adapter.site
    )
    if form.down is None or form.up is None or not form.is_branch:
        raise Unsupported(
            "the change at a site is more than a product of two factors",
            where=adapter.site.path,
            found=adapter.method.name,
        )
    down, up = np.asarray(form.down.dense()), np.asarray(form.up.dense())
    if (
        set(wide) == set(_LEAVES)
        and np.array_equal(down, wide["lora_A"])
        and np.allclose(up, adapter.config.scale * wide["lora_B"])
    ):
        return SiteFactors(
            adapter.site.path, adapter.params["lora_A"], adapter.params["lora_B"], float(adapter.config.scale)
        )
    return SiteFactors(adapter.site.path, down, up, 1.0)


def lora_pack(
    source: ConversionSource,
    sites: Mapping[str, SiteFactors] | Mapping[str, SiteFactors | tuple[LoRA, np.ndarray, np.ndarray]],
    kind: str,
    full: Mapping[str, Tensors] | None = None,
    **claims: Any,
) -> Pack:
    """Builds a LoRA pack from factors by module path, with the checks of a pack: shapes fit each other,
    values are finite floats.

    A value is :class:`SiteFactors`, or a LoRA config with its two matrices. ``claims`` are added to the
    manifest's ``training``.

    Raises:
        FormatError: factors do not fit each other, or are not floats.
        NonFinite: NaN or infinity.
    """
    adapters = {}
    for path in sorted(sites):
        value = sites[path]
        place = f"{source.path}, {path}"
        if isinstance(value, SiteFactors):
            check_pair(value.down, value.up, place)
            if not math.isfinite(value.scale):
                raise NonFinite("a scale is not finite", where=place, found=value.scale)
            cfg = LoRA(r=value.down.shape[0], alpha=value.alpha)
            down = value.down
            up = value.up
        else:
            cfg, down, up = value
            check_pair(down, up, place)
            if cfg.r != down.shape[0]:
                raise FormatError(
                    "the rank that the file states is not that of its tensors",
                    where=place,
                    expected=cfg.r,
                    found=down.shape[0],
                )
        cfg = drop_targets(cfg)
        adapters[Site(path, down.shape[1], up.shape[0])] = (cfg, dict(zip(_LEAVES, (down, up), strict=True)))
    if not adapters and not full:
        raise FormatError("the file holds no adapter", where=source.path)
    return foreign_pack(source, [MethodSites(method_of(LoRA()), adapters)], kind, full=full, **claims)


def check_pair(down: np.ndarray, up: np.ndarray, where: str) -> None:
    """Checks that two matrices are the factors of one change.

    Raises:
        FormatError: they are not.
        NonFinite: they hold NaN or infinity.
    """
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise FormatError(
            "the factors of a site do not fit each other",
            where=where,
            expected="down [r, in] and up [out, r]",
            found=f"down {down.shape} and up {up.shape}",
        )
    for value in (down, up):
        if dtype_name(value.dtype) not in FLOATS:
            raise FormatError(
                "a factor must hold floating-point numbers", where=where, found=dtype_name(value.dtype)
            )
        if not all_finite(value):
            raise NonFinite(
                "a tensor holds NaN or infinity",
                where=where,
                remedy="get the adapter again from where it came",
            )


def group_leaves(
    keys: Iterable[str],
    split: Callable[[str], tuple[str, str] | None],
    where: object,
    expected: str,
    remedy: str,
) -> dict[str, dict[str, str]]:
    """Groups the keys of a file: module -> leaf -> key; ``split`` returns the module and the leaf of a key.

    Raises:
        Unsupported: ``split`` returns None for a key; ``expected`` names the leaves that are read.
        FormatError: two keys are those of one leaf.
    """
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        parts = split(key)
        if parts is None:
            raise Unsupported(
                "a tensor of no form that is read", where=where, found=key, expected=expected, remedy=remedy
            )
        if modules.setdefault(parts[0], {}).setdefault(parts[1], key) != key:
            raise FormatError("two tensors for one place", where=where, found=key)
    return modules


def split_key(key: str, leaves: Collection[str]) -> tuple[str, str] | None:
    """Returns the module and the leaf of a key that ends with a dot and one of the leaves, else None.

    Example:
        >>> split_key("layer.0.lora_A.weight", ("lora_A.weight",))
        ('layer.0', 'lora_A.weight')
    """
    leaf = next((leaf for leaf in leaves if key.endswith(f".{leaf}")), None)
    return None if leaf is None or key == f".{leaf}" else (key.removesuffix(f".{leaf}"), leaf)


def pad_to_one_rank(
    sites: Sequence[SiteFactors], tool: str, leaf: str
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int, float, Notes]:
    """Returns the factors for a file that has one rank and one scale: ``down`` and ``up`` by path, the rank,
    the scale, and notes on what was padded with zeros, or multiplied into ``leaf``.

    Raises:
        Unsupported: the scale of a module cannot be written into its factor.
    """
    scale = most_frequent(site.scale for site in sites) or 1.0
    rank = max(site.down.shape[0] for site in sites)
    padded = {}
    for site in sites:
        spare = rank - site.down.shape[0]
        up = scale_factor(site.up, site.scale / scale, site.path)
        padded[site.path] = (np.pad(site.down, ((0, spare), (0, 0))), np.pad(up, ((0, 0), (0, spare))))
    notes = []
    if differing := sum(site.scale != scale for site in sites):
        notes.append(
            f"{tool} has one scale for all modules: that of {differing} of {len(sites)} modules is "
            f"written into {leaf} (scale {scale:g})"
        )
    if narrower := sum(site.down.shape[0] != rank for site in sites):
        notes.append(
            f"{tool} has one rank for all modules: {narrower} of {len(sites)} modules are padded with "
            f"zeros to {rank}"
        )
    return padded, rank, scale, tuple(notes)


def require_pairs(tensors: Mapping[str, Mapping[str, Any]], roles: tuple[str, ...], where: object) -> None:
    """Checks that every module has both roles.

    Raises:
        FormatError: a module lacks a role; the message names these modules.
    """
    if incomplete := sorted(path for path, present in tensors.items() if not set(roles) <= set(present)):
        raise FormatError(
            "the tensors of a module do not pair up",
            where=where,
            expected=" and ".join(roles),
            found=list_first(incomplete),
        )
