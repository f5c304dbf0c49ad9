"""Traces a recurrence over the tokens of a pass as one operator of the graph.

transformers computes a recurrence by a Python loop or by chunks, which a trace would unroll for the length of
its example, and by another function for a single token. While a decoder is traced, the functions of its
modules that are named in :data:`RECURRENCES` give way to ONNX Runtime's ``LinearAttention``, with which one
graph is right for prompts, their pieces and single tokens. A loop of ONNX would be, too, but nothing bounds
how long a graph with loops runs, so bundles do not hold any.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layer_state import LayerCache


@contextlib.contextmanager
def as_operators(model: nn.Module, cache: LayerCache) -> Iterator[None]:
    """Replaces the recurrences of a model inside the block; ``cache`` is the one that its layers read."""
    swapped = []
    for module in {sys.modules[type(one).__module__] for one in model.modules()}:
        for path, recurrence in RECURRENCES.items():
            kind, _, name = path.rpartition(".")
            owner = vars(module).get(kind) if kind else module
            if owner is not None and name in vars(owner):
                swapped.append((owner, name, vars(owner)[name]))
                setattr(owner, name, recurrence(cache))
    try:
        yield
    finally:
        for owner, name, original in swapped:
            setattr(owner, name, original)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what ``query`` reads of the recurrence ``S = exp(decay) S + key value``, or of the delta rule
    if there is a ``beta``, as ``[batch, tokens, heads, v]``, and the last state ``[batch, heads, k, v]``.

    ``key`` and ``value`` are ``[batch, tokens, heads, k or v]``, ``query`` may have fewer heads, and
    ``decay`` is one number for each head, or for each of its ``k`` channels.
    """
    heads, width = value.shape[2:]
    given = [query, key, value, state, decay, beta]
    packed = [one if one is None or one is state else one.float().flatten(2) for one in given]
    output, last = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        packed,
        {
            "q_num_heads": query.shape[2],
            "kv_num_heads": heads,
            "scale": 1.0,
            "update_rule": "gated" if beta is None else "gated_delta",
        },
        dtypes=(torch.float32, torch.float32),
        shapes=((*value.shape[:2], heads * width), state.shape),
        version=1,
    )
    return output.unflatten(2, (heads, width)), last


def _selective_scan(cache: LayerCache) -> Callable[..., Any]:
    """Returns Mamba's recurrence, in which each channel is a head. transformers begins it at zero whatever
    the layer kept, so the state is the one that the layer has just read. Source: Gu and Dao, arXiv
    2312.00752, section 3.
    """

    def run(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: object,
    ) -> Any:
        dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        dt = functional.softplus(dt) if delta_softplus else dt
        B, C = (value.transpose(1, 2)[:, :, None] for value in (B, C))
        outputs, state = linear_attention(
            C,
            B.expand(-1, -1, A.shape[0], -1),
            (dt * x).transpose(1, 2)[..., None],
            next(cache.read).float()[..., None],
            dt.transpose(1, 2)[..., None] * A,
        )
        outputs = outputs[..., 0].transpose(1, 2)
        outputs = outputs if D is None else outputs + x * D[None, :, None]
        outputs = outputs if z is None else outputs * functional.silu(z)
        return (outputs, state[..., 0]) if return_last_state else outputs

    return run


def _state_space_dual(cache: LayerCache) -> Callable[..., Any]:
    """Returns Mamba 2's recurrence, whose states decay by one number for each head. Source: Dao and Gu,
    arXiv 2405.21060, section 3.
    """

    def run(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: object,
    ) -> Any:
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = torch.clamp(functional.softplus(dt) if dt_softplus else dt, *dt_limit).float()
        x = x.float()
        outputs, state = linear_attention(
            C,
            B.repeat_interleave(x.shape[2] // B.shape[2], 2),
            x * dt[..., None],
            initial_states.float().transpose(2, 3),  # type: ignore[union-attr]
            A * dt,
        )
        outputs = outputs if D is None else outputs + x * D[..., None]
        return (outputs, state.transpose(2, 3)) if return_final_states else outputs

    return run


def _delta_rule(cache: LayerCache) -> Callable[..., Any]:
    """Returns the gated delta rule. Source: Yang, Kautz and Hatamizadeh, arXiv 2412.06464, equation 10."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: object,
    ) -> Any:
        query, key = query.float(), key.float()
        if use_qk_l2norm_in_kernel:
            query, key = (one * torch.rsqrt(one.square().sum(-1, True) + 1e-6) for one in (query, key))
        outputs, state = linear_attention(
            query * query.shape[-1] ** -0.5,
            key.repeat_interleave(value.shape[2] // key.shape[2], 2),
            value,
            initial_state.float(),  # type: ignore[union-attr]
            g,
            beta,
        )
        return outputs.to(value.dtype), state if output_final_state else None

    return run


def _lightning_attention(cache: LayerCache) -> Callable[..., Any]:
    """Returns MiniMax's layer, whose loop stands in the middle of its forward. Source: MiniMax, arXiv
    2501.08313, section 2.2.
    """

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        position_embeddings: object,
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        mixed = self.act_fn(self.qkv_proj(hidden_states))
        mixed = mixed if attention_mask is None else mixed * attention_mask[..., None].to(mixed.dtype)
        query, key, value = mixed.unflatten(2, (-1, 3 * self.head_dim)).split(self.head_dim, 3)
        outputs, state = linear_attention(
            query,
            key,
            value,
            cache.get_linear_cache(self.layer_idx).float(),  # type: ignore[union-attr]
            -self.slope_rate.flatten().expand(query.shape[:3]),
        )
        cache.set_linear_cache(self.layer_idx, state)
        outputs = self.norm(outputs.flatten(2).to(mixed.dtype))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * outputs), state

    return forward


def _sparse_gate(cache: LayerCache) -> Callable[..., Any]:
    """Returns Gemma 3n's cutoff, in which ONNX has no operator for the quantile of the normal distribution
    that a layer's configuration chooses. Source: Google, Gemma 3n, ``activation_sparsity_pattern``.
    """

    def run(self: nn.Module, inputs: Tensor) -> Tensor:
        deviations = NormalDist().inv_cdf(self.activation_sparsity)  # type: ignore[arg-type]
        spread = torch.std(inputs, dim=-1, keepdim=True, unbiased=False)
        return functional.relu(inputs - (inputs.mean(-1, keepdim=True) + spread * deviations))

    return run


RECURRENCES: dict[str, Callable[[LayerCache], Callable[..., Any]]] = {
    "mamba_selective_scan": _selective_scan,
    "mamba2_chunk_scan": _state_space_dual,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "MiniMaxLightningAttention.forward": _lightning_attention,
    "Gemma3nTextMLP._gaussian_topk": _sparse_gate,
}
"""The name of a function or method in transformers' modules -> what makes its replacement for a cache."""
