"""How packs are shared over a hub: read this first."""

from __future__ import annotations

from pathlib import Path

from hubs import Hub, make_pack

import adapterpack


def test_push_a_pack_and_pull_it_elsewhere(hub: Hub, tmp_path: Path) -> None:
    """What comes back has the id, which is a digest of every byte, that was pushed."""
    pack = make_pack("tickets").write(tmp_path / "tickets")
    pushed = adapterpack.push(pack.path, "hf://org/first-use")
    assert pushed.sent
    pulled = adapterpack.pull("hf://org/first-use", tmp_path / "pulled")
    assert adapterpack.load(tmp_path / "pulled").id == pulled.id == pack.id


def test_check_a_pack_on_a_hub_without_downloading_it(hub: Hub, tmp_path: Path) -> None:
    """``validate`` reads the headers of a remote pack alone, and says what it could not check."""
    adapterpack.push(make_pack("tickets").write(tmp_path / "tickets").path, "hf://org/looked-at")
    report = adapterpack.validate("hf://org/looked-at")
    assert report.valid and report.not_checked


def test_use_a_pack_of_a_hub_like_a_folder(hub: Hub, tmp_path: Path) -> None:
    """Everything that takes a path takes ``hf://org/name``, too."""
    adapterpack.push(make_pack("tickets").write(tmp_path / "tickets").path, "hf://org/used")
    assert adapterpack.inspect("hf://org/used")["method"] == "lora"
