"""Wraps a block (attention, feed-forward or a layer) to adapt its output, as bottleneck adapters do."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ...adapter_methods import Site
from ...adapter_methods.forms.blocks import evaluate_block
from ...errors import SiteNotFound, Unsupported
from .calls import Args, Kwargs
from .layer import Adapted, NewAdapter, place
from .wrapper import innermost, input_of, module_at


class AdaptedBlock(Adapted):
    """A frozen block with named adapters on its output, which is a tensor or a tuple that begins with one.

    Several active adapters apply one after the other. An adapter may also read an input: the block's, which
    is its first argument, or that of another module (``source``), which a hook captures in the same pass.
    With ``output_hidden_states`` the model records the outputs of its own layers, before the adapter of a
    layer changes them; the following layers and the result include the change.
    """

    def __init__(self, base: nn.Module, site: Site, model: nn.Module) -> None:
        super().__init__(base, site)
        self._find = partial(module_at, model)
        self._watched_inputs: dict[str, Tensor] = {}
        self._hooks: dict[str, Any] = {}

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Adds an adapter; if it reads the input of another module, hooks that module."""
        super()._add(name, adapter)
        source = getattr(adapter.config, "source", "output")
        if source not in {"output", "input"}:
            try:
                entry = innermost(self._find(source))
            except AttributeError as error:
                raise SiteNotFound(
                    "the model has no module of which to read the input", where=self._site.path, found=source
                ) from error
            self._hooks[name] = entry.register_forward_pre_hook(partial(self._see, name), with_kwargs=True)

    def _remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        super()._remove(name)
        if name in self._hooks:
            self._hooks.pop(name).remove()

    def _run_active(self, args: Args, kwargs: Kwargs) -> Any:
        output = self._base(*args, **kwargs)
        h = output[0] if isinstance(output, tuple) else output
        block_input = self._enter(args, kwargs)[0] if args or kwargs else None
        for name in self._active:
            source = self._watched_inputs.pop(name, None) if name in self._hooks else block_input
            h = self._by_row(name, h, h, partial(self._change, name, source))
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _change(self, name: str, source: Any, h: Tensor, _: Tensor, index: Tensor | None) -> Tensor:
        """Applies an adapter to the output ``h`` at the positions where it acts; ``index`` are the batch rows
        that ``h`` holds (None: all).
        """
        if index is not None and isinstance(source, Tensor):
            source = source[index]
        changed = self._weigh(name, h, self._compute(name, h, source))
        mask = self._mask(name, h, index)
        return changed if mask is None else place(mask, changed, h, self._site)

    def _compute(self, name: str, h: Tensor, x: Any) -> Tensor:
        """Computes the adapter's output from the block's output ``h`` and the adapter's other input ``x``."""
        cfg = self._held[name].config
        dtype = self._precision(name, h.dtype)
        drop = partial(functional.dropout, p=cfg.dropout) if self.training and cfg.dropout else None
        if getattr(cfg, "reads_input", False):
            if not isinstance(x, Tensor) or x.shape != h.shape:
                raise Unsupported(
                    "an adapter parallel to a block reads an input that is as wide as the output",
                    where=self._site.path,
                    expected=tuple(h.shape),
                    found=tuple(x.shape) if isinstance(x, Tensor) else "no tensor",
                    remedy="name other targets, or another source",
                )
            x = x.to(dtype)
        form = self._held[name].method.normal_form(cfg, self._tensors(name, dtype), self._site)
        return evaluate_block(form, h.to(dtype), x, drop).to(h.dtype)

    def _see(self, name: str, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Keeps the input of a hooked module until the block reads it."""
        if name in self._active:
            self._watched_inputs[name] = input_of(module, args, kwargs)
