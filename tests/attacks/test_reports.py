"""Attacks by names and texts on those who read them: on a terminal, in a model card, a page of HTML, SARIF,
and JSON.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from attack import Attacks

sys.path.insert(0, str(Path(__file__).parent.parent / "packs"))
import make_bad as bad

TEXTS = {
    "escapes": "\x1b[2J\x1b[31mvalid\x1b[0m",
    "a link of a terminal": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "a title of a terminal": "\x1b]0;root\x07",
    "C1 controls": "\x9b2J\x9d0;x\x9c",
    "right to left": "a\u202egnp.exe\u2066",
    "invisible": "a\u200b\ufeff\u00ad\U000e0041",
    "a line of its own": "x\nerror: none\r\u2028\u2029valid",
    "deletes": "error\b\bvalid\x7f",
    "markup of rich": "[bold red]x[/bold red][link=https://evil.example]y[/link]",
    "a heading": "x\n\n# Verified\n",
    "an underlined heading": "Verified\n===\n",
    "a link": "[click](https://evil.example)",
    "an address": "<https://evil.example>",
    "a link by name": "[a]\n\n[a]: https://evil.example",
    "a picture": "![a](https://evil.example/x.png)",
    "a table": "x | y |\n| - | - |",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "an attribute": "\" onload=\"alert(1)\" ' onload='alert(1)'",
    "a comment": "<!-- x --> <![CDATA[ x ]]> <?php x ?>",
    "the end of a block": "x\n```\n# Verified",
    "the end of a header": "x\n---\n# Verified",
    "a command": "x; touch outside/it",
    "a command in a command": "$(touch outside/it)`touch outside/it`",
    "a variable": "$HOME ~ * !!",
    "half a surrogate pair": "\ud800",
    "a template": "{{ 7 * 7 }}{% include 'x' %}",
}

WHOLE = [name for name in TEXTS if name != "half a surrogate pair"]
"""What a manifest can hold: strict JSON has no halves."""


def _print(text: str) -> None:
    """Everything that prints a text on a terminal."""
    from adapterpack.cli import logs, output, progress
    from adapterpack.cli.main import main
    from adapterpack.errors import ConfigError

    output.print_line(text)
    output.print_facts({text: text, "rows": [{text: text}]})
    output.print_table([text], [[text]], text)
    output.print_json({text: text})
    with progress.show_steps() as say:
        say(text)
    with progress.show_bytes(text) as bar:
        bar(1, 1)
    with logs.log_to_stderr({}), progress.divert_stdout():
        logging.getLogger("adapterpack").warning("%s", text)
    main(["methods", "lora", "--json"], standalone_mode=False)
    warnings.warn(text, stacklevel=1)
    raise ConfigError(text, where=text, expected=text, found=text, remedy=text)


@pytest.mark.parametrize("attack", TEXTS)
def test_a_terminal(attacks: Attacks, attack: str) -> None:
    attacks.call(_print, TEXTS[attack]).refused()


def _trace(text: str) -> None:
    from adapterpack.cli.main import main

    Path("x.yaml").write_text(json.dumps({text.encode("utf-8", "replace").decode(): 1}))
    main(["train", "x.yaml", "--traceback", "--json"])


@pytest.mark.parametrize("attack", ["escapes", "right to left", "C1 controls"])
def test_a_traceback(attacks: Attacks, attack: str) -> None:
    outcome = attacks.call(_trace, TEXTS[attack])
    assert outcome.code == 1
    assert not [sign for sign in outcome.out + outcome.err if sign in "\x1b\x9b\u202e\u2066"]
    assert "Traceback" in outcome.err  # which was asked for
    assert json.loads(outcome.out)["error"]["code"] == "config"


def _card(text: str) -> None:
    """A card whose every free text is the attacker's, read as a hub reads it."""
    from markdown_it import MarkdownIt
    from msgspec.structs import replace

    from adapterpack.hub import card
    from adapterpack.hub.transport import names
    from adapterpack.io import plain_yaml
    from adapterpack.pack.validate.checks.finding import Finding, Report
    from adapterpack.pack.validate.validation import load

    bad.good(Path("pack"))
    pack, at = load(Path("pack")), names.HubReference("org/name", folder="pack")
    report = Report("pack", "pack", None, (Finding("AP000", "warning", text, text, text),), (text,))

    def written(text: str) -> str:
        manifest = pack.manifest
        manifest = replace(
            manifest,
            license=text,
            license_link=text,
            training={text: [text]},
            pack=replace(manifest.pack, description=text),
            base=replace(manifest.base, name=text),
            metrics=({"name": text, "value": 0.5, "dataset": text, text: text},),
            task=replace(manifest.task, labels=(text, "b")),
        )
        return card.pack_card(replace_pack(pack, manifest), at, report)

    def replace_pack(pack: Any, manifest: Any) -> Any:
        other = object.__new__(type(pack))
        other.__dict__.update({**pack.__dict__, "manifest": manifest})
        return other

    def shape(text: str) -> tuple[list[str], list[str], str]:
        page = written(text)
        _, header, body = page.split("---\n", 2)
        plain_yaml.loads(header, "header")
        tokens = MarkdownIt("commonmark").enable("table").parse(body)
        inner = [child for token in tokens for child in token.children or ()]
        links = [str(child.attrs["href"]) for child in inner if child.type == "link_open"]
        assert all(link.startswith("https://huggingface.co/") for link in links), links
        assert not [child for child in inner if child.type in ("image", "html_inline")]
        commands = [
            line
            for token in tokens
            if token.type == "fence" and token.info == "sh"
            for line in token.content.splitlines()
        ]
        assert not {";", "|", "&&", "$(touch", "`touch"} & {
            word for line in commands for word in shlex.split(line)
        }, commands
        return (
            [token.type for token in tokens],
            [word for line in commands for word in shlex.split(line)[:2]],
            body,
        )

    types, words, _ = shape("plain")
    others, other_words, body = shape(text)
    assert others == types, (others, types)  # not a heading, a list or a block more
    assert [word.partition("://")[0] for word in other_words] == [word.partition("://")[0] for word in words]
    assert "\x1b" not in body


@pytest.mark.parametrize("attack", WHOLE)
def test_a_model_card(attacks: Attacks, attack: str) -> None:
    attacks.call(_card, TEXTS[attack]).harmless()


class _Page(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.parts: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append((tag, tuple(sorted(name for name, _ in attrs))))


def _page(text: str) -> None:
    from adapterpack.demos import load_stages

    demo_report = load_stages("report").demo_report

    def written(text: str) -> str:
        return demo_report(
            {
                "sizes": {text: 1_300_000, "b": 5},
                "timings": {text: 1.0, "c": 2.0},
                "base": text,
                "title": text,
                "accuracy": {text: {"chance": 0.2, text: 0.8}},
            }
        )

    page = written(text)
    parts = Counter(_Page(page).parts)
    plain = Counter(_Page(written("plain")).parts)
    # not an element or attribute that a plain name does not bring
    assert parts.keys() == plain.keys(), parts.keys() ^ plain.keys()
    assert not [sign for sign in page if sign in "\x1b\x9b\u202e\u2066\x07"]


@pytest.mark.parametrize("attack", TEXTS)
def test_a_page(attacks: Attacks, attack: str) -> None:
    attacks.call(_page, TEXTS[attack]).harmless()


def _sarif(text: str) -> None:
    import re

    from adapterpack.io import strict_json
    from adapterpack.pack.validate.checks.finding import Finding, Report
    from adapterpack.pack.validate.sarif import sarif

    report = Report("pack", text, None, (Finding("AP101", "error", text, text, text, file=text),), (text,))
    log = json.loads(strict_json.canonical(sarif(report, "1")).decode("utf-8"))["runs"][0]
    messages = [
        log["results"][0]["message"]["text"],
        log["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"],
    ]
    for message in messages:
        assert not re.search(r"(?<!\\)[\[\]]", message), message
        assert not [sign for sign in message if sign in "\x1b\x9b\u202e\u2066\x07"]


@pytest.mark.parametrize("attack", WHOLE)
def test_sarif(attacks: Attacks, attack: str) -> None:
    attacks.call(_sarif, TEXTS[attack]).harmless()


@pytest.mark.parametrize("option", [(), ("--json",)])
@pytest.mark.parametrize(
    "attack", ["escapes", "right to left", "markup of rich", "a line of its own", "a link of a terminal"]
)
def test_a_pack_that_is_inspected(attacks: Attacks, attack: str, option: tuple[str, ...]) -> None:
    bad.good(attacks.work / "pack")
    bad.put(attacks.work / "pack", "pack", "description", to=TEXTS[attack])
    attacks.command("inspect", "pack", *option).held()
