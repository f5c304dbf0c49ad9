"""A rule of composition in one file: a decorated function whose keywords are the rule's parameters.

No change may count more than the median of all sizes: one adapter that was trained ten times as long then
does not drown the others. Run it with `python examples/new_rule.py PACK PACK`. A package of yours brings its
rule by an entry point: [project.entry-points."adapterpack.rules"] clipped = "new_rule:clipped".
"""

import sys

import numpy as np

import adapterpack
from adapterpack.composing.rules.rule import Laws, rule
from adapterpack.lowrank.factors import gram, weighted_sum


@rule(
    "clipped",
    "the weighted sum of the changes, each at most as large as their median times a factor",
    formula="sum w_i min(1, c m / |D_i|) D_i, m = median |D_i|",
    paper="https://arxiv.org/abs/2212.04089",
    needs="G",
    neutral={"factor": 1e9},
    laws=Laws(sums=True),
)
def clipped(terms, *, factor: float = 1.0):
    """``terms`` are the changes of one site as factors, with their weights; the result is the sum of the same
    with other weights.
    """
    sizes = np.sqrt(np.diag(gram([term._replace(weight=1.0) for term in terms])))
    bound = factor * np.median(sizes)
    return weighted_sum(
        [
            term._replace(weight=term.weight * min(1.0, bound / size) if size else 0.0)
            for term, size in zip(terms, sizes, strict=True)
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    pack = adapterpack.compose(sys.argv[1:], rule="clipped", out="clipped")
    print(f"{len(sys.argv) - 1} packs composed into {pack.path}")
