"""What models learn that read and write in two parts, see, hear, or make embeddings: from rows to a pack that
is attached again.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architecture_proofs import make_base
from architectures import ARCHITECTURES
from PIL import Image
from vision_models import make_family

import adapterpack
from adapterpack import attach, evaluate, export, load, run, train
from adapterpack.errors import AdapterpackError, ConfigError
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.layers.active import wrappers_of
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.config.config import read_config
from adapterpack.training.loop.arguments import arguments_of
from adapterpack.training.loop.build_trainer import trainer_for
from adapterpack.training.loop.preparing import prepare, reader_of
from adapterpack.training.trainers.kind import TRAINERS

BY_NAME = {one.name: one for one in ARCHITECTURES}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data sets' cache in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="module")
def base_named(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> its random base with a tokenizer of the same vocabulary."""
    torch.set_num_threads(1)

    @cache
    def make(name: str) -> Path:
        if name == "bert":
            return tiny_bert
        base = make_base(BY_NAME[name], tmp_path_factory.mktemp(name) / "base")
        for path in tiny_bert.glob("*token*"):
            shutil.copyfile(path, base / path.name)
        return base

    return make


def picture(folder: Path, kind: int, number: int, size: tuple[int, int] = (12, 12)) -> str:
    """A prepared image of one of three patterns, with some noise."""
    waves = np.sin(np.arange(3 * size[0] * size[1]).reshape(3, *size) * (kind + 1) / 7) * 2
    path = folder / f"image-{kind}-{number}.npy"
    noise = np.random.default_rng(number).standard_normal((3, *size))
    np.save(path, (waves + 0.1 * noise).astype(np.float32))
    return str(path)


def distances(folder: Path, kind: int) -> str:
    """A wall at one of three distances, of which a corner is not known."""
    path = folder / f"depth-{kind}.npy"
    wall = np.full((8, 12), (1.0, 3.0, 8.0)[kind])
    wall[:2, :2] = 0
    np.save(path, wall.astype(np.float32))
    return str(path)


def mask(folder: Path, kind: int) -> str:
    """One of three labels, of which a corner is not known."""
    path, numbers = folder / f"mask-{kind}.png", np.full((8, 12), kind, np.uint8)
    numbers[:2, :2] = 255
    Image.fromarray(numbers).save(path)
    return str(path)


def sound(folder: Path, kind: int, number: int) -> str:
    path = folder / f"sound-{kind}-{number}.npy"
    np.save(
        path,
        (np.cos(np.arange(8 * 40).reshape(8, 40) * (kind + 1) / 9) + 0.1 * number / 24).astype(np.float32),
    )
    return str(path)


def wave(folder: Path, kind: int, number: int) -> str:
    """The samples of a tone of one of three pitches, and of its own length."""
    path = folder / f"wave-{kind}-{number}.npy"
    samples = np.sin(np.arange(200 + 8 * number) * (0.2 + 0.5 * kind)) + 0.1 * number / 24
    np.save(path, samples.astype(np.float32))
    return str(path)


WORDS = ("w11 w12", "w21 w22", "w31 w32")


def rows_of(task: str, folder: Path) -> Rows:
    """Rows of three kinds, told by what is read of them."""
    dice = random.Random(0)
    kinds = [(number % 3, number) for number in range(24)]
    noise = [f"w{dice.randrange(60, 80)}" for _ in kinds]
    return {
        "text2text-generation": lambda: [
            {"prompt": f"{WORDS[kind]} {noise[n]}", "completion": WORDS[(kind + 1) % 3]} for kind, n in kinds
        ],
        "automatic-speech-recognition": lambda: [
            {"audio": sound(folder, kind, n), "text": WORDS[kind]} for kind, n in kinds
        ],
        "image-classification": lambda: [
            {"image": picture(folder, kind, n), "label": "abc"[kind]} for kind, n in kinds
        ],
        "depth-estimation": lambda: [
            {"image": picture(folder, kind, n, (16, 24)), "depth_map": distances(folder, kind)}
            for kind, n in kinds
        ],
        "semantic-segmentation": lambda: [
            {"image": picture(folder, kind, n, (16, 24)), "mask": mask(folder, kind), "labels": [*"cab"]}
            for kind, n in kinds
        ],
        "object-detection": lambda: [
            {
                "image": picture(folder, kind, n, (16, 24)),
                "objects": {"bbox": [[4 * kind, 2, 8, 6 + kind]], "category": ["abc"[kind]]},
            }
            for kind, n in kinds
        ],
        "audio-classification": lambda: [
            {"audio": wave(folder, kind, n), "label": "abc"[kind]} for kind, n in kinds
        ],
        "image-text-to-text": lambda: [
            {"image": picture(folder, kind, n), "prompt": noise[n], "completion": WORDS[kind]}
            for kind, n in kinds
        ],
        "zero-shot-image-classification": lambda: [
            {"image": picture(folder, kind, n), "text": WORDS[kind]} for kind, n in kinds
        ],
        "pairs": lambda: [
            {"anchor": f"{WORDS[kind]} {noise[n]}", "positive": f"{noise[-n]} w{40 + kind}"}
            for kind, n in kinds
        ],
        "triplets": lambda: [
            {
                "anchor": f"{WORDS[kind]} {noise[n]}",
                "positive": f"w{40 + kind}",
                "negative": f"w{40 + (kind + 1) % 3}",
            }
            for kind, n in kinds
        ],
        "scores": lambda: [
            {
                "sentence1": f"{WORDS[kind]} {noise[n]}",
                "sentence2": f"w{40 + n % 2}",
                "score": float(kind % 2 == n % 2),
            }
            for kind, n in kinds
        ],
    }[task]()


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("t5", "text2text-generation", {}),
    "bart": ("bart", "text2text-generation", {}),
    "whisper": ("whisper", "automatic-speech-recognition", {}),
    "vit": ("vit", "image-classification", {}),
    "wav2vec2": ("wav2vec2", "audio-classification", {}),
    "yolos": ("yolos", "object-detection", {}),
    "segformer": ("segformer", "semantic-segmentation", {"learning_rate": 2e-2}),
    "glpn": (
        "glpn",
        "depth-estimation",
        {"learning_rate": 2e-2, "modules_to_save": ["head.head", "decoder.stages.0.convolution"]},
    ),
    "llava": ("llava", "image-text-to-text", {}),
    "clip": (
        "clip",
        "zero-shot-image-classification",
        {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3},
    ),
    "pairs": (
        "bert",
        "feature-extraction",
        {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3},
    ),
    "triplets": ("bert", "feature-extraction", {"loss": "triplet", "pooling": "cls"}),
    "scores": ("bert", "feature-extraction", {"pooling": "last"}),
}
"""Case -> the base's architecture, its task, and settings."""


def config(case: str, base: Path, folder: Path, **more: Any) -> dict[str, Any]:
    _, task, settings = CASES[case]
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n" for row in rows_of(case if task == "feature-extraction" else task, folder)
        )
    )
    return {
        "model_name_or_path": str(base),
        "task": task,
        "train_file": str(path),
        "eval_file": str(path),
        "output_dir": str(folder / case),
        "learning_rate": 1e-2,
        "max_steps": 40,
        "max_length": 40,
        "r": 8,
        **settings,
        **more,
    }


def loss_of(values: dict[str, Any], pack: Any = None) -> float:
    """The loss over the rows of a configuration: of the base, or with a pack attached to a model that is
    loaded anew.
    """
    (settings,), _ = read_config({**values, "output_dir": f"{values['output_dir']}-again"})
    task = get_task(settings.task)
    reader = reader_of(task, settings, Path(settings.model_name_or_path))
    ready = prepare(settings, task, Path(settings.model_name_or_path), reader)
    if pack is not None:
        model = load_model(task, Path(settings.model_name_or_path), pack.manifest.task.labels)
        ready = ready._replace(model=attach(model, pack))
    arguments = arguments_of(
        settings,
        f"{values['output_dir']}-runs",
        TRAINERS[settings.trainer].reading.targets
        if TRAINERS[settings.trainer].reading
        else task.training.targets,
    )
    return float(trainer_for(settings, ready, arguments, reader).evaluate()["eval_loss"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.long] * (case in {"bart", "triplets", "scores", "clip"}))
        for case in CASES
    ],
)
def test_a_task_is_learned_from_its_rows(
    case: str, base_named: Callable[[str], Path], tmp_path: Path
) -> None:
    """The loss falls below half of the base's, the pack is valid, and attached to a model that is loaded anew
    it gives the loss that it claims.
    """
    base = base_named(CASES[case][0])
    values = config(case, base, tmp_path)
    (pack,) = train(values)
    assert adapterpack.validate(tmp_path / case, base).valid
    claimed = next(metric["value"] for metric in pack.manifest.metrics if metric["name"] == "loss")
    assert claimed < 0.5 * loss_of(values)
    assert loss_of(values, load(tmp_path / case)) == pytest.approx(claimed, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_5_vl",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("llava_next", "smolvlm", "mistral3")),
    ],
)
def test_rows_with_several_images_of_any_size(family: str, tmp_path: Path) -> None:
    """In the places that LLaMA-Factory marks, in parts of messages, or before the text: rows in a batch have the
    losses of rows alone, and other pictures give others; too many marks are refused.
    """
    base, dice = make_family(family, tmp_path / "base"), np.random.default_rng(0)
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, size in zip(paths, ((24, 24), (20, 36), (20, 36)), strict=True):
        Image.fromarray(dice.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "<img>"}]

    def loss(*rows: tuple[Any, list[str]], together: int = 1) -> float:
        (tmp_path / "rows.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": asked},
                            {"role": "assistant", "content": answer},
                        ],
                        "images": images,
                    }
                )
                + "\n"
                for asked, images in rows
                for answer in [[{"type": "text", "text": "</img>"}] if isinstance(asked, list) else "</img>"]
            )
        )
        values = {"model_name_or_path": str(base), "task": "image-text-to-text", "max_length": 200}
        values |= {"train_file": str(tmp_path / "rows.jsonl"), "eval_file": str(tmp_path / "rows.jsonl")}
        return loss_of(
            {**values, "output_dir": str(tmp_path / "out"), "per_device_eval_batch_size": together}
        )

    two, one, none = ("<img> <image> </img> <image>", paths[:2]), ("<img>", paths[:1]), ("<img>", [])
    assert loss(two, one, none, together=3) == pytest.approx(
        np.mean([loss(two), loss(one), loss(none)]), rel=1e-5
    )
    assert abs(loss(two) - loss((two[0], [paths[0], paths[2]]))) > 1e-5
    assert loss((parts, paths[:1])) == pytest.approx(loss(("<image> <img>", paths[:1])), rel=1e-6)
    with pytest.raises(ConfigError, match="a mark for each of its images"):
        loss((two[0], paths))


def test_a_vision_language_model_is_adapted_where_a_server_runs_it(
    base_named: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In its language model; with other targets a warning names what a server cannot do."""

    def adapted(**more: Any) -> set[str]:
        (settings,), _ = read_config(config("llava", base_named("llava"), tmp_path, **more))
        task, base = get_task(settings.task), Path(settings.model_name_or_path)
        model = prepare(settings, task, base, reader_of(task, settings, base)).model
        return {module._site.path.split(".")[1] for module in wrappers_of(model)}

    assert adapted() == {"language_model"}
    assert "a server answers" not in caplog.text
    assert adapted(targets="all-linear") == {"language_model", "vision_tower", "multi_modal_projector"}
    assert "cannot load it while it runs or mix it" in caplog.text


@pytest.mark.long
def test_a_translation_is_generated_as_it_was_learned(
    base_named: Callable[[str], Path], tmp_path: Path
) -> None:
    """The bundle of a T5 answers with what the rows taught it."""
    values = config("t5", base_named("t5"), tmp_path, max_steps=80)
    (pack,) = train(values)
    export(base_named("t5"), [str(tmp_path / "t5")], tmp_path / "bundle", mode="bank", in_place=False)
    rows = [{"prompt": f"{WORDS[kind]} w61", "adapter": pack.name} for kind in range(3)]
    found = list(run(tmp_path / "bundle", rows, max_new_tokens=6))
    assert [row["completion"].split() for row in found] == [
        WORDS[(kind + 1) % 3].split() for kind in range(3)
    ]
    base, learned = evaluate(tmp_path / "bundle", data=values["train_file"]).measures.values()
    assert learned["exact_match"] == 1
    assert np.log(learned["perplexity"]) == pytest.approx(loss_of(values, pack), rel=1e-3)
    assert base["perplexity"] > learned["perplexity"]


@pytest.mark.parametrize(
    ("case", "rows", "more", "words"),
    [
        ("pairs", [{"a": "w1", "b": "w2"}], {}, "pairs, triplets or scored pairs.*found a, b"),
        ("pairs", [{"anchor": "w1", "positive": None}], {}, "without text.*row 1|row 1.*without text"),
        (
            "pairs",
            [{"anchor": "w1", "positive": "w2"}],
            {"loss": "triplet"},
            "triplet needs rows with a negative",
        ),
        (
            "vit",
            [{"image": "none.npy", "label": "a"}, {"image": 5, "label": "b"}],
            {},
            "none.npy|needs an image",
        ),
        ("t5", [{"prompt": "", "completion": "w1"}], {}, "nothing to read"),
        ("whisper", [{"audio": "x.wav"}], {}, "columns audio and text"),
        (
            "yolos",
            [{"image": "a.npy", "objects": {"bbox": [[0, 0, 1]], "category": ["a"]}}] * 2
            + [{"image": "a.npy", "objects": {"bbox": [[0, 0, 1, 1]], "category": ["b"]}}],
            {},
            "each box four numbers",
        ),
    ],
)
def test_rows_of_another_form_are_sentences(
    case: str,
    rows: Rows,
    more: dict[str, Any],
    words: str,
    base_named: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """What is wrong, and in which row; no pack is written."""
    values = config(case, base_named(CASES[case][0]), tmp_path, **more)
    Path(values["train_file"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError if "none" not in words else AdapterpackError, match=words):
        train({key: value for key, value in values.items() if key != "eval_file"})
    assert not (tmp_path / case).exists()
