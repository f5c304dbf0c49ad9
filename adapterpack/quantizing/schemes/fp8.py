"""Fp8 (e4m3): as large as int8, and better only where a few numbers of a direction are much larger than the
others.
"""

from __future__ import annotations

from ..scheme import SCHEMES, Scheme, all_in

SCHEMES.register(
    Scheme("fp8", "8-bit floats (e4m3), one scale for every direction of every factor", all_in("fp8"))
)
