"""GLoRA beside PEFT on whole models: layers with and without a bias, PEFT's folders in, ours out, and the
merge.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

import adapterpack as ap
from adapterpack.adapter_methods import fold
from adapterpack.pack import from_peft


class Two(nn.Module):
    """A layer with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(9, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


FORMS = [
    {},
    {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    {"config_A_B": "constant", "config_D_E": "none"},
    {"config_C": "none"},
]


@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_pefts_folder_means_the_same(forms: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's folder with random values gives PEFT's outputs, folded too; written again, PEFT reads the same;
    all within 1e-5.
    """
    theirs = peft.get_peft_model(Two(), peft.GloraConfig(r=3, target_modules=["a", "b"], **forms)).eval()
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=noise))
    theirs.save_pretrained(tmp_path / "theirs")
    pack, x = from_peft.read(tmp_path / "theirs", "same"), torch.randn(4, 9, generator=noise)
    ours = ap.attach(Two(), pack, check_base=False)
    again = ap.save(ours, tmp_path / "ours", adapter="same")
    back = peft.PeftModel.from_pretrained(Two(), str(tmp_path / "ours")).eval()
    folded = Two()
    with torch.no_grad():
        for adapter in again.adapters():
            layer = folded.get_submodule(adapter.site.path)
            bias = None if layer.bias is None else layer.bias.numpy().copy()
            known = dataclasses.replace(adapter.site, weight=layer.weight.numpy().copy(), base_bias=bias)
            weight, moved = fold(
                again.method, adapter.config, adapter.params, known, layer.weight.numpy().copy(), bias
            )
            layer.weight.copy_(torch.from_numpy(weight))
            assert (moved is None) == (bias is None)
            if moved is not None:
                layer.bias.copy_(torch.from_numpy(moved))
        expected = theirs(x).numpy()
        assert np.abs(expected - Two()(x).numpy()).max() > 1e-2
        for found in (ours(x), back.base_model(x), folded(x)):
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
