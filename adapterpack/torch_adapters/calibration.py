"""Measures the inputs of each site and the gradient of the loss by its weight on sample data, for data-driven
initialisations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_methods import LAYOUTS, Calibration, Site
from ..errors import AdapterpackError, ConfigError, Unsupported
from ..tasks.data import Row
from .layers import device_of, module_at
from .layers.active import evaluation_mode
from .layers.calls import Args, Kwargs
from .layers.wrapper import input_of

MEASURED = frozenset({"moment", "gradient", "fisher"})
_BACKWARD = frozenset({"gradient", "fisher"})


def measure(
    model: nn.Module, sites: Sequence[Site], needs: frozenset[str], data: Iterable[Row] | None
) -> dict[str, Calibration]:
    """Runs ``model`` over ``data``, batches of keyword arguments, and returns the calibration of each site by
    path; empty if ``needs`` asks for none.

    The Fisher information is empirical: the mean square of the batches' gradients, so batches of a single row
    give the usual per-example estimate. The second moment of the inputs counts only positions that
    ``attention_mask`` keeps, if a batch has a mask. The gradient is that of the model's own loss, so the
    batches must hold labels; hooks sum it, and no weight has to require gradients. Sums are float64. The
    model keeps its parameters and its training mode.

    Raises:
        ConfigError: there is a need and no data, or no loss to take a gradient of.
        AdapterpackError: a site was not run.
    """
    wanted = needs & MEASURED
    if not wanted:
        return {}
    if data is None:
        raise ConfigError(
            "this initialisation looks at sample data",
            where="data",
            expected="batches of the model's inputs",
            remedy="give adapt(..., data=batches)",
        )
    # Fail before the first forward pass, which may take long.
    for site in sites:
        if not LAYOUTS[site.kind].linear:
            raise Unsupported(
                "what goes into a site is measured at linear layers only",
                where=site.path,
                found=site.kind,
                remedy="choose an initialisation that looks at no sample data, or other targets",
            )
    sums = {site.path: _Sums(wanted) for site in sites}
    device = device_of(model)
    batches = 0
    with evaluation_mode(model), ExitStack() as stack, torch.set_grad_enabled(bool(wanted & _BACKWARD)):
        for path, site_sums in sums.items():
            layer = module_at(model, path)
            stack.callback(layer.register_forward_hook(site_sums.add, with_kwargs=True).remove)
        for batch in data:
            inputs = {key: value.to(device) for key, value in batch.items()}
            for site_sums in sums.values():
                site_sums.mask = inputs.get("attention_mask")
            _run(model, inputs, bool(wanted & _BACKWARD))
            for site_sums in sums.values():
                site_sums.end()
            batches += 1
    return {path: site_sums.means(path, batches) for path, site_sums in sums.items()}


def _run(model: nn.Module, batch: Mapping[str, Tensor], backward: bool) -> None:
    """Runs one batch, forward and, if ``backward``, backward from the model's loss."""
    if not backward:
        model(**batch)
        return
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    # With all parameters frozen, autograd would build no graph. Requiring a gradient of the embeddings'
    # output makes it build one through every layer after them.
    hook = (
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        if embeddings is not None
        else None
    )
    try:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ConfigError(
                "this initialisation looks at the gradient of the loss, and the model gives none",
                where="data",
                remedy="put labels into the batches",
            )
        loss.backward()
    finally:
        if hook is not None:
            hook.remove()


class _Sums:
    """The running sums of one layer."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self.wanted = wanted
        self.rows = 0
        self.mask: Tensor | None = None
        self.moment: Any = 0.0
        self.gradient: Any = 0.0
        self.fisher: Any = 0.0
        self.batch: Any = None

    def add(self, layer: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> None:
        """Adds the inputs of a call to the second moment, and hooks its output's gradient; as a hook."""
        x = input_of(layer, args, kwargs).detach()
        if "moment" in self.wanted:
            rows = (
                x[self.mask.bool()]
                if self.mask is not None and self.mask.shape == x.shape[:-1]
                else x.reshape(-1, x.shape[-1])
            )
            self.moment = self.moment + (rows.double().T @ rows.double()).cpu()
            self.rows += len(rows)
        if self.wanted & _BACKWARD and output.requires_grad:
            output.register_hook(self._backward(x))

    def _backward(self, x: Tensor) -> Callable[[Tensor], None]:
        """Returns a hook that adds the gradient by the weight, for the input ``x``."""

        def add(gradient: Tensor) -> None:
            flat = gradient.reshape(-1, gradient.shape[-1]).double()
            product = (flat.T @ x.reshape(-1, x.shape[-1]).double()).cpu()
            self.batch = product if self.batch is None else self.batch + product

        return add

    def end(self) -> None:
        """Adds the gradient of the batch that has just ended to the sums."""
        # Squared per batch, not per call: a layer that runs several times has one gradient, the sum of its
        # calls.
        if self.batch is not None:
            self.gradient = self.gradient + self.batch
            if "fisher" in self.wanted:
                self.fisher = self.fisher + self.batch**2
        self.batch = None

    def means(self, path: str, batches: int) -> Calibration:
        """Returns the means over all batches; raises if one that is needed was never measured."""
        moment = self.moment / self.rows if self.rows else None
        gradient, fisher = (
            total / batches if isinstance(total, Tensor) else None for total in (self.gradient, self.fisher)
        )
        values = {"moment": moment, "gradient": gradient, "fisher": fisher}
        if missing := [name for name, value in values.items() if name in self.wanted and value is None]:
            raise AdapterpackError(
                "the sample data did not reach a site",
                where=path,
                found=f"no {missing[0]}",
                remedy="give batches that run through it, or leave it out of the targets",
            )
        return Calibration(
            **{
                name: None if value is None or name not in self.wanted else value.numpy()
                for name, value in values.items()
            }
        )
