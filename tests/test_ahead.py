"""A pack whose tensors were read and hashed before it is loaded is the same pack, and is refused for the same reasons."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import adapterpack
from adapterpack.errors import AdapterpackError
from adapterpack.io.safe_open import TENSORS
from adapterpack.pack import ahead
from adapterpack.pack.ahead import read_ahead
from adapterpack.testing.rule_laws import MIXED, made

pytestmark = pytest.mark.fast


@pytest.fixture(params=["ours", "peft"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A pack as a folder of ours, or of PEFT's."""
    path = made(1, MIXED[0]).write(tmp_path / "pack").path
    assert path is not None
    if request.param == "ours":
        return path
    bare = tmp_path / "peft" / "pack"
    bare.mkdir(parents=True)
    for name in ("adapter_config.json", TENSORS):
        shutil.copy(path / name, bare / name)
    return bare


def test_the_same_pack(folder: Path) -> None:
    held = read_ahead(folder)
    assert held is not None
    one, two = adapterpack.load(folder), adapterpack.load(folder, "other", ahead=held)
    assert one.id == two.id
    assert two.name == "other"
    assert all((one.tensors[name] == two.tensors[name]).all() for name in one.tensors)


def test_what_was_read_is_what_is_used(folder: Path) -> None:
    """A file that another puts in its place afterwards is not looked at, and one that was put there before does not pass."""
    held, before = read_ahead(folder), adapterpack.load(folder)
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)
    assert adapterpack.load(folder, ahead=held).id == before.id
    altered = read_ahead(folder)
    assert altered is not None
    if (folder / "adapterpack.json").exists():
        with pytest.raises(AdapterpackError, match="altered"):
            adapterpack.load(folder, ahead=altered)
    else:  # what PEFT writes has no digests: it is another pack
        assert adapterpack.load(folder, ahead=altered).id != before.id


@pytest.mark.parametrize("data", [b"", b"\x10" + bytes(7), b"\xff" * 64, b"\x08" + bytes(7) + b"[[[[[[[[", b'\x02\0\0\0\0\0\0\0{}\0'])
def test_what_cannot_be_read_is_told_as_ever(folder: Path, data: bytes) -> None:
    (folder / TENSORS).write_bytes(data)
    told = []
    for held in (None, read_ahead(folder)):
        with pytest.raises(AdapterpackError) as error:
            adapterpack.load(folder, ahead=held)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_what_is_not_read_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file, one that is not there, and a link."""
    monkeypatch.setattr(ahead, "LARGE", 8)
    assert read_ahead(folder) is None
    monkeypatch.undo()
    (folder / TENSORS).rename(folder.parent / "elsewhere")
    assert read_ahead(folder) is None
    (folder / TENSORS).symlink_to(folder.parent / "elsewhere")
    assert read_ahead(folder) is None
