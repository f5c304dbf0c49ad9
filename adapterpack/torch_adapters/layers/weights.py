"""Reads the weight of a layer as floats: directly, dequantized by its library, or loaded by accelerate where
it is offloaded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapter_methods import Site, matrix_shape
from ...errors import Unsupported

log = logging.getLogger(__name__)


class Quantized(NamedTuple):
    """How a library's layers hold a quantized weight.

    ``holds`` recognises such a layer and weight; ``read`` returns the dequantized floats, by a public
    function of the library. ``name`` returns the name of the format, and ``settings`` the parameters that its
    values depend on.
    """

    library: str
    holds: Callable[[nn.Module, Any], bool]
    read: Callable[[nn.Module, Any], Tensor]
    name: Callable[[Any], str]
    settings: Callable[[Any], dict[str, Any]] = lambda weight: {}


def _read_4bit(module: nn.Module, weight: Any) -> Tensor:
    """Dequantizes a 4-bit weight of bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - only where there is such a layer

    return dequantize_4bit(*_codes_4bit(weight))


def _is_reordered(weight: Any) -> bool:
    """Whether bitsandbytes has reordered the codes of a weight for its CPU kernel."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _codes_4bit(weight: Any) -> tuple[Tensor, Any]:
    """Returns the codes of a 4-bit weight in their original order, and its quantization state, without
    changing the weight.

    On CPUs with AVX512-BF16, bitsandbytes reorders the codes for its kernel when a layer is first called in
    evaluation mode, transposes the scales and rounds them to bfloat16. Its own inverse restores the order of
    the codes, but not that of the scales.
    """
    if not _is_reordered(weight):
        return weight.data, weight.quant_state
    from bitsandbytes import functional  # noqa: PLC0415 - only where there is such a layer

    state = copy.copy(weight.quant_state)
    # Otherwise the inverse would quantize the scales again.
    double = state.original_nested
    state.original_nested = False
    codes, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = weight.quant_state.absmax.T.reshape(-1).float()
    state.original_nested = double
    return codes, state


def _settings_4bit(state: Any) -> dict[str, Any]:
    """Returns the parameters of a 4-bit quantization, from a reordered state too."""
    dtype = getattr(state, "original_dtype", state.dtype)
    return {
        "block_size": state.blocksize,
        "double": bool(getattr(state, "original_nested", state.nested)),
        "dtype": str(dtype).removeprefix("torch."),
    }


_KEPT = "_adapterpack_kept_in_order"
"""The attribute of a model that lists the layers whose codes are kept in order."""


def keep_in_order(model: nn.Module) -> None:
    """Stops bitsandbytes from reordering the codes of the model's 4-bit layers, and undoes reordering that
    has happened.

    A reordered layer passes on no gradient, rounds its inputs to bfloat16, and has a wrong state dict.
    """
    kept = model.__dict__.setdefault(_KEPT, [])
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            kept.append(module)
            if _is_reordered(module.weight):
                module.weight.data, module.weight.quant_state = _codes_4bit(module.weight)
                module.quant_state = module.weight.quant_state
    if not kept:
        del model.__dict__[_KEPT]


def let_reorder(model: nn.Module) -> None:
    """Undoes :func:`keep_in_order`."""
    for layer in model.__dict__.pop(_KEPT, ()):
        layer.support_avx512bf16_for_cpu = True


def warn_of_misread_rows(model: nn.Module) -> None:
    """Warns if bitsandbytes computes the model's 4-bit layers wrongly on this CPU."""
    states = [
        module.weight.quant_state
        for module in model.modules()
        if module._parameters.get("weight") is not None
        and FORMATS[0].holds(module, module.weight)
        and module.weight.device.type == "cpu"
    ]
    kinds = {(state.shape[-1], state.blocksize, state.quant_type) for state in states}
    if widths := sorted({kind[0] for kind in kinds if kind[0] % kind[1] and _misreads(*kind)}):
        log.warning(
            "bitsandbytes misreads 4-bit rows of %s numbers on this processor: the base gives other numbers "
            "than on a GPU. To fix it: train on a GPU, or load the base in 8 bits",
            ", ".join(map(str, widths)),
        )


@cache
def _misreads(width: int, block: int, kind: str) -> bool:
    """Whether rows of this width change when they are quantized and dequantized; with AVX512 those do whose
    width is not a multiple of the block size.
    """
    # only where there is such a layer
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: PLC0415

    # Blocks differ in magnitude, so that reading one with another's scale shows.
    sizes = 2.0 ** (torch.arange(width) % 8)[:, None]
    blocks = (torch.rand(width, block, generator=torch.Generator().manual_seed(0)) * 2 - 1) * sizes
    read = dequantize_4bit(*quantize_4bit(blocks.reshape(block, width), blocksize=block, quant_type=kind))
    return bool(((read.reshape(width, block) - blocks).abs() > _WIDEST_GAP * sizes).any())


_WIDEST_GAP = 0.2
"""More than half the largest distance between neighbouring values of NF4 or FP4, relative to the largest
number of a block.
"""


def _scales_8bit(module: nn.Module, weight: Any) -> Any:
    """Returns the scale of each row: on the weight until the layer is first called, then on the layer's
    state.
    """
    scales = getattr(weight, "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales


def _read_8bit(module: nn.Module, weight: Any) -> Tensor:
    """Dequantizes an 8-bit weight of bitsandbytes."""
    # only where there is such a layer
    from bitsandbytes.functional import int8_vectorwise_dequant  # noqa: PLC0415

    return int8_vectorwise_dequant(weight.data, _scales_8bit(module, weight))


FORMATS = (
    Quantized(
        "bitsandbytes",
        lambda module, weight: getattr(weight, "quant_state", None) is not None,
        _read_4bit,
        lambda weight: str(weight.quant_state.quant_type),
        lambda weight: _settings_4bit(weight.quant_state),
    ),
    Quantized(
        "bitsandbytes",
        lambda module, weight: weight.dtype == torch.int8 and _scales_8bit(module, weight) is not None,
        _read_8bit,
        lambda weight: "int8",
    ),
    Quantized(
        "torchao",
        lambda module, weight: type(weight).dequantize is not Tensor.dequantize,
        lambda module, weight: weight.dequantize(),
        lambda weight: type(weight).__name__.lower(),
    ),
)
"""The quantized formats that can be read; any other weight that is not of floats or not of the layer's shape
is refused.
"""


def format_of(module: nn.Module) -> Quantized | None:
    """Returns the format of a layer's weight; None if it is not quantized, or its format is unknown."""
    return _form(module, module._parameters.get("weight"))


def _form(module: nn.Module, weight: Any) -> Quantized | None:
    """Returns the format of a parameter of a module; None if it is not quantized, or missing."""
    return None if weight is None else next((fmt for fmt in FORMATS if fmt.holds(module, weight)), None)


def weight_of(module: nn.Module, leaf: str, site: Site) -> Tensor:
    """Returns the parameter ``leaf`` of ``module`` as floats, in the shape in which the kind of ``site``
    stores it.

    Raises:
        Unsupported: its format is unknown, or it is not in memory.
    """
    with _in_memory(module, leaf, site.path):
        return _floats(module, leaf, site)


def tensor_of(module: nn.Module, leaf: str, where: str) -> Any:
    """Returns a parameter or buffer of ``module`` that is never quantized, such as a bias; None if the module
    has none.

    Raises:
        Unsupported: it is not in memory.
    """
    with _in_memory(module, leaf, where):
        return getattr(module, leaf, None)


def device_of(module: nn.Module, where: str = "") -> torch.device:
    """Returns the device that a module computes on: that of its first parameter, or the one to which
    accelerate loads it for a call. Errors call the module ``where``, by default by its class.

    Raises:
        Unsupported: the parameter is not in memory, and nothing loads it.
    """
    for owner in module.modules():
        for value in owner.parameters(recurse=False):
            if not value.is_meta:
                return value.device
            _require_loaded(owner, where or type(module).__name__)
            return torch.device(owner._hf_hook.execution_device)  # type: ignore[union-attr]
    return torch.device("cpu")


def is_loaded(model: nn.Module) -> bool:
    """Whether each tensor of a model is in memory, or accelerate loads it when its module is called."""
    owners = {
        owner for owner in model.modules() if any(value.is_meta for value in owner.parameters(recurse=False))
    }
    return all(map(_is_offloaded, owners))


def require_in_memory(module: nn.Module, where: str) -> None:
    """Raises if a parameter of a module is offloaded or has no data, for callers that copy parameters or
    replace them in a call.

    Raises:
        Unsupported: a parameter is on the meta device.
    """
    name_on_meta = next((name for name, value in module.named_parameters() if value.is_meta), None)
    if name_on_meta is not None:
        raise Unsupported(
            "this module is changed as a whole, and its tensors are not all in memory",
            where=where,
            found=f"{name_on_meta} on the meta device",
            remedy="load the base without offloading, or name other targets",
        )


def require_floats(module: nn.Module, where: str) -> None:
    """Raises if a parameter of a module is quantized, for callers that train copies of it.

    Raises:
        Unsupported: a parameter is quantized.
    """
    for owner in module.modules():
        for leaf, value in owner.named_parameters(recurse=False):
            if not is_plain(value) or _form(owner, value) is not None:
                raise Unsupported(
                    "a quantized module cannot be trained whole",
                    where=where,
                    found=f"{type(owner).__name__}.{leaf}",
                    remedy="leave it out when the base is quantized, or take it out of modules_to_save",
                )


def is_plain(value: Tensor) -> bool:
    """Whether a tensor holds floats of at least 16 bits."""
    return value.is_floating_point() and bool(value.dtype.itemsize >= torch.half.itemsize)


def _in_memory(module: nn.Module, leaf: str, where: str) -> Any:
    """Returns the context in which accelerate loads the tensors of a module that it offloads; one without
    effect if the tensor is in memory or missing.
    """
    value = getattr(module, leaf, None)
    if value is None or not value.is_meta:
        return nullcontext()
    _require_loaded(module, where)
    from accelerate.utils import align_module_device  # noqa: PLC0415 - only where it offloads

    return align_module_device(module)


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's tensors when it is called."""
    from accelerate.utils import has_offloaded_params  # noqa: PLC0415 - only where a tensor has no data

    return bool(has_offloaded_params(module))


def _require_loaded(module: nn.Module, where: str) -> None:
    """Raises unless accelerate loads the module's tensors when it is called."""
    if not _is_offloaded(module):
        raise Unsupported(
            "the base's weights are not in memory",
            where=where,
            found="a tensor on the meta device, which nothing loads",
            expected="a base that is loaded, or that accelerate offloads module by module",
            remedy="load the base with its weights before the adapter",
        )


def _floats(module: nn.Module, leaf: str, site: Site) -> Tensor:
    """Returns the weight as floats, dequantized if necessary; raises if its format or its shape is
    unknown.
    """
    stored = getattr(module, leaf, None)
    form = _form(module, stored)
    weight = stored if form is None else form.read(module, stored)
    shape = (site.out_features, site.in_features)
    if weight is None or not is_plain(weight) or matrix_shape(site.kind, weight.shape) != shape:
        description = "no weight" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
        raise Unsupported(
            "what reads the weight cannot adapt this layer, which stores it in a form that is not known",
            where=site.path,
            expected=(
                "floats of 16 bits or more, or layers of "
                f"{', '.join(sorted({fmt.library for fmt in FORMATS}))}"
            ),
            found=f"{type(module).__name__} with {description}",
            remedy=(
                "load the base without quantization, or use a method that does not read the weight, such as "
                "lora"
            ),
        )
    return weight
