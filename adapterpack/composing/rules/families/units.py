"""Rules that look at single rows and columns of the factors."""

from __future__ import annotations

from .. import factor_rules as u
from ..rule import ARXIV, THINNED, Laws, Rule

RULES = (
    Rule("lora_lego", "singular units of all adapters in clusters, each its centroid at the mean length",
         "sqrt(r / k) sum_c b_c a_c^T", f"{ARXIV}2409.16167", "F", True, u.lego, unit=True),
    Rule("robust_merge", "singular units trimmed, and weighted up where that cost them most; has cross terms",
         "(c sum_t S_t B_t^ / sum S_t) (c sum_t A_t^)", f"{ARXIV}2502.17159", "F", True, u.robust_merge, unit=True,
         neutral={"density": 1.0, "coefficient": 1.0}),
    Rule("peft_linear", "PEFT's linear, for the same numbers: not the sum of the changes",
         "(sum sqrt(w_i s_i) B_i) (sum sqrt(w_i s_i) A_i)", f"{ARXIV}2212.04089", "F", True, u.peft_linear,
         laws=Laws(gauge=False, mixed_ranks=False)),
    Rule("peft_ties", "PEFT's ties, for the same numbers: votes on the factors, weights after the vote",
         "ties(sqrt(w_i s_i) B_i) ties(sqrt(w_i s_i) A_i)", f"{ARXIV}2306.01708", "F", True, u.peft_ties, neutral=THINNED,
         laws=Laws(gauge=False, mixed_ranks=False)),
)
