"""The laws of what has a whole decoder for its subject: prompts, and what an attention looks at. They need
torch and transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adapterpack.errors import Unsupported
from adapterpack.testing import MODELS, Case, DecoderShape, digests, require

from .prompts import ROWS, prompted


def _model_of(case: Case) -> DecoderShape:
    """The decoder of the case: its own, or the first."""
    return case.layer if isinstance(case.layer, DecoderShape) else MODELS[0]


def only_the_adapter_trains_there(case: Case) -> None:
    """As many numbers want gradients as ``shapes`` declares of what is trained, at every site; a step of SGD
    leaves the bytes of the decoder as they were, and moves the adapter.
    """
    import torch

    from adapterpack.torch_adapters.layers.layer import Adapted

    model = prompted(case, _model_of(case)).train()
    sites = [module._site for module in model.modules() if isinstance(module, Adapted)]
    shapes = [
        shape
        for site in sites
        for name, shape in case.method.shapes(case.config, site).items()
        if name in case.trains
    ]
    wanting = [value for value in model.parameters() if value.requires_grad]
    found, declared = sum(value.numel() for value in wanting), sum(int(np.prod(shape)) for shape in shapes)
    require(found == declared, f"{found} numbers want gradients, {declared} are declared")

    def bits(yes: bool) -> dict[str, str]:
        return digests(
            {
                name: value.detach().numpy()
                for name, value in model.named_parameters()
                if value.requires_grad is yes
            }
        )

    base, adapter = bits(False), bits(True)
    (model(input_ids=torch.tensor([ROWS[2]]), use_cache=False).logits ** 2).mean().backward()
    torch.optim.SGD(wanting, lr=0.1).step()
    require(bits(False) == base, "training changed the base")
    require(bits(True) != adapter, "training did not change the adapter")


def decoder_gradients(case: Case) -> None:
    """Gradients reach what is trained and nothing else; with checkpointing they are the same to the bit.

    Checkpointing drops a cache: keys and values that stand in one are refused under it, with an error that
    says so.
    """
    model = prompted(case, _model_of(case)).train()
    plain = _gradients(model, model)
    reached = {name.rpartition(".")[2] for name, value in plain.items() if np.abs(value).max() > 0}
    require(
        reached == case.trains and len(plain) == sum(value.requires_grad for value in model.parameters()),
        f"gradients reach {sorted(reached)}, trained are {sorted(case.trains)}",
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if (
        case.method.kind == "prompt"
        and case.method.normal_form(case.config, case.trained(), case.site).cache is not None
    ):
        try:
            _gradients(model, model)
        except Unsupported:
            return
        raise AssertionError("checkpointing drops the cache that holds the prompt, and nobody says so")
    again = _gradients(model, model)
    require(
        all(np.array_equal(value, again[name]) for name, value in plain.items()),
        "checkpointing changes a gradient",
    )


def compiled_decoder_gradients(case: Case) -> None:
    """Gradients of a decoder under ``torch.compile`` are those without, within 1e-5 of the largest."""
    import torch

    model = prompted(case, _model_of(case)).train()
    plain = _gradients(model, model)
    torch._dynamo.reset()
    compiled = _gradients(model, torch.compile(model, backend="aot_eager"))
    require(plain.keys() == compiled.keys() and len(plain) > 0, "other parameters have gradients")
    for name, value in plain.items():
        error = float(np.abs(value - compiled[name]).max())
        require(error <= 1e-5 * (np.abs(value).max() + 1), f"the gradient of {name} differs when compiled")


def _gradients(model: Any, through: Any) -> dict[str, np.ndarray]:
    import torch

    model.zero_grad()
    (through(input_ids=torch.tensor([ROWS[2]]), use_cache=False).logits ** 2).mean().backward()
    return {
        name: value.grad.numpy().copy() for name, value in model.named_parameters() if value.grad is not None
    }
