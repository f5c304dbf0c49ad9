"""Creates random inputs of a task's model, ragged and padded, to trace and prove a graph on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...adapter_methods.core.token_positions import Acts
from ...runtime.media.image_layouts import image_shape
from ...runtime.padding import pad
from ...tasks.session import Arrays
from ...tasks.task import Task, reads_types

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LENGTHS = (11, 4, 7)


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
    come with text; only there ``model`` is called, to learn how many tokens an image takes. ``left`` sets the
    side of padding, by default the task's. A decoder with an encoder gets ``answer`` tokens.

    Raises:
        Unsupported: the model's config does not say how large its images are.
    """
    rng, inputs = np.random.default_rng(seed), Arrays()
    if "pixel_values" in task.inputs and "image_features" not in task.main.inputs:
        vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
        shape = (len(lengths), *image_shape(vision.to_dict()))
        inputs["pixel_values"] = rng.standard_normal(shape).astype(np.float32)
    if "input_features" in task.inputs:
        sizes = (len(lengths), config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = rng.standard_normal(sizes).astype(np.float32)
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


def _text_alone(row: np.ndarray, config: PretrainedConfig) -> list[int]:
    """Returns a row of random tokens without placeholders for images, videos or sounds."""
    taken = {getattr(config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id")}
    plain = min({1, 2, 3, 4} - taken)
    return [plain if token in taken else int(token) for token in row]


def _with_images(
    rows: list[list[int]], model: PreTrainedModel, bare: Sequence[int], rng: np.random.Generator
) -> Arrays:
    """Inserts an image after the first token of each row, and another one after the second token of the first
    row; returns the images in the order of their tokens, of several sizes where the model takes any.
    """
    from .vision_parts import Vision  # noqa: PLC0415 - torch only for a model

    form, seeing = Vision(model), [number for number in range(len(rows)) if number not in bare]
    images = form.example(len(seeing) + 1, rng)
    lengths = form.layout.lengths(form.layout.whole(images))
    lengths[:2] = lengths[1::-1]
    for row, length, place in zip([seeing[0], *seeing], lengths, [2, *[1] * len(seeing)], strict=True):
        rows[row][place:place] = [model.config.image_token_id] * length
    return images


def _vocabulary(config: PretrainedConfig) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)
