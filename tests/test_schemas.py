"""The schemas for others to read: in the expressions that every reader of JSON Schema has, and true of what
is kept from long ago.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from shipped_schemas import fits, unlike

from adapterpack.manifest.manifest import FORMAT_VERSION
from adapterpack.manifest.migrations import STEPS

pytestmark = pytest.mark.fast
TESTS = Path(__file__).parent
SCHEMAS = {
    path.stem: json.loads(path.read_text("utf-8")) for path in (TESTS.parent / "schemas").glob("*.json")
}


def test_every_pattern_is_the_same_for_every_reader() -> None:
    """And what would not be is found."""
    assert unlike(SCHEMAS) == []
    assert unlike(
        {"items": [{"pattern": pattern} for pattern in (r"^a\Z", r"^\u0001$", "^(?!a)b$", "a")]}
    ) == [r"^a\Z", r"^\u0001$", "^(?!a)b$", "a"]


@pytest.mark.parametrize("folder", sorted((TESTS / "golden").glob("pack-*")), ids=lambda path: path.name)
def test_packs_of_all_versions_fit(folder: Path) -> None:
    """With the fields of their version and no later one, as for the reader."""
    value = json.loads((folder / "adapterpack.json").read_bytes())
    assert fits(value, "manifest.v1")
    own = value["format_version"]
    for version in (*STEPS, FORMAT_VERSION):
        # 1.3 adds a field of canaries alone
        same = version == own or ({version, own} == {"1.2", "1.3"} and value["canary"] is None)
        assert fits({**value, "format_version": version}, "manifest.v1") == same, version


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_one(name: str) -> None:
    """Of 2020-12, and each part that it refers to is there."""
    Draft202012Validator.check_schema(SCHEMAS[name])
    text = json.dumps(SCHEMAS[name])
    assert set(re.findall(r'"\$ref": "#/\$defs/(\w+)', text)) == SCHEMAS[name].get("$defs", {}).keys()
