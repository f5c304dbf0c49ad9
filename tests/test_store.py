"""The local store: every file once, read back by its digest, whole under concurrent processes, and freed only
on purpose.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.errors import CorruptBlob, FormatError, StorageError, UnknownName
from adapterpack.io import cache_folder
from adapterpack.io.locks import hold_lock
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.store import Store

pytestmark = pytest.mark.fast

MANIFEST, TENSORS = "adapterpack.json", "adapter_model.safetensors"


def make_pack(name: str = "tickets", seed: int = 7, width: int = 7) -> Pack:
    rng = np.random.default_rng(seed)
    params = {
        "lora_A": rng.standard_normal((3, width), dtype=np.float32),
        "lora_B": rng.standard_normal((5, 3), dtype=np.float32),
    }
    return build(
        name,
        get("lora"),
        {Site("net.q", width, 5): (LoRA(r=3, alpha=6), params)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("org/base"),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def blobs(store: Store) -> list[Path]:
    return sorted(path for path in (store.root / "blobs").rglob("*") if path.is_file())


def spoil(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def used(store: Store) -> int:
    """The bytes of all files on the disk; a file with several names counts once."""
    found = {path.stat().st_ino: path.stat().st_size for path in store.root.rglob("*") if path.is_file()}
    return sum(found.values())


def test_what_goes_in_comes_out_from_the_stores_own_bytes(store: Store, tmp_path: Path) -> None:
    """get(add(pack).id) = pack, whether it was given as a pack in memory or a folder; afterwards the source
    may vanish or change.
    """
    pack = make_pack()
    folder = pack.write(tmp_path / "tickets").path
    assert folder is not None
    (folder / "README.md").write_text("stays behind")
    added = store.add(folder)
    assert added.path == store.root / "packs" / pack.id.removeprefix("sha256:")
    spoil(folder / TENSORS)
    again = store.get(pack.id)
    assert again.id == added.id == pack.id
    assert all(np.array_equal(again.tensors[name], pack.tensors[name]) for name in pack.tensors)
    assert sorted(path.name for path in added.path.iterdir()) == ["adapter_config.json", TENSORS, MANIFEST]
    assert store.add(pack).id == Store(store.root).add(make_pack()).id == pack.id
    assert adapterpack.validate(added.path).valid
    assert [entry.id for entry in store.list()] == [pack.id]
    assert store.list()[0].name == "tickets"
    assert store.list()[0].bytes == sum(path.stat().st_size for path in added.path.iterdir())


def test_every_file_lies_once_and_read_only(store: Store) -> None:
    """A renamed pack shares its tensors; a blob's name is its sha256; there are no links that could lead
    out.
    """
    pack = make_pack()
    one, two = store.add(pack), store.add(pack.renamed("other"))
    assert one.path and two.path and one.id != two.id
    assert (one.path / TENSORS).stat().st_ino == (two.path / TENSORS).stat().st_ino
    assert len(blobs(store)) == 4  # two manifests, one file of tensors, one of PEFT's config
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in blobs(store))
    assert all(
        path.stat().st_mode & 0o222 == 0
        for path in store.root.rglob("*")
        if path.is_file() and path.parent != store.root
    )
    assert not [path for path in store.root.rglob("*") if path.is_symlink()]
    assert store.root.stat().st_mode & 0o077 == 0
    assert list((store.root / "tmp").iterdir()) == []


def test_a_peft_folder_becomes_a_pack(store: Store, tmp_path: Path) -> None:
    """An import has no manifest on disk: it gets one in the store."""
    folder = make_pack().write(tmp_path / "peft").path
    assert folder is not None
    (folder / MANIFEST).unlink()
    added = store.add(folder)
    assert store.get(added.id).id == adapterpack.load(folder).id


def test_nothing_of_an_invalid_pack_is_published(store: Store, tmp_path: Path) -> None:
    """An altered file, a shorter or longer one, a pipe, a link, a manifest that was edited, no folder:
    refused, and no pack is listed.
    """
    for number, change in enumerate((
        spoil, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.write_bytes(path.read_bytes() + b"0"),
        lambda path: (path.unlink(), os.mkfifo(path)), lambda path: (path.rename(tmp_path / "moved"), path.symlink_to(tmp_path / "moved")),
        lambda path: (path.parent / MANIFEST).write_bytes((path.parent / MANIFEST).read_bytes() + b"\n"),
        lambda path: (path.parent / MANIFEST).write_bytes(b"{}"),
    )):  # fmt: skip
        folder = make_pack().write(tmp_path / f"bad{number}").path
        assert folder is not None
        change(folder / TENSORS)  # type: ignore[no-untyped-call]
        with pytest.raises(FormatError):
            store.add(folder)
    with pytest.raises(StorageError):
        store.add(tmp_path / "nowhere")
    assert store.list() == ()
    assert list((store.root / "tmp").iterdir()) == []


def test_a_handle_whose_folder_changed_is_not_confused(store: Store, tmp_path: Path) -> None:
    """The pack in memory is stored, not what lies in its folder by now."""
    pack = make_pack().write(tmp_path / "tickets")
    (tmp_path / "tickets").rename(tmp_path / "old")
    make_pack("tickets", seed=8).write(tmp_path / "tickets")
    assert store.add(pack).id == pack.id


def test_what_is_checked_is_what_is_stored(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source becomes another pack once it is copied: what was copied is what is checked, stored and
    returned.
    """
    pack, real = make_pack(), Store._staged
    folder = pack.write(tmp_path / "tickets").path or tmp_path
    other = make_pack(seed=8).write(tmp_path / "other").path or tmp_path

    def swapped(*args: object) -> object:
        staged = real(*args)  # type: ignore[arg-type]
        folder.rename(tmp_path / "old")
        other.rename(folder)
        return staged

    monkeypatch.setattr(Store, "_staged", swapped)
    added = store.add(folder)
    assert added.id == store.get(pack.id).id == pack.id
    assert all(np.array_equal(added.tensors[name], pack.tensors[name]) for name in pack.tensors)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST, "adapter_config.json"])
def test_altered_bytes_are_named_and_put_into_quarantine(store: Store, name: str) -> None:
    """One flipped bit in the store: an error that names the file; the pack is gone from its place, kept
    aside, and can be added again.
    """
    pack = store.add(make_pack())
    assert pack.path is not None
    spoil(pack.path / name)
    with pytest.raises(CorruptBlob, match=f"quarantine.*{name}"):
        store.get(pack.id)
    assert store.list() == ()
    with pytest.raises(UnknownName):
        store.get(pack.id)
    kept = [path for path in (store.root / "quarantine").rglob("*") if path.is_file()]
    assert {path.name for path in kept} >= {name, MANIFEST}
    assert store.add(make_pack()).id == pack.id
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in blobs(store))


def test_adding_mends_an_altered_pack(store: Store) -> None:
    """add does not believe what lies there already: neither the pack nor a blob that another pack needs."""
    pack = store.add(make_pack())
    assert pack.path is not None
    spoil(pack.path / TENSORS)
    assert store.add(make_pack()).id == pack.id
    spoil(pack.path / TENSORS)
    other = store.add(make_pack().renamed("other"))
    assert store.get(other.id).id == other.id
    with pytest.raises(CorruptBlob):
        store.get(pack.id)


def test_an_unknown_pack(store: Store) -> None:
    for identity in ("sha256:" + "0" * 64, "../packs", "", "sha256:abc"):
        with pytest.raises(UnknownName):
            store.get(identity)


# --- garbage ------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_the_real_one_frees(store: Store) -> None:
    """gc(dry_run).bytes = bytes of the disk before - after; packs that are kept stay whole, shared blobs
    too.
    """
    one, other = store.add(make_pack()), store.add(make_pack().renamed("other"))
    three = store.add(make_pack(seed=9, width=4001))
    before = used(store)
    told = store.gc(keep=[one.id])
    assert told.dry_run
    assert used(store) == before
    assert told.packs == tuple(sorted([other.id, three.id]))
    done = store.gc(keep=[one.id], dry_run=False)
    assert (done.packs, done.files, done.bytes) == (told.packs, told.files, told.bytes)
    assert before - used(store) == done.bytes > 40_000
    assert store.get(one.id).id == one.id
    assert [entry.id for entry in store.list()] == [one.id]
    assert store.gc(dry_run=False).bytes == 0


def test_without_keep_only_leftovers_go(store: Store, tmp_path: Path) -> None:
    """Every pack stays; what a dead process left, lonely blobs and the quarantine go."""
    pack = store.add(make_pack())
    lonely = store.root / "blobs" / "ab" / ("ab" + "0" * 62)
    lonely.parent.mkdir(exist_ok=True)
    for path in (lonely, store.root / "tmp" / "left", store.root / "quarantine" / "old"):
        path.write_bytes(b"x" * 1000)
    assert store.gc().bytes == 3000
    assert store.gc(dry_run=False) == adapterpack.store.Garbage((), 3, 3000, False)
    assert store.get(pack.id).id == pack.id
    assert store.gc().files == 0


def test_collecting_that_dies_half_way_leaves_no_half_pack(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after the first file that it deletes: what is listed is whole, and the next one frees
    the rest.
    """
    store.add(make_pack()), store.add(make_pack(seed=9))

    def dies(tree: Path, **_: object) -> None:
        next(path for path in Path(tree).rglob("*") if path.is_file()).unlink()
        raise OSError("dies here")

    monkeypatch.setattr("adapterpack.store.shutil.rmtree", dies)
    with pytest.raises(StorageError):
        store.gc(keep=[], dry_run=False)
    monkeypatch.undo()
    assert all(store.get(entry.id).id == entry.id for entry in store.list())
    store.gc(keep=[], dry_run=False)
    assert used(store) == 0


def test_a_wrong_keep_removes_nothing(store: Store) -> None:
    pack = store.add(make_pack())
    for keep in (["sha256:" + "0" * 64], [pack.id, "nonsense"]):
        with pytest.raises(UnknownName):
            store.gc(keep=keep, dry_run=False)
    assert store.get(pack.id).id == pack.id


def test_where_there_are_no_hard_links_copies_do(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same promises on a file system that refuses links; a blob that a kept pack has a copy of stays."""

    monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    pack, other = store.add(make_pack()), store.add(make_pack(seed=9))
    assert store.get(pack.id).id == pack.id
    before = used(store)
    done = store.gc(keep=[pack.id], dry_run=False)
    assert done.packs == (other.id,)
    assert before - used(store) == done.bytes
    assert store.get(pack.id).id == pack.id
    assert store.gc().files == 0


# --- many processes -----------------------------------------------------------------------------------------

ADD = """
import sys, time
from adapterpack.store import Store
while time.time() < float(sys.argv[2]): pass
store = Store(sys.argv[1])
for folder in sys.argv[3:]:
    pack = store.add(folder)
    assert store.get(pack.id).id == pack.id
"""
COLLECT = """
import sys, time
from adapterpack.store import Store
store = Store(sys.argv[1])
while time.time() < float(sys.argv[2]): store.gc(dry_run=False)
"""


def start(program: str, *args: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_processes_that_add_at_the_same_moment(store: Store, tmp_path: Path) -> None:
    """Six processes add the same and different packs from one moment on, while a seventh collects garbage:
    all whole, nothing left over.
    """
    folders = [
        make_pack(f"p{number}", seed=number // 2).write(tmp_path / f"p{number}").path for number in range(6)
    ]
    wanted = sorted(adapterpack.load(str(folder)).id for folder in folders)
    moment = time.time() + 2
    running = [start(ADD, store.root, moment, *(folders[number:] + folders[:number])) for number in range(6)]
    running.append(start(COLLECT, store.root, moment + 2))
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    assert [entry.id for entry in store.list()] == wanted
    assert [store.get(identity).id for identity in wanted] == wanted
    assert len(blobs(store)) == 6 + 3 + 1  # manifests, tensors of three seeds, one PEFT config
    assert list((store.root / "tmp").iterdir()) == []
    assert store.gc().files == 0


WORK = """
import random, sys, time
from adapterpack.errors import UnknownName
from adapterpack.store import Store
root, start, what, *folders = sys.argv[1:]
store, draw, rounds = Store(root), random.Random(what), 0
while time.time() < float(start): pass
while rounds < 5 or time.time() < float(start) + 2:
    rounds += 1
    if what[:3] == "add":
        pack = store.add(draw.choice(folders))
        assert pack.path == store.root / "packs" / pack.id[7:] and pack.tensors
    elif what[:3] == "get":
        for entry in store.list():
            try: assert store.get(entry.id).id == entry.id
            except UnknownName: pass
    else:
        time.sleep(0.01)
        store.gc(keep=[] if draw.random() < 0.5 else None, dry_run=draw.random() < 0.2)
"""


def test_adding_reading_and_collecting_at_once(store: Store, tmp_path: Path) -> None:
    """For two seconds two processes add, one reads and one removes every pack again and again: an adder
    always gets its pack, a reader a whole pack or none, and nothing is left over.
    """
    folders = [
        make_pack(f"p{number}", seed=number // 2).write(tmp_path / f"p{number}").path for number in range(4)
    ]
    running = [
        start(WORK, store.root, time.time() + 1.5, what, *folders) for what in ("add1", "add2", "get", "gc")
    ]
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    assert all(store.get(entry.id).id == entry.id for entry in store.list())
    assert store.gc(dry_run=False).packs == ()
    store.gc(keep=[], dry_run=False)
    assert used(store) == 0


def test_who_wants_the_lock_alone_gets_it(tmp_path: Path) -> None:
    """Two share the lock in turns, each letting go only once the other holds it, or has waited for 0.2 s:
    never is it free for a moment, and yet a third who wants it alone gets it, because who comes after him
    waits behind him.
    """
    first, second, stop = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def share(mine: threading.Semaphore, other: threading.Semaphore) -> None:
        if mine is second:
            other.acquire()
        while not stop.is_set():
            with hold_lock(tmp_path / "lock", alone=False):
                mine.release()
                other.acquire(timeout=0.2)

    threads = [threading.Thread(target=share, args=pair) for pair in ((first, second), (second, first))]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    patience = threading.Timer(120, stop.set)
    patience.start()
    with hold_lock(tmp_path / "lock", alone=True):
        alone = not stop.is_set()
    patience.cancel()
    stop.set()
    for thread in threads:
        thread.join()
    assert alone


ACTS = {
    "add": lambda store, pack: store.add(make_pack(seed=9)),
    "get": lambda store, pack: store.get(pack.id),
    "collect": lambda store, pack: store.gc(),
    "put aside": lambda store, pack: (spoil(pack.path / TENSORS), store.get(pack.id)),
}


@pytest.mark.parametrize(("act", "alone", "waits"), [
    ("add", True, True), ("get", True, True), ("collect", True, True), ("put aside", True, True),
    ("add", False, False), ("get", False, False), ("collect", False, True), ("put aside", False, True),
])  # fmt: skip
def test_who_waits_for_whom(act: str, alone: bool, waits: bool, store: Store) -> None:
    """Nothing goes on beside one who holds the lock alone; beside those who share it only what takes nothing
    away.
    """
    pack = store.add(make_pack())
    done: list[object] = []

    def run() -> None:
        try:
            done.append(ACTS[act](store, pack))
        except CorruptBlob as error:
            done.append(error)

    thread = threading.Thread(target=run)
    with hold_lock(store.root / ".lock", alone):
        thread.start()
        thread.join(0.25 if waits else 120)
        assert (done == []) == waits
    thread.join()
    assert isinstance(done[0], CorruptBlob if act == "put aside" else object)


@pytest.mark.parametrize("other", ["mends", "takes away"])
def test_another_process_finds_the_altered_pack_first(
    store: Store, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between finding an alteration and holding the lock alone, another process puts the pack aside, and
    perhaps adds it again: adding gives the pack all the same, reading gives it or says that it is not there,
    and the pack that is whole now is not put aside.
    """
    pack = store.add(make_pack())
    quarantine, elsewhere = Store._quarantine, Store(store.root)

    def later(self: Store, folder: Path) -> tuple[str, ...]:
        if self is store:
            with pytest.raises(CorruptBlob):
                elsewhere.get(pack.id)
            if other == "mends":
                elsewhere.add(make_pack())
        return quarantine(self, folder)

    monkeypatch.setattr(Store, "_quarantine", later)
    assert pack.path is not None
    for act in (store.get, lambda _: store.add(make_pack())):
        spoil(pack.path / TENSORS)
        if act == store.get and other == "takes away":
            with pytest.raises(UnknownName):
                store.get(pack.id)
            elsewhere.add(make_pack())
        else:
            assert act(pack.id).id == pack.id
    assert elsewhere.get(pack.id).id == pack.id
    assert len(list((store.root / "quarantine").iterdir())) == 2


def test_nothing_is_named_before_its_bytes_are_safe(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut: every file of a pack, and the folder of their names, was synced before the pack got its
    place, and afterwards every folder in which a name is new, up to the one that holds the store; with links
    and with copies.
    """
    events: list[tuple[str, int]] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        if target.parent.name == "packs":
            safe = {inode for _, inode in events}
            assert {path.stat().st_ino for path in self.iterdir()} | {self.stat().st_ino} <= safe
            events.append(("published", self.stat().st_ino))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    for number in range(2):
        events.clear()
        pack = store.add(make_pack(seed=number))
        assert pack.path is not None
        published = events.index(("published", pack.path.stat().st_ino))
        after = {inode for _, inode in events[published:]}
        assert {folder.stat().st_ino for folder in (pack.path.parent, store.root, store.root.parent)} <= after
        new = {
            ("sync", folder.stat().st_ino)
            for blob in blobs(store)
            for folder in (blob.parent, store.root / "blobs")
        }
        assert number or new <= set(events)
        monkeypatch.setattr(Path, "hardlink_to", refuse_links)


def refuse_links(self: Path, target: Path) -> None:
    raise PermissionError("no hard links here")


def test_a_folder_that_is_no_store_is_not_made_one(tmp_path: Path) -> None:
    """Collecting garbage there would delete what lies in folders of the same names; an empty folder becomes a
    store.
    """
    (tmp_path / "mine" / "tmp").mkdir(parents=True)
    (tmp_path / "mine" / "tmp" / "work.txt").write_text("precious")
    for act in (lambda store: store.gc(dry_run=False), lambda store: store.add(make_pack())):
        with pytest.raises(StorageError, match="other things"):
            act(Store(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["tmp", "work.txt"]
    (tmp_path / "empty").mkdir()
    assert Store(tmp_path / "empty").add(make_pack()).id == make_pack().id


@pytest.mark.parametrize("name", ["blobs", "packs", "tmp", "quarantine"])
def test_a_folder_of_the_store_that_is_a_link_is_refused(name: str, store: Store, tmp_path: Path) -> None:
    """What a link leads to is not the store's to delete, to move or to write to."""
    store.add(make_pack())
    outside = tmp_path / "outside"
    (outside / "ab").mkdir(parents=True)
    (outside / "ab" / "thesis.txt").write_text("precious")
    (store.root / name).rename(tmp_path / "aside")
    (store.root / name).symlink_to(outside)
    acts: list[Callable[[], object]] = [
        lambda: store.gc(keep=[], dry_run=False),
        lambda: store.add(make_pack(seed=8)),
        lambda: store.get(make_pack().id),
    ]
    for act in acts:
        with pytest.raises(StorageError, match="is a link") as caught:
            act()
        assert caught.value.where == str(store.root / name)
    assert [path.name for path in sorted(outside.rglob("*"))] == ["ab", "thesis.txt"]
    (store.root / name).unlink()
    (tmp_path / "aside").rename(store.root / name)
    assert store.get(make_pack().id).id == make_pack().id


FULL = """
import resource, sys
from adapterpack.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Store(sys.argv[1]).add(sys.argv[2])
except Exception as error:
    print(type(error).__name__, error.where, error.remedy)
"""


def test_a_full_disk_is_the_stores_and_not_the_packs(store: Store, tmp_path: Path) -> None:
    """In a process that may write 4 KiB to a file: the error names the store, whose disk it is, and nothing
    is left in it.
    """
    folder = make_pack(width=4001).write(tmp_path / "big").path
    said = subprocess.run(
        [sys.executable, "-c", FULL, str(store.root), str(folder)], capture_output=True, text=True, check=True
    ).stdout
    kind, where, remedy = said.split(" ", 2)
    assert kind == "StorageError"
    assert Path(where).is_relative_to(store.root)
    assert "ulimit -f" in remedy
    assert store.list() == ()
    assert [*(store.root / "tmp").iterdir()] == []


@pytest.mark.long
def test_a_process_that_is_killed_leaves_no_half_pack(store: Store, tmp_path: Path) -> None:
    """SIGKILL at twelve moments of adding: every pack that is listed is whole, and gc frees the rest."""
    pack = make_pack(width=400_001)
    folder = pack.write(tmp_path / "big").path
    program = (
        "import sys\nfrom adapterpack.store import Store\nprint('ready', "
        "flush=True)\nStore(sys.argv[1]).add(sys.argv[2])"
    )
    for number in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(store.root), str(folder)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.004 * number)
        process.kill()
        process.wait()
        process.stdout.close()
        assert all(store.get(entry.id).id == pack.id for entry in store.list())
    store.gc(keep=[], dry_run=False)
    assert used(store) == 0
    assert store.add(str(folder)).id == pack.id


def test_where_the_store_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's cache folder, beside the demo's models, which read the same rule under its old name."""
    from adapterpack import demos

    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    assert Store().root == tmp_path / "cache" / "store"
    assert demos.cache_folder is cache_folder
    monkeypatch.delenv("ADAPTERPACK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sys.platform == "darwin" or cache_folder() == tmp_path / "adapterpack"
