"""What is fuzzed: each target reads bytes, says by what error it refused them, and asserts what must hold of those that it accepts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import seeds as s
from mutate import after_the_name, canonical_or_bytes, header_or_bytes, jinja, mutated_bytes
from seeds import FOLDER, METHODS, PEFT, SCRATCH

from adapterpack.converting.flatbuffer import read_parameters
from adapterpack.converting.gguf_file import read_gguf
from adapterpack.errors import AdapterpackError
from adapterpack.io import strict_json
from adapterpack.io.safetensors import HeldFile
from adapterpack.manifest import manifest as m
from adapterpack.pack.validate.checks.template import template_findings
from adapterpack.pack.validate.validation import examine, load, validate
from adapterpack.peft import layout

ACCEPTED = "accepted"


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
    """A whole pack with a forged manifest, validated and loaded: both agree, and a pack that is valid says what its sites are."""
    return _looked_at(FOLDER, data)


def method(data: bytes) -> str:
    """The same of a pack of any method; the first line says which."""
    name, _, forged = data.partition(b"\n")
    folder = METHODS / name.decode("ascii", "replace")
    return _looked_at(folder, forged) if name.replace(b"_", b"").isalnum() and folder.is_dir() else "no such method"


def _looked_at(folder: Path, forged: bytes) -> str:
    (folder / m.FILE_NAME).write_bytes(forged)
    report = validate(folder, full=True)
    try:
        found = load(folder)
    except AdapterpackError:
        assert not report.valid
        return next(f"{finding.rule} {finding.message}" for finding in report.findings if finding.severity == "error")
    assert report.valid
    assert found.id == report.id
    assert list(found.adapters()) is not None
    return ACCEPTED


def template(data: bytes) -> str:
    """A chat template of any kind: findings, never an error."""
    for finding in template_findings(data, "template"):
        if finding.severity == "error":
            return f"{finding.rule} {finding.message}"
    return ACCEPTED


def peft(data: bytes) -> str:
    """A PEFT folder with a forged configuration: whatever is imported is a valid pack once it is written."""
    (PEFT / layout.CONFIG).write_bytes(data)
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


TARGETS = {
    "tensor_file": Target(s.tensor_files(), header_or_bytes, tensor_file),
    "manifest": Target(s.MANIFESTS, canonical_or_bytes, manifest),
    "pack": Target((s.MANIFEST,), canonical_or_bytes, pack),
    "method": Target(s.packs_of_methods(), after_the_name, method),
    "template": Target(s.TEMPLATES, jinja, template),
    "peft": Target((s.CONFIG,), canonical_or_bytes, peft),
    "gguf_file": Target((s.gguf_file(),), mutated_bytes, gguf_file),
    "onnx_adapter": Target((s.onnx_adapter(),), mutated_bytes, onnx_adapter),
}


def answer(target: Target, data: bytes) -> str:
    """What the target says of the data; anything but a named error or an answer is for the caller."""
    try:
        return target.read(data)
    except AdapterpackError as error:
        return error.what
