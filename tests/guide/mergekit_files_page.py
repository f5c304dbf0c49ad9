"""What becomes of mergekit's methods and keys: ``python tests/guide/mergekit_files_page.py >
docs/migrating/mergekit-files.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from adapterpack.composing.mergekit_file import MergeMethod, table

INTRO = """# Keys of mergekit's files

`adapterpack compose FILE.yaml -o OUT` reads a configuration of mergekit. Where its models are adapters (`BASE+ADAPTER`, or folders of adapters), OUT is
a pack; where they are full models, it is a merged checkpoint, streamed tensor by tensor. Results equal mergekit's (0.1.5) up to
rounding, except where entries are dropped at random. This page is made from the table by `make guide`.
"""
ON = {
    "changes": "changes of the base model",
    "weights": "the weights themselves",
    "either": "changes of the base model, or the weights where the file names none",
}


def page() -> str:
    """The tables, in Markdown."""
    known = table()
    parts = [INTRO, "## Methods\n"]
    parts += _table(("merge_method", "rule", "of", "what differs"), map(_method, known.methods.items()))
    parts += ["Adapters take the methods that merge changes, and `linear` where the weights add up to 1.\n"]
    parts += ["These are refused:\n", *_table(("merge_method", "because"), _named(known.refused.items()))]
    parts += ["## Keys\n", *_table(("key", "what becomes of it"), _named(known.keys.items()))]
    left = (
        (", ".join(f"`{key}`" for key in keys), f"left out, with a note: {why}")
        for why, keys in known.left_out.items()
    )
    parts += ["", *_table(("keys", "what becomes of them"), left)]
    return "\n".join(parts) + "\n"


def _method(item: tuple[str, MergeMethod]) -> tuple[str, ...]:
    name, method = item
    rules = dict.fromkeys([method.rule, *(case["rule"] for case in method.when)])
    return f"`{name}`", " or ".join(f"`{rule}`" for rule in rules), ON[method.on], method.note


def _named(items: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((f"`{name}`", text) for name, text in items)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [heads, ("---",) * len(heads), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


if __name__ == "__main__":
    sys.stdout.write(page())
