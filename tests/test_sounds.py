"""What models hear: features as transformers' extractors make them, and rows of sounds of any length, each with
its own adapter.
"""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS

from adapterpack import Session, evaluate, export, run
from adapterpack.errors import ConfigError, FormatError, Unsupported
from adapterpack.runtime.media.inputs import sound_of
from adapterpack.runtime.media.sounds import EXTRACTORS, LONGEST
from adapterpack.runtime.text.ctc import collapse
from adapterpack.tasks.task import get_task, task_of
from adapterpack.torch_adapters.adapt import attach
from adapterpack.torch_adapters.models.load import load_model

RATE = 16000
SHAPES: dict[str, tuple[int | str, ...]] = {
    "WhisperFeatureExtractor": (80, 3000),
    "Wav2Vec2FeatureExtractor": ("sequence",),
    "ASTFeatureExtractor": (1024, 128),
    "SeamlessM4TFeatureExtractor": ("sequence", 160),
}
"""Extractor -> the shape of one row of what it makes."""


def samples(seconds: float, seed: int = 0) -> np.ndarray:
    """Tones with noise, as 16 bits."""
    time, dice = np.arange(int(seconds * RATE)) / RATE, np.random.default_rng(seed)
    tones = np.sin(2 * np.pi * 220 * time) + 0.3 * np.sin(2 * np.pi * 1700 * time * (1 + seed))
    return (4000 * (tones + 0.2 * dice.normal(size=len(time)))).astype("<i2")


def recorded(values: np.ndarray, rate: int = RATE) -> bytes:
    """A wave file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(values.tobytes())
    return file.getvalue()


@pytest.mark.fast
@pytest.mark.parametrize("seconds", [0.5, 1.237])
@pytest.mark.parametrize("kind", EXTRACTORS)
def test_features_are_what_the_extractor_of_transformers_makes(
    kind: str, seconds: float, tmp_path: Path
) -> None:
    """Of every known extractor, within 1e-4 of values of size 1: it computes in float32."""
    extractor = getattr(transformers, kind)()
    heard = samples(seconds)
    expected = extractor(heard.astype(np.float32) / 32768, sampling_rate=RATE, return_tensors="np")
    config = {"feature_extractor_type": kind, **json.loads(extractor.to_json_string())}
    found = sound_of(recorded(heard), SHAPES[kind], config)
    wanted = expected[extractor.model_input_names[0]][0]
    if "attention_mask" in expected:
        wanted = wanted[: int(expected["attention_mask"][0].sum())] if wanted.ndim > 1 else wanted
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert np.abs(found - wanted).max() <= 1e-4
    (tmp_path / "a.wav").write_bytes(recorded(heard))
    assert (sound_of(tmp_path / "a.wav", SHAPES[kind], config) == found).all()


@pytest.mark.fast
def test_sounds_that_a_model_cannot_hear_are_refused() -> None:
    """Of another rate, too long, too short, of no known extractor, or no wave file."""
    config, open_shape = {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, ("sequence",)
    for data, error, words in (
        (recorded(samples(0.5), 8000), Unsupported, "16000 Hz"),
        (recorded(samples(0.01)), ConfigError, "0.025 to"),
        (recorded(np.zeros((LONGEST + 1) * RATE, "<i2")), ConfigError, "divide it"),
        (recorded(samples(0)), ConfigError, "no sound"),
        (b"RIFF", FormatError, "no wave file"),
    ):
        with pytest.raises(error, match=words):
            sound_of(data, open_shape, config)
    with pytest.raises(Unsupported, match="EnCodec"):
        sound_of(recorded(samples(0.5)), open_shape, {"feature_extractor_type": "EnCodecFeatureExtractor"})
    with pytest.raises(FormatError, match="sound is not in base 64"):
        sound_of("data:audio/wav;base64,!", open_shape, config)


@pytest.mark.fast
def test_classes_of_models_that_hear_are_told_from_those_that_read() -> None:
    assert task_of("Wav2Vec2ForSequenceClassification", {"conv_dim": [1]}).name == "audio-classification"
    assert task_of("BertForSequenceClassification", {}).name == "text-classification"
    assert task_of("MambaForSequenceClassification", {"conv_kernel": 4}).name == "text-classification"
    assert task_of("ASTForAudioClassification", {"num_mel_bins": 8}).name == "audio-classification"
    assert task_of("HubertForCTC", {"conv_dim": [1]}).name == "automatic-speech-recognition-ctc"


LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'")


def spoken(folder: Path, norm: str) -> tuple[Path, Path, Any]:
    """A CTC model with a tokenizer of letters, a bank of it, and its pack. ``norm`` is how its first
    convolution is normalised.
    """
    torch.set_num_threads(1)
    (row,) = (one for one in ARCHITECTURES if one.name == "wav2vec2")

    def config(hf: Any) -> Any:
        found = row.config(hf)
        found.vocab_size, found.pad_token_id = len(LETTERS), 0
        found.feat_extract_norm, found.do_stable_layer_norm = norm, norm == "layer"
        return found

    architecture = row._replace(task="automatic-speech-recognition-ctc", config=config)
    base = make_base(architecture, folder / "base")
    (folder / "vocab.json").write_text(json.dumps({letter: at for at, letter in enumerate(LETTERS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(base)
    pack = make_pack(architecture, base, KINDS[0])
    export(base, [pack], folder / "bundle", mode="bank", in_place=False)
    return base, folder / "bundle", pack


@pytest.fixture(scope="module", params=["layer", pytest.param("group", marks=pytest.mark.long)])
def speech(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Any]:
    return spoken(tmp_path_factory.mktemp("speech"), request.param)


def test_speech_of_any_length_is_heard_as_transformers_hears_it_alone(
    speech: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    """Three recordings of three lengths in one batch, with and without an adapter: text and words with their
    seconds are those of transformers on each row alone.
    """
    base, bundle, pack = speech
    model = load_model(get_task("automatic-speech-recognition-ctc"), base).eval()
    processor = transformers.Wav2Vec2Processor.from_pretrained(base)
    heard = [samples(seconds, number) for number, seconds in enumerate((0.3, 0.11, 0.2, 0.3))]
    names = [None, pack.name, pack.name, None]
    files = [tmp_path / f"{number}.wav" for number in range(len(heard))]
    for file, values in zip(files, heard, strict=True):
        file.write_bytes(recorded(values))
    rows = [{"audio": str(file), "adapter": name} for file, name in zip(files, names, strict=True)]
    found = list(run(bundle, rows, timestamps=True))
    expected: dict[int, Any] = {}
    for name in (None, pack.name):
        if name is not None:
            attach(model, pack, check_base=False)
        for number, values in enumerate(heard):
            if names[number] == name:
                inputs = processor(values.astype(np.float32) / 32768, sampling_rate=RATE, return_tensors="pt")
                with torch.no_grad():
                    ids = model(input_values=inputs["input_values"]).logits[0].argmax(-1)
                expected[number] = processor.tokenizer.decode(ids, output_word_offsets=True)
    for number, answer in enumerate(found):
        assert answer["text"] == expected[number].text != ""
        words = expected[number].word_offsets
        assert [chunk["text"] for chunk in answer["chunks"]] == [word["word"] for word in words]
        second = 8 / RATE
        assert [chunk["timestamp"] for chunk in answer["chunks"]] == [
            [round(float(word["start_offset"] * second), 3), round(float(word["end_offset"] * second), 3)]
            for word in words
        ]
    assert found[0]["text"] != found[1]["text"]
    data = tmp_path / "rows.jsonl"
    said = [
        {"audio": row["audio"], "text": f"{one['text']} MORE"}
        for row, one in zip(rows[1:3], found[1:3], strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in said))
    measures = evaluate(bundle, data=str(data)).measures
    words = sum(len(row["text"].split()) for row in said)
    assert measures[pack.name]["wer"] == pytest.approx(2 / words)
    assert measures["base"]["wer"] > 2 / words
    with pytest.raises(ConfigError, match="takes no sampling parameters"):
        list(run(bundle, rows, temperature=1.0))
    canary = Session(bundle, "cpu").bundle.parity["canary"]
    assert set(canary["replayed"]) == {pack.name}


@pytest.mark.fast
def test_the_most_likely_path_without_repetitions_and_blanks() -> None:
    assert collapse([], 0) == []
    assert [number for number, *_ in collapse([0, 3, 3, 0, 3, 4, 4, 0], 0)] == [3, 3, 4]
