"""Tasks as users meet them: rows of speech, images and words through bundles, canaries of every kind of
input, and what is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS, MODES
from click.testing import CliRunner
from every_family.tiny import tiny_config
from msgspec.structs import replace

import adapterpack
from adapterpack import Session, export, quantize, run
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import graph_file, read_bundle
from adapterpack.cli.commands.run import command
from adapterpack.errors import ConfigError, FormatError, ParityError, StorageError, Unsupported
from adapterpack.exporting.tracing.torch_parts import TorchPart, part_class
from adapterpack.manifest.structs import Pixels
from adapterpack.quantizing.graphs.measure import inputs_of
from adapterpack.quantizing.graphs.scheme import GRAPH_SCHEMES
from adapterpack.runtime import canary as replay
from adapterpack.runtime.media.image_layouts import features_of_rows, rows_of_images
from adapterpack.runtime.media.inputs import array_of, sound_of
from adapterpack.tasks.embeddings import POOLING
from adapterpack.tasks.task import GRID, MAIN, TASKS, Part, Task, get_task, task_of
from adapterpack.torch_adapters.models.load import empty_model, load_model

Make = Callable[..., Any]
BY_NAME = {one.name: one for one in ARCHITECTURES}


@pytest.fixture(scope="module")
def made(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Architecture -> its base with a tokenizer, and a bank with one low-rank adapter; made when first asked
    for.
    """
    torch.set_num_threads(1)

    @cache
    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        base = make_base(BY_NAME[name], folder / "base")
        for path in tiny_bert.glob("*token*"):  # words of the same vocabulary
            shutil.copyfile(path, base / path.name)
        export(
            base, [make_pack(BY_NAME[name], base, KINDS[0])], folder / "bundle", mode="bank", in_place=False
        )
        return base, folder / "bundle"

    return make


def test_a_canary_of_images_is_replayed(made: Make) -> None:
    """A classifier of images: at export, and again by ``validate``, on the images that the recipe makes."""
    _, bundle = made("vit")
    parity = Session(bundle, "cpu").bundle.parity["canary"]
    assert parity["not_replayed"] == {}
    assert parity["replayed"]["low-rank"]["max_abs"] <= parity["replayed"]["low-rank"]["tolerance"] / 100
    report = adapterpack.validate(bundle, full=True)
    assert [finding for finding in report.findings if finding.severity == "error"] == []
    assert not [text for text in report.not_checked if "canary" in text]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=[pytest.mark.long] * ((name, mode) != ("whisper", "bank")))
        # whose graphs are traced anew
        for name in ("whisper", "clip", "llava")
        for mode in MODES
        if mode != "folded" or name == "clip"
    ],
)
def test_canaries_of_speech_and_of_images_beside_texts_are_replayed(
    name: str, mode: str, made: Make, tmp_path: Path
) -> None:
    """Through all graphs, in every mode, folded where there are texts and images: at export, by ``validate``,
    and in eight bits; another adapter in the graph is found.
    """
    base, bundle = made(name)
    if mode != "bank":
        bundle = tmp_path / mode
        export(base, [make_pack(BY_NAME[name], base, KINDS[0])], bundle, mode=mode, in_place=False)
    parity = Session(bundle, "cpu").bundle.parity["canary"]
    assert parity["not_replayed"] == {}
    assert parity["replayed"]["low-rank"]["max_abs"] <= parity["replayed"]["low-rank"]["tolerance"] / 100
    quantize(bundle, tmp_path / "int8", scheme="int8")
    for folder in (bundle, tmp_path / "int8"):
        report = adapterpack.validate(folder, full=True)
        assert [finding for finding in report.findings if finding.severity == "error"] == []
        assert not [text for text in report.not_checked if "canary" in text]
    for part in get_task(BY_NAME[name].task).parts:  # each graph in turn is one that has other weights
        spoiled = Path(shutil.copytree(bundle, tmp_path / f"spoiled-{part.name}"))
        path = spoiled / graph_file(part.name)
        graph = ir.load(path)
        value = max(
            (
                one
                for one in graph.graph.initializers.values()
                if len(one.shape or ()) == 2 and one.name not in slots(graph)
            ),
            key=lambda one: one.const_value.size,
        )
        value.const_value = ir.tensor(np.array(value.const_value.numpy())[::-1].copy(), name=value.name)
        ir.save(graph, tmp_path / graph_file(part.name), external_data=f"{graph_file(part.name)}.data")
        for suffix in ("", ".data"):
            shutil.move(tmp_path / f"{graph_file(part.name)}{suffix}", f"{path}{suffix}")
        read_bundle(spoiled).write(spoiled)
        (finding,) = adapterpack.validate(spoiled, full=True).findings
        assert (finding.rule, "not the base" in finding.message) == ("AB401", mode != "folded"), (
            finding.message
        )


def test_images_of_another_shape_than_the_graphs_are_not_made(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack's recipe for other images, and one that asks for gigabytes of a graph whose shape is open: left
    out and said, not made.
    """
    session = Session(made("vit")[1], "cpu")
    (pack,) = session.packs.values()
    assert pack.manifest.canary is not None
    monkeypatch.setattr("adapterpack.pack.canary.make_row", lambda recipe, row: pytest.fail("it was made"))
    free = dataclasses.replace(
        session.bundle.io,
        inputs=tuple(
            dataclasses.replace(port, shape=("batch", 3, "height", "width"))
            for port in session.bundle.io.inputs
        ),
    )
    for shape, io, reason in (
        ((2, 3, 14, 12), session.bundle.io, "are of (3, 14, 12), the graph's of (3, 12, 12)"),
        ((2, 3, 2048, 2048 * 2), free, "more than 16777216 numbers"),
    ):
        canary = replace(pack.manifest.canary, pixels=Pixels(1, shape))
        other = dataclasses.replace(pack, manifest=replace(pack.manifest, canary=canary))
        session._adapters = session._adapters._replace(packs={pack.name: other})
        session.bundle = dataclasses.replace(session.bundle, io=io)
        (told,) = replay.verify(session)["not_replayed"].values()
        assert reason in told


def slots(graph: Any) -> set[str]:
    """What may be fed beside the initializers that hold its default."""
    return {value.name for value in graph.graph.inputs}


@pytest.mark.long
def test_a_canary_of_an_encoder_and_a_decoder_is_replayed_and_generation_is_torchs(made: Make) -> None:
    """T5: ids for both sides through both graphs; greedy decoding gives the tokens of plain transformers,
    ragged rows together.
    """
    base, bundle = made("t5")
    session = Session(bundle, "cpu")
    assert set(session.bundle.parity["canary"]["replayed"]) == {"low-rank"}
    prompts = [[5, 9, 31, 8, 2], [7, 2], [40, 41, 42]]
    found = session.generate(prompts, max_new_tokens=6)
    model = load_model(get_task("text2text-generation"), base).eval()
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, num_beams=1
            )[0, 1:].tolist()
        ended = (
            expected.index(model.config.eos_token_id)
            if model.config.eos_token_id in expected
            else len(expected)
        )
        assert list(answer.ids) == expected[:ended]
    mixed = session.generate(prompts, [None, "low-rank", None], max_new_tokens=6)
    assert [mixed[0].ids, mixed[2].ids] == [found[0].ids, found[2].ids]
    assert mixed[1] == session.generate(prompts[1:2], ["low-rank"], max_new_tokens=6)[0]


def test_images_and_words_from_the_command_line(made: Make, tmp_path: Path) -> None:
    """An image as a file of an array; what is missing, of another form or another kind is said."""
    _, bundle = made("vit")
    np.save(tmp_path / "image.npy", np.random.default_rng(0).normal(size=(3, 12, 12)).astype(np.float32))
    np.save(tmp_path / "small.npy", np.zeros((3, 4, 4), np.float32))
    done = CliRunner().invoke(
        command, [str(bundle), "--adapter", "low-rank", "--image", str(tmp_path / "image.npy"), "--json"]
    )
    row = json.loads(done.stdout)
    assert row["label"] in row["scores"] and abs(sum(row["scores"].values()) - 1) < 1e-4
    wrong = (
        ("small.npy", FormatError, "another form"),
        ("photo.png", StorageError, "photo.png"),
        (None, ConfigError, "image"),
    )
    for image, error, text in wrong:
        rows = [{"text": "hi"}] if image is None else [{"image": str(tmp_path / image)}]
        with pytest.raises(error, match=text):
            list(run(bundle, rows))


@pytest.mark.parametrize(
    ("name", "task", "right"),
    [
        ("t5", "text-generation", "text2text-generation"),
        ("bart", "text-generation", "text2text-generation"),
        ("whisper", "text2text-generation", "automatic-speech-recognition"),
        ("whisper", "text-generation", "automatic-speech-recognition"),
    ],
)
def test_an_encoder_and_decoder_is_exported_for_its_own_task(
    name: str, task: str, right: str, tmp_path: Path
) -> None:
    """One sentence that names it, before a graph is built; T5 under its older class name, too."""
    base = make_base(BY_NAME[name], tmp_path / "base")
    told: list[str] = []
    for architecture in (None, "T5WithLMHeadModel") if name == "t5" else (None,):
        if architecture is not None:
            config = json.loads((base / "config.json").read_bytes())
            (base / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        with pytest.raises(Unsupported) as caught:
            export(base, [], tmp_path / "bundle", task=task, progress=told.append)
        assert caught.value.what == f"an encoder and decoder is exported for {right}, not for {task}"
    assert told == []
    assert not (tmp_path / "bundle").exists()


@pytest.mark.long
def test_prompts_with_and_without_images_generate_what_torch_does(made: Make, tmp_path: Path) -> None:
    """LLaVA: an image goes before the prompt or in the place of its token; rows with and without one share a
    batch.
    """
    base, bundle = made("llava")
    image = np.random.default_rng(2).normal(size=(3, 12, 12)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    seen = str(tmp_path / "image.npy")
    # w3 is the image's token, 7
    rows = [{"prompt": "w5 w6", "image": seen}, {"prompt": "w1"}, {"prompt": "w5 w3 w6", "image": seen}]
    model = load_model(get_task("image-text-to-text"), base).eval()
    positions, asked = [7] * 9, ([9, 10], [5], [9, 10])
    places = ([*positions, 9, 10], [5], [9, *positions, 10])
    for row, ids, words in zip(run(bundle, rows, max_new_tokens=4), places, asked, strict=True):
        pixels = {"pixel_values": torch.from_numpy(image)[None]} if len(ids) > len(words) else {}
        with torch.no_grad():
            mask = torch.ones(1, len(ids), dtype=torch.long)
            whole = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=mask,
                max_new_tokens=4,
                do_sample=False,
                **pixels,
            )
            whole = whole[0, len(ids) :].tolist()
        assert row["completion"].split() == [f"w{number - 4}" for number in whole if number > 3]
    for wrong, text in (({"prompt": "w3 w1"}, "no image"), ({"prompt": "w3 w3", "image": seen}, "one mark")):
        with pytest.raises(ConfigError, match=text):
            list(run(bundle, [wrong]))


@pytest.mark.long
def test_an_answer_to_an_image_opens_the_language_model_once(made: Make, tmp_path: Path) -> None:
    """The engine's graph has its weights in memory, and the ordinary one is not opened beside it."""
    base, _ = made("llava")
    export(base, [], tmp_path / "bundle", mode="folded", in_place=True)
    session = Session(tmp_path / "bundle", "cpu")
    image = np.random.default_rng(2).normal(size=(1, 3, 12, 12)).astype(np.float32)
    rows = [{"prompt": "w5 w6", "image": image[0]}, {"prompt": "w1"}]
    seen, _ = session.task.answer(session, rows, [None, None], {"max_new_tokens": 3})
    assert seen["prompt_tokens"] == 11
    assert {MAIN, DECODER} & session._opened.keys() == {DECODER}
    with pytest.raises(ConfigError, match="inputs that the graph does not take"):
        session.generate([[9]], given={"pixel_values": image, "pixels": image})


@pytest.mark.long
def test_every_graph_of_a_bundle_is_quantized(made: Make, tmp_path: Path) -> None:
    """T5 in int8: encoder and decoder, adapters still apart from the base, and outputs that moved as little
    as is recorded.
    """
    _, bundle = made("t5")
    found = quantize(bundle, tmp_path / "int8", scheme="int8")
    for part in ("encoder", "model"):
        graph = ir.load(tmp_path / "int8" / graph_file(part)).graph
        assert sum(node.op_type == "MatMulNBits" for node in graph) > 0
    before, after = (Session(folder, "cpu") for folder in (bundle, tmp_path / "int8"))
    rows = {
        "input_ids": np.array([[5, 9, 31], [7, 2, 8]]),
        "attention_mask": np.ones((2, 3), np.int64),
        "decoder_input_ids": np.zeros((2, 1), np.int64),
    }
    exact, moved = (session.run(rows, [None, "low-rank"])["logits"] for session in (before, after))
    assert 0 < np.abs(moved - exact).max() <= 0.1 * np.abs(exact).max()
    assert set(found.quantization["max_error"]) == {"base", "low-rank"}
    assert adapterpack.validate(tmp_path / "int8").valid


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["whisper", "clip", "llava"])
def test_what_quantization_moves_is_recorded_of_every_graph(name: str, made: Make, tmp_path: Path) -> None:
    """max|quantized - float| of each graph's outputs, base and adapter, by sessions of their own; no graph is
    left out of it.
    """
    _, bundle = made(name)
    report = quantize(bundle, tmp_path / "int8", scheme="int8").quantization
    parts = [part.name for part in get_task(BY_NAME[name].task).parts]
    assert list(report["graphs"]) == sorted(parts)
    before, after = (Session(folder, "cpu") for folder in (bundle, tmp_path / "int8"))
    rows = inputs_of(before)
    assert {"pixel_values", "input_features"} & set(rows)
    for adapter in (None, "low-rank"):
        exact, moved = (session.run(rows, adapter) for session in (before, after))
        for part in parts:
            outputs = (
                before.graph(part).outputs
                if part != "model"
                else ["logits" if "logits" in exact else "image_embeds"]
            )
            places = (slice(None), -1) if outputs == ["logits"] else slice(None)
            errors = [np.abs(moved[one][places] - exact[one][places]).max() for one in outputs]
            largest = max(np.abs(exact[one][places]).max() for one in outputs)
            told = report["graphs"][part]
            assert told["max_error"][adapter or "base"] == pytest.approx(max(errors), rel=1e-4)
            assert told["max_relative"][adapter or "base"] == pytest.approx(max(errors) / largest, rel=1e-4)
            assert max(errors) > 0
    assert report["max_error"] == report["graphs"]["model"]["max_error"]


@pytest.mark.long
def test_a_graph_before_the_last_that_moved_too_far_is_refused(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scheme that allows a millionth of the largest output, the error names the graph."""
    _, bundle = made("clip")
    monkeypatch.setitem(
        GRAPH_SCHEMES._values, "int8", dataclasses.replace(GRAPH_SCHEMES["int8"], tolerance=1e-6)
    )
    with pytest.raises(ParityError, match=r"text\.onnx"):
        quantize(bundle, tmp_path / "int8", scheme="int8")
    assert not (tmp_path / "int8").exists()


def test_pooling_is_recorded(made: Make, tmp_path: Path) -> None:
    """The formulas of mean, first and last over real positions, whatever the padding side."""
    hidden = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2)
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    assert POOLING["mean"](hidden, mask).tolist() == [
        hidden[0, :2].mean(0).tolist(),
        hidden[1, 1:].mean(0).tolist(),
    ]
    assert POOLING["cls"](hidden, mask).tolist() == [hidden[0, 0].tolist(), hidden[1, 1].tolist()]
    assert POOLING["last"](hidden, mask).tolist() == [hidden[0, 1].tolist(), hidden[1, 2].tolist()]


@pytest.mark.fast
def test_speech_is_what_whispers_extractor_makes_of_it(tmp_path: Path) -> None:
    """Log-mel features of a wave file equal transformers' own within 1e-5; a file of another rate is
    refused.
    """
    from transformers import WhisperFeatureExtractor

    heard = (np.random.default_rng(1).normal(size=30000) * 3000).astype("<i2")
    for name, rate in (("right.wav", 16000), ("wrong.wav", 8000)):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(heard.tobytes())
    expected = WhisperFeatureExtractor(feature_size=80)(
        heard.astype(np.float32) / 32768, sampling_rate=16000, return_tensors="np"
    )
    found = sound_of(tmp_path / "right.wav", (80, 3000), {})
    assert np.abs(found - expected.input_features[0]).max() <= 1e-5
    with pytest.raises(Unsupported, match="16000 Hz"):
        sound_of(tmp_path / "wrong.wav", (80, 3000), {})
    (tmp_path / "odd.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(FormatError, match="no array"):
        array_of(tmp_path / "odd.npy", (80, 3000), "speech")


@pytest.mark.fast
def test_images_find_their_rows() -> None:
    """By their tokens; rows without an image have zeros; tokens that do not fit the images are an error."""
    ids = np.array([[9, 9, 1, 1], [1, 2, 3, 4], [9, 9, 9, 9]])
    assert rows_of_images(ids, 9, [2, 2, 2]) == [0, 2, 2]
    features = np.arange(12.0).reshape(3, 2, 2)
    sorted_in = features_of_rows(features, [0, 2, 2], 3)
    assert sorted_in.shape == (3, 4, 2)
    assert (sorted_in[1] == 0).all()
    assert (sorted_in[2].reshape(2, 2, 2) == features[1:]).all()
    with pytest.raises(ConfigError, match="do not fit"):
        rows_of_images(ids, 9, [2, 2, 2, 2])


@pytest.mark.fast
def test_a_model_class_has_one_task() -> None:
    """Classes whose names end alike are told apart by their config; every task's parts end with the one that
    answers.
    """
    hears = {"is_encoder_decoder": True, "num_mel_bins": 8}
    assert task_of("WhisperForConditionalGeneration", hears).name == "automatic-speech-recognition"
    nested = {"is_encoder_decoder": True, "encoder_config": {"num_mel_bins": 8}}
    assert task_of("CanaryForConditionalGeneration", nested).name == "automatic-speech-recognition"
    assert (
        task_of("BartForConditionalGeneration", {"is_encoder_decoder": True}).name == "text2text-generation"
    )
    assert task_of("LlavaForConditionalGeneration", {"vision_config": {"a": 1}}).name == "image-text-to-text"
    assert task_of("CLIPModel", {"logit_scale_init_value": 2.6}).name == "zero-shot-image-classification"
    assert task_of("CLIPTextModel", {"projection_dim": 16}).name == "feature-extraction"
    assert task_of("ViTModel", {"image_size": 12}).name == "image-feature-extraction"
    assert all(task.main.name == "model" and task.inputs for task in TASKS.values())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "task", "said"),
    [
        ("voxtral", "automatic-speech-recognition", "answers in the text it reads"),
        ("voxtral", "text2text-generation", "answers in the text it reads"),
        ("florence2", "image-text-to-text", "has an encoder, too"),
        ("florence2", "text2text-generation", "no model for the task"),
    ],
)
def test_a_model_with_or_without_an_encoder_is_told_from_the_task(
    kind: str, task: str, said: str, tmp_path: Path
) -> None:
    """transformers lists models that hear in their texts under tasks of encoders, too."""
    tiny_config(kind).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=said) as refused:
        empty_model(tmp_path, get_task(task))
    assert refused.value.remedy == "choose another base"


@pytest.mark.fast
def test_a_task_is_whole() -> None:
    """Every part has a torch module and named axes, every class of transformers exists, every suffix leads
    back to a task of that class.
    """
    for task in TASKS.values():
        assert hasattr(transformers, task.auto_class), task.name
        for part in task.parts:
            assert issubclass(part_class(part.form), TorchPart), part
            assert all(name in GRID or part.axes_of(name)[0] == "batch" for name in part.inputs), part
        assert all(
            task_of(f"Any{suffix}").auto_class == task.auto_class
            for suffix in task.suffixes
            if task.recognizes is None
        ), task.name
        compares_a_batch_with_itself = task.training is not None and "return_loss" in task.training.constants
        assert task.training is None or task.training.targets or compares_a_batch_with_itself, task.name
        assert all(get_task(alias) is task for alias in task.aliases)
    assert part_class("adapterpack.exporting.tracing.torch_parts:Plain") is part_class("plain")
    assert Part("model", "plain", ("bbox",), {"bbox": ("batch", "sequence", None)}).axes_of("bbox") == (
        "batch",
        "sequence",
        None,
    )


@pytest.mark.long
def test_a_task_with_an_input_of_its_own(tmp_path: Path) -> None:
    """LayoutLM reads where each token is on a page: axes and example of that input are the task's; graph and
    torch agree on other boxes.
    """

    def boxes(config: Any, batch: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            "bbox": np.sort(
                rng.integers(0, config.max_2d_position_embeddings, (*batch["input_ids"].shape, 2, 2)), 2
            ).reshape(*batch["input_ids"].shape, 4)
        }

    task = Task(
        "document-token-classification",
        "AutoModelForTokenClassification",
        lambda *_: [],
        ("LayoutLMForTokenClassification",),
        parts=(
            Part(
                "model",
                "plain",
                ("input_ids", "bbox", "attention_mask"),
                {"bbox": ("batch", "sequence", None)},
            ),
        ),
        heads=("classifier",),
        labelled=True,
        example=boxes,
    )
    config = transformers.LayoutLMConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        max_2d_position_embeddings=64,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.LayoutLMForTokenClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    TASKS.register(task)
    try:
        bundle = export(tmp_path / "base", [], tmp_path / "bundle", task=task.name, slots=2, max_rank=2)
        batch = {
            "input_ids": np.array([[5, 6, 7]]),
            **boxes(config, {"input_ids": np.zeros((1, 3))}, np.random.default_rng(1)),
        }
        logits = Session(tmp_path / "bundle", "cpu").run(batch)["logits"]
    finally:
        del TASKS._values[task.name]
    assert {port.name for port in bundle.io.inputs} >= {"input_ids", "bbox", "attention_mask"}
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
