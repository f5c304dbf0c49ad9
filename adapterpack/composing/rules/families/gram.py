"""Rules whose result is a sum of the changes: inner products decide all of it."""

from __future__ import annotations

from ....lowrank.space import summed
from .. import gram_rules as c
from ..rule import ARXIV, MEAN, SUM, Rule

RULES = (
    Rule("cat", "the factors side by side: the weighted sum of the changes, as it stands, of rank sum r_i",
         "sum w_i D_i", f"{ARXIV}2212.04089", "G", True, summed, reduce=False, laws=SUM),
    Rule("linear", "the weighted sum of the changes, brought to the smallest rank that holds it",
         "sum w_i D_i", f"{ARXIV}2212.04089", "G", True, summed, laws=SUM),
    Rule("svd", "the best approximation of the weighted sum of a rank, or with a share of its energy, that you give",
         "svd_k(sum w_i D_i)", "https://doi.org/10.1007/BF02288367", "C", False, summed, cut=True, laws=SUM),
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
