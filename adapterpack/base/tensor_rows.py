"""Names rows of a stored tensor, ``NAME[START:STOP]``: what a checkpoint holds in one tensor, a model may
have in several modules, as a query, a key and a value above each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ..io import DTYPES, TensorInfo, count_of

_ROWS = re.compile(r"([^\0]{1,512})\[([0-9]{1,12}):([0-9]{1,12})\]")
_WEIGHT = re.compile(r"([^\0]{1,512})\.weight((?:\[[0-9:]{3,25}\])?)")


def name_rows(tensor: str, start: int, stop: int) -> str:
    """Returns the name of the rows from ``start`` to before ``stop``.

    Example:
        >>> name_rows("qkv.weight", 0, 64)
        'qkv.weight[0:64]'
    """
    return f"{tensor}[{start}:{stop}]"


def module_parameter(weight: str, leaf: str) -> str:
    """Returns the name of another parameter of the module that a weight belongs to, with the same rows.

    Example:
        >>> [module_parameter(name, "bias") for name in ("qkv.weight[0:64]", "fc.weight", "table")]
        ['qkv.bias[0:64]', 'fc.bias', 'table.bias']
    """
    match = _WEIGHT.fullmatch(weight)
    return f"{weight}.{leaf}" if match is None else f"{match[1]}.{leaf}{match[2]}"


def rows_between(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Returns the position of some rows of a tensor.

    Example:
        >>> rows_between(TensorInfo("qkv", "F32", (6, 2), 100, 48), 2, 4)
        TensorInfo(name='qkv[2:4]', dtype='F32', shape=(2, 2), offset=116, nbytes=16)
    """
    row = info.nbytes // info.shape[0]
    shape = (stop - start, *info.shape[1:])
    return TensorInfo(
        name_rows(info.name, start, stop), info.dtype, shape, info.offset + start * row, row * shape[0]
    )


class TensorTable(Mapping[str, TensorInfo]):
    """Tensors by name, and rows of those that are stored plainly.

    Example:
        >>> table = TensorTable({"qkv": TensorInfo("qkv", "F32", (6, 2), 100, 48)})
        >>> table["qkv[2:4]"].shape, "qkv[2:7]" in table, table.place("qkv[2:4]"), list(table)
        ((2, 2), False, ('qkv', slice(2, 4, None)), ['qkv'])
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors

    def place(self, name: str | None) -> tuple[str, slice]:
        """Returns the tensor and which of its rows a name means.

        Raises:
            KeyError: there is no such tensor, or it has no such rows.
        """
        if name is not None and name in self._tensors:
            return name, slice(None)
        match = _ROWS.fullmatch(name or "")
        info = None if match is None else self._tensors.get(match[1])
        if match is None or info is None or not info.shape:
            raise KeyError(name)
        start, stop = int(match[2]), int(match[3])
        plain = info.nbytes == DTYPES[info.dtype].itemsize * count_of(info.shape, info.name)
        if not plain or not start < stop <= info.shape[0]:
            raise KeyError(name)
        return info.name, slice(start, stop)

    def __getitem__(self, name: str | None) -> TensorInfo:
        whole, rows = self.place(name)
        info = self._tensors[whole]
        return info if rows == slice(None) else rows_between(info, rows.start, rows.stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
