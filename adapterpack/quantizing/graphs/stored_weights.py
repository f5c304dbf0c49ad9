"""Finds the weights of a quantized checkpoint in a float graph by their numbers, and returns their codes in a
form that an operator reads.

The graph was built from the dequantized checkpoint, so its rows equal those of the checkpoint to the bit,
wherever a frontend put them, alone or packed with others. Rows that an adapter was folded into do not match
any more, and stay float.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from ...base import DequantizedCheckpoint
from ...base.codecs.stored_form import Blocks, Table, side_by_side, stored_form
from ...errors import ParityError, Unsupported
from ...io import Json
from ...onnx_graph import quant_type

_NOT_FOUND = "the graph holds no product with these numbers"
_ALLOWED = 2.0**-21
"""The largest difference between a number that an operator computes and the decoded number, as a share of the
weight's largest: a few roundings of float32.
"""


class StoredWeights:
    """The quantized weights of ``base``, which stays open; :meth:`report` states how each weight is
    stored.
    """

    def __init__(self, base: DequantizedCheckpoint) -> None:
        self.base = base
        self._reasons = dict.fromkeys(base.quantized, _NOT_FOUND)
        self._held: dict[str, float] = {}
        self._starts: dict[tuple[int, bytes], list[str]] = defaultdict(list)
        for name, weight in base.quantized.items():
            self._starts[weight.shape[1], self._matrix(name)[0:1].tobytes()].append(name)

    def form_of(self, rows: np.ndarray) -> Blocks | Table | None:
        """Returns the codes of a product's weight ``[out, in]`` float32; None if the weight is not made of
        complete weights of the checkpoint, or if no operator reads their codes.

        Raises:
            ParityError: the codes do not decode to the numbers of the checkpoint.
        """
        names = self._side_by_side(rows)
        if names is None:
            return None
        try:
            form = side_by_side([self._form(name) for name in names])
            if isinstance(form, Table) and quant_type(form.levels) is None:
                raise Unsupported("a table of other levels than the operator's")
        except Unsupported as error:
            self._reasons.update(dict.fromkeys(names, error.what))
            return None
        difference = float(np.abs(form.values() - rows).max()) / (float(np.abs(rows).max()) or 1.0)
        if not difference <= _ALLOWED:
            raise ParityError(
                "the quantized weights differ from the checkpoint's",
                where=", ".join(names),
                found=f"{difference:.2g}",
                expected=f"at most {_ALLOWED:.2g} of the largest",
                remedy="export with --dequantize, and report this base",
            )
        self._held.update(dict.fromkeys(names, difference))
        return form

    def report(self) -> Json:
        """Returns by format: how many weights the graphs store as codes and how many as floats, the reasons,
        and the largest difference between numbers that an operator computes and the decoded ones, as a share
        of the weight's largest.
        """
        by_format: dict[str, list[str]] = defaultdict(list)
        for name, weight in self.base.quantized.items():
            by_format[weight.codec].append(name)
        return {codec: self._of_format(names) for codec, names in by_format.items()}

    def _of_format(self, names: list[str]) -> Json:
        left = Counter(self._reasons[name] for name in names if name not in self._held)
        return {
            "held": len(names) - left.total(),
            "dequantized": left.total(),
            "reasons": dict(left.most_common()),
            "difference": max((self._held[name] for name in names if name in self._held), default=0.0),
        }

    def _form(self, name: str) -> Blocks | Table:
        return stored_form(self.base.quantized[name], self.base.parts(name), self.base.row_order(name))

    def _matrix(self, name: str) -> Any:
        """Returns the decoded weight in the model's order of rows; indexing reads the rows."""
        (matrix,) = self.base.storage(name, None).reader.matrices("linear")
        return matrix

    def _side_by_side(self, rows: np.ndarray) -> list[str] | None:
        """Returns the weights whose rows follow each other in ``rows``, or None."""
        names = []
        at = 0
        while at < len(rows):
            name = next(
                (
                    name
                    for name in self._starts.get((rows.shape[1], rows[at : at + 1].tobytes()), ())
                    if self._equal(name, rows[at:])
                ),
                None,
            )
            if name is None:
                return None
            names.append(name)
            at += self.base.quantized[name].shape[0]
        return names

    def _equal(self, name: str, rows: np.ndarray) -> bool:
        count = self.base.quantized[name].shape[0]
        return count <= len(rows) and np.array_equal(self._matrix(name)[0:count], rows[:count])
