"""Merge as a process: killed and resumed, shared out, rounded by chance, on a device, taken back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_merge import digests, lone_pack, lora_pack, save_llama, tensors, write_base

import adapterpack
from adapterpack.adapter_methods import Site
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.base.rounding import stochastic, words
from adapterpack.errors import (
    BaseMismatch,
    ConfigError,
    OutputExists,
    ProviderError,
    StorageError,
    Unsupported,
)
from adapterpack.io import safetensors as st
from adapterpack.io.buffers import Scratch
from adapterpack.io.byte_ranges import open_descriptor, reserve
from adapterpack.manifest import manifest as m
from adapterpack.merging.checkpoint.base_model import MergeBase
from adapterpack.merging.checkpoint.jobs import JobShare, jobs, jobs_of
from adapterpack.merging.checkpoint.journal import FOLDER, PAUSE, Journal, read_finished_jobs

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of five shards, of weights that are folded and others that are copied: 31 MB."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    folder.mkdir()
    rng, where = np.random.default_rng(0), {}
    for shard in range(5):
        file = f"model-{shard + 1:05}-of-00005.safetensors"
        names = [f"{shard}.{number}.x_proj.weight" for number in range(3)] + [f"{shard}.other"]
        values = {
            name: rng.standard_normal((768, 1024), np.float32).astype(ml_dtypes.bfloat16) for name in names
        }
        st.write(folder / file, values, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def whole(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pack for it, and the uninterrupted merge."""
    folder = tmp_path_factory.mktemp("whole")
    lora_pack(sharded, size=0.05).write(folder / "pack")
    adapterpack.merge(sharded, [folder / "pack"], folder / "out")
    return folder / "pack", folder / "out"


KILLED = """
import os, random, signal, sys, threading, time
import adapterpack
base, folder, seed, kills = sys.argv[1], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
pack, chance = adapterpack.load(sys.argv[2]), random.Random(seed)

def child(out, moment=None, delay=0.0):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    def die():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)
    def progress(done, total):
        if moment is not None and done >= moment * total:
            threading.Thread(target=die).start()
            if moment < 1:  # the others go on until they say what they have done
                time.sleep(600)
    try:
        report = adapterpack.merge(base, [pack], out, durable=False, progress=progress)
        print("resumed", report.bytes_resumed, flush=True)
        code = 0
    except BaseException as error:
        print(repr(error), flush=True)
        code = 1
    os._exit(code)

for kill in range(kills):
    out = f"{folder}/{kill}"
    killed = os.WIFSIGNALED(child(out, chance.choice((chance.random(), 1.0)), chance.uniform(0, 0.01)))
    assert os.path.exists(out) or killed
    assert not killed or not os.path.exists(out) or os.path.exists(out + "/adapterpack.merge.json")
    if not os.path.exists(out):
        assert child(out) == 0
    print("killed" if killed else "too late", flush=True)
"""


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    sharded: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """20 processes killed with SIGKILL at random moments; the same merge asked for again gives the
    uninterrupted merge's bytes each time.

    The moment is a share of the bytes, for eight of them all, and up to 10 ms more: anywhere in the work, on
    a machine of any speed. Where it is all of them, the merge may be at its end first.
    """
    command = [sys.executable, "-c", KILLED, sharded, whole[0], tmp_path, "6", "20"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n")
    assert lines.count("killed") >= 12
    assert sum(line.startswith("resumed ") and line != "resumed 0" for line in lines) >= 5
    expected = digests(whole[1])
    for kill in range(20):
        assert digests(tmp_path / str(kill)) == expected
    # a journal that outlives its output would be trusted by the next merge of that name
    assert len(list(tmp_path.iterdir())) == 20


def test_another_merge_does_not_go_on_with_what_was_killed(
    sharded: Path, whole: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An interrupted merge leaves its folder with ``resume``; other weights start afresh and say that it is
    there, the same ones go on and say from where.
    """

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        adapterpack.merge(sharded, [whole[0]], tmp_path / "out", progress=stop, resume=True)
    (left,) = tmp_path.iterdir()
    assert adapterpack.merge(sharded, [whole[0]], tmp_path / "half", weights=[0.5]).bytes_resumed == 0
    assert str(left) in caplog.text and "did not end" in caplog.text
    caplog.clear()
    # as a process leaves it that is killed while it writes the last files
    (left / "config.json").write_text("{")
    seen: list[int] = []
    report = adapterpack.merge(
        sharded, [whole[0]], tmp_path / "out", progress=lambda done, total: seen.append(done)
    )
    assert report.bytes_resumed > 0 and seen[0] >= report.bytes_resumed
    assert not left.exists() and digests(tmp_path / "out") == digests(whole[1]) and not caplog.text


def test_a_restart_of_the_machine_leaves_what_was_synced(tmp_path: Path) -> None:
    """Lines of an earlier boot count up to the last sync; a line cut short, or one that is none, counts for
    nothing.
    """
    (tmp_path / FOLDER).mkdir()
    first = b'{"boot":"then"}\n{"job":0,"sums":null}\n'
    synced = f'{{"synced":{len(first)}}}\n'.encode()
    (tmp_path / FOLDER / "1-of-1.jsonl").write_bytes(
        first + b'{"job":1,"sums":[1.0,2.0,3.0,true]}\n' + synced + b'{"job":2,"su'
    )
    assert read_finished_jobs(tmp_path, 9).keys() == {0}
    here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / FOLDER / "2-of-2.jsonl").write_bytes(
        f'{{"boot":"{here}"}}\n'.encode() + b'{"job":5,"sums":null}\n{"job":99,"sums":null}\nx\n'
    )
    assert read_finished_jobs(tmp_path, 9).keys() == {0, 5}


def test_nothing_is_published_before_its_bytes_are_on_the_disk(
    sharded: Path, whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of weights is synced after the last byte that was written to it and before the output gets
    its name, and the folder of that name afterwards; syncs began while jobs were still writing.
    """
    events: list[tuple[str, int]] = []
    calls = {name: getattr(os, name) for name in ("pwrite", "copy_file_range", "fsync")}
    rename, begun = Path.rename, threading.Event()

    def pwrite(sink: int, *rest: Any) -> int:
        header = rest[-1] == 0
        assert header or begun.wait(120)  # so that jobs are at work when files are synced
        written: int = calls["pwrite"](sink, *rest)
        events.append(("write", os.fstat(sink).st_ino))
        return written

    def copy_file_range(source: int, sink: int, *rest: Any) -> int:
        written: int = calls["copy_file_range"](source, sink, *rest)
        events.append(("write", os.fstat(sink).st_ino))
        return written

    def fsync(descriptor: int) -> None:
        inode, since = os.fstat(descriptor).st_ino, len(events)
        calls["fsync"](descriptor)
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".safetensors":
            begun.set()
        events.insert(since, ("sync", inode))  # it speaks of what was written before it began

    def renamed(self: Path, target: Path) -> Path:
        events.append(("rename", self.stat().st_ino))
        return rename(self, target)

    for name, call in (("pwrite", pwrite), ("copy_file_range", copy_file_range), ("fsync", fsync)):
        monkeypatch.setattr(os, name, call)
    monkeypatch.setattr(Path, "rename", renamed)
    out = tmp_path / "out"
    adapterpack.merge(sharded, [whole[0]], out)
    published = events.index(("rename", out.stat().st_ino))
    assert digests(out) == digests(whole[1]) and ("sync", tmp_path.stat().st_ino) in events[published:]
    early = 0
    for path in out.glob("*.safetensors"):
        inode = path.stat().st_ino
        last = max(place for place, event in enumerate(events) if event == ("write", inode))
        assert last < max(place for place, event in enumerate(events) if event == ("sync", inode)) < published
        early += ("sync", inode) in events[:last]
    assert early > 0


def test_a_disk_that_refuses_to_sync_is_not_passed_over(tmp_path: Path) -> None:
    """The system reports what it could not write once, to whoever syncs first: that is the thread beside the
    work, so it must tell.
    """
    (tmp_path / "file").symlink_to("/dev/full")  # a device that cannot be synced
    journal = Journal(tmp_path, JobShare(), ["file"])
    with pytest.raises(OSError, match="Invalid argument"), journal.synced():
        while any("sync_repeatedly" in thread.name for thread in threading.enumerate()):
            time.sleep(PAUSE)
    journal.close()


def test_a_reserved_file_is_as_long_and_keeps_its_bytes(tmp_path: Path) -> None:
    """Bytes that were there stay, the rest reads as zeros, and the blocks are given out where the file system
    gives any out beforehand.
    """
    path, beside = tmp_path / "file", tmp_path / "beside"
    path.write_bytes(b"kept")
    for each, function in ((path, reserve), (beside, lambda sink, size: os.posix_fallocate(sink, 0, size))):
        with open_descriptor(each, os.O_WRONLY | os.O_CREAT) as sink:
            function(sink, 1 << 20)
    assert path.read_bytes() == b"kept" + bytes((1 << 20) - 4)
    # an extent more where the file system writes down one for the bytes that were there
    assert path.stat().st_blocks >= beside.stat().st_blocks
    with open_descriptor(path, os.O_WRONLY) as sink:
        reserve(sink, 2)
        assert path.read_bytes() == b"ke"
        reserve(sink, 0)
    assert path.stat().st_size == 0


def test_machines_share_the_work(sharded: Path, whole: tuple[Path, Path], tmp_path: Path) -> None:
    """Three parts by three processes at once: each writes files of its own, the last one publishes the bytes
    of the whole merge.
    """
    command = [
        sys.executable,
        "-m",
        "adapterpack",
        "merge",
        sharded,
        whole[0],
        "-o",
        tmp_path / "out",
        "--json",
        "--shard",
    ]
    running = [
        subprocess.Popen([*command, f"{index}/3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in (1, 2, 3)
    ]
    said = [child.communicate() for child in running]
    assert [child.returncode for child in running] == [0, 0, 0], said
    reports = [json.loads(out) for out, _ in said]
    assert [report["shard"] for report in reports] == ["1/3", "2/3", "3/3"]
    assert min(report["jobs_missing"] for report in reports) == 0
    assert digests(tmp_path / "out") == digests(whole[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputExists):
        adapterpack.merge(sharded, [whole[0]], tmp_path / "out", shard="1/3")
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ConfigError, match="I/N"):
            adapterpack.merge(sharded, [whole[0]], tmp_path / "x", shard=wrong)


def test_parts_write_no_common_file(tmp_path: Path) -> None:
    """Each job belongs to one part, no file to two, whatever the number of parts."""
    from adapterpack.merging.checkpoint import layout, plan

    base = MergeBase(save_llama(tmp_path / "base", shard="12KB"))
    todo = plan.make(base, [lora_pack(base.folder)], [1.0])
    work = jobs(layout.shards(base, todo, None, ""))
    for count in (1, 2, 5, 40):
        parts = [jobs_of(work, JobShare(index, count)) for index in range(1, count + 1)]
        assert sorted(number for part in parts for number in part) == list(range(len(work)))
        files = [{file for number in part for file in work[number].files} for part in parts]
        assert sum(map(len, files)) == len(set().union(*files))


def test_one_process_at_a_time(sharded: Path, whole: tuple[Path, Path], tmp_path: Path) -> None:
    """The same merge asked for while it runs is refused, and the one that runs is not disturbed."""
    refused: list[StorageError] = []

    def again(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(StorageError, match="another process") as caught:
                adapterpack.merge(sharded, [whole[0]], tmp_path / "out")
            refused.append(caught.value)

    adapterpack.merge(sharded, [whole[0]], tmp_path / "out", progress=again)
    assert refused and digests(tmp_path / "out") == digests(whole[1])


# --- rounding by chance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_stochastic_rounding_is_unbiased(code: str) -> None:
    """The mean over 4,096 seeds is the value: |mean - x| <= 5 standard errors of a coin between its two
    neighbours, subnormals included.

    Every result is one of the two neighbours; numbers of the format stay; NaN and infinity do, too.
    """
    dtype, scratch = st.DTYPES[code], Scratch()
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(0, 1, 40), rng.normal(0, 1, 20) * 2.0**-12, [0.0, 1.0, -1.5]]).astype(
        np.float32
    )
    drawn = np.stack([stochastic(seed)("w", 3)(x, dtype, scratch).astype(np.float64) for seed in range(4096)])
    low, high = drawn.min(0), drawn.max(0)
    assert all(len(np.unique(column)) <= 2 for column in drawn.T)
    assert ((low <= x) & (x <= high)).all()
    p = np.where(high > low, (x - low) / np.where(high > low, high - low, 1), 0)
    assert (
        np.abs(drawn.mean(0) - x) <= 5 * (high - low) * np.sqrt(p * (1 - p) / 4096) + 2.0**-16 * (high - low)
    ).all()
    assert (drawn[:, -3:] == x[-3:]).all()
    odd = stochastic(1)("w", 0)(np.array([np.nan, np.inf, -np.inf], np.float32), dtype, scratch).astype(
        np.float32
    )
    assert np.isnan(odd[0]) and not np.isfinite(odd[1:]).any()


def test_chance_is_a_function_of_the_place() -> None:
    """Any window of the stream is the same numbers, and another tensor's or seed's are others."""
    stream = words(3, "w", 0, 1000)
    for start, count in ((0, 1), (7, 9), (8, 8), (501, 499)):
        assert np.array_equal(words(3, "w", start, count), stream[start : start + count])
    assert not np.array_equal(words(3, "v", 0, 1000), stream) and not np.array_equal(
        words(4, "w", 0, 1000), stream
    )


def test_stochastic_bytes_depend_on_the_seed_alone(
    sharded: Path, whole: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """One worker or four, blocks of another size, in parts: the same bytes; the projection of a faint change
    is kept, as nearest does not.

    A change of 1e-3 of the weights: nearest keeps about half (reference: the float64 change); by chance 1
    within 5 standard errors (0.01).
    """
    from adapterpack.merging.fold.fused import choose_arithmetic

    pack = lora_pack(
        sharded,
        r=16,
        alpha=16,
        size=(1e-3 / 4) ** 0.5,
        sites={"0.0.x_proj": (768, 1024), "1.0.x_proj": (768, 1024)},
    )
    report = adapterpack.merge(sharded, [pack], tmp_path / "a", stochastic_rounding=5)
    monkeypatch.setattr(sys.modules["adapterpack.merging.pipeline"], "workers", lambda: 1)
    monkeypatch.setattr(type(choose_arithmetic(None, stochastic=True)), "elements", lambda *_: 1 << 13)
    adapterpack.merge(sharded, [pack], tmp_path / "b", stochastic_rounding=5)
    for index in (1, 2):
        adapterpack.merge(sharded, [pack], tmp_path / "c", stochastic_rounding=5, shard=f"{index}/2")
    adapterpack.merge(sharded, [pack], tmp_path / "d", stochastic_rounding=6)
    a, b, c, d = (tensors(tmp_path / name) for name in "abcd")
    assert all(a[name].tobytes() == b[name].tobytes() == c[name].tobytes() for name in a)
    assert a["0.0.x_proj.weight"].tobytes() != d["0.0.x_proj.weight"].tobytes()
    assert adapterpack.merge(sharded, [pack], tmp_path / "nearest").kept < 0.9
    assert report.kept == pytest.approx(1, abs=0.01)
    assert json.loads((tmp_path / "a" / "adapterpack.merge.json").read_text())["stochastic_rounding"] == 5


# --- where the base is checked, and where it is computed ----------------------------------------------------


def test_verify_says_how_much_was_read(sharded: Path, tmp_path: Path) -> None:
    """By samples a change inside a tensor passes, by every byte it does not; one at the start is seen by
    both.
    """
    base = Checkpoint(sharded)
    pack = lora_pack(
        sharded, base=m.Base("b", structure=base.structure, content=base.content, probe=base.probe)
    )
    info = base.tensors["2.1.x_proj.weight"]
    for where, caught in ((info.nbytes // 4, ("full",)), (0, ("structure", "full"))):
        other = shutil.copytree(sharded, tmp_path / f"other-{where}")
        with (other / base.shard_of[info.name]).open("r+b") as file:
            file.seek(info.offset + where)
            file.write(b"\x11\x11")
        for verify in ("structure", "full"):
            if verify in caught:
                with pytest.raises(BaseMismatch, match="other weights"):
                    adapterpack.merge(other, [pack], tmp_path / f"out-{where}", verify=verify)
            else:
                report = adapterpack.merge(other, [pack], tmp_path / f"out-{where}", verify=verify)
                assert report.base_content is None and report.packs[0].base == "likely"
                shutil.rmtree(tmp_path / f"out-{where}")
    report = adapterpack.merge(sharded, [pack], tmp_path / "full", verify="full")
    assert report.base_content == base.content and report.packs[0].base == "same"
    with pytest.raises(ConfigError, match="structure or full"):
        adapterpack.merge(sharded, [pack], tmp_path / "x", verify="some")


def test_torch_folds_to_the_same_numbers(tmp_path: Path) -> None:
    """On ``--device cpu`` every tensor equals numpy's within float32 rounding (values below 2: 1e-6); an
    unknown device is refused.
    """
    base = save_llama(tmp_path / "base")
    packs = [lora_pack(base, "a"), lora_pack(base, "b", seed=2)]
    adapterpack.merge(base, packs, tmp_path / "numpy", weights=[1, -0.5])
    adapterpack.merge(base, packs, tmp_path / "torch", weights=[1, -0.5], device="cpu")
    ours, theirs = tensors(tmp_path / "numpy"), tensors(tmp_path / "torch")
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-6, rtol=0)
    with pytest.raises(ProviderError, match="no such device"):
        adapterpack.merge(base, packs, tmp_path / "out", device="abacus")


@pytest.mark.gpu
def test_cuda_folds_to_the_same_numbers(tmp_path: Path) -> None:
    """As on the CPU."""
    base = save_llama(tmp_path / "base")
    packs = [lora_pack(base, "a"), lora_pack(base, "b", seed=2)]
    for name, device in (("numpy", None), ("cuda", "cuda")):
        adapterpack.merge(base, packs, tmp_path / name, device=device)
    ours, theirs = tensors(tmp_path / "numpy"), tensors(tmp_path / "cuda")
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5, rtol=0)


# --- and back -----------------------------------------------------------------------------------------------


def test_unmerge_copies_the_base(sharded: Path, whole: tuple[Path, Path], tmp_path: Path) -> None:
    """With the base at hand the output is its files, byte for byte; another base is refused."""
    report = adapterpack.unmerge(whole[1], tmp_path / "base", base=sharded)
    assert report.way == "copied" and digests(tmp_path / "base") == digests(sharded)
    with pytest.raises(BaseMismatch, match="not the base"):
        adapterpack.unmerge(whole[1], tmp_path / "x", base=whole[1])
    with pytest.raises(Unsupported, match="does not hold its base"):
        adapterpack.unmerge(whole[1], tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_unmerge_computes_the_base_or_refuses(
    sharded: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """Weights that are coarser than what they became come back exactly; random bfloat16 weights are
    refused.
    """
    W = np.full((8, 4), 4, np.float32)
    base = write_base(tmp_path / "base", {"layer.weight": W, "other": W})
    halves = {"lora_A": np.full((1, 4), 0.5, np.float32), "lora_B": np.full((8, 1), -0.5, np.float32)}
    pack = lone_pack("halves", Site("layer", 4, 8), halves)
    adapterpack.merge(base, [pack], tmp_path / "merged", verify="full")
    report = adapterpack.unmerge(tmp_path / "merged", tmp_path / "again", packs=[pack])
    assert (report.way, report.proof) == ("computed", "content")
    assert all(value.tobytes() == W.tobytes() for value in tensors(tmp_path / "again").values())
    with pytest.raises(Unsupported, match="rounding"):
        adapterpack.unmerge(whole[1], tmp_path / "x", packs=[whole[0]])
    with pytest.raises(BaseMismatch, match="not the packs"):
        adapterpack.unmerge(whole[1], tmp_path / "x", packs=[pack])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("sizes", [[1.0], [1.0, -0.5, 2e-4]])
def test_the_factors_tell_the_size_of_the_change(sizes: list[float], tmp_path: Path) -> None:
    """``|D|_F`` of the report is that of the dense float64 change, to float32's rounding of the factors' sum
    (1e-6).
    """
    base = save_llama(tmp_path / "base")
    packs = [lora_pack(base, f"p{number}", seed=number + 1) for number in range(len(sizes))]
    report = adapterpack.merge(base, packs, tmp_path / "out", weights=sizes, dtype="bfloat16")
    sites = [{adapter.weight: adapter for adapter in pack.adapters()} for pack in packs]
    for loss in report.losses:
        changes = [
            size
            * each[loss.tensor].config.scale
            * each[loss.tensor].params["lora_B"].astype(np.float64)
            @ each[loss.tensor].params["lora_A"].astype(np.float64)
            for size, each in zip(sizes, sites, strict=True)
        ]
        assert loss.change == pytest.approx(np.linalg.norm(np.sum(changes, axis=0)), rel=1e-6)
