"""Packs that are too large to hold: read site by site, the same as ever, and only what was checked; and the
threads that work on sites.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from rule_laws import MIXED, made
from threadpoolctl import threadpool_info

import adapterpack
from adapterpack.errors import FormatError
from adapterpack.io import threads
from adapterpack.io.streamed_tensors import Streamed, Unread
from adapterpack.pack import from_peft
from adapterpack.pack.pack import Pack
from adapterpack.pack.validate import validation
from adapterpack.pack.validate.checks import folder

pytestmark = pytest.mark.fast


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor file is large."""
    for module in (from_peft, validation, folder):
        monkeypatch.setattr(module, "LARGE", 8)


def written(tmp_path: Path, kind: str) -> list[Path]:
    """Two packs of other ranks, as folders of ours or of PEFT's."""
    paths = []
    for seed, cfg in enumerate(MIXED[:2]):
        path = made(seed + 1, cfg).write(tmp_path / f"pack{seed}").path
        assert path is not None
        if kind == "peft":
            bare = tmp_path / f"peft{seed}"
            bare.mkdir()
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(path / name, bare / name)
            path = bare
        paths.append(path)
    return paths


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.parametrize("rule", ["linear", "ties", "iso_c", "lora_lego"])
def test_a_large_pack_is_the_same_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rule: str
) -> None:
    """Held or read piece by piece: the same identity, the same tensors, and the same composition to the
    bit.
    """
    paths = written(tmp_path, kind)
    held = [adapterpack.load(path) for path in paths]
    for module in (from_peft, validation, folder):
        monkeypatch.setattr(module, "LARGE", 8)
    read = [adapterpack.load(path) for path in paths]
    for one, two in zip(held, read, strict=True):
        assert not isinstance(one.tensors, Streamed)
        assert isinstance(two.tensors, Streamed)
        assert all(isinstance(adapter.params, Unread) for adapter in two.adapters())
        assert one.id == two.id
        assert one.tensors.keys() == two.tensors.keys()
        assert all(np.array_equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert adapterpack.compose(held, rule=rule, rank=4).id == adapterpack.compose(read, rule=rule, rank=4).id
    again = read[0].write(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        paths[0] / "adapter_model.safetensors"
    ).read_bytes()
    assert again.id == read[0].id


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.usefixtures("large")
def test_what_is_used_is_what_was_checked(tmp_path: Path, kind: str) -> None:
    """A byte that changes after the pack was loaded is found before it is used."""
    first, second = written(tmp_path, kind)
    packs = [adapterpack.load(first), adapterpack.load(second)]
    data = bytearray((first / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (first / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="changed while it was in use"):
        adapterpack.compose(packs, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("large")
def test_a_flipped_byte_is_found_when_a_large_pack_is_loaded(tmp_path: Path) -> None:
    """The digests of a large pack are checked as those of a small one are."""
    path = written(tmp_path, "ours")[0]
    data = bytearray((path / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match=r"AP105|AP303|sha256"):
        adapterpack.load(path)


@pytest.mark.usefixtures("large")
def test_a_tensor_that_the_system_gives_in_several_pieces_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux gives at most 2,147,479,552 bytes a call; here every call gives at most 100, for real, so that no
    test needs gigabytes.
    """
    path = written(tmp_path, "ours")[0]
    pack = adapterpack.load(path)
    wanted = {name: value.copy() for name, value in pack.tensors.items()}
    assert max(value.nbytes for value in wanted.values()) > 100
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda file, count, offset: pread(file, min(count, 100), offset))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:100]], offset))
    read = pack.tensors
    assert isinstance(read, Streamed)
    for name, value in wanted.items():
        np.testing.assert_array_equal(read[name], value)
        assert not read[name].flags.writeable


@pytest.mark.usefixtures("large")
def test_a_file_that_was_cut_is_found_before_it_is_used(tmp_path: Path) -> None:
    """A tensor that ends early is not filled up with what lay in memory, and reading it ends."""
    path = written(tmp_path, "ours")[0]
    pack, file = adapterpack.load(path), path / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(FormatError, match="changed while it was in use"):
        [value.sum() for value in pack.tensors.values()]


# Threads.


def blas() -> list[int]:
    """The threads of every BLAS in the process."""
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def test_the_blas_has_one_thread_for_as_long_as_anyone_composes() -> None:
    """Blocks may overlap; the last one to end, in whatever thread, gives back what there was."""
    before = blas()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with threads.one_thread_each():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with threads.one_thread_each():
        thread.start()
        assert inside.wait(30)
    assert set(blas()) == {1}
    leave.set()
    thread.join()
    assert blas() == before


SETTINGS = """
import gc, os, sys
from click.testing import CliRunner
from adapterpack.cli.main import main

def settings():
    return gc.get_threshold(), gc.get_freeze_count(), sys.getswitchinterval(), {k: v for k, v in os.environ.items() if "THREADS" in k}

class Watch:
    seen = []
    def find_spec(self, *_):
        self.seen.append(settings())

before = settings()
sys.meta_path.insert(0, Watch())
run = CliRunner().invoke(main, ["compose", *sys.argv[1:]])
assert run.exit_code == 0, run.output
assert len(Watch.seen) > 10, "the command imports what it needs"
for after in (*Watch.seen, settings()):
    assert after == before, after
"""


def test_a_command_leaves_the_settings_of_the_process_alone(tmp_path: Path) -> None:
    """Garbage collector, switch interval and the variables that a BLAS reads, which every process started
    meanwhile would inherit: at each import of a command, and after it.
    """
    packs = [str(made(seed).write(tmp_path / f"{seed}").path) for seed in (1, 2)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS, *packs, "-o", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_work_is_done_in_order_and_its_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results come in the order of the items, nested work stays in its thread, settings of numpy go along,
    and an error ends it.
    """
    monkeypatch.setattr(threads, "workers", lambda: 3)

    def work(value: int) -> tuple[int, bool]:
        inner = list(threads.in_order(lambda _: threading.get_ident(), range(3)))
        with np.errstate():
            return value, set(inner) == {threading.get_ident()} and np.geterr()["over"] == "raise"

    with np.errstate(over="raise"):
        assert list(threads.in_order(work, range(40))) == [(value, True) for value in range(40)]
    with pytest.raises(ZeroDivisionError):
        list(threads.in_order(lambda value: 1 // (value - 5), range(40)))


def test_a_pack_in_memory_is_not_read_again() -> None:
    """Packs that are small stay what they were: arrays."""
    pack: Pack = made(1)
    assert all(isinstance(adapter.params, dict) for adapter in pack.adapters())
