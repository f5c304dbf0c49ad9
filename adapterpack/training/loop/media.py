"""Reads images, speech and texts for training as a serving session does, so that both see the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...chat_templates.template import ChatTemplate
from ...errors import ConfigError, FormatError, Unsupported
from ...runtime import image_shape
from ...runtime.media import (
    SIZES,
    PictureReader,
    PicturesOfRow,
    layout_of,
    preparation,
    section,
    sized_image_of,
    sound_of,
)
from ...runtime.media.image_processing import bytes_of, numbers_in
from ...runtime.media.inputs import array_of
from ...tasks import Task
from ...tasks import sound_of as heard_by
from ...torch_adapters import empty_model, load_config, load_tokenizer
from ...torch_adapters.canaries.inputs import positions_of

_PIXELS = ("channels", "height", "width")


class Media:
    """Reads rows that are not just text, for a base and a task; loads each part when a row first needs it."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._folder, self._task = folder, task

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return load_tokenizer(self._folder)

    @cached_property
    def config(self) -> Any:
        """The base's configuration."""
        return load_config(self._folder, self._task)

    @cached_property
    def image_token(self) -> int:
        """The id that marks one position of an image.

        Raises:
            Unsupported: the base has none.
        """
        token = getattr(self.config, "image_token_id", None)
        if not isinstance(token, int):
            raise Unsupported(
                "the base's config names no token that stands for an image (image_token_id)",
                where=self._folder,
                found=self.config.model_type,
            )
        return token

    @cached_property
    def reader(self) -> PictureReader:
        """Reads the pictures of texts as a server does.

        Raises:
            Unsupported: the base's texts have no token for images, or it has no tower for them.
        """
        tower = self._model.get_encoder("image")
        takes = signature(tower.forward).parameters
        names = {"grid_thw": "patch_positions", "pixel_position_ids": "pixel_position_ids"}
        patched = [name for asked, name in names.items() if asked in takes]
        layout = layout_of(self.config.to_dict(), patched, "image_sizes" in takes)
        if layout.fixed:
            layout.positions = self._positions(tower, layout.vision)
        token = self.tokenizer.convert_ids_to_tokens(self.image_token)
        return PictureReader(self._folder, layout, _PIXELS, token)

    def _positions(self, tower: Any, vision: Mapping[str, Any]) -> int:
        """Returns how many features a row of the tower's images has, with that for the end of a line."""
        config = self.config
        shape = image_shape(vision)
        if "patch_attention_mask" in signature(tower.forward).parameters:
            side = int(shape[-1] // vision["patch_size"] // config.scale_factor)
            return side * side
        if not getattr(config, "image_grid_pinpoints", None):
            return positions_of(self._model, shape)
        with torch.no_grad():  # a tile, whose first feature may be that of its class
            features = tower(torch.zeros(1, *shape, device="meta", dtype=tower.dtype)).last_hidden_state
        return int(features.shape[1]) + bool(config.vision_feature_select_strategy != "default")

    @cached_property
    def frame(self) -> str:
        """What a text has in the place of a picture: the mark, with what the chat template writes around."""
        mark, template = self.reader.mark, self.tokenizer.chat_template
        if not isinstance(template, str):
            return mark
        after = {"type": "text", "text": "what follows"}
        try:
            alone, whole = (
                ChatTemplate(template).render(
                    [{"role": "user", "content": [*parts, after]}], self.tokenizer.special_tokens_map
                )
                for parts in ([], [{"type": "image"}])
            )
        except FormatError:
            return mark
        before = alone.partition(after["text"])[0]
        frame = whole.removeprefix(before).partition(after["text"])[0]
        return frame if mark in frame and whole.startswith(before) else mark

    def pictures(self, given: Sequence[Any], where: object) -> PicturesOfRow:
        """Returns the pictures of a row, each from a path, the bytes of a PNG or JPEG file, a ``.npy`` file,
        or an image of a data set.

        Raises:
            Unsupported: the model reads several pictures of a text in another way than one.
        """
        found = [content_of(one, where, "an image", "the path of a picture") for one in given]
        seen = tuple(self.reader.read(one, len(found) == 1) for one in found)
        if any(not picture.arrays.get(SIZES, np.ones(1)).all() for picture in seen):
            raise Unsupported(
                "this model is trained with one picture in a row here", where=where, found=len(found)
            )
        return PicturesOfRow(seen)

    def pixels(self, picture: Any, where: object) -> np.ndarray:
        """Returns one image as ``pixel_values`` ``[channels, height, width]``, from a path or the bytes of a
        PNG or JPEG file, a ``.npy`` file, or an image of a data set.
        """
        return self.sized_pixels(picture, where)[0]

    def sized_pixels(self, picture: Any, where: object) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as :meth:`pixels` does, and its own height and width."""
        given = content_of(picture, where, "an image", "the path of a picture")
        return sized_image_of(given, _PIXELS, lambda: self._preparation)

    def map(self, path: str) -> np.ndarray:
        """Returns a number for each pixel ``[height, width]``, from a ``.npy`` file."""
        return array_of(Path(path), _PIXELS[1:], "a map")

    def mask(self, picture: Any, where: object) -> np.ndarray:
        """Returns the number of each pixel ``[height, width]`` of a PNG of one channel."""
        given = content_of(picture, where, "a mask", "the path of a PNG")
        return numbers_in(given if isinstance(given, bytes) else bytes_of(Path(given)), given)

    def sound(self, recording: Any, where: object) -> dict[str, np.ndarray]:
        """Returns the inputs of one recording: from the path or the bytes of a ``.wav`` file, or from a
        ``.npy`` file.
        """
        given = content_of(recording, where, "audio", "the path of a file")
        if (sound := self._sound) is None:
            raise Unsupported(
                "the base's model class has no input of audio that is known here",
                where=where,
                found=self.config.model_type,
            )
        shape = ["sequence", *sound.shape[1:]] if sound.unit else sound.shape
        values = sound_of(given, shape, self._extractor)
        mask = {"attention_mask": np.ones(len(values), np.int64)} if sound.masked else {}
        return {sound.name: values, **mask}

    @cached_property
    def _model(self) -> Any:
        return empty_model(self._folder, self._task)

    @cached_property
    def _sound(self) -> Any:
        return heard_by(self._model)

    @cached_property
    def masks_pixels(self) -> bool:
        """Whether the model tells padding from pixels by a mask."""
        return "pixel_mask" in signature(self._model.forward).parameters

    @cached_property
    def _extractor(self) -> Any:
        return section(self._folder, "feature_extractor")[0]

    @cached_property
    def _preparation(self) -> Any:
        return preparation(self._folder)


def content_of(given: Any, where: object, what: str, expected: str) -> str | bytes:
    """Returns the path or the bytes of a file in a row of data; data sets hold both in a mapping."""
    if isinstance(given, dict):
        given = given.get("bytes") or given.get("path")
    if not isinstance(given, str | bytes):
        raise ConfigError(f"a row needs {what}", where=where, expected=expected, found=type(given).__name__)
    return given
