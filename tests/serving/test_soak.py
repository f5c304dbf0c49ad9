"""Half a minute of ``soak.py``: everything at once, and nothing may be wrong or left."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import soak


@pytest.mark.long
@pytest.mark.timeout(300)
def test_everything_at_once(smollm2: Path, tmp_path: Path) -> None:
    """Every answer is that of the pack whose digest it names, while packs, keys and clients come and go;
    memory stays as it is.
    """
    result = soak(tmp_path, smollm2, 30.0, 1)
    assert result["faults"] == []
    counts = result["counts"]
    assert (
        min(
            counts[name]
            for name in ("answers compared", "disconnects", "swaps", "drops", "key files", "bad 400")
        )
        >= 8
    )
    assert result["digests"] == 7
    assert result["memory"]["late"] < 1.1 * result["memory"]["warm"]
