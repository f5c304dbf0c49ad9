"""The initialisations of a low-rank branch, one small file each; each file registers the inits that it
defines.

An init computes A ``[r, in]`` and B ``[out, r]``. If their product is not zero, the branch is trained as ``B
A - B0 A0``, so that a fresh adapter changes nothing and the model with the adapter off is always its original
base. Other libraries rewrite the base instead.
"""

from ..core.site import Calibration
from .base import INITS, Init

__all__ = ["INITS", "Calibration", "Init"]
