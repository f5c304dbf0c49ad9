"""Sites in a real browser: the same numbers as a session of Python, further packs that are loaded or refused,
and the page itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import EVIL, Page, browser, require_well
from sites import WEB, fetched, logits, npm, opened, said, served

from adapterpack import Session, load, run
from adapterpack.bundle.manifest import FILE_NAME, bundle_in, read_bundle
from adapterpack.manifest.manifest import seal

pytestmark = [browser, npm]
TEXTS = ("It leaks.", "I would like to have my money back, please, and soon.", "Why?")
CTRL = 2
NEAR = 1e-4
"""The largest difference of two runtimes in float32, of logits of size 1: kernels sum in other orders."""


def refusal(page: Page, call: str) -> str:
    """The name of the error with which a call of the bundle ends."""
    return str(page.run(f"adapterpack.bundle.{call}.then(() => 'nothing', (error) => error.name)"))


def ask_both(page: Page, *names: str) -> list[list[str]]:
    """Has the two sides answered by models of those names; the labels that each shows, in order."""
    for tone, name in zip(("c1", "c2"), names, strict=True):
        page.run(f"document.querySelector('#model-{tone}').value = {json.dumps(name)}")
    page.run("document.querySelector('#said').textContent = ''")
    page.run("document.querySelector('textarea').focus()")
    page.key("Enter", 13, CTRL)
    page.wait("document.querySelector('#said').textContent.startsWith('Ended')")
    labels: list[list[str]] = page.run(
        "[...document.querySelectorAll('.pane')].map((pane) => "
        "[...pane.querySelectorAll('.label')].map((label) => label.innerText))"
    )
    return labels


def test_rows_of_a_batch_and_further_packs(
    page: Page, site_of: Callable[..., Path], record_property: Callable[..., None]
) -> None:
    """Base and two adapters in one batch as in Python; a third pack is loaded while rows wait, and altered
    ones are refused by name.
    """
    site = site_of("bert")
    session = Session(bundle_in(site), "cpu")
    names = [None, "alpha", "beta"]
    rows = list(zip(TEXTS, names, strict=True))
    assert len(list((site / "bundle").glob("model-*.onnx.data"))) >= 3
    with served(site) as address:
        took = opened(page, site, address)
        expected = session.run(session.encode(TEXTS), names)["logits"]
        np.testing.assert_allclose(logits(page, rows), expected, rtol=1e-6, atol=NEAR)
        texts = [{"text": text, "adapter": name} for text, name in rows[1:]]
        texts.append({"text": TEXTS[0], "text_pair": TEXTS[1], "adapter": "beta"})
        answers = page.run(
            f"adapterpack.bundle.classify({json.dumps([{**one, 'textPair': one.get('text_pair')} for one in texts])})"
        )
        for answer, own in zip(answers, run(bundle_in(site), texts), strict=True):
            assert answer["label"] == own["label"]
            assert answer["scores"] == pytest.approx(own["scores"], abs=NEAR)
        tampered = shutil.copytree(site / "packs" / "gamma", site.parent / "tampered")
        weights, manifest = tampered / "adapter_model.safetensors", tampered / "adapterpack.json"
        (site / "tampered").symlink_to(tampered)
        whole, said = weights.read_bytes(), manifest.read_text()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert refusal(page, "load('tampered/')") == "DigestMismatch"
        weights.write_bytes(whole)
        pinned = load(site / "packs" / "gamma").id
        value = json.loads(said)
        tensor = value["tensors"]["base_model.model.classifier.weight"]
        other = "bfp1:" + "0" * 64
        altered = [
            (said.replace('"authors"', '"authorz"').encode(), "", "DigestMismatch"),
            (seal(value | {"license": "MIT"}), pinned, "DigestMismatch"),
        ]
        canary = value["canary"]
        moved = [{**row, "logits": [number + 1 for number in row["logits"]]} for row in canary["adapter"]]
        for change, error in (
            ({"canary": {**canary, "adapter": moved}}, "ParityError"),
            ({"canary": {**canary, "base": canary["base"][:1]}}, "FormatError"),
            ({"task": value["task"] | {"type": "token-classification"}}, "Unsupported"),
            (
                {
                    "tensors": value["tensors"]
                    | {"base_model.model.classifier.weight": tensor | {"sha256": "0" * 64}}
                },
                "DigestMismatch",
            ),
            ({"base": value["base"] | {"content": other, "probe": other}}, "BaseMismatch"),
            ({"method": value["method"] | {"type": "dora"}}, "Unsupported"),
        ):
            altered.append((seal(value | change), "", error))
        for text, digest, error in altered:
            manifest.write_bytes(text)
            assert refusal(page, f"load('tampered/', {{digest: '{digest}' || undefined}})") == error
        loaded = page.run(f"adapterpack.bundle.load('packs/gamma/', {{digest: '{pinned}'}})")
        assert (loaded["pack"], loaded["slot"], loaded["labels"]) == (pinned, 3, ["one", "two"])
        assert loaded["note"] is None  # its canary was replayed
        assert refusal(page, "load('packs/gamma/', {name: 'again'})") == "Unsupported"  # no slot is free
        session.load(load(site / "packs" / "gamma"))
        rows, names = [*rows, ("It leaks.", "gamma")], [*names, "gamma"]
        expected = session.run(session.encode([text for text, _ in rows]), names)["logits"]
        np.testing.assert_allclose(logits(page, rows), expected, rtol=1e-6, atol=NEAR)
        assert (
            page.run(
                "adapterpack.bundle.classify([{text: 'a', adapter: 'nobody'}]).catch((error) => error.name)"
            )
            == "UnknownAdapter"
        )
    size = sum(path.stat().st_size for path in [*site.glob("*.*"), *site.glob("page/*")])
    record_property(
        "figure", f"a site's own files: {size / 1000:.0f} kB; the tiny classifier is open after {took:.2f} s"
    )


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_text_token_by_token(page: Page, site_of: Callable[..., Path], quantize: str | None) -> None:
    """The greedy tokens of Python, base and adapter; of a quantized bundle by its graph for WebAssembly. The
    page shows them, and continues the conversation of each side.
    """
    site = site_of("llama", quantize)
    session = Session(bundle_in(site), "cpu")
    assert (site / "bundle" / "wasm.onnx").exists() == (quantize is not None)
    with served(site) as address:
        opened(page, site, address)
        note = page.run("adapterpack.bundle.load('packs/gamma/').then((adapter) => adapter.note)")
        assert (note is None) == (quantize is None)  # its canary was replayed, or it is said why not
        for name in (None, "alpha"):
            own = session.generate(["Where is my order?"], [name], max_new_tokens=12)[0]
            assert said(page, "Where is my order?", name, 12) == own.text
            assert own.text
        first = session.generate(["Why?"], ["alpha"], max_new_tokens=6)[0].text
        page.run("document.querySelector('#max_tokens').value = 6")
        page.run("document.querySelector('#prompt').value = 'Why?'")
        ask_both(page, "alpha", "beta")
        output = "document.querySelector('.pane.c1 .answer:last-child').textContent"
        assert page.run(output) == first
        page.run("document.querySelector('#prompt').value = 'Why?'")
        ask_both(page, "alpha", "beta")
        messages = [("user", "Why?"), ("assistant", first), ("user", "Why?")]
        chat = [{"role": role, "content": content} for role, content in messages]
        assert page.run(output) == said(page, chat, "alpha", 6)


def test_the_page(page: Page, site_of: Callable[..., Path], tmp_path: Path) -> None:
    """Base and adapters side by side with the scores of Python; a file picker's pack is refused with one byte
    altered and loaded without; labels full of markup are text, every control has a name, and nothing is wider
    than a phone.
    """
    site = site_of("bert")
    pack = shutil.copytree(site / "packs" / "gamma", tmp_path / "gamma")
    weights = pack / "adapter_model.safetensors"
    whole = weights.read_bytes()

    def load_pack() -> None:
        field = page.call("Runtime.evaluate", expression="document.querySelector('#pack-files')")["result"][
            "objectId"
        ]
        page.call(
            "DOM.setFileInputFiles", files=[str(pack / "adapterpack.json"), str(weights)], objectId=field
        )
        page.run("document.querySelector('#load-button').click()")

    with served(site) as address:
        page.show(1400, 900, "light")
        opened(page, site, address)
        chosen = "[...document.querySelectorAll('.pane > select')].map((one) => one.value)"
        assert page.run(chosen) == ["alpha", "beta"]  # the base has no head
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        load_pack()
        page.wait(
            "document.querySelector('#trouble').innerText.includes('The pack is refused. "
            "adapter_model.safetensors has the SHA-256')"
        )
        weights.write_bytes(whole)
        load_pack()
        page.wait("document.querySelectorAll('#models tbody tr').length === 3")
        base, *names = page.run("[...document.querySelectorAll('#model-c1 option')].map((one) => one.value)")
        assert names == ["alpha", "beta", "gamma"]
        page.run("document.querySelector('#text').select()")
        page.type(TEXTS[0])
        shown = ask_both(page, "alpha", "beta")
        own = run(bundle_in(site), [{"text": TEXTS[0], "adapter": name} for name in ("alpha", "beta")])
        ordered = [
            sorted(answer["scores"], key=lambda label, scores=answer["scores"]: -scores[label])
            for answer in own
        ]
        assert [EVIL in labels for labels in ordered] == [True, False]
        assert shown == ordered
        gamma, none = ask_both(page, "gamma", base)
        assert sorted(gamma) == ["one", "two"] and none == []
        assert "no trained head" in page.text(".pane.c2 .output")
        require_well(page, address, "site")


def test_an_altered_bundle_is_refused(page: Page, site_of: Callable[..., Path], tmp_path: Path) -> None:
    """One bit of a data file, and the page says which file it is."""
    site = shutil.copytree(site_of("bert"), tmp_path / "site", symlinks=True)
    part = next((site / "bundle").glob("model-2.onnx.data"))
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    with served(site) as address:
        page.open(f"{address}/index.html?provider=wasm")
        page.wait("!document.querySelector('#trouble').hidden", 60)
        assert "model-2.onnx.data has the SHA-256" in page.text("#trouble")


def test_a_site_is_a_bundle(site_of: Callable[..., Path]) -> None:
    """Its data files are small, what it lists is all that it has, and both its graphs give the same."""
    import onnxruntime as ort

    site = site_of("llama", "int8")
    bundle = read_bundle(bundle_in(site))
    assert (bundle.target, bundle.decoder) == ("web", False)
    facts = json.loads((site / "bundle" / "web.json").read_text())
    assert set(facts["slots"]) == {port.name for port in bundle.io.slots}
    assert {entry.path for entry in bundle.files} | {FILE_NAME} == {
        path.relative_to(site / "bundle").as_posix()
        for path in (site / "bundle").rglob("*")
        if path.is_file()
    }
    feeds: dict[str, Any] = {
        "input_ids": np.array([[5, 9, 700]]),
        "attention_mask": np.ones((1, 3), np.int64),
        "position_ids": np.arange(3)[None],
        "adapter_ids": np.array([1]),
    }
    both = []
    for name in ("model.onnx", "wasm.onnx"):
        graph = ort.InferenceSession(site / "bundle" / name, providers=["CPUExecutionProvider"])
        past = {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
            for one in graph.get_inputs()
            if "past" in one.name
        }
        both.append(graph.run(["logits"], {**feeds, **past})[0])
    np.testing.assert_allclose(both[1], both[0], rtol=0, atol=3e-2 * np.abs(both[0]).max())


def test_the_script_is_what_its_source_makes(tmp_path: Path) -> None:
    """``web/dist`` is the build of ``web/src``, with the types; the page's policy names its import map, and
    nothing makes markup.
    """
    copy = shutil.copytree(WEB, tmp_path / "web", ignore=shutil.ignore_patterns("node_modules", "dist"))
    (copy / "node_modules").symlink_to(fetched())
    modules = copy / "node_modules"
    subprocess.run(["node", modules / "typescript" / "bin" / "tsc"], cwd=copy, check=True)
    command = json.loads((copy / "package.json").read_text())["scripts"]["build"].split(" && ")[1].split()
    subprocess.run([modules / ".bin" / command[0], *command[1:]], cwd=copy, check=True, capture_output=True)
    built, shipped = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (copy / "dist", WEB / "dist")
    )
    assert built == shipped, "build it again: npm run build in web/"
    html = (WEB / "site-head.html").read_text() + (WEB / "page" / "index.html").read_text()
    text = re.findall(r'<script type="importmap">(.*?)</script>', html, re.DOTALL)[0]
    assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in html
    assert re.findall(r"\son\w+=|\sstyle=|<style", html) == []
    for path in (*(WEB / "page").iterdir(), *(WEB / "src").iterdir()):
        found = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://",
            path.read_text().replace("http://www.w3.org/2000/svg", ""),
        )
        assert found is None, path
