"""Translates the names and shapes of a pack's tensors to PEFT's and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from ..adapter_methods import (
    Arrays,
    Method,
    PeftLayer,
    PeftSecondary,
    Shapes,
    Site,
    Tensors,
    is_stacked,
    unfoldable,
)
from ..adapter_methods.core.peft_form import as_matrices
from ..errors import FormatError

PREFIX = "base_model.model."


def form_of(method: Method, kind: str, host: Method | None = None) -> PeftLayer | None:
    """Returns how PEFT stores the method at sites of that kind, or None if it cannot. ``host`` is the pack's
    method, if it is another one.
    """
    if method.peft is None:
        return None
    if host is not None:
        secondary = method.peft.overrides.get("secondary")
        fits = (
            secondary
            and host.peft
            and host.peft.peft_type in secondary.hosts
            and kind == method.traits.layers[0]
        )
        return PeftLayer(secondary.suffixes) if secondary and fits else None
    if kind == method.traits.layers[0]:
        return PeftLayer(method.peft.suffixes)
    form = method.peft.layers.get(kind)
    return form if form is None or form.suffixes is not None else form._replace(suffixes=method.peft.suffixes)


def secondary_form(method: Method) -> PeftSecondary:
    """Returns how PEFT stores a method inside another method's folder; the method must have such a form."""
    assert method.peft is not None
    return method.peft.overrides["secondary"]


def tensor_name(
    method: Method, path: str, param: str, kind: str | None = None, host: Method | None = None
) -> str:
    """Returns PEFT's name for a parameter at a site, or this package's own name if PEFT has none. ``host`` is
    the pack's method, if it is another one.

    Raises:
        FormatError: the method has no parameter of that name.
    """
    form = form_of(method, kind or method.traits.layers[0], host)
    suffixes = (form.suffixes if form else None) or {param: param}
    if param not in suffixes and is_indexed(method, param):
        suffixes = {param: param}
    if param not in suffixes:
        raise FormatError(
            f"the method {method.name} has no parameter of that name",
            where=path,
            expected=", ".join(suffixes),
            found=param,
        )
    return (
        suffixes[param] if method.peft and path == method.peft.site else f"{PREFIX}{path}.{suffixes[param]}"
    )


def is_indexed(method: Method, ending: str) -> bool:
    """Whether that is the name of an entry in a list of tensors (``indexed`` of :class:`PeftOverrides`).

    Example:
        >>> from adapterpack.adapter_methods import get
        >>> is_indexed(get("adamss"), "adamss_A.3"), is_indexed(get("adamss"), "adamss_A")
        (True, False)
    """
    name, _, number = ending.rpartition(".")
    return (
        method.peft is not None
        and name in method.peft.overrides.get("indexed", ())
        and len(number) < 6
        and number.isascii()
        and number.isdigit()
    )


def limit(method: Method, cfg: Any, site: Site) -> str:
    """Returns why PEFT's tensors of the method have no certain meaning at a site (``ambiguous_because`` of
    :class:`PeftLayer`), or an empty string.
    """
    form = form_of(method, site.kind)
    return "" if form is None else form.ambiguous_because(cfg, site)


def to_peft_shapes(method: Method, cfg: Any, site: Site, params: Tensors) -> Arrays:
    """Returns the parameters of a site in the shapes that PEFT stores."""
    form = form_of(method, site.kind)
    return form.stored(cfg, site, params) if form is not None and form.stored is not None else dict(params)


def from_peft_shapes(method: Method, kind: str, cfg: Callable[[], Any], params: Tensors) -> Arrays:
    """Reverses :func:`to_peft_shapes`: returns a convolution's tensors as matrices; ``cfg`` returns the
    config of the site.
    """
    form = form_of(method, kind)
    if form is not None and form.loaded is not None:
        return form.loaded(cfg(), params)
    if form is None or form.stored is None:
        return dict(params)
    return as_matrices(params)


def kernel_of(kind: str, shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the kernel of a convolution, read from the axes after the second of the tensors that belong to
    its input; empty for other kinds.
    """
    return (
        ()
        if is_stacked(kind)
        else max((shape[2:] for shape in shapes), key=lambda axes: (math.prod(axes), len(axes)), default=())
    )


def stack_of(kind: str, shapes: Shapes) -> int:
    """Returns, from the ``shapes`` of the parameters, how many matrices a stack has, or how many groups of a
    convolution share the rank of an adapter without groups.
    """
    if is_stacked(kind):
        return max((shape[0] for shape in shapes.values() if shape), default=1)
    spanning = bool(unfoldable(kind))
    A, B = (shapes.get(name, ()) for name in ("lora_A", "lora_B"))
    return A[0] // B[1] if spanning and A and len(B) > 1 and 0 < B[1] <= A[0] else 1


def shared_name(method: Method, param: str) -> str:
    """Returns PEFT's name for a parameter that all sites share, or this package's own name for a method that
    PEFT does not know.
    """
    if method.peft is None:
        return f"{PREFIX}@shared.{param}"
    if param in method.peft.shared:
        return method.peft.shared[param]
    stem = next(stem for stem in method.peft.shared if param.startswith(f"{stem}_"))
    return f"{method.peft.shared[stem]}.{param.removeprefix(f'{stem}_').replace('/', '.')}"


def shared_param(method: Method, name: str) -> str | None:
    """Returns the shared parameter that PEFT's tensor ``name`` holds, or None."""
    assert method.peft is not None
    for param, whole in method.peft.shared.items():
        if name == whole:
            return param
        if name.startswith(f"{whole}.") and "/" not in name:
            return f"{param}_{name.removeprefix(f'{whole}.').replace('.', '/')}"
    return None


def full_name(method: Method, path: str, param: str) -> str:
    """Returns PEFT's name for a parameter of a module that was trained in full."""
    return f"{prefix_of(method)}{path}.{param}"


def prefix_of(method: Method) -> str:
    """Returns the prefix of module paths in tensor names. PEFT wraps the model once less for a method that
    acts on the model as a unit.
    """
    return PREFIX.removesuffix("model.") if method.peft and method.peft.site else PREFIX
