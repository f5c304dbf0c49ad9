"""The initialisations of a low-rank branch, one small file each, in one table.

An init gives A ``[r, in]`` and B ``[out, r]``. Where their product is not zero, the branch is trained as ``B
A - B0 A0``: a fresh adapter changes nothing, and with the adapter off the model is its original base, always.
Other libraries rewrite the base instead.
"""

from __future__ import annotations

from ...errors import UnknownName, nearest
from ..core.site import Calibration
from .base import Init
from .corda import corda
from .eva import eva
from .loftq import loftq
from .lora_ga import lora_ga
from .mica import mica
from .olora import olora
from .pissa import pissa
from .plain import default, gaussian, orthogonal, zeros

INITS: dict[str, Init] = {
    init.name: init
    for init in (default, gaussian, zeros, orthogonal, pissa, olora, eva, corda, loftq, lora_ga, mica)
}
"""Name -> init: what a config's ``init`` may be."""


def init_named(name: str) -> Init:
    """The init of that name.

    Raises:
        UnknownName: there is none.

    Example:
        >>> init_named("pissa").needs
        frozenset({'weight'})
    """
    if name not in INITS:
        raise UnknownName("unknown initialisation", found=repr(name), remedy=nearest(str(name), INITS))
    return INITS[name]


__all__ = ["INITS", "Calibration", "Init", "init_named"]
