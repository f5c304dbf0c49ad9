"""Records how axolotl and LLaMA-Factory render chats and prompts, by running their own code.

``python tests/interop/tool_renderings.py`` prints ``tests/golden/tool_renderings.json``; it needs both packages
(``pip install --no-deps axolotl llamafactory``) beside transformers. What their templates need of pictures and sounds may be
missing, because no chat here has any.
"""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

SYSTEM = {"role": "system", "content": "Answer in one line."}
TURNS = [
    {"role": "user", "content": "Which is the longest river?"},
    {"role": "assistant", "content": "The Nile.\nOr the Amazon."},
    {"role": "user", "content": "And the deepest lake?"},
    {"role": "assistant", "content": "Baikal"},
]
CASES = {"one": TURNS[:2], "two": TURNS, "system": [SYSTEM, *TURNS]}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


class Pieces:
    """A tokenizer whose tokens are the texts that it is given."""

    bos_token, eos_token = TOKENS.values()
    bos_token_id, eos_token_id = TOKENS.values()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Returns the text as a token."""
        return [text]

    def convert_tokens_to_ids(self, token: str) -> str:
        """Returns a token as its id."""
        return token


def llamafactory() -> dict[str, dict[str, str]]:
    """Returns name of a template -> case -> text."""
    for name in ("torchaudio", "av", "librosa"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)
    templates = importlib.import_module("llamafactory.data.template").TEMPLATES
    rendered: dict[str, dict[str, str]] = {}
    for name, template in templates.items():
        rendered[name] = {}
        for case, messages in CASES.items():
            system = messages[0]["content"] if messages[0]["role"] == "system" else None
            turns = messages[1:] if system else messages
            pieces = template._encode(Pieces(), turns, system, None)
            rendered[name][case] = "".join(token for turn in pieces for token in turn)
    return rendered


def axolotl() -> dict[str, dict[str, str]]:
    """Returns name of a template -> case -> text; a case that it refuses is left out."""
    from jinja2 import Environment, TemplateError
    from jinja2.ext import loopcontrols

    def refuse(text: str) -> None:
        raise TemplateError(text)

    jinja = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    jinja.globals["raise_exception"] = refuse
    folder = Path(str(importlib.util.find_spec("axolotl").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    rendered: dict[str, dict[str, str]] = {}
    for file in sorted((folder / "utils" / "chat_templates" / "templates").glob("*.jinja")):
        rendered[file.stem] = {}
        for case, messages in CASES.items():
            try:
                text = jinja.from_string(file.read_text("utf-8")).render(messages=messages, **TOKENS)
            except TemplateError:
                continue
            rendered[file.stem][case] = text
    return rendered


def prompts() -> dict[str, list[str]]:
    """Returns axolotl's type of a data set -> its prompts of a row with and without an input."""
    prompters: Any = importlib.import_module("axolotl.prompters")
    styles = {style.value: style.value for style in prompters.PromptStyle}
    row = {"instruction": "Name it.", "output": "Rose"}
    return {
        f"alpaca:{style}": [
            next(prompters.AlpacaPrompter(style).build_prompt(row["instruction"], more, None))
            for more in ("It is red.", "")
        ]
        for style in styles
    }


def known(tool: str, rendered: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Returns the renderings of the templates that this package has."""
    root = Path(__file__).parents[2] / "adapterpack" / "tasks" / "conversations" / "templates.toml"
    ours = tomllib.loads(root.read_text("utf-8"))[tool]
    return {name: rendered[name] for first, texts in ours.items() for name in (first, *texts.get("also", ()))}


if __name__ == "__main__":
    recorded = {
        "versions": {name: version(name) for name in ("axolotl", "llamafactory")},
        "cases": CASES,
        "templates": {
            "axolotl": known("axolotl", axolotl()),
            "llamafactory": known("llamafactory", llamafactory()),
        },
        "prompts": prompts(),
    }
    print(json.dumps(recorded, indent=1, ensure_ascii=False, sort_keys=True))
