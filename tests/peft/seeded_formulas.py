"""The change of a weight by each method of :mod:`test_seeded`, dense and in float64: from the site's config
and stored parameters, its weight, and the weights of all sites in the order of the model's modules. Random
numbers are torch's and PEFT's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import peft
import torch
from peft.tuners.randlora.model import RandLoraModel
from peft.tuners.unilora.model import UniLoraModel
from peft.tuners.waveft.wavelet import Wavelet
from torch import nn

from adapterpack import C3A, FourierFT, PVeRA, RandLoRA, SHiRA, TinyLoRA, UniLoRA, VBLoRA, VeRA, WaveFT


def kaiming(generator: torch.Generator, rows: int, columns: int) -> np.ndarray:
    """PEFT's draw, by torch."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator).double().numpy()


def vera(
    cfg: VeRA, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """``diag(b) B diag(d) A`` with the upper left parts of the largest pair."""
    generator = torch.Generator().manual_seed(cfg.projection_prng_key)
    A = kaiming(generator, cfg.r, max(w.shape[1] for w in everything.values()))
    B = kaiming(generator, max(w.shape[0] for w in everything.values()), cfg.r)
    b, d = params["vera_lambda_b"].astype(np.float64), params["vera_lambda_d"].astype(np.float64)
    return np.diag(b) @ B[: len(weight)] @ np.diag(d) @ A[:, : weight.shape[1]]


def pvera(
    cfg: PVeRA, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """VeRA with the upper half of a pair whose A has 2 r rows, and of d."""
    generator = torch.Generator().manual_seed(cfg.projection_prng_key)
    A = kaiming(generator, 2 * cfg.r, max(w.shape[1] for w in everything.values()))[: cfg.r]
    B = kaiming(generator, max(w.shape[0] for w in everything.values()), cfg.r)
    b, d = params["pvera_lambda_b"].astype(np.float64), params["pvera_lambda_d"].astype(np.float64)[: cfg.r]
    return np.diag(b) @ B[: len(weight)] @ np.diag(d) @ A[:, : weight.shape[1]]


def fourierft(
    cfg: FourierFT, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """``s Re(ifft2(S))``."""
    spectrum, count = np.zeros(weight.size), len(params["fourierft_spectrum"])
    spectrum[
        torch.randperm(weight.size, generator=torch.Generator().manual_seed(cfg.random_loc_seed))[
            :count
        ].numpy()
    ] = params["fourierft_spectrum"]
    return cfg.scaling * np.fft.ifft2(spectrum.reshape(weight.shape)).real


def shira(
    cfg: SHiRA, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The values at their places."""
    change = np.zeros(weight.shape)
    if cfg.random_seed is None:
        rows, columns = params["shira_indices"]
    else:
        drawn = torch.randperm(weight.size, generator=torch.Generator().manual_seed(cfg.random_seed))[
            : len(params["shira_weight"])
        ]
        rows, columns = np.divmod(np.sort(drawn.numpy()), weight.shape[1])
    change[rows, columns] = params["shira_weight"]
    return change


def c3a(
    cfg: C3A, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Blocks ``w[(column - row) mod b] / in``."""
    kernel = params["c3a_kernel"].astype(np.float64)
    size = kernel.shape[2]
    turned = np.array(
        [[[[w[(s - t) % size] for s in range(size)] for t in range(size)] for w in row] for row in kernel]
    )
    return turned.transpose(0, 2, 1, 3).reshape(weight.shape) / weight.shape[1]


def randlora(
    cfg: RandLoRA, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """``s B A'`` with the bases that PEFT makes for the largest widths of the net."""
    model = RandLoraModel.__new__(RandLoraModel)
    nn.Module.__init__(model)
    model._find_dim = lambda _: tuple(np.max([w.shape for w in everything.values()], axis=0).tolist())  # type: ignore[method-assign]
    model._pre_injection_hook(
        nn.Module(),
        peft.RandLoraConfig(
            r=cfg.r,
            projection_prng_key=cfg.projection_prng_key,
            sparse=cfg.sparse,
            very_sparse=cfg.very_sparse,
        ),
        "default",
    )
    A, B = (value["default"].double().numpy() for value in (model.randlora_A, model.randlora_B))
    narrow, wide = sorted(weight.shape)
    bases = math.ceil(narrow / cfg.r)
    mixed = (
        params["randlora_lambda"][:, :, None].astype(np.float64)
        * A[:, :, :narrow]
        * params["randlora_gamma"][None]
    )
    change = float(cfg.scale) * B[:wide, :bases].reshape(wide, -1) @ mixed.reshape(-1, narrow)
    return change if weight.shape[1] == narrow else change.T


def vblora(
    cfg: VBLoRA, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Piece by piece: the best vectors of the bank by their logits, or by the weights that are stored."""
    size = cfg.vector_length

    def piece(side: str, *at: int) -> np.ndarray:
        if cfg.save_only_topk_weights:
            best, known = (
                params[f"vblora_logits_{side}_topk_indices"][at],
                params[f"vblora_logits_{side}_topk_weights"][at],
            )
            mix = np.append(known, 1 - known.sum(dtype=np.float64))
        else:
            logits = params[f"vblora_logits_{side}"][at].astype(np.float64)
            best = np.argsort(logits)[::-1][: cfg.topk]
            mix = np.exp(logits[best]) / np.exp(logits[best]).sum()
        found: np.ndarray = mix @ params["vblora_vector_bank"][best]
        return found

    A, B = np.zeros((cfg.r, weight.shape[1] + size)), np.zeros((len(weight) + size, cfg.r))
    for rank in range(cfg.r):
        for start in range(0, weight.shape[1], size):
            A[rank, start : start + size] = piece("A", rank, start // size)
        for start in range(0, len(weight), size):
            B[start : start + size, rank] = piece("B", start // size, rank)
    return B[: len(weight)] @ A[:, : weight.shape[1]]


def unilora(
    cfg: UniLoRA, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """``B A`` with PEFT's indices for all layers of the net, one after the other."""
    total = sum(cfg.r * sum(w.shape) for w in everything.values())
    indices = UniLoraModel.generate_index(total, cfg.theta_d_length, cfg.proj_seed).numpy()
    theta = params["unilora_theta_d"] / np.sqrt(
        np.maximum(np.bincount(indices, minlength=cfg.theta_d_length), 1)
    )
    start = 0
    for other in everything.values():
        if other is weight:
            A, B = np.split(
                theta[indices[start : start + cfg.r * sum(weight.shape)]], [cfg.r * weight.shape[1]]
            )
            product: np.ndarray = B.reshape(-1, cfg.r) @ A.reshape(cfg.r, -1)
            return product
        start += cfg.r * sum(other.shape)
    raise AssertionError


def tinylora(
    cfg: TinyLoRA, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """``B R A`` with torch's P of the layer's number; A and B as they are stored, or of the weight, with
    signs fixed by A.
    """
    number = next(index for index, other in enumerate(everything.values()) if other is weight)
    rank = min(cfg.r, *weight.shape)
    generator = torch.Generator().manual_seed(cfg.projection_seed + number)
    P = torch.normal(mean=0.0, std=rank**-0.5, size=(cfg.u, rank, rank), generator=generator)
    groups = max(1, round(len(everything) * (1 - cfg.weight_tying)))
    v = params[f"tinylora_v_{min(number // max(1, len(everything) // groups), groups - 1)}"]
    if cfg.save_factors:
        A, B = params["tinylora_A"], params["tinylora_B"]
    else:
        U, S, V = (value.numpy() for value in torch.linalg.svd(torch.tensor(weight), full_matrices=False))
        signs = np.array([np.sign(row[np.abs(row).argmax()]) for row in V[:rank]])
        A, B = (signs * np.sqrt(S[:rank]))[:, None] * V[:rank], U[:, :rank] * (signs * np.sqrt(S[:rank]))
    found: np.ndarray = B @ np.tensordot(v.astype(np.float64), P.double().numpy(), 1) @ A
    return found


def waveft(
    cfg: WaveFT, params: Mapping[str, np.ndarray], weight: np.ndarray, everything: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Each coefficient times the outer product of two taps of PEFT's filters, in its padded quarters; the
    first rows and columns of it.
    """
    values = params["waveft_spectrum"].astype(np.float64) * cfg.scaling
    drawn = torch.randperm(weight.size, generator=torch.Generator().manual_seed(cfg.random_loc_seed))[
        : len(values)
    ].numpy()
    rows, columns = np.divmod(drawn, weight.shape[1])
    change = np.zeros(weight.shape)
    if not cfg.use_idwt:
        change[rows, columns] = values
        return change
    low, high = (
        np.array(taps) for taps in (Wavelet(cfg.wavelet_family).rec_lo, Wavelet(cfg.wavelet_family).rec_hi)
    )
    padded = [width + len(low) - 2 + (width + len(low) - 2) % 2 for width in weight.shape]

    def basis(taps: np.ndarray, place: int, length: int) -> np.ndarray:
        index = np.arange(length) + len(taps) - 2 - 2 * place
        return np.where((index >= 0) & (index < len(taps)), taps[np.clip(index, 0, len(taps) - 1)], 0.0)

    for value, row, column in zip(values, rows, columns, strict=True):
        i, j = row + (padded[0] - weight.shape[0]) // 2, column + (padded[1] - weight.shape[1]) // 2
        bottom, i = divmod(int(i), padded[0] // 2)
        right, j = divmod(int(j), padded[1] // 2)
        change += value * np.outer(
            basis(high if right else low, i, len(weight)), basis(high if bottom else low, j, weight.shape[1])
        )
    return change
