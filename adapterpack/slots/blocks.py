"""Slots of adapters after blocks (bottleneck adapters and their like): one branch for each input and
activation, so that packs of any such kind share a graph.

Fields of a block, prefixed by the name of a branch (``output_relu_down``)::

    h' = h + sum over branches of  act((norm(z) * norm_weight + norm_bias) down + down_bias) up + up_bias

``norm_weight`` [n], ``norm_bias`` [n], ``down`` [n, r], ``down_bias`` [r], ``up`` [r, n], ``up_bias`` [n]; z
is the block's output, or its input. Branches with ``normed`` in their name have the two fields of the norm.
Zeros are neutral: an unused branch adds zero, and ranks are padded with zeros.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from ..adapter_methods.forms.blocks import ACTIVATIONS, BlockForm
from ..tasks import Arrays

LEAVES: dict[str, str] = {
    "norm_weight": "n",
    "norm_bias": "n",
    "down": "nr",
    "down_bias": "r",
    "up": "rn",
    "up_bias": "n",
}
"""Leaf of a branch -> its axes: ``n`` is the width of the block, ``r`` the rank of the adapter."""


class Branch(NamedTuple):
    """One way in which adapters change a block's output: an activation, the value that it reads, and whether
    it norms that value.
    """

    act: str
    reads_input: bool
    normed: bool

    @property
    def name(self) -> str:
        """The prefix of its fields."""
        return f"{'input' if self.reads_input else 'output'}_{self.act}{'_normed' if self.normed else ''}"


BRANCHES = {
    branch.name: branch
    for branch in (Branch(*way) for way in product(ACTIVATIONS, (False, True), (False, True)))
}
"""Every possible branch, by name."""

FIELDS = {f"{branch}_{leaf}": (branch, leaf) for branch in BRANCHES for leaf in LEAVES}
"""Field -> its branch and its leaf."""


def block_arrays(form: BlockForm) -> Arrays:
    """Converts a normal form to the fields of its branch, as float32 arrays."""
    branch = Branch(form.act, form.reads_input, form.norm is not None).name
    down, up = np.asarray(form.down.dense()).T, np.asarray(form.up.dense()).T
    leaves = {
        "down": down,
        "up": up,
        "down_bias": np.zeros(down.shape[1]) if form.down_bias is None else form.down_bias,
    }
    if form.up_bias is not None:
        leaves["up_bias"] = form.up_bias
    if form.norm is not None:
        leaves["norm_weight"], leaves["norm_bias"] = form.norm
    return {
        f"{branch}_{leaf}": np.ascontiguousarray(value, dtype=np.float32) for leaf, value in leaves.items()
    }
