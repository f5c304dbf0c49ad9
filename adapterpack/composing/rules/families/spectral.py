"""Rules that act on directions of the changes."""

from __future__ import annotations

from .. import spectral_rules as s
from ..rule import ARXIV, MEAN, Laws, Rule

RULES = (
    Rule("tsv_m", "singular triplets of all changes side by side, made orthogonal; the same in the core space",
         "lam polar([U_1 .. U_T]) diag(S_1 .. S_T) polar([V_1 .. V_T])^T", f"{ARXIV}2412.00081", "C", True, s.tsv_m, unit=True),
    Rule("iso_c", "the sum with all its singular values made equal, on its support alone",
         "alpha mean(S) U V^T, U S V^T = sum w_i D_i", f"{ARXIV}2502.04959", "C", True, s.iso_c, unit=True, laws=Laws(identity=False)),
    Rule("iso_cts", "Iso-C of the common directions and of the first own directions of each change, on their support alone",
         "alpha mean(S*) polar(U*) polar(V*)^T, U* = [U_k, U_1 .. U_T]", f"{ARXIV}2502.04959", "C", True, s.iso_cts, unit=True,
         laws=Laws(identity=False)),
    Rule("cart", "the mean, and of each change's way from it the first directions",
         "M + lam sum_t svd_k(x_t - M), M = sum w_t D_t / sum |w_t|", f"{ARXIV}2412.12153", "C", True, s.cart, laws=MEAN),
    Rule("wudi", "the change whose difference from each adapter is least in that adapter's own row space, in closed form",
         "X (sum C_t + ridge I) = sum w_t D_t C_t + ridge sum w_t D_t, C_t = D_t^T D_t / |D_t|^2", f"{ARXIV}2503.08099", "S", True,
         s.wudi, unit=True),
)
