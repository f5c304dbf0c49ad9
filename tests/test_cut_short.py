"""A base that is cut short while it is read: an error that names the file, whoever reads it; the system would
end the process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_merge import write_base

from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import StorageError
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

WIDE, SITES = 256, ("a", "b")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write_base(
        tmp_path / "base", {f"{path}.weight": rng.random((WIDE, WIDE), np.float32) for path in SITES}
    )


def pack(name: str, seed: int) -> Pack:
    rng = np.random.default_rng(seed)
    sites = {
        Site(path, WIDE, WIDE): (
            LoRA(r=2, alpha=2),
            {"lora_A": rng.random((2, WIDE), np.float32), "lora_B": rng.random((WIDE, 2), np.float32)},
        )
        for path in SITES
    }
    return build(name, get("lora"), sites, task=m.PackTask("feature-extraction"), base=m.Base("base"))


def test_a_tensor_is_read_from_the_file_that_was_opened(base: Path) -> None:
    """Cut short, or another one in its place: an error, where a mapped file would end the process or give the
    older numbers.
    """
    file = base / "model.safetensors"
    opened, data = Checkpoint(base), file.read_bytes()
    assert opened.read("b.weight").flags.writeable is False
    file.write_bytes(data[:4096])
    with pytest.raises(StorageError, match="changed while it was in use"):
        opened.read("b.weight")
    file.write_bytes(data)
    opened = Checkpoint(base)
    file.rename(base / "older")
    file.write_bytes(data)
    with pytest.raises(StorageError, match="changed while it was in use"):
        opened.read("b.weight")


AUDIT = """
import os, sys
import adapterpack
from adapterpack.errors import StorageError
base, *packs = sys.argv[1:]
def cut(done, total):
    os.truncate(base + "/model.safetensors", 4096)
try:
    adapterpack.audit(packs, base=base, exact=True, progress=cut)
except StorageError as error:
    sys.exit("changed while" not in str(error))
"""

COMMAND = """
import mmap, os, sys
from adapterpack.cli.main import main
from adapterpack.exporting.frontends.base import FRONTENDS, Frontend
def build(source):  # as libraries read a checkpoint
    file = open(source.folder / "model.safetensors", "r+b")
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.truncate(4096)
    return data[len(data) - 1]
FRONTENDS.register(Frontend("mapping", lambda source: True, build, rank=1))
main()
"""


def _run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


def test_an_audit_of_a_base_that_is_cut_short_is_an_error(base: Path, tmp_path: Path) -> None:
    packs = [pack(name, seed).write(tmp_path / name).path for seed, name in enumerate(("one", "two"))]
    done = _run(AUDIT, base, *packs)
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.long
def test_a_command_whose_libraries_read_a_file_that_is_cut_short_says_so(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """With the file's name, exit code 1, and an object for programs."""
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    done = _run(COMMAND, "export", base, "-o", tmp_path / "out", "--frontend", "mapping", "--json")
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert json.loads(done.stdout)["error"]["where"] == str(base / "model.safetensors")
    assert "was cut short while it was in use" in done.stderr
    assert not (tmp_path / "out").exists()
