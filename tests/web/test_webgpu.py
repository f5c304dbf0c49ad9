"""Sites on WebGPU, whose kernels are others than WebAssembly's: computed by SwiftShader where there is no
card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import WEBGPU, Page, browser, chromium
from sites import logits, npm, opened, said, served

from adapterpack import Session
from adapterpack.bundle.manifest import bundle_in

pytestmark = [browser, npm, pytest.mark.long]
TEXTS = ("It leaks.", "I would like to have my money back, please, and soon.", "Why?")
NEAR = 1e-4
"""The largest difference of two runtimes in float32, of logits of size 1: kernels sum in other orders."""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A page of a browser with WebGPU."""
    with chromium(tmp_path, WEBGPU) as opened:
        yield opened


def require_adapter(page: Page) -> None:
    """Leaves the test out, and says so, where this browser has no adapter for WebGPU."""
    if not page.run("navigator.gpu?.requestAdapter().then(Boolean, () => false) ?? false"):
        pytest.skip("THIS CHROMIUM HAS NO WEBGPU, NOT EVEN BY SWIFTSHADER: nothing was compared")


def test_rows_of_a_batch(page: Page, site_of: Callable[..., Path]) -> None:
    """Base and two adapters in one batch give Python's numbers."""
    site = site_of("bert")
    session = Session(bundle_in(site), "cpu")
    names = [None, "alpha", "beta"]
    with served(site) as address:
        page.open(f"{address}/bundle/web.json")  # localhost: WebGPU is there on secure pages only
        require_adapter(page)
        opened(page, site, address, "webgpu")
        assert page.run("adapterpack.bundle.provider") == "webgpu"
        expected = session.run(session.encode(TEXTS), names)["logits"]
        np.testing.assert_allclose(
            logits(page, list(zip(TEXTS, names, strict=True))), expected, rtol=1e-6, atol=NEAR
        )


def test_text_token_by_token(page: Page, site_of: Callable[..., Path]) -> None:
    """The greedy tokens of Python, base and adapter, with the caches on WebGPU's side."""
    site = site_of("llama", None)
    session = Session(bundle_in(site), "cpu")
    with served(site) as address:
        page.open(f"{address}/bundle/web.json")
        require_adapter(page)
        opened(page, site, address, "webgpu")
        assert page.run("adapterpack.bundle.provider") == "webgpu"
        for name in (None, "alpha"):
            own = session.generate(["Where is my order?"], [name], max_new_tokens=12)[0]
            assert said(page, "Where is my order?", name, 12) == own.text
            assert own.text
