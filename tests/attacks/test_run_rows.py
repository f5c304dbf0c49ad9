"""Attacks by the rows that ``run`` reads, from a file or from stdin."""

from __future__ import annotations

import contextlib
import json
import os
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attack import Attacks

Make = Callable[[str, str], Path]
REFUSED: dict[str, tuple[Any, str]] = {
    "a text of a megabyte": ({"text": "w1 " * 350_000}, "too long"),
    "a text of one word of a megabyte": ({"text": "w" * 1_000_000}, "too long"),
    "an image that is a text": ({"image": "w1"}, "line 1"),
    "half a surrogate pair": ({"text": "w1 \ud800"}, "surrogate"),
    "half a surrogate pair as the name of an adapter": ({"text": "w1", "adapter": "\udfff"}, "adapter"),
    "an adapter that is a number": ({"text": "w1", "adapter": 2**70}, "adapter"),
    "an adapter that is a list": ({"text": "w1", "adapter": ["alpha"]}, "adapter"),
    "an adapter whose name repaints": ({"text": "w1", "adapter": "\x1b[2J\u202eahpla"}, "adapter"),
    "a text that is a number": ({"text": 2**70}, "text"),
    "messages of numbers": ({"messages": [1, 2]}, "line 1"),
    "an audio file of a classifier": ({"audio": "/etc/passwd"}, "line 1"),
    "no column": ({}, "line 1"),
    "a list": ([1], "object"),
}
LINES: dict[str, tuple[bytes, str]] = {
    "nested 100,000 deep": (
        b'{"text": "w1", "id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "nested too deeply",
    ),
    "nested 900 deep": (b'{"text": "w1", "id": ' + b"[" * 900 + b"]" * 900 + b"}", "nested too deep"),
    "objects nested 100,000 deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "a million empty lists": (b'{"text": "w1", "id": [' + b"[]," * 1_000_000 + b"[]]}", "too many parts"),
    "a number of 5,000 digits": (b'{"text": "w1", "id": ' + b"9" * 5_000 + b"}", "not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not JSON"),
    "UTF-16": ('{"text": "w1"}'.encode("utf-16"), "not JSON"),
    "cut": (b'{"text": "w1', "not JSON"),
    "an escape in what is no JSON": (b"\x1b[2J\x9b31m", "not JSON"),
    "65 MB without an end": (b" " * (65 << 20), "too long"),
}
KEPT: dict[str, Any] = {
    "an id of 2^70": 2**70,
    "an id of a surrogate": "\ud800",
    "an id that repaints": "\x1b[2J\u202e",
    "an id of 1e400": "1e400",
    "an id that is no number": float("nan"),
}


@pytest.mark.parametrize("form", ["file", "stdin"])
@pytest.mark.parametrize("attack", REFUSED)
def test_a_row_of_a_classifier(attacks: Attacks, bundle_of: Make, attack: str, form: str) -> None:
    row, words = REFUSED[attack]
    _run(attacks, bundle_of("bert", "bank"), json.dumps(row).encode(), form).refused(words)


@pytest.mark.parametrize("attack", LINES)
def test_a_line(attacks: Attacks, bundle_of: Make, attack: str) -> None:
    line, words = LINES[attack]
    _run(attacks, bundle_of("bert", "bank"), line, "file").refused(words, "line 1")


@pytest.mark.parametrize("attack", KEPT)
def test_what_a_row_has_besides_goes_through(attacks: Attacks, bundle_of: Make, attack: str) -> None:
    line = json.dumps({"text": "w1", "id": KEPT[attack]}).replace('"1e400"', "1e400").encode()
    for options in ((), ("--json",), ("--output", f"{attacks.work}/out.jsonl")):
        _run(attacks, bundle_of("bert", "bank"), line, "file", *options).harmless()


@pytest.mark.parametrize("attack", ["text", "word", "messages"])
def test_a_prompt_of_a_megabyte(attacks: Attacks, bundle_of: Make, attack: str) -> None:
    row = {
        "text": {"prompt": "w1 " * 350_000},
        "word": {"prompt": "w" * 1_000_000},
        "messages": {"messages": [{"role": "user", "content": "w1 " * 350_000}]},
    }[attack]
    _run(attacks, bundle_of("llama", "bank"), json.dumps(row).encode(), "file").refused("too long", "line 1")


def cut_while_read(name: str) -> None:
    """A graph is read again and again while another thread cuts it short and writes it anew."""
    import threading
    import time

    from adapterpack.errors import AdapterpackError
    from adapterpack.onnx_graph.wire import walk

    path = Path(name)
    data, stop = path.read_bytes(), threading.Event()

    def cut() -> None:
        while not stop.is_set():
            os.truncate(path, 0)
            path.write_bytes(data)

    thread = threading.Thread(target=cut)
    thread.start()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        with contextlib.suppress(AdapterpackError):
            walk(path)
    stop.set()
    thread.join()


def test_a_graph_that_is_cut_short_while_it_is_read(attacks: Attacks) -> None:
    """Of a mapped file the system ends the process."""
    initializers = [
        onnx.TensorProto(name=f"w{number}", data_type=1, dims=[1000], raw_data=bytes(4000))
        for number in range(2000)
    ]
    model = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g", initializer=initializers))
    (attacks.work / "model.onnx").write_bytes(model.SerializeToString())
    attacks.call(cut_while_read, str(attacks.work / "model.onnx")).harmless()


def _array(name: str) -> None:
    from adapterpack.runtime.media.inputs import array_of, sound_of

    array_of(Path(name), (3, 4), "an image") if name.endswith(".npy") else sound_of(
        Path(name), (80, 3000), {}
    )


@pytest.mark.parametrize("kind", ["a pipe", "a claim of 60 GB", "cut"])
@pytest.mark.parametrize("name", ["a.npy", "a.wav"])
def test_a_file_of_a_row(attacks: Attacks, name: str, kind: str) -> None:
    path = attacks.work / name
    if kind == "a pipe":
        os.mkfifo(path)
    elif name == "a.npy":
        np.save(path, np.zeros((3, 4), np.float32))
        data = path.read_bytes()
        path.write_bytes(
            data.replace(b"(3, 4)", b"(3, 5000000000)") if kind == "a claim of 60 GB" else data[:-8]
        )
    else:
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(bytes(1000))
        data = path.read_bytes()
        path.write_bytes(
            data[:40] + b"\xff\xff\xff\x7f" + data[44:60] if kind == "a claim of 60 GB" else data[:30]
        )
    attacks.call(_array, str(path)).held()


def _run(attacks: Attacks, bundle: Path, line: bytes, form: str, *options: str) -> Any:
    if form == "stdin":
        return attacks.command(
            "run", bundle, "--input", "-", *options, stdin=line.decode("utf-8", "surrogateescape")
        )
    (attacks.work / "rows.jsonl").write_bytes(line)
    return attacks.command("run", bundle, "--input", "rows.jsonl", *options)
