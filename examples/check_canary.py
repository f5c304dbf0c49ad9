"""Does an adapter act on a server? The canary of docs/canary.md, in a page and without a library.

    python examples/check_canary.py packs/tickets/adapterpack.json http://localhost:8000 tickets

The server must have OpenAI's routes, and the field ``prompt_logprobs`` of vLLM and adapterpack. Exit code 0:
the adapter acts as recorded; 1: it does not. A key is read from OPENAI_API_KEY.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

EXACT, ROUNDED, AMPLIFIED = 0.05, 0.1, 3.0


def ask(server: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Gets or posts JSON."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(server + path, data, headers), timeout=120) as answer:
        return json.load(answer)


def next_logprobs(server: str, model: str, ids: list[int], wanted: list[int]) -> dict[int, float]:
    """Returns the log-probabilities of tokens after ``ids``: each is asked for as a prompt's last token."""
    found: dict[int, float] = {}
    for token in wanted:
        if token not in found:
            body = {"model": model, "prompt": [*ids, token], "max_tokens": 1, "prompt_logprobs": 20}
            shown = ask(server, "/v1/completions", body)["choices"][0]["prompt_logprobs"][-1]
            found |= {int(key): one["logprob"] for key, one in shown.items()}
    return {token: found[token] for token in wanted}


def centred(values: list[float]) -> list[float]:
    """Takes away what log-probabilities and logits differ by: a constant."""
    return [value - sum(values) / len(values) for value in values]


def size(values: list[float]) -> float:
    """Returns the root mean square."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def judge(canary: dict[str, Any], server: str, model: str, base: str) -> str:
    """Returns what the answers show."""
    rows: list[tuple[dict[int, float], ...]] = []
    for ids, *recorded in zip(canary["input_ids"], canary["base"], canary["adapter"], strict=True):
        before, after = (dict(zip(one["ids"], one["logits"], strict=True)) for one in recorded)
        asked = [next_logprobs(server, name, ids, [*(before | after)]) for name in (base, model)]
        rows.append((before, after, *asked))
    off = [error for before, _, plain, _ in rows for error in centred([plain[i] - before[i] for i in before])]
    largest = max(abs(logit) for before, *_ in rows for logit in before.values())
    if size(off) > largest / 4:
        return "another base"
    exact = size(off) < 1e-4 * largest
    change: list[float] = []
    effect: list[float] = []
    for before, after, plain, adapted in rows:
        # an exact server's own base stands for logits that are not recorded
        known = plain if exact else before
        tokens = [token for token in after if token in known]
        change += centred([adapted[token] - plain[token] for token in tokens])
        effect += centred([after[token] - known[token] for token in tokens])
    if size(change) <= EXACT * size(effect):
        return "no effect"
    rest = size([one - other for one, other in zip(change, effect, strict=True)])
    if rest <= max((EXACT if exact else ROUNDED) * size(effect), AMPLIFIED * size(off)):
        return "acts as recorded"
    return f"acts otherwise: it is {rest / size(effect):.0%} of its effect off"


def main(manifest: str, server: str, model: str) -> int:
    """Prints what is found; returns the exit code."""
    canary = json.loads(Path(manifest).read_text("utf-8"))["canary"]
    server = server.rstrip("/").removesuffix("/v1")
    parents = {one["id"]: one.get("parent") for one in ask(server, "/v1/models")["data"]}
    found = judge(canary, server, model, parents[model])
    print(found)
    return 0 if found == "acts as recorded" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
