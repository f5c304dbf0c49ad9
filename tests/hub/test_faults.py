"""fault x promise: whatever a hub does wrong is told by name, leaves nothing behind, and a second try with a
sound hub succeeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from faults import FAULTS
from hubs import WRITE, Hub, left, make_pack

import adapterpack
from adapterpack.errors import (
    AdapterpackError,
    FormatError,
    GatedRepo,
    HubConflict,
    HubError,
    RepoNotFound,
    RevisionNotFound,
)
from adapterpack.hub.transport import client, transfer

pytestmark = pytest.mark.fast


class Told(NamedTuple):
    error: type[AdapterpackError]
    says: str


PULLS: dict[str, Told] = {
    "bit flip": Told(FormatError, "altered"),
    "bit flip in the manifest": Told(FormatError, "altered"),
    "broken off": Told(HubError, "breaks off"),
    "truncated": Told(FormatError, "truncated"),
    "lengthened": Told(FormatError, "longer"),
    "dots in the listing": Told(FormatError, "must not become a file"),
    "absolute path in the listing": Told(FormatError, "must not become a file"),
    "backslash in the listing": Told(FormatError, "must not become a file"),
    "device in the listing": Told(FormatError, "must not become a file"),
    "two names of one file": Told(FormatError, "one file on some systems"),
    "pickle in the listing": Told(FormatError, "AP106"),
    "unlisted file": Told(FormatError, "AP102"),
    "missing file": Told(FormatError, "AP103"),
    "other size": Told(FormatError, "AP104"),
    "other digest": Told(FormatError, "AP105"),
    "no digest": Told(FormatError, "without its size and digest"),
    "endless listing": Told(FormatError, "too many files"),
    "listing is a page": Told(HubError, "does not answer as it should"),
    "failing": Told(HubError, "does not answer as it should"),
    "no commit header": Told(HubError, "does not say that these bytes are of the commit"),
    "other commit header": Told(HubError, "does not say that these bytes are of the commit"),
    "pause": Told(HubError, "breaks off"),
    "trickle": Told(HubError, "too slowly"),
    "redirect elsewhere": Told(HubError, "neither its own nor https"),
    "redirect in circles": Told(HubError, "in circles"),
    "redirect to a file": Told(HubError, "neither its own nor https"),
    "xet only": Told(HubError, "Xet"),
    "gone": Told(HubError, "is not there"),
    "no commit": Told(HubError, "which commit"),
    "another repository": Told(HubError, "has moved"),
    "gated": Told(GatedRepo, "agreement"),
    "repository gone": Told(RepoNotFound, "no such repository"),
    "revision gone": Told(RevisionNotFound, "no such revision"),
    "token in the error": Told(HubError, "does not answer as it should"),
}
"""Met by a pull: every request that the fault is for is answered wrongly."""


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub pauses the client gives up soon."""
    from huggingface_hub import constants

    pauses = {"pause": 1.0, "trickle": 0.5}
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in pauses:
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", pauses[name])


@pytest.fixture(scope="session")
def there(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pack on the hub; its id."""
    with pytest.MonkeyPatch.context() as patch:
        from huggingface_hub import constants

        patch.setenv("HF_ENDPOINT", served.address)
        patch.setenv("HF_TOKEN", WRITE)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        return adapterpack.push(make_pack(), "hf://org/tickets").id


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PULLS)
def test_a_pull_detects_it_and_keeps_nothing(name: str, hub: Hub, there: str, tmp_path: Path) -> None:
    out, lock = tmp_path / "out", tmp_path / "adapterpack.lock"
    hub.arm(name)
    with pytest.raises(PULLS[name].error) as caught:
        adapterpack.pull("hf://org/tickets", out, lock=lock)
    assert PULLS[name].says in str(caught.value)
    assert WRITE not in str(caught.value)
    assert hub.arm() > 0, "the fault was met"
    assert left(tmp_path / "cache") == []
    assert not out.exists()
    assert not lock.exists()
    assert adapterpack.pull("hf://org/tickets", out, lock=lock).id == there == adapterpack.load(out).id


@pytest.mark.parametrize("name", ["busy", "failing", "broken off", "pause", "busy with its answer"])
def test_what_passes_is_asked_again(name: str, hub: Hub, there: str) -> None:
    """Once or twice is no reason to give up."""
    hub.arm(name, times=2)
    assert adapterpack.pull("hf://org/tickets").id == there
    assert hub.arm() == 2


@pytest.mark.parametrize(
    "name",
    [
        "bit flip",
        "truncated",
        "other digest",
        "unlisted file",
        "pickle in the listing",
        "other size",
        "missing file",
    ],
)
def test_the_full_validator_says_it_as_a_finding(name: str, hub: Hub, there: str, tmp_path: Path) -> None:
    hub.arm(name)
    report = adapterpack.validate("hf://org/tickets", full=True)
    assert report.state == "invalid"
    assert all(finding.message for finding in report.findings)
    assert left(tmp_path / "cache") == []
    hub.arm()
    assert adapterpack.validate("hf://org/tickets", full=True).findings == ()


@pytest.mark.parametrize(
    ("name", "says"),
    [("another range", "another range"), ("no commit header", "of the commit"), ("xet only", "Xet")],
)
def test_the_validator_of_headers_trusts_no_range(name: str, says: str, hub: Hub, there: str) -> None:
    hub.arm(name)
    with pytest.raises(HubError, match=says):
        adapterpack.validate("hf://org/tickets")
    assert hub.arm() > 0
    assert adapterpack.validate("hf://org/tickets").findings == ()


def test_a_hub_without_ranges_is_read_from_its_beginning_only(hub: Hub, there: str) -> None:
    hub.arm("ranges ignored")
    assert adapterpack.validate("hf://org/tickets").findings == ()
    remote = client.connect(client.names.parse("hf://org/tickets"))
    with pytest.raises(HubError, match="does not send ranges"):
        transfer.read_range(remote, "adapter_model.safetensors", 8, 4)


def test_a_stale_parent_is_a_conflict_and_a_second_push_goes_on_top(hub: Hub) -> None:
    adapterpack.push(make_pack(), "hf://org/overtaken")
    hub.arm("overtaken", times=1)
    with pytest.raises(HubConflict, match="meanwhile"):
        adapterpack.push(make_pack(seed=8), "hf://org/overtaken")
    assert adapterpack.pull("hf://org/overtaken").id == make_pack().id
    pushed = adapterpack.push(make_pack(seed=8), "hf://org/overtaken")
    assert "README.md" not in pushed.sent, "the overtaker's own text stays"
    assert adapterpack.pull("hf://org/overtaken").id == pushed.id


def test_bytes_altered_on_the_way_up_never_arrive(hub: Hub) -> None:
    hub.arm("upload altered")
    with pytest.raises(HubError):
        adapterpack.push(make_pack(seed=9), "hf://org/altered")
    hub.arm()
    with pytest.raises(HubError, match="neither a pack nor a bundle"):
        adapterpack.pull("hf://org/altered")
    assert adapterpack.push(make_pack(seed=9), "hf://org/altered").created is False
    assert adapterpack.pull("hf://org/altered").id == make_pack(seed=9).id


def test_what_arrived_is_looked_at_again(hub: Hub) -> None:
    """A hub that lists other digests than it was sent is found out after the commit."""
    adapterpack.push(make_pack(), "hf://org/relisted")
    hub.arm("other digest")
    with pytest.raises(FormatError, match="what arrived at the hub is not what was sent"):
        adapterpack.push(make_pack(seed=10), "hf://org/relisted")
    hub.arm()
    assert adapterpack.push(make_pack(seed=10), "hf://org/relisted").sent == (), (
        "it had arrived: the listing had lied"
    )
    assert adapterpack.pull("hf://org/relisted").id == make_pack(seed=10).id


PUSHES = {
    "busy with its answer": 7,
    "failing commit": 7,
    "busy commit": 7,
    "token in the error": 7,
    "failing upload": 800_000,
    "upload broken off": 800_000,
}
"""Fault -> the width of a pack that meets it: a large one goes in parts, which are sent again soon."""


@pytest.mark.parametrize("name", PUSHES)
def test_a_push_that_fails_leaves_the_head_where_it_was_and_a_second_one_succeeds(
    name: str, hub: Hub
) -> None:
    repo, changed = (
        f"hf://org/push-{name.replace(' ', '-')}",
        make_pack(seed=20 + [*PUSHES].index(name), width=PUSHES[name]),
    )
    first = adapterpack.push(make_pack(), repo)
    hub.arm(name)
    with pytest.raises(HubError) as caught:
        adapterpack.push(changed, repo)
    assert WRITE not in str(caught.value)
    assert hub.arm() > 0, "the fault was met"
    assert adapterpack.pull(repo).id == first.id
    second = adapterpack.push(changed, repo)
    assert adapterpack.pull(repo).id == second.id != first.id


def test_the_faults_are_those_that_the_documentation_lists() -> None:
    told = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    assert [name for name in FAULTS if f"| {name} |" not in told] == []


def test_every_fault_is_met_by_a_test() -> None:
    elsewhere = {
        *PUSHES,
        "busy",
        "busy with its answer",
        "ranges ignored",
        "another range",
        "overtaken",
        "upload altered",
        "stalled half way",
        "third part stalled",
    }
    assert PULLS.keys() | elsewhere == FAULTS.keys()
