"""Lists the adapters in a model: which are active or merged, what is trainable, and on which devices they
are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import nn

from ...readable import align_columns, percent, size
from ..layers import Adapted, adapted_layers, adapter_names, base_modules, merged_in, wrappers_of

Names = tuple[str, ...]


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a model.

    ``methods`` lists the methods at its sites, the main one first. ``sites`` counts the places that it
    changes, ``whole_modules`` the modules that it trains in full. ``parameters`` and ``trainable`` count
    scalar values, each shared one once. ``active`` means that it takes part in a forward pass, for some rows
    at least; ``merged`` that it is merged into the weights.
    """

    name: str
    methods: Names
    active: bool
    merged: bool
    weight: float
    sites: int
    whole_modules: int
    parameters: int
    trainable: int
    dtypes: Names
    devices: Names


@dataclass(frozen=True)
class AdaptedModelStatus:
    """A model and its adapters; as text a table, and as JSON by :meth:`to_json`.

    ``parameters`` counts all scalar values of the model including its adapters, ``trainable`` those that
    training would change, and ``trainable_share`` their share. ``base_dtypes`` and ``base_devices`` are those
    of the model's own parameters. ``rows`` lists the adapter of each row of a batch inside
    ``using(adapters=...)``. ``kept_bytes`` is the memory that a merge keeps in order to restore the base.
    """

    model: str
    adapters: tuple[AdapterStatus, ...]
    active: Names
    merged: Names
    rows: tuple[str | None, ...] | None
    parameters: int
    trainable: int
    trainable_share: float
    base_dtypes: Names
    base_devices: Names
    kept_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Returns the status as JSON values: numbers, strings, lists and dicts."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return values

    def __str__(self) -> str:
        head = (
            f"{self.model}: {self.parameters:,} parameters, {self.trainable:,} trainable "
            f"({percent(self.trainable_share)}); "
            f"base {' '.join(self.base_dtypes)} on {' '.join(self.base_devices)}"
        )
        if not self.adapters:
            return f"{head}\nno adapters"
        columns = (
            "adapter",
            "methods",
            "state",
            "weight",
            "sites",
            "whole",
            "parameters",
            "trainable",
            "dtype",
            "device",
        )
        rows = [
            (
                one.name,
                " ".join(one.methods),
                "merged" if one.merged else "active" if one.active else "off",
                f"{one.weight:g}",
                f"{one.sites}",
                f"{one.whole_modules}",
                f"{one.parameters:,}",
                f"{one.trainable:,}",
                " ".join(one.dtypes),
                " ".join(one.devices),
            )
            for one in self.adapters
        ]
        lines = [head, align_columns([columns, *rows])]
        if self.kept_bytes:
            lines.append(f"{size(self.kept_bytes)} of the base are kept for unmerge_from")
        return "\n".join(lines)


def status(model: nn.Module) -> AdaptedModelStatus:
    """What adapters a model holds: their methods, sites, weights, parameters, dtypes and devices, which are
    active or merged, and what share of the model would be trained.

    Example:
        >>> from adapterpack import LoRA, adapt
        >>> found = status(adapt(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2), "tickets"))
        >>> found.active, found.trainable, found.adapters[0].sites
        (('tickets',), 14, 1)
    """
    wrappers = wrappers_of(model)
    merged = merged_in(model)
    folded = () if merged is None else merged.names
    rows = next((module._rows.adapters for module in wrappers if module._rows is not None), None)
    active = list(
        dict.fromkeys(
            name
            for module in wrappers
            if isinstance(module, Adapted) or not folded
            for name in module._active
        )
    )
    own = [
        value
        for _, module in base_modules(model)
        for value in module._parameters.values()
        if value is not None
    ]
    everything = list(model.parameters())
    total = _count(everything)
    trainable = _count(value for value in everything if value.requires_grad)
    return AdaptedModelStatus(
        model=type(model).__name__,
        adapters=tuple(
            _adapter(model, name, name in active, name in folded) for name in adapter_names(model)
        ),
        active=tuple(active),
        merged=folded,
        rows=rows,
        parameters=total,
        trainable=trainable,
        trainable_share=trainable / total if total else 0.0,
        base_dtypes=_names(value.dtype for value in own),
        base_devices=_names(value.device for value in own),
        kept_bytes=0 if merged is None else merged.nbytes,
    )


def _adapter(model: nn.Module, name: str, active: bool, merged: bool) -> AdapterStatus:
    """Returns the status of one adapter."""
    wrappers = wrappers_of(model, name)
    layers = sorted(adapted_layers(model, name), key=lambda module: module._held[name].secondary)
    own = (value for module in wrappers for value in module._part(name).parameters())
    shared = (value for module in wrappers for value in module._shared(name).values())
    # Parameters that several sites share count once.
    values = list({id(value): value for value in (*own, *shared)}.values())
    return AdapterStatus(
        name=name,
        methods=tuple(dict.fromkeys(module._held[name].method.name for module in layers)),
        active=active,
        merged=merged,
        weight=next((layer._held[name].weight for layer in layers), 1.0),
        sites=len(layers),
        whole_modules=len(wrappers) - len(layers),
        parameters=_count(values),
        trainable=_count(value for value in values if value.requires_grad),
        dtypes=_names(value.dtype for value in values),
        devices=_names(value.device for value in values),
    )


def _count(values: Iterable[torch.Tensor]) -> int:
    return sum(value.numel() for value in values)


def _names(values: Iterable[object]) -> Names:
    return tuple(sorted({str(value).removeprefix("torch.") for value in values}))
