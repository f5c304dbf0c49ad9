"""Half a minute of ``soak.py``: everything at once, and nothing may be wrong or left."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import HAPPENS, soak


@pytest.mark.long
def test_everything_at_once(smollm2: Path, tmp_path: Path) -> None:
    """Every answer is that of the pack whose digest it names, while packs, keys and clients come and go;
    memory stays as it is.
    """
    result = soak(tmp_path, smollm2, 30.0, 1, 8)
    assert result["faults"] == []
    assert min(result["counts"][name] for name in HAPPENS) >= 8
    assert result["digests"] == 7
    assert result["memory"]["late"] < 1.2 * result["memory"]["warm"]
