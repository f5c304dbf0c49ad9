"""Proves a whole training: a few steps as the trainer takes them, and the pack of their result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from adapterpack.adapter_methods import Progress, is_stacked
from adapterpack.adapter_methods.core.layouts import unfoldable
from adapterpack.testing import MODELS, Case, DecoderShape, require, to_tensor

from .layer_fixtures import STANDS
from .layer_kind_laws import NAME, PROBES
from .model import inputs_of, module_of
from .prompts import ROWS, decoder

STEPS = 5


class _Subject(NamedTuple):
    """A base that is the same every time, a config for it, and what the loss and a comparison look at."""

    base: Callable[[], Any]
    config: Any
    run: Callable[[Any], Any]


def trained_and_packed(case: Case) -> None:
    """At every kind of layer that ``traits.layers`` names, five steps of SGD as the trainer takes them, with
    the method's own penalty, learning rates and budget, move finite parameters; and the pack of them,
    attached to a fresh base, gives the trained model's outputs within 1e-5 of the largest. Configs after the
    first are tried at the first kind and at stacks, whose matrices train one by one.
    """
    # which come of PEFT's files alone
    first, *others = [kind for kind in case.method.traits.layers if not unfoldable(kind)]
    for kind in (
        first,
        *(kind for kind in others if case.config == case.method.examples[0] or is_stacked(kind)),
    ):
        try:
            _trains(_subject(case, kind))
        except Exception as error:
            raise AssertionError(f"at a layer of kind {kind}: {error}") from error


def _trains(subject: _Subject) -> None:
    import torch

    from adapterpack.torch_adapters.adapt import adapt, attach
    from adapterpack.torch_adapters.save import save
    from adapterpack.training.loop import hooks

    model = adapt(subject.base(), subject.config, "a").train()
    trains = [value for value in model.parameters() if value.requires_grad]
    before = [value.detach().clone() for value in trains]
    optimizer = hooks.with_rates(torch.optim.SGD(trains, lr=0.1), hooks.rates(model))
    states: dict[tuple[str, str], Any] = {}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss, extra = ((subject.run(model) - 1.0) ** 2).mean(), hooks.penalty(model)
        (loss if extra is None else loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(trains, 1.0)
        optimizer.step()
        states = hooks.after_step(model, Progress(step, STEPS), states)
    require(
        all(bool(value.isfinite().all()) for value in trains), "training gives numbers that are not finite"
    )
    require(
        any(not torch.equal(*pair) for pair in zip(trains, before, strict=True)), "training moves nothing"
    )
    with torch.no_grad():
        right = subject.run(model.eval())
        found = subject.run(attach(subject.base(), save(model, None, name="example")).eval())
    error = float((found - right).abs().max())
    require(error <= 1e-5 * float(right.abs().max()), f"the pack is off by {error:.2g} from what was trained")


def _subject(case: Case, kind: str) -> _Subject:
    """A decoder for what only a decoder can carry; else one layer, the case's own or a probe of its kind."""
    import torch

    if case.method.traits.layers[0] not in STANDS:
        sizes = case.layer if isinstance(case.layer, DecoderShape) else MODELS[0]
        ids = torch.tensor([ROWS[2]])
        return _Subject(
            lambda: decoder(sizes), case.config, lambda model: model(input_ids=ids, use_cache=False).logits
        )
    config = dataclasses.replace(case.config, targets="proj", dropout=0.0)
    if kind == case.method.traits.layers[0]:
        x = inputs_of(case)
        return _Subject(lambda: module_of(case), config, lambda model: model(x))
    probe = PROBES[kind]
    inputs = to_tensor(probe.x)
    x = inputs.float() if inputs.is_floating_point() else inputs
    ids = torch.arange(x.shape[1]).expand(x.shape[:2])

    def base() -> Any:
        model, generator = probe.make(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(torch.randn(value.shape, generator=generator))
        if case.config.acts is not None:
            model.table = x
        return model

    return _Subject(
        base,
        dataclasses.replace(config, targets=NAME),
        lambda model: model(x if case.config.acts is None else ids),
    )
