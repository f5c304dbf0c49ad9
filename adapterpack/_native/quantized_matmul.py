"""Products with weights in 4 or 8 bits, whose activations are rounded to int8, as one operator of ONNX
Runtime, ``QuantizedMatMul``.

It is there where it was built (see :mod:`.build`) and the processor has an instruction set that it is written
for. A row's numbers are the same bits whatever rows go together.
"""

from __future__ import annotations

import numpy as np

from .loading import load

_kernel = load("_quantized_matmul")
LIBRARY: str | None = None if _kernel is None else _kernel.__file__
"""The file that ONNX Runtime loads the operator from, None where it is not there."""
DOMAIN, OPERATOR = "adapterpack.products", "QuantizedMatMul"


class HeldWeight:
    """Holds a copy of a weight, laid out for the operator, under a ``number`` by which it finds it.

    ``codes`` are uint8 ``[out, blocks, block * bits / 8]``, of 4 bits the lower half of a byte first;
    ``scales`` float32 ``[out, blocks]``; ``zeros`` the codes of 0 in as many bits, each row of them whole
    bytes, or None where that is 2^(bits - 1); ``bias`` float32 ``[out]`` or None; ``width`` is the length of
    a row before the last block was filled up.

    Raises:
        ValueError: the arrays do not belong together, or the operator has no such bits or block.

    Example:
        >>> ones = np.ones((3, 1), np.float32)
        >>> HeldWeight(np.zeros((3, 1, 16), np.uint8), ones, None, None, 30, 32, 4).number if LIBRARY else 0
        0
    """

    def __init__(
        self,
        codes: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None,
        bias: np.ndarray | None,
        width: int,
        block: int,
        bits: int,
    ) -> None:
        assert _kernel is not None
        self.number, self._holder = _kernel.hold(codes, scales, zeros, bias, width, block, bits)
