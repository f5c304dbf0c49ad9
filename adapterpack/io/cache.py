"""Finds the folder where adapterpack caches what it can fetch or compute again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder for fetched models and stored packs: ``ADAPTERPACK_CACHE``, or one in the user's
    cache folder.

    Example:
        >>> cache_folder().name != ""
        True
    """
    named = os.environ.get("ADAPTERPACK_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "adapterpack"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapterpack"
