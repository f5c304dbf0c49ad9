"""Wraps embeddings to hold adapters of weight methods, or of methods that change single rows of the table,
which tied heads and embeddings follow.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter_methods import Site, fold, look_up, run
from ...errors import Unsupported
from .calls import Args, Kwargs
from .layer import AdaptedLayer
from .wrapper import input_of


class AdaptedEmbedding(AdaptedLayer):
    """A frozen embedding with adapters; methods see it as a linear layer ``[width, vocabulary]`` with one-hot
    inputs.

    A call computes only the rows of the ids in the batch, never the whole table. An output head tied to the
    embedding keeps the base's weight. Dropout drops the change of a whole position.
    """

    def _run_active(self, args: Args, kwargs: Kwargs) -> Tensor:
        """Returns the embeddings ``[..., width]`` of the ids with the active adapters applied."""
        x, _ = self._enter(args, kwargs)
        y = nn.functional.embedding(x, self._stored[0])
        # Scale last: the adapter changes the weight, so its change is scaled with it.
        return _scale(self._base, self._in_rows(x, y, self._change))

    def _change(self, name: str, ids: Tensor, y: Tensor, _: Tensor | None) -> Tensor:
        """Applies an adapter to the rows ``y`` of the ids."""
        dtype = self._precision(name, y.dtype)
        dropout = self._held[name].config.dropout
        keep = None
        if dropout and self.training:
            keep = nn.functional.dropout(torch.ones(ids.shape, dtype=dtype, device=ids.device), dropout)
        changed = look_up(self._normal_form(name, dtype), lambda _: y, ids, keep)
        return self._weigh(name, y, changed).to(y.dtype)  # type: ignore[no-any-return]


def _scale(owner: nn.Module, y: Tensor) -> Tensor:
    """Scales looked-up rows as an embedding does; some multiply by ``embed_scale``."""
    scale = getattr(owner, "embed_scale", None)
    if scale is None:
        return y
    return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


class AdaptedTable(AdaptedLayer):
    """A frozen embedding with adapters of methods that change it row by row; a call changes only the rows
    that it looks up.

    Methods see the table as a linear layer ``[vocabulary, width]``. Modules tied to the table, such as the
    output head or the other embedding of an encoder-decoder, follow its adapters (:meth:`_follow`) if the
    method says so.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__(base, site)
        self._ties: dict[nn.Module, Any] = {}

    def _run_active(self, args: Args, kwargs: Kwargs) -> Tensor:
        """Returns the rows ``[..., width]`` of the token ids ``[...]``, with the active adapters applied."""
        x, _ = self._enter(args, kwargs)
        return self._looked_up(x, self._base, self._active)

    @property
    def _followed(self) -> tuple[str, ...]:
        """The active adapters that also change modules tied to the table."""
        return tuple(name for name in self._active if self._held[name].method.traits.tied)

    def _looked_up(self, x: Tensor, owner: nn.Module, names: tuple[str, ...]) -> Tensor:
        """Looks up rows with the adapters ``names`` applied, scaled as ``owner``, the embedding that was
        called, scales them.
        """
        stored = self._stored[0].detach()
        rows = stored[x].to(torch.promote_types(stored.dtype, torch.float32))
        return _scale(owner, self._in_rows(x, rows, self._replace, names).to(stored.dtype))

    def _replace(self, name: str, x: Tensor, rows: Tensor, _: Tensor | None) -> Tensor:
        """Returns the rows ``[..., width]`` of the token ids ``[...]`` with an adapter applied."""
        held = self._held[name]
        flat = rows.reshape(-1, rows.shape[-1])
        ids = x.reshape(-1)
        tensors = self._tensors(name, rows.dtype)
        folded, _ = fold(held.method, held.config, tensors, self._site, flat, None, ids)
        return self._weigh(name, flat, folded).reshape(rows.shape)

    def _tied_to(self, leaf: str) -> list[nn.Module]:
        """Returns the tied modules if all active adapters change them, none if no adapter does; raises if
        only some do.
        """
        if leaf != "weight" or not self._ties or not self._followed:
            return []
        if self._followed != self._active:
            raise Unsupported(
                "one of these adapters changes what is tied to the embedding and another does not",
                where=self._site.path,
                found=", ".join(self._active),
                remedy="merge one of them alone, or keep them unmerged",
            )
        return list(self._ties)

    def _follow(self, tied: nn.Module) -> None:
        """Makes ``tied``, a head or an embedding with the same weight, apply the active adapters too, until
        :meth:`_release`.
        """
        if tied not in self._ties:
            hook = self._twin if isinstance(tied, nn.Embedding) else self._head
            self._ties[tied] = tied.register_forward_hook(hook, with_kwargs=True)

    def _release(self) -> None:
        """Makes tied modules stop following the adapters."""
        for hook in self._ties.values():
            hook.remove()
        self._ties.clear()

    def _twin(self, twin: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor:
        """As a hook on a tied embedding, looks up the adapted rows instead."""
        return self._looked_up(input_of(twin, args, kwargs), twin, self._followed) if self._followed else y

    def _head(self, head: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor:
        """As a hook on a tied head, adds what the adapters change in the logits."""
        if not self._followed:
            return y  # the weight, which may be offloaded or quantized, is not fetched for the base alone
        site = dataclasses.replace(self._site, weight=self._stored[0].detach())

        def changed(name: str, x: Tensor, y: Tensor, _: Any) -> Any:
            held = self._held[name]
            tensors = self._tensors(name, y.dtype)
            return self._weigh(name, y, run(held.method, held.config, tensors, site, lambda _: y, x))

        return self._in_rows(input_of(head, args, kwargs), y, changed, self._followed)
