"""Makes the inputs of a torch model's canary: token ids, also for a decoder, images, speech, or ids together
with images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, TypeVar

from torch import nn

from ...adapter_methods.core.token_positions import Acts
from ...manifest.structs import Canary, Features, Pixels, Recipe
from ...pack import canary
from .images import positions_of

_ROWS = len(canary.LENGTHS)
R = TypeVar("R", bound=Recipe)


def inputs_of(model: nn.Module, acts: Acts | None = None) -> Canary | None:
    """The inputs of a canary, with no outputs yet; None for a model of other inputs, or whose config does not
    say how large they are.

    Of an adapter that acts at some positions only (``acts``), the first row of ids is one that it acts in.
    """
    pixels, features, vocabulary, decoder = _image(model), _speech(model), _vocabulary(model), _decoder(model)
    if (pixels is None and features is None and not vocabulary) or decoder == 0:
        return None
    ids = canary.inputs(vocabulary, acts) if vocabulary else ()
    token = image_token(model)
    if _reads_text_and_images(model) and pixels is None and token is None:
        return None  # two towers, of which one would have no input
    if token is not None and pixels is not None:
        replacement = 1 if token != 1 else 2
        ids = tuple(
            (token, *(replacement if token_id == token else token_id for token_id in row)) for row in ids
        )
    # at which some heads look, and which ends whatever such a model reads
    end = _token(model, "eos_token_id")
    if end is not None and (decoder is not None or (pixels is not None and token is None)):
        ids = tuple((*row[:-1], end) for row in ids)
    started = (
        None if decoder is None else canary.decoder_inputs(decoder, _token(model, "decoder_start_token_id"))
    )
    return Canary(ids, (), (), 0.0, decoder_input_ids=started, pixels=pixels, features=features)


def misfit(model: nn.Module, recorded: Canary) -> str | None:
    """Why a model cannot be given the inputs of ``recorded``, or None. Nothing is made of them before that is
    known.
    """
    return canary.flaw(recorded) or next(_misfits(model, recorded), None)


def _misfits(model: nn.Module, recorded: Canary) -> Iterator[str]:
    pixels, features, vocabulary, decoder = _image(model), _speech(model), _vocabulary(model), _decoder(model)
    token = image_token(model)
    for what, expected, recorded_recipe in (
        ("images", pixels, recorded.pixels),
        ("speech", features, recorded.features),
    ):
        if recorded_recipe is not None and (
            expected is None or expected.shape[1:] != recorded_recipe.shape[1:]
        ):
            yield f"the model does not take {what} of {recorded_recipe.shape[1:]}"
        # a text alone is enough where images stand in its stream
        if recorded_recipe is None and expected is not None and token is None:
            yield f"it has no {what}"
    if vocabulary and not recorded.input_ids:
        yield "it has no token ids"
    if max((max(row) for row in recorded.input_ids), default=-1) >= vocabulary:
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
    """The token that stands for an image in the rows of ``inputs``, and how many positions the model has for
    one; None without either.
    """
    token = image_token(model)
    if token is None or inputs.pixels is None or not inputs.input_ids:
        return None
    return token, positions_of(model, inputs.pixels.shape[1:])


def texts_alone(model: nn.Module) -> bool:
    """Whether a model has no input but ids, so that none can be missing."""
    return not set(signature(model.forward).parameters) & {"pixel_values", "input_features"}


def image_token(model: nn.Module) -> int | None:
    """The id that stands for an image among those of a text, or None."""
    return _whole(model, "image_token_id")


def _main(model: nn.Module) -> str:
    return str(getattr(model, "main_input_name", "input_ids"))


def _takes(model: nn.Module, *names: str) -> bool:
    return set(names) <= set(signature(model.forward).parameters)


def _part(model: nn.Module, name: str) -> Any:
    """The configuration of a part of a model, where it has one of its own, or of the model."""
    config = getattr(model, "config", None)
    part = getattr(config, name, None)
    return part if hasattr(part, "to_dict") else config


def _reads_text_and_images(model: nn.Module) -> bool:
    """Whether a model reads a text and an image, in two towers or in one stream."""
    config = getattr(model, "config", None)
    parts = all(hasattr(getattr(config, name, None), "to_dict") for name in ("text_config", "vision_config"))
    return parts and _main(model) == "input_ids" and _takes(model, "input_ids", "pixel_values")


def _vocabulary(model: nn.Module) -> int:
    """The size of the vocabulary of a model that reads token ids, in its encoder if it has one; else 0."""
    size = getattr(
        _part(model, "text_config" if _reads_text_and_images(model) else "encoder"), "vocab_size", None
    )
    return size if _main(model) == "input_ids" and type(size) is int else 0


def _decoder(model: nn.Module) -> int | None:
    """The size of the decoder's vocabulary (0: it has none), or None for a model that is not an encoder and a
    decoder.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    size = getattr(_part(model, "decoder"), "vocab_size", None)
    return size if type(size) is int else 0


def _image(model: nn.Module) -> Pixels | None:
    """The recipe of a model's images; None where it does not read them, or needs more than images and token
    ids.
    """
    config = _part(model, "vision_config" if _reads_text_and_images(model) else "encoder")
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    shape = [channels, *(size if isinstance(size, list | tuple) else (size, size))]
    if not (_reads_text_and_images(model) or _main(model) == "pixel_values") or len(shape) != len("chw"):
        return None
    return _recipe(Pixels, shape, canary.LARGEST_IMAGE)


def _speech(model: nn.Module) -> Features | None:
    """The recipe of the features of speech that the encoder of a model reads: two frames for each of its
    positions.
    """
    config = getattr(model, "config", None)
    shape = [getattr(config, name, None) for name in ("num_mel_bins", "max_source_positions")]
    if _main(model) != "input_features" or not _takes(model, "input_features", "decoder_input_ids"):
        return None
    return _recipe(
        Features, [shape[0], 2 * shape[1]] if type(shape[1]) is int else shape, canary.LARGEST_SPEECH
    )


def _recipe(kind: type[R], shape: Sequence[Any], largest: int) -> R | None:
    """The recipe of rows of a shape, or None for one that cannot be, or that no manifest may hold."""
    possible = (
        all(type(number) is int and 0 < number <= largest for number in shape)
        and math.prod(shape) <= canary.MOST
    )
    return kind(canary.SEED, (_ROWS, *shape)) if possible else None


def _token(model: nn.Module, name: str) -> int | None:
    return _whole(model, name) if not _reads_text_and_images(model) else _whole(model, name, "text_config")


def _whole(model: nn.Module, name: str, part: str = "") -> int | None:
    """A number of a model's config that is an id."""
    value = getattr(_part(model, part), name, None)
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and value >= 0 else None
