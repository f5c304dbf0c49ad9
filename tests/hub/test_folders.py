"""An artifact in a folder of a repository, a repository behind a gate, and what the official client leaves
beside what it fetched.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hubs import READ, WRITE, Hub, left, make_pack

import adapterpack
from adapterpack.errors import ConfigError, FormatError, GatedRepo, HubError
from adapterpack.hub.auditing import audit
from adapterpack.hub.resolve import folder_of
from adapterpack.hub.transport import client, names

pytestmark = pytest.mark.fast


def listing(address: str) -> dict[str, client.ListedFile]:
    return client.tree(client.connect(names.parse(address)))


def test_a_folder_of_a_repository_is_as_good_as_a_whole_one(hub: Hub, tmp_path: Path) -> None:
    """push, pull, validate, audit, load by reference; what lies beside the folder is the same afterwards, and
    each push is one commit.
    """
    one, other, lock = make_pack("one"), make_pack("other", seed=29), tmp_path / "adapterpack.lock"
    first = adapterpack.push(one, "hf://org/many/adapters/one")
    assert first.created
    beside = listing("hf://org/many")
    second = adapterpack.push(other, "hf://org/many/adapters/other", tag="v1")
    assert all(path.startswith("adapters/other/") for path in second.sent)
    after = listing("hf://org/many")
    assert {path: after[path] for path in beside} == beside
    assert len(after) == 2 * len(beside)
    assert adapterpack.push(other, "hf://org/many/adapters/other").sent == ()

    for address, pack in (("hf://org/many/adapters/one@v1", one), ("hf://org/many/adapters/other", other)):
        pulled = adapterpack.pull(address, tmp_path / pack.name, lock=lock)
        assert (pulled.id, pulled.folder) == (pack.id, f"adapters/{pack.name}")
        assert adapterpack.load(tmp_path / pack.name).id == adapterpack.load(folder_of(address)).id == pack.id
        report = adapterpack.validate(address)
        assert (report.findings, report.id, report.path) == (
            (),
            pack.id,
            f"hf://org/many/adapters/{pack.name}@{second.commit}",
        )
        assert adapterpack.validate(address, full=True).findings == ()
    assert sorted(json.loads(lock.read_text())["entries"]) == [
        "hf://org/many/adapters/one@v1",
        "hf://org/many/adapters/other@main",
    ]
    found = audit(["org/many/adapters/one"], lock=lock)
    assert [one.repo for one in found] == [
        "org/many/adapters/one",
        "org/many/adapters/one",
        "org/many/adapters/other",
    ]
    assert {one.state for one in found} == {"not fully checked"}

    changed = make_pack("one", seed=11)
    adapterpack.push(changed, "hf://org/many/adapters/one")
    assert adapterpack.pull("hf://org/many/adapters/other").id == other.id
    assert adapterpack.pull("hf://org/many/adapters/one", lock=tmp_path / "new.lock").id == changed.id
    with pytest.raises(HubError, match="neither a pack"):
        adapterpack.pull("hf://org/many/adapters/none")
    with pytest.raises(HubError, match="neither a pack"):
        adapterpack.pull("hf://org/many/adapters")
    card = folder_card("org/many", "adapters/one", tmp_path)
    assert 'subfolder="adapters/one"' in card
    assert "hf://org/many/adapters/one" in card


def folder_card(repo: str, folder: str, scratch: Path) -> str:
    from adapterpack.hub.transport import transfer

    remote = client.connect(names.HubReference(repo, folder=folder))
    transfer.fetch(remote, client.tree(remote)["README.md"], scratch / "card")
    return (scratch / "card").read_text()


def test_no_folder_inside_of_an_artifact(hub: Hub) -> None:
    """The list of files of a pack is closed: a folder in it would break it; and a pack over folders stops, as
    over anything.
    """
    adapterpack.push(make_pack(), "hf://org/closed")
    with pytest.raises(ConfigError, match="in that of another artifact"):
        adapterpack.push(make_pack(), "hf://org/closed/sub/tickets")
    assert adapterpack.validate("hf://org/closed").findings == ()
    adapterpack.push(make_pack(), "hf://org/open/sub/tickets")
    with pytest.raises(ConfigError, match="files that are not of a pack"):
        adapterpack.push(make_pack(), "hf://org/open")


def test_a_gate_keeps_the_files_from_those_who_were_not_let_in(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the public hub: the listing is for all, the files for who may write or was granted access; set
    through the official client.
    """
    pushed = adapterpack.push(make_pack(), "hf://org/behind")
    api = client.api(WRITE)
    api.update_repo_settings("org/behind", gated="manual")
    for token in (READ, None):
        monkeypatch.delenv("HF_TOKEN")
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        assert client.api(token).model_info("org/behind").gated == "manual"
        for ask in (adapterpack.pull, adapterpack.validate):
            with pytest.raises(GatedRepo, match="agreement"):
                ask("hf://org/behind")
        assert left(tmp_path / "cache") == []
        monkeypatch.setenv("HF_TOKEN", READ)
    from huggingface_hub import constants

    # 1.33 asks this one for grants, whatever the client was made with
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", hub.address, raising=False)
    with pytest.raises(Exception, match="403"):
        client.api(READ).grant_access("org/behind", "bob")
    api.grant_access("org/behind", "bob")
    assert adapterpack.pull("hf://org/behind").id == pushed.id
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(GatedRepo):
        adapterpack.pull("hf://org/behind")
    api.update_repo_settings("org/behind", gated=False)
    assert adapterpack.pull("hf://org/behind").id == pushed.id


def test_notes_of_the_official_client_are_let_lie_and_nothing_else(tmp_path: Path) -> None:
    """What ``hf download --local-dir`` leaves: ``.cache/huggingface``, that folder alone; nothing in it is
    read or sent.
    """
    folder = make_pack().write(tmp_path / "tickets").path
    assert folder is not None
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "adapterpack.json.metadata").write_bytes(b"\x80pickle?")
    assert adapterpack.validate(folder).findings == ()
    assert adapterpack.load(folder).id == make_pack().id
    (folder / ".cache" / "more").write_text("")
    with pytest.raises(FormatError, match="AP101"):
        adapterpack.load(folder)
    (folder / ".cache" / "more").unlink()
    shutil.move(folder / ".cache", tmp_path / "elsewhere")
    (folder / ".cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="AP101"):
        adapterpack.load(folder)
