"""The rules by which changes are combined, as values in a table: the catalogue, the command line and the tests read this."""

from __future__ import annotations

from ..errors import UnknownName, nearest
from . import coefficients as c
from . import fuse as f
from . import measured as d
from . import spectral as s
from . import units as u
from .columns import ziplora
from .entries import core_space, dense, entrywise, knots
from .rule import Laws, Rule
from .search import lorahub
from .space import stack

__all__ = ["Laws", "Rule", "get", "rules"]

ARXIV = "https://arxiv.org/abs/"
SUM = Laws(sums=True)
MEAN = Laws(weighted=False)
"""Of a mean: a lone pack's weight divides out."""
THINNED = {"density": 1.0}

_GRAM = (
    Rule("cat", "the factors side by side: the weighted sum of the changes, as it stands, of rank sum r_i",
         "sum w_i D_i", f"{ARXIV}2212.04089", "G", True, stack, reduce=False, laws=SUM),
    Rule("linear", "the weighted sum of the changes, brought to the smallest rank that holds it",
         "sum w_i D_i", f"{ARXIV}2212.04089", "G", True, stack, laws=SUM),
    Rule("svd", "the best approximation of the weighted sum of a rank, or with a share of its energy, that you give",
         "svd_k(sum w_i D_i)", "https://doi.org/10.1007/BF02288367", "C", False, stack, cut=True, laws=SUM),
    Rule("task_arithmetic", "the sum of the changes at one scale; every pack counts 1 without weights",
         "lam sum w_i D_i", f"{ARXIV}2212.04089", "G", True, c.task_arithmetic, unit=True, neutral={"lam": 1.0}, laws=SUM),
    Rule("negate", "the opposite of the changes: what they taught is taken away",
         "-lam sum w_i D_i", f"{ARXIV}2212.04089", "G", True, c.negate, unit=True, neutral={"lam": -1.0}, laws=SUM),
    Rule("average", "the mean of the changes (model soup), by weights whose size alone counts",
         "sum w_i D_i / sum |w_i|", f"{ARXIV}2203.05482", "G", True, c.average, laws=MEAN),
    Rule("slerp", "two changes along the arc between their directions",
         "(sin((1-t) th) x_1 + sin(t th) x_2) / sin th, t = |w_2| / (|w_1| + |w_2|)", "https://doi.org/10.1145/325334.325242", "G", True,
         c.by_gram(c.slerp), c.products, laws=MEAN),
    Rule("nuslerp", "slerp of every row, or every column, for itself",
         "row_j: slerp(x_1[j], x_2[j], t)", "https://doi.org/10.1145/325334.325242", "S", True, c.nuslerp, laws=MEAN),
    Rule("multi_slerp", "many changes on one sphere: the mean direction, moved by the mean of the tangents there",
         "(sum a_i |x_i|) exp_mu(sum a_i (u_i - <u_i, mu> mu)), u_i = x_i / |x_i|", "https://doi.org/10.1145/502122.502124", "G", True,
         c.by_gram(c.multi_slerp), c.products, laws=MEAN),
    Rule("karcher", "the direction whose squared angles to all changes sum to the least, at their mean length",
         "(sum a_i |x_i|) argmin_u sum a_i angle(u, u_i)^2", "https://doi.org/10.1002/cpa.3160300502", "G", True,
         c.by_gram(c.karcher), c.products, laws=MEAN),
    Rule("model_stock", "the mean, drawn to the base by the angle between the changes: near 0 where they are orthogonal",
         "t mean_i D_i, t = T cos th / (1 + (T - 1) cos th)", f"{ARXIV}2403.19522", "G", True, c.model_stock, laws=MEAN),
)

_SPECTRAL = (
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

_UNITS = (
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

_DENSE = (
    Rule("magnitude_prune", "the weighted sum of the largest entries of each change",
         "sum w_i trim(D_i)", f"{ARXIV}2306.01708", "D", False, *entrywise(dense, f.magnitude_prune, f.magnitude_level), cut=True,
         neutral=THINNED, laws=SUM),
    Rule("ties", "the largest entries of each change; at each place a vote on the sign, and the mean of those who agree",
         "lam sum_{agree} w_i trim(D_i) / sum_{agree} |w_i|", f"{ARXIV}2306.01708", "D", False,
         *entrywise(dense, f.ties, f.magnitude_level), cut=True, neutral=THINNED, laws=MEAN),
    Rule("dare_linear", "entries dropped at random and the rest scaled up, then the weighted sum",
         "sum w_i m_i D_i / density", f"{ARXIV}2311.03099", "D", False, *entrywise(dense, f.dare_linear, f.nothing, "tensor"), cut=True,
         neutral=THINNED, laws=SUM),
    Rule("dare_ties", "entries dropped at random and the rest scaled up, then TIES' vote and mean",
         "lam sum_{agree} w_i m_i D_i / (density sum_{agree} |w_i|)", f"{ARXIV}2311.03099", "D", False,
         *entrywise(dense, f.dare_ties, f.nothing, "tensor"), cut=True, neutral=THINNED, laws=MEAN),
    Rule("della", "DARE with larger entries kept more often, each divided by its own probability; then TIES' vote and mean",
         "lam sum_{agree} w_i m_i D_i / p_i / sum_{agree} |w_i|", f"{ARXIV}2406.11617", "D", False,
         *entrywise(dense, f.della, f.nothing, "tensor"), cut=True, neutral=THINNED, laws=MEAN),
    Rule("della_linear", "DARE with larger entries kept more often, each divided by its own probability; then the weighted sum",
         "sum w_i m_i D_i / p_i", f"{ARXIV}2406.11617", "D", False, *entrywise(dense, f.della_linear, f.nothing, "tensor"), cut=True,
         neutral=THINNED, laws=SUM),
    Rule("breadcrumbs", "the weighted sum without the largest and without the smallest entries",
         "sum w_i band(D_i)", f"{ARXIV}2312.06795", "D", False, *entrywise(dense, f.breadcrumbs, f.bands), cut=True,
         neutral={"density": 1.0, "gamma": 0.0}, laws=SUM),
    Rule("breadcrumbs_ties", "without the largest and without the smallest entries, TIES' vote and mean",
         "lam sum_{agree} w_i band(D_i) / sum_{agree} |w_i|", f"{ARXIV}2312.06795", "D", False,
         *entrywise(dense, f.breadcrumbs_ties, f.bands), cut=True, neutral={"density": 1.0, "gamma": 0.0}, laws=MEAN),
    Rule("sce", "the places where the changes differ most, weights by the energy there, minority signs erased",
         "lam sum_{agree} e_i D_i / sum_{agree} |e_i|, e_i = w_i mean(D_i^2)", f"{ARXIV}2408.07990", "D", False,
         *entrywise(dense, f.sce, f.sce_survey, "tensor"), cut=True, neutral=THINNED, laws=MEAN),
    Rule("pcb", "entries weighed by their size in their change and by their agreement with the others; not free of scale",
         "lam sum w_i s_i D_i / sum |w_i| s_i, s_i = exp(T norm(|D_i|)^2) tanh(D_i sum D)", f"{ARXIV}2410.02396", "D", False,
         *entrywise(dense, f.pcb, f.pcb_survey), cut=True, neutral=THINNED, laws=MEAN._replace(homogeneous=False)),
    Rule("emr", "the elected sign with the largest entry that has it; or, for one task, with that pack's mask and scale",
         "sgn(sum w_i D_i) max_{agree} |D_i|", f"{ARXIV}2405.17461", "D", False, *entrywise(dense, f.emr, f.emr_survey), cut=True,
         laws=MEAN),
    Rule("consensus", "the sum, where enough packs find it important for themselves (TALL masks)",
         "alpha [count(|w_i D_i| > threshold |sum - w_i D_i|) >= agreeing] sum w_i D_i", f"{ARXIV}2405.07813", "D", False,
         *entrywise(dense, f.consensus, f.nothing, "tensor"), cut=True, unit=True, neutral={"agreeing": 1, "threshold": 0.0},
         laws=Laws(sums=True)),
    Rule("magmax", "at each place the entry of the largest size",
         "alpha w_j D_j, j = argmax |w_i D_i|", f"{ARXIV}2407.06322", "D", False, *entrywise(dense, f.magmax, f.nothing, "tensor"),
         cut=True, unit=True),
)

_KNOTS, _CORE = f"{ARXIV}2410.19735", f"{ARXIV}2509.17786"
_JOINT = (
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

_GUIDED = (
    Rule("regmean", "the change whose outputs are nearest to each adapter's own on that adapter's data; needs moments of the inputs",
         "sum w_i D_i G_i (sum |w_j| G_j)^-1, G_i = X_i^T X_i", f"{ARXIV}2212.09849", "S", True, d.regmean, laws=MEAN, statistics="moment"),
    Rule("fisher", "at every entry the mean, by how much each adapter's loss depends on that entry; needs squared gradients",
         "sum w_i F_i D_i / sum |w_i| F_i, F_i = mean (dL/dW)^2", f"{ARXIV}2111.09832", "D", False,
         *entrywise(dense, d.fisher, d.fisher_survey, "tensor"), cut=True, laws=MEAN, statistics="fisher"),
    Rule("lorahub", "the weighted sum under the weights that score best, searched for without gradients; needs a score, or weights",
         "sum w_i D_i, w = argmax score(w) - penalty mean |w_i|", f"{ARXIV}2307.13269", "G", True, lorahub, unit=True, laws=SUM,
         search=True),
    Rule("ziplora", "every column of every change times a number, so that each keeps its outputs and few columns are shared",
         "sum_i x_i diag(m_i), m = argmin sum_i |(X - x_i) x_i^T|^2 / |x_i x_i^T|^2 + lam mean_k |m_i[k] m_j[k]|", f"{ARXIV}2311.13600",
         "S", True, ziplora, unit=True),
)


def rules() -> dict[str, Rule]:
    """Every rule by name.

    Example:
        >>> sorted(rules())[:2]
        ['average', 'breadcrumbs']
    """
    table = (*_GRAM, *_SPECTRAL, *_UNITS, *_DENSE, *_JOINT, *_GUIDED)
    return {rule.name: rule for rule in sorted(table, key=lambda rule: rule.name)}


def get(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UnknownName: there is none.
    """
    known = rules()
    if name not in known:
        raise UnknownName("unknown composition rule", found=repr(name), remedy=nearest(str(name), known))
    return known[name]
