"""Trees of composition: leaves that name members, nodes of a registered kind, and the part that a subtree
adds to a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import Unsupported
from ..core.arrays import array_namespace
from ..core.base import Forward, NormalForm
from ..core.config import is_number
from ..core.operators import Array, Dense
from ..core.routers import Route
from ..core.site import Site

Transform = Callable[[Forward], Forward]
"""A layer's function -> the function of the changed layer."""
Folded = tuple[Array, "Array | None"]
Folding = Callable[[Folded], Folded]
"""Weight and bias, or a block of their rows -> the same with a change folded in."""


@dataclass(frozen=True)
class Leaf:
    """A member, by its name."""

    member: str


@dataclass(frozen=True)
class Node:
    """A combination of subtrees; ``settings`` is of the class that the node's kind names."""

    kind: str
    children: tuple[Tree, ...]
    settings: Any


Tree = Leaf | Node


class NodePart(NamedTuple):
    """What a subtree of additive members adds to a layer: the sum of what is there.

    ``down`` ``[R, in]`` and ``up`` ``[out, R]``; ``delta`` ``[out, in]``, a change without factors; ``shift``
    ``[out]``; and the routes.
    """

    down: Array | None = None
    up: Array | None = None
    delta: Array | None = None
    shift: Array | None = None
    routes: tuple[Route, ...] = ()


class NodeKind(NamedTuple):
    """One kind of node.

    ``join`` combines what the children add at a site (None: nothing there), with the node's own tensors by
    name. ``evaluate`` and ``fold`` combine children of any method, from functions; a router has neither, and
    says in ``unfoldable`` why no weight can hold it. ``shares`` are the weights of the children in an average
    of modules that were trained whole. ``torch_only``: why no graph can hold it; ``one_pass``: a sequence
    must be seen whole. ``tensors`` are the shapes of a node's own tensors at a site of so many present
    experts; ``made`` their values when the tree is made, with a generator that is the site's own; ``trained``
    says that they are parameters. ``shared`` and ``made_shared`` are the same of what all sites have in
    common; ``weigh`` makes of the model's last hidden states, in a first pass, the weights at layer
    ``layer``.
    """

    name: str
    summary: str
    paper: str
    formula: str
    settings: type[Any]
    join: Callable[[Any, Sequence[NodePart | None], Mapping[str, Array]], NodePart | None]
    shares: Callable[[Any, int], list[float]]
    evaluate: Callable[[Any, Sequence[Transform], Forward], Forward] | None = None
    fold: Callable[[Any, Sequence[Folding], Folded], Folded] | None = None
    unfoldable: str = ""
    torch_only: str = ""
    one_pass: bool = False
    tensors: Callable[[Any, int, Site], dict[str, tuple[int, ...]]] | None = None
    made: Callable[[Any, Sequence[NodePart], np.random.Generator], dict[str, np.ndarray]] | None = None
    derived: bool = False
    """Whether its tensors at the sites follow from the members."""
    trained: bool = False
    shared: Callable[[Any, int, int], dict[str, tuple[int, ...]]] | None = None
    made_shared: Callable[[Any, int, int, np.random.Generator], dict[str, np.ndarray]] | None = None
    weigh: Callable[[Any, Mapping[str, Array], Array, int, int], Array] | None = None
    examples: tuple[str, ...] = ()
    """Trees over members ``a``, ``b``, ``c`` as text, under which the tests prove it."""

    @property
    def routes(self) -> bool:
        """Whether its weights depend on the input."""
        return self.fold is None


def as_float(value: Any) -> Any:
    """A number as a float; anything else as it is, for a check to refuse."""
    return float(value) if is_number(value) else value


def part_of(form: NormalForm, where: str) -> NodePart:
    """The part that one member adds.

    Raises:
        Unsupported: it does more than add.
    """
    if form.pre is not None or form.post is not None or form.output_scale is not None:
        raise Unsupported(
            "this member does more at this site than add to the layer's output",
            where=where,
            remedy="leave it out of the tree, or merge it",
        )
    if form.down is not None and form.up is None:
        return NodePart(delta=form.down.dense(), shift=form.shift)
    if form.down is None or form.up is None:
        return NodePart(shift=form.shift)
    return NodePart(form.down.dense(), form.up.dense(), shift=form.shift)


def scale_part(part: NodePart, weight: float) -> NodePart:
    """The part times a number."""
    if weight == 1:
        return part
    up, delta, shift = (
        None if value is None else value * weight for value in (part.up, part.delta, part.shift)
    )
    return NodePart(
        part.down, up, delta, shift, tuple(route._replace(up=route.up * weight) for route in part.routes)
    )


def add_parts(parts: Sequence[NodePart | None]) -> NodePart | None:
    """The sum of parts; factors are stacked."""
    present = [part for part in parts if part is not None]
    if len(present) < 2:
        return present[0] if present else None
    pairs = [(part.down, part.up) for part in present if part.down is not None and part.up is not None]
    down = up = None
    if pairs:
        xp = array_namespace(pairs[0][0])
        down, up = xp.concat([down for down, _ in pairs], axis=0), xp.concat([up for _, up in pairs], axis=1)
    return NodePart(
        down,
        up,
        _total([part.delta for part in present]),
        _total([part.shift for part in present]),
        tuple(route for part in present for route in part.routes),
    )


def _total(values: Sequence[Array | None]) -> Array | None:
    total = None
    for value in values:
        total = value if total is None else total if value is None else total + value
    return total


def as_form(part: NodePart | None) -> NormalForm:
    """The normal form of a part."""
    if part is None:
        return NormalForm()
    down = None if part.down is None else Dense(part.down)
    up = None if part.up is None else Dense(part.up)
    if part.delta is not None:
        whole = part.delta if down is None or up is None else part.delta + up.matrix @ down.matrix
        down, up = Dense(whole), None
    return NormalForm(down=down, up=up, shift=part.shift, routes=part.routes)


def experts(parts: Sequence[NodePart | None], absent: bool = False) -> tuple[list[NodePart], tuple[int, ...]]:
    """The experts of a router that are there at a site, or all of them with nothing for the ``absent``, and
    their ranks.

    Raises:
        Unsupported: one has no factors, a bias, or a router inside.
    """
    present = [NodePart() if part is None else part for part in parts if part is not None or absent]
    for part in present:
        if part.delta is not None or part.shift is not None or part.routes:
            raise Unsupported(
                "an expert of a router is a change of low rank, without a bias and without another "
                "router inside",
                remedy="put the router outermost, or the other members next to it in a sum",
            )
    return present, tuple(0 if part.down is None else int(part.down.shape[0]) for part in present)


def route_parts(gate: Any, parts: Sequence[NodePart]) -> NodePart | None:
    """The part of a router over experts."""
    pairs = [(part.down, part.up) for part in parts if part.down is not None and part.up is not None]
    if not pairs:
        return None
    xp = array_namespace(pairs[0][0])
    widths = tuple(0 if part.down is None else int(part.down.shape[0]) for part in parts)
    down, up = xp.concat([down for down, _ in pairs], axis=0), xp.concat([up for _, up in pairs], axis=1)
    return NodePart(routes=(Route(gate, down, up, widths),))
