"""Creates random inputs of a task's model, ragged and padded, to trace and prove a graph on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...adapter_methods import Acts
from ...errors import Unsupported
from ...runtime import image_shape, pad
from ...runtime.media import preparation
from ...tasks import SOUNDS, Arrays, Sound, Task, reads_types, sound_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LENGTHS = (11, 4, 7)
_SMALL = (64, 96)
"""Height and width of an example for models that take images of any size."""


def config_of(base: Path) -> Any:
    """Returns the transformers config of a base, without loading the model."""
    # only building and proving a graph need torch
    from ...torch_adapters.models.load import load_config  # noqa: PLC0415

    return load_config(base)


def example(
    task: Task,
    config: PretrainedConfig,
    lengths: Sequence[int] = LENGTHS,
    *,
    model: Callable[[], Any],
    acts: Sequence[Acts] = (),
    bare: Sequence[int] = (),
    seed: int = 7,
    left: bool | None = None,
    answer: int = 5,
) -> Arrays:
    """Returns inputs for rows of these lengths, under transformers' names: ids with their mask, images, audio
    features.

    Every adapter of ``acts`` acts in the first and the last row. Rows in ``bare`` have no image, where images
    come with text; there ``model`` is called, to learn how many tokens an image takes, and for sound.
    ``left`` sets the side of padding, by default the task's. A decoder with an encoder gets ``answer``
    tokens.

    Raises:
        Unsupported: how the model hears is not known.
    """
    rng = np.random.default_rng(seed)
    inputs = Arrays()
    if "pixel_values" in task.inputs and "image_features" not in task.main.inputs:
        shape, _ = images_of(config, "height" in task.main.axes.get("pixel_values", ()))
        inputs["pixel_values"] = rng.standard_normal((len(lengths), *shape)).astype(np.float32)
    if {*SOUNDS} & {*task.inputs}:
        if (sound := sound_of(model())) is None:
            raise Unsupported(
                "the audio input of this model class is not known to export", found=type(model()).__name__
            )
        inputs |= _heard(sound, lengths, rng)
    if "input_ids" in task.inputs:
        rows = [_text_alone(rng.integers(1, _vocabulary(config), length), config) for length in lengths]
        for rule in acts:
            rows = [list(rule.woven(rows[0])), *rows[1:-1], list(rule.woven(rows[-1]))]
        if "image_features" in task.main.inputs and len(bare) < len(lengths):
            inputs |= _with_images(rows, model(), bare, rng)
        inputs |= pad(rows, 0, left=task.pads_left if left is None else left)
        if "token_type_ids" in task.inputs and reads_types(model()):
            mask = inputs["attention_mask"]
            inputs["token_type_ids"] = (np.cumsum(mask, axis=1) > 3) * mask
    if "decoder_input_ids" in task.inputs:
        start = getattr(config, "decoder_start_token_id", None)
        ids = rng.integers(1, _vocabulary(config), (len(lengths), answer))
        ids[:, 0] = 0 if start is None else start
        inputs["decoder_input_ids"] = ids
    return inputs if task.example is None else {**inputs, **task.example(config, inputs, rng)}


def _heard(sound: Sound, lengths: Sequence[int], rng: np.random.Generator) -> Arrays:
    """Returns rows of random sound, of these lengths in units, padded and with their mask; all of the longest
    length if no mask tells padding from sound.
    """
    rows = [sound.of(length if sound.masked else max(lengths)) for length in lengths]
    values = np.zeros((len(rows), *sound.of(max(lengths))), np.float32)
    for row, shape in zip(values, rows, strict=True):
        row[: shape[0]] = rng.standard_normal(shape)
    mask = np.array([[place < shape[0] for place in range(values.shape[1])] for shape in rows], np.int64)
    return {sound.name: values, **({"attention_mask": mask} if sound.masked else {})}


def _text_alone(row: np.ndarray, config: PretrainedConfig) -> list[int]:
    """Returns a row of random tokens without placeholders for images, videos or sounds."""
    taken = {getattr(config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id")}
    plain = min({1, 2, 3, 4} - taken)
    return [plain if token in taken else int(token) for token in row]


def _with_images(
    rows: list[list[int]], model: PreTrainedModel, bare: Sequence[int], rng: np.random.Generator
) -> Arrays:
    """Inserts an image after the first token of each row, and another one after the second token of the first
    row, if it has one; returns the images in the order of their tokens, of several sizes where the model
    takes any.
    """
    from .vision_parts import Vision  # noqa: PLC0415 - torch only for a model

    form = Vision(model)
    seeing = [number for number in range(len(rows)) if number not in bare]
    places = [(seeing[0], 2)] * (len(rows[seeing[0]]) > 1) + [(row, 1) for row in seeing]
    images = form.example(len(places), rng)
    lengths = form.layout.lengths(form.layout.whole(images))
    if len(places) > len(seeing):
        lengths[:2] = lengths[1::-1]
    for (row, place), length in zip(places, lengths, strict=True):
        rows[row][place:place] = [model.config.image_token_id] * length
    return images


def _vocabulary(config: PretrainedConfig) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


def images_of(config: PretrainedConfig, free: bool) -> tuple[tuple[int, int, int], bool]:
    """Returns the shape of the images of an example, and whether they may have any size: where the config
    names none, or ``free`` overrules it, and the base's processor makes sizes that depend on the picture, or
    nobody says which.
    """
    parts = (getattr(config, name, None) for name in ("vision_config", "encoder", "backbone_config"))
    holder: Any = next((part for part in parts if hasattr(part, "image_size")), config)
    vision = holder.to_dict()
    size = vision.get("image_size")
    if size is not None and not free:
        return image_shape(vision), False
    any_size = size is None
    with contextlib.suppress(Unsupported):
        made = preparation(Path(config._name_or_path)).extent
        size = made or size
        any_size = made is None
    return image_shape({**vision, "image_size": size or _SMALL}), any_size
