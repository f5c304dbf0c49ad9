"""Errors, clients that leave, metrics, and what answered."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from .case import BASE, CLIENT, MODEL, OTHER, PLAIN, TOKENS, case, chatted, close, completed, refused

SERVICE, ANSWERED = "Errors, and how the server is kept", "What answered"


@case(SERVICE)
def wrong_value() -> bool:
    """A temperature below 0 is 400 in OpenAI's form, with the field."""
    return refused(400, lambda: completed(temperature=-1), type="invalid_request_error", param="temperature")


@case(SERVICE)
def too_long() -> bool:
    """A prompt longer than the context is 400 `context_length_exceeded`."""
    return refused(400, lambda: completed(prompt="mug " * 2000), code="context_length_exceeded")


@case(SERVICE)
def wrong_key() -> bool:
    """A wrong key is 401."""
    other = CLIENT.with_options(api_key="nobody")
    return refused(401, other.models.list, code="invalid_api_key")


def _until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def _counted(name: str) -> float:
    """The value of one of the adapter's counters."""
    found = re.search(
        rf'^adapterpack_{name}_total{{adapter="{MODEL}".*}} (.*)$', PLAIN.get("/metrics").text, re.M
    )
    return float(found[1]) if found else 0


@case(SERVICE)
def leaving() -> bool:
    """A client that leaves ends its answers."""
    before = _counted("generation_tokens")
    with chatted(stream=True, n=4, max_tokens=400, extra_body={"min_tokens": 400}) as stream:
        next(iter(stream))

    def over() -> bool:
        said = PLAIN.get("/v1/status").json()
        return said["waiting"] + said["running"] == 0 and _counted("generation_tokens") > before

    return _until(over) and _counted("generation_tokens") - before < 4 * 400


@case(SERVICE)
def metrics() -> bool:
    """`/metrics` counts tokens by adapter, for Prometheus."""
    before = _counted("generation_tokens")
    completed()
    return _until(lambda: _counted("generation_tokens") == before + TOKENS, 10)


@case(ANSWERED)
def digests() -> bool:
    """The digest of the weights that answered, in headers and every chunk."""
    raw = CLIENT.completions.with_raw_response.create(model=OTHER, prompt="x", max_tokens=1)
    known = {model.id: model.root for model in CLIENT.models.list()}  # type: ignore[attr-defined]
    chunks = {chunk.system_fingerprint for chunk in chatted(model=OTHER, stream=True)}
    return {raw.headers["X-Adapterpack-Digest"], raw.parse().system_fingerprint} == chunks == {known[OTHER]}


def _mixed(**weights: float) -> Any:
    """Log-probabilities under several adapters."""
    parts = [{"name": name, "weight": weight} for name, weight in weights.items()]
    return (
        completed(model=BASE, logprobs=1, extra_body={"adapters": parts}).choices[0].logprobs.token_logprobs
    )


@case(ANSWERED)
def weighted() -> bool:
    """Several adapters in one request, each with a weight."""
    one, other = (
        completed(model=name, logprobs=1).choices[0].logprobs.token_logprobs for name in (MODEL, OTHER)
    )
    mixed = _mixed(alpha=0.5, beta=0.5)
    return (
        close(_mixed(alpha=1, beta=0), one)
        and close(_mixed(alpha=0, beta=1), other)
        and not (close(mixed, one) or close(mixed, other))
    )
