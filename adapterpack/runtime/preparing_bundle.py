"""Prepares the inputs of a bundle's graphs from the contents of rows: texts, pairs of texts,
images, speech.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..tasks.data.rows import Picture, map_rows
from ..tasks.session import Arrays
from ..tasks.task import MAIN
from .media.inputs import image_of, speech_of
from .media.processor_config import preparation, section
from .model_inputs import pad
from .open_bundle import OpenBundle


class PreparingBundle(OpenBundle):
    """An open bundle with methods that turn texts, images and speech into the inputs of its task."""

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Tokenizes texts into a padded batch: ``input_ids`` and ``attention_mask`` ``[batch, longest]``,
        int64, padded on the right.

        Raises:
            ConfigError: a text has no tokens.
        """
        return pad(map_rows(texts, self.tokenizer.row), self.tokenizer.pad_id, left=False)

    def pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """Returns images as ``pixel_values`` ``[images, channels, height, width]`` float32.

        An image is the path or the bytes of a PNG or JPEG, prepared as the base model's processor does, or a
        ``.npy`` file or an array that is prepared already. PNG and JPEG need the extra ``vision``.

        Raises:
            ConfigError, FormatError, StorageError, Unsupported: see
                :func:`adapterpack.runtime.media.inputs.image_of`.

        Example:
            >>> session.run({"pixel_values": session.pixels(["photo.jpg"])},
            ...     ["leaves"])["logits"].argmax()  # doctest: +SKIP
            4
        """
        shape = self.shape("pixel_values")
        prepared = partial(self.once, "image_processor", lambda: preparation(self.folder))
        return np.stack([image_of(image, shape, prepared) for image in images])

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]]
    ) -> tuple[Arrays, list[list[tuple[int, int] | None]]]:
        """Tokenizes pairs of texts into a padded batch, with ``token_type_ids`` where the graph reads them.
        Also returns, for each token of a row, the character range in the second text, or None for other
        tokens.
        """
        rows = map_rows(pairs, lambda pair: self.tokenizer.pair(*pair))
        inputs = pad([ids for ids, _, _ in rows], self.tokenizer.pad_id, left=False)
        if "token_type_ids" in self.inputs or "token_type_ids" in self.graph(MAIN).optional:
            inputs["token_type_ids"] = pad([types for _, types, _ in rows], 0, left=False)["input_ids"]
        return inputs, [spans for _, _, spans in rows]

    def speech(self, files: Sequence[str | Path]) -> np.ndarray:
        """Returns speech files as ``input_features`` ``[files, mel, frames]``;
        :func:`adapterpack.runtime.media.inputs.speech_of` describes them.
        """
        config = self.once("feature_extractor", lambda: section(self.folder, "feature_extractor")[0])
        shape = self.shape("input_features")
        return np.stack(map_rows(files, lambda file: speech_of(Path(file), shape, config)))
