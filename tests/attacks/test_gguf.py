"""Attacks by GGUF files: headers that cost more than they hold, and what is no file."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from attack import Attacks

from adapterpack.base.gguf.header import key_text, text


def gguf(path: Path, *values: bytes, tensors: int = 0, keys: int | None = None, end: bytes = b"") -> Path:
    """A file with these keys and values in its header."""
    path.write_bytes(
        struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(values) if keys is None else keys)
        + b"".join(values)
        + end
    )
    return path


def array(key: str, kind: int, items: int, data: bytes) -> bytes:
    """A key with an array of a type, as a header stores them."""
    return text(key) + struct.pack("<IIQ", 9, kind, items) + data


LLAMA = key_text("general.architecture", "llama")
HEADERS: dict[str, tuple[tuple[bytes, ...], dict[str, int]]] = {
    "an array of 64 MB": (
        (LLAMA, *(array(f"a{number}", 11, 1 << 20, bytes(8 << 20)) for number in range(8))),
        {},
    ),
    "arrays of bytes": (
        (LLAMA, *(array(f"a{number}", 0, 1 << 20, bytes(1 << 20)) for number in range(64))),
        {},
    ),
    "a million empty texts": ((LLAMA, array("a", 8, 1 << 20, bytes(8 << 20))), {}),
    "many million empty texts": (
        (LLAMA, *(array(f"a{number}", 8, 1 << 20, bytes(8 << 20)) for number in range(8))),
        {},
    ),
    "an array of arrays": ((LLAMA, array("a", 9, 4, struct.pack("<IQ", 9, 1) * 4)), {}),
    "an array of nothing known": ((LLAMA, array("a", 99, 1 << 20, bytes(64))), {}),
    "an array longer than the file": ((LLAMA, array("a", 8, 1 << 20, b"")), {}),
    "an array of 2^63": ((LLAMA, array("a", 0, 1 << 63, b"")), {}),
    "texts of a megabyte": ((LLAMA, *(key_text(f"a{number}", "x" * (1 << 20)) for number in range(64))), {}),
    "a text of 2^63": ((LLAMA, text("a") + struct.pack("<IQ", 8, 1 << 63)), {}),
    "keys that are not there": ((LLAMA,), {"keys": 4096}),
    "2^60 keys": ((LLAMA,), {"keys": 1 << 60}),
    "tensors that are not there": ((LLAMA,), {"tensors": 50_000}),
    "2^60 tensors": ((LLAMA,), {"tensors": 1 << 60}),
    "an alignment of 2^31": ((LLAMA, text("general.alignment") + struct.pack("<II", 4, 1 << 31)), {}),
    "an architecture in escapes": ((key_text("general.architecture", "\x1b[2J\u202eama"),), {}),
    "an architecture that is a number": ((text("general.architecture") + struct.pack("<IQ", 10, 7),), {}),
    "an architecture that is a list": ((array("general.architecture", 8, 1, text("llama")),), {}),
    "a type that is a list": ((LLAMA, array("general.type", 8, 1, text("model"))), {}),
}


@pytest.mark.parametrize(("values", "counts"), HEADERS.values(), ids=list(HEADERS))
def test_headers(values: tuple[bytes, ...], counts: dict[str, int], attacks: Attacks) -> None:
    gguf(attacks.work / "model.gguf", *values, **counts)  # type: ignore[arg-type]
    attacks.command("inspect", "model.gguf").held()
    attacks.command("merge", "model.gguf", "pack", "-o", "out.gguf").refused(absent=attacks.work / "out.gguf")


@pytest.mark.parametrize("command", ["inspect", "validate", "convert --to pack -o out", "merge -o out"])
@pytest.mark.parametrize(
    "name", ["model.gguf", "model.onnx", "model.safetensors", "model.onnx_adapter", "model"]
)
def test_pipes_where_a_file_should_be(name: str, command: str, attacks: Attacks) -> None:
    os.mkfifo(attacks.work / name)
    action, *options = command.split()
    attacks.command(action, name, *(["pack"] if action == "merge" else []), *options).refused(
        absent=attacks.work / "out"
    )
