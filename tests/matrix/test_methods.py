"""The matrix of methods and invariants: rows come from the registry, a cell is promised or not applicable
because of a trait.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from invariants.matrix import INVARIANTS, render
from method_catalogue import page

from adapterpack.adapter_methods import INITS, methods
from adapterpack.testing import SUBJECTS, Case, Invariant, cases

GOLDEN = Path(__file__).parent.parent / "golden" / "matrix.md"
CATALOGUE = Path(__file__).parents[2] / "docs" / "methods.md"
CELLS: dict[str, tuple[Invariant, list[Case]]] = {}
"""``lora[0]-layer_agrees`` -> an invariant, and one config of a method on every layer on which it is
checked.
"""
FEW = (0, 3)
"""Of many layers those of a method's further configs: wide with a bias, and tall without."""
for case in (case for method in methods().values() for case in cases(method)):
    for promised in (one for one in INVARIANTS if one.holds_for(case)):
        name = f"{case.method.name}[{case.method.examples.index(case.config)}]-{promised.name}"
        CELLS.setdefault(name, (promised, []))[1].append(case)


def _marks(cell: str) -> list[pytest.MarkDecorator]:
    """One config of each method is proved with the rest; compiling takes seconds for each, so of that one
    method's is.
    """
    slow = "-compiled_" in cell and not cell.startswith("lora[")
    return [pytest.mark.long if slow or "[0]" not in cell else pytest.mark.fast]


@pytest.mark.parametrize(
    ("invariant", "on"), [pytest.param(*CELLS[cell], id=cell, marks=_marks(cell)) for cell in CELLS]
)
def test_invariant(invariant: Invariant, on: list[Case]) -> None:
    """Every promised cell holds; the equation stands in the invariant's docstring."""
    first = on[0].config == on[0].method.examples[0]
    for case in on if first or len(on) <= max(FEW) else [on[place] for place in FEW]:
        try:
            invariant.check(case)
        except Exception as error:
            error.add_note(f"on {case.layer.label}")
            raise


@pytest.mark.fast
def test_the_table_of_promises_is_the_recorded_one() -> None:
    """A promise, a config or a layer that is dropped shows as a changed line; `make golden` records what was
    meant.
    """
    assert render(methods().values()) == GOLDEN.read_text("utf-8"), (
        "the matrix changed: run `make golden` and look at the difference"
    )


@pytest.mark.fast
def test_the_catalogue_is_made_from_the_registry() -> None:
    """The page in the documentation is what the registry gives; every method and init says its formula or
    summary and its source.
    """
    assert page(methods().values()) == CATALOGUE.read_text("utf-8"), (
        "the catalogue changed: run `make golden`"
    )
    for method in methods().values():
        assert method.formula and method.summary and method.paper.startswith("https://"), method.name
    assert all(init.summary and init.paper.startswith("https://") for init in INITS.values())


@pytest.mark.fast
def test_every_method_is_proved_on_several_configs() -> None:
    """Each method has at least two example configs, all different, and every layer (or model) that is wide
    enough is used with each.
    """
    for method in methods().values():
        assert len(set(map(repr, method.examples))) == len(method.examples) >= 2, method.name
        subjects = SUBJECTS[method.traits.layers[0]]
        narrow = {(1, 5), (5, 1)} if method.traits.min_features != (1, 1) else set()
        left_out = [
            one
            for one in subjects
            if tuple(one)[:2] in narrow
            and (
                one.out_features < method.traits.min_features[0]
                or one.in_features < method.traits.min_features[1]
            )
        ]
        assert len(list(cases(method))) == len(method.examples) * (len(subjects) - len(left_out))


@pytest.mark.fast
def test_every_invariant_says_its_equation() -> None:
    """The docstring of an invariant is its contract; names are unique and are the functions' own."""
    assert len({invariant.name for invariant in INVARIANTS}) == len(INVARIANTS)
    for invariant in INVARIANTS:
        assert invariant.check.__name__ == invariant.name
        assert (invariant.check.__doc__ or "").strip().count(" ") >= 8, invariant.name
