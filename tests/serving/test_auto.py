"""The model ``auto``, which the server chooses by the text, and adapters that are loaded when a request first
names them.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from chromium import browser, chromium, require_well
from click.testing import CliRunner
from encoder_packs import packed
from msgspec.structs import replace
from servers import ANN, BOB, Served, entry, write_keys
from test_lock_file import cache, hub_in, port, published
from test_page import ask, sign_in
from tiny import write_bundle

import adapterpack
from adapterpack import Engine, load
from adapterpack.cli.main import main
from adapterpack.errors import ConfigError, FormatError, StorageError
from adapterpack.pack.text_profile import KEY, TextIndex, TextProfile
from adapterpack.pack.trust.sign import Signers
from adapterpack.serving.adapters import on_request
from adapterpack.serving.adapters.adapter_control import AdapterControl
from adapterpack.serving.adapters.adapter_source import HubOwner, PackFolder, source_on_request
from adapterpack.serving.adapters.on_request import OnRequest
from adapterpack.serving.tenants.keys import EVERYBODY

__all__ = ["cache", "port"]  # fixtures
DATA = Path(__file__).parents[2] / "examples" / "data"
ORDER, TICKET = (
    "Please send 12 oak shelves to Lyon, and make them walnut if there are any.",
    "My parcel has not arrived, and the tracking page has shown the same depot for nine days.",
)
NEITHER = "Sea otters hold hands while sleeping; eigenvectors of symmetric matrices are orthogonal."


def told(base: Path, pack: Path, out: Path, source: Path) -> Path:
    """The pack under another name, with a profile of these rows."""
    load(pack).renamed(out.name).write(out)
    adapterpack.measure(base, out, str(source), kind="texts", out=out)
    return out


@pytest.fixture(scope="module")
def known(model: Path, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packs that know what they were trained on: orders and tickets."""
    folder = tmp_path_factory.mktemp("known")
    rows = [json.loads(line) for line in (DATA / "tickets.train.jsonl").read_text().splitlines()]
    (folder / "tickets.jsonl").write_text(
        "\n".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": row["text"]},
                        {"role": "assistant", "content": row["label"]},
                    ]
                }
            )
            for row in rows
        )
    )
    (folder / "orders.jsonl").write_text(
        "\n".join(
            json.dumps({**row, "prompt": row["prompt"].partition("\n\n")[2]})
            for row in map(json.loads, (DATA / "orders.train.jsonl").read_text().splitlines())
        )
    )
    (folder / "packs").mkdir()
    for name, pack in (("orders", "alpha"), ("tickets", "beta")):
        told(model, packs / pack, folder / "packs" / name, folder / f"{name}.jsonl")
    return folder / "packs"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ann may have everything; Bob orders alone, and not the base."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    write_keys(
        path, entry("ann", ANN, admin=True), entry("bob", BOB, adapters=["orders", "absent"], base=False)
    )
    return str(path)


@pytest.fixture(scope="module")
def chooser(start: Callable[..., Served], known: Path, keyed: str) -> Served:
    return start(adapters=[str(known)], keys=keyed)


def bodies(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    said = [{"role": "user", "content": text}]
    yield "/v1/completions", {"prompt": text, "max_tokens": 2}
    yield (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": "Be kind."}, *said], "max_tokens": 2},
    )
    yield "/v1/responses", {"input": text, "max_output_tokens": 2}
    yield "/v1/messages", {"messages": said, "max_tokens": 2}


def test_the_text_chooses(chooser: Served, known: Path) -> None:
    """On each route the adapter that was trained on such texts answers, under its own name, and says how sure
    that is; without one the base does, and says so; streams and token ids are no exception.
    """
    for text, name in ((ORDER, "orders"), (TICKET, "tickets"), (NEITHER, None)):
        for path, body in bodies(text):
            answer = chooser.post(path, {"model": "auto", **body})
            assert answer.status_code == 200, answer.text
            said, head = answer.json(), answer.headers
            told = said["adapterpack"]
            assert (said["model"], told["adapter"]) == (name or "base", name), path
            assert head["x-adapterpack-adapter"] == (name or "")
            assert 0.5 <= told["sure"] <= 1
            assert ("warnings" in told) == (name is None)
            if name is not None:
                plain = chooser.post(path, {"model": name, **body, "temperature": 0})
                assert plain.headers["x-adapterpack-digest"] == head["x-adapterpack-digest"]
                assert "sure" not in plain.json()["adapterpack"]
    ids = chooser.post("/tokenize", {"model": "auto", "prompt": ORDER}).json()["tokens"]
    for prompt in (ids, [ORDER, ORDER]):
        answer = chooser.post("/v1/completions", {"model": "auto", "prompt": prompt, "max_tokens": 1})
        assert answer.json()["model"] == "orders"
    stream = chooser.post(
        "/v1/chat/completions",
        {"model": "auto", **dict(bodies(ORDER))["/v1/chat/completions"], "stream": True},
    )
    first = json.loads(stream.text.partition("\n")[0].removeprefix("data: "))
    assert (first["model"], first["adapterpack"]["adapter"]) == ("orders", "orders")
    listed = [one["id"] for one in chooser.get("/v1/models").json()["data"]]
    assert listed[-1] == "auto"
    odd = chooser.post("/v1/completions", {"model": "auto", "prompt": [10**15, 4], "max_tokens": 1})
    assert odd.status_code == 400
    mixed = chooser.post(
        "/v1/completions", {"model": "auto", "prompt": "x", "adapters": [{"name": "orders"}]}
    )
    assert (mixed.status_code, mixed.json()["error"]["code"]) == (404, "model_not_found")
    line = [one for one in chooser.audited() if one["adapter"] == "tickets"]
    assert line and line[0]["digest"] == load(known / "tickets").id


@browser
@pytest.mark.long
def test_the_page_offers_auto(chooser: Served, tmp_path: Path) -> None:
    """As a choice that is no adapter; the answer says which was chosen, and how sure that is, and the digest
    is that of the chosen pack.
    """
    with chromium(tmp_path) as page:
        page.show(1100, 900, "dark")
        page.open(chooser.address)
        sign_in(page, ANN)
        page.wait("[...document.querySelectorAll('#model-c1 option')].some((one) => one.value === 'auto')")
        assert page.text("#model-c1 option[value=auto]") == "auto (chosen by the text)"
        for text, name in ((ORDER, "orders"), (NEITHER, "base")):
            page.run("document.querySelector('#model-c1').value = 'auto'")
            page.run("document.querySelector('#again').checked = false")  # or both texts choose
            ask(page, prompt=text, max_tokens=4)
            page.wait(f"/chose {name}, \\d/.test(document.querySelector('.pane.c1 .facts').innerText)")
            page.wait("document.querySelectorAll('.facts .right').length === 2")
        require_well(page, chooser.address, "auto")


def test_run_and_sessions_choose_as_a_server_does(
    chooser: Served, bundle: Path, model: Path, known: Path, tmp_path: Path
) -> None:
    """The same adapter, as sure, in Python and on the command line, for texts and for what users say; a row
    that names an adapter keeps it, and without profiles there is no choice.
    """
    with pytest.raises(ConfigError, match="measure --kind texts"):
        adapterpack.Session(bundle).choose(ORDER)
    own = write_bundle(tmp_path / "own", model, [known / "orders"])
    session = adapterpack.Session(own)
    assert session.choose("") == (None, 1.0)
    session.load(known / "tickets")
    said = [{"role": "system", "content": TICKET}, {"role": "user", "content": ORDER}]
    rows = [{"prompt": ORDER}, {"prompt": TICKET}, {"prompt": NEITHER}, {"messages": said}]
    wanted = ["orders", "tickets", None, "orders"]
    for row, name in zip(rows, wanted, strict=True):
        body = {"model": "auto", "messages": said} if "messages" in row else {"model": "auto", **row}
        route = "/v1/chat/completions" if "messages" in row else "/v1/completions"
        answer = chooser.post(route, {**body, "max_tokens": 1}).json()["adapterpack"]
        chosen, sure = session.choose(*row.values())
        assert (chosen, round(sure, 3)) == (name, answer["sure"]) == (answer["adapter"], answer["sure"])
    named = [{**rows[0], "adapter": "auto"}, *rows[1:], {**rows[0], "adapter": "tickets"}]
    adapters = [load(known / "tickets"), "auto"]
    found = list(adapterpack.run(own, named, adapters=adapters, max_new_tokens=1))
    assert [row["adapter"] for row in found] == [*wanted, "tickets"]
    assert ["sure" in row for row in found] == [True] * 4 + [False]
    args = ["run", str(own), str(known / "tickets"), "--adapter", "auto", "--max-new-tokens", "1"]
    done = CliRunner().invoke(main, [*args, "--prompt", ORDER])
    assert re.match(r"orders \(\d+\.\d % sure\) \| Please send", done.stdout), done.output
    alone = CliRunner().invoke(main, ["run", str(bundle), "--adapter", "auto", "--prompt", ORDER])
    assert alone.exit_code == 1
    assert "measure --kind texts" in alone.output


def test_a_key_gets_and_learns_of_no_other_adapter(chooser: Served, known: Path) -> None:
    """What fits nothing of Bob's finds neither an adapter of others, nor the base, which he may not use; how sure his order
    is does not hang on what others have.
    """
    bob = {"Authorization": f"Bearer {BOB}"}
    body = {"model": "auto", "max_tokens": 1}
    ticket = chooser.post("/v1/completions", {**body, "prompt": NEITHER}, headers=bob)
    assert (ticket.status_code, ticket.json()["error"]["code"]) == (404, "model_not_found")
    assert "tickets" not in ticket.text
    order = chooser.post("/v1/completions", {**body, "prompt": ORDER}, headers=bob)
    assert order.json()["model"] == "orders"
    alone = TextIndex()
    alone.put("orders", TextProfile.of(load(known / "orders")))
    ids = chooser.post("/tokenize", {"model": "orders", "prompt": ORDER}).json()["tokens"]
    assert order.json()["adapterpack"]["sure"] == round(alone.choose(ids)[1], 3)


def test_an_adapter_called_auto_wins(
    start: Callable[..., Served], known: Path, packs: Path, tmp_path: Path
) -> None:
    """Its name is its own, for keys that may use it; without profiles nothing is chosen, and nothing listed."""
    load(packs / "gamma").renamed("auto").write(tmp_path / "auto")
    served = start(adapters=[str(known), str(tmp_path / "auto")])
    answer = served.post("/v1/completions", {"model": "auto", "prompt": ORDER, "max_tokens": 1}).json()
    assert (answer["model"], answer["adapterpack"]["adapter"]) == ("auto", "auto")
    assert "sure" not in answer["adapterpack"]
    assert [one["id"] for one in served.get("/v1/models").json()["data"]].count("auto") == 1


def test_without_profiles_the_base_answers(server: Served) -> None:
    answer = server.post("/v1/completions", {"model": "auto", "prompt": ORDER, "max_tokens": 1}).json()
    assert (answer["model"], answer["adapterpack"]["adapter"], answer["adapterpack"]["sure"]) == (
        "base",
        None,
        1.0,
    )
    assert "auto" not in [one["id"] for one in server.get("/v1/models").json()["data"]]


def test_encoders_choose_too(
    launch: Callable[..., Served], features: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """Vectors of a text come from the adapter of such texts."""
    words = {"low": range(5, 20), "high": range(20, 35)}
    for rank, (name, some) in enumerate(words.items(), 2):
        rows = np.random.default_rng(rank).choice(list(some), (40, 8))
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": " ".join(f"w{word}" for word in row)}) for row in rows))
        pack = packed(tiny_bert, tmp_path / "plain", "feature-extraction", name, r=rank)
        told(tiny_bert, pack, tmp_path / "packs" / name, path)
    served = launch(features, adapters=[str(tmp_path / "packs")])
    for text, name in (("w6 w9 w7 w12 w11", "low"), ("w21 w33 w22 w30", "high")):
        chosen = served.post("/v1/embeddings", {"model": "auto", "input": text})
        assert chosen.json()["model"] == chosen.headers["x-adapterpack-adapter"] == name
        assert (
            chosen.json()["data"]
            == served.post("/v1/embeddings", {"model": name, "input": text}).json()["data"]
        )
    tensors = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w21 w33 w22 w30"]}]}
    answer = served.post("/v2/models/auto/infer", tensors).json()
    assert (answer["model_name"], answer["parameters"]["adapter"]) == ("high", "high")


def hostile(profile: TextProfile) -> dict[str, dict[str, Any]]:
    """What strangers may write -> a profile with it."""
    stored: dict[str, Any] = msgspec.to_builtins(profile)

    def of(*both: int) -> dict[str, Any]:
        return {**stored, "tokens": base64.b64encode(np.array(both, "<u4").tobytes()).decode()}

    every = np.frombuffer(profile.tokens, "<u4") | 255
    return {
        "a number": {**stored, "tokens": 7},
        "no base64": {**stored, "tokens": "!!!!"},
        "another field": {**stored, "more": 1},
        "a missing field": {"tokens": stored["tokens"]},
        "fits that is no number": {**stored, "fits": "nan"},
        "fits below all": {**stored, "fits": -5.0},
        "nothing": of(),
        "half a token": {**stored, "tokens": "AAA="},
        "too many": of(*(256 * token for token in range(1025))),
        "not ascending": of(256, 512, 512, 1024),
        "one token twice": of(256, 257),
        "an id that would take gigabytes": of(256, 512, 2**32 - 1),
        "every token at once": of(*every),
    }


def test_hostile_profiles_are_refused(known: Path, bundle: Path, tmp_path: Path) -> None:
    """With a reason, before the adapter gets a name; shares are those of one text, so no profile claims all."""
    pack = load(known / "orders")
    profile = TextProfile.of(pack)
    assert profile is not None
    control = AdapterControl(Engine(bundle, "cpu").adapters, "base", [], Signers(), lambda *change: None)
    for what, stored in hostile(profile).items():
        manifest = replace(pack.manifest, extensions={KEY: stored})
        bad = dataclasses.replace(pack, manifest=manifest)
        with pytest.raises(FormatError, match="profile of the pack's texts"):
            control.add(bad)
            pytest.fail(what)
        assert not control.has("orders"), what
    control.add(pack)
    assert control.texts.choose([])[0] is None


def test_names_come_and_go(known: Path) -> None:
    """An index chooses as one made anew, whatever was put and taken before."""
    profiles = {name: TextProfile.of(load(known / name)) for name in ("orders", "tickets")}
    index, text = TextIndex(), list(range(900, 960))
    for number in range(30):
        index.put(f"a{number}", profiles["orders" if number % 3 else "tickets"])
    for number in range(0, 30, 2):
        index.put(f"a{number}", None)
    index.put("a1", profiles["tickets"])
    fresh = TextIndex()
    for name in index._columns:
        fresh.put(name, profiles["tickets"] if name == "a1" or int(name[1:]) % 3 == 0 else profiles["orders"])
    assert index.choose(text) == fresh.choose(text)
    for few in (["a3"], ["a5", "a1", "none"], [], None):
        assert index.choose(text, few)[1] == pytest.approx(fresh.choose(text, few)[1])


def test_measure_writes_the_profile_into_the_pack(
    model: Path, packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place or elsewhere, with a new id and the same tensors; data that is too small is refused."""
    shutil.copytree(packs / "alpha", tmp_path / "alpha")
    before, data = load(tmp_path / "alpha"), DATA / "orders.train.jsonl"
    options = ["--data", str(data), "--kind", "texts", "-o", str(tmp_path / "alpha"), "--json"]
    done = CliRunner().invoke(main, ["measure", str(model), str(tmp_path / "alpha"), *options])
    assert done.exit_code == 0, done.output
    said, after = json.loads(done.stdout), load(tmp_path / "alpha")
    assert (said["kind"], said["pack"], said["digest"], said["rows"]) == ("texts", before.id, after.id, 240)
    assert after.manifest.tensors == before.manifest.tensors
    assert adapterpack.validate(tmp_path / "alpha").valid
    (tmp_path / "few.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(ConfigError, match="too few texts"):
        told(model, packs / "alpha", tmp_path / "few", tmp_path / "few.jsonl")


@pytest.fixture(scope="module")
def fetching(
    start: Callable[..., Served], packs: Path, keyed: str, tmp_path_factory: pytest.TempPathFactory
) -> Served:
    """A server that has nothing but its bundle's adapters, and a folder from which it may fetch."""
    folder = tmp_path_factory.mktemp("source") / "more"
    for name in ("orders", "many", "other", "hidden"):
        load(packs / "gamma").renamed(name).write(folder / name)
    (folder / "hidden").rename(folder / ".hidden")
    (folder / "link").symlink_to(folder / "orders")
    altered = load(packs / "gamma").renamed("altered").write(folder / "altered").path
    assert altered is not None
    tensors = altered / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    return start(adapters=[], fetch=[str(folder)], keys=keyed)


def said(served: Served, name: str, **options: Any) -> tuple[int, str]:
    answer = served.post("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1}, **options)
    return answer.status_code, answer.json()["error"]["code"] if answer.is_error else answer.json()["model"]


def test_many_requests_for_one_unknown_name_load_it_once(fetching: Served) -> None:
    """Twenty at once get answers, one pack is loaded, and it is listed from then on."""
    with ThreadPoolExecutor(20) as clients:
        answers = set(clients.map(lambda _: said(fetching, "many"), range(20)))
    assert answers == {(200, "many")}
    assert fetching.log.read_text().count("loaded the adapter many") == 1
    assert "many" in [one["id"] for one in fetching.get("/v1/models").json()["data"]]


def test_what_may_not_be_fetched_is_unknown(fetching: Served) -> None:
    """A name that no source has, a path, a hidden folder, a link, an altered pack, and what a key may not use
    get the answer of any unknown name; the operator sees why a pack was refused.
    """
    missing = fetching.post("/v1/completions", {"model": "missing", "prompt": "x"}).json()
    for name in (
        "missing",
        "../more/other",
        "more/other",
        ".hidden",
        "..",
        "link",
        "altered",
        "other\0",
        "x" * 300,
    ):
        answer = fetching.post("/v1/completions", {"model": name, "prompt": "x"})
        assert answer.status_code == 404, name
        assert answer.json() == json.loads(
            json.dumps(missing).replace("missing", name[:200].replace("\0", r"\\x00"))
        )
    bob = {"Authorization": f"Bearer {BOB}"}
    assert said(fetching, "other", headers=bob) == (404, "model_not_found")
    assert said(fetching, "absent", headers=bob) == (404, "model_not_found")
    assert "other" not in [one["id"] for one in fetching.get("/v1/models").json()["data"]]
    assert said(fetching, "orders", headers=bob) == (200, "orders")
    log = fetching.log.read_text()
    assert "loaded the adapter other" not in log
    assert all(f"the adapter {name} was refused" in log for name in ("link", "altered"))


def test_a_fetched_pack_needs_the_signature_too(
    start: Callable[..., Served], packs: Path, keyed: str, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "team.pub").write_bytes(public.public_bytes(serialization.Encoding.PEM, form))
    load(packs / "gamma").renamed("orders").write(tmp_path / "more" / "orders")
    served = start(
        adapters=[],
        fetch=[str(tmp_path / "more")],
        keys=keyed,
        require_signature=[str(tmp_path / "team.pub")],
    )
    assert said(served, "orders") == (404, "model_not_found")


def test_the_least_recently_named_goes_and_names_are_looked_for_again(
    bundle: Path, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three fetched adapters two stay; a name that was absent is looked for again after a while; what is
    absent is forgotten beyond a number.
    """
    monkeypatch.setattr(on_request, "MOST", 2)
    monkeypatch.setattr(on_request, "_ABSENT_SECONDS", 0.5)
    for name in ("a", "b", "c"):
        load(packs / "gamma").renamed(name).write(tmp_path / name)
    control = AdapterControl(Engine(bundle, "cpu").adapters, "base", [], Signers(), lambda *change: None)
    fetched = OnRequest(control, [PackFolder(tmp_path)])

    async def everything() -> None:
        for name in ("a", "b", "a", "c"):
            await fetched.ensure(name, EVERYBODY)
        assert [control.has(name) for name in ("a", "b", "c", "alpha")] == [True, False, True, True]
        await fetched.ensure("d", EVERYBODY)
        load(packs / "gamma").renamed("d").write(tmp_path / "d")
        await fetched.ensure("d", EVERYBODY)
        assert not control.has("d")
        await asyncio.sleep(0.6)
        await fetched.ensure("d", EVERYBODY)
        assert control.has("d")
        await asyncio.gather(*(fetched.ensure(f"none{number}", EVERYBODY) for number in range(9)))
        assert len(fetched._absent) == 2

    asyncio.run(everything())


def test_sources(
    packs: Path, bundle: Path, cache: Path, port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An owner on a hub gives packs by name, and nothing else; what is no source is refused at the start."""
    control = AdapterControl(Engine(bundle, "cpu").adapters, "base", [], Signers(), lambda *change: None)
    with pytest.MonkeyPatch.context() as patch, hub_in(tmp_path, port) as address:
        patch.setenv("HF_ENDPOINT", address)
        published(packs / "gamma", "tickets", tmp_path / "tickets", "hf://ann/tickets")
        adapterpack.push(bundle, "hf://ann/bundle", base_model="ann/base", license="mit")
        owner = source_on_request("hf://ann")
        assert owner == HubOwner("ann")
        begun = time.monotonic()
        fetched = OnRequest(control, [PackFolder(packs), owner])
        names = ("absent", "bundle", "a--b", "tickets", "gamma")

        async def everything() -> None:
            for name in names:
                await fetched.ensure(name, EVERYBODY)

        asyncio.run(everything())
        assert time.monotonic() - begun < 60
    assert [control.has(name) for name in names] == [False, False, False, True, True]
    assert [one.message.partition(":")[0] for one in caplog.records if one.levelname == "ERROR"] == [
        "the adapter bundle was refused"
    ]
    with pytest.raises(ConfigError, match="owner"):
        source_on_request("hf://ann/tickets")
    with pytest.raises(StorageError):
        source_on_request(tmp_path / "nowhere")
