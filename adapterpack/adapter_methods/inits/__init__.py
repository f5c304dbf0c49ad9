"""The initialisations of a low-rank branch, one small file each, which registers those that it defines.

An init gives A ``[r, in]`` and B ``[out, r]``. Where their product is not zero, the branch is trained as ``B
A - B0 A0``: a fresh adapter changes nothing, and with the adapter off the model is its original base, always.
Other libraries rewrite the base instead.
"""

from ..core.site import Calibration
from .base import INITS, Init

__all__ = ["INITS", "Calibration", "Init"]
