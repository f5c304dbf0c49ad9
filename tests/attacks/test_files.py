"""Attacks on files that are written and read one by one: outputs in the place of something else, full disks,
adapters of other tools.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack import Attacks

from adapterpack.cli.main import main

REPORTS = {
    "--sarif": "validate pack --sarif {}",
    "--html": "audit pack --html {}",
    "-o of convert": "convert pack --to gguf --base causal -o {}",
    "-o of merge": "merge causal pack -o {}",
    "-o of export": "export causal pack -o {}",
    "-o of measure": "measure causal pack --data rows.jsonl -o {}",
}
TAKEN: dict[str, Callable[[Path, Attacks], object]] = {
    "a file of the user's": lambda path, attacks: path.write_text("my own"),
    "a link to somebody's file": lambda path, attacks: path.symlink_to(attacks.outside / "secret.txt"),
    "a link to nothing": lambda path, attacks: path.symlink_to(attacks.outside / "new"),
    "a folder": lambda path, attacks: path.mkdir(),
    "a pipe": lambda path, attacks: os.mkfifo(path),
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=list(TAKEN))
@pytest.mark.parametrize("command", REPORTS.values(), ids=list(REPORTS))
def test_what_is_in_the_place_of_an_output_stays(
    command: str, take: Callable[[Path, Attacks], object], base: Path, attacks: Attacks
) -> None:
    out = attacks.work / "out"
    take(out, attacks)
    before = out.lstat()
    attacks.command(*command.format("out").split()).refused("out")
    assert (out.lstat().st_ino, out.lstat().st_mode, out.lstat().st_size) == (
        before.st_ino,
        before.st_mode,
        before.st_size,
    )


def test_a_report_is_renewed(base: Path, attacks: Attacks) -> None:
    for _ in range(2):
        attacks.command("validate", "pack", "--sarif", "out.sarif").harmless()
        attacks.command("audit", "pack", "--html", "out.html").harmless()


def limited(bytes_: int, arguments: list[str]) -> int:
    """The command line where no file may be longer than that, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))
    main(arguments, prog_name="adapterpack")
    return 0


WRITERS = {
    "gguf": "convert pack --to gguf --base causal -o out",
    "kohya": "convert pack --to kohya -o out",
    "diffusers": "convert pack --to diffusers -o out",
    "onnx_adapter": "convert pack --to onnx_adapter -o out",
    "peft": "convert pack --to peft -o out",
    "merge": "merge causal pack -o out",
    "export": "export causal pack -o out",
    "extract": "extract tuned causal -o out",
    "quantize": "quantize pack -o out",
    "html": "audit pack --html out",
    "sarif": "validate pack --sarif out",
}


@pytest.mark.parametrize("command", WRITERS.values(), ids=list(WRITERS))
def test_full_disks(command: str, base: Path, attacks: Attacks) -> None:
    attacks.call(limited, 300, command.split()).refused("out", absent=attacks.work / "out")
    assert not [path for path in attacks.work.iterdir() if path.name.startswith(".out")]


def header(tensors: Any, data: bytes = b"") -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: Any = (2, 2), dtype: Any = "F32", offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOREIGN: dict[str, tuple[str, bytes]] = {
    "a header that is a list": ("a.safetensors", header([1])),
    "a header of 2^60": ("a.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    "a header of spaces": ("a.safetensors", header(b"{" + b" " * (15 << 20) + b"}")),
    "a header of a million keys": (
        "a.safetensors",
        header(b"{" + b",".join(b'"%d":1' % n for n in range(1_000_000)) + b"}"),
    ),
    "a header nested deep": ("a.safetensors", header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    "a number of 10^6 digits": ("a.safetensors", header(b'{"a":' + b"9" * 10**6 + b"}")),
    "a tensor that is a number": ("a.safetensors", header({"lora_unet_a.lora_down.weight": 5})),
    "a shape in words": (
        "a.safetensors",
        header({"lora_unet_a.lora_down.weight": tensor(["two", 2])}, bytes(16)),
    ),
    "a shape of 2^62": (
        "a.safetensors",
        header({"lora_unet_a.lora_down.weight": tensor([1 << 62, 4])}, bytes(16)),
    ),
    "a shape below none": (
        "a.safetensors",
        header({"lora_unet_a.lora_down.weight": tensor([-2, -2])}, bytes(16)),
    ),
    "a shape of truth": (
        "a.safetensors",
        header({"lora_unet_a.lora_down.weight": tensor([True, 4])}, bytes(16)),
    ),
    "offsets beyond": (
        "a.safetensors",
        header({"lora_unet_a.lora_down.weight": tensor(offsets=[0, 1 << 60])}, bytes(16)),
    ),
    "metadata that is a list": (
        "a.safetensors",
        header({"__metadata__": [1], "lora_unet_a.lora_down.weight": tensor()}, bytes(16)),
    ),
    "a name in escapes": (
        "a.safetensors",
        header({"lora_unet_\x1b[2J.lora_down.weight": tensor()}, bytes(16)),
    ),
    "one half of a pair": ("a.safetensors", header({"lora_unet_a.lora_down.weight": tensor()}, bytes(16))),
    "alpha that is a matrix": (
        "a.safetensors",
        header(
            {
                "lora_unet_a.lora_down.weight": tensor(),
                "lora_unet_a.lora_up.weight": tensor(offsets=[16, 32]),
                "lora_unet_a.alpha": tensor(offsets=[32, 48]),
            },
            bytes(48),
        ),
    ),
    "factors of integers": (
        "a.safetensors",
        header(
            {
                "lora_unet_a.lora_down.weight": tensor(dtype="I32"),
                "lora_unet_a.lora_up.weight": tensor(dtype="I32", offsets=[16, 32]),
            },
            bytes(32),
        ),
    ),
    "factors of one dimension": (
        "a.safetensors",
        header(
            {"unet.a.lora_A.weight": tensor([4]), "unet.a.lora_B.weight": tensor([4], offsets=[16, 32])},
            bytes(32),
        ),
    ),
    "factors without a number": (
        "a.safetensors",
        header(
            {
                "unet.a.lora_A.weight": tensor([0, 4], offsets=[0, 0]),
                "unet.a.lora_B.weight": tensor([4, 0], offsets=[0, 0]),
            }
        ),
    ),
    "a pickle": (
        "a.bin",
        b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94",
    ),
    "a zip": ("a.pt", b"PK\x03\x04" + bytes(100)),
    "nothing": ("a.safetensors", b""),
    "adapter: eight bytes": ("a.onnx_adapter", b"\x08\x00\x00\x00TORT"),
    "adapter: an offset beyond": ("a.onnx_adapter", b"\xff\xff\xff\xffTORT" + bytes(64)),
    "adapter: an offset to itself": ("a.onnx_adapter", b"\x00\x00\x00\x00TORT" + bytes(64)),
    "adapter: cut": ("a.onnx_adapter", b"\x10\x00\x00\x00TORT" + bytes(9)),
    "adapter: noise": ("a.onnx_adapter", b"\x18\x00\x00\x00TORT" + np.random.default_rng(0).bytes(4000)),
    "adapter: vectors of 2^32": ("a.onnx_adapter", b"\x18\x00\x00\x00TORT" + b"\xff" * 4000),
}


@pytest.mark.parametrize(("name", "content"), FOREIGN.values(), ids=list(FOREIGN))
def test_adapters_of_other_tools(name: str, content: bytes, attacks: Attacks) -> None:
    (attacks.work / name).write_bytes(content)
    attacks.command("convert", name, "--to", "pack", "-o", "out").refused(absent=attacks.work / "out")
