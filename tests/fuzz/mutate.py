"""Mutations of bytes, and of the JSON in them: a good input becomes an almost good one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

TOKENS = [token.encode() for token in (
    "{", "}", "[", "]", '"', ":", ",", "\\", "\\u0000", "\\ud800", "-0", "1e999", "NaN", "null", "true", " ", "0", "9" * 17, "9" * 400,
    "\xa0", '"dtype":"F32",', '"__metadata__":{"a":"b"},', "[" * 40, '{"a":' * 40)]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63, 10**30, 0.5, 1e308, -1e-320, "", "a", "\u202e", "\x00", "../x", "/etc/x",
    "https://127.1/", "x" * 600, "F32", "I8", "BF16", "F8_E4M3", "lora", "full", "1.9", "2.0", [], {}, [[]], [0], [0] * 9, [2**62, 4],
    [0, 2**60], {"a": 1}, {"r": 10**9}, {"auto_map": "x"}]  # fmt: skip
MAX_BYTES = 1 << 16


def flip(data: bytearray, rng: random.Random, _: bytes) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def replace(data: bytearray, rng: random.Random, _: bytes) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random, _: bytes) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 2, 8, 100, len(data)))]


def insert(data: bytearray, rng: random.Random, _: bytes) -> None:
    data[(at := rng.randrange(len(data) + 1)) : at] = rng.choice(TOKENS) if rng.random() < 0.7 else rng.randbytes(rng.randrange(9))


def double(data: bytearray, rng: random.Random, _: bytes) -> None:
    start, size = rng.randrange(len(data)), rng.choice((1, 8, 30, 200))
    data[start:start] = data[start : start + size]


def splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    start, from_ = rng.randrange(len(data)), rng.randrange(len(other) + 1)
    data[start : start + rng.randrange(64)] = other[from_ : from_ + rng.randrange(64)]


def length(data: bytearray, rng: random.Random, _: bytes) -> None:
    sizes = (0, 1, 2, 7, abs(len(data) - 8), len(data), 1 << 24, 1 << 31, 1 << 63, (1 << 64) - 1, rng.randrange(1 << 16))
    data[:8] = rng.choice(sizes).to_bytes(8, "little")


BYTES: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (flip, replace, cut, insert, double, splice, length)


def mutated_bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """One to four changes of single bytes and stretches; at most 64 KiB."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if changed:
            rng.choice(BYTES)(changed, rng, other)
    return bytes(changed[:MAX_BYTES])


def mutated_json(value: Any, rng: random.Random) -> Any:
    """One to three values of a JSON value replaced, removed, renamed, repeated or moved to another place."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holders = [here for here in _inner(value) if here]
        if not holders:
            return copy.deepcopy(rng.choice(VALUES))
        here, source = rng.choice(holders), rng.choice(holders)
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        action = rng.randrange(5)
        if action == 0:
            del here[key]
        elif action == 1 and isinstance(here, dict):
            here[rng.choice((f"{key}x", "", "__proto__", "n" * 600, "\u202e", "trust_remote_code"))] = here.pop(key)
        elif action == 2 and isinstance(here, list):
            here.append(here[key])
        elif action == 3:
            here[key] = copy.deepcopy(source[rng.choice(list(source) if isinstance(source, dict) else range(len(source)))])
        else:
            here[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _inner(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [] if inside is None else [value, *(found for item in inside for found in _inner(item))]
