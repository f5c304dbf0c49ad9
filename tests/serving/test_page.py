"""The page at ``/`` and what it is made of: its files, the figures that a key may see, and itself in a
browser.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from chromium import EVIL, Page, browser, chromium, require_well
from encoder_packs import packed
from servers import ANN, BOB, Served, entry, waited, write_keys

from adapterpack.serving.observability import traffic
from adapterpack.serving.observability.audit import Record
from adapterpack.serving.observability.traffic import Traffic
from adapterpack.serving.page import HEADERS, page_files

EVE = "ap-eve-eve-eve-eve-eve"
CTRL = 2


def test_the_files_need_nothing_from_elsewhere() -> None:
    """What a file names is there, none is left over, none names another host; nothing in them is script or
    style where the policy forbids it, or makes markup of text.
    """
    files = {name: file.data.decode() for name, file in page_files().items()}
    named = {"index.html"}
    for name, text in files.items():
        assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|@import|url\(",
            text,
        ), name
        named |= set(re.findall(r'(?:from "\./|(?:src|href)="page/)([^"]+)"', text))
        assert text.count("\n") < 120, name
    assert named == set(files)
    html = files["index.html"]
    assert re.findall(r"\son\w+=|\sstyle=|<style", html) == []
    assert re.findall(r"<script[^>]*>(.*?)</script>", html) == ["", ""]
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert {policy[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {
        "'none'"
    }
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}


def test_everybody_gets_the_files_and_no_data(server: Served) -> None:
    """Without a key there is the page, the same for all, and with its policy; other names are 404."""
    for path, name in (("/", "index.html"), *((f"/page/{name}", name) for name in page_files())):
        answer = httpx.get(server.address + path, timeout=120)
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (
            200,
            *page_files()[name],
        )
        assert answer.headers.items() >= {name.lower(): value for name, value in HEADERS.items()}.items()
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in (
        "/page/",
        "/page/nothing.js",
        "/page/..%2fapp.py",
        "/page/%2e%2e/routes.py",
        "/page/__init__.py",
        "/page/files/app.js",
    ):
        assert httpx.get(server.address + path, timeout=120).status_code == 404, path
    assert httpx.get(f"{server.address}/v1/status", timeout=120).status_code == 401
    assert "/page/{name}" not in server.get("/openapi.json").json()["paths"]


def test_a_key_sees_its_own_figures(server: Served) -> None:
    """Two keys ask: each sees what it had itself, and an operator both; a tenant's answers have no other's
    adapter, key or figure, nor what depends on others. Looking is not written down, a look without a key is.
    """
    ann, bob = server.headers, {"Authorization": f"Bearer {BOB}"}

    def look(headers: dict[str, str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
        """The status, the models by name, and all of it as text."""
        status, models = (server.get(path, headers=headers) for path in ("/v1/status", "/v1/status/models"))
        return status.json(), {one["name"]: one for one in models.json()["models"]}, status.text + models.text

    def more(before: Any, after: Any) -> tuple[int, int]:
        """Requests, and tokens of answers, that came in between."""
        return tuple(
            after["counts"][name] - before["counts"][name] for name in ("requests", "completion_tokens")
        )  # type: ignore[return-value]

    before = look(ann), look(bob)
    for model, headers, tokens in (
        ("alpha", bob, 3),
        ("alpha", ann, 4),
        ("alpha", ann, 4),
        ("beta", ann, 5),
        ("base", ann, 6),
    ):
        body = {"model": model, "prompt": "one two three " * 20, "max_tokens": tokens, "min_tokens": tokens}
        assert server.post("/v1/completions", body, headers=headers).status_code == 200
    assert httpx.get(f"{server.address}/v1/status", timeout=120).status_code == 401
    (whole, every, _), (own, mine, text) = look(ann), look(bob)
    assert not re.search("ann|beta|gamma|resident|refused|engine", text)
    assert (own["of"], own["key"], more(before[1][0], own), list(mine)) == ("key", "bob", (1, 3), ["alpha"])
    assert own["wait"]["p95"] >= own["wait"]["p50"] > 0
    assert (mine["alpha"]["digest"], mine["alpha"]["generation"]) == (server.adapters["alpha"], 1)
    assert more(before[1][1]["alpha"], mine["alpha"]) == (1, 3)
    facts = mine["alpha"]["adapter"]
    assert (facts["method"], facts["ranks"], "q_proj" in facts["modules"]) == ("lora", [2, 2], True)
    assert min(facts["sites"], facts["bytes"]) > 0
    assert (whole["of"], whole["waiting"], whole["running"], more(before[0][0], whole)) == (
        "all",
        0,
        0,
        (5, 22),
    )
    assert whole["engine"]["prompt_tokens_reused"] > before[0][0]["engine"]["prompt_tokens_reused"]
    assert {name: more(before[0][1][name], one) for name, one in every.items()} == {
        "base": (1, 6),
        "alpha": (3, 11),
        "beta": (1, 5),
        "gamma": (0, 0),
    }
    assert [every[name].get("resident") for name in ("base", "alpha", "beta")] == [None, True, True]
    assert server.get("/v1/status/models").json()["refused"] == []
    assert {line["status"] for line in server.audited() if line["route"].startswith("GET /v1/status")} == {
        401
    }


def test_figures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that run count at once, waiting times for five minutes, and keys and models that have been away
    longest go first.
    """
    monkeypatch.setattr(traffic, "MOST_KEYS", 3)
    monkeypatch.setattr(traffic, "MOST_MODELS", 3)
    now = 1000.0
    counted = Traffic(lambda: now)
    output: Any = type("Output", (), {"tokens": 7, "first": 1004.0})()
    rows: Any = [
        SimpleNamespace(request=request, ended=ended)
        for request, ended in ((None, False), (1, False), (1, True))
    ]
    record = Record("id", "route", started=1000.0, adapter="a", prompt_tokens=5)
    with counted.count("ann", record, rows, output):
        tally = counted.of("ann")
        assert (tally.waiting, tally.running, tally.counts.completion_tokens, tally.of("a").requests) == (
            1,
            1,
            7,
            0,
        )
    assert (
        tally.waiting,
        tally.running,
        tally.counts.completion_tokens,
        tally.of("a").completion_tokens,
    ) == (0, 0, 7, 7)
    for number in range(1, 101):
        output.first = 1000.0 + number
        record.adapter = f"a{number}"
        with counted.count(f"key{number}", record, rows, output):
            pass
    assert counted.all.wait == traffic.Wait(101, 50.0, 95.0)
    assert [counted.all.of(name).requests for name in ("a", "a97", "a98", "a100")] == [0, 0, 1, 1]
    assert [counted.of(name).counts.requests for name in ("key98", "key99", "key100", "key97", "ann")] == [
        1,
        1,
        1,
        0,
        0,
    ]
    now += 400
    assert counted.all.wait is None


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A browser."""
    with chromium(tmp_path) as opened:
        yield opened


def sign_in(page: Page, key: str) -> None:
    page.wait("!document.querySelector('#sign-in').hidden && document.activeElement.id === 'key'")
    page.type(key)
    page.key("Enter", 13, text="\r")


def ask(page: Page, **options: object) -> None:
    """Fills in what is given, and asks by the keyboard, when nothing else is being answered."""
    page.wait("document.querySelector('#compare button.first')?.disabled === false")
    for name, value in options.items():
        page.run(f"document.querySelector('#{name}').value = {json.dumps(value)}")
    page.run("document.querySelector('textarea').focus()")
    page.key("Enter", 13, CTRL)


def answers(page: Page) -> list[str]:
    return [page.text(f".pane.{tone} .answer:last-child") for tone in ("c1", "c2")]


@browser
@pytest.mark.long
def test_text_side_by_side(
    page: Page, launch: Callable[..., Served], bundle: Path, packs: Path, tmp_path: Path
) -> None:
    """Keys, wrong and right, in the tab alone; two answers at once that are what the API says, with digests
    that agree; Escape stops both; an answer, names and reasons full of markup are text; another pack's digest
    is said; keyboard, themes, a phone's width.
    """
    folder = tmp_path / "packs"
    shutil.copytree(packs / "gamma", folder / "gamma")
    (folder / EVIL).mkdir()
    (folder / EVIL / "adapterpack.json").write_text("{}")
    write_keys(
        tmp_path / "keys",
        entry("ann", ANN, admin=True),
        entry("bob", BOB, adapters=["alpha"], base=False),
        entry("eve", EVE, adapters=[]),
    )
    server = launch(
        bundle, adapters=[str(folder)], watch=0.2, name=f"base {EVIL}", keys=str(tmp_path / "keys")
    )
    page.show(1100, 900, "light")
    page.open(server.address)
    sign_in(page, "wrong-wrong-wrong-wrong")
    page.wait("document.querySelector('#trouble').innerText.includes('not known')")
    page.picture("sign-in")
    sign_in(page, BOB)
    page.wait("document.querySelectorAll('#models tbody tr').length === 1")
    seen = page.run("document.body.innerText")
    assert "alpha" in seen
    assert not re.search("beta|gamma|in memory|Refused|known already", seen)
    assert (
        page.run("[location.href, localStorage.length, sessionStorage.length].join()")
        == f"{server.address}/,0,1"
    )
    page.run("document.querySelector('#sign-out').click()")
    assert page.run("sessionStorage.length") == 0
    sign_in(page, EVE)
    page.wait("document.querySelector('#models').innerText.includes('may name no adapter')")
    page.run("document.querySelector('#sign-out').click()")
    sign_in(page, ANN)
    page.wait(
        "document.querySelectorAll('#models tbody tr').length === 4 && "
        "!document.querySelector('#refused').hidden"
    )
    assert EVIL in page.text("#base")
    assert "Unload" not in page.text(
        "#models"
    )  # which a browser's own bundle can, and a server does not offer
    assert EVIL in page.text("#refused-list")
    assert str(tmp_path) not in page.text("#refused-list")
    page.run(
        "for (const [tone, name] of [['c1', 'alpha'], ['c2', 'gamma']]) "
        "document.querySelector(`#model-${tone}`).value = name"
    )
    page.run("document.querySelector('#again').click()")  # each question by itself
    ask(page, prompt="Where is my parcel?", max_tokens="24", temperature="0", seed="7")
    page.wait("document.querySelectorAll('.facts .right').length === 2")
    body = {
        "messages": [{"role": "user", "content": "Where is my parcel?"}],
        "max_tokens": 24,
        "temperature": 0,
        "seed": 7,
    }
    said = [
        server.post("/v1/chat/completions", {"model": name, **body}).json()["choices"][0]
        for name in ("alpha", "gamma")
    ]
    assert [text.split() for text in answers(page)] == [one["message"]["content"].split() for one in said]
    facts = page.text(".pane.c2 .facts")
    assert server.adapters["gamma"][7:19] in facts
    assert re.search(r"first token after .*24 tokens.*tokens/s", facts.replace("\n", " "))
    page.wait("document.querySelectorAll('#live .chart polyline').length >= 3")
    page.run(
        "(select => { select.value = '+'; select.dispatchEvent(new Event('change')); "
        "})(document.querySelector('#model-c2'))"
    )
    for place, name, weight in (("first", "gamma", "-0.25"), ("second", "alpha", "1")):
        page.run(f"document.querySelector('#mix-c2-{place}').value = '{name}'")
        page.run(f"document.querySelector('#weight-c2-{place}').value = {weight}")
    ask(page)
    page.wait("document.querySelector('#said').innerText === 'Ended: alpha and -0.25 × gamma + 1 × alpha.'")
    mix = [{"name": "gamma", "weight": -0.25}, {"name": "alpha"}]
    both = server.post("/v1/chat/completions", {"model": f"base {EVIL}", "adapters": mix, **body}).json()[
        "choices"
    ][0]
    assert answers(page)[1].split() == both["message"]["content"].split() != answers(page)[0].split()
    assert re.search(
        rf"1 × {server.adapters['alpha'][7:19]} -0.25 × {server.adapters['gamma'][7:19]} ✓",
        page.text(".pane.c2 .facts"),
    )
    page.picture("mixed")
    page.run(
        "(select => { select.value = 'gamma'; select.dispatchEvent(new Event('change')); "
        "})(document.querySelector('#model-c2'))"
    )
    page.run("document.querySelector('#again').click()")
    page.run("document.querySelector('button.plain[type=button]:not(#sign-out)').click()")
    turns = []
    for place, question in enumerate(("Where?", "And when?")):
        ask(page, prompt=question, system="Be brief.")
        page.wait(f"document.querySelectorAll('.pane.c1 .question').length === {place + 1}")
        page.wait("document.querySelectorAll('.facts .right').length === 2")
        turns += [{"role": "user", "content": question}]
        whole = {**body, "messages": [{"role": "system", "content": "Be brief."}, *turns]}
        said = server.post("/v1/chat/completions", {"model": "alpha", **whole}).json()["choices"][0]
        assert answers(page)[0].split() == said["message"]["content"].split()
        turns += [said["message"]]
        assert page.run("document.querySelector('#prompt').value") == ""
    page.picture("conversation")
    page.run("document.querySelector('#again').click()")
    with server.held(30):
        ask(page, prompt="Where is my parcel?", max_tokens="450")
        page.wait("document.querySelector('.pane.c2 .output').hasAttribute('aria-busy')")
        # the other may have come when no step was left
        page.wait("[...document.querySelectorAll('.answer')].some((answer) => answer.innerText.length > 30)")
        page.key("Escape", 27)
        page.wait(
            "[...document.querySelectorAll('.output')].every((output) => "
            "output.innerText.includes('Stopped.'))"
        )
    waited(lambda: not server.rows())
    other = "sha256:" + "0" * 64

    def evil(request: dict[str, Any]) -> tuple[dict[str, str], str]:
        choice = {
            "index": 0,
            "delta": {"content": f"{EVIL}<script>window.hacked = 1</script>"},
            "finish_reason": "stop",
        }
        event = json.dumps({"system_fingerprint": other, "choices": [choice]})
        return {
            "Content-Type": "text/event-stream",
            "X-Adapterpack-Digest": other,
        }, f"data: {event}\n\ndata: [DONE]\n\n"

    page.answer("/v1/chat/completions", evil)
    ask(page)
    page.wait("document.querySelectorAll('.facts .wrong').length === 2")
    assert all(EVIL in text for text in answers(page))
    page.picture("another-digest")
    assert "not the pack that is listed" in page.text(".pane.c1 .facts")
    require_well(page, server.address, "text")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    page.run(
        "(select => { select.value = 'light'; select.dispatchEvent(new Event('change')); "
        "})(document.querySelector('#theme'))"
    )
    page.open(server.address)
    # a tab keeps its key
    page.wait("document.querySelector('#compare form')?.hidden === false")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    places = []
    page.run("document.activeElement.blur()")
    for _ in range(13):
        page.key("Tab", 9)
        places.append(
            page.run(
                "document.activeElement.id || document.activeElement.className || "
                "document.activeElement.textContent"
            )
        )
    assert places == [
        "skip",
        "sign-out",
        "theme",
        "prompt",
        "system",
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "plain",
        "again",
        "plain",
        "first",
    ]
    page.trouble.clear()
    markup = (
        "(() => { try { document.body.innerHTML = '<b>'; return 'ran' } catch (error) { return error.name } "
        "})()"
    )
    assert page.run(markup) == "TypeError"


@browser
@pytest.mark.long
def test_labels_and_vectors(
    page: Page,
    launch: Callable[..., Served],
    bundle_of: Callable[[str, str], Path],
    tiny_bert: Path,
    features: Path,
    tmp_path: Path,
) -> None:
    """Encoders' bundles: labels full of markup as text, with bars as long as the API's scores; the cosine of
    two texts by two adapters.
    """
    labels = ["w1", EVIL, "a label"]
    another = packed(
        tiny_bert, tmp_path, "text-classification", "another", labels, r=2, modules_to_save=("classifier",)
    )
    server = launch(bundle_of("bert", "bank"), adapters=[str(another)])
    page.show(1100, 900, "dark")
    page.open(server.address)
    sign_in(page, ANN)
    page.wait(
        "!document.querySelector('#content').hidden && document.querySelectorAll('#model-c1 "
        "option').length === 4"
    )
    first = page.run("['c1', 'c2'].map((tone) => document.querySelector(`#model-${tone}`).value)")
    assert first == ["alpha", "another"]  # and not the base, which has no head
    ask(page, text="w1 w2 w3")
    page.wait("document.querySelectorAll('.facts .right').length === 2")
    scores = server.post("/v1/classify", {"model": "another", "input": "w1 w2 w3"}).json()["data"][0][
        "scores"
    ]
    shown = page.run(
        "[...document.querySelectorAll('.pane.c2 .bars li')].map((li) => "
        "[li.querySelector('.label').innerText, parseFloat(li.querySelector('.fill').style.width)])"
    )
    assert [label for label, _ in shown] == sorted(scores, key=lambda label: -scores[label])
    assert dict(shown) == pytest.approx({label: 100 * score for label, score in scores.items()}, abs=0.01)
    require_well(page, server.address, "labels")
    server = launch(features)
    page.open(server.address)
    sign_in(page, ANN)
    page.wait(
        "!document.querySelector('#content').hidden && document.querySelectorAll('#model-c1 "
        "option').length === 4"
    )
    ask(page, one="w1 w2", other="w3")
    page.wait("document.querySelectorAll('.facts .right').length === 2")
    one, two = (
        item["embedding"]
        for item in server.post("/v1/embeddings", {"model": "alpha", "input": ["w1 w2", "w3"]}).json()["data"]
    )
    assert float(page.text(".pane.c2 .figure")) == pytest.approx(
        sum(a * b for a, b in zip(one, two, strict=True)), abs=6e-4
    )
