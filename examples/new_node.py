"""A kind of node for trees of composition in one file: how the changes of its children become one.

`loudest(a, b)` keeps, at every layer, the change with the largest norm and drops the others. A package of
yours brings its node by an entry point: [project.entry-points."adapterpack.nodes"] loudest =
"new_node:loudest"; then `adapterpack compose a b --tree "loudest(a, b)" -o c`.
"""

import numpy as np

from adapterpack.adapter_methods.nodes import NODES, NodeKind, NodeSettings


def size(part):
    """The Frobenius norm of ``up @ down``."""
    return (
        0.0
        if part is None or part.down is None
        else float(np.linalg.norm(np.asarray(part.up) @ np.asarray(part.down)))
    )


def fold(settings, children, start):
    """The weight and bias with the one child folded in that changes the weight most."""
    return max(
        (child(start) for child in children),
        key=lambda folded: float(np.linalg.norm(np.asarray(folded[0] - start[0]))),
    )


loudest = NODES.register(
    NodeKind(
        name="loudest",
        summary="at every layer the one member whose change is largest",
        paper="https://arxiv.org/abs/2212.04089",
        formula="f(x) = base(x) + D_j x,  j = argmax |D_i|",
        settings=NodeSettings,  # nothing to set
        join=lambda settings, parts, own: max(parts, key=size),
        fold=fold,
        examples=("loudest(a, b)",),
    )
)
