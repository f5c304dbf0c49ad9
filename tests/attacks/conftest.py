"""Where attacks run."""

from __future__ import annotations

from pathlib import Path

import pytest
from attack import Attacks


@pytest.fixture
def attacks(tmp_path: Path) -> Attacks:
    return Attacks(tmp_path)
