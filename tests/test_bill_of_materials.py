"""Bills of materials: what is in them, and that the libraries of both forms take them for valid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import adapterpack
from adapterpack.cli.main import main
from adapterpack.errors import ConfigError, FormatError


@pytest.fixture
def trained(pack_of: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A pack that was composed of two, and says which data it has seen."""
    packs = [pack_of("llama", name) for name in ("alpha", "beta")]
    adapterpack.compose(packs, rule="linear").write(tmp_path / "both")
    return tmp_path / "both"


def require_valid(document: dict[str, Any], path: Path) -> None:
    """Asks the libraries of CycloneDX and of SPDX."""
    if "bomFormat" in document:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None
        return
    from spdx_tools.spdx.parser.parse_anything import parse_file
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

    path.write_text(json.dumps(document))
    assert validate_full_spdx_document(parse_file(str(path))) == []


@pytest.mark.parametrize("form", ["cyclonedx", "spdx"])
def test_a_pack_and_a_bundle_are_valid_documents(
    form: str,
    pack_of: Callable[[str, str], Path],
    bundle_of: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    for path in (pack_of("llama", "alpha"), bundle_of("llama", "bank")):
        document = adapterpack.bom(path, form)
        assert document == adapterpack.bom(path, form)
        require_valid(document, tmp_path / "bom.spdx.json")


def test_it_lists_every_file_with_its_digest(pack_of: Callable[[str, str], Path]) -> None:
    """And the base by its fingerprint, which is no digest of a file."""
    path = pack_of("llama", "alpha")
    manifest = json.loads((path / "adapterpack.json").read_text("utf-8"))
    parts = adapterpack.bom(path)["components"]
    digests = {one["name"]: one["hashes"][0]["content"] for one in parts if one["type"] == "file"}
    assert digests == {file["path"]: file["sha256"] for file in manifest["files"]}
    (base,) = (one for one in parts if one["type"] == "machine-learning-model")
    assert base["properties"] == [{"name": "adapterpack:base:content", "value": manifest["base"]["content"]}]
    assert "hashes" not in base


def test_a_bundle_lists_its_packs(
    pack_of: Callable[[str, str], Path], bundle_of: Callable[[str, str], Path]
) -> None:
    parts = adapterpack.bom(bundle_of("llama", "bank"), "spdx")
    contained = {one["name"]: one for one in parts["packages"]}
    alpha = adapterpack.load(pack_of("llama", "alpha"))
    assert contained["alpha"]["checksums"][0]["checksumValue"] == alpha.id.partition(":")[2]
    assert {one["relationshipType"] for one in parts["relationships"]} == {
        "DESCRIBES",
        "CONTAINS",
        "DEPENDS_ON",
    }


def test_parents_are_ancestors(trained: Path, tmp_path: Path) -> None:
    document = adapterpack.bom(trained)
    require_valid(document, tmp_path / "bom.json")
    ancestors = document["metadata"]["component"]["pedigree"]["ancestors"]
    assert [one["name"] for one in ancestors] == ["alpha", "beta"]
    related = adapterpack.bom(trained, "spdx")["relationships"]
    assert [one["relationshipType"] for one in related].count("DESCENDANT_OF") == 2


def test_the_command_writes_a_file(pack_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    path, out = pack_of("llama", "alpha"), tmp_path / "alpha.cdx.json"
    result = CliRunner().invoke(main, ["bom", str(path), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text()) == adapterpack.bom(path)
    assert CliRunner().invoke(main, ["bom", str(path), "-o", str(out)]).exit_code == 0  # it is renewed
    out.write_text("something else")
    assert CliRunner().invoke(main, ["bom", str(path), "-o", str(out)]).exit_code == 1
    assert out.read_text() == "something else"
    printed = CliRunner().invoke(main, ["bom", str(path), "--form", "spdx"])
    assert json.loads(printed.output)["spdxVersion"] == "SPDX-2.3"


def test_what_is_refused(pack_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cyclonedx or spdx"):
        adapterpack.bom(pack_of("llama", "alpha"), "swid")
    (tmp_path / "adapterpack.json").write_text("{}")
    with pytest.raises(FormatError):
        adapterpack.bom(tmp_path)
