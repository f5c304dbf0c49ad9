"""Slots of routers, which weigh the experts within an adapter. Each router of a site has a route of its own
in the graph, so that packs with different experts, or none, share the graph.

Fields of a site, prefixed by the name of a route (``route0_abs_keys``)::

    s = |x keys| + bias                             in a route that scores by ``abs``
    s = x keys + bias                               by ``dot``
    s = ((x query) * (x down)) spread^T + bias      by ``fuse``: attention to the experts' answers
    least = (s in descending order) . pick
    g = softmax of s where s >= least
    y' = y + ((x down) * (g spread)) up

``*`` is elementwise. ``query`` [in, r] takes the place of ``keys`` in ``fuse``.

``keys`` [in, e], ``bias`` [e], ``pick`` [e], ``down`` [in, r], ``up`` [r, out], ``spread`` [e, r]. An expert
that a row's adapter lacks has the bias -1e9. ``pick`` has its 1 at the place of the k-th largest score, which
selects the top k. Elsewhere zeros are neutral.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..adapter_methods import Arrays
from ..adapter_methods.core.routers import Attention, Route, SoftmaxGate
from ..errors import Unsupported

MOST = 4
"""The most routers of one site."""
LEAVES: dict[str, str] = {
    "keys": "ie",
    "query": "ir",
    "bias": "e",
    "pick": "e",
    "down": "ir",
    "up": "ro",
    "spread": "er",
}
"""Leaf of a route -> its axes: ``i`` and ``o`` are the layer's, ``e`` the experts, ``r`` the sum of their
ranks.
"""
SCORES = {"abs": "keys", "dot": "keys", "fuse": "query"}
"""How a route scores (by magnitude, by plain product, by attention to the experts' answers) -> the leaf with
its weights. The other leaves are common to all routes.
"""


class RouteBranch(NamedTuple):
    """One router of a site: its number there, and how it scores."""

    number: int
    scores: str

    @property
    def name(self) -> str:
        """The prefix of its fields."""
        return f"route{self.number}_{self.scores}"

    @property
    def leaf(self) -> str:
        """The leaf that holds its scoring weights."""
        return SCORES[self.scores]

    @property
    def leaves(self) -> list[str]:
        """The leaves of such a route."""
        return [leaf for leaf in LEAVES if leaf == self.leaf or leaf not in SCORES.values()]

    @property
    def experts(self) -> str:
        """The key in a site's ``ranks`` under which its number of experts stands."""
        return f"{self.name}_experts"

    @property
    def axes(self) -> dict[str, str]:
        """The axes in :data:`LEAVES` -> their names."""
        return {"i": "in", "o": "out", "e": self.experts, "r": self.name}


BRANCHES = {
    branch.name: branch
    for branch in (RouteBranch(number, scores) for number in range(MOST) for scores in SCORES)
}
"""Every possible route, by name."""


def route_arrays(routes: tuple[Route, ...]) -> Arrays:
    """Converts the routes of a normal form to their fields, as float32 arrays.

    Raises:
        Unsupported: there are too many routes, or a route has weights that a graph cannot compute.
    """
    if len(routes) > MOST:
        raise Unsupported(
            "too many routers at one site for a graph",
            expected=f"at most {MOST}",
            found=len(routes),
            remedy="attach it to a torch model",
        )
    fields: Arrays = {}
    for number, route in enumerate(routes):
        gate = route.gate
        count = len(route.widths)
        bias = None
        if isinstance(gate, Attention):
            branch = RouteBranch(number, "fuse")
            weights = gate.query
        elif isinstance(gate, SoftmaxGate):
            branch = RouteBranch(number, "abs" if gate.magnitude else "dot")
            weights = gate.keys
            bias = gate.bias
        else:
            raise Unsupported(
                "the weights of this router come from outside of the layer",
                remedy="attach it to a torch model",
            )
        leaves = {
            branch.leaf: np.asarray(weights).T,
            "bias": np.zeros(count) if bias is None else np.asarray(bias),
            "pick": np.eye(count)[min(gate.top_k, count) - 1],
            "down": np.asarray(route.down).T,
            "up": np.asarray(route.up).T,
            "spread": np.repeat(np.eye(count), route.widths, axis=1),
        }
        fields |= {
            f"{branch.name}_{leaf}": np.ascontiguousarray(value, np.float32) for leaf, value in leaves.items()
        }
    return fields
