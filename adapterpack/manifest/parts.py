"""The rarer parts of a manifest, which most packs do without: of the base, of its tokenizer, of composed packs, and the canary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Dims:
    """The sizes of a base: width of the hidden state, number of layers and of attention heads, entries of the vocabulary."""

    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    vocab: int | None = None


@dataclass(frozen=True)
class Variant:
    """Another form of the same base for which the pack is meant: how it differs, its digests, and whether it was tried."""

    relation: str
    structure: str | None = None
    content: str | None = None
    tested: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer in training: sha256 of ``tokenizer.json``, of ``added_tokens.json`` and of the chat template, as hex.

    ``same-as-base`` says that the base's own was used; None that nothing is known, or that there is none.
    """

    tokenizer_json: str | None = None
    added_tokens: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class BaseQuantization:
    """How the base was quantized while the adapter was trained on it, for instance ``nf4`` and its parameters."""

    scheme: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Inputs by recipe: the seed of their numbers and their shape, ``(images, channels, height, width)`` or ``(rows, bands, frames)``."""

    seed: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """An adapter that a composed pack holds: its name there, the digest of the pack that it came from, and its method."""

    name: str
    digest: str
    method: str
    spec_version: int = 1


@dataclass(frozen=True)
class Composition:
    """How the adapters in a composed pack work together: a tree over their names (``methods/nodes``), as JSON values."""

    tree: Mapping[str, Any]
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Canary:
    """An executable proof: these inputs must give these logits, without and with the adapter.

    ``base`` and ``adapter`` hold, row by row, the logits at the last position: ``ids`` (the top ones) and ``logits`` beside them; for a
    model without logits, components of its last hidden state, or of both embeddings of two towers. In ``base`` the pack's trained head is
    on and its adapters are off. ``input_ids`` is empty where ``pixels`` or ``features`` (of speech) take their place. Beside images, a
    row's one image token stands for all positions of its image. ``decoder_input_ids`` go into a decoder, where there is an encoder too.
    """

    input_ids: tuple[tuple[int, ...], ...]
    base: tuple[Mapping[str, Any], ...]
    adapter: tuple[Mapping[str, Any], ...]
    tolerance: float
    dtype: str = "float32"
    decoder_input_ids: tuple[tuple[int, ...], ...] | None = None
    pixels: Recipe | None = None
    features: Recipe | None = None


def decoded(value: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a manifest that these classes are, from its JSON; what is not there stays so."""
    return {
        "tokenizer": value["tokenizer"] and Tokenizer(**value["tokenizer"]),
        "base_quantization": value["base_quantization"] and BaseQuantization(**value["base_quantization"]),
        "canary": value["canary"] and _canary(value["canary"]),
        "composition": value["composition"] and composition_of(value["composition"]),
    }


def composition_of(value: Mapping[str, Any]) -> Composition:
    """A composition from its JSON."""
    return Composition(value["tree"], tuple(Member(**one) for one in value["members"]))


def _canary(value: Mapping[str, Any]) -> Canary:
    decoder = value["decoder_input_ids"]
    recipes = {key: value[key] and Recipe(value[key]["seed"], tuple(value[key]["shape"])) for key in ("pixels", "features")}
    return Canary(**{**value, "input_ids": tuple(map(tuple, value["input_ids"])), "base": tuple(value["base"]),
                     "adapter": tuple(value["adapter"]), "decoder_input_ids": None if decoder is None else tuple(map(tuple, decoder)),
                     **recipes})
