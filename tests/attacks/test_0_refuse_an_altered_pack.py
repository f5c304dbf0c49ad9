"""What a stranger's artifact meets: read this first. Everything that is wrong is a named error with a remedy, found
before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

import adapterpack
from adapterpack.errors import FormatError


def test_one_altered_byte_is_found(pack_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    """The manifest has the digest of every file and of every tensor."""
    pack = copytree(pack_of("llama", "alpha"), tmp_path / "pack")
    data = bytearray((pack / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (pack / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="AP2"):
        adapterpack.load(pack)
    assert adapterpack.validate(pack).state == "invalid"


def test_what_would_run_code_is_refused(pack_of: Callable[[str, str], Path], tmp_path: Path) -> None:
    """A file that a pack does not list is an error, whatever it is called; so is a key that names code."""
    pack = copytree(pack_of("llama", "alpha"), tmp_path / "pack")
    (pack / "modeling_tickets.py").write_text("print('it runs')")
    report = adapterpack.validate(pack)
    assert not report.valid and "modeling_tickets.py" in json.dumps(report.to_json())
