"""``adapterpack chat``: conversations with a model, in Python, through a pipe and at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import write_model, write_packs

import adapterpack
from adapterpack.cli.main import main
from adapterpack.errors import ConfigError, UnknownAdapter

SHORT: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}
FIRST, SECOND = "Where is my parcel, please?", "And who took it from my door?"


def test_each_turn_goes_on_after_the_others(bundle: Path) -> None:
    """Every answer is that of the whole conversation at once, whose beginning is not read again; another
    adapter goes on with the same conversation.
    """
    talk, pieces = adapterpack.chat(bundle, "alpha", system="Be brief.", **SHORT), []
    said = [talk.say(FIRST, emit=pieces.append), talk.say(SECOND)]
    talk.adapter = "beta"
    said += [talk.say(SECOND)]
    talk.adapter = None
    said += [talk.say(SECOND)]
    assert "".join(pieces) == said[0]["completion"]
    assert [one["adapter"] for one in said] == ["alpha", "alpha", "beta", None]
    assert said[0]["reused_tokens"] == said[2]["reused_tokens"] == 0
    assert said[0]["prompt_tokens"] - 16 < said[1]["reused_tokens"] < said[1]["prompt_tokens"]
    session = adapterpack.Session(bundle, "cpu")
    for place, one in enumerate(said):
        before = [{"role": "system", "content": "Be brief."}, *talk.messages[: 2 * place + 1]]
        (whole,) = session.generate([before], [one["adapter"]], **SHORT)
        assert (one["completion"], one["prompt_tokens"]) == (whole.text, whole.prompt_tokens)
    assert len({one["completion"] for one in said[1:]}) == 3
    assert talk.messages[-1] == {"role": "assistant", "content": said[-1]["completion"]}


def test_an_answer_can_be_stopped(bundle: Path) -> None:
    """What was said stays a part of the conversation, which goes on."""
    talk = adapterpack.chat(bundle, "alpha", **{**SHORT, "max_new_tokens": 200})
    pieces: list[str] = []

    def hear(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            talk.stop()

    said = talk.say(FIRST, emit=hear)
    assert (said["finish_reason"], said["completion"]) == ("cancelled", "".join(pieces))
    assert talk.messages[-1]["content"] == said["completion"]
    talk.sampling = SHORT
    assert talk.say(SECOND)["reused_tokens"] > 0


def test_what_does_not_go_is_refused_and_leaves_the_conversation(bundle: Path, tiny_bert: Path) -> None:
    """Names, parameters, more than the context; a model that answers no messages is refused before it is
    exported.
    """
    with pytest.raises(UnknownAdapter):
        adapterpack.chat(bundle, "alfa")
    talk = adapterpack.chat(bundle, **SHORT)
    with pytest.raises(UnknownAdapter):
        talk.adapter = "alfa"
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        talk.sampling = {"temprature": 1}
    with pytest.raises(ConfigError):
        talk.say("parcel " * 600)
    assert (talk.messages, talk.adapter, talk.sampling) == ([], None, SHORT)
    done = CliRunner().invoke(main, ["chat", str(tiny_bert)], input="Hello\n")
    assert done.exit_code == 1 and "give it rows: adapterpack run" in done.stderr
    assert "prove" not in done.stderr


def test_a_pipe_has_a_message_a_line(bundle: Path, packs: Path, tmp_path: Path) -> None:
    """With commands among them; a pack is loaded by its path. The saved conversation is a row of a file."""
    out, system = tmp_path / "talk.json", tmp_path / "system.txt"
    system.write_text("Be brief.")
    lines = [
        f"/system @{system}", FIRST, "", "/adapter beta", SECOND, f"/adapter {packs / 'gamma'}", SECOND,
        f"/save {out}", "/reset", "/adapter", FIRST, "/exit", "never",
    ]  # fmt: skip
    settings = [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}")]
    command = ["chat", str(bundle), "--adapter", "alpha", *settings, "--json"]
    done = CliRunner().invoke(main, command, input="\n".join(lines))
    assert done.exit_code == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["adapter"] for one in said] == ["alpha", "beta", "gamma", None]
    talk = adapterpack.chat(bundle, "alpha", system="Be brief.", packs=[packs / "gamma"], **SHORT)
    for text, one in zip((FIRST, SECOND, SECOND), said, strict=False):
        talk.adapter = one["adapter"]
        assert talk.say(text)["completion"] == one["completion"]
    saved = json.loads(out.read_text())
    assert saved["messages"][1:] == talk.messages and saved["messages"][0]["content"] == "Be brief."
    done = CliRunner().invoke(main, [*command[:-1], "--json"], input="/adaptor beta\n")
    assert done.exit_code == 1 and "did you mean '/adapter'" in done.stderr


@contextmanager
def terminal(*arguments: object) -> Iterator[Any]:
    """``adapterpack chat`` at a terminal of its own: a function that types, and returns what comes up to a
    text.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "chat", *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    came = b""

    def type_in(keys: str, wanted: str = "> ") -> str:
        nonlocal came
        os.write(ours, keys.encode())
        until = time.monotonic() + 120
        while wanted.encode() not in came:
            assert time.monotonic() < until and process.poll() is None, came.decode()
            if select.select([ours], [], [], 0.1)[0]:
                came += os.read(ours, 4096)
        found, _, came = came.partition(wanted.encode())
        return found.decode()

    try:
        yield process, type_in
    finally:
        process.kill()
        process.wait()
        os.close(ours)


PROGRAM = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
from adapterpack.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def patient(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with room for answers that take minutes, however slowly keys are typed."""
    folder = tmp_path_factory.mktemp("patient")
    model = write_model(folder / "model", smollm2, max_position_embeddings=1 << 17)
    packs = write_packs(folder / "packs", model, ("alpha", "beta"))
    adapterpack.export(model, [packs / "alpha", packs / "beta"], folder / "bundle", proof="none")
    return folder / "bundle"


def test_a_terminal_asks_answers_and_is_interrupted(patient: Path, tmp_path: Path) -> None:
    """Ctrl-C ends an answer and not the conversation; at the prompt it ends that, and nothing is an error."""
    saved = tmp_path / "talk.json"
    with terminal(patient, "--adapter", "alpha", "--set", "temperature=0") as (process, type_in):
        assert "* alpha" in type_in("")
        type_in("/set max_new_tokens 5\n")
        answers = [type_in(f"{FIRST}\n")]
        type_in("/reset\n")
        type_in("/adapter beta\n")
        answers += [type_in(f"{FIRST}\n")]
        assert answers[0] != answers[1]
        assert "unknown command" in type_in("/adaptor alpha\n")
        type_in("/set max_new_tokens 100000\n")
        type_in("/set ignore_eos true\n")
        type_in(f"{SECOND}\n", "\n")
        type_in("", " ")
        type_in("\x03", "\n> ")
        assert "answers from now on" in type_in("/adapter alpha\n")
        type_in(f"/save {saved}\n")
        *_, last = json.loads(saved.read_text())["messages"]
        assert last["role"] == "assistant" and 0 < len(last["content"]) < 100000
        time.sleep(0.5)  # until it reads keys again, which a person waits for
        type_in("\x03", "\n")
        assert process.wait(60) == 0


def test_a_signal_to_end_ends_it(patient: Path) -> None:
    """In the middle of an answer, too."""
    with terminal(patient, "--set", "max_new_tokens=100000", "--set", "ignore_eos=true") as (
        process,
        type_in,
    ):
        type_in("")
        type_in(f"{FIRST}\n", "\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
