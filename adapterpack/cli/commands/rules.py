"""``adapterpack rules``."""

from __future__ import annotations

from typing import Any

import click

import adapterpack

from ...composing.rules.rule import RULES
from ...io import Json
from .. import common_options, print_facts, print_report, print_table, suggest


@click.command("rules")
@click.argument("name", required=False, shell_complete=suggest("adapterpack.composing.rules.rule:RULES"))
@common_options
def command(name: str | None, as_json: bool) -> None:
    """Lists every rule of composition, including those of other packages (entry points adapterpack.rules).

    With NAME, shows that rule with its parameters.

    \b
    Example:
      adapterpack rules
      adapterpack rules linear
    """
    chosen = adapterpack.rules().values() if name is None else [RULES[name]]
    described = [_describe(rule) for rule in chosen]
    if as_json:
        print_report({"rules": described})
    elif name is None:
        print_table(
            ["name", "class", "exact", "what it does"],
            [[rule["name"], rule["needs"], rule["exact"], rule["summary"]] for rule in described],
        )
    else:
        print_facts(described[0])


def _describe(rule: Any) -> Json:
    return {
        "name": rule.name,
        "summary": rule.summary,
        "paper": rule.paper,
        "formula": rule.formula,
        "needs": rule.needs,
        "exact": rule.exact,
        "wants_rank": rule.cut,
        "wants_statistics": rule.statistics or None,
        "searches_weights": rule.search,
        "default_weights": "1" if rule.unit else "1/T",
        "laws": rule.laws._asdict(),
        "parameters": {
            name: {"required": required, "default": None if required else parameter.default}
            for name, parameter in rule.parameters.items()
            for required in [parameter.default is parameter.empty]
        },
    }
