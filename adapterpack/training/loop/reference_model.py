"""What preferences are compared with: the model as it was when the training began, by another adapter in the
same model, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...torch_adapters.layers.active import evaluating


class Reference(nn.Module):
    """A model in evaluation mode with the adapter ``name`` alone, or with none. It owns nothing: the base is
    in memory once.

    It has what TRL asks of a causal language model: its config, its backbone, and its output layer.
    """

    def __init__(self, model: nn.Module, name: str | None) -> None:
        super().__init__()
        # no child, whose mode and device would be changed with this module's
        self.__dict__["_policy"] = model
        self._name = name

    @property
    def config(self) -> Any:
        """The model's config."""
        return self._policy.config

    @property
    def base_model(self) -> Callable[..., Any]:
        """What gives the last hidden states."""
        return partial(self._as_it_was, self._policy.base_model)

    def get_output_embeddings(self) -> nn.Module:
        """What makes logits of hidden states; no adapter changes it."""
        head: nn.Module = self._policy.get_output_embeddings()
        return head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gave in the beginning."""
        return self._as_it_was(self._policy, *args, **kwargs)

    def _as_it_was(self, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self._policy, self._name), torch.no_grad():
            return part(*args, **kwargs)
