"""Converts torch tensors to numpy arrays and back, and gathers sharded ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...errors import Unsupported
from ...io import FLOATS, dtype_name


def as_numpy(value: Tensor) -> np.ndarray:
    """Returns a tensor as a numpy array: floats as float32, others in their own dtype.

    Raises:
        Unsupported: the tensor is on the meta device, without data.
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


def gather(value: Tensor) -> Tensor:
    """Returns the full tensor of one that is sharded across processes, all of which must call this; other
    tensors unchanged.
    """
    if isinstance(value, DTensor):
        return value.full_tensor()
    if hasattr(value, "ds_id"):  # a parameter that DeepSpeed's ZeRO-3 partitions
        import deepspeed  # type: ignore[import-not-found]  # noqa: PLC0415 - only where it did

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().clone()
    return value


def whole_shape(value: Tensor) -> tuple[int, ...]:
    """Returns the shape of the full tensor where ZeRO-3 partitions it, else of the tensor itself."""
    return tuple(getattr(value, "ds_shape", value.shape))


def as_tensor(value: np.ndarray, device: torch.device) -> Tensor:
    """Returns a copy of a numpy array as a tensor: floats as float32, others in their own dtype."""
    return torch.from_numpy(
        np.array(value, np.float32 if dtype_name(value.dtype) in FLOATS else value.dtype)
    ).to(device)


def as_parameter(value: np.ndarray, device: torch.device) -> nn.Parameter:
    """Returns a copy of a numpy array as a parameter that requires no gradient: floats as float32, others in
    their own dtype.
    """
    return nn.Parameter(as_tensor(value, device), requires_grad=False)
