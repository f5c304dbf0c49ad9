"""Pictures in files and bytes: prepared as the processors of transformers do, within limits, through bundles
of models that see.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS
from click.testing import CliRunner
from PIL import Image

from adapterpack import Session, export, run
from adapterpack.base.base_folder import carried_files
from adapterpack.cli.commands.run import command
from adapterpack.errors import AdapterpackError, ConfigError, FormatError, MissingExtra, Unsupported
from adapterpack.runtime.media.image_processing import MOST_BYTES, bytes_in, picture
from adapterpack.runtime.media.inputs import image_of
from adapterpack.runtime.media.processor_config import _KINDS, Preparation, preparation, section
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

SAME = 1e-6
"""Of normalised pixels of size 1 to 3: the same steps in float32."""
SEES = {"size": {"height": 12, "width": 12}}
PLAIN = Preparation(None, (4, 6), 2, None, 1 / 255, None, None)


def photo(mode: str = "RGB", size: tuple[int, int] = (37, 23), seed: int = 0) -> Image.Image:
    """Noise on a slope: neither flat nor the same in every corner."""
    height, width = size[1], size[0]
    slope = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] + np.array([0, 40, 90])
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    return Image.fromarray(np.clip(slope + noise, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned() -> bytes:
    """A JPEG whose camera was held on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), "JPEG", exif=exif)


PICTURES = {
    "png": lambda: encoded(photo()),
    "jpeg": lambda: encoded(photo(size=(64, 48)), "JPEG"),
    "turned": turned,
    "gray": lambda: encoded(photo("L")),
    "palette": lambda: encoded(photo("P")),
    "transparent": lambda: encoded(photo("RGBA")),
    "cmyk": lambda: encoded(photo("CMYK"), "JPEG"),
    "tall and small": lambda: encoded(photo(size=(3, 11))),
    "one pixel": lambda: encoded(photo(size=(1, 1))),
}

CONFIGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "sizes": {"size": {"height": 13, "width": 9}, "crop_size": {"height": 7, "width": 8}},
    "shorter edge": {
        "size": {"shortest_edge": 15},
        "crop_size": {"height": 20, "width": 9},
        "do_center_crop": True,
    },
    "one number": {"size": 15, "crop_size": 12},
    "no scale": {
        "do_rescale": False,
        "do_normalize": False,
        "size": {"height": 5, "width": 5},
        "do_center_crop": False,
    },
    "other moments": {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "rescale_factor": 1 / 127.5,
        "resample": 1,
        "size": {"height": 9, "width": 11},
        "do_center_crop": False,
    },
    "no resize": {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 21, "width": 21}},
}


@pytest.mark.fast
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", _KINDS)
def test_pictures_are_what_the_processor_of_transformers_makes_of_them(
    kind: str, config: str, tmp_path: Path
) -> None:
    """Every known processor with every form of its configuration, from both of its files, on pictures of all
    kinds: within 1e-6.
    """
    processor = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    theirs = processor(**CONFIGS[config])
    assert theirs.backend == "pil"
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_bytes())
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "processor_config.json").write_text(
        json.dumps({"image_processor": saved, "processor_class": "Any"})
    )
    (tmp_path / "new" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "terse").mkdir()
    (tmp_path / "terse" / "preprocessor_config.json").write_text(
        json.dumps(
            {**CONFIGS[config], "feature_extractor_type": kind.replace("ImageProcessor", "FeatureExtractor")}
        )
    )
    for make in PICTURES.values():
        data = make()
        expected = theirs(
            transformers.image_utils.load_image(Image.open(io.BytesIO(data))), return_tensors="np"
        )["pixel_values"][0]
        for folder in (tmp_path, tmp_path / "new", tmp_path / "terse"):
            found = picture(data, preparation(folder))
            assert found.dtype == np.float32
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() <= SAME * max(1, np.abs(expected).max())


@pytest.mark.fast
def test_what_a_configuration_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    """No file, a processor that cuts tiles, padding, and numbers that cannot be: each is an error that names
    the file.
    """
    with pytest.raises(Unsupported, match="not known") as caught:
        preparation(tmp_path)
    assert "npy" in str(caught.value.remedy)
    path = tmp_path / "preprocessor_config.json"
    vit: dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
    for config, error in (
        ({"image_processor_type": "LlavaNextImageProcessor"}, Unsupported),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, Unsupported),
        ({**vit, "size": {"height": 0, "width": 5}}, ConfigError),
        ({**vit, "size": {"height": 5}}, ConfigError),
        ({**vit, "size": 10**9}, ConfigError),
        ({**vit, "size": "large"}, ConfigError),
        ({**vit, "size": {"shortest_edge": 3, "longest_edge": 9}}, ConfigError),
        ({**vit, "do_center_crop": True, "crop_size": {"shortest_edge": 5}}, ConfigError),
        ({**vit, "do_center_crop": True}, ConfigError),
        ({**vit, "image_std": [0, 1, 1]}, ConfigError),
        ({**vit, "image_mean": 0.5}, ConfigError),
        ({**vit, "image_mean": [0.5, True, 0.5]}, ConfigError),
        ({**vit, "rescale_factor": "1"}, ConfigError),
        ({**vit, "resample": 9}, ConfigError),
        ([], FormatError),
    ):
        path.write_text(json.dumps(config))
        with pytest.raises(error) as wrong:
            preparation(tmp_path)
        assert str(path) in str(wrong.value), config


@pytest.mark.fast
def test_limits_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many bytes, a header of a billion pixels, a line that would become a plane: refused without a
    pixel.
    """
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))

    def headed(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunk = (
            struct.pack(">I", len(header))
            + b"IHDR"
            + header
            + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        )
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk
            + struct.pack(">I", 0)
            + b"IDAT"
            + struct.pack(">I", zlib.crc32(b"IDAT"))
        )

    # the second one by Pillow itself
    for data, text in (
        (headed(6000, 6000), "too large"),
        (headed(40000, 30000), "exceeds limit"),
        (b"\xff\xd8\xff" + bytes(MOST_BYTES), "too large"),
    ):
        with pytest.raises(FormatError, match=text):
            picture(data, PLAIN)
    with pytest.raises(FormatError, match="too large"):
        bytes_in("data:image/png;base64," + "A" * (MOST_BYTES * 4 // 3 + 8))
    monkeypatch.undo()
    with pytest.raises(FormatError, match="too long"):
        picture(encoded(photo(size=(20000, 1))), PLAIN._replace(shortest=224, size=None))


@pytest.mark.fast
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    """Other kinds of files, more than eight bits, half of a file, a text that is not base 64."""
    gif, deep = (
        encoded(photo("P"), "GIF"),
        encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))),
    )
    for data, error, text in (
        (gif, Unsupported, "PNG and JPEG"),
        (b"", Unsupported, "PNG and JPEG"),
        (deep, Unsupported, "eight bits"),
        (encoded(photo())[:300], FormatError, "cannot be decoded"),
        (encoded(photo(), "JPEG")[:60], FormatError, "cannot be decoded"),
    ):
        with pytest.raises(error, match=text):
            picture(data, PLAIN)
    for uri in ("data:image/png,abc", "data:image/png;base64", "data:image/png;base64,%%%%"):
        with pytest.raises(FormatError, match="base 64"):
            bytes_in(uri)
    with pytest.raises(AdapterpackError, match=r"absent\.png"):
        image_of(str(tmp_path / "absent.png"), (3, 4, 6), partial(preparation, tmp_path))


@pytest.mark.fast
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_altered_bytes_give_a_picture_or_a_named_error(form: str) -> None:
    """Two hundred pictures with a few other bytes, or cut short: nothing else is raised."""
    whole, rng = encoded(photo(size=(16, 12)), form), np.random.default_rng(4)
    kept = 0
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(3 if form == "JPEG" else 8, len(data), rng.integers(1, 5)):
            data[place] = rng.integers(256)
        try:
            kept += picture(
                bytes(data[: rng.integers(20, len(data) + 1)] if rng.random() < 0.3 else data), PLAIN
            ).shape == (3, 4, 6)
        except (FormatError, Unsupported):
            continue
    assert 0 < kept < 200


@pytest.mark.fast
def test_without_pillow_the_error_names_the_extra_and_arrays_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is not there to import: a picture is refused with the remedy, an array and a ``.npy`` file
    are taken.
    """
    transformers.ViTImageProcessorPil(**SEES).save_pretrained(tmp_path)
    data = encoded(photo())
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match="PIL") as caught:
        image_of(data, (3, 12, 12), partial(preparation, tmp_path))
    assert "adapterpack[vision]" in str(caught.value.remedy)
    array = np.random.default_rng(0).normal(size=(3, 12, 12)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    for given in (array, array[None], tmp_path / "a.npy", str(tmp_path / "a.npy")):
        assert np.array_equal(image_of(given, (3, 12, 12), partial(preparation, tmp_path)), array)


def test_a_processor_configuration_that_is_exchanged_while_a_session_runs(
    seeing: Any, tmp_path: Path
) -> None:
    """What the session reads when it prepares its first picture is what it compared with the manifest, or
    refused.
    """
    bundle = Path(shutil.copytree(seeing("vit")[1], tmp_path / "bundle"))
    session = Session(bundle, "cpu")
    path = bundle / "preprocessor_config.json"
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.4"))
    with pytest.raises(FormatError, match="not the one that its manifest lists"):
        session.pixels([encoded(photo())])


@pytest.mark.fast
def test_the_shape_is_compared_before_a_picture_is_decoded(tmp_path: Path) -> None:
    """A processor that makes other images than the graph takes is told from the configuration alone."""
    transformers.ViTImageProcessorPil(**SEES).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="processor's configuration"):
        image_of(b"\x89PNG\r\n\x1a\nno picture at all", (3, 14, 14), partial(preparation, tmp_path))
    with pytest.raises(FormatError, match="another form"):
        image_of(np.zeros((3, 14, 12), np.float32), (3, 12, 12), partial(preparation, tmp_path))


# --- through bundles


@pytest.fixture(scope="module")
def seeing(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Architecture -> its base with a processor and a tokenizer, and a bank with one adapter."""
    torch.set_num_threads(1)
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            (architecture,) = (one for one in ARCHITECTURES if one.name == name)
            folder = tmp_path_factory.mktemp(name)
            base = make_base(architecture, folder / "base")
            for path in tiny_bert.glob("*token*"):
                shutil.copyfile(path, base / path.name)
            if name == "llava":
                transformers.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=12).save_pretrained(
                    base
                )
                whole = json.loads((base / "preprocessor_config.json").read_bytes())
                (base / "preprocessor_config.json").unlink()
                (base / "processor_config.json").write_text(json.dumps({"image_processor": whole}))
            else:
                transformers.ViTImageProcessorPil(**SEES).save_pretrained(base)
            export(base, [make_pack(architecture, base, KINDS[0])], folder / "bundle", mode="bank")
            made[name] = base, folder / "bundle"
        return made[name]

    return make


def test_a_picture_in_any_form_gives_what_torch_makes_of_it(
    seeing: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """A classifier: path, bytes, text, array and ``.npy`` file are one image; the graph answers as torch does
    on the processor's pixels.
    """
    base, bundle = seeing("vit")
    data = encoded(photo())
    (tmp_path / "photo.png").write_bytes(data)
    prepared = transformers.ViTImageProcessorPil(**SEES)(photo(), return_tensors="np")["pixel_values"]
    np.save(tmp_path / "photo.npy", prepared)
    text = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    given = [
        str(tmp_path / "photo.png"),
        tmp_path / "photo.png",
        data,
        bytearray(data),
        text,
        prepared,
        str(tmp_path / "photo.npy"),
    ]
    rows = list(run(bundle, [{"image": one} for one in given], adapters=["low-rank"]))
    assert all(row["scores"] == rows[0]["scores"] for row in rows)
    session = Session(bundle, "cpu")
    assert np.abs(session.pixels(given[:1]) - prepared).max() <= SAME
    with torch.no_grad():
        logits = (
            load_model(get_task("image-classification"), base)
            .eval()(pixel_values=torch.from_numpy(prepared))
            .logits.numpy()
        )
    assert np.abs(session.run({"pixel_values": session.pixels([data])})["logits"] - logits).max() <= 1e-5
    done = CliRunner().invoke(
        command, [str(bundle), "--adapter", "low-rank", "--image", str(tmp_path / "photo.png"), "--json"]
    )
    assert json.loads(done.stdout)["scores"] == rows[0]["scores"]
    with pytest.raises(ConfigError, match="image"):
        list(run(bundle, [{"image": 7, "text": "no"}]))


@pytest.mark.long
def test_processors_are_carried_into_bundles_and_pictures_go_with_prompts(
    seeing: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """LLaVA, whose processor lies in the newer file: a JPEG beside a prompt gives the tokens that its pixels
    give.
    """
    base, bundle = seeing("llava")
    assert (bundle / "processor_config.json").read_bytes() == (base / "processor_config.json").read_bytes()
    assert section(bundle, "image_processor")[1].name == "processor_config.json"
    (tmp_path / "photo.jpg").write_bytes(encoded(photo(), "JPEG"))
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=12)
    pixels = theirs(Image.open(tmp_path / "photo.jpg"), return_tensors="np")["pixel_values"]
    rows = [{"prompt": "w5 w6", "image": str(tmp_path / "photo.jpg")}, {"prompt": "w5 w6", "image": pixels}]
    one, two = (row["completion"] for row in run(bundle, rows, max_new_tokens=5))
    assert one == two != ""
    assert {"preprocessor_config.json", "processor_config.json"} & {
        path.name for path in carried_files(seeing("vit")[0])
    }


def test_a_feature_extractor_in_the_newer_file_is_read(tmp_path: Path) -> None:
    """Whisper's processor writes its sections into one file."""
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"feature_extractor": {"sampling_rate": 8000}, "image_processor": None})
    )
    assert section(tmp_path, "feature_extractor")[0] == {"sampling_rate": 8000}
    assert section(tmp_path, "image_processor")[0] == {}
