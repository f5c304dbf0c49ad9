"""Every family of the table is trained, saved, validated, and attached to a model that is loaded anew, with
the outputs that it had.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_families import FAMILIES, Family, line, proved

PAGE = Path(__file__).parents[1] / "docs" / "train-families.md"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data sets' cache in a folder of the test's own; models this small only wait for each other's
    threads.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


@pytest.mark.sampled(10)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_trains(family: Family, tiny_bert: Path, tmp_path: Path) -> None:
    """Its loss falls; the pack gives the trained model's outputs, by a loop and by a configuration; the page
    has its line.
    """
    found = proved(family, tmp_path, tiny_bert)
    assert found.fell
    assert (found.difference, found.configured or 0.0) == (0.0, 0.0)
    assert line(family, found) in PAGE.read_text("utf-8").splitlines()
