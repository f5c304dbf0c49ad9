"""Int4: an eighth of float32 and its scales."""

from __future__ import annotations

from ..scheme import SCHEMES, Scheme, all_in

GROUP = 64
"""Numbers that share a scale: 32 would make files a tenth larger, and the error a twentieth smaller."""

SCHEMES.register(Scheme("int4", f"symmetric int4, one scale for every {GROUP} numbers of a direction", all_in("int4"), GROUP))
