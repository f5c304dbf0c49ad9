"""The invariants in a table, crossed with the methods: which cells are promised, and the proof of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..methods import Method
from . import algebra, learning, packing
from .case import LAYERS, SHAPES, Case


class Invariant(NamedTuple):
    """One column of the matrix: ``check`` raises AssertionError; ``needs`` says of a method whether it promises this, by ``trait``."""

    name: str
    check: Callable[[Case], None]
    needs: Callable[[Method], bool]
    trait: str


def _always(method: Method) -> bool:
    return method.kind == "weight"


INVARIANTS = (
    Invariant("identity_at_init", algebra.identity_at_init, lambda method: method.traits.identity_at_init, "identity_at_init"),
    Invariant("trained_adapter_changes_the_output", algebra.trained_adapter_changes_the_output, _always, "kind"),
    Invariant("fold_equals_forward", algebra.fold_equals_forward, _always, "kind"),
    Invariant("fold_in_row_blocks", algebra.fold_in_row_blocks, lambda method: method.traits.row_separable, "row_separable"),
    Invariant("torch_equals_numpy", learning.torch_equals_numpy, _always, "kind"),
    Invariant("gradients_reach_every_parameter", learning.gradients_reach_every_parameter, _always, "kind"),
    Invariant("loss_falls", learning.loss_falls, _always, "kind"),
    Invariant("shapes_declared", algebra.shapes_declared, _always, "kind"),
    Invariant("inputs_unchanged", algebra.inputs_unchanged, _always, "kind"),
    Invariant("dtype_kept", learning.dtype_kept, _always, "kind"),
    Invariant("additive_law", algebra.additive_law, lambda method: method.traits.additive, "additive"),
    Invariant("low_rank_law", algebra.low_rank_law, lambda method: method.traits.low_rank, "low_rank"),
    Invariant("config_schema", algebra.config_schema, _always, "kind"),
    Invariant("pack_round_trip", packing.pack_round_trip, _always, "kind"),
    Invariant("scale_recomputed", packing.scale_recomputed, _always, "kind"),
    Invariant("peft_round_trip", packing.peft_round_trip, lambda method: method.peft is not None, "peft"),
)


def cases(method: Method) -> Iterator[Case]:
    """Every row of the matrix for one method: its example configs on every layer that is wide enough for it."""
    rows, columns = method.traits.least
    every = SHAPES[method.traits.layers[0]]
    fitting = [layer for layer in every if layer.out_features >= rows and layer.in_features >= columns]
    return (Case(method, config, layer) for config in method.examples for layer in fitting)


def prove(method: Method) -> int:
    """Checks every invariant that a registered method promises, on every case; returns how many cells were checked.

    Raises:
        AssertionError: one does not hold; names the config, the layer and the invariant.
    """
    cells = [(case, invariant) for case in cases(method) for invariant in INVARIANTS if invariant.needs(method)]
    for case, invariant in cells:
        try:
            invariant.check(case)
        except Exception as error:
            what = f"{method.name}: {invariant.name} does not hold for {case.config} on {case.layer.label}: {error}"
            raise AssertionError(what) from error
    return len(cells)


def render(known: Iterable[Method]) -> str:
    """The matrix as a page of Markdown: which cells are promised and which trait leaves one out, the layers, the configs, the laws."""
    listed = sorted(known, key=lambda method: method.name)
    head = ["invariant", *(method.name for method in listed)]
    body = [[f"`{i.name}`", *("promised" if i.needs(method) else f"n/a ({i.trait})" for method in listed)] for i in INVARIANTS]
    body.append(["layers", *("{} from {}x{}".format(m.traits.layers[0], *m.traits.least) for m in listed)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
    configs = "\n".join(f"- {method.name}: `{config}`" for method in listed for config in method.examples)
    meanings = "\n".join(f"- `{i.name}`: {(i.check.__doc__ or '').strip().splitlines()[0]}" for i in INVARIANTS)
    intro = "A cell is promised, and then tested for every config and layer below, or not applicable because of the trait it names."
    sections = ["# Methods and what they promise", f"{intro}\nMade by `python -m adapterpack.testing`.", table,
                "## Layers", ", ".join(layer.label for layer in LAYERS), "## Configs", configs, "## Invariants", meanings]
    return "\n\n".join(sections) + "\n"


