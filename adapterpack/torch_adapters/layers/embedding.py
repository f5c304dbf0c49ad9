"""Wraps embeddings to hold adapters of weight methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...adapter_methods import look_up
from .layer import AdaptedLayer

LookUp = Callable[[torch.Tensor], torch.Tensor]


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

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the embeddings ``[..., width]`` of the ids with the active adapters applied."""
        if not self._active:
            return self._base(*args, **kwargs)  # type: ignore[no-any-return]
        x, _ = self._enter(args, kwargs)
        weight, _ = self._stored
        result: LookUp = lambda ids: nn.functional.embedding(ids, weight)  # noqa: E731
        for name in self._active:
            result = self._looked_up(name, result)
        # Scale last: the adapter changes the weight, so its change is scaled with it.
        y, scale = result(x), getattr(self._base, "embed_scale", None)
        if scale is None:
            return y
        scaled: torch.Tensor = y * (scale.to(y.dtype) if isinstance(scale, torch.Tensor) else scale)
        return scaled

    def _looked_up(self, name: str, before: LookUp) -> LookUp:
        """Returns a look-up that applies the adapter on top of the look-up ``before``."""
        method, cfg = self._methods[name]

        def result(ids: torch.Tensor) -> torch.Tensor:
            """Looks up the rows of ``ids`` below the adapter and applies it."""
            y = before(ids)
            dtype = torch.promote_types(
                y.dtype, next(value.dtype for value in self._all_params(name) if value.is_floating_point())
            )
            site = self._with_weight(dtype) if method.traits.reads_weight else self._site
            form = method.normal_form(cfg, self._tensors(name, dtype), site)

            def adapted(ids: torch.Tensor, y: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
                keep = None
                if self.training and cfg.dropout:
                    keep = nn.functional.dropout(
                        torch.ones(ids.shape, dtype=dtype, device=ids.device), cfg.dropout
                    )
                changed: torch.Tensor = self._weigh(name, y, look_up(form, lambda _: y, ids, keep))
                return changed.to(y.dtype)

            return self._by_row(name, ids, y, adapted)

        return result
