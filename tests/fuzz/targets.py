"""What is fuzzed: each target reads bytes, says by what error it refused them, and asserts what must hold of those that it accepts."""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
import onnxruntime as ort
import safetensors

from adapterpack.convert.flatbuffer import read_parameters
from adapterpack.convert.gguf_file import read_gguf
from adapterpack.errors import AdapterpackError
from adapterpack.pack import manifest as m
from adapterpack.pack import peft_layout, strict_json
from adapterpack.pack.files import TENSORS
from adapterpack.pack.safetensors import HeldFile, write
from adapterpack.pack.validate import examine

sys.path.insert(0, str(Path(__file__).parent.parent / "packs"))
import make_bad as bad
from mutate import mutated_bytes, mutated_json

GOLDEN = Path(__file__).parent.parent / "golden"
ACCEPTED = "accepted"
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-"))


class Target(NamedTuple):
    """Good inputs, a change of one of them, and the reader: what it answers, or the error that it raised on purpose."""

    seeds: tuple[bytes, ...]
    mutate: Callable[[bytes, random.Random, bytes], bytes]
    read: Callable[[bytes], str]


def tensor_file(data: bytes) -> str:
    """Whatever we accept, the reference reader accepts, and it reads the same names, dtypes, shapes and bytes."""
    file = HeldFile(data, Path("x.safetensors"))
    theirs = {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in safetensors.deserialize(data)}
    assert theirs == {name: (info.dtype, info.shape, file.read(name).tobytes()) for name, info in file.tensors.items()}
    return ACCEPTED


def manifest(data: bytes) -> str:
    """Whatever we accept keeps its bytes, is what any JSON reader reads, and reads back as itself from its canonical form."""
    found = m.parse(data, "manifest")
    assert found.to_bytes() == data
    value = json.loads(data)
    assert strict_json.canonical(value) == data
    if value["format_version"] == m.FORMAT_VERSION:
        assert value == found.to_json()
        assert m.parse(strict_json.canonical(found.to_json()), "again") == found
    return ACCEPTED


def pack(data: bytes) -> str:
    """A whole pack with a forged manifest: validation reports, and a pack that is valid can be written and read again as itself."""
    (FOLDER / m.FILE_NAME).write_bytes(data)
    report, found = examine(FOLDER)
    if not report.valid:
        return next(f"{finding.rule} {finding.message}" for finding in report.findings if finding.severity == "error")
    assert found is not None
    assert found.id == report.id
    assert list(found.adapters()) is not None
    return ACCEPTED


def peft(data: bytes) -> str:
    """A PEFT folder with a forged configuration: whatever is imported is a valid pack once it is written."""
    (PEFT / peft_layout.CONFIG).write_bytes(data)
    report, found = examine(PEFT)
    if found is None:
        return next(f"{finding.rule} {finding.message}" for finding in report.findings if finding.severity == "error")
    m.parse(found.manifest.to_bytes(), "imported")
    return ACCEPTED


def gguf_file(data: bytes) -> str:
    """Another tool's file: arrays of the shapes that were checked."""
    (SCRATCH / "x.gguf").write_bytes(data)
    read_gguf(SCRATCH / "x.gguf")
    return ACCEPTED


def onnx_adapter(data: bytes) -> str:
    """As for GGUF."""
    (SCRATCH / "x.onnx_adapter").write_bytes(data)
    read_parameters(SCRATCH / "x.onnx_adapter")
    return ACCEPTED


def header_or_bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A safetensors file with a forged header of the right length, or any bytes changed."""
    size = int.from_bytes(data[:8], "little")
    try:
        value = json.loads(data[8 : 8 + size]) if rng.random() < 0.6 else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return mutated_bytes(data, rng, other)
    text = json.dumps(mutated_json(value, rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
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
    return (json.dumps(mutated_json(value, rng), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _tensor_files() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {"a.weight": rng.random((2, 3), np.float32), "b": rng.random(5).astype(np.float16), "c": np.array(3, np.int64)},
        {"w": rng.random((3, 2)).astype(ml_dtypes.bfloat16), "e": np.zeros((0, 4), np.uint8), "mask": np.array([True, False])},
        {"q": rng.random(4).astype(ml_dtypes.float8_e4m3fn), "r": rng.random(4).astype(ml_dtypes.float8_e5m2)},
        {},
    ]
    found = []
    for tensors, metadata in zip(kinds, ({"format": "pt"}, None, {"\u00e9": "\u4e2d"}, {"a": "b"}), strict=True):
        buffer = io.BytesIO()
        write(buffer, tensors, metadata)
        found.append(buffer.getvalue())
    return (*found, (GOLDEN / "pack-1.1" / TENSORS).read_bytes())


def _gguf() -> bytes:
    writer = gguf.GGUFWriter(SCRATCH / "seed.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_array("words", ["a", "b"])
    for name, shape in (("lora_a", (2, 32)), ("lora_b", (16, 2))):
        writer.add_tensor(f"blk.0.attn_v.weight.{name}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (SCRATCH / "seed.gguf").read_bytes()


def _onnx_adapter() -> bytes:
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {"a.down": np.ones((3, 2), np.float32), "a.up": np.ones((2, 5), np.float16), "b.head": np.ones((0, 4), np.float32)}
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    adapter.export_adapter(str(SCRATCH / "seed.onnx_adapter"))
    return (SCRATCH / "seed.onnx_adapter").read_bytes()


FOLDER, PEFT = SCRATCH / "pack", SCRATCH / "peft"
for _folder in (FOLDER, PEFT):
    bad.good(_folder)
(PEFT / m.FILE_NAME).unlink()
_MANIFEST, _CONFIG = (FOLDER / m.FILE_NAME).read_bytes(), (PEFT / peft_layout.CONFIG).read_bytes()
_VERSIONS = ("pack-1.0", "pack-1.1", "pack-1.2", "pack-1.3", "pack-1.3-canary", "pack-1.4-canary", "pack-1.4-composition")
_MANIFESTS = (_MANIFEST, *((GOLDEN / version / m.FILE_NAME).read_bytes() for version in _VERSIONS))

TARGETS = {
    "tensor_file": Target(_tensor_files(), header_or_bytes, tensor_file),
    "manifest": Target(_MANIFESTS, canonical_or_bytes, manifest),
    "pack": Target((_MANIFEST,), canonical_or_bytes, pack),
    "peft": Target((_CONFIG,), canonical_or_bytes, peft),
    "gguf_file": Target((_gguf(),), mutated_bytes, gguf_file),
    "onnx_adapter": Target((_onnx_adapter(),), mutated_bytes, onnx_adapter),
}


def answer(target: Target, data: bytes) -> str:
    """What the target says of the data; anything but a named error or an answer is for the caller."""
    try:
        return target.read(data)
    except AdapterpackError as error:
        return error.what
