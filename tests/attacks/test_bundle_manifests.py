"""Attacks by the manifest of a bundle: a file that nothing but a signature vouches for, so all that it says
is compared with the rest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack import Attacks

from adapterpack.bundle import FILE_NAME

Make = Callable[[str, str], Path]
Change = Callable[[dict[str, Any]], None]
BIG = 10**400


def copied(attacks: Attacks, bundle: Path, change: Change | None = None) -> Path:
    """A copy of a bundle whose manifest was altered."""
    folder = attacks.work / "bundle"
    shutil.copytree(bundle, folder)
    if change is not None:
        manifest = json.loads((folder / FILE_NAME).read_text())
        change(manifest)
        (folder / FILE_NAME).write_text(json.dumps(manifest, separators=(",", ":"), sort_keys=True))
    return folder


def set_to(pointer: str, value: Any) -> Change:
    """Puts a value at a place in a manifest; ``*`` is the first key of an object."""

    def change(manifest: Any) -> None:
        *way, last = pointer.strip("/").split("/")
        for key in way:
            manifest = (
                manifest[int(key)]
                if isinstance(manifest, list)
                else manifest[next(iter(manifest)) if key == "*" else key]
            )
        if isinstance(manifest, list):
            manifest[int(last)] = value
        else:
            manifest[last] = value

    return change


def swapped(manifest: dict[str, Any]) -> None:
    one, two = manifest["adapters"]
    one["slot"], two["slot"] = two["slot"], one["slot"]


def renamed(manifest: dict[str, Any]) -> None:
    one, two = manifest["adapters"]
    one["name"], two["name"] = two["name"], one["name"]


def twice(key: str) -> Change:
    return lambda manifest: manifest[key].append(dict(manifest[key][-1]))


def without(key: str, match: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        before = manifest[key]
        if isinstance(before, dict):
            before.pop(match)
        else:
            manifest[key] = [one for one in before if match not in one.get("path", "")]
            assert len(manifest[key]) < len(before)

    return change


def role(path: str, to: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        (entry,) = [one for one in manifest["files"] if one["path"] == path]
        entry["role"] = to

    return change


def listed(path: str, where: str = "carried") -> Change:
    return lambda manifest: manifest["files"].append(
        {"path": path, "role": where, "sha256": "0" * 64, "size": 1}
    )


def site(**fields: Any) -> Change:
    """Alters the first site that has slots."""

    def change(manifest: dict[str, Any]) -> None:
        path = next(path for path, one in manifest["sites"].items() if one["fields"])
        manifest["sites"][path] |= fields

    return change


BANK: dict[str, Change] = {
    "slots of two tenants exchanged": swapped,
    "names of two tenants exchanged": renamed,
    "two tenants in one slot": set_to("adapters/1/slot", 1),
    "a tenant without a slot": set_to("adapters/0/slot", None),
    "a tenant in slot 0, the base": set_to("adapters/0/slot", 0),
    "a tenant beyond the bank": set_to("adapters/0/slot", 4),
    "a tenant in a slot of 10^18": set_to("adapters/0/slot", 10**18),
    "a tenant in a slot of 10^400": set_to("adapters/0/slot", BIG),
    "a tenant in a negative slot": set_to("adapters/0/slot", -1),
    "a slot that is a text": set_to("adapters/0/slot", "1"),
    "a slot that is a half": set_to("adapters/0/slot", 1.5),
    "two tenants of one name": set_to("adapters/1/name", "alpha"),
    "a tenant twice": twice("adapters"),
    "two tenants of one folder": set_to("adapters/1/path", "adapters/alpha"),
    "a tenant outside": set_to("adapters/0/path", "../outside"),
    "a tenant of an absolute path": set_to("adapters/0/path", "/etc"),
    "a tenant that is the bundle": set_to("adapters/0/path", "."),
    "a tenant named like an option": set_to("adapters/0/name", "--help"),
    "a tenant with an escape for a name": set_to("adapters/0/name", "\x1b]0;owned\x07"),
    "a pack of another digest": set_to("adapters/0/pack", "sha256:" + "0" * 64),
    "a bank of no slot": set_to("slots", 0),
    "a bank of one slot": set_to("slots", 1),
    "a bank larger than its graph": set_to("slots", 8),
    "a bank smaller than its graph": set_to("slots", 3),
    "a bank of 10^9 slots": set_to("slots", 10**9),
    "a larger rank than the graph's": set_to("max_rank", 4096),
    "a smaller rank than the graph's": set_to("max_rank", 2),
    "no rank": set_to("max_rank", 0),
    "a file twice": twice("files"),
    "a file in another role": role("model.onnx", "carried"),
    "an adapter as a graph": role("adapters/alpha/adapterpack.json", "graph"),
    "a role that does not exist": role("model.onnx", "library"),
    "a file inside of a file": listed("config.json/inner"),
    "the manifest in its own list": listed(FILE_NAME),
    "a file outside": listed("../outside/secret.txt"),
    "a file with an escape in its name": listed("a\x1b[2Jb"),
    "a file that is missing": listed("more.json"),
    "a name in two cases": listed("CONFIG.json"),
    "the graph not listed": without("files", "model.onnx"),
    "the weights not listed": without("files", "model.onnx.data"),
    "the tokenizer not listed": without("files", "tokenizer.json"),
    "an adapter not listed": without("files", "adapters/alpha/"),
    "no file listed": set_to("files", []),
    "a task that does not exist": set_to("task", "text-divination"),
    "another task": set_to("task", "text-classification"),
    "a task of several graphs": set_to("task", "image-text-to-text"),
    "a mode that does not exist": set_to("mode", "stacked"),
    "inputs in place of a bank": set_to("mode", "inputs"),
    "folded in place of a bank": set_to("mode", "folded"),
    "an engine graph that is missing": set_to("decoder", True),
    "sites of a part that does not exist": site(part="encoder"),
    "members that do not exist": site(members=["model.layers.9.q_proj", "model.layers.9.k_proj"]),
    "a site without its slots": site(fields=["down"]),
    "a site with a slot that the graph lacks": site(fields=["down", "up", "scale", "shift"]),
    "a site of another width": site(in_features=31),
    "a format of the future": set_to("format_version", "2.0"),
    "another format": set_to("format", "adapterpack.pack"),
    "a target that leads out": set_to("target", "../../outside"),
    "code for a base": set_to("base/auto_map", {"AutoModel": "evil.Model"}),
    "a base with an escape in its name": set_to("base/name", "\x1b[2Jowned"),
    "a field of its own": set_to("trust_remote_code", True),
    "inputs of another type": set_to("io/inputs/0/dtype", "float32"),
    "an input of another name": set_to("io/inputs/0/name", "tokens"),
    "parity that is no object": set_to("parity/canary", []),
    "a quantization of texts": set_to("quantization", {"scheme": "int1"}),
}


@pytest.mark.parametrize("change", BANK.values(), ids=BANK.keys())
def test_a_bank(attacks: Attacks, bundle_of: Make, change: Change) -> None:
    """No row may be answered: not by another tenant, not by the base."""
    folder = copied(attacks, bundle_of("llama", "bank"), change)
    attacks.command(
        "run", folder, "--adapter", "alpha", "--prompt", "w1 w2", "--max-new-tokens", "2"
    ).refused()


HARMLESS: dict[str, Change] = {
    "more labels than the graph has": set_to("max_labels", 7),
    "a node of another name, with an escape": site(node="\x1b]2;owned\x07"),
    "a rank of an axis that no slot has": site(ranks={"down": 9}),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_no_answer_depends_on(attacks: Attacks, bundle_of: Make, change: Change) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"), change)
    attacks.command(
        "run", folder, "--adapter", "alpha", "--prompt", "w1 w2", "--max-new-tokens", "1"
    ).harmless("alpha | w1 w2 | w55")


MODES: dict[str, tuple[str, Change]] = {
    "a slot where there is no bank": ("inputs", set_to("adapters/0/slot", 1)),
    "slots where there is no bank": ("inputs", set_to("slots", 4)),
    "a rank where there is no bank": ("folded", set_to("max_rank", 4)),
    "a bank in place of inputs": ("inputs", set_to("mode", "bank")),
    "an adapter file not listed": ("inputs", without("files", "alpha.onnx_adapter")),
    "the adapter files exchanged": ("inputs", set_to("adapters/0/path", "adapters/beta")),
    "no adapter that is folded": ("folded", set_to("adapters", [])),
}


@pytest.mark.parametrize(("mode", "change"), MODES.values(), ids=MODES.keys())
def test_other_modes(attacks: Attacks, bundle_of: Make, mode: str, change: Change) -> None:
    folder = copied(attacks, bundle_of("llama", mode), change)
    attacks.command(
        "run", folder, "--adapter", "alpha", "--prompt", "w1 w2", "--max-new-tokens", "2"
    ).refused()


VALIDATED = (
    "slots of two tenants exchanged",
    "two tenants in one slot",
    "a bank larger than its graph",
    "the graph not listed",
    "an engine graph that is missing",
    "a site without its slots",
    "no file listed",
    "a file with an escape in its name",
)


@pytest.mark.parametrize("name", VALIDATED)
def test_validate_says_it(attacks: Attacks, bundle_of: Make, name: str) -> None:
    """The validator finds without a session what a session refuses."""
    folder = copied(attacks, bundle_of("llama", "bank"), BANK[name])
    attacks.command("validate", folder, "--full").refused()


BYTES: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "a key twice": b'{"format": "adapterpack.bundle", "format": "adapterpack.bundle"}',
    "UTF-16": '{"format": "adapterpack.bundle"}'.encode("utf-16"),
    "an escape": b'{"\\u001b[2J": 1}',
    "a number of 10,000 digits": b'{"slots": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"slots": NaN}',
    "cut": b'{"format": "adapterpack.bundle", "files": [',
}


@pytest.mark.parametrize("data", BYTES.values(), ids=BYTES.keys())
def test_bytes_that_are_no_manifest(attacks: Attacks, data: bytes) -> None:
    folder = attacks.work / "bundle"
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(data)
    attacks.command("run", folder, "--prompt", "w1").refused()


def test_a_manifest_that_is_a_pipe(attacks: Attacks) -> None:
    folder = attacks.work / "bundle"
    folder.mkdir()
    os.mkfifo(folder / FILE_NAME)
    attacks.command("run", folder, "--prompt", "w1").refused()


def test_a_manifest_of_a_gigabyte(attacks: Attacks) -> None:
    folder = attacks.work / "bundle"
    folder.mkdir()
    with (folder / FILE_NAME).open("wb") as file:
        file.truncate(1 << 30)
    attacks.command("run", folder, "--prompt", "w1").refused("too large")


def test_a_manifest_that_is_a_link(attacks: Attacks, bundle_of: Make) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"))
    (folder / FILE_NAME).rename(attacks.outside / FILE_NAME)
    (folder / FILE_NAME).symlink_to(attacks.outside / FILE_NAME)
    attacks.command("run", folder, "--prompt", "w1").refused()
