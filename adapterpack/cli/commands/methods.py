"""``adapterpack methods``."""

from __future__ import annotations

import dataclasses
import logging
import re
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import click

from ...adapter_methods import INITS, broken_plugins, describe_traits, get, methods
from ...adapter_methods.core.config import types_of_fields
from ...adapter_methods.nodes import NODES, traits
from ...io import Json
from .. import common_options, log_message, print_facts, print_report, print_table, suggest

_KEYS = {"min_features": "least"}
"""Traits whose key in the JSON differs from their name, since scripts read it."""


@click.command("methods")
@click.argument(
    "name",
    required=False,
    shell_complete=suggest(
        "adapterpack.adapter_methods.registry:METHODS", "adapterpack.adapter_methods.nodes.registry:NODES"
    ),
)
@common_options
def command(name: str | None, as_json: bool) -> None:
    """Lists every adapter method, including those of other packages (entry points adapterpack.methods).

    With NAME, shows that method or node with its traits and hyperparameters. The list ends with the
    initializations of low-rank methods and the nodes of composition trees (compose --tree).

    \b
    Example:
      adapterpack methods
      adapterpack methods lora
    """
    if name is not None and name in NODES:
        node = _describe_node(NODES[name])
        if as_json:
            print_report({"methods": [], "inits": [], "nodes": [node]})
        else:
            print_facts(node)
        return
    for error in broken_plugins() if name is None else ():
        log_message(f"warning: {error.sentence}", logging.WARNING)
    chosen = methods().values() if name is None else [get(name)]
    listed = [_describe(method) for method in chosen]
    if as_json:
        print_report(
            {
                "methods": listed,
                "inits": [_describe_init(init) for init in INITS.values()],
                "nodes": [_describe_node(kind) for kind in NODES.values()] if name is None else [],
            }
        )
    elif name is None:
        print_table(
            ["name", "kind", "what it does"],
            [[method["name"], method["kind"], method["summary"]] for method in listed],
        )
        print_table(
            ["init", "needs", "how the branch begins"],
            [[init.name, ", ".join(sorted(init.needs)) or "-", init.summary] for init in INITS.values()],
        )
        print_table(
            ["node", "of a tree", "what it does"],
            [[kind.name, "router" if kind.routes else "-", kind.summary] for kind in NODES.values()],
        )
    else:
        print_facts(listed[0])


def _describe_node(kind: Any) -> Json:
    return {
        "name": kind.name,
        "summary": kind.summary,
        "paper": kind.paper,
        "formula": kind.formula,
        "kind": "node",
        "traits": traits(kind),
        "hyperparameters": _hyperparameters(kind.settings),
    }


def _describe_init(init: Any) -> Json:
    return {
        "name": init.name,
        "summary": init.summary,
        "paper": init.paper,
        "needs": sorted(init.needs),
        "cancels": init.cancels,
        "options": dict(init.options),
    }


def _describe(method: Any) -> Json:
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "formula": method.formula,
        "kind": method.kind,
        "spec_version": method.config.spec_version,
        "peft": method.peft.peft_type if method.peft else None,
        "traits": {_KEYS.get(name, name): _plain(value) for name, value in describe_traits(method).items()},
        "hyperparameters": _hyperparameters(method.config),
    }


def _hyperparameters(config: type) -> list[Json]:
    types = types_of_fields(config)
    return [
        {"name": field.name, "type": _type_name(types[field.name]), "default": _default(field)}
        for field in dataclasses.fields(config)
    ]


def _type_name(hint: Any) -> str:
    """Returns a type as Python writes it, without the bounds of numbers."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type_name, get_args(hint)))
    if hint is NoneType:
        return "None"
    return (
        hint.__name__ if isinstance(hint, type) else re.sub(r"\b(typing|collections\.abc)\.", "", str(hint))
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return _plain(field.default_factory())
    return None if field.default is dataclasses.MISSING else _plain(field.default)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list | set | frozenset):
        return list(value)
    return value if isinstance(value, str | int | float | dict | None) else str(value)
