"""Servers that speak TLS: at both addresses, with a certificate that is renewed while they run, and what they
refuse.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from servers import ANN, Served, waited

from adapterpack.errors import ConfigError, StorageError
from adapterpack.serving.serve import serve

OPERATOR = "operator-operator-operator"
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def certificate_of(key: Key) -> bytes:
    """A certificate of this machine, signed by itself."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
    )
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def text_of(key: Key, password: bytes | None = None) -> bytes:
    """A key as PEM."""
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def files(folder: Path, key: Key, password: bytes | None = None) -> tuple[Path, Path]:
    """A certificate and its key in a folder."""
    certificate, private = folder / "cert.pem", folder / "key.pem"
    private.touch(0o600)
    private.write_bytes(text_of(key, password))
    certificate.write_bytes(certificate_of(key))
    return certificate, private


def operator_file(folder: Path) -> Path:
    """The file with an operator's key."""
    path = folder / "operator"
    path.touch(0o600)
    path.write_text(OPERATOR)
    return path


def shown(port: int) -> str:
    """The certificate that a server shows."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=120)


@pytest.mark.long
def test_a_server_speaks_tls(start: Callable[..., Served], tmp_path: Path) -> None:
    """Tenants and the operator are answered over TLS 1.2 and later, and in the clear nobody. A renewed
    certificate, of another kind of key, is shown within seconds, once its key is there, too; a stream that
    was begun before goes on.
    """
    elliptic, renewed = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
    certificate, key = files(tmp_path, elliptic)
    operator = operator_file(tmp_path)
    server = start(
        host="0.0.0.0",
        tls_cert=str(certificate),
        tls_key=str(key),
        admin="127.0.0.1:0",
        admin_key_file=str(operator),
    )
    assert server.address.startswith("https://0.0.0.0:")
    assert server.admin is not None and server.admin.startswith("https://")
    assert "--tls-cert" not in server.log.read_text()
    port, admin_port = server.port, int(server.admin.rpartition(":")[2])
    trusting = ssl.create_default_context(cafile=certificate)

    def asked(**options: Any) -> httpx.Response:
        return httpx.get(
            f"https://127.0.0.1:{port}/v1/models", headers=server.headers, timeout=120, **options
        )

    assert asked(verify=trusting).status_code == 200
    assert (
        httpx.get(
            f"https://127.0.0.1:{admin_port}/v1/adapters",
            headers={"Authorization": f"Bearer {OPERATOR}"},
            verify=trusting,
            timeout=120,
        ).status_code
        == 200
    )
    for clear in (port, admin_port):
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{clear}/health", timeout=120)
    for version, spoken in (
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ):
        client = ssl.create_default_context(cafile=certificate)
        client.set_ciphers("DEFAULT@SECLEVEL=0")
        client.minimum_version = client.maximum_version = version
        with (
            socket.create_connection(("127.0.0.1", port), timeout=120) as connection,
            nullcontext() if spoken else pytest.raises(ssl.SSLError),
        ):
            client.wrap_socket(connection, server_hostname="127.0.0.1").close()

    body = {"model": "alpha", "prompt": "x", "max_tokens": 400, "min_tokens": 400, "stream": True}
    with httpx.stream(
        "POST",
        f"https://127.0.0.1:{port}/v1/completions",
        json=body,
        headers=server.headers,
        verify=trusting,
        timeout=120,
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        before, after = certificate.read_text(), certificate_of(renewed)
        certificate.write_bytes(after)
        waited(
            lambda: shown(port) and "the certificate and its key stay as they were" in server.log.read_text()
        )
        assert shown(port).strip() == before.strip()
        key.write_bytes(text_of(renewed))
        waited(lambda: {shown(one).strip() for one in (port, admin_port)} == {after.decode().strip()})
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert asked(verify=ssl.create_default_context(cafile=certificate)).status_code == 200
    with pytest.raises(httpx.ConnectError):
        asked(verify=trusting)
    key.unlink()
    time.sleep(1.2)
    assert all(
        json.loads(asked(verify=ssl.create_default_context(cafile=certificate)).text)["data"]
        for _ in range(2)
    )


def test_what_is_no_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half of the two files, a key that others may read, of another certificate or with a password. Where
    others listen without TLS the log names the option.
    """
    elliptic = ec.generate_private_key(ec.SECP256R1())
    for name in ("good", "public", "other", "locked"):
        (tmp_path / name).mkdir()
    certificate, key = files(tmp_path / "good", elliptic)
    _, public = files(tmp_path / "public", elliptic)
    public.chmod(0o640)
    _, other = files(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    _, locked = files(tmp_path / "locked", elliptic, b"secret")
    for given, error, match in (
        ({"tls_cert": certificate}, ConfigError, "give both"),
        ({"tls_key": key}, ConfigError, "give both"),
        ({"tls_cert": certificate, "tls_key": public}, ConfigError, "others may read"),
        ({"tls_cert": certificate, "tls_key": other}, ConfigError, "no certificate with its key"),
        ({"tls_cert": certificate, "tls_key": locked}, ConfigError, "without a password"),
        ({"tls_cert": key, "tls_key": key}, ConfigError, "no certificate with its key"),
        ({"tls_cert": tmp_path / "none", "tls_key": key}, StorageError, "none"),
        ({"tls_cert": certificate, "tls_key": tmp_path / "none"}, StorageError, "none"),
    ):
        with pytest.raises(error, match=match):
            serve(tmp_path, port=0, **given)
    assert not caplog.messages
    operator = operator_file(tmp_path)
    for address in ({"host": "0.0.0.0"}, {"admin": "0.0.0.0:0", "admin_key_file": operator}):
        for given, warned in (({}, True), ({"tls_cert": certificate, "tls_key": key}, False)):
            caplog.clear()
            with pytest.raises((ConfigError, StorageError)):
                serve(tmp_path / "no bundle", api_key=ANN, **address, **given)  # type: ignore[arg-type]
            assert ("--tls-cert" in caplog.text) == warned, (address, given)
