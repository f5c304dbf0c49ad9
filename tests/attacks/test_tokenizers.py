"""Attacks by tokenizers and configurations: damaged, of wrong types, costly to load or to use, with control
characters in tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack import Attacks

from adapterpack.bundle.manifest import read_bundle
from adapterpack.runtime.text.tokenizer import Tokenizer

Make = Callable[..., Any]
TOKENIZER, CONFIGS = "tokenizer.json", ("tokenizer_config.json", "generation_config.json", "config.json")


def changed(data: bytes, *keys: str, value: Any) -> bytes:
    """JSON with another value under these keys."""
    content = json.loads(data)
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return json.dumps(content).encode()


def regex(pattern: str) -> Callable[[bytes], bytes]:
    return lambda data: changed(
        data,
        "pre_tokenizer",
        value={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
    )


def added(count: int, length: int) -> list[dict[str, Any]]:
    return [
        {
            "id": 100 + number,
            "content": f"{number:0{length}d}",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
            "special": False,
        }
        for number in range(count)
    ]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "nested": lambda data: b'{"a":' + b"[" * 100_000,
    "nested and closed": lambda data: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a list": lambda data: b"[]",
    "a number": lambda data: b"7",
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "no UTF-8": lambda data: b'{"a": "\xff"}',
    "200 MB": lambda data: data + b" " * (200 << 20),
    "NUL bytes": lambda data: bytes(10_000),
}
TOKENIZERS: dict[str, Callable[[bytes], bytes]] = {
    **DAMAGE,
    "no model": lambda data: b"{}",
    "a model that is a number": lambda data: changed(data, "model", value=5),
    "a vocabulary that is a list": lambda data: changed(data, "model", "vocab", value=[1, 2]),
    "ids that are texts": lambda data: changed(data, "model", "vocab", value={"a": "b"}),
    "negative ids": lambda data: changed(data, "model", "vocab", value={"a": -1}),
    "ids of 70 bits": lambda data: changed(data, "model", "vocab", value={"a": 2**70}),
    "added tokens that are numbers": lambda data: changed(data, "added_tokens", value=[5]),
    "a rule of no name": lambda data: changed(data, "normalizer", value={"type": "Unheard"}),
    "a rule without its pattern": lambda data: changed(data, "normalizer", value={"type": "Replace"}),
    "an expression that is none": regex("(((["),
    "forty doublings": lambda data: changed(
        data,
        "normalizer",
        value={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "w"}, "content": "ww"}] * 40,
        },
    ),
    "a growth of a million": lambda data: changed(
        data, "normalizer", value={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1_000_000}
    ),
    "a long prefix": lambda data: changed(
        data, "normalizer", value={"type": "Prepend", "prepend": "x" * 30_000_000}
    ),
    "a slow expression over added tokens": lambda data: changed(
        changed(
            data, "normalizer", value={"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": ""}
        ),
        "added_tokens",
        value=[
            {**token, "content": "a" * 24 + "b" + token["content"], "normalized": True}
            for token in added(1000, 4)
        ],
    ),
    "a slow expression in the decoder": lambda data: changed(
        data, "decoder", value={"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": ""}
    ),
    "two million merges": lambda data: changed(
        data, "model", value={"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]] * 2_000_000}
    ),
    "two million tokens": lambda data: changed(data, "model", "vocab", value={}).replace(
        b'"vocab": {}',
        b'"vocab": {' + b",".join(b'"%x":%d' % (number, number) for number in range(2_000_000)) + b"}",
    ),
    "long added tokens": lambda data: changed(data, "added_tokens", value=added(40_000, 250)),
}
SLOW = {
    "exponential": "(a+)+$",
    "alternatives": "(a|a)*$",
    "cubic": "a*a*a*$",
    "quadratic": "a*$",
    "repetitions in each other": "((a{1,9}){1,9}){1,9}$",
    "references": r"(a*)*\1$",
    "look behind": "(?<=a)(a*)*$",
}


def copied(bundle: Path, target: Path, **files: Callable[[bytes], bytes]) -> Path:
    """A copy of a bundle with some files changed, and a manifest that says so."""
    shutil.copytree(bundle, target)
    for name, change in files.items():
        path = target / name
        path.write_bytes(change(path.read_bytes() if path.is_file() else b"{}"))
    read_bundle(target).write(target)
    return target


def opened(folder: Path, text: str = "w1") -> None:
    tokenizer = Tokenizer(folder)
    tokenizer.encode(text)
    tokenizer.prompt("w1")
    assert tokenizer.eos_ids is not None and tokenizer.pad_id is not None and tokenizer.mask_token is not None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_opened(name: str, attacks: Attacks, tiny_llama: Path) -> None:
    (attacks.work / TOKENIZER).write_bytes(TOKENIZERS[name]((tiny_llama / TOKENIZER).read_bytes()))
    attacks.call(opened, attacks.work).refused(TOKENIZER)


@pytest.mark.parametrize("name", SLOW)
def test_an_expression_takes_long(name: str, attacks: Attacks, tiny_llama: Path) -> None:
    (attacks.work / TOKENIZER).write_bytes(regex(SLOW[name])((tiny_llama / TOKENIZER).read_bytes()))
    attacks.call(opened, attacks.work, ("a" * 30 + "c") * 3000 + "a" * 100_000 + "c").refused(TOKENIZER)


def test_words_of_any_length(attacks: Attacks, tiny_llama: Path) -> None:
    """WordPiece looks at every part of a word."""
    data = changed(
        (tiny_llama / TOKENIZER).read_bytes(),
        "model",
        value={
            "type": "WordPiece",
            "unk_token": "?",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 10**9,
            "vocab": {"?": 0, "a": 1},
        },
    )
    for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        data = changed(data, key, value=[] if key == "added_tokens" else None)
    (attacks.work / TOKENIZER).write_bytes(data)
    attacks.call(opened, attacks.work, "b" * 600_000).refused(TOKENIZER)


@pytest.mark.parametrize(
    "name", ["cut", "nested", "UTF-16", "200 MB", "forty doublings", "two million merges"]
)
def test_a_bundle_answers_with_a_tokenizer(name: str, attacks: Attacks, bundle_of: Make) -> None:
    bundle = copied(bundle_of("llama", "bank"), attacks.work / "bundle", **{TOKENIZER: TOKENIZERS[name]})
    attacks.command("run", bundle, "--prompt", "w1", "--provider", "cpu").refused(TOKENIZER)


@pytest.mark.parametrize("file", CONFIGS)
@pytest.mark.parametrize("name", DAMAGE)
def test_a_configuration_is_read(file: str, name: str, attacks: Attacks, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, attacks.work, dirs_exist_ok=True)
    (attacks.work / "generation_config.json").unlink(missing_ok=True)
    data = (attacks.work / file).read_bytes() if (attacks.work / file).is_file() else b'{"eos_token_id": 2}'
    (attacks.work / file).write_bytes(DAMAGE[name](data))
    attacks.call(opened, attacks.work).refused(file)


@pytest.mark.parametrize(
    "name", ["forty doublings", "a growth of a million", "a long prefix", "two million tokens"]
)
def test_a_tokenizer_is_trained_with(name: str, attacks: Attacks, base: Path) -> None:
    (base / TOKENIZER).write_bytes(TOKENIZERS[name]((base / TOKENIZER).read_bytes()))
    attacks.command("train", "train.yaml").refused("tokenizer", absent=attacks.work / "out")


def test_an_expression_takes_long_in_training(attacks: Attacks, base: Path) -> None:
    """A text that the expression is tried on without end is refused; every other is learned from."""
    (base / TOKENIZER).write_bytes(regex(SLOW["exponential"])((base / TOKENIZER).read_bytes()))
    attacks.command("train", "train.yaml").harmless()
    (attacks.work / "rows.jsonl").write_text(
        json.dumps({"prompt": "a" * 300 + "c", "completion": "y"}) + "\n"
    )
    attacks.command("train", "train.yaml", "output_dir=other").refused(
        "tokenizer", absent=attacks.work / "other"
    )


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("tokenizer_config.json", {"pad_token": 5}),
    ("tokenizer_config.json", {"chat_template": 5}),
    ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": {}}]}),
    ("tokenizer_config.json", {"bos_token": {"content": {}}, "chat_template": "x"}),
    ("generation_config.json", {"eos_token_id": "2"}),
    ("generation_config.json", {"eos_token_id": 2**70}),
    ("generation_config.json", {"eos_token_id": [[2]]}),
    ("config.json", {"max_position_embeddings": "64"}),
    ("config.json", {"max_position_embeddings": -1}),
    ("config.json", {"max_position_embeddings": 1e400}),
    ("config.json", {"text_config": {"max_position_embeddings": []}}),
]


@pytest.mark.parametrize(
    ("file", "content"), WRONG, ids=lambda value: json.dumps(value) if isinstance(value, dict) else value
)
def test_a_bundle_has_values_of_wrong_types(
    file: str, content: dict[str, Any], attacks: Attacks, bundle_of: Make
) -> None:
    bundle = copied(
        bundle_of("llama", "bank"), attacks.work / "bundle", **{file: lambda _: json.dumps(content).encode()}
    )
    attacks.command("run", bundle, "--prompt", "w1", "--provider", "cpu", "--max-new-tokens", 2).refused(file)


@pytest.mark.parametrize(
    "token",
    ["\x1b]0;owned\x07", "\u202eabc", "\x9b2J", "\x00"],
    ids=["a title", "right to left", "C1", "NUL"],
)
def test_tokens_with_controls_are_printed(token: str, attacks: Attacks, bundle_of: Make) -> None:
    """Whatever the model says is a control character; also of an id that the vocabulary does not have."""

    def renamed(data: bytes) -> bytes:
        content = json.loads(data)
        words = content["model"]["vocab"]
        content["model"]["vocab"] = {
            word if number < 8 else f"{token}{number}": number for word, number in words.items()
        }
        content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] < 8]
        return json.dumps(content).encode()

    bundle = copied(bundle_of("llama", "bank"), attacks.work / "bundle", **{TOKENIZER: renamed})
    attacks.command("run", bundle, "--prompt", "w1", "--provider", "cpu", "--max-new-tokens", 4).harmless()
    attacks.command(
        "run", bundle, "--prompt", "w1", "--provider", "cpu", "--max-new-tokens", 4, "--json"
    ).harmless()
