"""What a base and a pack must answer, by torch, and what they would answer with one of the usual faults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pack import Pack
from ..torch_adapters.attached.load_for import load_for
from ..torch_adapters.layers import Adapted, adapted_layers, evaluating
from .libraries import last_logits

Rows = Sequence[Sequence[int]]


def reference_logits(
    pack: Pack, base: Path, rows: Rows
) -> tuple[list[np.ndarray], list[np.ndarray], Iterator[tuple[str, list[np.ndarray]]]]:
    """Returns the logits after each row of token ids, without the pack and with it, and yields those with
    each of the usual faults: what the pack does then, and the logits.
    """
    model = load_for(pack, base, check_canary=False)
    layers = adapted_layers(model, pack.name)

    def logits(chosen: Iterable[Adapted] = (), strength: float = 1.0) -> list[np.ndarray]:
        with evaluating(model, pack.name), torch.no_grad():
            for layer in chosen:
                layer._held[pack.name].weight = strength
            return [last_logits(model, ids) for ids in rows]

    def faults() -> Iterator[tuple[str, list[np.ndarray]]]:
        for strength, why in _strengths(layers[0]._held[pack.name].config).items():
            yield f"{strength:.3g} times as strong{why}", logits(layers, strength)
        for missing, chosen in _parts(layers):
            yield missing, logits(chosen, 0.0)

    return logits(layers, 0.0), logits(), faults()


def _strengths(config: Any) -> dict[float, str]:
    """Returns by how much a loader may take an adapter too strongly or too weakly, and why."""
    usual = dict.fromkeys((0.125, 0.25, 0.5, 2.0, 4.0, 8.0), "")
    rank = getattr(config, "r", None)
    if not isinstance(rank, int) or rank < 2:
        return usual
    rooted = rank**0.5
    return {
        **usual,
        rooted: ", as with rsLoRA",
        1 / rooted: ", as without rsLoRA",
        float(rank): ", as if alpha were not divided by the rank",
        1.0 / rank: ", as if it were divided by the rank twice",
    }


def _parts(layers: list[Adapted]) -> Iterator[tuple[str, list[Adapted]]]:
    """Yields which parts of a pack a loader may leave out: all sites of one name, or of all others, and
    halves of the layers.
    """
    by_name: dict[str, list[Adapted]] = {}
    for layer in layers:
        by_name.setdefault(layer._site.path.rpartition(".")[2], []).append(layer)
    if len(by_name) > 1:
        for name, chosen in by_name.items():
            yield f"without what it has at {name}", chosen
            yield f"only what it has at {name}", [layer for layer in layers if layer not in chosen]
    half = len(layers) // 2
    if half:
        yield "without the first half of its layers", layers[:half]
        yield "without the second half of its layers", layers[half:]
