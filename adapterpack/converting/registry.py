"""Lists the adapter formats, in the order in which detection tries them."""

from __future__ import annotations

from .diffusers import DIFFUSERS
from .folder_formats import PACK, PEFT
from .format import Format
from .gguf import GGUF
from .kohya import KOHYA
from .onnx_adapter import ONNX_ADAPTER

_FORMATS = (PACK, PEFT, GGUF, KOHYA, DIFFUSERS, ONNX_ADAPTER)


def formats() -> dict[str, Format]:
    """Every format by name.

    Example:
        >>> list(formats())
        ['pack', 'peft', 'gguf', 'kohya', 'diffusers', 'onnx_adapter']
    """
    return {form.name: form for form in _FORMATS}
