"""Wraps embeddings to hold adapters of weight methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter_methods import look_up
from .layer import AdaptedLayer

LookUp = Callable[[Tensor], Tensor]


def is_plain_embedding(module: nn.Embedding) -> bool:
    """Whether a module only looks up its weight, at most scaled by ``embed_scale``, and never modifies the
    weight (``max_norm``).
    """
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return plain and module.max_norm is None


class AdaptedEmbedding(AdaptedLayer):
    """A frozen embedding with adapters; methods see it as a linear layer ``[width, vocabulary]`` with one-hot
    inputs.

    A call computes only the rows of the ids in the batch, never the whole table. An output head tied to the
    embedding keeps the base's weight. Dropout drops the change of a whole position.
    """

    def _adapted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Returns the embeddings ``[..., width]`` of the ids with the active adapters applied."""
        x, _ = self._enter(args, kwargs)
        weight, _ = self._stored
        result: LookUp = lambda ids: nn.functional.embedding(ids, weight)  # noqa: E731
        for name in self._active:
            result = self._looked_up(name, result)
        # Scale last: the adapter changes the weight, so its change is scaled with it.
        y, scale = result(x), getattr(self._base, "embed_scale", None)
        if scale is None:
            return y
        scaled: Tensor = y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return scaled

    def _looked_up(self, name: str, before: LookUp) -> LookUp:
        """Returns a look-up that applies the adapter on top of the look-up ``before``."""
        dropout = self._held[name].config.dropout if self.training else 0

        def result(ids: Tensor) -> Tensor:
            """Looks up the rows of ``ids`` below the adapter and applies it."""
            y = before(ids)
            dtype = self._precision(name, y.dtype)
            form = self._normal_form(name, dtype)

            def adapted(ids: Tensor, y: Tensor, _: Tensor | None) -> Tensor:
                every = torch.ones(ids.shape, dtype=dtype, device=ids.device)
                keep = nn.functional.dropout(every, dropout) if dropout else None
                changed: Tensor = self._weigh(name, y, look_up(form, lambda _: y, ids, keep))
                return changed.to(y.dtype)

            return self._by_row(name, ids, y, adapted)

        return result
