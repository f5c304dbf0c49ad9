"""What a torch model is given in a canary: token ids, ids for its decoder beside them, or images."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..methods import Acts
from ..pack import canary
from ..pack.manifest import Canary, Pixels

_IMAGES = 2


def inputs_of(model: nn.Module, acts: Acts | None = None) -> Canary | None:
    """The inputs of a canary, with no outputs yet; None for a model that takes neither ids nor images of a size that its config names.

    Of an adapter that acts at some positions only (``acts``), the first row of ids is one that it acts in.
    """
    pixels, vocabulary, decoder = _image(model), _vocabulary(model), _decoder(model)
    if (pixels is None and not vocabulary) or decoder == 0:
        return None
    ids = () if pixels is not None else canary.inputs(vocabulary, acts)
    if decoder is None:
        return Canary(ids, (), (), 0.0, pixels=pixels)
    end = _token(model, "eos_token_id")  # at which some heads look, and which ends whatever such a model reads
    ended = tuple(row if end is None else (*row[:-1], end) for row in ids)
    started = canary.decoder_inputs(decoder, _token(model, "decoder_start_token_id"))
    return Canary(ended, (), (), 0.0, decoder_input_ids=started, pixels=pixels)


def misfit(model: nn.Module, recorded: Canary) -> str | None:
    """Why a model cannot be given the inputs of ``recorded``, or None."""
    pixels, vocabulary, decoder = _image(model), _vocabulary(model), _decoder(model)
    if canary.incomplete(recorded):
        return "its inputs and what they must give are not one to one"
    if recorded.pixels is not None and (pixels is None or pixels.shape[1:] != recorded.pixels.shape[1:]):
        return f"the model does not take images of {recorded.pixels.shape[1:]}"
    if recorded.pixels is None and max(map(max, recorded.input_ids)) >= vocabulary:
        return "the model does not take its token ids"
    if (decoder is None) != (recorded.decoder_input_ids is None):
        return f"it has {'no ' if recorded.decoder_input_ids is None else ''}ids for a decoder"
    if recorded.decoder_input_ids is not None and max(map(max, recorded.decoder_input_ids)) >= (decoder or 0):
        return "the model's decoder does not take its token ids"
    return None


def _main(model: nn.Module) -> str:
    return str(getattr(model, "main_input_name", "input_ids"))


def _part(model: nn.Module, name: str) -> Any:
    """The configuration of a model's encoder or decoder, where it has one of its own, or of the model."""
    config = getattr(model, "config", None)
    own = getattr(config, name, None)
    return own if hasattr(own, "to_dict") else config


def _vocabulary(model: nn.Module) -> int:
    """The size of the vocabulary of a model that token ids are enough for, or ids in the encoder and others in the decoder; else 0."""
    found = getattr(_part(model, "encoder"), "vocab_size", None)
    return found if _main(model) == "input_ids" and type(found) is int else 0


def _decoder(model: nn.Module) -> int | None:
    """The size of the decoder's vocabulary (0: it has none), or None for a model that is not an encoder and a decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    found = getattr(_part(model, "decoder"), "vocab_size", None)
    return found if type(found) is int else 0


def _image(model: nn.Module) -> Pixels | None:
    """The recipe of the images of a model that these are enough for, or that they are the encoder's input of."""
    config = _part(model, "encoder")
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    shape = [channels, *(size if isinstance(size, list | tuple) else (size, size))]
    if _main(model) != "pixel_values" or len(shape) != len("chw") or not all(type(number) is int and number > 0 for number in shape):
        return None
    return Pixels(canary.SEED, (_IMAGES, shape[0], shape[1], shape[2]))


def _token(model: nn.Module, name: str) -> int | None:
    found = getattr(getattr(model, "config", None), name, None)
    found = found[0] if isinstance(found, list) and found else found
    return found if type(found) is int and found >= 0 else None
