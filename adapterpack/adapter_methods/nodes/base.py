"""The values of composition trees: leaves that name members, nodes of a registered kind, and the part that a
subtree adds to a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import Unsupported
from .. import Array, Arrays, Dense, Forward, NormalForm, Params, Random, Route, Shapes, Site, array_namespace
from ..core.config import check_fields
from ..core.routers import Weights

Transform = Callable[[Forward], Forward]
"""Forward function of a layer -> forward function of the changed layer."""
Folded = tuple[Array, "Array | None"]
Folding = Callable[[Folded], Folded]
"""Weight and bias, or a block of their rows -> the same with a change folded in."""


@dataclass(frozen=True)
class Leaf:
    """A leaf: a member adapter, by its name."""

    member: str

    @property
    def members(self) -> frozenset[str]:
        """The name alone, as a set."""
        return frozenset({self.member})


@dataclass(frozen=True)
class Node:
    """A combination of subtrees; ``settings`` is an instance of the settings class of its kind."""

    kind: str
    children: tuple[Tree, ...]
    settings: Any


Tree = Leaf | Node


class NodePart(NamedTuple):
    """The sum that a subtree of additive members adds to a layer; fields that are None add nothing.

    ``down`` ``[R, in]`` and ``up`` ``[out, R]`` are factors; ``delta`` ``[out, in]`` is a change without
    factors; ``shift`` is ``[out]``; ``routes`` are mixtures of experts.
    """

    down: Array | None = None
    up: Array | None = None
    delta: Array | None = None
    shift: Array | None = None
    routes: tuple[Route, ...] = ()


Parts = Sequence[NodePart | None]
"""The parts of a node's children, None for a child that changes nothing at the site."""


def share_evenly(settings: Any, children: int) -> list[float]:
    """Returns equal weights with a sum of one."""
    return [1 / children] * children


class NodeKind(NamedTuple):
    """One kind of node: how it combines its children, and which tensors of its own it needs.

    ``join`` combines the parts of the children at a site (None for a child that changes nothing there), with
    the node's own tensors by name. ``evaluate`` and ``fold`` combine children of any method, given as
    functions; a router has neither, and ``unfoldable`` says why no weight can hold it. ``shares`` returns the
    children's weights for averaging modules that were trained in full. ``torch_only`` says why no ONNX graph
    can hold the node; ``one_pass`` means that the model must see a sequence in a single pass. ``tensors``
    returns the shapes of the node's own tensors at a site with that many present experts, ``made`` computes
    their values when the tree is composed, with a generator seeded for the site, and ``trained`` says that
    they are trainable parameters, and otherwise follow from the members. ``shared`` and ``made_shared`` do
    the same for tensors that all sites share; ``weigh`` computes from the last hidden states of a first pass
    the experts' weights at layer ``layer``.
    """

    name: str
    summary: str
    paper: str
    formula: str
    settings: type[Any]
    join: Callable[[Any, Parts, Params], NodePart | None]
    shares: Callable[[Any, int], list[float]] = share_evenly
    evaluate: Callable[[Any, Sequence[Transform], Forward], Forward] | None = None
    fold: Callable[[Any, Sequence[Folding], Folded], Folded] | None = None
    unfoldable: str = "its weights depend on the token, which no weight of a layer does"
    torch_only: str = ""
    one_pass: bool = False
    tensors: Callable[[Any, int, Site], Shapes] | None = None
    made: Callable[[Any, Sequence[NodePart], Random], Arrays] | None = None
    trained: bool = False
    shared: Callable[[Any, int, int], Shapes] | None = None
    made_shared: Callable[[Any, int, int, Random], Arrays] | None = None
    weigh: Callable[[Any, Params, Array, int, int], Array] | None = None
    examples: tuple[str, ...] = ()
    """Trees over members ``a``, ``b``, ``c`` as text, with which the tests check the kind."""

    @property
    def routes(self) -> bool:
        """Whether the node's weights depend on the input."""
        return self.fold is None


@dataclass(frozen=True)
class NodeSettings:
    """The settings of a kind of node, or none; a type such as ``PositiveInt`` says which values a field can
    have.

    Raises:
        ValueError: a field has another value.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, children: int) -> None:
        """Raises ValueError unless the settings fit so many children."""


def part_of(form: NormalForm, where: str) -> NodePart:
    """Returns the part that one member adds.

    Raises:
        Unsupported: the member does more than add to the output.
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
    """Returns the part multiplied by a number."""
    if weight == 1:
        return part
    up, delta, shift = (
        None if value is None else value * weight for value in (part.up, part.delta, part.shift)
    )
    return NodePart(
        part.down, up, delta, shift, tuple(route._replace(up=route.up * weight) for route in part.routes)
    )


def add_parts(parts: Parts) -> NodePart | None:
    """Returns the sum of parts; their factors are stacked."""
    present = [part for part in parts if part is not None]
    if len(present) < 2:
        return present[0] if present else None
    return NodePart(
        *_stack_factors(present),
        _total([part.delta for part in present]),
        _total([part.shift for part in present]),
        tuple(route for part in present for route in part.routes),
    )


def _stack_factors(parts: Sequence[NodePart]) -> tuple[Array | None, Array | None]:
    """Returns the ``down`` and the ``up`` factors of all parts, stacked; None if no part has any."""
    pairs = [(part.down, part.up) for part in parts if part.down is not None]
    if not pairs:
        return None, None
    xp = array_namespace(pairs[0][0])
    return xp.concat([down for down, _ in pairs], axis=0), xp.concat([up for _, up in pairs], axis=1)


def _total(values: Sequence[Array | None]) -> Array | None:
    total = None
    for value in values:
        total = value if total is None else total if value is None else total + value
    return total


def as_form(part: NodePart | None) -> NormalForm:
    """Returns the normal form of a part."""
    if part is None:
        return NormalForm()
    down = None if part.down is None else Dense(part.down)
    up = None if part.up is None else Dense(part.up)
    if part.delta is not None:
        whole = part.delta if down is None or up is None else part.delta + up.matrix @ down.matrix
        down = Dense(whole)
        up = None
    return NormalForm(down=down, up=up, shift=part.shift, routes=part.routes)


def mix(
    parts: Parts, make_gate: Callable[[Array, Array, tuple[int, ...]], Weights], absent: bool = False
) -> NodePart | None:
    """Returns the part of a router over experts. ``make_gate`` returns its gate from the stacked factors of
    the experts, ``down`` and ``up``, and their ranks; with ``absent``, experts that change nothing at the
    site are among them, with rank 0.

    Raises:
        Unsupported: an expert has no factors, has a bias, or contains a router.
    """
    present = [NodePart() if part is None else part for part in parts if part is not None or absent]
    for part in present:
        if part.delta is not None or part.shift is not None or part.routes:
            raise Unsupported(
                "an expert of a router is a change of low rank, without a bias and without another "
                "router inside",
                remedy="put the router outermost, or the other members next to it in a sum",
            )
    down, up = _stack_factors(present)
    if down is None:
        return None
    ranks = tuple(0 if part.down is None else int(part.down.shape[0]) for part in present)
    return NodePart(routes=(Route(make_gate(down, up, ranks), down, up, ranks),))
