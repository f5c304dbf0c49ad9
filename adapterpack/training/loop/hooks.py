"""Applies what adapter methods add to ordinary training: penalties, learning rates, updates after each step,
and a loss on prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from ...adapter_methods import Method, Progress, Site, TrainedSite, is_stacked
from ...tasks.data import IGNORED
from ...torch_adapters import adapted_layers
from ...torch_adapters.layers import Prompts
from .method_states import States


class AdapterPart(NamedTuple):
    """One adapter in training at one site: its method and config, and its trained parameters, own and shared.

    Methods see each matrix of a stack as a site of its own, with its slice of the site's parameters.
    """

    name: str
    site: Site
    method: Method
    config: Any
    site_params: Mapping[str, nn.Parameter]
    shared: Mapping[str, nn.Parameter]

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """All trained parameters."""
        return {**self.shared, **self.site_params}

    @property
    def matrices(self) -> Mapping[str, int | None]:
        """The path of each matrix, with its index in the stack; None for a single matrix."""
        return (
            {f"{self.site.path}[{number}]": number for number in range(self.site.stack)}
            if is_stacked(self.site.kind)
            else {self.site.path: None}
        )

    def of(self, number: int | None, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the slices, as views, that belong to one matrix of a stack; shared parameters have no
        slices.
        """
        return {
            key: value if number is None or key in self.shared else value[number]
            for key, value in values.items()
        }


def parts(model: nn.Module) -> Iterator[AdapterPart]:
    """Yields every active adapter of ``model`` at every site with trained parameters."""
    for module in adapted_layers(model):
        for name in module._active:
            site_params, shared = (
                {key: value for key, value in parameters if value.requires_grad}
                for parameters in (module._part(name).named_parameters(), module._shared(name).items())
            )
            if site_params or shared:
                held = module._held[name]
                yield AdapterPart(name, module._site, held.method, held.config, site_params, shared)


def penalty(model: nn.Module) -> Tensor | None:
    """Returns the sum of the methods' penalties over all trained sites, or None if no method has one."""
    every = [part for part in parts(model) if "penalty" in part.method.overrides]
    sites = Counter((part.name, part.method.name) for part in every for _ in part.matrices)
    terms = [_penalty(part, sites[part.name, part.method.name]) for part in every]
    return torch.stack(terms).sum() if terms else None


def _penalty(part: AdapterPart, sites: int) -> Tensor:
    """Returns the penalty at one site, summed over the matrices of a stack."""
    term = part.method.overrides.get("penalty")
    assert term is not None

    def of_matrix(params: dict[str, Tensor]) -> Tensor:
        return term(part.config, {**part.shared, **params}, sites)

    site_params = dict(part.site_params)
    return vmap(of_matrix)(site_params).sum() if is_stacked(part.site.kind) else of_matrix(site_params)


def context(model: Any) -> tuple[Tensor, int] | None:
    """Returns the loss on the labelled tokens of an active prompt in the last forward pass: the weighted sum
    of their cross entropies and their number; None if there are none.
    """
    for module in model.modules():
        if isinstance(module, Prompts) and module._prompt_states is not None and module._active:
            hidden = module._prompt_states
            module._prompt_states = None
            places, ids, weights = zip(*module._held[module._active[-1]].config.learnt, strict=True)
            logits = model.get_output_embeddings()(hidden[:, [place - 1 for place in places]]).float()
            targets = torch.tensor(ids, device=logits.device).expand(logits.shape[:2])
            entropies = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            return (entropies * entropies.new_tensor(weights)).sum(), targets.numel()
    return None


def with_context(
    loss: Tensor, labels: Tensor, items: int | None, more: tuple[Tensor, int], batches: int
) -> Tensor:
    """Combines the mean ``loss`` over a batch's labels with that of ``more`` (:func:`context`).

    ``items`` is the number of labels by which the loss was divided, if that is of all ``batches`` of a step
    instead of this batch; the other batches are then assumed to have as many rows.
    """
    # A causal model predicts each label from the token before, so the first label of a row does not count.
    labelled = int((labels[:, 1:] != IGNORED).sum()) if items is None else int(items)
    total, number = more
    counted = labelled + number * (1 if items is None else batches)
    return loss * (labelled / counted) + total / counted


def rates(model: nn.Module) -> dict[nn.Parameter, float]:
    """Returns the parameters whose learning rate is a multiple of the base rate, and that factor."""
    factors = (
        (part, part.method.training.rates(part.config))
        for part in parts(model)
        if part.method.training.rates is not None
    )
    return {
        part.params[key]: factor
        for part, by_name in factors
        for key, factor in by_name.items()
        if key in part.params and factor != 1
    }


def with_rates(
    optimizer: torch.optim.Optimizer, factors: Mapping[nn.Parameter, float]
) -> torch.optim.Optimizer:
    """Splits the optimizer's groups, before its first step, so that these parameters get their multiple of
    the learning rate.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        groups.extend(
            {**group, "params": some, "lr": group["lr"] * factor} for factor, some in by_factor.items()
        )
    optimizer.param_groups[:] = groups
    return optimizer


def after_step(model: nn.Module, progress: Progress, states: States) -> States:
    """Lets methods change their parameters after an optimizer step, while the gradients still exist.

    ``states`` maps adapter and method names to the method's own state: at first empty, then what the last
    call returned.
    """
    sites: dict[tuple[str, str], dict[str, TrainedSite]] = {}
    updates: dict[tuple[str, str], Any] = {}
    for part in parts(model):
        if update := part.method.overrides.get("after_step"):
            key = part.name, part.method.name
            updates[key] = update
            values = {leaf: value.detach() for leaf, value in part.params.items()}
            gradients = {
                leaf: torch.zeros_like(value) if value.grad is None else value.grad
                for leaf, value in part.params.items()
            }
            sites.setdefault(key, {}).update(
                {
                    path: TrainedSite(part.config, part.of(number, values), part.of(number, gradients))
                    for path, number in part.matrices.items()
                }
            )
    after = {}
    for key, trained in sites.items():
        after[key], changed = updates[key](progress, states.get(key), trained)
        for path, values in changed.items():
            for leaf, value in values.items():
                trained[path].params[leaf].copy_(value)
    return after
