"""Mutations of bytes, and of the JSON in them: a good input becomes an almost good one."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "packs"))
from make_bad import sealed_json

TOKENS = [token.encode() for token in (
    "{", "}", "[", "]", '"', ":", ",", "\\", "\\u0000", "\\ud800", "-0", "1e999", "NaN", "null", "true", " ", "0", "9" * 17, "9" * 400,
    "\xa0", '"dtype":"F32",', '"__metadata__":{"a":"b"},', "[" * 40, '{"a":' * 40)]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63, 10**30, 0.5, 1e308, -1e-320, "", "a", "\u202e", "\x00", "../x", "/etc/x",
    "https://127.1/", "x" * 600, "F32", "I8", "BF16", "F8_E4M3", "lora", "full", "1.9", "2.0", [], {}, [[]], [0], [0] * 9, [2**62, 4],
    [0, 2**60], {"a": 1}, {"r": 10**9}, {"auto_map": "x"}, 2**24, 2**24 - 3, 2**26, [[2**20] * 4], 1e38]  # fmt: skip
MAX_BYTES, MAX_JSON, MAX_TEMPLATE = 1 << 16, 1 << 18, 66_000
PIECES = [piece.encode() for piece in (
    "{% set x = x ~ x %}", "{% for i in range(9999) %}", "{% endfor %}", "{{ f(x) }}", "{% macro f(x) %}",
    "{% endmacro %}", "range(n)", "{% set ns.a = ns.a + x %}", "{% set ns = namespace(a='b') %}",
    "{{ 'x' * 9999 }}", " * 9999", " + x", " ~ x", "(", ")", "[", "]", "x.a", "|join(x)", "|replace('a', x)",
    ".items()", " if x else ", "{% set x %}", "{% endset %}", "{% if x %}", "{% endif %}", "{% elif x %}",
    "{{ x.a.b }}", "-", "not ", "|length", "9" * 30, "{% for k, v in x|dictsort %}", "{{ loop.index0 }}",
    "|map('upper')", "{'a': x}", "{{", "}}", "{%", "%}")]  # fmt: skip
"""What templates are made of."""
YAML = tuple(piece.encode() for piece in (
    "&a ", "*a", "[*a, *a]", "<<: *a\n", "? ", ": ", "- ", "!!int ", "!!float ", "!!timestamp 2001-02-30",
    "!!binary a", "!!set ", "!<x> ", "|\n", ">-\n ", "'", "\n", "\n  ", "\t", "---\n", "...\n", "%YAML 1.1\n",
    "%TAG ! x\n", "#", "2001-02-30", "190:20:30", "0x", "0b1",
    "1_0", ".inf", "~", "yes", "\ufeff", "\u2028", "\"\\x1b", "{a: 1, ", "a: &a [*a]"))  # fmt: skip
"""What YAML is made of."""
LARGE: tuple[Callable[[int], Any], ...] = (
    lambda size: "a." * (size // 2) + ":", lambda size: "x://" * (size // 4), lambda size: " " * size,
    lambda size: "\u00e9" * (size // 2), lambda size: [0] * (size // 8),
    lambda size: {"k" * (size // 2): [0] * (size // 16)}, lambda size: [{}] * (size // 8),
    lambda size: {str(number): number for number in range(size // 32)}, lambda size: [[[[[0]]]]] * (size // 64))  # fmt: skip
"""Values of about so many bytes, whatever they are for."""


def flip(data: bytearray, rng: random.Random, _: bytes) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def replace(data: bytearray, rng: random.Random, _: bytes) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random, _: bytes) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 2, 8, 100, len(data)))]


def insert(data: bytearray, rng: random.Random, _: bytes) -> None:
    data[(at := rng.randrange(len(data) + 1)) : at] = (
        rng.choice(TOKENS) if rng.random() < 0.7 else rng.randbytes(rng.randrange(9))
    )


def double(data: bytearray, rng: random.Random, _: bytes) -> None:
    start, size = rng.randrange(len(data)), rng.choice((1, 8, 30, 200))
    data[start:start] = data[start : start + size]


def splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    start, from_ = rng.randrange(len(data)), rng.randrange(len(other) + 1)
    data[start : start + rng.randrange(64)] = other[from_ : from_ + rng.randrange(64)]


def length(data: bytearray, rng: random.Random, _: bytes) -> None:
    sizes = (
        0,
        1,
        2,
        7,
        abs(len(data) - 8),
        len(data),
        1 << 24,
        1 << 31,
        1 << 63,
        (1 << 64) - 1,
        rng.randrange(1 << 16),
    )
    data[:8] = rng.choice(sizes).to_bytes(8, "little")


BYTES: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    flip,
    replace,
    cut,
    insert,
    double,
    splice,
    length,
)


def mutated_bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """One to four changes of single bytes and stretches; at most 64 KiB."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if changed:
            rng.choice(BYTES)(changed, rng, other)
    return bytes(changed[: max(MAX_BYTES, len(data))])


def mutated_json(value: Any, rng: random.Random) -> Any:
    """One to three values of a JSON value replaced, removed, renamed, repeated or moved to another place."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holders = [here for here in _inner(value) if here]
        if not holders:
            return copy.deepcopy(rng.choice(VALUES))
        here, source = rng.choice(holders), rng.choice(holders)
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        action = rng.randrange(6)
        if action == 0:
            del here[key]
        elif action == 1 and isinstance(here, dict):
            here[rng.choice((f"{key}x", "", "__proto__", "n" * 600, "\u202e", "trust_remote_code"))] = (
                here.pop(key)
            )
        elif action == 2 and isinstance(here, list):
            here.append(here[key])
        elif action == 3:
            here[key] = copy.deepcopy(
                source[rng.choice(list(source) if isinstance(source, dict) else range(len(source)))]
            )
        elif action == 4 and rng.random() < 0.3:
            _grow(here, key, rng)
        else:
            here[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _grow(here: Any, key: Any, rng: random.Random) -> None:
    """Something large in the place of a value, or the value many times."""
    size = rng.choice((1 << 10, 1 << 13, MAX_BYTES))
    item = here[key]
    if isinstance(item, list) and item and rng.random() < 0.7:
        here[key] = [copy.deepcopy(one) for one in item * (size // 400 + 1)]
        for number, one in enumerate(here[key]):
            if isinstance(one, dict) and "path" in one:
                one["path"] = f"{one['path']}{number}"
    elif isinstance(item, dict) and item and rng.random() < 0.7:
        first = next(iter(item))
        here[key] = {
            **item,
            **{f"{first}{number}": copy.deepcopy(item[first]) for number in range(size // 400)},
        }
    else:
        here[key] = rng.choice(LARGE)(size)


def _inner(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [] if inside is None else [value, *(found for item in inside for found in _inner(item))]


def header_or_bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A safetensors file with a forged header of the right length, or any bytes changed."""
    size = int.from_bytes(data[:8], "little")
    try:
        value = json.loads(data[8 : 8 + size]) if rng.random() < 0.6 else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return mutated_bytes(data, rng, other)
    text = json.dumps(mutated_json(value, rng), ensure_ascii=rng.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )
    if len(text) > MAX_JSON:
        return mutated_bytes(data, rng, other)
    text += b" " * rng.choice((0, -len(text) % 8))
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def canonical_or_bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Forged JSON in its canonical form, or any bytes changed."""
    try:
        value = json.loads(data) if rng.random() < 0.9 else None
    except ValueError:
        value = None
    if value is None:
        return mutated_bytes(data, rng, other)
    try:
        forged = mutated_json(value, rng)
        if rng.random() < 0.05:
            return (json.dumps(forged, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(
                "utf-8", "surrogatepass"
            )
        sealed = sealed_json(forged)
    except MemoryError:  # what grew once may have grown again, beyond the watch's ceiling
        return mutated_bytes(data, rng, other)
    return sealed if len(sealed) <= MAX_JSON else mutated_bytes(data, rng, other)


def after_the_name(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The same, behind a first line that stays."""
    name, _, rest = data.partition(b"\n")
    return name + b"\n" + canonical_or_bytes(rest, rng, other.partition(b"\n")[2])


def jinja(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Pieces of templates put together: cut out of two of them, repeated, put into each other, and any bytes
    changed.
    """
    pieces = re.findall(rb"\{%.*?%\}|\{\{.*?\}\}|[^{]+", data + other, re.DOTALL) or [b""]
    words = re.findall(rb"\w+|[^\w\s]", data + other)
    changed = data
    for _ in range(rng.randint(1, 3)):
        at, piece = rng.randrange(len(changed) + 1), rng.choice(pieces)
        action = rng.randrange(5)
        if action == 0:
            changed = changed[:at] + piece * rng.choice((1, 2, 40, 2_000)) + changed[at:]
        elif action == 1:
            changed = changed.replace(
                rng.choice(words or [b"x"]),
                rng.choice((*words, *PIECES)) if words else b"y",
                rng.choice((1, -1)),
            )
        elif action == 2:
            changed = changed[:at] + rng.choice(PIECES) * rng.choice((1, 3, 150)) + changed[at:]
        elif action == 3:
            changed = rng.choice(PIECES) + changed
        else:
            changed = mutated_bytes(changed or b" ", rng, other)
    return changed[:MAX_TEMPLATE]


def pieces_of_yaml(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """What YAML and JSON are made of, once or a thousand times, at any place; lines of another text, and any
    bytes changed.
    """
    changed = data
    for _ in range(rng.randint(1, 3)):
        at, action = rng.randrange(len(changed) + 1), rng.randrange(4)
        if action == 0:
            changed = mutated_bytes(changed or b" ", rng, other)
        elif action == 1:
            changed = (
                changed[:at]
                + rng.choice(other.splitlines(keepends=True) or [b"a"]) * rng.choice((1, 2, 300))
                + changed[at:]
            )
        else:
            changed = (
                changed[:at] + rng.choice((*YAML, *TOKENS)) * rng.choice((1, 1, 2, 9, 1000)) + changed[at:]
            )
    return changed[:MAX_BYTES]
