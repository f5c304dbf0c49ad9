"""The pages of the guide: their links lead somewhere, their commands are commands, and what is generated is
up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import api_page
import catalogue_page
import commands_page
import errors_page
import mergekit_files_page
import other_servers_page
import pack_format_page
import training_files_page
from pages import DOCS, ROOT, anchors, blocks, name_of, pages, words

import adapterpack
from adapterpack.cli.main import main

pytestmark = pytest.mark.fast
_LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES_OF_THE_REPOSITORY = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that lie at the top of the repository."""


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    """Also in the README and CONTRIBUTING.md, which MkDocs does not look at."""
    broken = []
    for page in [
        *pages(),
        ROOT / "CONTRIBUTING.md",
        *DOCS.glob("benchmarks/*.md"),
        *DOCS.glob("decisions/*.md"),
    ]:
        for link in _LINK.findall(
            re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
        ):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            target = page if not path else page.parent / path
            if path in PAGES_OF_THE_REPOSITORY:
                target = ROOT / PAGES_OF_THE_REPOSITORY[path]
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
                broken.append((name_of(page), link))
    assert not broken


def test_every_page_is_in_the_navigation() -> None:
    """A page that nothing leads to is not found."""
    listed = re.findall(r"([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(set(listed) - PAGES_OF_THE_REPOSITORY.keys()) == sorted(
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")
    )


def test_every_command_is_one() -> None:
    """Each line that begins with adapterpack, on any page, is taken by the command line: names, options,
    values. Nothing is run.
    """
    wrong, count = [], 0
    for page in pages():
        for block in blocks(page):
            for command in block.commands() if block.language == "sh" else ():
                if "[OPTIONS]" in command:
                    continue
                # [what may be left out]
                arguments = words(re.sub(r"\[[^]]*\]", "", command.removesuffix(" &").replace("...", "x")))
                # click runs these while it parses
                at_once = {"--help", "--version", "--new-key"} & set(arguments)
                if arguments[0] != "adapterpack" or at_once:
                    continue
                count += 1
                try:
                    _parse(main, arguments[1:])
                except click.ClickException as problem:
                    wrong.append((name_of(page), command, problem.format_message()))
    assert not wrong
    assert count > 150


def test_the_commands_that_read_a_variable_exist() -> None:
    """What the table of environment variables names in its last column, where it is a command line and no
    address.
    """
    rows = re.findall(
        r"^\| `[A-Z_]+` .*\| (.*) \|$", (DOCS / "configuration.md").read_text("utf-8"), re.MULTILINE
    )
    named = {name for row in rows for name in re.findall(r"`([a-z ]+)`", row)}
    assert named
    commands = main.list_commands(click.Context(main))
    assert not [name for name in sorted(named) if name.partition(" ")[0] not in commands]


def _parse(command: click.Command, arguments: list[str], parent: click.Context | None = None) -> None:
    """What click does before it runs a command."""
    context = command.make_context(command.name, list(arguments), parent=parent)
    if isinstance(command, click.Group):
        name, child, rest = command.resolve_command(context, [*context.protected_args, *context.args])
        assert child is not None, name
        _parse(child, rest, context)


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("commands", commands_page),
        ("catalogue", catalogue_page),
        ("pack-format", pack_format_page),
        ("migrating/training-files", training_files_page),
        ("migrating/mergekit-files", mergekit_files_page),
        ("other-servers", other_servers_page),
    ],
)
def test_generated_pages_are_up_to_date(page: str, module: Any) -> None:
    """``make guide`` writes them."""
    assert (DOCS / f"{page}.md").read_text("utf-8") == module.page()


def test_the_api_pages_list_every_public_name() -> None:
    """Each public name once, where it is defined."""
    assert [(DOCS / name).read_text("utf-8") for name in ("api.md", "api-methods.md")] == list(
        api_page.pages()
    )


def test_the_api_pages_can_be_read_in_the_repository() -> None:
    """Every signature, and the first sentence of every docstring: no page waits for a program to fill it
    in.
    """
    text = (DOCS / "api.md").read_text("utf-8")
    assert ":::" not in text
    for name in ("train", "merge", "compose", "Session", "Fleet"):
        first = (getattr(adapterpack, name).__doc__ or "").split("\n\n")[0].split("``")[0]
        assert f"### adapterpack.{name}\n\n```python\n{name}(" in text
        assert " ".join(first.split()) in " ".join(text.split()), name


def test_every_error_is_provoked_and_quoted() -> None:
    """Every public class has a cause that really ends with it, and the page quotes its message and remedy."""
    page = errors_page.page()
    assert (DOCS / "errors.md").read_text("utf-8") == page
    assert all(f"## {error.code} " in page for error in errors_page.public())


def test_the_comparison_names_tests_that_there_are() -> None:
    """A claim about adapterpack is shown by a test or a program of this repository."""
    text = (DOCS / "comparison.md").read_text("utf-8")
    named = re.findall(r"`((?:tests|benchmarks)/[\w/.-]+)(?:::(\w+))?`", text)
    assert len(named) > 10
    for file, test in named:
        assert not test or f"def {test}(" in (ROOT / file).read_text("utf-8"), test
        assert (ROOT / file).is_file(), file


def test_the_readme_keeps_its_promise_to_tests() -> None:
    """The command that CI runs stands in it as it is."""
    assert "    pip install -e '.[test]' && pytest -n 2 --dist loadfile\n" in (ROOT / "README.md").read_text(
        "utf-8"
    )
    assert "\npytest -n 2 --dist loadfile #" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_site_loads_nothing_from_elsewhere() -> None:
    """Fonts and scripts come from the theme's own files."""
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert "font: false" in text
    assert not re.search(r"extra_javascript|https?://", re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
