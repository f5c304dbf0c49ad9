"""Signatures under an identity: made by the services of sigstore that run here (its own @sigstore/mock, with real
keys, certificates, logs and timestamps), or by its public instance, and verified without a network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from model_signing import hashing, signing, verifying
from sigstore.dsse import Statement
from sigstore.models import ClientTrustConfig
from sigstore.oidc import IdentityToken
from sigstore.sign import SigningContext
from sites import fetched, npm
from test_sign import REPORT, SIG, TENSORS, Keys, call, edit, folder, keys  # noqa: F401 - fixtures

import adapterpack
from adapterpack import SigstoreIdentity, SigstoreSigner
from adapterpack.errors import ConfigError, Revoked, TrustError, UnsupportedSignature, WronglySigned
from adapterpack.pack.trust.sign import Signable, Signers, unseal

FOLDER = Path(__file__).parent / "sigstore"
WHO, ISSUER = "https://example.org/adapters/release@main", "https://issuer.example"
pytestmark = npm


def token(subject: str = WHO, lasts: int = 600) -> str:
    """An identity token, unsigned: the authority here believes what a real one verifies."""
    now = int(time.time())
    claims = {
        "aud": "sigstore",
        "iss": ISSUER,
        "sub": subject,
        "iat": now,
        "nbf": now - 60,
        "exp": now + lasts,
    }
    parts = (json.dumps({"alg": "none", "kid": "x"}), json.dumps(claims), "signature")
    return ".".join(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts)


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the trust config of each of three instances that run here."""
    try:
        packages = fetched(FOLDER)
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"keyless signing was NOT tested, npm reached no registry: {error.stderr.decode()[:300]}")
    services = subprocess.Popen(
        ["node", FOLDER / "services.cjs"],
        env={**os.environ, "NODE_PATH": str(packages)},
        stdout=subprocess.PIPE,
    )
    assert services.stdout is not None
    at = tmp_path_factory.mktemp("instances")
    for name, config in json.loads(services.stdout.readline()).items():
        (at / f"{name}.json").write_text(json.dumps(config))
    (at / "token").write_text(token())
    yield at
    services.kill()
    services.wait()


@pytest.fixture
def ours(instances: Path) -> SigstoreIdentity:
    """Who signs, where nothing else is said."""
    return SigstoreIdentity(WHO, ISSUER, instances / "ours.json")


@pytest.fixture
def signed(folder: Path, instances: Path) -> Path:  # noqa: F811 - the fixture
    """A pack that is signed under that identity."""
    adapterpack.sign(
        folder, SigstoreSigner(instances / "token", instances / "ours.json"), expires="2999-01-31"
    )
    return folder


def refused(pack: Path, who: Any, said: str, kind: type[TrustError] = WronglySigned) -> None:
    """Verifying raises this error, in one sentence with this in it."""
    with pytest.raises(kind, match=said) as error:
        adapterpack.verify(pack, who)
    assert "To fix it: " in str(error.value) and "\n" not in str(error.value)


def test_an_identity_signs_and_is_verified_without_a_network(
    signed: Path, ours: SigstoreIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over every file, with the certificate as the key; the bundle holds certificate, log and timestamp."""

    def connect(*args: Any) -> None:
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    found = adapterpack.verify(signed, ours)
    assert (found.identity, found.issuer, found.name) == (WHO, ISSUER, "tickets")
    assert found.files[TENSORS] == f"sha256:{hashlib.sha256((signed / TENSORS).read_bytes()).hexdigest()}"
    material = json.loads((signed / SIG).read_bytes())["verificationMaterial"]
    certificate = base64.b64decode(material["certificate"]["rawBytes"])
    assert found.key == f"sha256:{hashlib.sha256(certificate).hexdigest()}"
    assert material["tlogEntries"][0]["inclusionProof"] and material["timestampVerificationData"]
    assert adapterpack.validate(signed).valid


def test_model_signing_agrees(folder: Path, signed: Path, instances: Path, ours: SigstoreIdentity) -> None:  # noqa: F811
    """Its sigstore verifier takes our signature, and we take that of its signer."""
    trust = {"trust_config": instances / "ours.json"}
    verifying.Config().use_sigstore_verifier(identity=WHO, oidc_issuer=ISSUER, **trust).verify(
        signed, signed / SIG
    )
    (folder / SIG).unlink()
    config = hashing.Config().set_ignored_paths(paths=[SIG])
    theirs = signing.Config().use_sigstore_signer(identity_token=token(), **trust).set_hashing_config(config)
    theirs.sign(folder, folder / SIG)
    assert adapterpack.verify(folder, ours).issuer == ISSUER


def test_a_signature_by_the_public_instance(tmp_path: Path) -> None:
    """A model that sigstore's project signed in 2025, with the roots that the library ships."""
    at = shutil.copytree(FOLDER / "model", tmp_path / "model")
    (at / "model.sig").rename(at / SIG)
    model = Signable(
        "model",
        at,
        "signme-1",
        frozenset({"README.md", SIG}),
        lambda: iter(()),
        lambda: {path.name for path in at.iterdir()},
        lambda data: {"signme-2"},
    )
    who = "stefanb@us.ibm.com", "https://sigstore.verify.ibm.com/oauth2"
    found = unseal(model, SigstoreIdentity(*who))
    assert (found.identity, found.issuer, len(found.files)) == (*who, 2)
    (at / "signme-2").write_text("another")
    with pytest.raises(WronglySigned, match="altered"):
        unseal(model, SigstoreIdentity(*who))
    with pytest.raises(WronglySigned, match="OIDCIssuer does not match"):
        unseal(model, SigstoreIdentity(who[0], "https://accounts.google.com"))


def test_other_signers_are_refused(
    signed: Path,
    instances: Path,
    ours: SigstoreIdentity,
    keys: Keys,  # noqa: F811
) -> None:
    """Each with its reason: identity, issuer, instance, and a key where an identity is trusted or the reverse."""
    config = instances / "ours.json"
    refused(signed, SigstoreIdentity(f"{WHO}2", ISSUER, config), "SANs do not match")
    refused(signed, SigstoreIdentity(WHO, f"{ISSUER}/x", config), "OIDCIssuer does not match")
    refused(signed, SigstoreIdentity(WHO, ISSUER, instances / "theirs.json"), "certificate chain")
    refused(signed, SigstoreIdentity(WHO, ISSUER), "certificate chain")
    refused(signed, keys.public, "more than a local key", UnsupportedSignature)
    Signers([keys.public, ours]).require(adapterpack.load(signed))
    (signed / SIG).unlink()
    adapterpack.sign(signed, keys.private)
    refused(signed, ours, "not one of an identity", UnsupportedSignature)
    Signers([ours, keys.public]).require(adapterpack.load(signed))
    with pytest.raises(UnsupportedSignature):
        Signers([ours]).require(adapterpack.load(signed))
    rootless = json.loads(config.read_text())
    for part in ("tlogs", "certificateAuthorities"):
        broken = instances / f"without-{part}.json"
        broken.write_text(json.dumps({**rootless, "trustedRoot": {**rootless["trustedRoot"], part: []}}))
        with pytest.raises(ConfigError, match="trust configuration cannot be used"):
            SigstoreIdentity(WHO, ISSUER, broken)
    for empty in (("", ISSUER), (WHO, "")):
        with pytest.raises(ConfigError, match="with its issuer"):
            SigstoreIdentity(*empty)


def entry(value: dict[str, Any]) -> dict[str, Any]:
    """The log's entry."""
    return value["verificationMaterial"]["tlogEntries"][0]


def payload(value: dict[str, Any]) -> None:
    """Another expiry in what was signed."""
    envelope = value["dsseEnvelope"]
    said = base64.b64decode(envelope["payload"]).replace(b"2999", b"3999")
    envelope["payload"] = base64.b64encode(said).decode()


ALTERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "statement": (payload, "DSSE: invalid signature"),
    "type": (lambda v: v["dsseEnvelope"].update(payloadType="text/plain"), "DSSE: invalid signature"),
    "entry": (lambda v: entry(v).update(canonicalizedBody="e30="), "invalid log entry"),
    "time": (lambda v: entry(v).update(integratedTime="1796200000"), "certificate chain|invalid log entry"),
    "promise": (
        lambda v: entry(v)["inclusionPromise"].update(signedEntryTimestamp="MAYCAQECAQE="),
        "invalid log entry",
    ),
    "checkpoint": (
        lambda v: entry(v)["inclusionProof"]["checkpoint"].update(envelope="x"),
        "invalid log entry",
    ),
    "no proof": (lambda v: entry(v).pop("inclusionProof"), "inclusionProof"),
    "no entry": (lambda v: v["verificationMaterial"].update(tlogEntries=[]), "one log entry"),
    "no checkpoint": (lambda v: entry(v)["inclusionProof"].pop("checkpoint"), "checkpoint"),
    "certificate": (
        lambda v: v["verificationMaterial"]["certificate"].update(rawBytes="AAAA"),
        "does not vouch",
    ),
    "no certificate": (lambda v: v["verificationMaterial"].pop("certificate"), "not one of an identity"),
    "two signatures": (
        lambda v: v["dsseEnvelope"].update(signatures=v["dsseEnvelope"]["signatures"] * 2),
        "one",
    ),
}


@pytest.mark.parametrize("part", ALTERED)
def test_what_was_altered_is_refused(signed: Path, ours: SigstoreIdentity, part: str) -> None:
    """The statement, the entry of the log, its proof, the certificate: each in a sentence of its own."""
    change, said = ALTERED[part]
    edit(signed, change)
    refused(signed, ours, said, TrustError)


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and its key there."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from leaves(inner)


def test_no_part_of_the_bundle_brings_another_error(signed: Path, ours: SigstoreIdentity) -> None:
    """Every place of it with every odd value is refused by name, or says what was signed."""
    data, good = (signed / SIG).read_bytes(), adapterpack.verify(signed, ours)
    count = sum(1 for _ in leaves(json.loads(data)))
    free = set()
    for odd in (None, "", "AAAA", "é", -1, 1 << 70, [], {}, [[]], "\ud800", True, 0.5):
        for number in range(count):
            value = json.loads(data)
            holder, key = list(leaves(value))[number]
            holder[key] = odd
            (signed / SIG).write_text(json.dumps(value))
            try:
                assert adapterpack.verify(signed, ours) == good
                free.add(key)
            except TrustError:
                pass
    promise = {
        "inclusionPromise",
        "integratedTime",
    }  # needless beside a timestamp, which is needless beside them
    assert free <= promise | {"timestampVerificationData", "rfc3161Timestamps", "hashes"}


def test_a_file_that_is_too_large_is_not_parsed(signed: Path, ours: SigstoreIdentity) -> None:
    """100 MB of a valid signature and blanks: refused by its size, in a moment."""
    with (signed / SIG).open("ab") as file:
        file.write(b" " * 100_000_000)
    began = time.process_time()
    refused(signed, ours, "cannot be read")
    assert time.process_time() - began < 1


def test_a_signature_after_the_certificate_expired(signed: Path, instances: Path) -> None:
    """A log and a timestamp authority an hour ahead: we do not write such a signature, and refuse one."""
    config = instances / "late.json"
    context = SigningContext.from_trust_config(ClientTrustConfig.from_json(config.read_text()))
    statement = Statement(
        base64.b64decode(json.loads((signed / SIG).read_bytes())["dsseEnvelope"]["payload"])
    )
    with context.signer(IdentityToken(token())) as signer:
        (signed / SIG).write_text(signer.sign_dsse(statement).to_json())
    refused(signed, SigstoreIdentity(WHO, ISSUER, config), "certificate chain: .*(not valid|expired)")
    (signed / SIG).unlink()
    with pytest.raises(WronglySigned, match=r"certificate chain: .*(not valid|expired)"):
        adapterpack.sign(signed, SigstoreSigner(instances / "token", config))
    assert not (signed / SIG).exists()


def test_a_revoked_certificate_is_refused(
    signed: Path, ours: SigstoreIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever verifies the signature, and by whoever opens the pack."""
    revoked = tmp_path / "revoked.json"
    listed = {adapterpack.verify(signed, ours).key: "the workflow was not ours"}
    revoked.write_text(json.dumps({"format": "adapterpack.revoked", "version": 1, "entries": listed}))
    monkeypatch.setenv("ADAPTERPACK_REVOKED", str(revoked))
    refused(signed, ours, "was not ours", Revoked)
    with pytest.raises(Revoked, match="was not ours"):
        adapterpack.load(signed)


class Tokens(BaseHTTPRequestHandler):
    """GitHub's address at which a job asks for its identity token."""

    def do_GET(self) -> None:
        """Answers with one for sigstore."""
        right = "audience=sigstore" in self.path and self.headers["Authorization"] == "bearer job"
        self.send_response(200 if right else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"value": token()}).encode())

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


def test_where_the_identity_token_comes_from(folder: Path, instances: Path) -> None:  # noqa: F811
    """A file, the environment, a job of GitHub's; nowhere, expired or rubbish, it is said, and nothing is written.
    No output holds the token.
    """
    config, without = instances / "ours.json", {"GITHUB_ACTIONS": "", "CI": ""}
    secret = token()
    with ThreadingHTTPServer(("127.0.0.1", 0), Tokens) as github:
        Thread(target=github.serve_forever, daemon=True).start()
        job = {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "job",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"http://127.0.0.1:{github.server_port}/?v=1",
        }
        for more, env in (
            (("--identity-token", instances / "token"), without),
            ((), without | {"SIGSTORE_ID_TOKEN": secret}),
            ((), job),
        ):
            done = call("sign", folder, "--keyless", "--trust-config", config, *more, "--json", **env)
            assert done.exit_code == 0, done.output
            REPORT.validate(json.loads(done.stdout))
            assert (json.loads(done.stdout)["identity"], secret in done.output) == (WHO, False)
            (folder / SIG).unlink()
        github.shutdown()
    late, rubbish = token(lasts=-30), "no.token.at-all"
    for env, said, code in (
        (without, "there is no identity token", 1),
        (without | {"SIGSTORE_ID_TOKEN": late}, "Signature has expired", 1),
        (without | {"SIGSTORE_ID_TOKEN": rubbish}, "sigstore did not sign", 1),
        ({"GITHUB_ACTIONS": "true"}, "insufficient OIDC token permissions", 1),
    ):
        done = call("sign", folder, "--keyless", "--trust-config", config, "--traceback", **env)
        assert (done.exit_code, said in done.output) == (code, True), done.output
        assert late not in done.output and rubbish not in done.output
        assert not (folder / SIG).exists()


def test_at_a_terminal_a_browser_asks_who_one_is(folder: Path, instances: Path, tmp_path: Path) -> None:  # noqa: F811
    """A real process at a terminal of its own, whose browser follows the provider's addresses."""
    browser = tmp_path / "browser"
    browser.write_text(
        f"#!{sys.executable}\nimport sys, urllib.request\nurllib.request.urlopen(sys.argv[1]).read()\n"
    )
    browser.chmod(0o700)
    ours, theirs = os.openpty()
    without = {"GITHUB_ACTIONS": "", "CI": "", "SIGSTORE_ID_TOKEN": ""}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "adapterpack",
            "sign",
            folder,
            "--keyless",
            "--trust-config",
            instances / "ours.json",
        ],
        check=False,
        stdin=theirs,
        env={**os.environ, **without, "BROWSER": f"{browser} %s"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    for end in (ours, theirs):
        os.close(end)
    assert done.returncode == 0, done.stderr
    assert "as person@example.org, by http://127.0.0.1:" in done.stdout


def test_commands_and_exit_codes(signed: Path, instances: Path, keys: Keys) -> None:  # noqa: F811
    """0 verified, 1 a trust config that is none, 2 usage, 4 another identity; a server takes nobody else's pack."""
    trust = "--trust-config", instances / "ours.json"
    done = call("verify", signed, "--identity", WHO, "--issuer", ISSUER, *trust, "--json")
    assert done.exit_code == 0, done.output
    REPORT.validate(json.loads(done.stdout))
    shown = call("verify", signed, "--identity", WHO, "--issuer", ISSUER, *trust).output
    assert f"identity: {WHO} (by {ISSUER}); it holds until 2999-01-31" in shown
    assert call("verify", signed, "--identity", "you", "--issuer", ISSUER, *trust).exit_code == 4
    none = "--trust-config", keys.public
    assert call("verify", signed, "--identity", WHO, "--issuer", ISSUER, *none).exit_code == 1
    for wrong in (
        ("verify", signed, "--identity", WHO),
        ("verify", signed, "--issuer", ISSUER),
        ("verify", signed, "--key", keys.public, "--issuer", ISSUER),
        ("sign", signed),
        ("sign", signed, "--key", keys.private, "--keyless"),
        ("sign", signed, "--key", keys.private, *trust),
    ):
        assert call(*wrong).exit_code == 2, wrong
    done = call("serve", signed, signed, "--require-identity", "you", ISSUER, *trust)
    assert (done.exit_code, "SANs do not match you" in done.output) == (4, True)
    (signed / SIG).unlink()
    other = SigstoreSigner(instances / "token", instances / "ours.json")
    with pytest.raises(ConfigError, match="none beside an identity token"):
        adapterpack.sign(signed, other, identity="somebody")
    assert not (signed / SIG).exists()


def test_a_server_loads_what_an_identity_signed(
    bundle_of: Callable[[str, str], Path],
    pack_of: Callable[[str, str], Path],
    instances: Path,
    keys: Keys,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Beside what a key signed, and nothing else."""
    theirs = SigstoreSigner(instances / "token", instances / "theirs.json")
    ours = SigstoreSigner(instances / "token", instances / "ours.json")
    for name, signer in (("one", ours), ("two", keys.private), ("other", theirs)):
        adapterpack.load(pack_of("bert", "gamma")).renamed(name).write(tmp_path / "packs" / name)
        adapterpack.sign(tmp_path / "packs" / name, signer)
    command = [
        *(sys.executable, "-m", "adapterpack", "serve", bundle_of("bert", "bank")),
        *("--adapters", tmp_path / "packs", "--watch", "1", "--require-signature", keys.public),
        *(
            "--require-identity",
            WHO,
            ISSUER,
            "--trust-config",
            instances / "ours.json",
            "--port",
            "0",
            "--json",
        ),
    ]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stderr is not None
        started = json.loads(server.stdout.readline())
        server.terminate()
        assert sorted(started["adapters"]) == ["alpha", "beta", "one", "two"], started
        assert b"certificate chain" in server.stderr.read()


def test_without_sigstore_the_extra_is_named(folder: Path) -> None:  # noqa: F811
    """A real process in which it cannot be imported; importing what signs and verifies does not import it."""
    program = (
        "import sys; sys.modules['sigstore'] = None\n"
        "import adapterpack\n"
        "try:\n    adapterpack.verify(sys.argv[1], adapterpack.SigstoreIdentity('me', 'https://issuer'))\n"
        "except adapterpack.AdapterpackError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert "pip install 'adapterpack[sigstore]'" in done.stdout
    program = "import sys, adapterpack.pack.trust.sign, adapterpack.cli.commands.sign; assert 'sigstore' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
