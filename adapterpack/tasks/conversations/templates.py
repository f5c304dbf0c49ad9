"""Makes Jinja of the chat templates that other tools know by a name; ``templates.toml`` has their texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from ...errors import ConfigError, excerpt, nearest

OWN = "own"
"""The name of the tokenizer's own template."""
_RENDERED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_TOKENS = {"{bos}": "bos_token", "{eos}": "eos_token"}


class TurnTexts(msgspec.Struct, forbid_unknown_fields=True):
    """The texts of a chat: of the turns of each role, in which ``{content}`` is what is said.

    Args:
        prefix: what comes before everything.
        between: what comes between an answer and the next question.
        inside: the system prompt stands at the beginning of the first question.
        trims: white space around what is said is left out.
        also: further names of the template.
    """

    system: str
    user: str
    assistant: str
    prefix: str = ""
    between: str = ""
    default_system: str = ""
    inside: bool = False
    trims: bool = False
    also: tuple[str, ...] = ()

    def jinja(self) -> str:
        """Returns the chat template; it refuses tools and their answers, which have no texts here."""
        said = "turn.content | trim" if self.trims else "turn.content"
        asked = f"(lead if {'true' if self.inside else 'false'} and loop.first else '') + {said}"
        between = json.dumps(self.between)
        usual = json.dumps(self.default_system)
        begins = _expression(self.assistant.partition("{content}")[0], "")
        user = _expression(self.user, asked)
        refused = "{{ raise_exception('this template has no place for %s') }}"
        return "".join(
            (
                "{%- if tools %}" + refused % "tools" + "{%- endif %}",
                "{%- set named = messages[0].role == 'system' %}",
                f"{{%- set system = messages[0].content if named else {usual} %}}",
                f"{{%- set lead = {_expression(self.system, 'system')} if system else '' %}}",
                f"{{{{- {_expression(self.prefix, '')} }}}}",
                "" if self.inside else "{{- lead }}",
                "{%- for turn in (messages[1:] if named else messages) %}{%- if turn.role == 'user' %}",
                f"{{{{- ({between} if not loop.first else '') + {user} }}}}",
                "{%- elif turn.role == 'assistant' %}",
                f"{{{{- {_expression(self.assistant, said)} }}}}",
                "{%- else %}" + refused % "this role" + "{%- endif %}{%- endfor %}",
                f"{{%- if add_generation_prompt %}}{{{{- {begins} }}}}{{%- endif %}}",
            )
        )


def _expression(text: str, content: str) -> str:
    """Returns the Jinja expression of a text with tokens and content."""
    terms = []
    rest = text
    while rest:
        places = {place: rest.find(place) for place in (*_TOKENS, "{content}") if place in rest}
        place = min(places, key=places.__getitem__, default="")
        before, _, rest = rest.partition(place) if place else (rest, "", "")
        terms += [json.dumps(before, ensure_ascii=False)] if before else []
        terms += [_TOKENS.get(place, f"({content})")] if place else []
    return " + ".join(terms) or "''"


@cache
def _templates() -> Mapping[str, TurnTexts]:
    """Returns tool/name -> texts."""
    kind = dict[str, dict[str, TurnTexts]]
    read = msgspec.toml.decode((Path(__file__).parent / "templates.toml").read_bytes(), type=kind)
    return {
        f"{tool}/{name}": texts
        for tool, some in read.items()
        for first, texts in some.items()
        for name in (first, *texts.also)
    }


def has_template(name: str) -> bool:
    """Whether there is a template of that name, as ``tool/name``."""
    return name in _templates()


def chat_template(given: str) -> str:
    """Returns the Jinja text of a template that a configuration names or writes out.

    Raises:
        ConfigError: there is none of that name.

    Example:
        >>> chat_template("{{ messages }}"), "<|im_end|>" in chat_template("axolotl/chatml")
        ('{{ messages }}', True)
    """
    if "{{" in given or "{%" in given:
        return given
    if given not in _templates():
        raise ConfigError(
            "no such chat template is known",
            where="chat_template",
            found=excerpt(given),
            remedy=f"{nearest(given, _templates())}; or write it out in Jinja",
        )
    return _templates()[given].jinja()


def with_defaults(template: str, values: Mapping[str, Any]) -> str:
    """Returns a chat template whose variables have these values where a request does not set them.

    Raises:
        ConfigError: there can be no variable of that name, or it is what the template renders.

    Example:
        >>> with_defaults("{{ messages }}", {"short": True})
        '{%- set short = short if short is defined else True %}{{ messages }}'
    """
    for name in values:
        if not name.isidentifier() or name in _RENDERED:
            raise ConfigError(
                "no variable of a chat template has this name",
                where="chat_template_kwargs",
                found=excerpt(name),
            )
    # the literals of Python are Jinja's
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {value!r} %}}" for name, value in values.items()
    ]
    return "".join([*lines, template])
