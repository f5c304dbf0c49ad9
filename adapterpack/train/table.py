"""Embeddings as tables of rows with adapters, and the output heads that are tied to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..methods import Site, fold, run
from .layer import AdaptedLayer


class AdaptedTable(AdaptedLayer):
    """A frozen embedding with adapters of methods that fold row by row: only the rows that are looked up are folded.

    For a method its table is a layer ``[vocabulary, width]``. A head that is tied to the table is changed with it (:meth:`follow`).
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__(base, site)
        self._tie: Any = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The rows of the token ids ``x`` ``[...]``, with the active adapters applied: ``[..., width]``."""
        if not self.active:
            return self.base(x, *args, **kwargs)  # type: ignore[no-any-return]
        flat, stored = x.reshape(-1), self.weight.detach()
        rows: torch.Tensor = stored[flat].float()
        for name in self.active:
            method, cfg = self.methods[name]
            rows, _ = fold(method, cfg, self.every(name), self.site, rows, None, flat)  # type: ignore[arg-type]
        scale = getattr(self.base, "embed_scale", None)  # some models scale what they look up
        rows = rows.to(stored.dtype) if scale is None else rows.to(stored.dtype) * torch.as_tensor(scale).to(rows)
        return rows.reshape(*x.shape, rows.shape[-1])

    def follow(self, head: nn.Module) -> None:
        """Changes the outputs of ``head``, which has the table for its weight, by the active adapters; until :meth:`release`."""
        if self._tie is None:
            self._tie = head.register_forward_hook(self._head)

    def release(self) -> None:
        """Leaves the head alone again."""
        if self._tie is not None:
            self._tie.remove()

    def _head(self, head: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        for name in self.active:
            method, cfg = self.methods[name]
            tensors = {key: value.to(y.dtype) if value.is_floating_point() else value for key, value in self.every(name).items()}
            site = dataclasses.replace(self.site, weight=self.weight.detach())
            before = y
            y = run(method, cfg, tensors, site, lambda _, before=before: before, inputs[0])  # type: ignore[misc]
        return y
