"""Merges adapters into the weights of a model in memory, and unmerges them again.

Unmerging is exact: :func:`merge_into` keeps the original parameters, rather than subtracting the change,
which rounding would make inexact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from ...adapter_methods import unfoldable
from ...errors import NonFinite, NothingToDo, Unsupported
from .. import detach
from ..layers import (
    Adapted,
    SavedModule,
    adapted_layers,
    adapter_names,
    as_list,
    merged_in,
    require_names,
    require_unmerged,
    saved_modules,
    unused_of,
    wrappers_of,
)
from ..layers.active import Kept, Merged, active, get_active, remember, restore, restore_active
from ..layers.modules_to_save import keep_outputs
from ..layers.weights import is_plain
from ..wrap import swap

log = logging.getLogger(__name__)

_UNMERGED = "keep it unmerged, or leave it out"


def merge_into(model: nn.Module, names: str | Sequence[str] | None = None, *, keep: bool = True) -> nn.Module:
    """Folds adapters into the weights of ``model``, in place: its outputs stay the same up to rounding, and
    its layers are as fast as the base's. Modules that were trained in full are not folded: with ``keep``
    their copies stay in use, without it they replace the originals.

    ``names`` are the adapters, in order; by default the active ones, with the weights of
    :func:`~adapterpack.set_weight`. Each parameter is computed in float32 or finer and rounded once to its
    own precision. Until :func:`unmerge_from`, no other adapter can be active.

    With ``keep``, the base's parameters stay in memory next to the merged ones, so that :func:`unmerge_from`
    restores them bit for bit. Without, all adapters are detached and the base's parameters are dropped: the
    model is an ordinary one, which ``save_pretrained`` saves; it needs the additional memory only until the
    merge is done. If an error is raised, the model is unchanged.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
        Unsupported: an adapter has no fold (it is named, with the reason), or a weight is quantized,
            offloaded or sharded.
        NothingToDo: no adapter is named or active, or rounding to the base's precision leaves nothing of the
            change.
        NonFinite: a folded weight is NaN or infinite.

    Example:
        >>> from adapterpack import LoRA, adapt
        >>> model = adapt(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2), "tickets")
        >>> for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        ...     _ = nn.init.ones_(parameter)
        >>> x = torch.ones(1, 4)
        >>> before = model(x)
        >>> bool(torch.allclose(merge_into(model)(x), before, atol=1e-5))
        True
    """
    require_unmerged(model)
    chosen = _choose(model, names)
    for name in chosen:
        _require_fold(model, name)
    before = get_active(model)
    active(model, chosen)
    kept = []
    unused = {name: unused_of(model, name) for name in chosen}
    try:
        for module in adapted_layers(model):
            # Where the model does not call a layer but reads its weight directly, the adapter has no effect,
            # and merging it would have one.
            path = module._site.path
            acting = module._active
            module._active = tuple(name for name in acting if path not in unused[name])
            if module._active:
                kept += _fold(model, module)
        # In half precision, a small change may vanish entirely in rounding; say so instead of pretending to
        # merge.
        if kept and all(one.original is not None and torch.equal(one.original, one.merged) for one in kept):
            raise NothingToDo(
                "rounding to the precision of the base leaves nothing of the change",
                where=", ".join(chosen),
                found=str(kept[0].merged.dtype),
                remedy="load the base in float32, or keep the adapter unmerged",
            )
        if not keep:
            _require_apart(model, kept)
    except BaseException:
        restore(kept)
        restore_active(model, before)
        raise
    for module in adapted_layers(model):
        module._active = ()
    if keep:
        remember(model, Merged(tuple(chosen), kept))
        log.info(
            "merged %s: %d parameters are kept for unmerge_from, %d bytes",
            ", ".join(chosen),
            len(kept),
            Merged((), kept).nbytes,
        )
        return model
    keep_outputs(model)
    swap(model, {module: _final(module) for module in saved_modules(model) if module._active})
    return detach(model) if adapter_names(model) else model


def unmerge_from(model: nn.Module) -> nn.Module:
    """Takes the adapters that :func:`merge_into` folded out again: the base's parameters are the very objects
    of before, bit for bit.

    Afterwards the adapters are active, so that the model's outputs stay the same. If the model was moved or
    cast after the merge, the restored parameters follow it.

    Raises:
        NothingToDo: nothing is merged into the model.
    """
    merged = merged_in(model)
    if merged is None:
        raise NothingToDo(
            "nothing is merged into this model",
            where="unmerge_from",
            found=type(model).__name__,
            remedy="merge_into(model) keeps what unmerge_from needs",
        )
    restore(merged.kept)
    remember(model, None)
    return active(model, list(merged.names))


def _choose(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    """Returns the adapters to merge, in order."""
    if names is None:
        wrappers = wrappers_of(model)
        if any(module._rows is not None for module in wrappers):
            raise Unsupported(
                "the rows of a batch have different adapters, and a weight is the same for all",
                where="merge_into",
                remedy="leave the block of using(adapters=...) first",
            )
        names = list(dict.fromkeys(name for module in wrappers for name in module._active))
    chosen = list(dict.fromkeys(as_list(names)))
    require_names(model, chosen)
    if not chosen:
        raise NothingToDo(
            "no adapter is active, and none is named",
            where="merge_into",
            remedy="name one that the model holds",
        )
    return chosen


def _require_fold(model: nn.Module, name: str) -> None:
    """Raises if the adapter ``name`` cannot be merged into the weights that it changes."""
    for module in adapted_layers(model, name):
        method = module._held[name].method
        if method.kind != "weight":
            raise Unsupported(
                f"method '{method.name}' does not act on weights, so it cannot be folded into them",
                where=name,
                remedy=_UNMERGED,
            )
        if reason := method.reason_against("fold"):
            raise Unsupported(reason, where=name, remedy=_UNMERGED)
        if reason := unfoldable(module._site.kind):
            raise Unsupported(reason, where=module._site.path, found=name, remedy=_UNMERGED)
        if module._held[name].where is not None:
            raise Unsupported(
                "this adapter acts at some positions of a row only, which no weight can tell apart",
                where=name,
                found=method.name,
                remedy=_UNMERGED,
            )
        for owner, leaf in module._folded_parameters():
            _require_plain(owner, leaf, module._site.path, name)


def _require_plain(owner: nn.Module, leaf: str, path: str, name: str) -> None:
    """Raises unless a parameter is an ordinary floating-point one of at least 16 bits, in memory."""
    value = owner._parameters.get(leaf)
    if type(value) is not nn.Parameter or not is_plain(value) or value.is_meta:
        found = (
            "none of its own" if value is None else f"{type(value).__name__}, {value.dtype}, {value.device}"
        )
        raise Unsupported(
            "an adapter is folded into a plain weight of floats in memory, which this is not",
            where=f"{name}, {path}",
            found=found,
            remedy="keep it unmerged, or merge checkpoints: adapterpack.merge knows quantized formats",
        )


def _fold(model: nn.Module, module: Adapted) -> list[Kept]:
    """Puts the merged parameters into a layer and into every module tied to it; returns what it replaced. If
    one is not finite, restores the originals and raises.
    """
    kept = []
    try:
        for (owner, leaf), value in module._merge_weights().items():
            if not bool(torch.isfinite(value).all()):
                raise NonFinite(
                    "a folded weight is NaN or infinite",
                    where=f"{module._site.path}, {leaf}",
                    found=str(value.dtype),
                    remedy="load the base in float32 or bfloat16",
                )
            merged = nn.Parameter(value, requires_grad=False)
            # Tied modules share one new parameter, so that they stay tied.
            for place in (owner, *module._tied_to(leaf)):
                kept.append(Kept(place, leaf, place._parameters.get(leaf), merged))
                place._parameters[leaf] = merged
    except BaseException:
        restore(kept)
        raise
    return kept


def _require_apart(model: nn.Module, kept: Sequence[Kept]) -> None:
    """Raises if merging has untied weights that the config declares tied: ``save_pretrained`` would write
    only one of them.
    """
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    originals = {id(one.original) for one in kept}
    still = next((path for path, value in model.named_parameters() if id(value) in originals), None)
    if still is not None:
        raise Unsupported(
            "the change is that of one of two tied weights, which would be two from now on",
            where=still,
            found="tie_word_embeddings",
            remedy="set model.config.tie_word_embeddings to False first",
        )


def _final(module: SavedModule) -> nn.Module:
    """Returns the copy of the last active adapter of a module that was trained in full, in the original's
    precision.
    """
    twin = module._part(module._active[-1])
    first = next((value for value in module._base.parameters() if value.is_floating_point()), None)
    return twin.requires_grad_(False) if first is None else twin.requires_grad_(False).to(first.dtype)
