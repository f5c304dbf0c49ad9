"""Trains text embeddings by the losses of sentence-transformers, on pooled hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from ...base import pooling_of
from ...errors import ConfigError
from ..trainers.contrastive import Contrastive

Texts = Mapping[str, Tensor]
"""Unit vectors ``[rows, n]`` of ``anchor``, ``positive`` and possibly ``negative``."""


def multiple_negatives(texts: Texts, scores: Tensor | None, settings: Contrastive) -> Tensor:
    """Returns the cross-entropy of finding each text's positive among all positives and negatives of the
    batch.
    """
    others = torch.cat([texts["positive"], *([texts["negative"]] if "negative" in texts else [])])
    own = torch.arange(len(texts["anchor"]), device=others.device)
    return functional.cross_entropy(settings.scale * texts["anchor"] @ others.T, own)


def triplet(texts: Texts, scores: Tensor | None, settings: Contrastive) -> Tensor:
    """Returns by how much the negative is closer than ``margin`` beyond the positive, in distances of one
    minus the cosine.
    """
    near, far = ((texts["anchor"] * texts[part]).sum(-1) for part in ("positive", "negative"))
    return (far - near + settings.margin).clamp_min(0).mean()


def cosine(texts: Texts, scores: Tensor | None, settings: Contrastive) -> Tensor:
    """Returns the mean squared difference between cosines and scores."""
    assert scores is not None
    cosines = (texts["anchor"] * texts["positive"]).sum(-1)
    return functional.mse_loss(cosines, scores.to(cosines.dtype))


LOSSES = {"multiple_negatives": multiple_negatives, "triplet": triplet, "cosine": cosine}
"""The losses by name; each takes the vectors of a batch, their scores, and the settings."""
_NEEDED = {"triplet": "negative", "cosine": "score"}
"""The column that a loss needs besides anchor and positive."""
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda mask: mask / mask.sum(1, keepdim=True),
    "cls": lambda mask: mask * (mask.cumsum(1) == 1),
    "last": lambda mask: mask * (mask.cumsum(1) == mask.sum(1, keepdim=True)),
}
"""Maps a pooling to the weight of each position, computed from the mask ``[rows, positions]``; the same
poolings as :data:`adapterpack.tasks.embeddings.POOLING`.
"""


class EmbeddingTrainer(transformers.Trainer):  # type: ignore[misc]
    """A trainer with one of :data:`LOSSES`."""

    loss_is_scaled_for_ga = False
    """False: the loss is the mean of a batch, so the trainer divides it by the batches of a step."""

    def __init__(self, *args: Any, settings: Contrastive, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        row = self.train_dataset[0]
        self._loss = settings.loss or ("cosine" if "labels" in row else "multiple_negatives")
        parts = {"negative": "negative_input_ids", "score": "labels"}
        if (needed := _NEEDED.get(self._loss)) is not None and parts[needed] not in row:
            raise ConfigError(
                f"the loss {self._loss} needs rows with a {needed}",
                where="loss",
                found=", ".join(row),
                remedy="choose another loss, or add the column",
            )
        self._weights = WEIGHTS[settings.pooling or pooling_of(Path(self.model.config._name_or_path))]

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the loss of a batch; its outputs are the vectors."""
        texts = {
            key.removesuffix("_input_ids"): self._vectors(
                model, ids, inputs[key.replace("input_ids", "attention_mask")]
            )
            for key, ids in inputs.items()
            if key.endswith("_input_ids")
        }
        loss = LOSSES[self._loss](texts, inputs.get("labels"), self._settings)
        return (loss, {"loss": loss, **texts}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        """Returns the loss of an evaluation batch, without predictions."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _vectors(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the pooled and normalised vector of each text."""
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return functional.normalize((hidden * self._weights(mask)[..., None].to(hidden.dtype)).sum(1), dim=-1)
