"""What a method asks of a training beside gradients: a penalty, learning rates, a budget after each step, a loss on a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ..adapter_methods import Method, Progress, Trained
from .data import IGNORED
from .layers.layer import Adapted
from .layers.prompts import Prompts


class Part(NamedTuple):
    """An adapter in training at one site: its method and config there, and its own and shared parameters that are trained."""

    name: str
    path: str
    method: Method
    config: Any
    params: Mapping[str, nn.Parameter]


def parts(model: nn.Module) -> Iterator[Part]:
    """Every active adapter of ``model`` at every site where it has something to train."""
    for module in model.modules():
        if isinstance(module, Adapted):
            for name in module.active:
                every = {**module.shared(name), **dict(module.part(name).named_parameters())}
                trained = {key: value for key, value in every.items() if value.requires_grad}
                if trained:
                    yield Part(name, module.site.path, *module.methods[name], trained)


def penalty(model: nn.Module) -> torch.Tensor | None:
    """The sum of the methods' penalties over all sites in training, or None where no method has one."""
    every = list(parts(model))
    sites = Counter(part.name for part in every)
    terms = [part.method.penalty(part.config, part.params, sites[part.name]) for part in every if part.method.penalty is not None]
    return torch.stack(terms).sum() if terms else None


def context(model: Any) -> tuple[torch.Tensor, int] | None:
    """What the last pass gave for the labels in an active prompt: the weighted sum of their cross entropies and their number, or None."""
    for module in model.modules():
        if isinstance(module, Prompts) and module.shown is not None and module.active:
            hidden, module.shown = module.shown, None
            places, ids, weights = zip(*module.methods[module.active[-1]][1].learnt, strict=True)
            logits = model.get_output_embeddings()(hidden[:, [place - 1 for place in places]]).float()
            targets = torch.tensor(ids, device=logits.device).expand(logits.shape[:2])
            each = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            return (each * each.new_tensor(weights)).sum(), targets.numel()
    return None


def with_context(loss: torch.Tensor, labels: torch.Tensor, items: int | None, more: tuple[torch.Tensor, int], batches: int) -> torch.Tensor:
    """The mean ``loss`` over a batch's labels with ``more`` (:func:`context`) counted in.

    ``items`` is the number of labels that the mean was made of, where it is not that of this batch but of the ``batches`` of a step: these
    are then taken to have as many rows as this one.
    """
    own = int((labels[:, 1:] != IGNORED).sum()) if items is None else int(items)
    total, number = more
    every = own + number * (1 if items is None else batches)
    return loss * (own / every) + total / every


def rates(model: nn.Module) -> dict[nn.Parameter, float]:
    """The parameters whose learning rate is a multiple of the others', and that multiple."""
    factors = ((part, part.method.rates(part.config)) for part in parts(model) if part.method.rates is not None)
    return {part.params[key]: factor for part, own in factors for key, factor in own.items() if key in part.params and factor != 1}


def with_rates(optimizer: torch.optim.Optimizer, factors: Mapping[nn.Parameter, float]) -> torch.optim.Optimizer:
    """The optimizer, before its first step, with its groups divided so that those parameters have their multiple of the rate."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        groups.extend({**group, "params": some, "lr": group["lr"] * factor} for factor, some in by_factor.items())
    optimizer.param_groups[:] = groups
    return optimizer


def spend(model: nn.Module, progress: Progress, states: Mapping[str, Any]) -> dict[str, Any]:
    """Lets the methods with a budget change their parameters after an optimizer step, while the gradients are still there.

    ``states`` is what the last call returned, at first an empty mapping: adapter name -> the method's own state.
    """
    sites: dict[str, dict[str, Part]] = {}
    for part in parts(model):
        if part.method.budget is not None:
            sites.setdefault(part.name, {})[part.path] = part
    after = {}
    for name, own in sites.items():
        budget = next(iter(own.values())).method.budget
        assert budget is not None
        seen = {path: Trained(part.config, {key: value.detach() for key, value in part.params.items()},
                              {key: _gradient(value) for key, value in part.params.items()}) for path, part in own.items()}
        after[name], changed = budget(progress, states.get(name), seen)
        for path, values in changed.items():
            for key, value in values.items():
                own[path].params[key].detach().copy_(value)
    return after


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
