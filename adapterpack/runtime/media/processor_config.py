"""Reads from the base model's configuration files how its processor prepares images, without transformers."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...adapter_methods import is_number
from ...errors import ConfigError, Unsupported
from ...io import Config, Json, without_none
from ..text import read_object

FILES = ("processor_config.json", "preprocessor_config.json")
"""Newer processors write one file with a section for each kind of input, older ones a file for a single kind.
The newer file takes precedence.
"""

_LARGEST = 1 << 13
"""The longest edge that a configuration may set, in pixels."""
_FILTERS = range(6)
"""Pillow's numbers of resampling filters, which configurations use."""
_BOTH = {"height", "width"}
_SHORT = {"shortest_edge"}
_EDGES = {"shortest_edge", "longest_edge"}
_TABLES = tomllib.loads((Path(__file__).parent / "processors.toml").read_text("utf-8"))


def _kinds(processors: Sequence[Json]) -> dict[str, Json]:
    """Returns the settings of processors by their names."""
    return {
        name: {
            **_TABLES["usual"],
            **_TABLES["moments"][kind["moments"]],
            "rescale_factor": 1 / 255,
            "do_center_crop": "crop_size" in kind,
            "crop_size": None,
            **kind,
        }
        for kind in processors
        for name in kind["names"]
    }


_KINDS = _kinds(_TABLES["plain"])
"""Processors that only resize, crop, rescale and normalize."""
_MORE = _kinds(_TABLES["further"])
"""Further processors, of which some have a way of their own to resize (``resize``)."""
Resize = Callable[[int, int], tuple[int, int]]
"""(height, width) -> height and width after resizing."""


def _between_edges(config: Config) -> Resize | None:
    """Returns how detectors resize: the shorter edge to its length, or so that the longer one keeps to its
    own.
    """
    shortest, longest = (config["size"].get(edge) for edge in ("shortest_edge", "longest_edge"))
    multiple = config.get("multiple", 1)
    if longest is None:
        return None

    def resize(height: int, width: int) -> tuple[int, int]:
        short, long = sorted((height, width))
        exact = float(shortest)
        if long / short * shortest > longest:
            exact = longest * short / long
        edge = round(exact)
        edge, other = (short, long) if short == edge else (edge, int(exact * long / short))
        edge, other = (length // multiple * multiple for length in (edge, other))
        return (other, edge) if width < height else (edge, other)

    return resize


def _down_to_multiples(config: Config) -> Resize:
    """Returns how GLPN resizes: each edge down to a multiple of a number."""
    divisor = config["size_divisor"]
    return lambda height, width: (height // divisor * divisor, width // divisor * divisor)


_ODD = ("do_pad", "pad_size", "keep_aspect_ratio", "ensure_multiple_of")
"""Settings that are only known as a processor's defaults have them."""
_RESIZES = {"between edges": _between_edges, "down to multiples": _down_to_multiples}


class Preparation(NamedTuple):
    """The steps that prepare an image: resize its shorter edge or both, or as ``resized`` says, crop its
    center, and map its bytes to ``(x * factor - mean) / std``. None leaves a step out.
    """

    shortest: int | None
    size: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    factor: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resized: Resize | None = None

    @property
    def extent(self) -> tuple[int, int] | None:
        """Height and width of the result, or None if they depend on the image."""
        return self.crop or self.size

    def resize(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width after resizing and before cropping; the longer edge is rounded down.

        Example:
            >>> Preparation(4, None, 2, None, 1.0, None, None).resize(10, 7)
            (5, 4)
        """
        if self.resized is not None:
            return self.resized(height, width)
        if self.shortest is None:
            return self.size or (height, width)
        short, long = sorted((height, width))
        longer = self.shortest * long // short
        return (longer, self.shortest) if width <= height else (self.shortest, longer)


def section(folder: Path, name: str) -> tuple[Json, Path]:
    """Returns the configuration of an ``image_processor`` or ``feature_extractor`` in a folder, and its file.
    The configuration is empty if no file has it.

    Raises:
        FormatError: a file holds no JSON object.
    """
    newer, older = (read_object(folder / file) for file in FILES)
    part = newer.get(name)
    return (part, folder / FILES[0]) if isinstance(part, dict) else (older, folder / FILES[1])


def kind_in(written: Config) -> str:
    """Returns the name of the class of an image processor in its configuration.

    Example:
        >>> kind_in({"image_processor_type": "Qwen2VLImageProcessorFast"})
        'Qwen2VLImageProcessor'
    """
    kind = written.get("image_processor_type", written.get("feature_extractor_type", ""))
    return str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def preparation(folder: Path) -> Preparation:
    """Returns how images are prepared for the model in ``folder``.

    Raises:
        Unsupported: no file says so, or the model's processor does more than this module supports.
        ConfigError: a number in the configuration is invalid.

    Example:
        >>> preparation(Path("bundle")).crop  # doctest: +SKIP
        (224, 224)
    """
    written, where = section(folder, "image_processor")
    kind = written.get("image_processor_type", "")
    name = kind_in(written)
    usual = {**_KINDS, **_MORE}.get(name)
    odd = (key for key in _ODD if written.get(key) not in (None, False, (usual or {}).get(key)))
    if (other := next(odd, None)) or usual is None:
        raise Unsupported(
            "how the model's pictures are prepared is not known",
            where=where,
            expected=", ".join((*_KINDS, *_MORE)),
            found=other if other and usual is not None else str(kind) or "no image_processor_type",
            remedy="give what the model's own processor makes of the picture, as an array or a .npy file",
        )
    config = {**usual, **without_none(written)}

    def read(key: str, expected: str, is_valid: Callable[[Any], bool]) -> Any:
        if not is_valid(config[key]):
            raise ConfigError(
                "a number in the processor's configuration is out of range",
                where=where,
                expected=f"{key}: {expected}",
                found=repr(config[key])[:100],
            )
        return config[key]

    def read_size(key: str, *forms: set[str]) -> dict[str, int]:
        expected = f"{' or '.join(' and '.join(sorted(form)) for form in forms)}, at most {_LARGEST}"
        size = read(key, expected, partial(_is_size, forms))
        if isinstance(size, dict):
            return size
        return (
            {"shortest_edge": size}
            if _SHORT in forms and not config["square"]
            else dict.fromkeys(_BOTH, size)
        )

    resized = None
    if config["do_resize"] and "resize" in config:
        if type(config["size"]) is int:  # as older files write it
            usual_size = {"shortest_edge": config["size"], "longest_edge": config.get("max_size", 1333)}
            config["size"] = usual_size if usual["size"].keys() == usual_size.keys() else config["size"]
        for key in {"size_divisor"} & config.keys():
            read(key, f"1 to {_LARGEST}", lambda number: type(number) is int and 0 < number <= _LARGEST)
        config["size"] = read_size("size", _BOTH, _EDGES) if config["size"] else {}
        resized = _RESIZES[config["resize"]](config)
    size = read_size("size", _BOTH, _SHORT) if config["do_resize"] and resized is None else {}
    crop = read_size("crop_size", _BOTH) if config["do_center_crop"] else {}
    mean, std = (
        tuple(map(float, read(key, "3 numbers", _are_moments))) if config["do_normalize"] else None
        for key in ("image_mean", "image_std")
    )
    if std is not None:
        read("image_std", "3 numbers that are not 0", all)
    last = _FILTERS.stop - 1
    return Preparation(
        size.get("shortest_edge"),
        (size["height"], size["width"]) if "height" in size else None,
        read("resample", f"0 to {last}", lambda number: type(number) is int and number in _FILTERS),
        (crop["height"], crop["width"]) if crop else None,
        float(read("rescale_factor", "a number", is_number)) if config["do_rescale"] else 1.0,
        mean,
        std,
        resized,
    )


def _is_size(forms: Sequence[set[str]], size: Any) -> bool:
    edges = size.values() if isinstance(size, dict) and set(size) in forms else [size]
    return all(type(edge) is int and 0 < edge <= _LARGEST for edge in edges)


def _are_moments(channels: Any) -> bool:
    return isinstance(channels, list | tuple) and len(channels) == 3 and all(map(is_number, channels))
