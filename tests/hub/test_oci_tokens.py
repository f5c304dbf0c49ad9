"""A registry that takes no passwords, only tokens: which scope is asked for, and what is said where it is not granted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hubs import make_pack
from huggingface_hub import constants
from registries import PASSWORD, USER, log_in, program, running
from tokens import exchanging

import adapterpack
from adapterpack.errors import HubError

ALL = frozenset({"pull", "push"})
RIGHTS = {f"{USER}:{PASSWORD}": ALL, "bob:reads": frozenset({"pull"}), "": frozenset[str]()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a login, and a fresh cache."""
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "home"


def signed(tmp_path: Path) -> Path:
    folder = make_pack("tickets").write(tmp_path / "tickets").path
    assert folder is not None
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    adapterpack.sign(folder, tmp_path / "key.pem")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_password_is_exchanged_for_tokens_of_the_scope_that_is_needed(tmp_path: Path, home: Path) -> None:
    """A pull asks for no more than reading. Another client takes the same artifact by the same exchange."""
    pack = signed(tmp_path)
    with exchanging(RIGHTS, tmp_path) as tokens, running(tmp_path, tokens.auth) as registry:
        log_in(home, registry.host)
        address = registry.address("tickets")
        pushed = adapterpack.push(pack, address)
        assert set(tokens.asked) == {
            (USER, f"repository:team/tickets:{actions}") for actions in ("pull", "pull,push")
        }
        tokens.asked.clear()
        assert contents(adapterpack.pull(address, tmp_path / "ours").path) == contents(pack)
        assert set(tokens.asked) == {(USER, "repository:team/tickets:pull")}

        source = f"docker://{registry.host}/team/tickets@{pushed.commit}"
        login = ["--src-creds", f"{USER}:{PASSWORD}", "--src-tls-verify=false"]
        copy = [program("skopeo"), "copy", "-q", *login, source, f"dir:{tmp_path / 'theirs'}"]
        subprocess.run(copy, check=True)
        theirs = {path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
        unattached = {data for name, data in contents(pack).items() if name != "adapterpack.sig.json"}
        assert unattached < theirs


def test_what_was_not_granted_is_refused_in_a_sentence(tmp_path: Path, home: Path) -> None:
    """To whoever may only read, has another password, or none. No message repeats a password."""
    pack = signed(tmp_path)
    with exchanging(RIGHTS, tmp_path) as tokens, running(tmp_path, tokens.auth) as registry:
        address = registry.address("tickets")
        refused = rf"the registry does not permit this.*docker login {registry.host}"
        with pytest.raises(HubError, match=refused):
            adapterpack.pull(address)
        log_in(home, registry.host)
        pushed = adapterpack.push(pack, address)

        log_in(home, registry.host, "bob", "reads")
        assert adapterpack.pull(address).id == pushed.id
        with pytest.raises(HubError, match=refused):
            adapterpack.push(make_pack("other", seed=5).write(tmp_path / "other"), address)
        assert tokens.asked[-1] == ("bob", "repository:team/tickets:pull,push")
        assert adapterpack.pull(address, tmp_path / "still").commit == pushed.commit

        log_in(home, registry.host, USER, "guessed")
        with pytest.raises(HubError, match=refused) as error:
            adapterpack.pull(address)
        assert "guessed" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"{}", "the registry does not permit this"),
        (b'{"token": "a.b.c"}', "the registry does not permit this"),
        (b"[]", "does not answer as it should"),
        (b"<html>", "does not answer as it should"),
        (b'{"token": "x\\r\\nHost: elsewhere"}', "does not answer as it should"),
        ('{"access_token": "ä"}'.encode(), "does not answer as it should"),
        (b'{"token": 7}', "does not answer as it should"),
    ],
)
def test_a_service_without_a_token_is_refused(
    answer: bytes, message: str, tmp_path: Path, home: Path
) -> None:
    with exchanging(RIGHTS, tmp_path, answer) as tokens, running(tmp_path, tokens.auth) as registry:
        log_in(home, registry.host)
        with pytest.raises(HubError, match=message):
            adapterpack.pull(registry.address("tickets"))


def test_a_password_goes_to_no_service_without_tls(tmp_path: Path, home: Path) -> None:
    """But to one on this machine, for a registry on this machine."""
    with exchanging(RIGHTS, tmp_path) as tokens:
        tokens.realm = "http://tokens.example.com/token"
        with running(tmp_path, tokens.auth) as registry:
            log_in(home, registry.host)
            with pytest.raises(HubError, match="for a token to an address that is not https"):
                adapterpack.pull(registry.address("tickets"))
