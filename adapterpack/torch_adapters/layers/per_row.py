"""Says which adapter each row of a batch has, to layers that are called with such a batch.

A pass may have several rows for each that was named, as beam search makes of them; they lie next to each
other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...adapter_methods import Site
from ...errors import Unsupported

_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "pixel_values",
    "input_features",
    "input_values",
)
"""What models call the inputs that have an entry for each row."""


class Rows:
    """The adapters of the rows, None for those of the base, and the number of rows of the pass that is
    running.

    ``trusted`` says that the model's layers are known to have the rows along their first axis: those of
    transformers whose attention is one of the library's functions have.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str | None]) -> None:
        self.adapters = tuple(adapters)
        self.trusted = bool(getattr(model, "_supports_sdpa", False))
        self._first: set[str] = set()
        self._batch = 0
        self._places: dict[tuple[str, int, torch.device], torch.Tensor] = {}
        self._handles = [
            entry.register_forward_pre_hook(self._enter, with_kwargs=True) for entry in _entries(model)
        ]

    def close(self) -> None:
        """Stops watching the model's calls."""
        for handle in self._handles:
            handle.remove()

    def index(self, name: str, x: torch.Tensor, site: Site) -> torch.Tensor:
        """Where along the first axis of a layer's input the rows of an adapter lie.

        Raises:
            Unsupported: the layer does not see the rows as they are.
        """
        each = self._entries_of_a_row(x, site)
        key = (name, each, x.device)
        if key not in self._places:
            places = [
                row * each + entry
                for row, own in enumerate(self.adapters)
                if own == name
                for entry in range(each)
            ]
            self._places[key] = torch.tensor(places, dtype=torch.long, device=x.device)
        return self._places[key]

    def _entries_of_a_row(self, x: torch.Tensor, site: Site) -> int:
        """How many entries along the first axis each of the named rows has."""
        batch, length = self._batch, len(x) if x.ndim else 0
        axes = x.ndim - x.is_floating_point()  # without that of the width, which ids have not
        flat = axes == 1 and batch and length % batch == 0  # [batch * length, width]
        plain = batch and length == batch
        if not (plain or flat):
            raise Unsupported(
                "this layer does not see the rows of the batch one by one, so they cannot have adapters "
                "of their own",
                where=site.path,
                expected=f"{batch} rows",
                found=tuple(x.shape),
                remedy="use one adapter for all rows",
            )
        # [length, batch, width] looks the same where there are as many of each
        if plain and axes == 2 and batch > 1 and not self.trusted:
            if x.shape[1] != batch:
                self._first.add(site.path)
            elif site.path not in self._first:
                raise Unsupported(
                    "a batch of as many rows as tokens does not tell which of the two this layer has first",
                    where=site.path,
                    found=tuple(x.shape),
                    remedy="pad the batch by one token",
                )
        return length // len(self.adapters)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        takes = tuple(inspect.signature(type(module).forward).parameters)[1:]
        inputs = {**dict(zip(takes, args, strict=False)), **kwargs}
        values = [inputs.get(name) for name in _INPUTS] + list(inputs.values())
        first = next((value for value in values if isinstance(value, torch.Tensor) and value.ndim), None)
        batch = 0 if first is None else len(first)
        if not batch or batch % len(self.adapters):
            raise Unsupported(
                "there is not one adapter for each row of the batch",
                where="adapters",
                expected=f"{batch} names",
                found=len(self.adapters),
                remedy="name one for each row, None for the base",
            )
        self._batch = batch


def _entries(model: nn.Module) -> list[nn.Module]:
    """What callers call: the model, and the encoder by itself where there is one, which generation runs
    alone.
    """
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and hasattr(
        model, "get_encoder"
    )
    return [model, model.get_encoder()] if both else [model]  # type: ignore[operator, list-item]
