"""What is fuzzed: each target reads bytes, says by what error it refused them, and asserts what must hold of
those that it accepts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import foreign
import pyarrow.json
import safetensors
import seeds as s
from mutate import after_the_name, canonical_or_bytes, header_or_bytes, jinja, mutated_bytes, pieces_of_yaml
from seeds import FOLDER, METHODS, PEFT, SCRATCH, TOKENIZER

from adapterpack.bundle.manifest import parse_bundle
from adapterpack.composing import recipe
from adapterpack.converting.flatbuffer import read_parameters
from adapterpack.converting.gguf_file import read_gguf
from adapterpack.errors import AdapterpackError
from adapterpack.io import plain_yaml, strict_json
from adapterpack.io.safetensors import HeldFile
from adapterpack.library_errors import library_errors
from adapterpack.manifest import manifest as m
from adapterpack.pack.validate.checks.template import template_findings
from adapterpack.pack.validate.validation import examine, load, validate
from adapterpack.peft import layout
from adapterpack.runtime.text.tokenizer import Tokenizer
from adapterpack.training.data.limits import require_bounded

ACCEPTED = "accepted"


class Target(NamedTuple):
    """Good inputs, a change of one of them, and the reader: what it answers, or the error that it raised on
    purpose.
    """

    seeds: tuple[bytes, ...]
    mutate: Callable[[bytes, random.Random, bytes], bytes]
    read: Callable[[bytes], str]


def tensor_file(data: bytes) -> str:
    """Whatever we accept, the reference reader accepts, and it reads the same names, dtypes, shapes and
    bytes.
    """
    file = HeldFile(data, Path("x.safetensors"))
    theirs = {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(data)
    }
    assert theirs == {
        name: (info.dtype, info.shape, file.read(name).tobytes()) for name, info in file.tensors.items()
    }
    return ACCEPTED


def _unsealed(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != "integrity"}


def manifest(data: bytes) -> str:
    """Whatever we accept keeps its bytes, is what any JSON reader reads, and reads back as itself from its
    canonical form.
    """
    found = m.parse(data, "manifest")
    assert found.to_bytes() == data
    value = json.loads(data)
    assert strict_json.canonical(value) == data
    if value["format_version"] == m.FORMAT_VERSION:
        # -1 for -1.0 is the same number, and another seal
        assert _unsealed(value) == _unsealed(found.to_json())
        assert m.parse(strict_json.canonical(found.to_json()), "again") == found
    return ACCEPTED


def pack(data: bytes) -> str:
    """A whole pack with a forged manifest, validated and loaded: both agree, and a pack that is valid says
    what its sites are.
    """
    return _looked_at(FOLDER, data)


def method(data: bytes) -> str:
    """The same of a pack of any method; the first line says which."""
    name, _, forged = data.partition(b"\n")
    folder = METHODS / name.decode("ascii", "replace")
    return (
        _looked_at(folder, forged)
        if name.replace(b"_", b"").isalnum() and folder.is_dir()
        else "no such method"
    )


def _looked_at(folder: Path, forged: bytes) -> str:
    (folder / m.FILE_NAME).write_bytes(forged)
    report = validate(folder, full=True)
    try:
        found = load(folder)
    except AdapterpackError:
        assert not report.valid
        return next(
            f"{finding.rule} {finding.message}" for finding in report.findings if finding.severity == "error"
        )
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
        return next(
            f"{finding.rule} {finding.message}" for finding in report.findings if finding.severity == "error"
        )
    m.parse(found.manifest.to_bytes(), "imported")
    return ACCEPTED


def foreign_settings(data: bytes) -> str:
    """An adapter of another tool with forged settings; the first line says which: whatever is read is a
    pack.
    """
    name, _, forged = data.partition(b"\n")
    one = s.FOREIGN.get(name.decode("ascii", "replace"))
    if one is None:
        return "no such adapter"
    one.put(forged)
    foreign.read(one.path)
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


def bundle(data: bytes) -> str:
    """A bundle's manifest: whatever we accept is what any JSON reader reads."""
    parse_bundle(data, "bundle")
    json.loads(data)
    return ACCEPTED


def yaml(data: bytes) -> str:
    """YAML of any kind: whatever we accept is plain data, which JSON can hold once its keys are text."""
    json.dumps(plain_yaml.loads(data, "yaml"))
    return ACCEPTED


def recipe_file(data: bytes) -> str:
    """A recipe: whatever we accept reads back as itself."""
    file = SCRATCH / "x.recipe.json"
    file.write_bytes(data)
    read = recipe.read(file)
    file.write_bytes(strict_json.canonical(read.to_json()))
    assert recipe.read(file) == read
    return ACCEPTED


def tokenizer(data: bytes) -> str:
    """A forged tokenizer, which makes ids of texts, and texts of ids."""
    (TOKENIZER / "tokenizer.json").write_bytes(data)
    core = Tokenizer(TOKENIZER)
    core.decode(core.encode("w1 ab  W2\u00e9 " * 8))
    core.pair("w1", "ab")
    return ACCEPTED


def tokenizer_config(data: bytes) -> str:
    """What is said next to a tokenizer."""
    (TOKENIZER / "tokenizer.json").write_bytes(s.TOKENIZERS[0])
    (TOKENIZER / "tokenizer_config.json").write_bytes(data)
    core = Tokenizer(TOKENIZER)
    _ = core.template, core.mask_id, core.pad_id, core.eos_ids
    core.prompt("w1")
    return ACCEPTED


def rows(data: bytes) -> str:
    """Training data: whatever is let through, the library that reads it reads or refuses, in this process."""
    (SCRATCH / "x.jsonl").write_bytes(data)
    require_bounded(SCRATCH / "x.jsonl")
    with library_errors("datasets", "the data cannot be read"):
        pyarrow.json.read_json(SCRATCH / "x.jsonl", read_options=pyarrow.json.ReadOptions(use_threads=False))
    return ACCEPTED


TARGETS = {
    "tensor_file": Target(s.tensor_files(), header_or_bytes, tensor_file),
    "manifest": Target(s.MANIFESTS, canonical_or_bytes, manifest),
    "pack": Target((s.MANIFEST,), canonical_or_bytes, pack),
    "method": Target(s.packs_of_methods(), after_the_name, method),
    "foreign": Target(s.adapters_of_others(), after_the_name, foreign_settings),
    "template": Target(s.TEMPLATES, jinja, template),
    "peft": Target((s.CONFIG,), canonical_or_bytes, peft),
    "gguf_file": Target((s.gguf_file(),), mutated_bytes, gguf_file),
    "bundle": Target((s.BUNDLE,), canonical_or_bytes, bundle),
    "yaml": Target(s.training_files(), pieces_of_yaml, yaml),
    "recipe": Target(s.recipes(), canonical_or_bytes, recipe_file),
    "tokenizer": Target(s.TOKENIZERS, canonical_or_bytes, tokenizer),
    "tokenizer_config": Target((s.TOKENIZER_CONFIG,), canonical_or_bytes, tokenizer_config),
    "rows": Target(s.ROWS, pieces_of_yaml, rows),
    "onnx_adapter": Target((s.onnx_adapter(),), mutated_bytes, onnx_adapter),
}


def answer(target: Target, data: bytes) -> str:
    """What the target says of the data; anything but a named error or an answer is for the caller."""
    try:
        return target.read(data)
    except AdapterpackError as error:
        return error.what
