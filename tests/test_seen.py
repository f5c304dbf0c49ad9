"""What models see in pictures of any size: objects with boxes, and depth, as transformers answers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import jaccard_score
from test_pictures import encoded, photo

from adapterpack import Session, evaluate, export, run, train
from adapterpack.errors import ConfigError, Unsupported
from adapterpack.runtime.media.image_processing import bytes_in, picture
from adapterpack.runtime.media.processor_config import _MORE, preparation
from adapterpack.tasks.depth_estimation import DepthOptions
from adapterpack.tasks.depth_estimation import result as depth_of
from adapterpack.tasks.object_detection import DetectionOptions, result
from adapterpack.tasks.one_pass import PreparedRow
from adapterpack.tasks.semantic_segmentation import SegmentationOptions
from adapterpack.tasks.session import RowHead
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.adapt import attach
from adapterpack.torch_adapters.models.load import load_model

BY_NAME = {one.name: one for one in ARCHITECTURES}
SIZES: dict[str, list[dict[str, Any]]] = {
    "": [{}, {"size": {"height": 13, "width": 9}}],
    "Detr": [{"size": {"shortest_edge": 20, "longest_edge": 29}}, {"size": 20, "max_size": 29}],
    "DPT": [{"size": {"height": 40, "width": 48}}, {"size": 20}],
    "GLPN": [{"size_divisor": 4}],
}


@pytest.mark.fast
@pytest.mark.parametrize("kind", _MORE)
def test_pictures_are_what_their_processors_make_of_them(kind: str, tmp_path: Path) -> None:
    """Of detectors, of models of segments and of depth: each with its ways to choose a size."""
    detects = kind.startswith(("Detr", "Conditional", "Deformable", "Yolos"))
    family = "Detr" if detects else next((name for name in SIZES if name and kind.startswith(name)), "")
    for config in SIZES[family][: 1 if detects and kind != "DetrImageProcessor" else None]:
        processor = getattr(transformers, kind + "Pil")(**config)
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": kind, **config})
        )
        how = preparation(tmp_path)
        for size in ((37, 23), (23, 64), (29, 29)):
            image = photo(size=size)
            if min(how.resize(image.height, image.width)) == 0:
                continue  # a picture that is too flat, for which transformers fails
            expected = processor(image, return_tensors="np")["pixel_values"][0]
            found = picture(encoded(image), how)
            assert found.shape == expected.shape, (config, size)
            assert np.abs(found - expected).max() <= 1e-5, (config, size)


@pytest.mark.fast
@pytest.mark.parametrize(
    "kind", ["DetrImageProcessor", "DeformableDetrImageProcessor", "RTDetrImageProcessor"]
)
def test_boxes_are_those_of_transformers(kind: str) -> None:
    """Of heads with and without a number for no object, and of an adapter with fewer labels than others."""
    dice = np.random.default_rng(3)
    width = 4 if kind == "DetrImageProcessor" else 3
    logits, boxes = dice.normal(size=(1, 9, width)) * 3, dice.uniform(0.2, 0.8, (1, 9, 4))
    outputs = {"logits": logits.astype(np.float32), "pred_boxes": boxes.astype(np.float32)}
    expected = getattr(transformers, kind + "Pil")().post_process_object_detection(
        transformers.models.detr.modeling_detr.DetrObjectDetectionOutput(
            **{name: torch.from_numpy(array) for name, array in outputs.items()}
        ),
        threshold=0.4,
        target_sizes=[(30, 70)],
    )[0]
    more = np.full((1, 9, 2), -1e9, np.float32)  # of labels that another adapter of the bank has
    outputs["logits"] = np.concatenate([outputs["logits"], more], -1)
    head = RowHead(True, ("a", "b", "c"))
    found = result(None, PreparedRow({}, (30, 70)), outputs, head, DetectionOptions(0.4))["objects"]
    order = np.argsort(-expected["scores"].numpy(), kind="stable")
    assert len(found) >= len(order) > 2
    for one, at in zip(found, order, strict=False):
        assert one["label"] == "abc"[int(expected["labels"][at])]
        assert one["score"] == pytest.approx(float(expected["scores"][at]), abs=2e-6)
        assert [*one["box"].values()] == pytest.approx(expected["boxes"][at].tolist(), abs=2e-3)
    with pytest.raises(ConfigError, match="the threshold is"):
        DetectionOptions("0.4")  # type: ignore[arg-type]


def test_objects_in_pictures_of_any_size_are_those_of_transformers(tmp_path: Path) -> None:
    """A bank of YOLOS: pictures of three sizes with and without an adapter, boxes in their own pixels."""
    torch.set_num_threads(1)
    architecture, task = BY_NAME["yolos"], get_task("object-detection")
    base = make_base(architecture, tmp_path / "base")
    size = {"height": 16, "width": 24}
    processor = transformers.YolosImageProcessorPil(size=size)
    processor.save_pretrained(base)
    pack = make_pack(architecture, base, KINDS[0])
    export(base, [pack], tmp_path / "bundle", mode="bank", in_place=False)
    photos = [photo(size=size, seed=number) for number, size in enumerate(((60, 40), (40, 60), (31, 31)))]
    names, rows = [None, pack.name, pack.name], []
    for number, (image, name) in enumerate(zip(photos, names, strict=True)):
        (tmp_path / f"{number}.png").write_bytes(encoded(image))
        rows.append({"image": str(tmp_path / f"{number}.png"), "adapter": name})
    found = [*run(tmp_path / "bundle", rows, threshold=0.2)]
    model = load_model(task, base).eval()
    for number, image in enumerate(photos):
        if number == 1:
            attach(model, pack, check_base=False)
        with torch.no_grad():
            outputs = model(pixel_values=processor(image, return_tensors="pt")["pixel_values"])
        (expected,) = processor.post_process_object_detection(
            outputs, threshold=0.2, target_sizes=[(image.height, image.width)]
        )
        objects, order = found[number]["objects"], np.argsort(-expected["scores"].numpy(), kind="stable")
        assert len(objects) == len(order) > 0
        for one, at in zip(objects, order, strict=True):
            assert one["score"] == pytest.approx(float(expected["scores"][at]), abs=1e-5)
            assert [*one["box"].values()] == pytest.approx(expected["boxes"][at].tolist(), abs=1e-2)
    data = tmp_path / "rows.jsonl"  # what the adapter finds is right: it finds all of it, the base does not
    for row, one in zip(rows[1:], found[1:], strict=True):
        boxes = [[*each["box"].values()] for each in one["objects"]]
        boxes = [[left, top, right - left, bottom - top] for left, top, right, bottom in boxes]
        names = [each["label"] for each in one["objects"]]
        with data.open("a") as file:
            file.write(
                json.dumps({"image": row["image"], "objects": {"bbox": boxes, "category": names}}) + "\n"
            )
    measures = evaluate(tmp_path / "bundle", data=str(data)).measures
    assert measures[pack.name]["map"] > 0.99 > measures["base"]["map"]


@pytest.mark.fast
def test_depth_is_as_large_as_the_picture_and_as_transformers_makes_it() -> None:
    """By torch's bicubic interpolation, larger and smaller; as numbers, and as a picture of 16 bits."""
    dice = np.random.default_rng(1)
    for own, wanted in (((12, 16), (31, 50)), ((20, 30), (7, 9)), ((5, 4), (5, 4))):
        depth = dice.uniform(0, 9, (1, *own)).astype(np.float32)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(depth)[None], size=wanted, mode="bicubic", align_corners=False
        )[0, 0].numpy()
        row, outputs = PreparedRow({}, wanted), {"predicted_depth": depth}
        head = RowHead(False, None)
        answer = depth_of(None, row, outputs, head, DepthOptions("values"))["depth"]
        assert np.abs(np.array(answer["values"]) - expected).max() <= 1e-5
        assert answer["size"] == [*wanted]
        drawn = depth_of(None, row, outputs, head, DepthOptions())["depth"]
        image = np.array(Image.open(io.BytesIO(bytes_in(drawn["png"]))))
        again = drawn["min"] + (drawn["max"] - drawn["min"]) * image / 65535
        assert np.abs(again - expected).max() <= (drawn["max"] - drawn["min"]) / 65535
    with pytest.raises(ConfigError, match="png or values"):
        DepthOptions("jpeg")  # type: ignore[arg-type]


def segments_of(answer: dict[str, Any]) -> np.ndarray:
    """The number of each pixel, from the runs of each label."""
    height, width = answer["size"]
    numbers = np.full(height * width, -1)
    for segment in answer["segments"]:
        ends = np.cumsum(segment["counts"])
        for start, end in zip(ends[::2], [*ends[1::2]], strict=False):
            numbers[start:end] = segment["id"]
    return numbers.reshape(width, height).T


@pytest.mark.long
def test_segments_of_pictures_are_those_of_transformers(tmp_path: Path) -> None:
    """A bank of SegFormer: pictures of two sizes with and without an adapter, as a picture and as runs."""
    torch.set_num_threads(1)
    architecture, task = BY_NAME["segformer"], get_task("semantic-segmentation")
    base = make_base(architecture, tmp_path / "base")
    processor = transformers.SegformerImageProcessorPil(size={"height": 32, "width": 48})
    processor.save_pretrained(base)
    with torch.no_grad():  # of random weights one label is everywhere
        logits = load_model(task, base).eval()(**processor(photo(), return_tensors="pt")).logits
    weights = load_file(base / "model.safetensors")
    weights["decode_head.classifier.bias"] -= logits.mean((0, 2, 3))
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    pack = make_pack(architecture, base, KINDS[0])
    export(base, [pack], tmp_path / "bundle", mode="bank", in_place=False)
    photos, rows = [photo(size=(60, 40)), photo(size=(31, 43), seed=1)], []
    for number, (image, name) in enumerate(zip(photos, (None, pack.name), strict=True)):
        (tmp_path / f"{number}.png").write_bytes(encoded(image))
        rows.append({"image": str(tmp_path / f"{number}.png"), "adapter": name})
    drawn, runs = (
        [row["segmentation"] for row in run(tmp_path / "bundle", rows, format=form)]
        for form in ("png", "rle")
    )
    model, seen = load_model(task, base).eval(), set[int]()
    for number, image in enumerate(photos):
        if number == 1:
            attach(model, pack, check_base=False)
        with torch.no_grad():
            outputs = model(pixel_values=processor(image, return_tensors="pt")["pixel_values"])
        (expected,) = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(image.height, image.width)]
        )
        same = (found := segments_of(runs[number])) == expected.numpy()
        assert same.mean() > 0.999  # two labels may be as likely as the rounding can tell
        assert (np.array(Image.open(io.BytesIO(bytes_in(drawn[number]["png"])))) == found).all()
        assert [one["pixels"] for one in runs[number]["segments"]] == sorted(np.bincount(found.ravel()))[
            ::-1
        ][: len(runs[number]["segments"])]
        seen |= {*np.unique(found).tolist()}
    assert len(seen) > 1
    names, dice = Session(tmp_path / "bundle").labels(pack.name), np.random.default_rng(0)
    wanted, given, lines = [], [], []
    for number, image in enumerate(photos):
        mask = dice.integers(0, len(names), (image.height, image.width))
        mask[:2] = 255
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"mask{number}.png")
        (answer,) = run(tmp_path / "bundle", [{**rows[number], "adapter": pack.name}], format="rle")
        wanted.append(mask[2:].ravel())
        given.append(segments_of(answer["segmentation"])[2:].ravel())
        row = {"image": rows[number]["image"], "mask": str(tmp_path / f"mask{number}.png"), "labels": names}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    found = evaluate(tmp_path / "bundle", data=str(tmp_path / "rows.jsonl")).measures[pack.name]
    pair = np.concatenate(wanted), np.concatenate(given)
    assert found == {
        "miou": pytest.approx(jaccard_score(*pair, average="macro")),
        "accuracy": pytest.approx((pair[0] == pair[1]).mean()),
    }
    with pytest.raises(ConfigError, match="png or rle"):
        SegmentationOptions("jpeg")  # type: ignore[arg-type]


@pytest.mark.long
def test_depth_of_pictures_of_any_size_is_that_of_transformers(tmp_path: Path) -> None:
    """A bank of GLPN, whose processor keeps a picture's size but for a few pixels."""
    torch.set_num_threads(1)
    architecture, task = BY_NAME["glpn"], get_task("depth-estimation")
    base = make_base(architecture, tmp_path / "base")
    processor = transformers.GLPNImageProcessorPil(size_divisor=8)
    processor.save_pretrained(base)
    pack = make_pack(architecture, base, KINDS[0])
    export(base, [pack], tmp_path / "bundle", mode="bank", in_place=False)
    rows, photos = [], [photo(size=size) for size in ((37, 23), (40, 64), (25, 25))]
    for number, image in enumerate(photos):
        (tmp_path / f"{number}.png").write_bytes(encoded(image))
        rows.append({"image": str(tmp_path / f"{number}.png"), "adapter": pack.name if number else None})
    model = load_model(task, base).eval()
    for number, answer in enumerate(run(tmp_path / "bundle", rows, format="values")):
        if number == 1:
            attach(model, pack, check_base=False)
        with torch.no_grad():
            outputs = model(**processor(photos[number], return_tensors="pt"))
        size = (photos[number].height, photos[number].width)
        (expected,) = processor.post_process_depth_estimation(outputs, target_sizes=[size])
        wanted = expected["predicted_depth"].numpy()
        assert np.abs(np.array(answer["depth"]["values"]) - wanted).max() <= 2e-5 * np.abs(wanted).max()
        np.save(
            tmp_path / f"{number}.npy", np.where(wanted > np.median(wanted), 2 * wanted, 0).astype(np.float32)
        )
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in (1, 2):
            row = {"image": rows[number]["image"], "depth_map": str(tmp_path / f"{number}.npy")}
            file.write(json.dumps(row) + "\n")
    found = evaluate(tmp_path / "bundle", data=str(tmp_path / "rows.jsonl")).measures[pack.name]
    assert found == {"absolute_relative_error": pytest.approx(0.5, rel=1e-4), "delta1": 0}


def test_a_model_without_a_loss_is_not_trained(tmp_path: Path) -> None:
    """DPT for depth: the error says so, and no pack is written."""
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
    )
    transformers.DPTForDepthEstimation(config).save_pretrained(tmp_path / "base")
    np.save(tmp_path / "image.npy", np.zeros((3, 16, 16), np.float32))
    np.save(tmp_path / "depth.npy", np.ones((16, 16), np.float32))
    row = {"image": str(tmp_path / "image.npy"), "depth_map": str(tmp_path / "depth.npy")}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    settings = {
        "model_name_or_path": str(tmp_path / "base"),
        "task": "depth-estimation",
        "train_file": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "pack"),
        "max_steps": 1,
    }
    with pytest.raises(Unsupported, match="has no loss"):
        train(settings)
    assert not (tmp_path / "pack").exists()
