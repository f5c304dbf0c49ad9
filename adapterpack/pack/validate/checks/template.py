"""Chat templates: parsed, never rendered. AP851-AP856."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from ...pack import TEMPLATE
from ..context import Subject
from ..finding import Finding, Rule

PARSE = Rule("AP851", "error", "A chat template is Jinja that parses, of at most 256 KiB.", "repair the template")
ATTRIBUTE = Rule("AP852", "error", "A template touches no attribute that begins with an underscore, and no filter that reaches one.",
                 "remove it; do not render the template")
IMPORT = Rule("AP853", "error", "A template includes, imports and extends nothing.", "remove it; do not render the template")
LOOP = Rule("AP854", "error", "A template counts no further than 10,000 in one range or repetition, and nests at most 4 loops.",
            "remove it")
DIGEST = Rule("AP855", "error", "A template that the pack carries has the digest that the manifest's tokenizer names.",
              "pack the adapter again")
LITERAL = Rule("AP856", "warning", "A template holds no address and no long encoded text.", "read the template before you use the pack")
RULES = (PARSE, ATTRIBUTE, IMPORT, LOOP, DIGEST, LITERAL)

MAX_TEMPLATE = 256 << 10
MAX_COUNT = 10_000
MAX_NESTING = 4
_REACHING = frozenset({"attr", "map", "format", "xmlattr", "pprint"})
_CALLS = frozenset({"mro", "format_map", "format", "globals", "func_globals", "gi_frame", "cr_frame", "gi_code", "cr_code", "f_globals"})
_ENCODED = re.compile(r"[A-Za-z0-9+/]{80,}={0,2}")


def carried(s: Subject) -> Iterator[Finding]:
    """AP851-AP856 of the template that the pack carries."""
    data = s.held.get(TEMPLATE)
    if data is None:
        return
    said = s.pack.manifest.tokenizer and s.pack.manifest.tokenizer.chat_template
    if said != "same-as-base" and said != hashlib.sha256(data).hexdigest():
        yield DIGEST.at(TEMPLATE, "the manifest's tokenizer does not name this template", file=TEMPLATE)
    yield from template_findings(data, TEMPLATE)


def template_findings(data: bytes, where: str) -> Iterator[Finding]:
    """AP851-AP854 and AP856 of one template."""
    from jinja2 import TemplateError, nodes  # noqa: PLC0415 - few packs carry a template
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    try:
        if len(data) > MAX_TEMPLATE:
            raise ValueError(f"it has {len(data)} bytes")
        text = data.decode("utf-8")
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_plain_generation(text))
    except (TemplateError, ValueError, RecursionError) as error:
        yield PARSE.at(where, f"the chat template cannot be parsed: {error}", file=where)
        return
    for rule, line, message in _problems(tree, nodes):
        yield rule.at(f"{where}, line {line}", message, file=where)
    if "://" in text or _ENCODED.search(text):
        yield LITERAL.at(where, "the template holds an address or a long encoded text", file=where)


def _plain_generation(text: str) -> str:
    """``{% generation %}`` marks what is trained on; it is no statement of Jinja's own."""
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", lambda mark: "\n" * mark.group().count("\n"), text)


def _problems(tree: Any, nodes: Any) -> Iterator[tuple[Rule, int, str]]:
    stack = [(tree, 0)]
    while stack:
        node, loops = stack.pop()
        yield from _node(node, nodes)
        if isinstance(node, nodes.For):
            loops += 1
            if loops == MAX_NESTING + 1:
                yield LOOP, node.lineno, "loops are nested too deeply"
        stack.extend((child, loops) for child in node.iter_child_nodes())


def _node(node: Any, nodes: Any) -> Iterator[tuple[Rule, int, str]]:
    line = node.lineno
    if isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
        yield IMPORT, line, "the template loads another template"
    elif isinstance(node, nodes.Getattr) and (node.attr.startswith("_") or node.attr in _CALLS):
        yield ATTRIBUTE, line, f"the template touches the attribute '{node.attr}'"
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and str(node.arg.value).startswith("__"):
        yield ATTRIBUTE, line, f"the template touches the item '{node.arg.value}'"
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Add | nodes.Concat):
        yield ATTRIBUTE, line, "the template puts the name of an item together"
    elif isinstance(node, nodes.Filter) and node.name in _REACHING and _reaches(node, nodes):
        yield ATTRIBUTE, line, f"the template reaches attributes through the filter '{node.name}'"
    elif isinstance(node, nodes.Const) and isinstance(node.value, str) and re.search(r"__[a-z]+__", node.value):
        yield ATTRIBUTE, line, "the template holds the name of an internal attribute"
    elif isinstance(node, nodes.Name) and node.name in {"self", "cycler", "joiner", "lipsum"}:
        yield ATTRIBUTE, line, f"the template uses '{node.name}'"
    elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "range":
        if any(_constant(argument, nodes) > MAX_COUNT for argument in node.args):
            yield LOOP, line, "the template counts very far"
    elif isinstance(node, nodes.Mul | nodes.Pow) and max(_constant(node.left, nodes), _constant(node.right, nodes)) > MAX_COUNT:
        yield LOOP, line, "the template repeats something very often"
    elif isinstance(node, nodes.Pow):
        yield LOOP, line, "the template raises to a power"


def _reaches(node: Any, nodes: Any) -> bool:
    """``attr`` always does; ``map`` only by its attribute argument; the rest are not for templates of chats."""
    if node.name != "map":
        return True
    named = [keyword.value for keyword in node.kwargs if keyword.key == "attribute"]
    return any(not isinstance(value, nodes.Const) or str(value.value).startswith("_") or "._" in str(value.value) for value in named)


def _constant(node: Any, nodes: Any) -> float:
    """The number that a node is, if it is one; a product of constants is multiplied out."""
    if isinstance(node, nodes.Const) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return abs(float(node.value))
    if isinstance(node, nodes.Mul):
        return _constant(node.left, nodes) * _constant(node.right, nodes)
    return 0.0
