"""Rules that look at every entry in the joint bases of the changes, where the result is an adapter as it stands."""

from __future__ import annotations

from .. import entrywise_rules as f
from ..entries import core_space, entrywise, knots
from ..rule import ARXIV, MEAN, THINNED, Rule

_KNOTS, _CORE = f"{ARXIV}2410.19735", f"{ARXIV}2509.17786"

RULES = (
    Rule("knots_ties", "TIES on the columns' coordinates in the changes' joint singular vectors: an adapter as it stands",
         "U ties([X_1 .. X_T]), [D_1 .. D_T] = U [X_1 .. X_T]", _KNOTS, "C", True, *entrywise(knots, f.ties, f.magnitude_level),
         neutral=THINNED, laws=MEAN),
    Rule("knots_dare_ties", "DARE with TIES' vote in KnOTS' coordinates: an adapter as it stands",
         "U dare_ties([X_1 .. X_T]), [D_1 .. D_T] = U [X_1 .. X_T]", _KNOTS, "C", True,
         *entrywise(knots, f.dare_ties, f.nothing, "tensor"), neutral=THINNED, laws=MEAN),
    Rule("core_ties", "TIES in the bases of all columns and all rows: an adapter as it stands",
         "U ties(U^T D_t V) V^T", _CORE, "C", True, *entrywise(core_space, f.ties, f.magnitude_level), neutral=THINNED, laws=MEAN),
    Rule("core_dare_ties", "DARE with TIES' vote in the bases of all columns and all rows: an adapter as it stands",
         "U dare_ties(U^T D_t V) V^T", _CORE, "C", True, *entrywise(core_space, f.dare_ties, f.nothing, "tensor"), neutral=THINNED,
         laws=MEAN),
)
