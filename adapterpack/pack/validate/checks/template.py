"""Checks chat templates by the language elements they use and by the cost of rendering them in the sandbox.
AP851-AP856.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from ... import TEMPLATE
from .context import Budget, Subject
from .finding import Finding, check_rule

PARSE = check_rule("AP851")
NAMES = check_rule("AP852")
STATEMENTS = check_rule("AP853")
COST = check_rule("AP854")
DIGEST = check_rule("AP855")
LITERAL = check_rule("AP856")

MAX_TEMPLATE = 64 << 10
_ENCODED = re.compile(r"[A-Za-z0-9+/]{80,}={0,2}")


def carried(s: Subject) -> Iterator[Finding]:
    """AP851-AP856 for the template in the pack."""
    data = s.file_bytes.get(TEMPLATE)
    if data is None:
        return
    said = s.manifest.tokenizer and s.manifest.tokenizer.chat_template
    if said != "same-as-base" and said != hashlib.sha256(data).hexdigest():
        yield DIGEST.at(TEMPLATE, "the manifest's tokenizer does not name this template", file=TEMPLATE)
    yield from template_findings(data, TEMPLATE, s.budget)


def template_findings(
    data: bytes, where: str, budget: Budget | None = None, foreign: bool = False
) -> Iterator[Finding]:
    """AP851-AP854 and AP856 for one template.

    ``foreign``: the template is in a folder that PEFT wrote and is not imported, so problems that cannot
    reach beyond the template's values are only warnings.

    Raises:
        Spent: the budget ran out.
    """
    from jinja2 import TemplateError  # noqa: PLC0415 - few packs carry a template
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    from ....chat_templates.rendering import GenerationExtension  # noqa: PLC0415
    from .jinja_words import TooDeep, walk_nodes, word_problems  # noqa: PLC0415
    from .template_cost import cost_problem  # noqa: PLC0415

    try:
        if len(data) > MAX_TEMPLATE:
            raise ValueError(f"it has {len(data)} bytes")
        text = data.decode("utf-8")
        tree = ImmutableSandboxedEnvironment(
            extensions=["jinja2.ext.loopcontrols", GenerationExtension]
        ).parse(text)
        nodes = walk_nodes((budget or Budget()).over, tree)
    except (TemplateError, ValueError, RecursionError, TooDeep) as error:
        yield PARSE.at(where, f"the chat template cannot be parsed: {error}", file=where)
        return
    has_problems = False
    for word in word_problems(nodes):
        has_problems = True
        finding = (STATEMENTS if word.statement else NAMES).at(
            f"{where}, line {word.line}", word.message, file=where
        )
        yield finding._replace(severity="warning") if foreign and not word.inner else finding
    if not has_problems and (problem := cost_problem(text, nodes)):
        finding = COST.at(where, f"the template does or writes more than a chat needs: {problem}", file=where)
        yield finding._replace(severity="warning") if foreign else finding
    if "://" in text or _ENCODED.search(text):
        yield LITERAL.at(where, "the template holds an address or a long encoded text", file=where)
