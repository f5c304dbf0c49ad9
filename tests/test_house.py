"""The library gets lighter, never heavier without a reason: figures of its mass and its words that may only fall.

``tests/golden/house.tsv`` holds the most that is allowed of each; ``python tests/house.py`` shows where one stands.
"""

from __future__ import annotations

import house
import pytest

pytestmark = pytest.mark.fast

RECORD = house.read_record()


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    """What is measured now."""
    return house.measure()


@pytest.mark.parametrize("name", [name for name in RECORD if not name.startswith("walk: ")])
def test_no_figure_rises(name: str, figures: dict[str, float]) -> None:
    """Whoever makes one rise writes the new value and the reason into the record."""
    assert figures[name] <= RECORD[name].most, f"{name}: see python tests/house.py"


def test_the_record_names_every_figure(figures: dict[str, float]) -> None:
    """None is measured without a limit, and none is above where it began without a reason."""
    assert set(figures) == {name for name in RECORD if not name.startswith("walk: ")}
    for name, limit in RECORD.items():
        assert limit.most <= float(limit.first) or limit.reason, name


def test_participles_are_told_from_verbs() -> None:
    """Irregular ones, too; nouns that end like one are left alone."""
    names = ["packed", "tensors_kept", "read", "split", "seed", "need", "feed", "_drawn"]
    assert [name for name in names if house.is_participle(name)] == ["packed", "tensors_kept", "_drawn"]
