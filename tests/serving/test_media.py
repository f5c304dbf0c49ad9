"""Pictures and sounds over HTTP: each with its own adapter, and as ``run`` answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS
from servers import ANN, Served
from test_sounds import recorded, samples, spoken
from word_tokenizer import write_tokenizer

from adapterpack import export, run
from adapterpack.pack.pack import Pack
from adapterpack.runtime.engine.base import Engine
from adapterpack.runtime.engine.encoder_engine import EncoderEngine
from adapterpack.runtime.engine.engine import DecoderEngine
from adapterpack.runtime.media.inputs import sound_of
from adapterpack.serving.api import apis_of
from adapterpack.serving.tenants.limits import ServerLimits
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.adapt import attach
from adapterpack.torch_adapters.models.load import load_model


@pytest.fixture(scope="module")
def heard(
    launch: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Served, Path, str]:
    """A server of a bank that hears speech, the bank, and its adapter."""
    _, bundle, pack = spoken(tmp_path_factory.mktemp("speech"), "group")
    return launch(bundle, adapters=[]), bundle, pack.name


def url(data: bytes, kind: str = "audio/wav") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.long
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
        ({"parameters": {"timestamps": "yes"}}, "must be true or false"),
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


def test_requests_to_try_are_such_as_the_model_answers(heard: tuple[Served, Path, str], bundle: Path) -> None:
    """A sound where it hears, and a text that goes on where it has no chat template."""

    def tried(engine: Engine) -> dict[str, Any]:
        apis = apis_of(engine, ServerLimits(), {})
        return {route.path: route.example for api in apis for route in api.routes if route.example}

    assert tried(EncoderEngine(heard[1], "cpu")) == {"/v1/predict": {"input": "data:audio/wav;base64,..."}}
    engine = DecoderEngine(bundle, "cpu", max_rows=1, max_length=64)
    assert {*tried(engine)} == {"/v1/chat/completions", "/v1/messages"}
    engine.bundle.tokenizer.template = None
    assert tried(engine) == {"/v1/completions": {"prompt": "Hello"}}


LANGUAGES, TASKS = {"<|de|>": 40, "<|en|>": 41}, {"transcribe": 42, "translate": 43}


@pytest.fixture(scope="module")
def whisper(
    launch: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Served, Path, Pack]:
    """A server of a Whisper that knows two languages, its base and its adapter."""
    folder = tmp_path_factory.mktemp("whisper")
    (row,) = (one for one in ARCHITECTURES if one.name == "whisper")
    base = make_base(row, folder / "base")
    write_tokenizer(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    special = [tokenizer.decode([token]) for token in range(40, 45)]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(base)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(base)
    generation = {
        **transformers.GenerationConfig.from_pretrained(base).to_dict(),
        "is_multilingual": True,
        "lang_to_id": LANGUAGES,
        "task_to_id": TASKS,
        "no_timestamps_token_id": 44,
        "suppress_tokens": [5, *TASKS.values()],
        "begin_suppress_tokens": [6],
        "forced_decoder_ids": [[1, None], [2, 42]],
        "max_length": 64,
    }
    (base / "generation_config.json").write_text(json.dumps(generation))
    pack = make_pack(row, base, KINDS[0])
    export(base, [pack], folder / "bundle", mode="bank")
    return launch(folder / "bundle", adapters=[]), base, pack


def test_openai_client_hears_what_transformers_writes(whisper: tuple[Served, Path, Pack]) -> None:
    """In either language, in the likeliest, and translated; with and without an adapter; in each form."""
    server, base, pack = whisper
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=ANN, max_retries=0)
    tokenizer, recording = transformers.AutoTokenizer.from_pretrained(base), recorded(samples(0.3))
    heard = torch.from_numpy(sound_of(recording, (8, 40), {}))[None]
    plain = load_model(get_task("automatic-speech-recognition"), base).eval()
    tuned = attach(load_model(get_task("automatic-speech-recognition"), base).eval(), pack)
    texts = set()
    for name, model in (("base", plain), (pack.name, tuned)):
        generation = json.loads((base / "generation_config.json").read_text())
        model.generation_config = transformers.GenerationConfig()
        for key, value in generation.items():  # its own reader leaves some out
            setattr(model.generation_config, key, value if key != "forced_decoder_ids" else None)
        for language, task in (("de", "transcribe"), (None, "transcribe"), (None, "translate")):
            ids = model.generate(heard, language=language, task=task, do_sample=False, num_beams=1)
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
            more = {} if language is None else {"language": language}
            route = client.audio.transcriptions if task == "transcribe" else client.audio.translations
            asked: dict[str, Any] = {"model": name, "file": ("a.wav", recording), **more}
            assert route.create(**asked).text == text
            assert route.create(**asked, response_format="text") == text
            told = route.create(**asked, response_format="verbose_json", temperature=0.0)
            (likeliest,) = model.detect_language(heard).tolist()
            spoken = {token: code for code, token in LANGUAGES.items()}[likeliest]
            assert (told.text, told.duration) == (text, pytest.approx(0.3))
            assert told.language == language or f"<|{told.language}|>" == spoken
            texts.add(text)
    assert len(texts) > 1


def test_what_is_no_recording_is_refused(whisper: tuple[Served, Path, Pack]) -> None:
    server, _, _ = whisper
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=ANN, max_retries=0)
    good = recorded(samples(0.1))
    for change, error in (
        ({"file": b"RIFF"}, "no wave file"),
        ({"file": recorded(samples(0.5))}, "longer than what the model hears"),
        ({"file": recorded(samples(0.1), 8000)}, "16000 Hz"),
        ({"language": "fr"}, "one of de, en"),
        ({"temperature": "warm"}, "temperature"),
        ({"prompt": "Hello"}, "no such field"),
        ({"response_format": "srt"}, "verbose_json"),
    ):
        with pytest.raises(openai.BadRequestError, match=error):
            client.audio.transcriptions.create(**{"model": "base", "file": good, **change})  # type: ignore[call-overload]
    for body, status in ((b"--x\r\n", 400), (b"--x--", 400), (b"", 400)):
        kind = {"content-type": "multipart/form-data; boundary=x", **server.headers}
        answer = server.post("/v1/audio/transcriptions", None, content=body, headers=kind)
        assert answer.status_code == status, answer.text
    assert server.post("/v1/audio/transcriptions", {"model": "base"}).status_code == 415
