"""Attacks by chat templates: of bundles when a prompt is answered, of packs when they are validated, of bases
when they train.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from attack import Attacks

from adapterpack.bundle.manifest import read_bundle
from adapterpack.chat_templates.template import ChatTemplate
from adapterpack.pack.validate.checks.template import template_findings
from adapterpack.tasks.text_generation import encode
from adapterpack.torch_adapters.models.load import load_tokenizer

Make = Callable[..., Any]
MANY = 3_000_000_000
BOMBS = {
    "loops": "".join(f"{{% for {name} in range(9999) %}}" for name in "abc") + "{% endfor %}" * 3,
    "a text doubled": "{% set x = 'xx' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    ("a text doubled by every message"): (
        "{% set ns = namespace(x=messages[0].content) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x "
        "%}{% endfor %}"
    ),
    "a list multiplied": "{% set x = ['xx'] %}" + "{% set x = x * 9999 %}" * 5,
    "a list in itself": "{% set x = ['xx'] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}",
    "a key of tuples": "{% set x = (1, 2) %}" + "{% set x = (x, x) %}" * 40 + "{{ {x: 1} }}",
    "center": f"{{{{ 'x' | center({MANY}) }}}}",
    "a width in a format": f"{{{{ '%{MANY}d' % 1 }}}}",
    "a width in braces": f"{{{{ '{{:{MANY}}}'.format(1) }}}}",
    ("a macro that calls itself twice"): (
        "{% macro f(n) %}{% if n < 40 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}"
    ),
    "a loop that calls itself": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a power": "{{ 9 ** 999999999 }}",
    "a number rounded": "{{ 5 | round(-1000000000) }}",
    "much text": "{% for i in range(9999) %}" + "y" * 9999 + "{% endfor %}",
    "brackets": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "many parts": "{{ a }}" * 40_000,
    "a number of many digits": "{{ " + "9" * 100_000 + " }}",
}

ESCAPES = {
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "the filter attr": "{{ (messages | attr('__class__')).mro() }}",
    "a format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception).x() }}",
    "a method of a format": "{{ ''.join.__call__.__self__.__class__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch ../outside/x').read() }}",
    "include": "{% include '../outside/secret.txt' %}",
    "the messages": "{{ messages.append('x') }}",
    "escapes in an error": "{{ raise_exception('\x1b]0;owned\x07\u202e') }}",
}
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def rendered(source: str) -> None:
    ChatTemplate(source, "somewhere").render([{"role": "user", "content": "w1"}])


def validated(source: str) -> None:
    assert [finding for finding in template_findings(source.encode(), "t") if finding.severity == "error"]


def listed(bundle: Path, target: Path, template: str) -> Path:
    """A copy of a bundle with a template, and a manifest that says so."""
    shutil.copytree(bundle, target)
    (target / "chat_template.jinja").write_text(template, "utf-8")
    read_bundle(target).write(target)
    return target


@pytest.mark.parametrize("name", [*BOMBS, *ESCAPES])
def test_a_template_is_rendered(name: str, attacks: Attacks) -> None:
    attacks.call(rendered, (BOMBS | ESCAPES)[name]).refused("the chat template does not render", "somewhere")


@pytest.mark.parametrize(
    "name", [name for name in [*BOMBS, *ESCAPES] if name not in ("the messages", "escapes in an error")]
)
def test_a_template_of_a_pack_is_validated(name: str, attacks: Attacks) -> None:
    attacks.call(validated, (BOMBS | ESCAPES)[name]).harmless()


@pytest.mark.parametrize("name", ["loops", "a text doubled", "center", "cycler", "escapes in an error"])
def test_a_bundle_with_a_template_answers(name: str, attacks: Attacks, bundle_of: Make) -> None:
    bundle = listed(bundle_of("llama", "bank"), attacks.work / "bundle", (BOMBS | ESCAPES)[name])
    attacks.command("run", bundle, "--prompt", "w1", "--provider", "cpu").refused(
        "the chat template does not render"
    )


@pytest.mark.parametrize("name", ["loops", "a list in itself", "much text"])
def test_a_base_with_a_template_trains(name: str, attacks: Attacks, tiny_llama: Path) -> None:
    base = attacks.work / "base"
    shutil.copytree(tiny_llama, base)
    (base / "chat_template.jinja").write_text(BOMBS[name], "utf-8")
    rows = attacks.work / "rows.jsonl"
    rows.write_text(
        json.dumps({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]})
        + "\n"
    )
    attacks.call(encoded, base, rows).refused("the chat template does not render")


def encoded(base: Path, rows: Path) -> None:
    encode(datasets.load_dataset("json", data_files=str(rows), split="train"), load_tokenizer(base), 64, rows)


@pytest.mark.parametrize(
    "message",
    [
        "x" * 1_000_000,
        "%999999999d {:999999999} {{ 7 * 7 }} {% for i in range(9) %}",
        "\x1b[2J",
    ],
    ids=["a megabyte", "template words", "escapes"],
)
def test_a_message_is_no_template(message: str, attacks: Attacks) -> None:
    attacks.call(message_rendered, message).harmless()


def message_rendered(message: str) -> None:
    assert ChatTemplate(PLAIN).render([{"role": "user", "content": message}]) == f"<user>{message}"
