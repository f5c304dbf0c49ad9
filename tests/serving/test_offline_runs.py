"""Files of rows that ``adapterpack run`` answers: in order, each row as it is alone, and after a kill as if
there had been none.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator

from adapterpack import Session, run
from adapterpack.cli.main import main
from adapterpack.resources import schema
from adapterpack.runtime.sessions.run import BLOCK
from adapterpack.serving.embedded import InProcess

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "1700000000"}
NAMES = [None, "alpha", "beta"]
WORDS = ["order", "mugs", "parcel", "Lisbon", "kettle", "where", "broken", "please", "send", "two", "blue"]


def rows_of(count: int, seed: int = 1) -> list[dict[str, Any]]:
    dice = random.Random(seed)
    return [
        {
            "prompt": " ".join(dice.choices(WORDS, k=dice.randint(1, 30))),
            "adapter": dice.choice(NAMES),
            "id": number,
        }
        for number in range(count)
    ]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def command(*args: Any) -> list[str]:
    """The command as a user's terminal starts it: a shell that runs tests in the background has its children
    ignore SIGINT.
    """
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from adapterpack.cli.main "
        "import main; main()"
    )
    return [sys.executable, "-c", code, "run", *map(str, args)]


BROKEN_OFF = """
import os
from adapterpack.offline import growing_file as module
write, left, number = module._write, int(os.environ["WRITES"]), int(os.environ["SIGNAL"])
def broken_off(descriptor, data):
    global left
    left -= 1
    if left == 0:
        if number == signal.SIGKILL:
            write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), number)
    write(descriptor, data)
module._write = broken_off
main()
"""
"""In place of the command's last words: a signal in the middle of one of the writes of the growing file."""


def ran(*args: Any, code: int = 0) -> Result:
    """The command in this process."""
    done = CliRunner(env={"SOURCE_DATE_EPOCH": ENVIRONMENT["SOURCE_DATE_EPOCH"]}).invoke(
        main, ["run", *map(str, args)]
    )
    assert done.exit_code == code, done.stderr
    return done


def test_rows_come_and_go_while_others_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 rows of mixed adapters and lengths, one of them longer than the engine was made for: each says what
    it says alone; greedy, and with a seed, of which each row has numbers of its own.
    """
    rows = rows_of(200)
    rows[70]["prompt"] = "mugs " * 150
    monkeypatch.setattr("adapterpack.runtime.sessions.run._LENGTH", 1)
    answers = list(run(bundle, rows, provider="cpu", batch_size=4, max_new_tokens=24))
    assert [answer["id"] for answer in answers] == list(range(200))
    session = Session(bundle, "cpu")
    for answer in [*answers[::9], answers[70]]:
        [alone] = session.generate([answer["prompt"]], [answer["adapter"]], max_new_tokens=24)
        assert (answer["completion"], answer["finish_reason"]) == (alone.text, alone.finish_reason)
        assert answer["prompt_tokens"] == alone.prompt_tokens
        assert answer["pack"] == (None if answer["adapter"] is None else session.packs[answer["adapter"]].id)
    same = [{"prompt": "two mugs", "adapter": "alpha"}] * 9
    drawn = [
        answer["completion"]
        for answer in run(
            bundle, same, provider="cpu", batch_size=2, temperature=1.5, seed=3, max_new_tokens=8
        )
    ]
    assert len(set(drawn)) > 6
    assert drawn == [
        one.text
        for one in session.generate(["two mugs"] * 9, "alpha", temperature=1.5, seed=3, max_new_tokens=8)
    ]


@pytest.mark.long
def test_a_killed_run_goes_on(bundle: Path, tmp_path: Path) -> None:
    """A run is killed again and again in the middle of random writes, and interrupted once: the last one ends
    with the bytes of a run that nobody stopped, and none begins anew; nothing else is left.
    """
    source = written(tmp_path / "rows.jsonl", rows_of(300))
    options = (
        bundle,
        "--input",
        source,
        "--batch-size",
        2,
        "--max-new-tokens",
        12,
        "--provider",
        "cpu",
        "--threads",
        1,
        "--temperature",
        1.3,
        "--seed",
        5,
        "--logprobs",
        2,
    )
    subprocess.run(
        command(*options, "--output", tmp_path / "whole.jsonl"), check=True, timeout=300, env=ENVIRONMENT
    )
    assert_goes_on(options, tmp_path / "out" / "answers.jsonl", tmp_path / "whole.jsonl")


def assert_goes_on(options: tuple[Any, ...], out: Path, whole: Path) -> None:
    """A run that is killed in writes of random numbers, and interrupted once, ends with the bytes of
    ``whole``; nothing else is left.
    """
    dice, sizes, block = random.Random(2), [0], 2 * BLOCK
    python, option, code, *rest = command(*options, "--output", out)
    # one when it is opened, one a row, one a step: the first block is kept, and the second is not
    moments = [(number, block + dice.randrange(3, block)) for number in (signal.SIGKILL, signal.SIGINT)]
    for number, writes in (*moments, (signal.SIGKILL, 2 * block + 3)):
        environment = {**ENVIRONMENT, "WRITES": str(writes), "SIGNAL": str(int(number))}
        done = subprocess.run(
            [python, option, code.removesuffix("main()") + BROKEN_OFF, *rest],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
        assert number != signal.SIGINT or "the same command goes on there" in done.stderr
        sizes.append(kept(out))
    assert all(before < after for before, after in pairwise(sizes)), sizes
    subprocess.run([python, option, code, *rest], check=True, env=ENVIRONMENT)
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]


def kept(out: Path) -> int:
    """The steps that the growing file of an output has kept."""
    return sum(path.read_bytes().count(b'"size"') for path in out.parent.glob(".*.partial/steps"))


def test_a_row_that_cannot_be_run(bundle: Path, tmp_path: Path) -> None:
    """It is the end, and nothing is left; or with --keep-going an error in its place, and exit code 1. Rows
    that are given again as they were written, without what was wrong with them, lose the error.
    """
    rows: list[Any] = rows_of(6)
    rows[1]["adapter"], rows[3], rows[4] = "nobody", "{", {"prompt": "mugs " * 3000}
    source, out = written(tmp_path / "rows.jsonl", rows), tmp_path / "answers.jsonl"
    assert "nobody" in ran(bundle, "--input", source, "--output", out, "--max-new-tokens", 4, code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    done = ran(bundle, "--input", source, "--output", out, "--max-new-tokens", 4, "--keep-going", code=1)
    assert "3 of 6 rows could not be run" in done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer.get("error", {}).get("code") for answer in answers] == [
        None,
        "unknown-adapter",
        None,
        "config",
        "config",
        None,
    ]
    assert answers[3]["line"] == 4
    assert "line 5" in answers[4]["error"]["message"]
    assert answers[1] | {"adapter": "alpha"} != answers[1]
    again = written(tmp_path / "again.jsonl", [answers[1] | {"adapter": "alpha"}])
    printed = json.loads(ran(bundle, "--input", again, "--json", "--max-new-tokens", 4).stdout)
    report = Draft202012Validator(schema("report.v1"))
    for row in (printed, *({"command": "run", **answer} for answer in answers)):
        report.validate(row)
    assert "error" not in printed
    assert printed["completion"]
    shown = ran(bundle, "--input", source, "--keep-going", "--max-new-tokens", 4, code=1).stdout.splitlines()
    assert [text.split(" | ")[-1].startswith("error: ") for text in shown] == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    lines = ran(
        bundle, "--input", source, "--keep-going", "--max-new-tokens", 4, "--json", code=1
    ).stdout.splitlines()
    objects = [json.loads(line) for line in lines]  # the error at the end is one of them
    for value in objects:
        report.validate(value)
    assert [value.get("error", {}).get("code") for value in objects] == [
        None,
        "unknown-adapter",
        None,
        "config",
        "config",
        None,
        "rows-failed",
    ]


def test_a_full_disk_keeps_what_was_answered(tmp_path: Path) -> None:
    """The error names the output, and says where the steps that were kept are; where there are none nothing
    is left.
    """
    import resource

    from adapterpack.errors import StorageError
    from adapterpack.offline.growing_file import OutputProgress, growing_file

    out, before = tmp_path / "answers.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    for kept_rows in (0, 1):
        with pytest.raises(StorageError, match="ulimit -f") as caught, growing_file(out, "a" * 64) as file:
            file.write(b"one\n")
            if kept_rows:
                file.keep(OutputProgress(0, 1, 1, 4, 1))
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
                file.write(b"two\n")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.where == str(out)
        assert len([*tmp_path.iterdir()]) == len(getattr(caught.value, "__notes__", ())) == kept_rows
    with growing_file(out, "a" * 64) as file:
        assert (file.done.rows, file.done.size) == (1, 4)


def test_a_full_disk_stops_no_server(caplog: pytest.LogCaptureFixture) -> None:
    """Requests are answered without their lines in the audit, which is said once."""
    from adapterpack.serving.observability.audit import AuditLog, Record

    audit = AuditLog("/dev/full")
    for _ in range(3):
        audit.write(Record("id", "/v1/models"))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "no longer audited, until /dev/full can be written" in caplog.text


def requests_of(count: int) -> list[dict[str, Any]]:
    """What the official client would send, one a line, on three models and both routes; some draw, and some
    are wrong.
    """
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
    from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as Text

    dice, requests = random.Random(7), list[dict[str, Any]]()
    for number in range(count):
        words, model = (
            " ".join(dice.choices(WORDS, k=dice.randint(1, 20))),
            dice.choice(["alpha", "beta", "served"]),
        )
        chat = Chat(
            model=model,
            messages=[{"role": "user", "content": words}],
            max_tokens=10,
            temperature=number % 2,
            logprobs=True,
        )
        text = Text(model=model, prompt=[words, "kettle"], max_tokens=10, temperature=0)
        requests.append(
            {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": f"/v1/{'' if number % 3 else 'chat/'}completions",
                "body": text if number % 3 else chat,
            }
        )
    return requests


def test_requests_in_the_batch_format(bundle: Path, tmp_path: Path) -> None:
    """Each line is answered in order, as OpenAI's client parses it, by the model that it names: greedy ones
    say what they say alone. Wrong ones have the status and the body that a server gives, or an error of their
    own; the exit code is 1 then.
    """
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    requests = requests_of(30)
    requests[3]["body"] = {**requests[3]["body"], "model": "nobody"}
    requests[4]["body"] = {**requests[4]["body"], "max_token": 3}
    requests[5] |= {"url": "/v1/images"}
    requests[6]["body"] = {**requests[6]["body"], "stream": True}
    out = tmp_path / "out.jsonl"
    source = written(tmp_path / "batch.jsonl", [*requests, "{"])
    done = ran(bundle, "--input", source, "--output", out, "--batch-size", 4, "--keep-going", code=1)
    assert "5 of 31 rows" in done.stderr
    report = Draft202012Validator(schema("report.v1"))
    answers, session = [json.loads(line) for line in out.read_text().splitlines()], Session(bundle, "cpu")
    assert [answer["custom_id"] for answer in answers] == [
        *(request["custom_id"] for request in requests),
        None,
    ]
    statuses = [answer["response"] and answer["response"]["status_code"] for answer in answers]
    assert statuses == [200] * 3 + [404, 400, None, None] + [200] * 23 + [None]
    assert answers[3]["response"]["body"]["error"]["code"] == "model_not_found"
    assert "max_tokens" in answers[4]["response"]["body"]["error"]["message"]
    assert all(answer["error"]["code"] for answer in answers if answer["response"] is None)
    for answer, request in zip(answers, requests, strict=False):
        assert answer.keys() == {"id", "custom_id", "response", "error"}
        report.validate({"command": "run", **answer})
        if not answer["response"] or answer["response"]["status_code"] != 200:
            continue
        body, adapter = (
            request["body"],
            None if request["body"]["model"] == "served" else request["body"]["model"],
        )
        if request["url"] == "/v1/completions":
            said = [choice.text for choice in Completion.model_validate(answer["response"]["body"]).choices]
            prompts = [session.tokenizer.encode(prompt) for prompt in body["prompt"]]
        else:
            parsed = ChatCompletion.model_validate(answer["response"]["body"])
            assert parsed.created == 1_700_000_000
            said, prompts = [parsed.choices[0].message.content or ""], [body["messages"]]
        if not body["temperature"]:
            assert said == [one.text for one in session.generate(prompts, adapter, max_new_tokens=10)]
    assert len({answer["id"] for answer in answers}) == 31


@pytest.mark.long
def test_killed_requests_go_on(bundle: Path, tmp_path: Path) -> None:
    """As rows: also what is drawn without a seed, ids, times, and log-probabilities to the last digit."""
    source = written(tmp_path / "batch.jsonl", requests_of(150))
    options = (bundle, "--input", source, "--batch-size", 2, "--provider", "cpu", "--threads", 1)
    subprocess.run(
        command(*options, "--output", tmp_path / "whole.jsonl"), check=True, timeout=300, env=ENVIRONMENT
    )
    assert_goes_on(options, tmp_path / "out" / "answers.jsonl", tmp_path / "whole.jsonl")


def test_a_job_that_is_interrupted_as_a_block_begins_ends(bundle: Path) -> None:
    """The engine's thread waits for the rest of the block then, which never comes."""
    server = InProcess(bundle, "cpu", 2, None)
    with server._thread.hold():
        ended = threading.Thread(target=server.close, daemon=True)
        ended.start()
        ended.join(120)
        assert not ended.is_alive()


def test_it_says_how_far_it_is(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal a line now and then: rows, tokens a second, the share of the file, the seconds that
    are left; stdin has no end.
    """
    monkeypatch.setattr("adapterpack.cli.progress._SECONDS_BETWEEN_ROWS", 0.0)
    source = written(tmp_path / "rows.jsonl", rows_of(8))
    said = ran(
        bundle, "--input", source, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 4
    ).stderr.splitlines()
    assert len(said) == 8
    form = re.compile(rf"{re.escape(str(source))}: (\d) rows, [\d,]+ tokens/s(?:, (\d+)%, [\d,]+ s left)?")
    assert [form.fullmatch(line)[1] for line in said] == [str(number) for number in range(1, 9)]  # type: ignore[index]
    assert form.fullmatch(said[-1])[2] == "100"  # type: ignore[index]


def test_other_work_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    """Two runs that write one output are refused; other rows, or other options, do not go on with what was
    kept, and that is said.
    """
    from adapterpack.errors import StorageError
    from adapterpack.offline.growing_file import OutputProgress, growing_file

    out = tmp_path / "answers.jsonl"
    with pytest.raises(RuntimeError, match="stop"), growing_file(out, "a" * 64) as file:
        file.write(b"one\n")
        file.keep(OutputProgress(0, 1, 1, 4, 1))
        file.write(b"half of tw")
        with pytest.raises(StorageError, match="another process"), growing_file(out, "a" * 64):
            pass
        raise RuntimeError("stop")
    done = ran(
        bundle,
        "--input",
        written(tmp_path / "rows.jsonl", rows_of(2)),
        "--output",
        out,
        "--max-new-tokens",
        2,
    )
    assert "another run" in done.stderr
    out.unlink()
    with growing_file(out, "a" * 64) as file:
        assert (file.done.rows, file.done.size) == (1, 4)
        file.write(b"two\n")
        file.keep(OutputProgress(0, 2, 2, 8, 2))
    assert out.read_bytes() == b"one\ntwo\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "rows.jsonl"]
