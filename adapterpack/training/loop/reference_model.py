"""The reference model of preference losses: the model as it was when training began.

It is the same model with another adapter, or none, active, so that no second model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...torch_adapters.layers import evaluating


class Reference(nn.Module):
    """A model in evaluation mode with only the adapter ``name`` active, or none (None); it owns no
    parameters.

    It has what TRL uses of a causal language model: config, backbone and output layer.
    """

    def __init__(self, model: nn.Module, name: str | None) -> None:
        super().__init__()
        # Not a child module: changing this module's mode or device must not change the model's.
        self.__dict__["_policy"] = model
        self._name = name

    @property
    def config(self) -> Any:
        """The model's config."""
        return self._policy.config

    @property
    def base_model(self) -> Callable[..., Any]:
        """The backbone, which returns hidden states."""
        return partial(self._as_it_was, self._policy.base_model)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output layer; an adapter of it was refused when the run was prepared."""
        return self._policy.get_output_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model would have returned when training began."""
        return self._as_it_was(self._policy, *args, **kwargs)

    def _as_it_was(self, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self._policy, self._name), torch.no_grad():
            return part(*args, **kwargs)
