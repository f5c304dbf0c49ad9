"""Checks by how much a tokenizer can make a text longer: rules of replacement, one after another, can double it forty times."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from ...errors import FormatError

MOST = 4096
"""The most characters that one character may become; with the rules of real tokenizers it is up to a few hundred."""
_LONGEST_PREFIX = 1024
_UNICODE = 18  # what one character becomes in the normal forms of Unicode, at most
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")


def require_bounded_growth(core: Any, where: Path) -> None:
    """Checks the rules before and after the model of a tokenizer.

    Raises:
        FormatError: a text could become more than :data:`MOST` times as long.
    """
    for rules in ((core.normalizer, core.pre_tokenizer), (core.post_processor,), (core.decoder,)):
        steps = [step for rule in rules if rule is not None for step in _steps(json.loads(rule.__getstate__()))]
        growth = prod(map(_growth, steps))
        if any(step["type"] in ("NFD", "NFKD", "NFC", "NFKC") for step in steps):
            growth *= _UNICODE  # once: a text in a normal form stays as it is
        if growth > MOST or any(len(step.get("prepend", "")) > _LONGEST_PREFIX for step in steps):
            raise FormatError("the tokenizer's rules can make a text very much longer", where=where, expected=f"at most {MOST} times",
                              found=f"{growth:.3g} times", remedy="fetch the tokenizer from a source that you trust")


def _steps(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in _PARTS:
        for inner in rule.get(part, ()):
            yield from _steps(inner)
    yield rule


def _growth(step: dict[str, Any]) -> float:
    kind = step["type"]
    if kind == "Replace":
        literal = step["pattern"].get("String")
        size = len(step["content"])
        return max(1.0, size / max(len(literal), 1) if literal is not None else size + 1)  # an expression may match nothing at all
    if kind == "Precompiled":
        data = base64.b64decode(step["precompiled_charsmap"] or "")
        texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")  # behind the size of a trie, and the trie
        return max(1, *(len(text.decode("utf-8", "replace")) for text in texts))
    if kind == "ByteLevel":
        return 2
    if kind == "TemplateProcessing":
        return max(1, *(sum("Sequence" in piece for piece in step[side]) for side in ("single", "pair")))
    return 1
