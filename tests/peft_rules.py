"""PEFT's ``add_weighted_adapter`` as a combiner, so that the laws of combination can be put to it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from rule_laws import WHOLE, Deltas

from adapterpack.pack.pack import Pack

TYPES = (
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)


class Peft:
    """One ``combination_type``; with ``_svd`` at a rank that cuts nothing. PEFT draws from torch's generator,
    which is seeded anew.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.weights: Sequence[float] = [0.7, -0.4, 1.1]

    def run(self, packs: Sequence[Pack], weights: Sequence[float], *, neutral: bool = False) -> Deltas:
        """See :class:`~rule_laws.Combiner`."""
        return changes(self._merged(packs, weights, neutral), "merged")

    def reloaded(self, packs: Sequence[Pack], weights: Sequence[float]) -> Deltas:
        """See :class:`~rule_laws.Combiner`."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._merged(packs, weights, False).save_pretrained(folder, selected_adapters=["merged"])
            return changes(
                peft.PeftModel.from_pretrained(_model(packs[0]), str(Path(folder) / "merged")), "default"
            )

    def _merged(self, packs: Sequence[Pack], weights: Sequence[float], neutral: bool) -> Any:
        model = loaded(packs)
        options: dict[str, Any] = {"svd_rank": WHOLE} if "svd" in self.kind else {}
        if self.kind not in ("cat", "svd", "linear"):
            options["density"] = 1.0 if neutral else 0.5
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(
                [f"p{i}" for i in range(len(packs))],
                list(weights),
                "merged",
                combination_type=self.kind,
                **options,
            )
        return model


def loaded(packs: Sequence[Pack]) -> Any:
    """A PEFT model with one adapter a pack, named ``p0``, ``p1``, ..."""
    model: Any = None
    for index, pack in enumerate(packs):
        adapters = list(pack.adapters())
        cfg = adapters[0].config
        config = peft.LoraConfig(
            r=cfg.r, lora_alpha=cfg.alpha, use_rslora=cfg.use_rslora, target_modules=["q_proj", "v_proj"]
        )
        if model is None:
            model = peft.get_peft_model(_model(pack), config, adapter_name="p0")
        else:
            model.add_adapter(f"p{index}", config)
        for a in adapters:
            layer = model.base_model.model.get_submodule(a.site.path)
            layer.lora_A[f"p{index}"].weight.data = torch.tensor(a.params["lora_A"])
            layer.lora_B[f"p{index}"].weight.data = torch.tensor(a.params["lora_B"])
    return model


def changes(model: Any, adapter: str) -> Deltas:
    """What PEFT says that an adapter adds to each weight."""
    return {
        name.removeprefix("base_model.model."): np.asarray(
            module.get_delta_weight(adapter).detach().numpy(), np.float64
        )
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def _model(pack: Pack) -> Any:
    """The bare layers of a pack's sites."""
    layers = torch.nn.ModuleDict()
    for a in pack.adapters():
        layers[a.site.path.rpartition(".")[2]] = torch.nn.Linear(
            a.site.in_features or 0, a.site.out_features or 0, bias=False
        )
    return torch.nn.ModuleDict({"layers": layers})
