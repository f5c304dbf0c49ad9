"""Pictures and sounds over HTTP: each with its own adapter, and as ``run`` answers."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import Served
from test_sounds import recorded, samples, spoken

from adapterpack import run


@pytest.fixture(scope="module")
def heard(
    launch: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Served, Path, str]:
    """A server of a bank that hears speech, the bank, and its adapter."""
    _, bundle, pack = spoken(tmp_path_factory.mktemp("speech"), "group")
    return launch(bundle, adapters=[]), bundle, pack.name


def url(data: bytes, kind: str = "audio/wav") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_sounds_are_answered_as_run_answers(heard: tuple[Served, Path, str], tmp_path: Path) -> None:
    """Of several lengths, with and without an adapter; seconds of words where they are asked for."""
    server, bundle, name = heard
    sounds = [recorded(samples(seconds, number)) for number, seconds in enumerate((0.2, 0.11, 0.2))]
    files = [tmp_path / f"{number}.wav" for number in range(3)]
    for file, data in zip(files, sounds, strict=True):
        file.write_bytes(data)
    for model, adapter in (("base", None), (name, name)):
        body = {"model": model, "input": [*map(url, sounds)], "parameters": {"timestamps": True}}
        answer = server.post("/v1/predict", body)
        assert answer.status_code == 200, answer.text
        rows = run(bundle, [{"audio": str(file), "adapter": adapter} for file in files], timestamps=True)
        for place, (found, wanted) in enumerate(zip(answer.json()["data"], rows, strict=True)):
            assert found == {"index": place, "text": wanted["text"], "chunks": wanted["chunks"]}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"input": "/etc/passwd"}, "data URL"),
        ({"input": "file:///etc/passwd"}, "data URL"),
        ({"input": "https://example.com/a.wav"}, "data URL"),
        ({"input": ["data:audio/wav;base64,UklGRg==", "x"]}, "data URL"),
        ({"input": "data:audio/wav;base64,UklGRg=="}, "no wave file"),
        ({"input": "data:image/png;base64,UklGRg=="}, "needs audio"),
        ({"input": url(recorded(samples(0.2), 8000))}, "16000 Hz"),
        ({"parameters": {"threshold": 0.5}}, "no such option"),
        ({"parameters": {"prompt": "x"}}, "no such option"),
        ({"parameters": {"timestamps": "yes"}}, "neither true nor false"),
    ],
)
def test_what_is_no_sound_is_refused(
    change: dict[str, Any], error: str, heard: tuple[Served, Path, str]
) -> None:
    """No name of a file is opened, and no address fetched."""
    server, _, _ = heard
    good = {"model": "base", "input": url(recorded(samples(0.1)))}
    answer = server.post("/v1/predict", {**good, **change})
    assert answer.status_code == 400 and error in answer.json()["error"]["message"], answer.text
