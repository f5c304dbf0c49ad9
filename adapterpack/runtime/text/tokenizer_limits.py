"""Bounds the cost of an untrusted tokenizer: of loading it, by its parts; of using it, by how much its rules
lengthen a text, and by its regular expressions.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from ...errors import FormatError
from ...io import Json

MOST = 4096
"""The most characters that one character may become. The rules of real tokenizers reach a few hundred.
"""
_LONGEST_PREFIX = 1024
_UNICODE = 18  # the most characters that Unicode normalization makes of one
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")
_REMEDY = "fetch the tokenizer from a source that you trust"
MEMORY = 400 << 20
"""The most bytes for loading, estimated from the measured bytes for each merge, token and character of an
added token.

The largest published vocabularies (a million tokens, or 600,000 merges) need three quarters of it.
"""
_MERGE = 500
_TOKEN = 265
_ADDED = 600
_ADDED_CHARACTER = 70


class _Added(msgspec.Struct):
    content: str
    normalized: bool = True


class _Model(msgspec.Struct):
    vocab: msgspec.Raw = msgspec.Raw(b"")
    merges: msgspec.Raw = msgspec.Raw(b"")


class _File(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []
    normalizer: Any = None
    decoder: Any = None


def require_bounded_load(data: bytes, where: Path) -> None:
    """Checks that a ``tokenizer.json`` can be loaded within bounds, from the number of its parts.

    Raises:
        FormatError: loading would take more than :data:`MEMORY`, or unbounded time; or the file is malformed.
    """
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(
            f"this is not a tokenizer: {error}",
            where=where,
            remedy="fetch tokenizer.json again from where it came",
        ) from error
    vocab, merges = bytes(file.model.vocab), bytes(file.model.merges)
    size = (
        # Counts brackets in the raw JSON instead of parsing it, which would take the very memory to be
        # bounded.
        _MERGE * max(merges.count(b"["), merges.count(b",") if merges.count(b"[") < 2 else 0)
        + _TOKEN * max(vocab.count(b":"), vocab.count(b"["))
        + sum(_ADDED + _ADDED_CHARACTER * len(token.content) for token in file.added_tokens)
    )
    if size > MEMORY:
        raise FormatError(
            "the tokenizer has very many parts",
            where=where,
            expected=f"what is loaded into {MEMORY >> 20} MiB",
            found=f"{size >> 20} MiB",
            remedy=_REMEDY,
        )
    # normalized added tokens run these expressions during loading
    normalized = any(token.normalized for token in file.added_tokens)
    for expression in (*(_expressions(file.normalizer) if normalized else ()), *_expressions(file.decoder)):
        if not _is_linear(expression):
            raise FormatError(
                "an expression of the tokenizer may take any time",
                where=where,
                found=repr(expression)[:100],
                remedy=_REMEDY,
            )


def require_bounded_growth(core: Any, where: Path) -> None:
    """Checks how much the rules before and after the model of a tokenizer can lengthen a text.

    Raises:
        FormatError: a text could become more than :data:`MOST` times as long.
    """
    for rules in ((core.normalizer, core.pre_tokenizer), (core.post_processor,), (core.decoder,)):
        steps = [
            step for rule in rules if rule is not None for step in _steps(json.loads(rule.__getstate__()))
        ]
        growth = prod(map(_growth, steps))
        if any(step["type"] in ("NFD", "NFKD", "NFC", "NFKC") for step in steps):
            growth *= _UNICODE  # once: normalizing twice changes nothing more
        if growth > MOST or any(len(step.get("prepend", "")) > _LONGEST_PREFIX for step in steps):
            raise FormatError(
                "the tokenizer's rules can make a text very much longer",
                where=where,
                expected=f"at most {MOST} times",
                found=f"{growth:.3g} times",
                remedy=_REMEDY,
            )


def _steps(rule: Json) -> Iterator[Json]:
    for part in _PARTS:
        for inner in rule.get(part, ()):
            yield from _steps(inner)
    yield rule


def _growth(step: Json) -> float:
    kind = step["type"]
    if kind == "Replace":
        literal = step["pattern"].get("String")
        size = len(step["content"])
        # an expression may match an empty string, between any two characters
        return max(1.0, size / max(len(literal), 1) if literal is not None else size + 1)
    if kind == "Precompiled":
        data = base64.b64decode(step["precompiled_charsmap"] or "")
        # the strings follow the trie and its size
        texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
        return max(1, *(len(text.decode("utf-8", "replace")) for text in texts))
    if kind == "ByteLevel":
        return 2
    if kind == "TemplateProcessing":
        return max(1, *(sum("Sequence" in piece for piece in step[side]) for side in ("single", "pair")))
    return 1


# Expressions.

_CHARACTER = (
    r"(?:\\[pP]\{\w+\}|\\[sSdDwWrnt.]"
    r"|\[(?:[^\[\]\\&]|\\[pP]\{\w+\}|\\[sSdDwWrnt.\]\[/-])+\]"
    r"|[^\\\[\](){}*+?|^$])"
)
_PIECES = rf"(?:{_CHARACTER}(?:\?|\{{\d(?:,\d)?\}})?)*(?:{_CHARACTER}[*+]|{_CHARACTER}\{{\d,\}})?"
_LINEAR = re.compile(rf"{_PIECES}(?:\|{_PIECES})*")
"""Alternatives of characters and classes, of which only the last may repeat without bound. Such an expression
never backtracks over a long match, so its time is linear.
"""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s+(?!\S)|\s+"
_KNOWN = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _ENDS,  # GPT-2
        r" ?[^(\s|[.,!?…。，、।۔،])]+",  # BLOOM
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _ENDS,
        _WORDS
        + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        + _ENDS,  # Llama 3
        _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _ENDS,  # Qwen 2
        _WORDS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _ENDS,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        + _WORDS
        + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        + _WORDS
        + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
        + _ENDS,  # o200k
    }
)
"""Expressions of widely used models, which were reviewed by hand: they take linear time, too."""
_LONGEST_WORD = 1000


def is_quick(core: Any) -> bool:
    """Returns whether the form of a tokenizer bounds its time for any text."""
    rules = [
        json.loads(rule.__getstate__()) for rule in (core.normalizer, core.pre_tokenizer) if rule is not None
    ]
    return getattr(core.model, "max_input_chars_per_word", 0) <= _LONGEST_WORD and all(
        map(_is_linear, _expressions(rules))
    )


def _expressions(rules: Any) -> Iterator[Any]:
    """Yields all regular expressions in rules in JSON form."""
    if isinstance(rules, dict):
        if "Regex" in rules:
            yield rules["Regex"]
        rules = list(rules.values())
    for rule in rules if isinstance(rules, list) else ():
        yield from _expressions(rule)


def _is_linear(expression: Any) -> bool:
    return isinstance(expression, str) and (expression in _KNOWN or _LINEAR.fullmatch(expression) is not None)
