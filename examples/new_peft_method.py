"""A method that PEFT loads: what ``peft=`` adds to a method in one file.

The method scales the outputs of a layer: y' = o * (W x + b). PEFT has it as (IA)^3 without feedforward
layers, so a pack is a folder that PEFT loads, once the method says what PEFT calls its tensors and its
config. Run it with ``python examples/new_peft_method.py``: an adapter is saved, and PEFT computes the same
from its folder.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import peft
import torch

from adapterpack import adapt, save
from adapterpack.adapter_methods import (
    Method,
    NormalForm,
    PeftKeys,
    SiteConfig,
    Traits,
    register,
    widths_of,
    zeros,
)
from adapterpack.testing import prove


@dataclass(frozen=True)
class Outputs(SiteConfig):
    """The method has no hyper-parameters of its own."""


def shapes(cfg, site):
    """PEFT stores the factors as a column, so they are one here, too."""
    return {"output_scale": (site.out_features, 1)}


def normal_form(cfg, params, site):
    """The mathematics, once."""
    return NormalForm(output_scale=params["output_scale"][:, 0])


PEFT_KEYS = PeftKeys(
    Outputs,
    fields={},  # a field of the config -> what PEFT means where its config lacks it; {"r": 8} for a rank
    constants={"feedforward_modules": [], "fan_in_fan_out": False, "init_ia3_weights": True},
)

outputs = Method(
    name="outputs",
    summary="a trained scale on the outputs of each layer",
    paper="https://arxiv.org/abs/2205.05638",
    config=Outputs,
    traits=Traits(additive=False, identity_at_init=True, row_separable=True, low_rank=False),
    shapes=shapes,
    init=zeros(shapes, output_scale=1),  # a fresh adapter changes nothing
    normal_form=normal_form,
    examples=(Outputs(),),
    peft=PEFT_KEYS.form(
        "IA3",
        {"output_scale": "ia3_l"},  # our parameter -> what PEFT writes behind the path of the module
        features=widths_of(None, "output_scale"),  # which widths of a layer the tensors say
        matches=lambda config: config.get("peft_type") == "IA3" and not config.get("feedforward_modules"),
    ),
)

if __name__ == "__main__":
    print(f"{prove(register(outputs))} promises hold")
    base = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    weights, x = {key: value.clone() for key, value in base.state_dict().items()}, torch.randn(4, 5)
    ours = adapt(base, Outputs())
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.uniform_(0.5, 2)
    with tempfile.TemporaryDirectory() as folder:
        save(ours, Path(folder) / "pack")
        plain = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        plain.load_state_dict(weights)
        theirs = peft.PeftModel.from_pretrained(plain, str(Path(folder) / "pack"))
        torch.testing.assert_close(theirs(x), ours(x))
    print("PEFT computes the same from the pack's folder")
