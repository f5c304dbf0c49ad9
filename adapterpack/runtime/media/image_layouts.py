"""Arranges images as a model's vision part reads them, and what it makes of them as the features of rows.

What a processor makes of images has four forms (``pixel_values`` with ``image_grid_thw``, ``image_sizes`` or
``image_position_ids``, or alone). Which one a model takes is known from its config and from the inputs of
its vision part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError, Unsupported
from ...io import Config
from ...tasks import Arrays

PIXELS = "pixel_values"
GRIDS = "image_grid_thw"
SIZES = "image_sizes"
PLACES = "image_position_ids"
IMAGES = (PIXELS, GRIDS, SIZES, PLACES)
"""The arrays that processors make of images."""
OFFSETS = "position_offsets"
"""The decoder's input ``[batch, sequence, 3]``: how far a token's positions in time, height and width are
from its place in the row. The array of a row has one entry more, for the tokens after it.
"""
FEATURES = "image_features"
"""The decoder's input with the features of a row's images, one after another."""
TOKEN_TYPES = "token_type_ids"
"""The decoder's input ``[batch, sequence]``, 0 at a prompt's tokens, where all of these see each other."""
Pass = tuple[Arrays, list[int]]
"""The inputs of one pass of the vision part, and the image that each of its rows belongs to."""


class ImageLayout:
    """Images of one size, each with ``positions`` features; the rows of ``pixel_values`` are images, or tiles
    of images that follow each other in a text.
    """

    fixed = True
    """Whether a row of its pixels always has the same number of features."""

    def __init__(self, config: Config, inputs: Sequence[str], positions: int = 0) -> None:
        self.config = config
        self.inputs = inputs
        self.positions = positions
        self.vision: Config = config.get("vision_config") or {}

    def whole(self, given: Arrays) -> Arrays:
        """Returns the arrays of images without the padding that a processor puts between those of different
        texts.
        """
        pixels = given[PIXELS]
        if pixels.ndim == 5:  # [texts, images, ...], padded with black images, which the models leave out
            pixels = pixels.reshape(-1, *pixels.shape[2:])
            return {PIXELS: pixels[pixels.any(axis=(1, 2, 3))]}
        return given

    def lengths(self, given: Arrays) -> list[int]:
        """Returns how many image tokens each image takes in its row."""
        return [self.positions] * len(given[PIXELS])

    def passes(self, given: Arrays) -> Iterator[Pass]:
        """Yields the passes of the vision part over these images."""
        yield {PIXELS: given[PIXELS]}, list(range(len(given[PIXELS])))

    def features(self, outputs: Sequence[np.ndarray], given: Arrays) -> list[np.ndarray]:
        """Returns the features ``[positions, hidden]`` of each image, from the outputs of the passes."""
        return [features for output in outputs for features in output]

    def example(self, count: int, rng: np.random.Generator) -> Arrays:
        """Returns random images, of several sizes where the model takes any."""
        return {PIXELS: _noise(rng, count, *image_shape(self.vision))}

    def offsets(self, ids: np.ndarray, mask: np.ndarray, token: int, given: Arrays) -> np.ndarray | None:
        """Returns :data:`OFFSETS` of rows ``[batch, sequence]``, None if images do not move positions."""
        return None


class _SizedImages(ImageLayout):
    """Images of any size ``image_sizes`` ``[images, 2]`` in padded ``pixel_values``, one a pass."""

    fixed = False

    def whole(self, given: Arrays) -> Arrays:
        pixels = given[PIXELS]
        return {SIZES: np.tile(np.array(pixels.shape[2:]), (len(pixels), 1)), **given}

    def lengths(self, given: Arrays) -> list[int]:
        step = _edge(self.vision["patch_size"]) * self.config.get("spatial_merge_size", 1)
        return [int(height // step * (width // step)) for height, width in given[SIZES]]

    def example(self, count: int, rng: np.random.Generator) -> Arrays:
        edges = _sizes(count) * _edge(self.vision["patch_size"]) * self.config.get("spatial_merge_size", 1)
        return {PIXELS: _noise(rng, count, image_shape(self.vision)[0], *edges.max(0)), SIZES: edges}

    def passes(self, given: Arrays) -> Iterator[Pass]:
        for number, (height, width) in enumerate(given[SIZES]):
            yield {PIXELS: given[PIXELS][number : number + 1, :, :height, :width]}, [number]


class _TiledImages(ImageLayout):
    """Images of any size as a small whole and tiles in its full resolution, ``pixel_values`` ``[images,
    tiles, ...]``, whose padding is cut off and whose lines end with the model's feature for a new line
    (https://arxiv.org/abs/2408.03326, section 3; ``pack_image_features`` in transformers). The vision part
    gives that feature after those of a tile. An image of the size 0 is its small whole alone.
    """

    def whole(self, given: Arrays) -> Arrays:
        return given

    def lengths(self, given: Arrays) -> list[int]:
        return [
            len(self._arrange(np.zeros((count, self.positions, 1)), size))
            for count, size in zip(self.counts(given), given[SIZES], strict=True)
        ]

    def example(self, count: int, rng: np.random.Generator) -> Arrays:
        sizes = {SIZES: _sizes(count) * _edge(self.vision["image_size"]) // 2 - 1}
        return {PIXELS: _noise(rng, count, max(self.counts(sizes)), *image_shape(self.vision)), **sizes}

    def passes(self, given: Arrays) -> Iterator[Pass]:
        counts = self.counts(given)
        pixels = given[PIXELS]
        tiles = [image[:count] for image, count in zip(pixels, counts, strict=True)]
        yield {PIXELS: np.concatenate(tiles)}, np.repeat(np.arange(len(counts)), counts).tolist()

    def features(self, outputs: Sequence[np.ndarray], given: Arrays) -> list[np.ndarray]:
        counts = self.counts(given)
        tiles = np.split(outputs[0], np.cumsum(counts)[:-1])
        return [self._arrange(image, size) for image, size in zip(tiles, given[SIZES], strict=True)]

    def counts(self, given: Arrays) -> list[int]:
        """Returns the number of tiles of each image, with the small whole."""
        return [1 + math.prod(self._grid(size)) for size in given[SIZES]]

    def _grid(self, size: np.ndarray) -> tuple[int, int]:
        """Returns how many tiles high and wide an image is: those that keep most of its resolution, and of
        these the fewest.
        """
        height, width = (int(edge) for edge in size)
        if not height:
            return 0, 0

        def fitness(best: Sequence[int]) -> tuple[int, int]:
            scale = min(best[1] / width, best[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - best[0] * best[1]

        best = max(self.config["image_grid_pinpoints"], key=fitness)
        edge = _edge(self.vision["image_size"])
        return best[0] // edge, best[1] // edge

    def _arrange(self, tiles: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Returns the features of one image, from those of its tiles ``[tiles, positions + 1, hidden]``."""
        base = tiles[0, :-1]
        line = tiles[:1, -1:]
        if len(tiles) == 1:
            return np.concatenate([base, line[0]])
        rows, columns = self._grid(size)
        side = _edge(self.vision["image_size"]) // _edge(self.vision["patch_size"])
        image = tiles[1:, :-1].reshape(rows, columns, side, side, tiles.shape[2]).transpose(0, 2, 1, 3, 4)
        image = _cut_padding(image.reshape(rows * side, columns * side, tiles.shape[2]), size)
        if most := str(self.config.get("vision_aspect_ratio", "")).removeprefix("anyres_max_"):
            ratio = math.sqrt(image.shape[0] * image.shape[1] / (int(most) * side**2))
            if ratio > 1.1:
                image = _shrink(image, 0, int(image.shape[0] // ratio))
                image = _shrink(image, 1, int(image.shape[1] // ratio))
        lines = np.concatenate([image, np.broadcast_to(line, (len(image), 1, tiles.shape[2]))], 1)
        return np.concatenate([base, lines.reshape(-1, tiles.shape[2])]).astype(tiles.dtype, copy=False)


class _Patches(ImageLayout):
    """Images of any size as patches."""

    fixed = False

    def whole(self, given: Arrays) -> Arrays:
        return given


class _PatchedImages(_Patches):
    """Images of any size as rows of patches: ``pixel_values`` ``[patches, width]`` with the grid of each
    image, ``image_grid_thw`` ``[images, 3]``, in patches; one image a pass. Blocks of ``spatial_merge_size``
    squared patches become one feature, and lie together.
    """

    def lengths(self, given: Arrays) -> list[int]:
        return [int(grid.prod()) // self._merge**2 for grid in given[GRIDS]]

    def example(self, count: int, rng: np.random.Generator) -> Arrays:
        grids = np.insert(_sizes(count) * self._merge, 0, 1, axis=1)
        vision = self.vision
        width = vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        return {PIXELS: _noise(rng, int(grids.prod(1).sum()), width), GRIDS: grids}

    def passes(self, given: Arrays) -> Iterator[Pass]:
        ends = np.cumsum(given[GRIDS].prod(axis=1))
        for number, (end, (_, height, width)) in enumerate(zip(ends, given[GRIDS], strict=True)):
            feeds = {PIXELS: given[PIXELS][end - height * width : end]}
            places = self._blocks(int(height), int(width))
            feeds["patch_positions"] = places
            if "patch_windows" in self.inputs:
                feeds |= self._windows(places)
            if "table_places" in self.inputs:
                feeds |= self._stretch_table(places, (int(height), int(width)))
            yield feeds, [number]

    def offsets(self, ids: np.ndarray, mask: np.ndarray, token: int, given: Arrays) -> np.ndarray | None:
        """See :meth:`ImageLayout.offsets`. An image's tokens have the positions of its grid, and the text
        goes on after the larger edge (``get_rope_index`` in transformers; https://arxiv.org/abs/2409.12191,
        section 2.1).
        """
        grids = iter(given[GRIDS])
        found = np.zeros((len(ids), ids.shape[1] + 1, 3), np.int64)
        for row, own in enumerate(mask > 0):
            tokens = np.append(ids[row][own], -1)
            moved = 0
            offsets = np.zeros((len(tokens), 3), np.int64)
            place = 0
            while place < len(tokens):
                if tokens[place] != token:
                    offsets[place] = moved
                    place += 1
                    continue
                _, height, width = (int(edge) for edge in next(grids))
                high, wide = height // self._merge, width // self._merge
                inside = np.indices((1, high, wide)).reshape(3, -1).T
                offsets[place : place + high * wide] = moved + inside - np.arange(high * wide)[:, None]
                place += high * wide
                moved += max(high, wide) - high * wide
            found[row][np.append(own, True)] = offsets
        return found

    @property
    def _merge(self) -> int:
        return int(self.vision["spatial_merge_size"])

    def _blocks(self, height: int, width: int) -> np.ndarray:
        """Returns row and column of each patch ``[patches, 2]``, block by block."""
        size = self._merge
        places = np.indices((height, width)).transpose(1, 2, 0)
        blocks = places.reshape(height // size, size, width // size, size, 2).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(blocks.reshape(-1, 2))

    def _windows(self, places: np.ndarray) -> Arrays:
        """Returns the order of the blocks in which those of a window lie together, and each patch's window in
        that order.
        """
        size = self.vision["window_size"] // self._merge // self.vision["patch_size"] * self._merge
        rows, columns = (places[:: self._merge**2] // size).T
        windows = rows * (columns.max() + 1) + columns
        order = np.argsort(windows, kind="stable")
        return {"patch_windows": np.repeat(windows[order], self._merge**2), "window_order": order}

    def _stretch_table(self, places: np.ndarray, size: tuple[int, int]) -> Arrays:
        """Returns the four entries of the model's square table of positions that each patch lies between, and
        their weights: the table is stretched over the image, corner to corner.
        """
        side = math.isqrt(self.vision["num_position_embeddings"])
        taps, weights = [], []
        for axis, length in enumerate(size):
            index = np.arange(length, dtype=np.float32) * np.float32(side - 1)
            at = (index / np.float32(max(length - 1, 1)))[places[:, axis]]
            low = np.floor(at)
            taps.append(np.minimum(low[:, None].astype(np.int64) + np.arange(2), side - 1))
            weights.append(np.stack([1 - (at - low), at - low], 1))
        return {
            "table_places": (taps[0][:, :, None] * side + taps[1][:, None]).reshape(-1, 4),
            "table_weights": (weights[0][:, :, None] * weights[1][:, None]).reshape(-1, 4),
        }


class _PooledPatches(_Patches):
    """Images of any size as patches, ``pixel_values`` ``[images, most, width]`` with the column and row of
    each, ``image_position_ids`` ``[images, most, 2]``, which are -1 at padding; one image a pass. Blocks of
    ``pooling_kernel_size`` squared patches become one feature, and lie together.
    """

    def lengths(self, given: Arrays) -> list[int]:
        counts = (given[PLACES] >= 0).all(2).sum(1)
        return [int(count) // self.vision["pooling_kernel_size"] ** 2 for count in counts]

    def example(self, count: int, rng: np.random.Generator) -> Arrays:
        edges = _sizes(count) * self.vision["pooling_kernel_size"]
        places = [np.indices(edge[::-1]).reshape(2, -1).T for edge in edges]
        most = max(map(len, places))
        padded = [np.pad(own, ((0, most - len(own)), (0, 0)), constant_values=-1) for own in places]
        return {
            PIXELS: _noise(rng, count, most, 3 * self.vision["patch_size"] ** 2),
            PLACES: np.stack(padded),
        }

    def passes(self, given: Arrays) -> Iterator[Pass]:
        for number, (pixels, places) in enumerate(zip(given[PIXELS], given[PLACES], strict=True)):
            own = (places >= 0).all(1)
            columns, rows = places[own].T
            size = self.vision["pooling_kernel_size"]
            order = np.lexsort((columns, rows, columns // size, rows // size))
            yield {PIXELS: pixels[own][order], "pixel_position_ids": places[own][order]}, [number]


def layout_of(config: Config, inputs: Sequence[str], sized: bool, positions: int = 0) -> ImageLayout:
    """Returns how a model reads images, from its config and the names of the ``inputs`` of its vision part;
    ``sized`` says that it takes images of any height and width, and ``positions`` are the features of a row
    of images of one size.
    """
    kind = (
        _PatchedImages
        if "patch_positions" in inputs
        else _PooledPatches
        if "pixel_position_ids" in inputs
        else _SizedImages
        if sized
        else _TiledImages
        if config.get("image_grid_pinpoints")
        else ImageLayout
    )
    return kind(config, inputs, positions)


def take_images(given: Arrays, numbers: Sequence[int]) -> Arrays:
    """Returns the arrays of some of the images, in that order."""
    if GRIDS not in given and given[PIXELS].ndim == 5 and SIZES not in given:
        return {PIXELS: given[PIXELS].reshape(1, -1, *given[PIXELS].shape[2:])[:, numbers]}
    taken = {name: given[name][numbers] for name in IMAGES if name in given}
    if GRIDS in given:
        parts = np.split(given[PIXELS], np.cumsum(given[GRIDS].prod(axis=1))[:-1])
        taken[PIXELS] = np.concatenate([parts[number] for number in numbers])
    return taken


def rows_of_images(ids: np.ndarray, token: int, lengths: Sequence[int]) -> list[int]:
    """Returns the row of each image, in order, by the number of image tokens that each takes.

    Raises:
        ConfigError: the tokens cannot be divided among the images.

    Example:
        >>> rows_of_images(np.array([[9, 9, 1], [1, 2, 3], [9, 9, 9]]), 9, [1, 1, 3])
        [0, 0, 2]
    """
    counts = (ids == token).sum(1)
    rows = []
    row = 0
    left = counts.copy()
    for length in lengths:
        while row < len(left) and not left[row]:
            row += 1
        if row == len(left) or not 0 < length <= left[row]:
            break
        left[row] -= length
        rows.append(row)
    if left.any() or len(rows) < len(lengths):
        raise ConfigError(
            "the rows' image tokens do not fit the images",
            expected=f"{', '.join(map(str, lengths[:20]))} tokens for {len(lengths)} images",
            found=counts.tolist(),
            remedy=f"put the tokens of an image ({token}) where it belongs in its row",
        )
    return rows


def features_of_rows(features: Sequence[np.ndarray], rows: list[int], batch: int) -> np.ndarray:
    """Rearranges the ``[positions, hidden]`` of each image to ``[batch, longest, hidden]``: the images of
    each row one after another, padded with zeros.

    Example:
        >>> features_of_rows(np.arange(6.0).reshape(3, 2, 1), [0, 2, 2], 3)[..., 0].tolist()
        [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 3.0, 4.0, 5.0]]
    """
    lengths = np.bincount(rows, [len(one) for one in features], minlength=batch).astype(int)
    by_row = np.zeros((batch, lengths.max(initial=0), features[0].shape[1]), features[0].dtype)
    for row, length in enumerate(lengths):
        if length:
            by_row[row, :length] = np.concatenate(
                [one for one, own in zip(features, rows, strict=True) if own == row]
            )
    return by_row


def image_shape(vision: Config) -> tuple[int, int, int]:
    """Returns channels, height and width of images of one size, from the config of a vision part.

    Raises:
        Unsupported: the config does not say how large they are.
    """
    size = vision.get("image_size")
    channels = vision.get("num_channels", 3)
    if size is None:
        raise Unsupported(
            "the config does not say how large the model's images are",
            found=", ".join(map(str, vision))[:200],
            expected="image_size",
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(channels), int(height), int(width)


def _sizes(count: int) -> np.ndarray:
    """Returns heights and widths of example images ``[count, 2]``, in parts of an image."""
    return np.array([(2, 3), (4, 2), (3, 5), (2, 2)])[np.arange(count) % 4]


def _noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _edge(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def _cut_padding(image: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Cuts off the padding that gave an image of ``size`` the form of its tiles."""
    (height, width), (own_height, own_width) = image.shape[:2], (int(edge) for edge in size)
    if own_width / own_height > width / height:
        cut = (height - int(round(own_height * (width / own_width), 7))) // 2
        return image[cut : height - cut]
    cut = (width - int(round(own_width * (height / own_height), 7))) // 2
    return image[:, cut : width - cut]


def _shrink(image: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Interpolates one axis linearly, as torch's ``interpolate`` does between the centres of pixels."""
    own = image.shape[axis]
    at = np.clip((np.arange(length) + 0.5) * own / length - 0.5, 0, own - 1)
    low = np.floor(at).astype(int)
    share = (at - low).astype(image.dtype).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    high = np.minimum(low + 1, own - 1)
    between: np.ndarray = image.take(low, axis) * (1 - share) + image.take(high, axis) * share
    return between
