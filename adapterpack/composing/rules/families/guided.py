"""Rules that look at data, at a score, or at both sides of every column."""

from __future__ import annotations

from .. import data_rules as d
from ..entries import dense, entrywise
from ..lorahub import lorahub
from ..rule import ARXIV, MEAN, SUM, Rule
from ..ziplora import ziplora

RULES = (
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
