"""Signatures: what was signed is verified, here and by OpenSSF's model-signing, and everything else is
refused by its own name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jsonschema import Draft202012Validator
from model_signing import hashing, signing, verifying

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.bundle.manifest import read_bundle
from adapterpack.cli.main import main
from adapterpack.errors import (
    AdapterpackError,
    ConfigError,
    FormatError,
    OutputExists,
    SignatureExpired,
    StorageError,
    TrustError,
    Unsigned,
    UnsupportedSignature,
    WronglySigned,
)
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build
from adapterpack.pack.trust import dsse, statement
from adapterpack.pack.trust.keys import private_key
from adapterpack.resources import schema

pytestmark = pytest.mark.fast

SIG, MANIFEST, TENSORS = "adapterpack.sig.json", "adapterpack.json", "adapter_model.safetensors"
REPORT = Draft202012Validator(schema("report.v1"))
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


class Keys(NamedTuple):
    private: Path
    public: Path


def make_keys(folder: Path, name: str = "key", curve: Any = None, password: bytes | None = None) -> Keys:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub")
    keys.private.write_bytes(key.private_bytes(PEM, PKCS8, protection))
    keys.public.write_bytes(
        key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid pack, not signed."""
    rng = np.random.default_rng(7)
    params = {
        "lora_A": rng.standard_normal((3, 7), dtype=np.float32),
        "lora_B": rng.standard_normal((5, 3), dtype=np.float32),
    }
    pack = build(
        "tickets",
        get("lora"),
        {Site("net.q", 7, 5): (LoRA(r=3, alpha=6), params)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("org/base"),
    )
    pack.write(tmp_path / "tickets")
    return tmp_path / "tickets"


def theirs_verifies(folder: Path, key: Path) -> None:
    verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, folder / SIG)


def theirs_signs(folder: Path, key: Path) -> None:
    config = hashing.Config().set_ignored_paths(paths=[SIG])
    signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(config).sign(
        folder, folder / SIG
    )


def call(*args: Any, **env: str) -> Result:
    return CliRunner(env=env).invoke(main, [str(arg) for arg in args], prog_name="adapterpack")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the envelope as someone without the key can."""
    value = json.loads((folder / SIG).read_bytes())
    change(value)
    (folder / SIG).write_text(json.dumps(value))


def seal(folder: Path, key: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A signature by the right key over another statement than ``sign`` would make."""
    payload = json.loads(base64.b64decode(json.loads((folder / SIG).read_bytes())["dsseEnvelope"]["payload"]))
    change(payload)
    (folder / SIG).write_bytes(dsse.seal(json.dumps(payload).encode(), private_key(key)))


# --- what holds ---------------------------------------------------------------------------------------------


def test_a_signature_covers_every_file_and_leaves_the_pack_as_it_was(folder: Path, keys: Keys) -> None:
    """verify(sign(pack)): the manifest and the closed list by sha256; id, validation and loading are
    unchanged.
    """
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = adapterpack.sign(folder, keys.private, identity="adapters@example.org", expires="2999-01-31")
    found = adapterpack.verify(folder, keys.public, identity="adapters@example.org")
    assert found == made
    assert found.files == {
        name: f"sha256:{hashlib.sha256(data).hexdigest()}" for name, data in before.items()
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SIG} == before
    assert adapterpack.validate(folder).valid
    assert adapterpack.load(folder).id == found.pack
    assert (found.identity, found.to_json()["expires"]) == ("adapters@example.org", "2999-01-31T23:59:59Z")
    assert found.key == f"sha256:{hashlib.sha256(keys.public.read_bytes()).hexdigest()}"
    assert adapterpack.verify(adapterpack.load(folder), keys.public) == found


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)
def test_model_signing_verifies_ours_and_we_verify_theirs(folder: Path, tmp_path: Path, curve: Any) -> None:
    """Both libraries, both directions, on every curve that both know; both refuse the same altered folder."""
    keys = make_keys(tmp_path, curve=curve)
    adapterpack.sign(folder, keys.private, expires="2999-01-31", identity="me")
    theirs_verifies(folder, keys.public)
    (folder / "README.md").write_text("a card")
    theirs_verifies(folder, keys.public)
    adapterpack.verify(folder, keys.public)
    (folder / SIG).unlink()
    theirs_signs(folder, keys.private)
    theirs = adapterpack.verify(folder, keys.public)
    assert set(theirs.files) == {MANIFEST, TENSORS, "adapter_config.json", "README.md"}
    assert theirs.pack == adapterpack.load(folder).id
    (folder / "README.md").write_text("another card")  # they sign what lies there, the card too
    with pytest.raises(WronglySigned, match=r"altered after signing \(at [^ ]*README.md"):
        adapterpack.verify(folder, keys.public)
    with pytest.raises(ValueError, match=r"Hash mismatch for .*README\.md"):
        theirs_verifies(folder, keys.public)


def test_peft_loads_a_signed_pack(folder: Path, keys: Keys) -> None:
    """The signature lies beside PEFT's two files and does not disturb it."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    adapterpack.sign(folder, keys.private)
    assert PeftConfig.from_pretrained(folder).peft_type == "LORA"
    assert {tuple(value.shape) for value in load_peft_weights(str(folder), device="cpu").values()} == {
        (3, 7),
        (5, 3),
    }


def test_openssl_makes_the_keys(folder: Path, tmp_path: Path) -> None:
    """The two lines that the help of ``sign`` shows, as they stand there."""
    lines = [
        line.split()
        for line in call("sign", "--help").stdout.splitlines()
        if line.strip().startswith("openssl")
    ]
    for line in lines:
        subprocess.run(line, cwd=tmp_path, check=True, capture_output=True)
    assert call("sign", folder, "--key", tmp_path / "key.pem").exit_code == 0
    assert call("verify", folder, "--key", tmp_path / "key.pub").exit_code == 0


# --- what does not: each by its name ------------------------------------------------------------------------


def test_unsigned_wrong_key_and_expired_differ(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """Three results, three errors, three codes; all are exit code 4."""
    with pytest.raises(Unsigned) as unsigned:
        adapterpack.verify(folder, keys.public)
    adapterpack.sign(folder, keys.private, expires=datetime.now(UTC) + timedelta(days=1))
    with pytest.raises(WronglySigned, match="another key") as wrong:
        adapterpack.verify(folder, make_keys(tmp_path, "other").public)
    with pytest.raises(SignatureExpired) as expired:
        adapterpack.verify(folder, keys.public, at=datetime.now(UTC) + timedelta(days=2))
    found = {error.value.code for error in (unsigned, wrong, expired)}
    assert found == {"unsigned", "wrongly-signed", "signature-expired"}
    assert {error.value.exit_code for error in (unsigned, wrong, expired)} == {4}
    adapterpack.verify(folder, keys.public)


def test_the_hint_is_not_what_is_trusted(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """A forger who writes the right key's digest beside his own signature is refused by the curve, not by the
    hint.
    """
    adapterpack.sign(folder, make_keys(tmp_path, "forger").private)
    hint = hashlib.sha256(keys.public.read_bytes()).hexdigest()
    edit(folder, lambda value: value["verificationMaterial"]["publicKey"].update(hint=hint))
    with pytest.raises(WronglySigned, match="not one of this key"):
        adapterpack.verify(folder, keys.public)


ENVELOPE: dict[str, Callable[[dict[str, Any]], object]] = {
    "media type": lambda v: v.update(mediaType="application/vnd.dev.sigstore.bundle+json;version=0.1"),
    "no media type": lambda v: v.pop("mediaType"),
    "more in the bundle": lambda v: v.update(more=1),
    "hint": lambda v: v["verificationMaterial"]["publicKey"].update(hint="0" * 64),
    "no hint": lambda v: v["verificationMaterial"].update(publicKey={}),
    "no material": lambda v: v.pop("verificationMaterial"),
    "payload": lambda v: v["dsseEnvelope"].update(payload=base64.b64encode(b"{}").decode()),
    "payload with a blank": lambda v: v["dsseEnvelope"].update(payload=v["dsseEnvelope"]["payload"] + "\n"),
    "payload a number": lambda v: v["dsseEnvelope"].update(payload=1),
    "no payload": lambda v: v["dsseEnvelope"].update(payload=""),
    "payload type": lambda v: v["dsseEnvelope"].update(payloadType="application/json"),
    "no signature": lambda v: v["dsseEnvelope"].update(signatures=[]),
    "two signatures": lambda v: v["dsseEnvelope"]["signatures"].append(v["dsseEnvelope"]["signatures"][0]),
    "signature of nothing": lambda v: v["dsseEnvelope"]["signatures"][0].update(
        sig=base64.b64encode(b"\x30\x00").decode()
    ),
    "signature not base64": lambda v: v["dsseEnvelope"]["signatures"][0].update(sig="*" * 96),
    "key id": lambda v: v["dsseEnvelope"]["signatures"][0].update(keyid="mine"),
    "a list": lambda v: v.update(dsseEnvelope=[]),
}


@pytest.mark.parametrize("part", ENVELOPE)
def test_every_part_of_the_envelope_is_fixed(folder: Path, keys: Keys, part: str) -> None:
    """Whatever is changed in the signature file, it is wrongly signed."""
    adapterpack.sign(folder, keys.private)
    edit(folder, ENVELOPE[part])
    with pytest.raises(WronglySigned):
        adapterpack.verify(folder, keys.public)


def test_every_byte_of_the_signature_file_is_fixed(folder: Path, keys: Keys) -> None:
    """A changed or lost byte anywhere is detected; blanks between the parts of the JSON apart, nothing is
    free.
    """
    adapterpack.sign(folder, keys.private)
    data = (folder / SIG).read_bytes()
    rng = np.random.default_rng(3)
    for position in sorted(rng.choice(len(data), 150, replace=False)):
        if data[position : position + 1] in b" \n":
            continue
        for spoiled in (
            data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :],
            data[:position],
        ):
            (folder / SIG).write_bytes(spoiled)
            with pytest.raises(WronglySigned):
                adapterpack.verify(folder, keys.public)
    for rubbish in (b"", b"[]", b"null", b"\xff", b"[" * 5000, b'{"a": 1, "a": 1}', b" " * (2 << 20)):
        (folder / SIG).write_bytes(rubbish)
        with pytest.raises(WronglySigned):
            adapterpack.verify(folder, keys.public)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS, "adapter_config.json"])
@pytest.mark.parametrize("how", ["altered", "missing"])
def test_a_file_that_changed_after_signing_is_named(folder: Path, keys: Keys, name: str, how: str) -> None:
    """Wrongly signed, and where says which file."""
    adapterpack.sign(folder, keys.private)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data) if how == "altered" else (folder / name).unlink()
    with pytest.raises(WronglySigned, match=how) as error:
        adapterpack.verify(folder, keys.public)
    assert error.value.where == str(folder / name)


def test_a_file_that_was_added_is_named(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """Nothing but what a hub edits may lie beside the signed files, and no link or folder at all."""
    adapterpack.sign(folder, keys.private)
    (folder / "README.md").write_text("a card")
    adapterpack.verify(folder, keys.public)
    for make in (Path.touch, Path.mkdir, lambda path: path.symlink_to(tmp_path / "key.pem"), os.mkfifo):
        make(folder / "evil.bin")
        with pytest.raises(WronglySigned) as error:
            adapterpack.verify(folder, keys.public)
        assert error.value.where == str(folder / "evil.bin")
        shutil.rmtree(folder / "evil.bin") if (folder / "evil.bin").is_dir() else (
            folder / "evil.bin"
        ).unlink()
    (folder / SIG).rename(tmp_path / SIG)
    (folder / SIG).symlink_to(tmp_path / SIG)
    with pytest.raises(WronglySigned, match="regular files"):
        adapterpack.verify(folder, keys.public)


def test_a_signature_of_another_pack_is_refused(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """The envelope of one pack beside the files of another: right key, wrong files."""
    other = tmp_path / "other"
    adapterpack.load(folder).renamed("other").write(other)
    adapterpack.sign(other, keys.private)
    shutil.copy(other / SIG, folder / SIG)
    with pytest.raises(WronglySigned, match=MANIFEST):
        adapterpack.verify(folder, keys.public)


def _resource(value: dict[str, Any], **change: str) -> None:
    value["predicate"]["resources"][0].update(change)


def _add_up(value: dict[str, Any]) -> None:
    digests = b"".join(bytes.fromhex(resource["digest"]) for resource in value["predicate"]["resources"])
    value["subject"][0]["digest"]["sha256"] = hashlib.sha256(digests).hexdigest()


def _without(value: dict[str, Any], name: str) -> None:
    value["predicate"]["resources"] = [one for one in value["predicate"]["resources"] if one["name"] != name]
    _add_up(value)


STATEMENTS: dict[str, tuple[type[TrustError], Callable[[dict[str, Any]], object]]] = {
    "another statement": (UnsupportedSignature, lambda v: v.update(_type="https://in-toto.io/Statement/v2")),
    "another predicate": (
        UnsupportedSignature,
        lambda v: v.update(predicateType="https://slsa.dev/provenance/v1"),
    ),
    "by shards": (UnsupportedSignature, lambda v: v["predicate"]["serialization"].update(method="shards")),
    "another hash": (UnsupportedSignature, lambda v: _resource(v, algorithm="blake3")),
    "a limit that we do not know": (
        UnsupportedSignature,
        lambda v: v["predicate"]["adapterpack"].update(only_for="tests"),
    ),
    "two subjects": (WronglySigned, lambda v: v["subject"].append(v["subject"][0])),
    "no subject": (WronglySigned, lambda v: v.update(subject=[])),
    "digests that do not add up": (
        WronglySigned,
        lambda v: v["subject"][0]["digest"].update(sha256="0" * 64),
    ),
    "a path": (WronglySigned, lambda v: _resource(v, name="../adapterpack.json")),
    "no digest": (WronglySigned, lambda v: _resource(v, digest="")),
    "no predicate": (WronglySigned, lambda v: v.pop("predicate")),
    "an expiry that is none": (WronglySigned, lambda v: v["predicate"]["adapterpack"].update(expires="soon")),
    "an expiry that is a number": (WronglySigned, lambda v: v["predicate"]["adapterpack"].update(expires=5)),
    "no manifest": (WronglySigned, lambda v: _without(v, MANIFEST)),
    "no tensors": (WronglySigned, lambda v: _without(v, TENSORS)),
}


@pytest.mark.parametrize("case", STATEMENTS)
def test_a_right_signature_over_a_wrong_statement(folder: Path, keys: Keys, case: str) -> None:
    """The key alone is not enough: the statement must be one over exactly this pack's files."""
    adapterpack.sign(folder, keys.private)
    error, change = STATEMENTS[case]
    seal(folder, keys.private, change)
    with pytest.raises(error) as raised:
        adapterpack.verify(folder, keys.public)
    assert type(raised.value) is error


def test_a_signed_stranger_in_the_folder_is_refused(folder: Path, keys: Keys) -> None:
    """model-signing signs whatever lies there; what the manifest does not list is no part of a pack all the
    same.
    """
    (folder / "modeling.py").write_text("import os")
    theirs_signs(folder, keys.private)
    theirs_verifies(folder, keys.public)
    with pytest.raises(WronglySigned, match=r"does not list \(at [^ ]*modeling.py"):
        adapterpack.verify(folder, keys.public)


def test_a_certificate_is_said_to_be_unsupported(folder: Path, keys: Keys) -> None:
    """Keyless signatures are another matter than wrong ones."""
    adapterpack.sign(folder, keys.private)
    edit(
        folder,
        lambda value: value.update(
            verificationMaterial={"certificate": {"rawBytes": "AA=="}, "tlogEntries": [{"logIndex": 1}]}
        ),
    )
    with pytest.raises(UnsupportedSignature, match="certificate"):
        adapterpack.verify(folder, keys.public)


def test_nothing_is_parsed_before_the_signature_is_known_to_be_right(
    folder: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a wrong signature neither the statement nor the manifest is read: both are replaced by something
    that explodes.
    """
    adapterpack.sign(folder, keys.private)
    edit(folder, lambda value: value["dsseEnvelope"].update(payload=base64.b64encode(b"{" * 999).decode()))

    def explode(*args: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(statement, "read", explode)
    monkeypatch.setattr(m, "parse", explode)
    with pytest.raises(WronglySigned, match="not one of this key"):
        adapterpack.verify(folder, keys.public)


def test_the_identity_is_signed(folder: Path, keys: Keys) -> None:
    """A policy on the identity is compared with what was signed; none was signed is another identity too."""
    adapterpack.sign(folder, keys.private, identity="alice")
    with pytest.raises(WronglySigned, match="'bob', found 'alice'"):
        adapterpack.verify(folder, keys.public, identity="bob")
    (folder / SIG).unlink()
    adapterpack.sign(folder, keys.private)
    with pytest.raises(WronglySigned, match="another identity"):
        adapterpack.verify(folder, keys.public, identity="alice")


# --- what cannot be signed ----------------------------------------------------------------------------------


def test_only_a_valid_pack_is_signed_and_only_once(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """An altered pack, a PEFT folder, a missing folder, a second signature: refused, and nothing is left
    behind.
    """
    shutil.copytree(folder, tmp_path / "peft", ignore=shutil.ignore_patterns(MANIFEST))
    with pytest.raises(FormatError, match="manifest"):
        adapterpack.sign(tmp_path / "peft", keys.private)
    with pytest.raises(StorageError):
        adapterpack.sign(tmp_path / "nowhere", keys.private)
    adapterpack.sign(folder, keys.private)
    with pytest.raises(OutputExists):
        adapterpack.sign(folder, keys.private)
    (folder / SIG).unlink()
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(FormatError, match="AP204"):
        adapterpack.sign(folder, keys.private)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", TENSORS, MANIFEST]


@pytest.mark.parametrize("when", ["2001-01-01", "2999-02-30", "soon", "2999-01-01T00:00:00", "99999-01-01"])
def test_an_expiry_is_a_date_to_come(folder: Path, keys: Keys, when: str) -> None:
    with pytest.raises(ConfigError, match="expiry"):
        adapterpack.sign(folder, keys.private, expires=when)
    assert not (folder / SIG).exists()


def test_keys_that_cannot_be_used(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """Each with its reason, and never with a byte of the private key."""
    locked = make_keys(tmp_path, "locked", password=b"sesame")
    odd = make_keys(tmp_path, "odd", curve=ec.SECP256K1())
    (tmp_path / "rsa.pem").write_bytes(
        rsa.generate_private_key(65537, 2048).private_bytes(PEM, PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "text.pem").write_text("-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n")
    cases: list[tuple[Path, str | None, str]] = [
        (keys.public, None, "public key"), (odd.private, None, "secp256k1"),
        (tmp_path / "rsa.pem", None, "RSA"), (tmp_path / "text.pem", None, "cannot be read"),
        (locked.private, None, "password"), (locked.private, "wrong", "cannot be read"),
        (keys.private, "needless", "password"),
    ]  # fmt: skip
    for path, password, said in cases:
        with pytest.raises(ConfigError, match=said):
            adapterpack.sign(folder, path, password=password)
    with pytest.raises(StorageError, match="no such key"):
        adapterpack.sign(folder, tmp_path / "none.pem")
    adapterpack.sign(folder, locked.private, password="sesame")
    for path, said in (
        (keys.private, "private key"),
        (odd.public, "secp256k1"),
        (tmp_path / "tickets" / MANIFEST, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            adapterpack.verify(folder, path)
    adapterpack.verify(folder, locked.public)


# --- the command line ---------------------------------------------------------------------------------------


class Tomorrow(datetime):
    """A clock that is a day ahead."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        """The time in a day."""
        return datetime.now(tz) + timedelta(days=1)


def test_commands_and_exit_codes(
    folder: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 signed and verified, 1 a named error, 2 usage, 4 trust: unsigned, wrong key, expired, altered; JSON
    fits the schema.
    """
    other = make_keys(tmp_path, "other").public

    def refused(key: Path, code: str) -> None:
        done = call("verify", folder, "--key", key, "--json")
        value = json.loads(done.stdout)
        REPORT.validate(value)
        assert (done.exit_code, value["command"], value["error"]["code"]) == (4, "verify", code)

    refused(keys.public, "unsigned")
    end = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    done = call("sign", folder, "--key", keys.private, "--expires", end, "--identity", "me \u202e", "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    REPORT.validate(value)
    assert (value["command"], value["expires"], value["signature"]) == ("sign", end, str(folder / SIG))
    done = call("verify", folder, "--key", keys.public, "--json")
    assert done.exit_code == 0, done.output
    REPORT.validate(json.loads(done.stdout))
    assert json.loads(done.stdout) == {**value, "command": "verify"}
    assert "\u202e" not in call("verify", folder, "--key", keys.public).output
    assert call("sign", folder, "--key", keys.private).exit_code == 1
    assert call("verify", folder).exit_code == 2
    refused(other, "wrongly-signed")
    assert call("verify", folder, "--key", keys.public, "--identity", "you").exit_code == 4
    monkeypatch.setattr("adapterpack.pack.trust.sign.datetime", Tomorrow)
    refused(keys.public, "signature-expired")
    (folder / "evil.bin").touch()
    refused(keys.public, "wrongly-signed")


def test_no_private_key_reaches_any_output(folder: Path, tmp_path: Path) -> None:
    """Neither what is printed, with and without a traceback, nor what is written holds a line of the key file
    or its password.
    """
    keys = make_keys(tmp_path, "locked", password=b"open-sesame-77")
    plain = make_keys(tmp_path, "plain")
    broken = tmp_path / "broken.pem"
    broken.write_bytes(plain.private.read_bytes().replace(b"MI", b"MA", 1))
    secrets = ["open-sesame-77"]
    for path in (keys.private, plain.private, broken):
        secrets += [line for line in path.read_text().splitlines() if not line.startswith("-----")]
    scalar = private_key(plain.private).private_numbers().private_value  # type: ignore[attr-defined]
    secrets += [str(scalar), f"{scalar:x}"]
    said = ""
    for key, password in (
        (broken, ""),
        (keys.private, "wrong"),
        (keys.private, None),
        (plain.private, None),
        (plain.private, "x"),
    ):
        env = {} if not password else {"ADAPTERPACK_KEY_PASSWORD": password}
        for flags in ((), ("--json",), ("--traceback",)):
            (folder / SIG).unlink(missing_ok=True)
            said += call("sign", folder, "--key", key, *flags, **env).output
    (folder / SIG).unlink(missing_ok=True)
    done = call("sign", folder, "--key", keys.private, "--json", ADAPTERPACK_KEY_PASSWORD="open-sesame-77")
    assert done.exit_code == 0
    said += (
        done.output
        + call("verify", folder, "--key", keys.private, "--traceback").output
        + (folder / SIG).read_text()
    )
    assert "Traceback" in said
    assert [secret for secret in secrets if secret in said] == []


def test_without_cryptography_the_extra_is_named(folder: Path, keys: Keys) -> None:
    """A real process in which the package cannot be imported: one sentence that says what to install;
    importing adapterpack is free.
    """
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import adapterpack\n"
        "try:\n    adapterpack.sign(*sys.argv[1:])\n"
        "except adapterpack.AdapterpackError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(keys.private)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install 'adapterpack[sign]'" in done.stdout
    program = (
        "import sys, adapterpack.pack.trust.sign, adapterpack.cli.commands.sign; assert 'cryptography' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_trust_error_is_exit_code_4() -> None:
    """The hierarchy, and that every code is another one."""
    errors = [TrustError, *TrustError.__subclasses__()]
    assert {error.exit_code for error in errors} == {4}
    assert len({error.code for error in errors}) == len(errors) == 6
    assert all(issubclass(error, AdapterpackError) for error in errors)


# Bundles.


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_of("llama", "inputs"), tmp_path / "bundle"))


def test_a_bundle_is_signed_and_verified(bundle: Path, tmp_path: Path) -> None:
    """Over the manifest and all files that it lists; the bundle stays valid, opens, and OpenSSF's
    model-signing agrees.
    """
    keys = make_keys(tmp_path)
    signed = adapterpack.sign(bundle, keys.private, identity="exports@example.org", expires="2100-01-01")
    assert signed == adapterpack.verify(bundle, keys.public, identity="exports@example.org")
    listed = json.loads((bundle / "adapterpack.bundle.json").read_bytes())["files"]
    assert set(signed.files) == {"adapterpack.bundle.json", *(entry["path"] for entry in listed)}
    assert (
        signed.pack
        == "sha256:" + hashlib.sha256((bundle / "adapterpack.bundle.json").read_bytes()).hexdigest()
    )
    assert not adapterpack.validate(bundle).findings
    assert adapterpack.Session(bundle, "cpu").adapters == ["alpha", "beta"]
    result = CliRunner().invoke(main, ["verify", str(bundle), "--key", str(keys.public)])
    assert result.exit_code == 0 and f"none of {len(signed.files)} files was altered" in result.output
    with pytest.raises(OutputExists, match="the bundle has a signature already"):
        adapterpack.sign(bundle, keys.private)


def test_bundles_that_are_not_what_was_signed(bundle: Path, tmp_path: Path) -> None:
    """Unsigned, another key, altered and added files, a manifest written anew, an expiry: each by its name,
    with exit code 4.
    """
    keys, others = make_keys(tmp_path), make_keys(tmp_path, "other")
    with pytest.raises(Unsigned, match="the bundle is not signed"):
        adapterpack.verify(bundle, keys.public)
    adapterpack.sign(bundle, keys.private, expires=datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(WronglySigned, match="another key"):
        adapterpack.verify(bundle, others.public)
    with pytest.raises(SignatureExpired):
        adapterpack.verify(bundle, keys.public, at=datetime.now(UTC) + timedelta(days=1))
    (bundle / "adapters" / "more.json").write_text("{}")
    with pytest.raises(WronglySigned, match=r"not signed lies in the bundle.*more\.json"):
        adapterpack.verify(bundle, keys.public)
    (bundle / "adapters" / "more.json").unlink()
    manifest, graph = bundle / "adapterpack.bundle.json", bundle / "model.onnx"
    before = manifest.read_bytes(), graph.read_bytes()
    graph.write_bytes(before[1] + b"\x12\x01x")  # a producer's name: a graph as good as the old one
    read_bundle(bundle).write(bundle)
    assert not adapterpack.validate(bundle).findings
    result = CliRunner().invoke(main, ["verify", str(bundle), "--key", str(keys.public)])
    assert result.exit_code == 4 and "altered after signing" in result.output
    manifest.write_bytes(before[0])
    with pytest.raises(WronglySigned, match=r"altered after signing.*model\.onnx"):
        adapterpack.verify(bundle, keys.public)
    graph.write_bytes(before[1])
    adapterpack.verify(bundle, keys.public)
    graph.unlink()
    graph.symlink_to("/dev/zero")
    with pytest.raises(WronglySigned, match="only regular files"):
        adapterpack.verify(bundle, keys.public)


def test_only_a_valid_bundle_is_signed(bundle: Path, tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"not valid, AB104.*tokenizer\.json"):
        adapterpack.sign(bundle, keys.private)
    assert not (bundle / SIG).exists()


def test_help_says_that_bundles_can_be_signed() -> None:
    for command in ("sign", "verify"):
        text = CliRunner().invoke(main, [command, "--help"]).output
        assert "PACK|FLEET|BUNDLE" in text and "a pack, a fleet or a bundle" in text
