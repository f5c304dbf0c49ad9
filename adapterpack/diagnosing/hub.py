"""Checks the connection to the hub from which packs are pulled and to which they are pushed."""

from __future__ import annotations

import os
from http.client import HTTPException
from threading import Thread
from time import monotonic
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ..hub.transport import endpoint, offline, redact
from .finding import CheckProblem, CheckResult

SECONDS = 5.0
"""Seconds that the hub may take to answer, including name resolution."""


def check_hub() -> CheckResult:
    """Checks that the hub can be reached; the only check that uses the network, and only on request."""
    address = endpoint()
    facts = {
        "address": redact(address),
        "token": "HF_TOKEN" if os.environ.get("HF_TOKEN") else "that of hf auth login, if any",
    }
    if offline():
        return CheckResult({**facts, "answer": "not asked: HF_HUB_OFFLINE is set"})
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        return CheckResult(
            facts,
            (
                CheckProblem(
                    f"HF_ENDPOINT is no address: {redact(address)}",
                    "set it to http://HOST:PORT or unset it",
                    True,
                ),
            ),
        )
    said = []
    # name resolution has no timeout, so it runs in a thread that can be abandoned
    asking = Thread(target=lambda: said.append(_answer(address)), daemon=True)
    started = monotonic()
    asking.start()
    asking.join(SECONDS)
    answer = (
        said[0]
        if said
        else CheckProblem(
            f"the hub did not answer in {SECONDS:g} s", "check the network, the proxy and HF_ENDPOINT", True
        )
    )
    if isinstance(answer, CheckProblem):
        return CheckResult(facts, (answer,))
    return CheckResult({**facts, "answer": f"{answer} in {1000 * (monotonic() - started):.0f} ms"})


def _answer(address: str) -> str | CheckProblem:
    try:
        with urlopen(Request(address, method="HEAD"), timeout=SECONDS) as response:
            return f"status {response.status}"
    except HTTPError as error:  # an HTTP error still shows that the hub answers
        return f"status {error.code}"
    except (OSError, HTTPException, ValueError) as error:
        reason = redact(str(getattr(error, "reason", error)))
        return CheckProblem(
            f"the hub cannot be reached: {reason}",
            "check the network, the proxy and HF_ENDPOINT",
            broken=True,
        )
