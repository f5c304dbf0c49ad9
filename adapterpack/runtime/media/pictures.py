"""Reads the pictures of texts: as the arrays that the model's processor makes of them, and as the texts that
stand for them in a prompt.

Pictures that are only resized and cropped need no other library; those that are cut into tiles or patches are
prepared by transformers' own image processors, with the settings in the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, Unsupported
from ...extras import needed_by
from ...io import Config
from ...library_errors import library_errors
from ...tasks import Arrays
from ...tasks.data import Picture
from ..text import read_object
from .image_layouts import GRIDS, IMAGES, PIXELS, SIZES, ImageLayout
from .image_processing import MOST_PIXELS, decode
from .inputs import extend, find_bytes, image_of
from .processor_config import FILES, Preparation, kind_in, preparation, section

_MASK = "pixel_attention_mask"


class SeenPicture(NamedTuple):
    """A picture as arrays of one image, the text for it in a prompt, and how many image tokens that has."""

    arrays: Arrays
    text: str
    length: int = 0


class PicturesOfRow(NamedTuple):
    """The pictures of a row of training data, in the order of its text."""

    pictures: tuple[SeenPicture, ...]


class _Told(NamedTuple):
    """What the text of a picture depends on: the image token, how often the picture takes it, further fields
    that its processor gives, and the bundle's settings for processors and tokenizers.
    """

    token: str
    length: int
    found: Mapping[str, Any]
    settings: Config

    def special(self, name: str, usual: str) -> str:
        """Returns a special token by its name in the settings."""
        value = self.settings.get(name, usual)
        return str(value.get("content", usual) if isinstance(value, dict) else value)


def _repeat(told: _Told) -> str:
    return told.token * told.length


def _in_lines(told: _Told) -> str:
    """Each line of an image ends with a token, the last one with another (PixtralProcessor)."""
    height, width = (int(edge) for edge in told.found[SIZES][0])
    lines = round((told.length * height / width) ** 0.5)
    line = told.token * (told.length // lines) + told.special("image_break_token", "[IMG_BREAK]")
    end = told.special("image_end_token", "[IMG_END]")
    text: str = (line * lines).removesuffix(told.special("image_break_token", "[IMG_BREAK]")) + end
    return text


def _in_tiles(told: _Told) -> str:
    """Rows and columns of tiles, and the whole image after them (Idefics3Processor, SmolVLMProcessor)."""
    rows, columns = (int(told.found[name][0][0]) for name in ("rows", "cols"))
    fake = told.special("fake_image_token", "<fake_token_around_image>")
    tile = told.token * (told.length // (rows * columns + 1))
    lines = [
        "".join(f"{fake}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    whole = f"{fake}{told.special('global_image_token', '<global-img>')}{tile}{fake}"
    return "".join([*lines, "\n"]) + whole if rows else whole


def _frame(start: tuple[str, str], end: tuple[str, str]) -> Callable[[_Told], str]:
    """A token before and one after, each by its name in the settings and its usual value (InternVLProcessor,
    Gemma4Processor).
    """
    return lambda told: f"{told.special(*start)}{_repeat(told)}{told.special(*end)}"


def _apart(told: _Told) -> str:
    """Between empty lines, a token before and one after (Gemma3Processor)."""
    if np.any(told.found.get("num_crops", 0)):
        raise Unsupported(
            "the model's processor cuts this picture into crops, and writes texts about them",
            found="do_pan_and_scan",
            remedy="set do_pan_and_scan to false in the base's processor configuration",
        )
    return f"\n\n{_frame(_START, ('eoi_token', '<end_of_image>'))(told)}\n\n"


_START = "boi_token", "<start_of_image>"


def _in_numbered_tiles(told: _Told) -> str:
    """Tiles in order, each after its number, and the whole image after them (AyaVisionProcessor)."""
    count = len(told.found[PIXELS])
    numbered = [f"{told.special('tile_token', 'TILE')}_{number}" for number in range(1, count)]
    tile = told.token * (told.length // count)
    inside = "".join(name + tile for name in [*numbered, told.special("tile_global_token", "TILE_GLOBAL")])
    start = told.special("start_of_img_token", "<|START_OF_IMG|>")
    return f"{start}{inside}{told.special('end_of_img_token', '<|END_OF_IMG|>')}"


def _merged_patches(written: Config) -> dict[str, int]:
    """Edges are multiples of what becomes one token (PixtralProcessor)."""
    return {"patch_size": int(written.get("patch_size", 16)) * int(written.get("spatial_merge_size", 1))}


class _Kind(NamedTuple):
    """How a processor's pictures are written in a text; ``options`` are those that the model's processor
    always gives it, from its own settings, and ``small`` says that it reads several pictures of a text
    without their tiles. ``mark`` are the setting with the mark of a picture and its usual value, where that
    is not the image token.
    """

    text: Callable[[_Told], str] = _repeat
    options: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda written: {}
    small: bool = False
    mark: tuple[str, str] | None = None


_SPLIT = _Kind(_in_tiles, lambda written: {"return_row_col_info": True})
_KINDS = {
    "Qwen2VLImageProcessor": _Kind(),
    "LlavaNextImageProcessor": _Kind(),
    "LlavaOnevisionImageProcessor": _Kind(small=True),
    "PixtralImageProcessor": _Kind(_in_lines, _merged_patches),
    "Idefics3ImageProcessor": _SPLIT,
    "SmolVLMImageProcessor": _SPLIT,
    "GotOcr2ImageProcessor": _Kind(
        _frame(("start_image_token", "<img>"), ("end_image_token", "</img>")),
        lambda written: {"crop_to_patches": True},
    ),
    "Gemma3ImageProcessor": _Kind(_apart, mark=_START),
    "DeepseekVLImageProcessor": _Kind(),
    "Gemma4ImageProcessor": _Kind(_frame(("boi_token", "<|image>"), ("eoi_token", "<image|>"))),
    "Glm4vImageProcessor": _Kind(),
    "AyaVisionProcessor": _Kind(
        _in_numbered_tiles, lambda written: {"crop_to_patches": True}, mark=("image_token", "<image>")
    ),
}
"""Image processors that transformers has, and processors of texts with images that write those of an image
processor in a way of their own.
"""
_ENDS = {"PaliGemmaProcessor": "\n"}
"""How a processor ends every prompt."""
_WRITERS = (
    *("AyaVision", "DeepseekVL", "Gemma3", "Gemma4", "Glm4v", "Idefics3", "InternVL", "Llava", "LlavaNext"),
    *("LlavaOnevision", "PaliGemma", "Pixtral", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "SmolVLM"),
)
"""Processors of texts with images that write pictures as this module does."""


class PictureReader:
    """Reads pictures for the model in ``folder``. ``shape`` is that of one row of the graph's pixels, and
    ``token`` the text of the image token. ``mark`` stands for a picture in a prompt, and a processor that
    says how prompts end has the token ``start`` after the last picture and ``end`` after the text.

    Raises:
        ConfigError: a number of the processor's configuration is too large.
    """

    def __init__(self, folder: Path, layout: ImageLayout, shape: Sequence[Any], token: str) -> None:
        self._folder = folder
        self._layout = layout
        self._shape = shape
        self._token = token
        written, where = section(folder, "image_processor")
        tokenizer, whole = (read_object(folder / name) for name in ("tokenizer_config.json", FILES[0]))
        self._settings = {**tokenizer, **read_object(folder / FILES[1]), **whole}
        self._writer = of = str(self._settings.get("processor_class", ""))
        self._kind = _KINDS.get(of, _KINDS.get(kind_in(written)))
        self._options = {} if self._kind is None else self._kind.options(whole)
        marked = None if self._kind is None else self._kind.mark
        self.mark = token if marked is None else _Told(token, 0, {}, self._settings).special(*marked)
        self.end = _ENDS.get(of, "")
        self.start = _Told(token, 0, {}, self._settings).special("bos_token", "") if self.end else ""
        if self._kind is not None:
            _require_numbers([written, self._options], where)

    @property
    def plain(self) -> bool:
        """Whether a picture is its image tokens and nothing else."""
        return self._kind is None or self._kind.text is _repeat

    def with_start(self, ids: list[int], image: int, start: int | None) -> list[int]:
        """Returns a prompt's ids with the ``start`` token after its last ``image`` token, wherever the
        tokenizer wrote it, if at all.
        """
        at = max((place + 1 for place, one in enumerate(ids) if one == image), default=0)
        if start is None or ids[at : at + 1] == [start]:
            return ids
        own = int(ids[:1] == [start])
        return [*ids[own:at], start, *ids[at:]]

    def read(self, picture: Picture, alone: bool = True) -> SeenPicture:
        """Returns one picture, which is ``alone`` in its text or one of several.

        Raises:
            ConfigError, FormatError, StorageError, Unsupported: see :func:`.inputs.image_of`.
        """
        kind = self._kind or _Kind()
        given = None if self._kind is None else find_bytes(picture)
        if given is None:
            found = {PIXELS: image_of(picture, self._shape, lambda: self._plain)[None]}
        else:
            self._require_writer()
            image = decode(*given)
            with library_errors("transformers", "the picture cannot be prepared", where=given[1]):
                # of several pictures
                images = [[image] * 2] if kind.small and not alone else [image]
                found = dict(self._processor(images, return_tensors="np", **self._options))
        arrays = {name: np.asarray(found[name]) for name in IMAGES if name in found}
        if not np.asarray(found.get(_MASK, 1)).all():
            raise Unsupported("the model's processor pads a tile of this picture", where=self._folder)
        if kind.small and not alone:
            arrays = {PIXELS: arrays[PIXELS][:1], SIZES: np.zeros((1, 2), np.int64)}
        count = sum(self._layout.lengths(self._layout.whole(arrays)))
        return SeenPicture(arrays, kind.text(_Told(self._token, count, found, self._settings)), count)

    @cached_property
    def _plain(self) -> Preparation:
        self._require_writer()
        return preparation(self._folder)

    def _require_writer(self) -> None:
        if self._writer and self._writer.removesuffix("Processor") not in _WRITERS:
            raise Unsupported(
                "what the model's processor writes around a picture is not known",
                where=self._folder,
                expected=", ".join(f"{name}Processor" for name in _WRITERS),
                found=self._writer,
                remedy="give token ids, and what the processor makes of the picture as an array",
            )

    @cached_property
    def _processor(self) -> Any:
        """transformers' image processor with the settings in the folder."""
        with needed_by("preparing pictures of this model"):
            from transformers import AutoImageProcessor  # noqa: PLC0415 - heavy, and only for some models
        with library_errors("transformers", "the image processor cannot be made", where=self._folder):
            return AutoImageProcessor.from_pretrained(self._folder, backend="pil", local_files_only=True)


def join_pictures(pictures: Sequence[SeenPicture]) -> Arrays:
    """Returns the arrays of several pictures, in order: tiles and patches one after another, images of
    several sizes padded at the end.
    """
    if not pictures:
        return {}
    one = pictures[0].arrays
    joined = {
        name: np.concatenate([picture.arrays[name] for picture in pictures]) for name in one if name != PIXELS
    }
    pixels = [picture.arrays[PIXELS] for picture in pictures]
    if pixels[0].ndim == 5 and SIZES not in one:
        pixels = [array[0] for array in pixels]
    if GRIDS not in one:
        pixels = extend(pixels, first=1)
    return {PIXELS: np.concatenate(pixels), **joined}


def arrays_of(pictures: Sequence[SeenPicture]) -> Arrays:
    """Returns the arrays of several pictures as a model of transformers takes them."""
    joined = join_pictures(pictures)
    if joined and pictures[0].arrays[PIXELS].ndim == 5 and SIZES not in joined:
        joined[PIXELS] = joined[PIXELS][None]  # the images of one text
    return joined


def fill_marks(text: str, mark: str, pictures: Sequence[SeenPicture]) -> str:
    """Returns a prompt with the texts of its pictures in place of their marks; a prompt without marks begins
    with its pictures.

    Raises:
        ConfigError: the prompt has another number of marks.

    Example:
        >>> fill_marks("<i> and <i>", "<i>", [SeenPicture({}, "<i><i>"), SeenPicture({}, "<i>")])
        '<i><i> and <i>'
    """
    if not pictures:
        return text
    first, *rest = text.split(mark)
    if not rest:
        first = ""
        rest = [*[""] * (len(pictures) - 1), text]
    if len(rest) != len(pictures):
        raise ConfigError(
            "a prompt must have one mark for each of its images",
            expected=f"{len(pictures)} times {mark}, or none",
            found=len(rest),
            remedy="give as many images as the prompt names",
        )
    return first + "".join(picture.text + after for picture, after in zip(pictures, rest, strict=True))


def _require_numbers(written: Any, where: object) -> None:
    """Checks that no setting makes a picture larger than one may be."""
    inner = written.values() if isinstance(written, dict) else written if isinstance(written, list) else ()
    for value in inner:
        _require_numbers(value, where)
    if isinstance(written, int) and written > MOST_PIXELS:
        raise ConfigError(
            "a number in the processor's configuration is out of range",
            where=where,
            expected=f"at most {MOST_PIXELS}",
            found=written,
        )
