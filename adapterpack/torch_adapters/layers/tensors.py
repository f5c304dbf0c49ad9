"""Converts torch tensors to numpy arrays, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...errors import Unsupported
from ...io.safetensors import FLOATS, dtype_name


def as_numpy(value: torch.Tensor) -> np.ndarray:
    """A tensor as a numpy array: floats as float32, the rest as it is.

    Raises:
        Unsupported: it has no data.
    """
    if value.is_meta:
        raise Unsupported(
            "a tensor is not in memory",
            found=f"{tuple(value.shape)} on the meta device",
            remedy=(
                "load the model without offloading, or let accelerate offload the base before the adapter "
                "is put into it"
            ),
        )
    value = gather(value).detach()
    array: np.ndarray = (value.float() if value.is_floating_point() else value).cpu().numpy()
    return array


def gather(value: torch.Tensor) -> torch.Tensor:
    """A whole tensor of one that is sharded over processes, all of which have to call this; any other as it
    is.
    """
    if isinstance(value, DTensor):
        return value.full_tensor()
    if hasattr(value, "ds_id"):  # a parameter that DeepSpeed's ZeRO-3 partitions
        import deepspeed  # type: ignore[import-not-found]  # noqa: PLC0415 - only where it did

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().clone()
    return value


def whole_shape(value: torch.Tensor) -> tuple[int, ...]:
    """The shape of a tensor, that of the whole one where ZeRO-3 partitions it."""
    return tuple(getattr(value, "ds_shape", value.shape))


def as_tensor(value: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of a numpy array as a tensor: floats as float32, the rest as it is."""
    return torch.from_numpy(
        np.array(value, np.float32 if dtype_name(value.dtype) in FLOATS else value.dtype)
    ).to(device)


def as_parameter(value: np.ndarray, device: torch.device) -> nn.Parameter:
    """A copy of a numpy array as a parameter that is not trained yet: floats as float32, the rest as it
    is.
    """
    return nn.Parameter(as_tensor(value, device), requires_grad=False)
