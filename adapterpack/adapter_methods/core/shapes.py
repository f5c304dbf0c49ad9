"""Checks that the tensors of a site have the shapes that its method declares, and values that the method can
use.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import FormatError
from .. import Method, PeftForm, Site, is_stacked
from .peft_form import Widths
from .site import Tensors, shapes_of

_INPUTS = (1, 5040, 1 << 20)
_OUTPUTS = (2, 720720, 12)
"""Stand-ins for unknown widths: two different values each, so that a shape that depends on the width differs
between them.
"""


def features(form: PeftForm, kind: str, params: Tensors, where: str) -> Widths:
    """Returns the input and output width that the parameters of a site of that kind determine, None for a
    width they do not.

    Raises:
        FormatError: a parameter is missing or has too few axes.
    """
    try:
        return form.features_of(kind, params)
    except (IndexError, KeyError, ValueError) as error:
        raise FormatError(
            "the tensors of a site do not pair up, or have too few axes", where=where, found=shapes_of(params)
        ) from error


def check_shapes(method: Method, cfg: Any, site: Site, params: Tensors, where: object) -> None:
    """Checks the shape of every parameter of a site, as far as the site's known widths determine it, and the
    values.

    Raises:
        FormatError: a shape is wrong (the error names the site, the parameter and both shapes), or the values
            do not fit the site.
    """
    widths = (site.in_features, site.out_features)
    here = f"{where}, {site.path}"
    stack = (site.stack,) if is_stacked(site.kind) else ()
    if method.peft is not None and not stack and not all(widths) and params:
        stored_widths = features(method.peft, site.kind, params, here)
        if any(not width and stored for width, stored in zip(widths, stored_widths, strict=True)):
            raise FormatError(
                "the tensors say a width that the site leaves out",
                where=here,
                expected=stored_widths,
                found=widths,
            )
    for param, matrix_shape in _known_shapes(method, cfg, site).items():
        shape = (*stack, *matrix_shape)
        stored = params[param].shape if param in params else None
        if (
            stored is None
            or len(stored) != len(shape)
            or any(want not in {None, have} for want, have in zip(shape, stored, strict=True))
        ):
            raise FormatError(
                "a tensor has the wrong shape",
                where=f"{here}, {param}",
                expected=shape,
                found="no such tensor" if stored is None else stored,
            )
    if method.storage.require is not None:
        try:
            method.storage.require(cfg, params, site)
        except ValueError as error:
            raise FormatError(f"the values of a tensor do not fit the site: {error}", where=here) from error


def _known_shapes(method: Method, cfg: Any, site: Site) -> dict[str, tuple[int | None, ...]]:
    """Returns the shapes of a site's parameters, with None for each axis that depends on an unknown width."""
    if site.in_features and site.out_features:
        return dict(method.shapes(cfg, site))
    # Computes the shapes for two different widths; an axis that differs depends on the unknown width.
    tries = [
        method.shapes(
            cfg,
            dataclasses.replace(
                site, in_features=site.in_features or wide, out_features=site.out_features or tall
            ),
        )
        for wide, tall in zip(_INPUTS, _OUTPUTS, strict=True)
    ]
    return {
        param: tuple(
            axes[0] if len(set(axes)) == 1 else None
            for axes in zip(*(shapes[param] for shapes in tries), strict=True)
        )
        for param in tries[0]
    }
