"""A headless Chromium that a test drives by its DevTools protocol, through a pipe: no library between
them.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import child

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(PROGRAM is None and not os.environ.get("CI"), reason="no Chromium here")
"""Marks a test that needs a browser: it is left out where there is none, but in CI it fails."""
_ARGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--force-color-profile=srgb",
    "--lang=en",
)
_NO_GPU = ("--disable-gpu",)
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
"""Arguments for WebGPU without a card: SwiftShader computes on the CPU what a card would."""
_SECONDS = 120.0
EVIL = "<img src=x onerror=window.hacked=1>"
"""A name or a label that would become markup where text does."""
CONTROLS = ("button", "textbox", "combobox", "checkbox", "spinbutton", "searchbox")


class Page:
    """One page of a browser. ``trouble`` are errors of scripts, and what policies forbade; ``requests`` the
    addresses that it asked for.
    """

    def __init__(self, reading: int, writing: int, folder: Path) -> None:
        self._folder = folder
        self._reading, self._writing, self._number, self._rest = reading, writing, 0, b""
        self._session: str | None = None
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.answers: dict[str, Callable[[dict[str, Any]], tuple[dict[str, str], str]]] = {}
        """By the end of an address: the headers and the body that this test answers in place of the
        server.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        number = self._send(method, params)
        until = time.monotonic() + _SECONDS
        while True:
            message = self._message(until)
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    def open(self, address: str) -> None:
        """Goes to an address, and waits until its scripts have run."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript, or of what it promises."""
        done = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in done, (expression, done["exceptionDetails"])
        return done["result"].get("value")

    def wait(self, expression: str, seconds: float = _SECONDS) -> Any:
        """Waits until an expression is true; its value."""
        until = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < until, (expression, self.run("document.body.innerText"), self.trouble)
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        """What somebody reads of an element."""
        text: str = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return text

    def key(self, name: str, code: int, modifiers: int = 0, text: str = "") -> None:
        """Presses a key and lets it go."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
                **more,
            )

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def show(self, width: int, height: int, theme: str) -> None:
        """The size of the window, and the theme that the system has."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def picture(self, name: str) -> None:
        """A picture of the whole page, next to the browser's log: for who wants to see what a test saw."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)[
            "data"
        ]
        (self._folder / f"{name}.png").write_bytes(base64.b64decode(data))

    def answer(self, ending: str, answer: Callable[[dict[str, Any]], tuple[dict[str, str], str]]) -> None:
        """Answers requests for addresses of this ending in place of the server."""
        self.answers[ending] = answer
        self.call("Fetch.enable", patterns=[{"urlPattern": f"*{one}"} for one in self.answers])

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._number += 1
        message = {
            "id": self._number,
            "method": method,
            "params": params,
            **({"sessionId": self._session} if self._session else {}),
        }
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        return self._number

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser says nothing"
            more = os.read(self._reading, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        data, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(data)
        return message

    def _hear(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.trouble.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.trouble.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Fetch.requestPaused":
                asked = params["request"]
                headers, body = next(
                    answer for ending, answer in self.answers.items() if asked["url"].endswith(ending)
                )(asked)
                self._send(
                    "Fetch.fulfillRequest",
                    {
                        "requestId": params["requestId"],
                        "responseCode": 200,
                        "body": base64.b64encode(body.encode()).decode(),
                        "responseHeaders": [
                            {"name": name, "value": value} for name, value in headers.items()
                        ],
                    },
                )


@contextmanager
def chromium(folder: Path, graphics: Sequence[str] = _NO_GPU) -> Iterator[Page]:
    """A browser with nothing in it, as long as the block lasts; ``graphics`` are its arguments for what it
    computes and draws with.
    """
    assert PROGRAM is not None, "no Chromium here: apt-get install chromium"
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # 3 and 4 must be free where they are made
    high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (theirs_in, theirs_out)]
    command = [
        "bash",
        "-c",
        f'exec "$@" 3<&{high[0]} 4>&{high[1]}',
        "bash",
        PROGRAM,
        *_ARGS,
        *graphics,
        f"--user-data-dir={folder / 'profile'}",
    ]
    with (
        (folder / "chromium.log").open("w") as log,
        child(command, pass_fds=tuple(high), stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)}),
    ):
        for one in (theirs_in, theirs_out, *high):
            os.close(one)
        try:
            yield Page(ours_in, ours_out, folder)
        finally:
            for one in (ours_in, ours_out):
                os.close(one)


def require_well(page: Page, address: str, name: str) -> None:
    """Nothing of text became markup, no policy was broken, no script failed, and nothing came from
    elsewhere.
    """
    assert page.run("[document.images.length, window.hacked ?? 0].join()") == "0,0"
    assert [text for text in page.trouble if "status of 401" not in text] == []
    assert [
        one for one in page.requests if not one.startswith((address, "data:,", "about:", f"blob:{address}"))
    ] == []
    for width, theme in ((1200, "light"), (390, "dark")):
        page.show(width, 900, theme)
        assert page.run("document.documentElement.scrollWidth") <= width
        page.picture(f"{name}-{width}")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node for node in nodes if node.get("role", {}).get("value") in CONTROLS and not node["ignored"]
    ]
    assert len(controls) > 5
    assert [node for node in controls if not node["name"]["value"]] == []
