"""The schemes that the weights of a bundle's graphs can be quantized with, and how exactly their products are computed."""

from __future__ import annotations

import math
from typing import NamedTuple

from ...errors import ConfigError, UnknownName, nearest


class Scheme(NamedTuple):
    """A weight-only scheme of MatMulNBits.

    ``tolerance`` is the largest change of an output, as a share of the largest, with which a graph is still written, and with which fast
    products are the default. That of a wrong graph is larger; four bits may move the outputs of a model as far as that, so their change is
    recorded and not judged.
    """

    bits: int
    block_size: int
    symmetric: bool
    tolerance: float


SCHEMES = {"int4": Scheme(4, 32, False, math.inf), "int8": Scheme(8, 32, False, 0.1)}
FLOAT = Scheme(0, 0, False, 0.0)
"""Of a head that stays as it is."""
HEADS = {**SCHEMES, "float": FLOAT}
"""What the product that gives the logits may be."""
HEAD = "int8"
"""What it is by default: four bits would cost more accuracy there than anywhere else, and save a few per cent of a graph."""
ACCURACIES = ("exact", "fast")
"""``exact`` multiplies with the activations as they are; ``fast`` rounds them to int8 in blocks, which is MatMulNBits' accuracy_level 4."""
CACHES = ("float", "int8")
"""What the keys and values of the engine's graph may be: the graph's own type, or whole numbers with a scale for each channel."""


class Quantization(NamedTuple):
    """What is to become of a bundle's graphs: the scheme, the accuracy (None: by what is measured) and the scheme of the head."""

    scheme: str
    accuracy: str | None = None
    head: str = HEAD


def quantization(scheme: str, accuracy: str | None, head: str | None) -> Quantization:
    """What is to become of a bundle's graphs, if all of it exists.

    Raises:
        UnknownName: there is no such scheme, accuracy or head.
    """
    for kind, name, names in (("quantization scheme for a bundle", scheme, SCHEMES), ("accuracy", accuracy, ACCURACIES),
                              ("quantization of the head", head, HEADS)):
        if name is not None and name not in names:
            raise UnknownName(f"unknown {kind}", found=repr(name), remedy=nearest(name, names))
    return Quantization(scheme, accuracy, head or HEAD)


def require_no_options(what: str, accuracy: str | None, head: str | None) -> None:
    """Checks that nobody says how graphs are quantized where none is.

    Raises:
        ConfigError: somebody does.
    """
    if accuracy is not None or head is not None:
        name = "accuracy" if accuracy is not None else "head"
        raise ConfigError(f"{what}, so that --{name} says nothing", found=accuracy or head, remedy=f"leave --{name} out")
