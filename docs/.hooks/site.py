"""Hooks of MkDocs: links into the repository stay links on the site, and tables show the code that they hold.

CONTRIBUTING.md and CHANGELOG.md become pages. A page may link to ``../examples/tickets.yaml`` or
``../schemas/manifest.v1.json``, as it does for readers of the repository: the files that are linked to are
copied to ``source/`` on the site, and a folder becomes a page that lists its files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
SOURCE = "source"
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that are pages of the guide."""
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def _target(page: str, link: str) -> Path | None:
    """What a link of a page leads to, if that is in the repository and outside of ``docs``."""
    path = Path(os.path.normpath(DOCS / PurePosixPath(page).parent / link))
    inside = path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)
    return path.relative_to(ROOT) if inside and path.exists() else None


def _copies(path: Path) -> list[Path]:
    """The file itself, or every file directly in the folder."""
    full = ROOT / path
    return (
        [path]
        if full.is_file()
        else sorted(each.relative_to(ROOT) for each in full.iterdir() if each.is_file())
    )


def on_files(files: Any, config: Any) -> Any:
    """Adds to the site what pages link to outside of ``docs``, and the pages that lie there themselves."""
    for name, page in PAGES.items():
        text = re.sub(
            r"\]\((?:docs/|(?!https?:|#))",
            lambda found: "](" if found[0].endswith("docs/") else "](../",
            (ROOT / name).read_text("utf-8"),
        )
        files.append(File.generated(config, page, content=text))
    linked = {
        target
        for file in files.documentation_pages()
        for link, _ in _LINK.findall(file.content_string)
        if (target := _target(file.src_uri, link))
    }
    for path in sorted({copy for target in linked for copy in _copies(target)}):
        files.append(File.generated(config, f"{SOURCE}/{_published(path)}", abs_src_path=str(ROOT / path)))
    for folder in sorted(target for target in linked if (ROOT / target).is_dir()):
        listing = "".join(f"- [{each.name}]({_published(Path(each.name))})\n" for each in _copies(folder))
        files.append(
            File.generated(
                config,
                f"{SOURCE}/{folder.as_posix()}/index.md",
                content=f"# {folder.as_posix()}\n\n{listing}",
            )
        )
    return files


def _published(path: Path) -> str:
    """Markdown of the repository is shown as it stands, and not made into a page of the guide."""
    return path.as_posix() + (".txt" if path.suffix == ".md" else "")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links out of ``docs`` into links to the copies."""

    def changed(found: re.Match[str]) -> str:
        target = _target(page.file.src_uri, found[1])
        if target is None:
            return found[0]
        name = f"{target.as_posix()}/index.md" if (ROOT / target).is_dir() else _published(target)
        up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)
        return f"]({up}{SOURCE}/{name}{found[2] or ''})"

    return _LINK.sub(changed, markdown)


def on_page_content(html: str, **_: Any) -> str:
    r"""A pipe in the code of a table is written ``\|``, as GitHub has it; Python-Markdown keeps the
    backslash.
    """
    return _TABLE.sub(lambda table: table[0].replace(r"\|", "|"), html)
