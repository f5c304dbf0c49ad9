"""Int8: a quarter of float32, and an error that no task notices."""

from __future__ import annotations

from ..scheme import SCHEMES, Scheme, all_in

SCHEMES.register(
    Scheme("int8", "symmetric int8, one scale for every direction of every factor", all_in("int8"))
)
