"""Proves adapters that act at some positions of a row only, on a small decoder: padded on both sides, and on
a cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from adapterpack.testing import MODELS, Case, require

from .prompts import decoder, padded

ROWS = ((5, 6, 7, 30, 31, 9), (8, 9), (10, 11, 12, 13, 14, 15, 16))


def acts_at_its_positions(case: Case) -> None:
    """``logits[t] == base[t]``, bit for bit, before the first position of a row at which the adapter acts,
    and from there on they differ.

    Padding on either side moves a real position's logits by 1e-5 at most. A row that it does not act in is
    the base's throughout.
    """
    if case.config.acts is None:
        return
    rows = _rows(case)
    base, model = decoder(MODELS[0]), _adapted(case)
    for left in (False, True):
        ids, mask = padded(rows, left)
        mine, plain = (_logits(one, ids, mask) for one in (model, base))
        acts = _mask(case, ids.numpy(), mask.numpy() > 0)
        for row, real in enumerate(mask.numpy() > 0):
            first = int(acts[row].argmax()) if acts[row].any() else len(real)
            before, after = real & (np.arange(len(real)) < first), real & (np.arange(len(real)) >= first)
            require(
                bool((mine[row][before] == plain[row][before]).all()),
                f"row {row} is changed before the adapter acts",
            )
            require(
                not after.any() or float(np.abs(mine[row] - plain[row])[after].max()) > 1e-3,
                f"row {row} is not changed",
            )
            alone = _logits(model, ids[row : row + 1, real], mask[row : row + 1, real])[0]
            error = float(np.abs(mine[row][real] - alone).max())
            require(
                error < 1e-5, f"row {row}, padded on the {'left' if left else 'right'}, is off by {error:.1e}"
            )
    require(bool(acts.any()), "the adapter acts nowhere")


def positions_on_a_cache(case: Case) -> None:
    """A row's logits at three more tokens, one by one on the cache, are those of one pass at the same
    positions.

    Within 1e-5 of the largest: the products of one token and of a row are summed in other orders.
    What comes after the pass that began a row is acted on if the rule says so, whatever the later tokens are.
    """
    import torch

    if case.config.acts is None:
        return
    rows, more = _rows(case), (20, 21, 22)
    model = _adapted(case)
    ids, mask = padded(rows, left=True)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, position_ids=_places(mask), use_cache=True)
        steps = []
        for token in more:
            # its name in newer and older transformers
            cache = next(name for name in ("cache", "past_key_values") if name in output)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            output = model(
                torch.full((len(rows), 1), token),
                attention_mask=mask,
                position_ids=_places(mask)[:, -1:],
                **{cache: output[cache]},
            )
            steps.append(output.logits[:, 0].numpy())
    goes_on = case.config.acts.mask(
        np.zeros((1, 1)), np.ones((1, 1), bool), np.ones((1, 1), bool), np.ones(1, bool)
    ).item()
    for row, tokens in enumerate(rows):
        whole = np.array([[*tokens, *more]])
        acts = _mask(case, np.array([tokens]), np.ones((1, len(tokens)), bool))
        later = np.full((1, len(more)), bool(goes_on and acts.any()))
        right = _logits_at(model, whole, np.concatenate([acts, later], axis=1))[0, -len(more) :]
        error = float(np.abs(np.stack([step[row] for step in steps]) - right).max())
        require(error < 1e-5 * float(np.abs(right).max()), f"row {row} is off by {error:.1e} on a cache")


def _rows(case: Case) -> tuple[tuple[int, ...], ...]:
    """Ragged rows; the adapter acts in the first and the last, and where the rule lets it not, not in the
    second.
    """
    first, second, last = ROWS
    return case.config.acts.woven(first), second, case.config.acts.woven(case.config.acts.woven(last))


def _mask(case: Case, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    mask: np.ndarray = case.config.acts.mask(ids, real, real, None)
    return mask


def _adapted(case: Case) -> Any:
    """The decoder with the case's adapter at all its layers, moved by noise."""
    import torch

    from adapterpack.torch_adapters.adapt import adapt

    default = next(field.default for field in dataclasses.fields(case.config) if field.name == "targets")
    model, noise = (
        adapt(decoder(MODELS[0]), dataclasses.replace(case.config, targets=default), "a"),
        torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.3)
    return model.eval()


def _logits_at(model: Any, ids: np.ndarray, acts: np.ndarray) -> np.ndarray:
    """The logits of one pass in which the layers act at these positions, whatever the rule says."""
    import torch

    from adapterpack.torch_adapters.layers.layer import Adapted

    adapted = [module._held["a"] for module in model.modules() if isinstance(module, Adapted)]
    held = [one for one in adapted if one.where is not None]
    kept = [one.where for one in held]
    try:
        for one in held:
            one.where = lambda: torch.tensor(acts)
        return _logits(model, torch.tensor(ids), torch.ones(ids.shape, dtype=torch.int64))
    finally:
        for one, where in zip(held, kept, strict=True):
            one.where = where


def _places(mask: Any) -> Any:
    """Positions counted from the first real token."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _logits(model: Any, ids: Any, mask: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits: np.ndarray = model(
            input_ids=ids, attention_mask=mask, position_ids=_places(mask)
        ).logits.numpy()
    return logits
