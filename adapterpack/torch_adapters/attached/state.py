"""Reads the tensors of one attached adapter, and replaces them with others of the same names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import FormatError, SiteNotFound, nearest
from ...pack import SHARED
from ..layers import adapted_layers, require_names, wrappers_of
from ..layers.wrapper import key_of
from ..wrap import derive_constants


def adapter_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter by the path of their site and their own name: ``layers.0.q_proj.lora_A``.

    Parameters that all sites share are under ``@shared``, a prompt is under ``@prompt``, and a module that
    was trained in full under its path. The tensors are the model's own, without gradients: copy them to keep
    them.
    :func:`load_adapter_state_dict` takes them back, and
    :func:`~adapterpack.save` writes a pack.

    Raises:
        UnknownAdapter: the model has no adapter of that name.

    Example:
        >>> from adapterpack import LoRA, adapt
        >>> model = adapt(nn.Sequential(nn.Linear(4, 3)), LoRA(r=2), "tickets")
        >>> {key: tuple(value.shape) for key, value in adapter_state_dict(model, "tickets").items()}
        {'0.lora_A': (2, 4), '0.lora_B': (3, 2)}
    """
    require_names(model, [name])
    state: dict[str, Tensor] = {}
    for module in wrappers_of(model, name):
        for owner, tensors in ((module._site.path, module._own(name)), (SHARED, module._shared(name))):
            state |= {f"{owner}.{key}": value.detach() for key, value in tensors.items()}
    return state


def load_adapter_state_dict(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> nn.Module:
    """Copies tensors into an adapter of a model, in place: what has been compiled or captured with it sees
    the new values.

    ``state`` must have exactly the names and shapes of :func:`adapter_state_dict`, with floating-point
    tensors where the adapter has them; nothing is copied unless everything fits. The adapter keeps its
    devices and its precision.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
        SiteNotFound: a name is missing, or is not one of the adapter's.
        FormatError: a tensor is of another shape, or is not of floats where the adapter's is.
    """
    own = adapter_state_dict(model, name)
    for key in state.keys() - own.keys():
        raise SiteNotFound(
            "the adapter has no such tensor", where=name, found=repr(key), remedy=nearest(str(key), own)
        )
    for key, value in own.items():
        if key not in state:
            raise SiteNotFound(
                "a tensor of the adapter is missing", where=name, expected=key, remedy=nearest(key, state)
            )
        new = state[key]
        if (
            not isinstance(new, Tensor)
            or new.shape != value.shape
            or new.is_floating_point() != value.is_floating_point()
        ):
            found = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise FormatError(
                "a tensor does not fit the adapter's",
                where=f"{name}, {key}",
                expected=f"{value.dtype} {tuple(value.shape)}",
                found=found,
            )
    # Everything that can fail comes before the first copy, so that an error leaves the adapter unchanged.
    derived = _derive(model, name, state)
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
        for constant, made in derived:
            constant.copy_(made)
    return model


def _derive(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Computes the constants that the adapter derives from its stored tensors anew, for those in ``state``.

    Returns pairs of a constant in the model and its new value, so that the caller can copy them all at once.
    """
    pairs = []
    for module in adapted_layers(model, name):
        if "derive" in module._held[name].method.overrides:
            params = {key: state[f"{module._site.path}.{key}"] for key in module._own(name)}
            params |= {key: state[f"{SHARED}.{key}"] for key in module._shared(name)}
            pairs += [
                (module._fixed[key_of(name)][key], made)
                for key, made in derive_constants(module, name, params).items()
            ]
    return pairs
