"""Chooses the inputs of a model's canary: token ids (for an encoder-decoder, on both sides), images, speech,
or ids with images; and counts the positions that an image occupies among the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...adapter_methods import Acts
from ...manifest import Canary
from ...manifest.structs import Features, Pixels, Recipe
from ...pack import canary
from ...tasks import SOUNDS, TASKS, sound_of

_ROWS = len(canary.LENGTHS)
R = TypeVar("R", bound=Recipe)


def reads_text_alone(model: nn.Module) -> bool:
    """Whether a model was loaded for a task that gives it texts and nothing else, whatever else it could
    see or hear.
    """
    task = TASKS.find(getattr(model, "adapted_for", ""))
    return task is not None and "input_ids" in task.inputs and not {*task.inputs} & _MEDIA


_MEDIA = {"pixel_values", *SOUNDS}


class Readable:
    """What a model reads, as far as its class and its config say; of one that a task gives texts alone only
    these, if ``asked``.
    """

    def __init__(self, model: nn.Module, asked: bool = False) -> None:
        self.config: Any = getattr(model, "config", None)
        self.arguments = set(signature(model.forward).parameters)
        self._main = str(getattr(model, "main_input_name", "input_ids"))
        alone = asked and reads_text_alone(model)
        self.sound = None if alone else sound_of(model)
        parts = all(
            hasattr(getattr(self.config, name, None), "to_dict") for name in ("text_config", "vision_config")
        )
        self._apart = parts and self._main == "input_ids" and self.arguments >= {"input_ids", "pixel_values"}
        self.text_and_images = self._apart and not alone
        """Whether it takes a text and an image, in two towers or in one sequence."""

    def _part(self, name: str) -> Any:
        """Returns the config of one part of the model (``text_config`` and the like), or the whole config if
        the part has none.
        """
        part = getattr(self.config, name, None)
        return part if hasattr(part, "to_dict") else self.config

    @property
    def vocabulary(self) -> int:
        """The vocabulary size of a model that reads token ids (in its encoder, if it has one); 0 for
        others.
        """
        part = self._part("text_config" if self._apart else "encoder")
        size = getattr(part, "vocab_size", getattr(self._part("text_config"), "vocab_size", None))
        return size if self._main == "input_ids" and type(size) is int else 0

    @property
    def decoder(self) -> int | None:
        """The size of the decoder's vocabulary (0 if its config has none); None if the model is not an
        encoder-decoder.
        """
        if not getattr(self.config, "is_encoder_decoder", False) or "decoder_input_ids" not in self.arguments:
            return None
        size = getattr(self._part("decoder"), "vocab_size", None)
        return size if type(size) is int else 0

    @property
    def pixels(self) -> Pixels | None:
        """The recipe for its images; None if it reads no images, or the config does not give their size."""
        config = self._part("vision_config" if self.text_and_images else "encoder")
        size = getattr(config, "image_size", None)
        channels = getattr(config, "num_channels", 3)
        shape = [channels, *(size if isinstance(size, list | tuple) else (size, size))]
        if not (self.text_and_images or self._main == "pixel_values") or len(shape) != len("chw"):
            return None
        return _recipe(Pixels, shape, canary.LARGEST_IMAGE)

    @property
    def features(self) -> Features | None:
        """The recipe for the sound that it hears; samples have one band."""
        if self.sound is None:
            return None
        shape = self.sound.of(canary.LENGTHS[0])
        return _recipe(Features, shape if len(shape) > 1 else (1, *shape), canary.LARGEST_SPEECH)

    def token(self, name: str, part: str = "text_config") -> int | None:
        """Returns a special token's id from the config of the part that reads text, the first one if it lists
        several; None if it has none.
        """
        config = self._part(part) if self._apart else self.config
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list) and value else value
        return value if type(value) is int and value >= 0 else None

    @property
    def image_token(self) -> int | None:
        """The token id that marks an image in a text."""
        return self.token("image_token_id", part="")


def _recipe(kind: type[R], shape: Sequence[Any], largest: int) -> R | None:
    """Returns the recipe for rows of this shape; None if the shape is invalid or larger than a manifest may
    hold.
    """
    possible = (
        all(type(number) is int and 0 < number <= largest for number in shape)
        and math.prod(shape) <= canary.MOST
    )
    return kind(canary.SEED, (_ROWS, *shape)) if possible else None


def inputs_of(model: nn.Module, acts: Acts | None = None, seeing: bool = True) -> Canary | None:
    """Returns a canary with inputs and no outputs yet; None for a model with other inputs, or whose config
    does not give their sizes.

    If an adapter acts at some positions only (``acts``), the first row of ids contains such positions. A
    model of texts with images gets texts alone unless it is ``seeing``.
    """
    reads = Readable(model, asked=True)
    pixels = reads.pixels if seeing else None
    features = reads.features
    decoder = reads.decoder
    token = reads.image_token
    if (pixels is None and features is None and not reads.vocabulary) or decoder == 0:
        return None
    ids = canary.inputs(reads.vocabulary, acts) if reads.vocabulary else ()
    if reads.text_and_images and pixels is None and token is None:
        # A model with two towers needs inputs for both.
        return None
    if token is not None and pixels is not None:
        replacement = 1 if token != 1 else 2
        ids = tuple(
            (token, *(replacement if token_id == token else token_id for token_id in row)) for row in ids
        )
    # End each row with the end-of-sequence token: some heads pool at it, and these models expect it at the
    # end.
    end = reads.token("eos_token_id")
    if end is not None and (decoder is not None or (pixels is not None and token is None)):
        ids = tuple((*row[:-1], end) for row in ids)
    started = (
        None if decoder is None else canary.decoder_inputs(decoder, reads.token("decoder_start_token_id"))
    )
    return Canary(ids, (), (), 0.0, decoder_input_ids=started, pixels=pixels, features=features)


def misfit(model: nn.Module, recorded: Canary) -> str | None:
    """Returns why a model cannot take the inputs of ``recorded``, or None. Checks only the recipes, before
    any input is allocated: a pack is from a stranger.
    """
    return canary.flaw(recorded) or next(_misfits(Readable(model), recorded), None)


def _misfits(reads: Readable, recorded: Canary) -> Iterator[str]:
    """Yields each reason for which the model cannot take the recorded inputs."""
    decoder, token = reads.decoder, reads.image_token
    for what, expected, recorded_recipe in (
        ("images", reads.pixels, recorded.pixels),
        ("speech", reads.features, recorded.features),
    ):
        if recorded_recipe is not None and (
            expected is None or expected.shape[1:] != recorded_recipe.shape[1:]
        ):
            yield f"the model does not take {what} of {recorded_recipe.shape[1:]}"
        # A model with images in its token sequence also takes text alone.
        if recorded_recipe is None and expected is not None and token is None:
            yield f"it has no {what}"
    if reads.vocabulary and not recorded.input_ids:
        yield "it has no token ids"
    if max((max(row) for row in recorded.input_ids), default=-1) >= reads.vocabulary:
        yield "the model does not take its token ids"
    if (
        token is not None
        and recorded.pixels is not None
        and any(row.count(token) != 1 for row in recorded.input_ids)
    ):
        yield f"its rows do not have one image token ({token}) each"
    if (decoder is None) != (recorded.decoder_input_ids is None):
        yield f"it has {'no ' if recorded.decoder_input_ids is None else ''}ids for a decoder"
    if max((max(row) for row in recorded.decoder_input_ids or ()), default=-1) >= (decoder or 0):
        yield "the model's decoder does not take its token ids"


def image_of(model: nn.Module, inputs: Canary) -> tuple[int, int] | None:
    """Returns the id that marks an image in the rows of ``inputs`` and how many positions the model replaces
    it by; None if the inputs have no image or no ids.
    """
    token = Readable(model).image_token
    if token is None or inputs.pixels is None or not inputs.input_ids:
        return None
    return token, positions_of(model, inputs.pixels.shape[1:])


def texts_alone(model: nn.Module) -> bool:
    """Whether a model takes no images and no speech, so that token ids are all it needs."""
    return not Readable(model).arguments & {"pixel_values", *SOUNDS}


def features_of(output: Any) -> Tensor:
    """Returns the tensor in the result of ``get_image_features``, which newer versions of transformers wrap
    in an output object.
    """
    while not isinstance(output, Tensor):
        output = output.pooler_output if hasattr(output, "pooler_output") else torch.stack(list(output))
    return output


def token_types(model: Any, ids: Tensor, answers: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the input that says which tokens are one image's, or one prompt's: a model may let these attend
    to later ones of the same, or count them by a grid. Nothing for a model that asks no such thing;
    ``answers`` are tokens that do not belong to the prompt.
    """
    name = type_name(model)
    token = getattr(model.config, "image_token_id", None)
    if name is None or token is None:
        return {}
    if not sees_prompt_ahead(model):
        return {name: (ids == token).to(ids.dtype)}
    return {name: torch.zeros_like(ids) if answers is None else answers.to(ids.dtype)}


def type_name(model: Any) -> str | None:
    """Returns the name of a model's input for the types of tokens."""
    takes = signature(model.forward).parameters
    return next((name for name in ("token_type_ids", "mm_token_type_ids") if name in takes), None)


def sees_prompt_ahead(model: Any) -> bool:
    """Whether all tokens of a prompt attend to each other, and not only those of an image: token types 0 then
    stand for the prompt. The masks say so that the model itself makes for a generation.
    """
    masks = getattr(model, "create_masks_for_generate", None)
    takes = signature(model.forward).parameters
    if masks is None or "token_type_ids" not in takes:
        return False
    tokens = torch.zeros((1, 2), dtype=torch.int64)
    given = {"token_type_ids": tokens, "cache" if "cache" in takes else "past_key_values": None}
    made = masks(model.config, torch.zeros(1, 2, 1), torch.ones_like(tokens), position_ids=None, **given)
    mask = made.get("full_attention") if isinstance(made, dict) else made
    return mask is not None and bool(mask[0, 0, 0, 1] == mask[0, 0, 1, 1])


def positions_of(model: Any, shape: tuple[int, ...]) -> int:
    """Returns how many positions an image ``[channels, height, width]`` occupies. No config says so for every
    architecture, so the model encodes a blank image.
    """
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with torch.no_grad():
        features = features_of(model.get_image_features(pixel_values=weight.new_zeros((1, *shape))))
    return int(features.numel()) // int(model.config.get_text_config().hidden_size)
