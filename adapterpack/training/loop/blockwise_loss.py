"""Computes a language model's loss without storing its logits, if the model does nothing else with them.

For one call, the model's head returns its input, and the model's loss function takes that in place of logits
and computes the loss block by block (:mod:`.linear_cross_entropy`). The rest of the model's call is
unchanged: router losses, wrappers for several processes, gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from ...tasks import IGNORED
from ...torch_adapters import evaluation_mode
from ...torch_adapters.layers.layer import is_hooked
from .linear_cross_entropy import by_blocks, linear_cross_entropy

_TOKENS = 8
"""How many tokens of a row the trial uses."""
_CLOSE = 1e-3


class BlockwiseLoss:
    """The loss of a model with the head ``head``, with label smoothing, in blocks."""

    def __init__(self, model: Any, head: nn.Module, smoothing: float = 0.0) -> None:
        self._model = model
        self._head = head
        self._smoothing = smoothing
        self._logits = head.forward

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Makes the model compute its loss in blocks, inside the context."""
        before = self._model.__dict__.get("_loss_function")
        self._head.forward = _itself  # type: ignore[method-assign, assignment]
        self._model.loss_function = self._loss
        try:
            yield
        finally:
            del self._head.forward
            if before is None:
                del self._model._loss_function
            else:
                self._model.loss_function = before

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Replaces transformers' ``ForCausalLMLoss``; ``logits`` is the head's input instead."""
        if shift_labels is None:
            padded = functional.pad(labels, (0, 1), value=ignore_index)  # type: ignore[arg-type]
            shift_labels = padded[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        learned = targets != ignore_index
        hidden = logits.reshape(-1, logits.shape[-1])[learned]
        targets = targets[learned]
        if _is_plain(self._head):
            total = linear_cross_entropy(hidden, self._head.weight, self._head.bias, targets, self._smoothing)
        else:
            total = by_blocks(self._logits, vocab_size, hidden, targets, self._smoothing)
        items = len(targets) if num_items_in_batch is None else num_items_in_batch
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def blockwise_loss(model: Any, inputs: Mapping[str, Any], smoothing: float = 0.0) -> BlockwiseLoss | None:
    """Returns the loss in blocks for a model; None if the model cannot use it and keeps its own loss.

    Tries the model with a few tokens of ``inputs``: its logits must be the head's output unchanged, and both
    losses must agree.
    """
    labels = inputs.get("labels")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if (
        "input_ids" not in inputs
        or not isinstance(head, nn.Module)
        or not isinstance(labels, Tensor)
        or labels.ndim != 2
        or getattr(model, "loss_function", None) is not ForCausalLMLoss
        or _is_changed(head)
    ):
        return None
    ids = inputs["input_ids"][:1, :_TOKENS]
    found = []
    loss = BlockwiseLoss(model, head)
    handle = head.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        # Once as the model does it, once in blocks; the hook shows whether its logits are the head's output
        # as such.
        with torch.no_grad(), evaluation_mode(model):
            whole = model(input_ids=ids, labels=ids)
            handle.remove()
            with loss.instead():
                again = model(input_ids=ids, labels=ids).loss
    except Exception:
        # The model fails without real logits, or on this input: it keeps its own loss, which says why.
        return None
    finally:
        handle.remove()
    same = (
        len(found) == 1
        and found[0].shape == whole.logits.shape
        and torch.equal(found[0].float(), whole.logits.float())
    )
    return (
        BlockwiseLoss(model, head, smoothing)
        if same and torch.isclose(again, whole.loss, rtol=_CLOSE)
        else None
    )


def _is_changed(head: nn.Module) -> bool:
    """Whether the head has hooks, a replaced ``forward``, or a parameter that is quantized, offloaded or
    (with ``ds_id``) partitioned by DeepSpeed.
    """
    return is_hooked(head) or any(
        type(value) not in {nn.Parameter, Tensor} or value.is_meta or hasattr(value, "ds_id")
        for value in head.parameters()
    )


def _is_plain(head: nn.Module) -> bool:
    """Whether the head is an ordinary frozen linear layer."""
    return type(head) is nn.Linear and not any(value.requires_grad for value in head.parameters())


def _itself(hidden: Tensor) -> Tensor:
    """Replaces the head's ``forward``: returns its input."""
    return hidden
