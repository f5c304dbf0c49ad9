"""The schemas that the package ships, checked by the library of that name and not by the package's own reader."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((Path(__file__).parents[1] / "schemas" / f"{name}.json").read_text("utf-8")))


def fits(value: Any, name: str) -> bool:
    """Whether a JSON value fits the schema of that name, such as ``report.v1``."""
    return bool(_validator(name).is_valid(value))
