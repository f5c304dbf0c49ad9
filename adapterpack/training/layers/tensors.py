"""Converts torch tensors to numpy arrays, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ...errors import Unsupported
from ...io.safetensors import FLOATS, dtype_name


def as_numpy(value: torch.Tensor) -> np.ndarray:
    """A tensor as a numpy array: floats as float32, the rest as it is.

    Raises:
        Unsupported: it has no data.
    """
    if value.is_meta:
        raise Unsupported("a tensor is not in memory", found=f"{tuple(value.shape)} on the meta device",
                          remedy="load the model without offloading, or let accelerate offload the base before the adapter is put into it")
    array: np.ndarray = (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy()
    return array


def as_tensor(value: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of a numpy array as a tensor: floats as float32, the rest as it is."""
    return torch.from_numpy(np.array(value, np.float32 if dtype_name(value.dtype) in FLOATS else value.dtype)).to(device)


def as_parameter(value: np.ndarray, device: torch.device) -> nn.Parameter:
    """A copy of a numpy array as a parameter that is not trained yet: floats as float32, the rest as it is."""
    return nn.Parameter(as_tensor(value, device), requires_grad=False)
