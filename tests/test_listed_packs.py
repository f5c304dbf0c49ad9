"""Packs that are listed at the start of a server and checked when a request first names them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace

from adapterpack import Engine, export, load
from adapterpack.errors import AdapterpackError, FormatError, StorageError, UnknownAdapter, Unsigned
from adapterpack.io import TENSORS
from adapterpack.manifest.outline import outline_of
from adapterpack.pack.trust.sign import Signers
from adapterpack.pack.validate.listing import ListedPack, list_pack
from adapterpack.serving.adapters.adapter_control import AdapterControl
from adapterpack.serving.adapters.startup import StartupAdapters

Make = Callable[..., Any]
COUNT = 50


@pytest.fixture(scope="module")
def bundle(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listed") / "bundle"
    export(base_of("llama"), [pack_of("llama", "alpha")], folder, slots=3, max_rank=6, in_place=True)
    return folder


@pytest.fixture(scope="module")
def made(pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pack, folder = load(pack_of("llama", "beta")), tmp_path_factory.mktemp("made") / "packs"
    for number in range(COUNT):
        pack.renamed(f"p{number}").write(folder / f"p{number}")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Packs of one adapter, p0 to p49."""
    return Path(shutil.copytree(made, tmp_path / "packs"))


def served(bundle: Path, folder: Path, **options: Any) -> tuple[Engine, AdapterControl]:
    """An engine with the packs in a folder, as a server starts with them."""
    engine = Engine(bundle, "cpu", max_rows=2, **options)
    control = AdapterControl(engine.adapters, "base", [], Signers(), lambda change, code: None)
    StartupAdapters.of([folder]).load(control, changing=False, watched=False)
    return engine, control


def answer(engine: Engine, name: str) -> str:
    engine.add([5, 6, 7], name, max_new_tokens=4)
    events = []
    while engine.busy:
        events += engine.step()
    assert events[-1].error is None
    return events[-1].text


def alter(folder: Path) -> None:
    """Changes the last byte of a pack's tensors."""
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


def test_an_outline_says_what_the_manifest_says(folder: Path, pack_of: Make) -> None:
    pack, listed = load(folder / "p7"), list_pack(folder / "p7")
    outline = outline_of(pack.manifest.to_bytes())
    assert outline is not None
    for field in ("pack", "method", "task", "base", "files", "extensions"):
        assert getattr(outline, field) == getattr(pack.manifest, field)
    assert [(one.path, one.role, one.rank) for one in outline.groups] == [
        (group.path, group.role, group.rank) for group in pack.manifest.groups
    ]
    assert isinstance(listed, ListedPack)
    assert (listed.id, listed.name, listed.called("x").name) == (pack.id, "p7", "x")
    # whoever takes it for a pack has one, whose tensors are compared with their digests
    assert listed.manifest == pack.manifest
    assert (
        listed.params(pack.manifest.groups[0].path).keys() == pack.params(pack.manifest.groups[0].path).keys()
    )
    data = pack.manifest.to_bytes()
    assert outline_of(data.replace(b'"p7"', b'"p8"')) is None  # not what was written
    assert outline_of(data[:-9]) is outline_of(b"[" * 100_000) is outline_of(b"{}") is None


def test_a_pack_is_read_when_a_request_first_names_it(bundle: Path, folder: Path) -> None:
    """Nothing of the tensors is read before. What was altered is refused then, each time and with its reason,
    and the others answer.
    """
    alter(folder / "p3")
    engine, control = served(bundle, folder)
    table = engine.adapters
    assert {f"p{number}" for number in range(COUNT)} <= set(table.names)
    assert table.digests == []
    assert control.awaits_checks("p4") and not control.awaits_checks("alpha")
    assert {one.name: one.facts.sites for one in control.adapters}["p4"] > 0
    text = answer(engine, "p4")
    assert not isinstance(table.pack("p4"), ListedPack)
    assert len(table.digests) == 1
    for _ in range(2):
        with pytest.raises(FormatError, match=r"AP204.*altered"):
            answer(engine, "p3")
    with pytest.raises(FormatError, match="AP204"):
        control.admit("p3")
    assert [(one.place.name, one.reason) for one in control.refused] == [("p3", "format")]
    with pytest.raises(FormatError):  # of a mix, too
        engine.add([5], {"p3": 0.5, "p4": 0.5})
    control.admit("p6")
    assert answer(engine, "p6") == answer(engine, "p5") == text
    shutil.rmtree(folder / "p8")
    with pytest.raises(StorageError):
        answer(engine, "p8")
    shutil.rmtree(folder / "p9")
    shutil.copytree(folder / "p5", folder / "p9")
    with pytest.raises(FormatError, match="changed after it was listed"):
        answer(engine, "p9")
    stale = table.pack("p10")
    table.unload("p10")
    with pytest.raises(UnknownAdapter):  # nobody would have checked it
        table.acquire(stale)


def test_what_a_list_shows_to_be_wrong_is_refused_at_the_start(bundle: Path, folder: Path) -> None:
    """A file of another size, one that the manifest does not list, an edited manifest, and the pack of
    another base.
    """

    def cut() -> None:
        data = (folder / "p1" / TENSORS).read_bytes()
        (folder / "p1" / TENSORS).write_bytes(data[:-8])

    def more() -> None:
        (folder / "p1" / "more.txt").touch()

    def edit() -> None:
        path = folder / "p1" / "adapterpack.json"
        path.write_text(path.read_text().replace('"p1"', '"p2"'))

    def move() -> None:
        pack = load(folder / "p1")
        base = replace(pack.manifest.base, structure=f"bfp1:{0:064}", content=f"bfp1:{1:064}")
        manifest = replace(pack.manifest, base=base)
        dataclasses.replace(pack, manifest=manifest).write(folder / "p1", replace=True)

    for spoil, message in ((cut, "AP104"), (more, "AP102"), (edit, "changed"), (move, "base")):
        shutil.rmtree(folder / "p1")
        load(folder / "p2").renamed("p1").write(folder / "p1")
        spoil()
        with pytest.raises(AdapterpackError, match=message):
            served(bundle, folder)


def test_a_signature_is_asked_for_at_the_start(bundle: Path, folder: Path, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pem").write_bytes(key.public_bytes(*pem))
    table = Engine(bundle, "cpu").adapters
    with pytest.raises(Unsigned):
        table.load(list_pack(folder / "p0"), signers=Signers([tmp_path / "key.pem"]))
    assert "p0" not in table.names


def test_adapters_in_memory_take_what_their_files_take(bundle: Path, folder: Path) -> None:
    engine, _ = served(bundle, folder)
    for number in range(8):
        answer(engine, f"p{number}")
    table = engine.adapters
    assert len(table.digests) == 8
    assert table.nbytes <= 1.05 * sum((folder / f"p{number}" / TENSORS).stat().st_size for number in range(8))
    small, _ = served(bundle, folder, adapter_budget=table.nbytes // 4)
    for number in range(8):
        answer(small, f"p{number}")
    assert 0 < small.adapters.nbytes <= table.nbytes // 4
