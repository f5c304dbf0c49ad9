"""Copies the page, its script and what says where the packages of others come from."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...palette import style_sheet
from ...resources import resource

PAGE, SCRIPT, PACKAGE = "web/page", "web/dist/adapterpack.js", "web/site-package.json"
SHARED = ("elements.js", "numbers.js", "theme.js", "page.css")
"""Files of the server's page that this one has, too."""
README = """# A site of adapterpack

Fetch the three packages that run it, once: `npm install --ignore-scripts` in this folder.
Then serve this folder as it is, by any server of files, for instance `python -m http.server`.
"""


def write_page(site: Path) -> None:
    """Fills the folder of a site around its bundle."""
    app = site / "app"
    app.mkdir()
    for name in SHARED:
        shutil.copyfile(resource(f"serving/page/files/{name}"), app / name)
    for path in sorted(resource(PAGE).iterdir()):
        shutil.copyfile(path, (site if path.suffix == ".html" else app) / path.name)
    (app / "colours.css").write_text(style_sheet(), "utf-8")
    shutil.copyfile(resource(SCRIPT), site / "adapterpack.js")
    shutil.copyfile(resource(PACKAGE), site / "package.json")
    (site / "README.md").write_text(README, "utf-8")
