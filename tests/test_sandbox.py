"""Functions in a sandbox: they give their result, or an error that says what ended them; and their processes
never outlive their use.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import child

from adapterpack.errors import FormatError, Unsupported
from adapterpack.sandbox.limits import SandboxLimits
from adapterpack.sandbox.sandbox import Sandbox

LIMITS = SandboxLimits(memory=64 << 20, seconds=0.5, answer=1 << 20)


# What runs inside.


def double(data: bytes) -> bytes:
    return data + data


def misbehave(data: bytes) -> bytes:
    def recurse(depth: int) -> int:
        return recurse(depth + 1) + 1

    {
        "spins": lambda: exec("while True: pass"),
        "eats": lambda: bytes(1 << 30),
        "eats slowly": lambda: [bytes(1 << 20) for _ in range(1000)],
        "keeps eating": lambda: [(b"x" * (1 << 20), time.sleep(0.0001)) for _ in range(4000)],
        "answers at length": lambda: None,
        "raises": lambda: 1 / 0,
        "recurses": lambda: recurse(0),
        "exits": lambda: sys.exit(3),
        "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "ends without a word": lambda: os._exit(7),
        "sleeps": lambda: time.sleep(600),
    }[data.decode()]()
    return bytes(2 << 20)


def surroundings(_: bytes) -> bytes:
    files = 0
    for number in range(1000):
        with contextlib.suppress(OSError):
            os.fstat(number)
            files += 1
    return repr((sorted(os.environ), files)).encode()


def identity(_: bytes) -> bytes:
    return str(os.getpid()).encode()


def here(function: str, limits: SandboxLimits = LIMITS, **options: int) -> Sandbox:
    return Sandbox(f"{Path(__file__).stem}:{function}", limits, **options)


def test_results_and_large_messages_come_back() -> None:
    sandbox = here("double", SandboxLimits())
    for data in (b"", b"a", bytes(range(256)) * 40_000):
        assert sandbox.run(data, "it fails") == data + data


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("spins", "more than 0.5 s of processor time"),
        ("eats", "more than 64 MiB of memory"),
        ("eats slowly", "more than 64 MiB of memory"),
        ("answers at length", "larger than 1048576 bytes"),
        ("raises", "division by zero"),
        ("recurses", "nested too deeply"),
        ("exits", "it fails: 3"),
        ("dies", "SIGSEGV"),
        ("ends without a word", "status 7"),
    ],
)
def test_what_a_function_does_can_only_fail(act: str, reason: str) -> None:
    """An error that says which limit ended it, or what it raised; and the next call runs as if nothing had
    been.
    """
    if act == "eats" and sys.platform != "linux":
        reason = "larger than 1048576 bytes"  # macOS has no limit of memory
    sandbox, started = here("misbehave"), time.monotonic()
    for _ in range(2):
        with pytest.raises(
            FormatError, match=rf"^it fails: .*{reason}.*\(at here\)" if "it fails" not in reason else reason
        ):
            sandbox.run(act.encode(), "it fails", "here")
    assert time.monotonic() - started < 100, "what is allowed to a waiting one"


def test_memory_is_watched_where_the_system_does_not_limit_it() -> None:
    # Linux counts the most memory of whoever starts a process as the process's own: here that is small, and
    # the tests are not.
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_sandbox import LIMITS, "
        "Sandbox; Sandbox('sandbox_without_limits:misbehave', LIMITS._replace(seconds=10)).run(b'keeps "
        "eating', 'it fails')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600
    )
    assert "it fails: it takes more than 64 MiB of memory" in process.stderr


def test_a_system_without_such_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterpack.sandbox.sandbox.os", SimpleNamespace(name="nt"))
    with pytest.raises(Unsupported, match="POSIX") as caught:
        here("double").run(b"", "it fails")
    assert "Linux" in str(caught.value.remedy)


def test_a_deadline_of_the_clock_ends_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = here("misbehave", LIMITS._replace(seconds=1.5))
    with pytest.raises(FormatError, match="larger than"):
        sandbox.run(b"answers at length", "it fails")  # its process has started
    monkeypatch.setattr(SandboxLimits, "deadline", property(lambda limits: limits.seconds))
    with pytest.raises(FormatError, match=r"more than 1\.5 s(?! of)"):
        sandbox.run(b"sleeps", "it fails")


def test_no_secret_and_no_file_is_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        variables, files = eval(here("surroundings").run(b"", "it fails"))
    assert set(variables) <= {
        "TZ",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "SYSTEMROOT",
    }
    assert files <= 3  # nothing but what it is called by, and two that lead nowhere


def test_a_process_is_kept_for_the_next_call_and_no_longer_than_its_sandbox() -> None:
    sandbox = here("identity")
    process = sandbox.run(b"", "it fails")
    assert sandbox.run(b"", "it fails") == process
    sandbox.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)
    assert sandbox.run(b"", "it fails") != process


def test_a_process_that_died_while_it_waited_is_replaced() -> None:
    """Also where its death is not complete when the next call comes. One that dies of its call is not called
    again.
    """
    sandbox = here("identity")
    for _ in range(3):
        process = int(sandbox.run(b"", "it fails"))
        os.kill(process, signal.SIGKILL)
        assert int(sandbox.run(b"x" * (1 << 20), "it fails")) != process
    with pytest.raises(FormatError, match="SIGSEGV"):
        here("misbehave").run(b"dies", "it fails")
    sandbox.close()


def test_threads_share_a_few_processes() -> None:
    sandbox = here("identity")
    with ThreadPoolExecutor(16) as threads:
        assert len(set(threads.map(lambda _: sandbox.run(b"", "it fails"), range(64)))) < 64


def test_a_fork_has_processes_of_its_own() -> None:
    sandbox = here("identity")
    process, (end, start) = sandbox.run(b"", "it fails"), os.pipe()
    child = os.fork()
    if child == 0:
        try:  # whatever happens here, this process must not go on as a second run of the tests
            os.write(start, sandbox.run(b"", "it fails"))
            sandbox.close()
        finally:
            os._exit(0)
    os.close(start)
    assert os.read(end, 100) not in (b"", process)
    os.waitpid(child, 0)
    assert process == sandbox.run(b"", "it fails")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_process_ends_with_its_parent(ending: int) -> None:
    """However that ends, and also while it works."""
    code = (
        f"import sys, threading; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_sandbox "
        "import here; "
        "print(here('identity').run(b'', '').decode(), flush=True)\n"
        "s = here('identity'); print(s.run(b'', '').decode(), flush=True); here('misbehave').run(b'spins', "
        "'')"
    )
    with child([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        processes = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(ending)
        parent.wait()
    until = time.monotonic() + 120
    while time.monotonic() < until and any(map(_runs, processes)):
        time.sleep(0.02)
    assert not any(map(_runs, processes))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_sandbox_is_closed_by_an_interrupt() -> None:
    """Ctrl-C while a call runs ends its process, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sandbox = here("misbehave", LIMITS._replace(seconds=300))
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
            sandbox.run(b"spins", "it fails")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 60
