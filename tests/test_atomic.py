"""Outputs that are whole or absent: written where nobody else can, and every error says which path it is
about.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from processes import child

from adapterpack.errors import OutputExists, StorageError
from adapterpack.io.atomic import output_file, output_folder, scratch_folder

pytestmark = pytest.mark.fast

Output = Callable[[Path], AbstractContextManager[Path]]


@pytest.fixture(params=[output_file, output_folder], ids=["file", "folder"])
def output(request: pytest.FixtureRequest) -> Output:
    made: Output = request.param
    return made


def put(place: Path, text: str) -> Path:
    """Writes ``text`` into the output: into the file itself, or into one in the folder."""
    file = place / "file" if place.is_dir() else place
    file.write_text(text)
    return file


def test_a_link_that_waits_where_a_report_is_written_is_not_followed(tmp_path: Path) -> None:
    """A process id is known to others, so a name made of it would be one that they can foresee."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".report.html.{os.getpid()}.partial").symlink_to(victim)
    with output_file(tmp_path / "report.html") as path:
        put(path, "report")
    assert (victim.read_text(), (tmp_path / "report.html").read_text()) == ("mine", "report")


def test_an_output_grows_where_nobody_else_can_write(output: Output, tmp_path: Path) -> None:
    """Its folder is of this user alone while it grows; then a file has the mode that every new file gets."""
    with output(tmp_path / "out") as place:
        assert stat.S_IMODE((place if place.is_dir() else place.parent).stat().st_mode) == 0o700
        put(place, "whole")
    (tmp_path / "other").touch()
    made = tmp_path / "out" / "file" if (tmp_path / "out").is_dir() else tmp_path / "out"
    assert made.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_nobody_is_sent_to_what_vanished(tmp_path: Path) -> None:
    """An output in an output that ends early says that it is kept; once the outer one is gone, that is not
    said any more.
    """

    def stopped() -> None:
        with output_folder(tmp_path / "out") as folder:
            interrupt = KeyboardInterrupt()
            interrupt.add_note(f"the checkpoint is kept in {folder / 'checkpoints'}")
            interrupt.add_note("more is in another place")
            raise interrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        stopped()
    assert caught.value.__notes__ == ["more is in another place"]
    assert not list(tmp_path.iterdir())


def test_threads_that_renew_one_file_do_not_share_a_temporary(tmp_path: Path) -> None:
    """Each writes its own bytes to the end, and what remains is whole: that of the last one."""
    texts, meet, failed = [letter * 100_000 for letter in "abcd"], threading.Barrier(4), list[BaseException]()

    def renew(text: str) -> None:
        try:
            with output_file(tmp_path / "report") as path, path.open("w") as file:
                meet.wait(120)  # all are open at once
                file.write(text)
        except BaseException as error:  # of a thread, for the test to tell
            failed.append(error)

    threads = [threading.Thread(target=renew, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (tmp_path / "report").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_long_name_has_room_for_its_temporary(output: Output, tmp_path: Path) -> None:
    """File systems take names of 255 bytes."""
    out = tmp_path / ("n" * 250 + ".html")
    with output(out) as place:
        put(place, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_the_source_does_is_told_of_the_source(output: Output, tmp_path: Path) -> None:
    """A file that is missing, or that is a folder, is named; the output is not blamed, and nothing of it is
    left.
    """
    out, source = tmp_path / "out", tmp_path / "source"
    for _ in range(2):
        with pytest.raises(StorageError) as caught, output(out) as place:
            put(place, "half")
            source.read_text()
        assert caught.value.where == str(source)
        source.mkdir(exist_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "error",
    [
        OSError("no tokenizer can be loaded"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        OSError(errno.EIO, "a sector"),
        ValueError("no"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_is_of_no_file_passes_as_it_is(error: BaseException, output: Output, tmp_path: Path) -> None:
    """Libraries raise an OSError of their own, and reading fails without saying of what: neither is the
    output's fault.
    """
    with pytest.raises(type(error)) as caught, output(tmp_path / "out") as place:
        put(place, "half")
        raise error
    assert caught.value is error
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_the_outputs(output: Output, tmp_path: Path) -> None:
    """The system does not say of what it has no room for; but it is only writing that needs some."""
    with pytest.raises(StorageError, match="the disk is full") as caught, output(tmp_path / "out") as place:
        put(place, "half")
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"more")
    assert caught.value.where == str(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_an_output_that_cannot_be_written_is_named_by_its_own_name(output: Output, tmp_path: Path) -> None:
    """Not by its temporary one, which is gone when the error is read."""
    with pytest.raises(StorageError) as caught, output(tmp_path / "out") as place:
        (place / "no such folder" / "file").write_text("lost")
    assert caught.value.where == str(tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught, output(tmp_path / "file" / "out"):
        pass
    assert caught.value.where == str(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_temporary_files_leave_nothing_and_name_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process left is removed by the next; a full disk is that of temporary files, and the
    remedy another.
    """
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / ".adapterpack.0123456789abcdef.tmp" / "large").mkdir(parents=True)
    with scratch_folder() as folder:
        assert [*tmp_path.iterdir()] == [folder]
        (folder / "file").touch()
    assert [*tmp_path.iterdir()] == []
    with (
        pytest.raises(StorageError, match=r"the disk is full.*TMPDIR") as caught,
        scratch_folder() as folder,
        (folder / "file").open("wb"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"more")
    assert caught.value.where == str(tmp_path)
    assert [*tmp_path.iterdir()] == []


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
from pathlib import Path
from adapterpack.io import atomic
with getattr(atomic, sys.argv[1])(sys.argv[2]) as place:
    (place / "file" if place.is_dir() else place).write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


def test_an_interrupt_of_the_system_leaves_nothing(output: Output, tmp_path: Path) -> None:
    """Ctrl-C while it is written, in a process of its own."""
    command = [sys.executable, "-c", CHILD, getattr(output, "__name__", ""), str(tmp_path / "out")]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
        process.send_signal(2)
        process.wait(120)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "function", ["mkdir", "_locked_folder", "_private_folder", "output_file", "__enter__"]
)
def test_an_interrupt_between_the_making_and_its_guard_leaves_nothing(
    function: str, number: int, tmp_path: Path
) -> None:
    """The signal comes when the function that has just made the folder, or handed it on, returns; and again
    at once.
    """
    program = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
from pathlib import Path
from adapterpack.io.atomic import output_file
from adapterpack.signals import raised

def watch(frame, event, value):
    if event == "return" and frame.f_code.co_name == {function!r} and any(Path({str(tmp_path)!r}).iterdir()):
        sys.setprofile(None)
        os.kill(os.getpid(), {int(number)})
        os.kill(os.getpid(), {int(number)})

with raised() as handler:
    try:
        sys.setprofile(watch)
        with output_file(Path({str(tmp_path)!r}, "out")) as file:
            file.write_text("whole")
    except KeyboardInterrupt:
        sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr, [*tmp_path.iterdir()]) == (7, "", [])


def test_what_a_killed_process_left_is_removed_and_what_grows_is_not(output: Output, tmp_path: Path) -> None:
    """A folder whose lock is free goes when an output of its name is begun; one that still grows, one of
    another name, and a link stay.
    """
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for name in ("out", "other"):
        (tmp_path / f".{name}.{'a' * 16}.tmp" / "inside").mkdir(parents=True)
    (tmp_path / f".out.{'b' * 16}.tmp").symlink_to(elsewhere)
    with output(tmp_path / "out") as first:
        put(first, "first")
        growing = first if first.is_dir() else first.parent
        with pytest.raises(RuntimeError), output(tmp_path / "out") as second:
            put(second, "second")
            raise RuntimeError
        assert growing.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f".other.{'a' * 16}.tmp", f".out.{'b' * 16}.tmp", "elsewhere", "out"]
    )


def test_a_renewed_file_replaces_one_of_its_kind_only(tmp_path: Path) -> None:
    """Another file, a link to one of its kind and a folder stay, and are named."""
    (tmp_path / "mine").write_text("my own")
    (tmp_path / "old").write_text("kind: report")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "folder").mkdir()
    for name in ("mine", "link", "folder"):
        with pytest.raises(OutputExists, match=name), output_file(tmp_path / name, renews=b"kind: report"):
            pytest.fail("nothing is to be written")
    for name in ("old", "new"):
        with output_file(tmp_path / name, renews=b"kind: report") as path:
            path.write_text("renewed")
        assert (tmp_path / name).read_text() == "renewed"


def test_a_place_where_nothing_made_is_ones_own_is_named(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network disk whose files all belong to nobody: an error instead of one folder after another
    without end.
    """
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(StorageError, match="belong to another user"), output(tmp_path / "out"):
        pass
    assert not any(tmp_path.iterdir())
