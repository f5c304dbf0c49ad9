"""Writes adapters of bare parameters and of stacks of experts as PEFT has them, with its names and shapes (``target_parameters``)."""

from __future__ import annotations

from ..adapter_methods import is_bare
from ..adapter_methods.core.peft_parameters import wrappers_of
from ..errors import Unsupported
from ..io import safetensors
from ..io.safe_open import TENSORS
from ..pack.contents import METADATA
from ..pack.pack import Pack
from ..peft import layout
from ..peft.names import PREFIX
from .base import BaseModel


def of_parameters(pack: Pack, base: BaseModel | None) -> dict[str, bytes] | None:
    """The files of PEFT's folder by name; None where the pack changes no parameters, or PEFT has its method for none.

    Raises:
        Unsupported: a parameter is one of ``torch.nn.MultiheadAttention``, or may be one of ``base``'s, which is not at hand.
    """
    form, groups = pack.method.peft, {group.path: group for group in pack.groups if group.role == "adapter" and is_bare(group.kind)}
    if form is None or form.parameters is None or not groups or any(group.method is not None for group in groups.values()):
        return None
    config = layout.config_bytes(pack.manifest, parameters=True)
    if config is None:
        return None
    _refuse_attention(pack, list(groups), base)
    tensors = {name: value for name, value in pack.tensors.items() if pack.manifest.tensors[name].group not in groups}
    for path, wrapper in wrappers_of(groups).items():
        for param, value in form.parameters(pack.site(groups[path]), pack.params(path)).items():
            tensors[f"{PREFIX}{wrapper}.{form.suffixes[param]}"] = value
    return {TENSORS: b"".join(safetensors.pieces(tensors, METADATA)), layout.CONFIG: config}


def _refuse_attention(pack: Pack, paths: list[str], base: BaseModel | None) -> None:
    """Refuses the parameters of attention, which PEFT has by the module alone, and not by ``target_parameters``."""
    for path in paths:
        owner = path.removesuffix(".out_proj.weight").removesuffix(".in_proj_weight")
        if owner == path:
            continue
        fused = f"{owner}.in_proj_weight"
        if fused in paths or (base is not None and base.stored_shape(fused) is not None):
            raise Unsupported("PEFT up to 0.21.2 adds the change of an attention's out_proj twice and later versions once, so no file "
                              "means the same to all", where=f"pack '{pack.name}', {path}", remedy="keep the pack as it is")
        if base is None:
            raise Unsupported("PEFT has another form for this parameter if it belongs to torch's own attention", where=path,
                              expected="the base", remedy="name it with --base")
