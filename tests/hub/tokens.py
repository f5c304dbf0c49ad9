"""A service that exchanges passwords for the tokens of a registry, as that of docker does: who asks for a scope gets a
token for the part of it that they may have, signed by a key that the registry trusts.
"""

from __future__ import annotations

import base64
import datetime
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding

SERVICE, ISSUER = "registry.test", "tokens.test"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class Tokens:
    """Whom it knows (``name:password``; the empty one is whoever has no login) with what they may do, where its
    certificate is, and what it was asked for: the name and the scope.
    """

    rights: Mapping[str, frozenset[str]]
    certificate: Path
    asked: list[tuple[str, str]] = field(default_factory=list)
    realm: str = ""

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder(name, name, self._key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .sign(self._key, hashes.SHA256())
        )
        self.certificate.write_bytes(made.public_bytes(Encoding.PEM))
        self._chain = [base64.b64encode(made.public_bytes(Encoding.DER)).decode()]

    @property
    def auth(self) -> dict[str, Any]:
        """What makes a registry send its clients here."""
        return {
            "token": {
                "realm": self.realm,
                "service": SERVICE,
                "issuer": ISSUER,
                "rootcertbundle": str(self.certificate),
            }
        }

    def token(self, who: str, scope: str) -> str:
        """A token for the part of a scope that somebody may have."""
        access = []
        if scope:
            kind, name, actions = scope.split(":")
            allowed = sorted(self.rights[who].intersection(actions.split(",")))
            access = [{"type": kind, "name": name, "actions": allowed}]
        now = int(time.time())
        claims = {"iss": ISSUER, "sub": who.partition(":")[0], "aud": SERVICE, "access": access}
        times = {"iat": now, "nbf": now - 10, "exp": now + 300, "jti": str(time.monotonic_ns())}
        header = {"typ": "JWT", "alg": "ES256", "x5c": self._chain}
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (header, {**claims, **times}))
        r, s = utils.decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_encoded(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


@contextmanager
def exchanging(
    rights: Mapping[str, frozenset[str]], folder: Path, answer: bytes | None = None
) -> Iterator[Tokens]:
    """The service, while the block lasts; it may have the same ``answer`` for everybody."""
    tokens = Tokens(rights, folder / "tokens.pem")

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            login = self.headers.get("Authorization", "").removeprefix("Basic ")
            who = base64.b64decode(login).decode()
            query = parse_qs(urlsplit(self.path).query)
            scope = query.get("scope", [""])[0]
            tokens.asked.append((who.partition(":")[0], scope))
            meant = (query.get("tenant"), query.get("service")) == (["all"], [SERVICE])
            known = meant and who in rights
            body = answer
            if body is None:
                body = json.dumps({"token": tokens.token(who, scope)} if known else {}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        tokens.realm = f"http://127.0.0.1:{server.server_port}/token?tenant=all"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tokens
        server.shutdown()
