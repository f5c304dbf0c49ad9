"""Slots of prompts to which an attention attends besides its tokens: keys and values, computed once by the
base's projections.

Fields at the output projection of an attention with h heads and k key heads::

    x' = x + concat over heads i of  gate_i softmax(q_i keys + absent) values

``attended_keys`` [k, head_dim, n], scaled already, ``attended_values`` [k, n, head_dim], ``attended_absent``
[n], ``attended_gate`` [h]; x is the input of the projection, q are the queries as the layer uses them. The
score :data:`~adapterpack.slots.precision.ABSENT` disables the prompt tokens that a row's adapter lacks.
Without an adapter all are disabled and the gate is zero, so x is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..adapter_methods.forms.attention import AttentionForm
from ..bundle import Heads
from ..errors import Unsupported
from ..tasks import Arrays

PROJECTION = "o_proj"
"""The module of an attention to whose input the prompt's part is added."""
LENGTH = "attended"
"""The name of a prompt's length among the ranks of a site."""
LEAVES: dict[str, tuple[str, ...]] = {
    "attended_keys": ("key_heads", "head_dim", LENGTH),
    "attended_values": ("key_heads", LENGTH, "head_dim"),
    "attended_absent": (LENGTH,),
    "attended_gate": ("heads",),
}
"""Field -> its axes."""

Project = Callable[[np.ndarray, str], tuple[np.ndarray, np.ndarray, Heads]]
"""(prompt ``[n, width]``, path of an attention) -> the keys, without positions, and values ``[n, key heads,
head_dim]`` that the base computes from it there, and the heads of that attention.
"""


def attended_arrays(form: AttentionForm, path: str, project: Project | None) -> Arrays:
    """Converts a normal form to its fields, as float32 arrays, by their names below the attention's path.

    Raises:
        Unsupported: ``project`` is None, so the base's projections are not available.
    """
    if project is None:
        raise Unsupported(
            "this method needs the base's own projections, which this place does not have",
            where=path,
            remedy="export a bundle of the base with this adapter among the packs",
        )
    keys, values, heads = project(np.asarray(form.prompt, np.float32), path)
    fields = {
        "attended_keys": heads.scale * keys.transpose(1, 2, 0),
        "attended_values": values.transpose(1, 0, 2),
        "attended_absent": np.zeros(len(keys)),
        "attended_gate": np.broadcast_to(np.asarray(form.gate), (heads.count,)),
    }
    return {
        f"{PROJECTION}.{field}": np.ascontiguousarray(value, np.float32) for field, value in fields.items()
    }
