"""Lists a model's adapters, chooses which of them take part in its forward pass, and records which are merged
into its weights.

Every wrapper knows which of its adapters are active (``_active``), and, inside ``using(adapters=...)``, which
adapter each row of the batch has (``_rows``). The functions here set these on all wrappers of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ...errors import ConfigError, UnknownAdapter, Unsupported, nearest
from .calls import Rows
from .layer import Adapted
from .modules_to_save import SavedModule, name_outputs
from .sites import experts_in
from .wrapper import as_list


def active(model: nn.Module, names: str | list[str] | None) -> nn.Module:
    """Chooses which adapters take part in the forward pass: one, several (applied in order), or None for the
    base alone.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
        Unsupported: several adapters of a method that allows one active adapter only, such as prompts; or
            adapters are merged into the weights.
    """
    wanted = as_list(names)
    require_unmerged(model)
    require_names(model, wanted)
    wrappers = wrappers_of(model)
    for module in wrappers:
        if isinstance(module, Adapted) and (alone := module._excluding(wanted)):
            raise Unsupported(
                "only one of these adapters can be active at a time",
                where=module._site.path,
                found=", ".join(alone),
                remedy="choose one of them",
            )
    _set_active(wrappers, wanted, None)
    name_outputs(model)
    return model


def _set_active(wrappers: Sequence[Adapted | SavedModule], wanted: Sequence[str], rows: Rows | None) -> None:
    for module in wrappers:
        module._active = tuple(name for name in wanted if name in module._names)
        module._rows = rows


@contextmanager
def using(
    model: nn.Module, names: str | list[str] | None = None, *, adapters: Sequence[str | None] | None = None
) -> Iterator[nn.Module]:
    """The model with other adapters active inside the block: one, several (applied in order), or one for each
    row of its batches.

    ``adapters`` names one adapter for each row, or None for the base alone. Every call inside the block must
    have that many rows, or a multiple, as in beam search. After the block, even after an error, the earlier
    adapters are active again; blocks may be nested. The choice belongs to the model, so it affects all
    threads that call it.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
        Unsupported: as in :func:`active`; or an adapter cannot differ from row to row, with the reason.

    Example:
        >>> from adapterpack import LoRA, adapt
        >>> model = adapt(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2), "tickets")
        >>> import torch
        >>> with using(model, adapters=["tickets", None]):
        ...     tuple(model(torch.ones(2, 4)).shape)
        (2, 3)
    """
    if names is not None and adapters is not None:
        raise ConfigError(
            "adapters are active in all rows, or one is named for each",
            where="using",
            remedy="give one of the two",
        )
    before = get_active(model)
    rows: Rows | None = None
    try:
        if adapters is None:
            active(model, names)
        else:
            rows = _by_rows(model, adapters)
        yield model
    finally:
        if rows is not None:
            rows.close()
        restore_active(model, before)


Choice = dict[nn.Module, tuple[tuple[str, ...], Rows | None]]
"""The active adapters of each wrapper in a model."""


def get_active(model: nn.Module) -> Choice:
    """Returns what is active in each wrapper of a model, for :func:`restore_active`."""
    return {module: (module._active, module._rows) for module in wrappers_of(model)}


def restore_active(model: nn.Module, choice: Choice) -> None:
    """Restores a choice of :func:`get_active`, without adapters that the model no longer has."""
    for module in wrappers_of(model):
        names, module._rows = choice.get(module, ((), None))
        module._active = tuple(name for name in names if name in module._names)
    name_outputs(model)


def disabled(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """The base alone inside the block, bit for bit; afterwards the adapters that were active are again. See
    :func:`using`.

    Example:
        >>> from adapterpack import LoRA, adapt
        >>> model = adapt(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2))
        >>> import torch
        >>> with disabled(model) as base:
        ...     tuple(base(torch.ones(2, 4)).shape)
        (2, 3)
    """
    return using(model, None)


def _by_rows(model: nn.Module, adapters: Sequence[str | None]) -> Rows:
    """Gives each row of a batch its own adapter."""
    wanted = list(dict.fromkeys(name for name in adapters if name is not None))
    if isinstance(adapters, str) or not adapters:
        raise ConfigError(
            "one adapter is named for each row, None for the base", where="adapters", found=repr(adapters)
        )
    require_unmerged(model)
    require_names(model, wanted)
    wrappers = wrappers_of(model)
    experts = experts_in(model)
    for name in wanted:
        for module in (one for one in wrappers if name in one._names):
            path = module._site.path
            inside = (
                f"{path} lies in experts, which see tokens and not rows" if path.startswith(experts) else ""
            )
            if reason := module._same_for_all_rows(name) or inside:
                raise Unsupported(
                    f"this adapter cannot differ from row to row: {reason}",
                    where=name,
                    remedy="call the model with one adapter at a time",
                )
    rows = Rows(model, adapters)
    _set_active(wrappers, wanted, rows)
    return rows


def require_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raises unless the model has adapters of all these names.

    Raises:
        UnknownAdapter: it lacks one of them.
    """
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise UnknownAdapter(
                "the model has no such adapter", found=repr(name), remedy=nearest(str(name), known)
            )


def adapter_names(model: nn.Module) -> list[str]:
    """Returns the names of the adapters in a model, sorted."""
    return sorted({name for module in wrappers_of(model) for name in module._names})


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model is in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside the block, the model is in evaluation mode with only the adapter ``name`` active (None: none),
    at weight 1.
    """
    held = [one for module in adapted_layers(model) for one in module._held.values()]
    weights = [one.weight for one in held]
    with using(model, name), evaluation_mode(model):
        try:
            for one in held:
                one.weight = 1.0
            yield
        finally:
            for one, weight in zip(held, weights, strict=True):
                one.weight = weight


def wrappers_of(model: nn.Module, name: str | None = None) -> list[Adapted | SavedModule]:
    """Returns the modules of a model that hold adapters, or those that hold the adapter ``name``."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Adapted | SavedModule) and (name is None or name in module._names)
    ]


def adapted_layers(model: nn.Module, name: str | None = None) -> list[Adapted]:
    """Returns those of :func:`wrappers_of` at which an adapter changes a layer by a method."""
    return [module for module in wrappers_of(model, name) if isinstance(module, Adapted)]


_MERGED = "_adapterpack_merged"
"""The attribute of a model that holds its :class:`Merged` record."""


class Kept(NamedTuple):
    """A parameter replaced by a merge: ``module`` had ``original`` (None: nothing) as its parameter ``leaf``
    and now has ``merged``.
    """

    module: nn.Module
    leaf: str
    original: nn.Parameter | None
    merged: nn.Parameter


class Merged(NamedTuple):
    """The adapters that are merged into the weights, in order, and the parameters that they replaced."""

    names: tuple[str, ...]
    kept: list[Kept]

    @property
    def nbytes(self) -> int:
        """The bytes of original parameters that are kept to restore the base."""
        return sum(kept.original.nbytes for kept in self.kept if kept.original is not None)


def merged_in(model: nn.Module) -> Merged | None:
    """Returns what is merged into a model, or None."""
    merged: Merged | None = model.__dict__.get(_MERGED)
    return merged


def remember(model: nn.Module, merged: Merged | None) -> None:
    """Records what is merged into a model; None deletes the record."""
    if merged is None:
        model.__dict__.pop(_MERGED, None)
    else:
        model.__dict__[_MERGED] = merged


def require_unmerged(model: nn.Module) -> None:
    """Raises if adapters are merged into a model's weights, for callers that need the base or single
    adapters.

    Raises:
        Unsupported: adapters are merged.
    """
    merged = merged_in(model)
    if merged is not None:
        raise Unsupported(
            "adapters are merged into this model's weights",
            found=", ".join(merged.names),
            remedy="call adapterpack.unmerge_from(model) first",
        )


def restore(kept: list[Kept]) -> None:
    """Puts the original parameter objects back; they move to the device and dtype that the model was moved to
    meanwhile.
    """
    for module, leaf, original, _ in reversed(kept):
        if original is not None:
            # Moving ``data`` keeps the parameter object, to which optimizers and ties may refer.
            now = module._parameters[leaf]
            if isinstance(now, torch.Tensor) and (now.device, now.dtype) != (original.device, original.dtype):
                original.data = original.data.to(now.device, now.dtype)
        module._parameters[leaf] = original
