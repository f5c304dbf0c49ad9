"""Quotas of keys: requests and tokens a minute, tokens a day; what a client hears of them, and what operators
see.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import ANN, BOB, Served, entry, waited, write_keys

from adapterpack.http.http_error import HTTPError
from adapterpack.serving.tenants.keys import Key
from adapterpack.serving.tenants.quotas import Quotas

MIDNIGHT = 20_000 * 86_400.0


def key(name: str, **quotas: int) -> Key:
    return Key(id=name, sha256="0" * 64, **quotas)  # type: ignore[arg-type]


def waits(call: Callable[[], None]) -> float:
    """The seconds after which a call may be made again; 0 where it could be made."""
    try:
        call()
    except HTTPError as refused:
        assert (refused.status, refused.name) == (429, "rate_limit_exceeded")
        return float(refused.more["retry_after"])
    return 0.0


@pytest.mark.fast
def test_what_a_key_may_have_over_time() -> None:
    """Whatever a key asks for, and however long it waits: it has at most its quota and a minute's worth
    beyond, and long answers are paid back. Who waits for as long as it is told is let in, and who comes a
    second sooner is not.
    """
    rng, now = random.Random(3), MIDNIGHT
    quotas = Quotas(lambda: now)
    one = key("one", requests_per_minute=30, tokens_per_minute=600)
    requests = tokens = told = 0
    for _ in range(1000):
        prompt, answer = rng.randint(1, 60), rng.randint(0, 90)
        for call in (partial(quotas.ask, one), partial(quotas.charge_prompt, one, prompt)):
            if wait := waits(call):
                told += 1
                now += wait - 1.001
                assert waits(call)
                now += 1.001
                assert not waits(call)
        quotas.charge_answer(one, answer)
        requests, tokens = requests + 1, tokens + prompt + answer
        now += rng.choice((0.0, 0.0, 0.1, 3.0))
    minutes = (now - MIDNIGHT) / 60
    assert told > 300
    assert requests <= 30 * minutes + 30
    assert 0.8 * 600 * minutes < tokens <= 600 * minutes + 600 + 90


@pytest.mark.fast
def test_the_edges_of_quotas() -> None:
    """A day ends at midnight, UTC; a prompt longer than a whole quota goes when nothing is used, and is paid
    back; a key's new limit counts with its old use; keys do not know of each other; a key without quotas
    hears of none.
    """
    now = MIDNIGHT + 86_000
    quotas = Quotas(lambda: now)
    day = key("day", tokens_per_day=100)
    quotas.charge_prompt(day, 60)
    quotas.charge_answer(day, 60)
    assert waits(lambda: quotas.ask(day)) == 400
    assert quotas.headers(day) == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "400s",
    }
    assert not waits(lambda: quotas.ask(key("day", tokens_per_day=200)))
    assert not waits(lambda: quotas.ask(key("other", tokens_per_day=100)))
    now += 400
    assert not waits(lambda: quotas.ask(day))
    long = key("long", tokens_per_minute=10)
    assert not waits(lambda: quotas.charge_prompt(long, 1000))
    assert waits(lambda: quotas.ask(long)) == 60 * 991 / 10
    now += 60 * 100
    assert not waits(lambda: quotas.charge_prompt(long, 1000))
    assert quotas.headers(key("none")) == {}
    usage = quotas.usage()
    assert usage[0].key == "long"
    assert {one.key: one.refused for one in usage} == {"long": 1, "day": 1, "other": 0}


def test_a_client_hears_of_its_quotas(start: Callable[..., Served], tmp_path: Path) -> None:
    """OpenAI's client raises its own error, with the time to wait; streams count when they end; a key without
    quotas is not held up; the counts survive a change of the file, and stand in the metrics by the key's id.
    """
    keys = tmp_path / "keys"
    ann = entry("ann", ANN, admin=True)
    write_keys(keys, ann, entry("bob", BOB, tokens_per_day=40, requests_per_minute=3))
    server = start(keys=str(keys), adapters=[])
    bob: Any = openai.OpenAI(base_url=f"{server.address}/v1", api_key=BOB, max_retries=0, timeout=120)
    first = bob.completions.with_raw_response.create(
        model="alpha", prompt=[1, 2, 3, 4], max_tokens=6, extra_body={"ignore_eos": True}
    )
    assert {
        name: first.headers[f"x-ratelimit-{name}"]
        for name in ("limit-requests", "limit-tokens", "remaining-tokens")
    } == {"limit-requests": "3", "limit-tokens": "40", "remaining-tokens": "30"}
    # one comes back every 20 seconds, however long this takes
    assert first.headers["x-ratelimit-remaining-requests"] in ("2", "3")
    assert first.headers["x-ratelimit-reset-requests"] in {f"{seconds}s" for seconds in range(21)}
    assert (
        len(
            list(
                bob.completions.create(
                    model="beta",
                    prompt=[1, 2, 3, 4],
                    max_tokens=40,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
            )
        )
        > 1
    )
    with pytest.raises(openai.RateLimitError) as caught:
        bob.completions.create(model="alpha", prompt="x")
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert "40 tokens a day" in caught.value.message
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 86_400
    assert caught.value.response.headers["x-ratelimit-remaining-tokens"] == "0"
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] in ("1", "2", "3")
    assert (
        "x-ratelimit-limit-requests"
        not in server.post("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 1}).headers
    )

    def remaining(limit: int) -> str:
        write_keys(keys, ann, entry("bob", BOB, tokens_per_day=limit))
        listed = bob.models.with_raw_response.list
        waited(lambda: listed().headers["x-ratelimit-limit-tokens"] == str(limit))
        return str(listed().headers["x-ratelimit-remaining-tokens"])

    assert remaining(100) == "46"
    assert bob.completions.create(model="alpha", prompt=[5], max_tokens=1).usage.total_tokens == 2
    assert remaining(101) == "45"
    text = server.get("/metrics").text
    for name, value in (("limit", 101), ("used", 56), ("refused_total", 1)):
        assert f'adapterpack_quota_{name}{{key="bob",quota="tokens_per_day"}} {value}.0' in text
    assert 'key="ann"' not in text
