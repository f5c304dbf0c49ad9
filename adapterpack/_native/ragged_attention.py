"""The attention of a pass whose tokens belong to several rows, any number to each, as operators of ONNX
Runtime, ``RaggedAttention`` and ``RaggedAttentionInt8``.

They are there where they were built (see :mod:`.build`) and the processor has fused multiply-add. Sums are
added up in one order whatever else is in a pass.
"""

from __future__ import annotations

from .loading import load

_kernel = load("_ragged_attention")
LIBRARY: str | None = None if _kernel is None else _kernel.__file__
"""The file that ONNX Runtime loads the operator from, None where it is not there."""
DOMAIN = "adapterpack.attention"
OPERATORS = "RaggedAttention", "RaggedAttentionInt8"
"""The one for caches of float32, and the one for caches of int8."""
WIDEST = 256
"""The most numbers that a head has."""
