"""How a bundle runs in a browser: read this first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chromium import Page, browser
from sites import npm, opened, served

from adapterpack import run
from adapterpack.bundle.manifest import bundle_in

pytestmark = [browser, npm]


def test_open_a_site_and_ask_it(page: Page, site_of: Callable[..., Path]) -> None:
    """``export --target web`` writes a folder of static files; any web server serves it, and its page answers as
    ``run`` does.
    """
    site = site_of("bert")
    with served(site) as address:
        opened(page, site, address)
        [answer] = page.run("adapterpack.bundle.classify([{text: 'It leaks.', adapter: 'alpha'}])")
    [ours] = run(bundle_in(site), [{"text": "It leaks.", "adapter": "alpha"}])
    assert answer["label"] == ours["label"]
