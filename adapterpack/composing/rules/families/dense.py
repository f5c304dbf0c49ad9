"""Rules that look at every entry of the changes."""

from __future__ import annotations

from .. import entrywise_rules as f
from ..entries import dense, entrywise
from ..rule import ARXIV, MEAN, SUM, THINNED, Laws, Rule

RULES = (
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
