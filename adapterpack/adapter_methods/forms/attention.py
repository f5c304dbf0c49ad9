"""The normal form of the kind "attention": a prompt that a layer's own attention reads in addition to its
tokens, scaled by a gate.

    h_t' = h_t + W_o concat_i( g_i softmax(s q_t,i K_i^T) V_i ),   K = W_k P,   V = W_v P

``q_t`` are the layer's queries as its own attention uses them, and W_k, W_v and W_o its own frozen
projections, so the prompt's keys and values depend only on the prompt and the layer. Neither a weight nor a
KV cache can hold this change; a layer without the adapter is untouched.
"""

from __future__ import annotations

from typing import NamedTuple

from .. import Array, Traits, array_namespace, softmax

TRAITS = Traits(row_separable=False, quantizable=False, batchable=True, layers=("attention",), exclusive=True)
"""The traits that all methods of this kind share."""


class AttentionForm(NamedTuple):
    """``prompt`` ``[n, width]``, and ``gate`` of shape ``[1]``, or ``[heads]`` with one gate for each query
    head.
    """

    prompt: Array
    gate: Array


def attend(form: AttentionForm, queries: Array, keys: Array, values: Array, scale: float) -> Array:
    """Returns what the heads add before the output projection: ``[batch, length, heads * head_dim]``.

    ``queries`` are ``[batch, heads, length, head_dim]``, ``keys`` and ``values`` ``[key heads, n,
    head_dim]``. With grouped-query attention each key head serves ``heads / key heads`` query heads.

    Example:
        >>> import numpy as np
        >>> form = AttentionForm(np.zeros((2, 4)), np.array([0.5]))
        >>> attend(form, np.zeros((1, 1, 1, 2)), np.zeros((1, 2, 2)), np.array([[[2.0, 4.0], [4.0, 0.0]]]),
        ...     1.0)
        array([[[1.5, 1. ]]])
    """
    xp = array_namespace(queries, keys)
    heads = queries.shape[1]
    shared = queries.shape[1] // keys.shape[0]
    keys, values = (xp.repeat(heads, shared, axis=0) for heads in (keys, values))
    scores = scale * xp.matmul(queries, xp.permute_dims(keys, (0, 2, 1)))
    added = form.gate[:, None, None] * xp.matmul(softmax(scores), values)
    return xp.reshape(
        xp.permute_dims(added, (0, 2, 1, 3)), (queries.shape[0], queries.shape[2], heads * queries.shape[3])
    )
