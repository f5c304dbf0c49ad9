"""Lists the tensor types of GGUF files with the values and bytes of a block; :mod:`.ggml` decodes them."""

from __future__ import annotations

from typing import NamedTuple

from ...resources import table


class TensorType(NamedTuple):
    """A tensor type: a block of ``block`` values takes ``size`` bytes."""

    name: str
    block: int
    size: int

    @property
    def plain(self) -> bool:
        """Whether every value is stored as a number, not as a code."""
        return self.block == 1


TENSOR_TYPES = table("base/gguf/tensor_types.toml", dict[int, TensorType])
"""Maps the number of a type in the file to the type."""
TYPE_NUMBERS = {tensor_type.name: number for number, tensor_type in TENSOR_TYPES.items()}
"""Maps the name of a type to its number in the file."""
