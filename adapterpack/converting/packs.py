"""Steps of conversions on packs: dequantize, check the base, record the parent in the lineage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from msgspec.structs import replace

from ..adapter_methods import Tensors, get
from ..manifest import MethodSites, Sites
from ..manifest import manifest as m
from ..pack import Pack, build, descend
from ..tasks import NO_TASK
from .base import BaseModel, bind_to_base
from .format import ConversionSource, Notes

Cfg = TypeVar("Cfg", bound=Any)


def dequantize(pack: Pack) -> tuple[Pack, Notes]:
    """Returns a quantized pack with its tensors as floats, and a note about it; any other pack unchanged.

    The values are those that every runtime uses: the error of the quantization remains.
    """
    stored = pack.manifest.quantization
    if stored is None:
        return pack, ()
    # a quantized pack has a single method, so it has no other groups to keep
    adapters = {adapter.site: (adapter.config, adapter.params) for adapter in pack.adapters()}
    lineage = descend("convert", [pack], {"dequantized": stored["scheme"]})
    return rebuild(pack, adapters, lineage=lineage), (
        f"the pack is quantized ({stored['scheme']}): its values are written as float32, with the error "
        "they have",
    )


def rebuild(
    pack: Pack, adapters: Sites, weights: Mapping[str, str | None] | None = None, **changes: Any
) -> Pack:
    """Returns the pack with other sites of its own method; ``weights`` are the tensors of the base where
    these are others than the pack's, ``changes`` further arguments of :func:`~adapterpack.pack.pack.build`.
    """
    claims = pack.manifest
    return build(
        pack.name,
        pack.method,
        adapters,
        task=claims.task,
        base=claims.base,
        full=pack.full(),
        weights={group.path: group.weight for group in claims.groups} | dict(weights or {}),
        problem=claims.problem,
        training=claims.training,
        license=claims.license,
        extensions=claims.extensions,
        **changes,
    )


def require_base_fits(pack: Pack, base: BaseModel | None) -> Pack:
    """Returns the pack after checking that it fits the base.

    Raises:
        BaseMismatch: it was made for another base.
        SiteNotFound: the base lacks a site.
    """
    if base is not None:
        bind_to_base(pack, base)
    return pack


def foreign_pack(
    source: ConversionSource,
    sites: Sequence[MethodSites],
    kind: str,
    *,
    shared: Tensors | None = None,
    full: Mapping[str, Tensors] | None = None,
    task: m.PackTask | None = None,
    **claims: Any,
) -> Pack:
    """Builds a pack from another tool's adapter: the sites of each method (the first is the pack's own), the
    parameters that its sites share, and the fully trained modules.

    ``kind`` names the format, and ``claims`` are added to the manifest's ``training``. Without a ``task`` it
    is the base's, if that is known.

    Raises:
        NonFinite: a tensor holds NaN or infinity.
        NothingToDo: the adapter is empty.
    """
    task = task or (m.PackTask(NO_TASK) if source.base is None else source.base.task())
    first = sites[0] if sites else MethodSites(get("lora"), {})
    return build(
        source.name,
        first.method,
        first.adapters,
        secondary=sites[1:],
        shared=shared,
        full=full,
        task=task,
        base=m.Base(),
        training={"imported_from": kind, **claims},
    )


def drop_targets(cfg: Cfg) -> Cfg:
    """Returns a config without the options that only training needs: the sites of a pack are fixed."""
    return dataclasses.replace(cfg, targets="all-linear", modules_to_save=())


def with_parent(pack: Pack, form: str, name: str, digest: str) -> Pack:
    """Returns the pack with the converted file or folder recorded as its parent, by the digest of its
    tensors.
    """
    shown = "".join(c if c.isprintable() else "_" for c in name)[:512] or "source"
    members = () if pack.manifest.lineage is None else pack.manifest.lineage.parents
    lineage = m.Lineage("convert", (m.Parent(digest, shown), *members), {"from": form})
    return dataclasses.replace(pack, manifest=replace(pack.manifest, lineage=lineage))
