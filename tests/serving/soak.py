"""A server under everything at once, for minutes: ``python tests/serving/soak.py --minutes 10 --seed 1
--json``.

Tenants ask whole and streamed, go away in the middle, and send what is none; meanwhile an operator exchanges
packs, others are dropped into the watched folder and removed, and the file of keys changes. Each answer has
to be, word for word, what a session alone says with the pack whose digest the answer names, and that pack one
that had the name while the request ran. At the end nothing may be left: no row, no file, no memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
from servers import ANN, BOB, WAIT, Served, begin, entry, write_keys
from tiny import write_bundle, write_model, write_packs

CARL, OPERATOR = "ap-carl-carl-carl-carl", "operator-operator-operator"
PROMPTS = [
    f"Order {number} mugs for {city}" for number, city in enumerate(("Lisbon", "Porto", "Faro", "Braga"))
]
LENGTHS = (3, 14, 40)
SWAPPED, DROPPED = "swapped", "dropped"
CLIENTS = 10
MOST_FAULTS = 20
HAPPENS = ("answers compared", "disconnects", "swaps", "drops", "key files", "bad 400")
BAD: tuple[tuple[bytes, int], ...] = (
    (b"{", 400),
    (b'{"model": "alpha", "prompt": "x", "max_token": 1}', 400),
    (b'{"model": "../alpha", "prompt": "x"}', 404),
    (b'{"model": "hf://org/name", "prompt": "x"}', 404),
    (b'{"model": "alpha", "prompt": "x", "n": 1000}', 400),
    (b'{"model": "alpha", "prompt": "' + b"x " * 5000 + b'"}', 400),
    (b'{"model": "alpha", "prompt": "x", "guided_regex": "("}', 400),
)
"""Bodies for ``/v1/completions`` that are refused, and with which status."""


class Question(NamedTuple):
    """What a session and the server are asked alike."""

    prompt: str
    chat: bool
    tokens: int


QUESTIONS = [
    Question(prompt, chat, tokens) for prompt in PROMPTS for chat in (False, True) for tokens in LENGTHS
]


class Stage(NamedTuple):
    """What a server is started with, and by digest of pack and question what each answer is. ``sources`` are
    the digests of packs that lie in the watched folder for the operator, by folder; ``drops`` folders and
    digests of packs of one name that come and go.
    """

    bundle: Path
    watched: Path
    sources: dict[str, str]
    drops: dict[Path, str]
    right: dict[tuple[str, Question], str]


def staged(folder: Path, tokenizer: Path) -> Stage:
    """Writes model, packs and bundle into a folder, and asks a session everything."""
    from adapterpack import Session, load

    model = write_model(folder / "model", tokenizer)
    packs = write_packs(folder / "packs", model, ("alpha", "beta", "gamma", "delta", "epsilon"))
    bundle = write_bundle(folder / "bundle", model, [packs / "alpha", packs / "beta"])
    watched, drops = folder / "watched", dict[Path, str]()
    watched.mkdir()
    for name in ("gamma", "delta", "epsilon"):
        shutil.copytree(packs / name, watched / name)
    for number, name in enumerate(("gamma", "delta")):
        pack = load(packs / name).renamed(DROPPED)
        pack.write(folder / f"drop-{number}")
        drops[folder / f"drop-{number}"] = pack.id
    session, right = Session(bundle, "cpu"), dict[tuple[str, Question], str]()
    for path in [
        packs / "alpha",
        packs / "beta",
        *(watched / name for name in ("gamma", "delta", "epsilon")),
        *drops,
    ]:
        pack = load(path)
        session.load(pack, "asked")
        for question in QUESTIONS:
            asked: Any = question.prompt if question.chat else session.tokenizer.encode(question.prompt)
            [answer] = session.generate([asked], "asked", max_new_tokens=question.tokens)
            right[pack.id, question] = answer.text
        session.unload("asked")
    sources = {name: load(watched / name).id for name in ("gamma", "delta", "epsilon")}
    return Stage(bundle, watched, sources, drops, right)


class History:
    """What a name, or a key, may have stood for while a request ran: something new counts from when it is
    wanted, and what was before until the new one is certain.
    """

    def __init__(self, first: str | None) -> None:
        self._spans: list[tuple[float, float, str | None]] = [(0.0, inf, first)]

    def want(self, value: str | None) -> None:
        """From now on it may be this."""
        self._spans = [*self._spans[-50:], (time.monotonic(), inf, value)]

    def sure(self) -> None:
        """It is what was wanted last, and nothing else any more."""
        now = time.monotonic()
        self._spans = [
            *((begun, min(end, now), value) for begun, end, value in self._spans[:-1]),
            self._spans[-1],
        ]

    def could_be(self, value: str | None, begun: float, ended: float) -> bool:
        """Whether a request that ran so long may have met it."""
        return any(start <= ended and begun <= end and value == one for start, end, one in self._spans)


class Soak:
    """One run against a server that was started so."""

    def __init__(
        self, stage: Stage, served: Served, keys: Path, seconds: float, seed: int, least: int
    ) -> None:
        self.least = least
        self.stage, self.served, self.keys, self.seed = stage, served, keys, seed
        self.until = time.monotonic() + seconds
        self.counts, self.faults = Counter[str](), list[str]()
        self.digests, self.memory = set[str](), list[int]()
        self.names = {
            name: History(digest)
            for name, digest in {**served.adapters, SWAPPED: None, DROPPED: None}.items()
        }
        self.carl = History("in")

    def fault(self, what: str) -> None:
        """Notes something that may not happen."""
        self.counts["faults"] += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(what)

    @property
    def going(self) -> bool:
        """Whether there is time left, or too little has happened for that time on a busy machine."""
        late = time.monotonic() - self.until
        return late < 0 or (late < WAIT and not self.enough)

    @property
    def enough(self) -> bool:
        """Whether everything has happened ``least`` times, and every pack has answered."""
        packs = 2 + len(self.stage.sources) + len(self.stage.drops)
        return min(self.counts[name] for name in HAPPENS) >= self.least and len(self.digests) == packs

    async def run(self) -> None:
        """Everything at once, until the time is over."""
        async with (
            httpx.AsyncClient(
                base_url=self.served.address, timeout=120, limits=httpx.Limits(max_connections=None)
            ) as tenants,
            httpx.AsyncClient(
                base_url=self.served.admin or "", timeout=120, headers=bearer(OPERATOR)
            ) as operator,
            asyncio.TaskGroup() as tasks,
        ):
            for number in range(CLIENTS):
                tasks.create_task(self.client(tenants, random.Random(f"{self.seed} {number}")))
            tasks.create_task(self.swaps(operator))
            tasks.create_task(self.drops(operator))
            tasks.create_task(self.new_keys(tenants))
            tasks.create_task(self.watch_memory())

    async def client(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """One client after the other, in a random order."""
        while self.going:
            kind = dice.choices((self.ask, self.leave, self.disturb, self.trespass), (12, 3, 3, 2))[0]
            try:
                await kind(http, dice)
            except httpx.HTTPError as error:
                self.fault(f"{kind.__name__}: {error!r}")
            await asyncio.sleep(dice.random() * 0.02)

    def body(self, model: str, question: Question, **more: Any) -> tuple[str, dict[str, Any]]:
        """Route and body of a question."""
        content = (
            {"messages": [{"role": "user", "content": question.prompt}]}
            if question.chat
            else {"prompt": question.prompt}
        )
        route = "/v1/chat/completions" if question.chat else "/v1/completions"
        return route, {"model": model, "max_tokens": question.tokens, "temperature": 0, **content, **more}

    async def ask(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """A question of a tenant, whole or streamed, whose answer is compared."""
        key, names = dice.choice(
            ((ANN, ("alpha", "beta", SWAPPED, DROPPED)), (BOB, ("alpha", SWAPPED)), (CARL, ("beta",)))
        )
        model, question, stream = dice.choice(names), dice.choice(QUESTIONS), dice.random() < 0.5
        route, body = self.body(model, question, stream=stream)
        begun = time.monotonic()
        answer = await http.post(route, json=body, headers=bearer(key))
        ended, status = time.monotonic(), answer.status_code
        self.counts[f"{'streams' if stream else 'wholes'} {status}"] += 1
        if status == 429 and key == BOB:
            return
        if key == CARL and not self.carl.could_be("in" if status == 200 else "out", begun, ended):
            self.fault(f"the key that comes and goes: {status} {answer.text[:200]}")
        if status == 404 and self.names[model].could_be(None, begun, ended):
            return
        if status == 401 and key == CARL:
            return
        if status != 200:
            self.fault(f"{model}: {status} {answer.text[:200]}")
            return
        said, digests = _streamed(answer.text, question) if stream else _whole(answer.json(), question)
        digest = answer.headers["x-adapterpack-digest"]
        self.digests.add(digest)
        self.counts["answers compared"] += 1
        if digests != {digest} or not self.names[model].could_be(digest, begun, ended):
            self.fault(f"{model}: digest {digest}, in the body {digests}")
        elif said != self.stage.right.get((digest, question)):
            self.fault(
                f"{model} {digest} {question}: {said!r} is not {self.stage.right.get((digest, question))!r}"
            )

    async def leave(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """A client that goes before its answer, or in the middle of it."""
        route, body = self.body(
            dice.choice(("alpha", "beta")), dice.choice(QUESTIONS), stream=True, n=dice.choice((1, 3))
        )
        body |= {"max_tokens": 300, "min_tokens": 300, "temperature": 1.0}
        chunks = dice.choice((0, 1, 20))
        self.counts["disconnects"] += 1
        try:
            async with (
                asyncio.timeout(dice.choice((0.01, 0.2, 5.0))),
                http.stream("POST", route, json=body, headers=bearer(ANN)) as answer,
            ):
                async for _ in answer.aiter_bytes():
                    chunks -= 1
                    if chunks <= 0:
                        return
        except TimeoutError:
            pass

    async def disturb(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """A request that is none."""
        data, status = dice.choice(BAD)
        answer = await http.post(
            "/v1/completions", content=data, headers={**bearer(ANN), "Content-Type": "application/json"}
        )
        self.counts[f"bad {answer.status_code}"] += 1
        if answer.status_code != status:
            self.fault(f"{data[:80]!r}: {answer.status_code} {answer.text[:200]}")

    async def trespass(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """A request for another's adapter, or with a key that is none, or at a route that is the
        operator's.
        """
        key, model, route, status = dice.choice(
            (
                (BOB, "beta", "/v1/completions", 404),
                (BOB, DROPPED, "/v1/completions", 404),
                (BOB, "base", "/v1/completions", 404),
                ("nobody", "alpha", "/v1/completions", 401),
                (ANN, "alpha", "/v1/unload_lora_adapter", 404),
            )
        )
        answer = await http.post(route, json={"model": model, "prompt": "x"}, headers=bearer(key))
        self.counts[f"trespasses {answer.status_code}"] += 1
        if answer.status_code != status:
            self.fault(f"{key} {model} {route}: {answer.status_code} {answer.text[:200]}")

    async def swaps(self, operator: httpx.AsyncClient) -> None:
        """An operator exchanges what a name stands for."""
        dice = random.Random(f"{self.seed} swaps")
        while self.going:
            source = dice.choice(list(self.stage.sources))
            self.names[SWAPPED].want(self.stage.sources[source])
            answer = await operator.post(
                "/v1/load_lora_adapter",
                json={"lora_name": SWAPPED, "lora_path": source, "load_inplace": True},
            )
            if answer.status_code != 200:
                self.fault(f"swap: {answer.status_code} {answer.text[:200]}")
            self.names[SWAPPED].sure()
            self.counts["swaps"] += 1
            await asyncio.sleep(dice.random())

    async def drops(self, operator: httpx.AsyncClient) -> None:
        """Packs are dropped into the watched folder, replaced and removed."""
        dice, place = random.Random(f"{self.seed} drops"), self.stage.watched / DROPPED
        while self.going:
            folder, digest = dice.choice((*self.stage.drops.items(), (None, None)))
            self.names[DROPPED].want(None)
            self.names[DROPPED].want(digest)
            if place.exists():
                place.rename(place.with_name(".old"))
                shutil.rmtree(place.with_name(".old"))
            if folder is not None:
                shutil.copytree(folder, place.with_name(".new"))
                place.with_name(".new").rename(place)
            until = time.monotonic() + WAIT
            while (await self.listed(operator)).get(DROPPED) != digest:
                if time.monotonic() > until:
                    self.fault(f"what was dropped in is not taken up: {digest}")
                    break
                await asyncio.sleep(0.05)
            self.names[DROPPED].sure()
            self.counts["drops"] += 1
            await asyncio.sleep(dice.random())

    async def listed(self, operator: httpx.AsyncClient) -> dict[str, str]:
        """The digests of adapters by name."""
        return {one["name"]: one["digest"] for one in (await operator.get("/v1/adapters")).json()["adapters"]}

    async def new_keys(self, http: httpx.AsyncClient) -> None:
        """A key comes and goes; now and then the file is none."""
        dice = random.Random(f"{self.seed} keys")
        while self.going:
            state = dice.choice(("in", "out", "broken"))
            if state == "broken":
                self.keys.write_text("keys: 5")
            else:
                self.carl.want(state)
                write_soak_keys(self.keys, carl=state == "in")
                until, wanted = time.monotonic() + WAIT, 200 if state == "in" else 401
                while (await http.get("/v1/models", headers=bearer(CARL))).status_code != wanted:
                    if time.monotonic() > until:
                        self.fault(f"the file of keys is not taken up: {state}")
                        break
                    await asyncio.sleep(0.1)
                self.carl.sure()
            await asyncio.sleep(1.5)
            self.counts["key files"] += 1

    async def watch_memory(self) -> None:
        """Looks at the server's memory."""
        while self.going:
            self.memory.append(resident(self.served.process.pid))
            await asyncio.sleep(1.0)


def _whole(answer: Any, question: Question) -> tuple[str, set[str]]:
    choice = answer["choices"][0]
    digests = {answer["system_fingerprint"], answer["adapterpack"]["digest"]}
    return choice["message"]["content"] if question.chat else choice["text"], digests


def _streamed(text: str, question: Question) -> tuple[str, set[str]]:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    if events[-1] != "[DONE]" or any("error" in chunk for chunk in chunks):
        return f"a stream that ends with {events[-1]}", set()
    parts = [
        choice["delta"].get("content") or "" if question.chat else choice["text"]
        for chunk in chunks
        for choice in chunk["choices"]
    ]
    return "".join(parts), {chunk["system_fingerprint"] for chunk in chunks}


def bearer(key: str) -> dict[str, str]:
    """The header with a key."""
    return {"Authorization": f"Bearer {key}"}


def resident(pid: int) -> int:
    """The memory of a process in bytes."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def open_files(pid: int) -> int:
    """The files and connections that a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def write_soak_keys(path: Path, *, carl: bool) -> None:
    """The file of keys: Ann has everything, Bob two names, and Carl is there or not."""
    third = [entry("carl", CARL, adapters=["beta"])] if carl else []
    new = path.with_name(".keys")
    write_keys(
        new,
        entry("ann", ANN, admin=True),
        entry("bob", BOB, adapters=["alpha", SWAPPED], base=False, max_rows=4),
        *third,
    )
    new.rename(path)


def left(served: Served) -> float:
    """The rows that wait or run once nobody asks any more; they have some time to end."""
    until = time.monotonic() + WAIT
    while True:
        text = served.get("/metrics").text
        rows = sum(
            float(value)
            for value in re.findall(r"^adapterpack_(?:running|waiting)_rows (\S+)", text, re.MULTILINE)
        )
        if not rows or time.monotonic() > until:
            return rows
        time.sleep(0.1)


def soak(folder: Path, tokenizer: Path, seconds: float, seed: int, least: int = 0) -> dict[str, Any]:
    """Runs all of it for that time, and longer until everything has happened ``least`` times; ``faults`` says
    what went wrong.
    """
    stage = staged(folder, tokenizer)
    keys, key_file = folder / "keys", folder / "operator"
    write_soak_keys(keys, carl=True)
    key_file.touch(0o600)
    key_file.write_text(OPERATOR)
    served = begin(
        stage.bundle,
        folder,
        keys=str(keys),
        adapters=[str(stage.watched)],
        watch=0.2,
        admin="127.0.0.1:0",
        admin_key_file=str(key_file),
    )
    try:
        files = open_files(served.process.pid)
        run = Soak(stage, served, keys, seconds, seed, least)
        asyncio.run(run.run())
        rows = left(served)
        files_after = open_files(served.process.pid)
        sizes, quarter = run.memory, len(run.memory) // 4
        code = served.ended(signal.SIGTERM)
    finally:
        served.process.kill()
        served.process.wait(WAIT)
    log = served.log.read_text()
    for wrong, what in (
        (rows, f"{rows:g} rows are stuck"),
        (code, f"the server ended with {code}"),
        (files_after > files + 10, f"{files} files were open before, and {files_after} after"),
        ("Traceback" in log or "bug" in log, f"the log has an error: {log[-2000:]}"),
    ):
        if wrong:
            run.fault(what)
    return {
        "seconds": seconds,
        "seed": seed,
        "counts": dict(sorted(run.counts.items())),
        "digests": len(run.digests),
        "memory": {
            "warm": int(median(sizes[quarter : 2 * quarter])),
            "late": int(median(sizes[-quarter:])),
            "most": max(sizes),
        },
        "open_files": {"before": files, "after": files_after},
        "stuck_rows": rows,
        "faults": run.faults,
    }


def main() -> int:
    """The command; 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    from adapterpack.demos import SMOLLM2, fetch

    with tempfile.TemporaryDirectory() as name:
        result = soak(Path(name), fetch(SMOLLM2), given.minutes * 60, given.seed)
    print(json.dumps(result) if given.json else "\n".join(f"{key}: {value}" for key, value in result.items()))  # noqa: T201
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
