"""Holds adapters of an embedding's rows, which heads and embeddings tied to it follow."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from ...adapter_methods import Site, fold, run
from ...errors import Unsupported
from .layer import AdaptedLayer
from .wrapper import input_of


class AdaptedTable(AdaptedLayer):
    """A frozen embedding with adapters of methods that fold row by row: only the rows that are looked up are
    folded.

    For a method its table is a layer ``[vocabulary, width]``. What is tied to the table, a head or the
    embeddings of an encoder and a decoder, is changed with it (:meth:`_follow`) by the methods that say so.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__(base, site)
        self._ties: dict[nn.Module, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The rows of the token ids ``[...]``, with the active adapters applied: ``[..., width]``."""
        if not self._active:
            return self._base(*args, **kwargs)  # type: ignore[no-any-return]
        x, _ = self._enter(args, kwargs)
        return self._looked_up(x, self._base, self._active)

    @property
    def _followed(self) -> tuple[str, ...]:
        """The active adapters that change what is tied to the table."""
        return tuple(name for name in self._active if self._methods[name][0].traits.tied)

    def _looked_up(self, x: torch.Tensor, owner: nn.Module, names: tuple[str, ...]) -> torch.Tensor:
        stored = self._stored[0].detach()
        rows: torch.Tensor = stored[x].to(torch.promote_types(stored.dtype, torch.float32))
        for name in names:
            rows = self._by_row(name, x, rows, partial(self._replaced, name))
        scale = getattr(owner, "embed_scale", None)  # some models scale what they look up
        return (
            rows.to(stored.dtype)
            if scale is None
            else rows.to(stored.dtype) * torch.as_tensor(scale).to(rows)
        )

    def _replaced(
        self, name: str, x: torch.Tensor, rows: torch.Tensor, _: torch.Tensor | None
    ) -> torch.Tensor:
        """The rows of the token ids ``[...]`` with an adapter folded in: ``[..., width]``."""
        method, cfg = self._methods[name]
        flat = rows.reshape(-1, rows.shape[-1])
        tensors, ids = self._tensors(name, rows.dtype), x.reshape(-1)
        folded, _ = fold(method, cfg, tensors, self._site, flat, None, ids)  # type: ignore[arg-type]
        changed: torch.Tensor = self._weigh(name, flat, folded).reshape(rows.shape)
        return changed

    def _tied_to(self, leaf: str) -> list[nn.Module]:
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
        """Changes the outputs of ``tied``, a head or an embedding with the table for its weight, by the
        active adapters; until
        :meth:`_release`.
        """
        if tied not in self._ties:
            hook = self._twin if isinstance(tied, nn.Embedding) else self._head
            self._ties[tied] = tied.register_forward_hook(hook, with_kwargs=True)

    def _release(self) -> None:
        """Leaves what is tied alone again."""
        for hook in self._ties.values():
            hook.remove()
        self._ties.clear()

    def _twin(
        self, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor
    ) -> torch.Tensor:
        return self._looked_up(input_of(twin, args, kwargs), twin, self._followed) if self._followed else y

    def _head(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor
    ) -> torch.Tensor:
        x = input_of(head, args, kwargs)
        for name in self._followed:
            method, cfg = self._methods[name]
            tensors = {
                key: value.to(y.dtype) if value.is_floating_point() else value
                for key, value in self._every(name).items()
            }
            act = partial(
                run, method, cfg, tensors, dataclasses.replace(self._site, weight=self._stored[0].detach())
            )

            def changed(x: torch.Tensor, y: torch.Tensor, _: Any, name: str = name, act: Any = act) -> Any:
                return self._weigh(name, y, act(lambda _: y, x))

            y = self._by_row(name, x, y, changed)
        return y
