"""Copies the page, its script, and the list of third-party package sources."""

from __future__ import annotations

import shutil
from pathlib import Path

from ....palette import style_sheet
from ....resources import resource

PAGE = "web/page"
SCRIPT = "web/dist/adapterpack.js"
PACKAGE = "web/site-package.json"
HEAD = "web/site-head.html"
"""The page's head for servers that send no headers: the security policy, the bundle, and the places of
modules.
"""
README = """# A site of adapterpack

Fetch the three packages that run it, once: `npm install --ignore-scripts` in this folder.
Then serve this folder as it is, by any server of files, for instance `python -m http.server`.
"""
_START = '<meta charset="utf-8">\n'


def write_page(site: Path) -> None:
    """Fills a site's folder around its bundle: the page of ``serve``, which runs the bundle instead of
    calling a server.
    """
    shutil.copytree(resource(PAGE), site / "page")
    html = (site / "page" / "index.html").read_text("utf-8")
    (site / "page" / "index.html").unlink()
    head = resource(HEAD).read_text("utf-8")
    (site / "index.html").write_text(html.replace(_START, _START + head, 1), "utf-8")
    (site / "page" / "colours.css").write_text(style_sheet(), "utf-8")
    shutil.copyfile(resource(SCRIPT), site / "adapterpack.js")
    shutil.copyfile(resource(PACKAGE), site / "package.json")
    (site / "README.md").write_text(README, "utf-8")
