"""The PEFT face of a pack: tensor names, ``adapter_config.json`` out, and a PEFT folder in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FormatError, Unsupported
from ..methods import Method, Site, get, methods
from . import manifest as m
from . import strict_json
from .safetensors import SafetensorsFile

if TYPE_CHECKING:
    from .pack import Pack

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_MAX_CONFIG = 4 << 20
_PEFT_TASKS = {"text-classification": "SEQ_CLS", "text-generation": "CAUSAL_LM", "token-classification": "TOKEN_CLS",
               "feature-extraction": "FEATURE_EXTRACTION"}
_INERT: dict[str, tuple[Any, ...]] = {"bias": (None, "none"), "use_dora": (None, False), "fan_in_fan_out": (None, False),
                                      "lora_bias": (None, False), "use_qalora": (None, False), "layer_replication": (None, []),
                                      "alora_invocation_tokens": (None, []), "target_parameters": (None, []),
                                      "trainable_token_indices": (None, [], {})}
"""Keys that change the mathematics, with the values under which they do not."""


def tensor_name(method: Method, path: str, param: str) -> str:
    """PEFT's name for a parameter at a site."""
    suffix = method.peft.suffixes[param] if method.peft else param
    return f"{_PREFIX}{path}.{suffix}"


def full_name(path: str, param: str) -> str:
    """PEFT's name for a parameter of a module that was trained whole."""
    return f"{_PREFIX}{path}.{param}"


def config_bytes(manifest: m.Manifest) -> bytes | None:
    """PEFT's config for a manifest, or None where PEFT cannot load the tensors (another method, quantized tensors)."""
    method = get(manifest.method.type)
    if method.peft is None or manifest.quantization is not None:
        return None
    adapters = [group for group in manifest.groups if group.role == "adapter"]
    sites = {group.path: method.config(**{**manifest.config, **group.config}) for group in adapters}
    saved = [group.path for group in manifest.groups if group.role == "full"]
    config = {
        "peft_type": method.peft.peft_type,
        "task_type": _PEFT_TASKS.get(manifest.task.type),
        "base_model_name_or_path": manifest.base.name,
        "revision": manifest.base.commit,
        "inference_mode": True,
        "target_modules": list(sites),
        "modules_to_save": saved or None,
        **method.peft.to_config(sites),
    }
    return strict_json.canonical(config)


def read(folder: Path, name: str | None = None) -> Pack:
    """A pack made from a folder that PEFT wrote; its base is known by name only, so its digests are empty.

    Raises:
        FormatError: the folder is not a PEFT adapter, or its tensors do not pair up.
        Unsupported: it uses a method or an option that adapterpack cannot reproduce exactly.
    """
    from .pack import build  # noqa: PLC0415 - pack and its PEFT face know each other

    config = strict_json.loads((folder / CONFIG).read_bytes(), folder / CONFIG, _MAX_CONFIG)
    by_type = {method.peft.peft_type: method for method in methods().values() if method.peft}
    method = by_type.get(config.get("peft_type"))
    if method is None:
        raise Unsupported("this PEFT method is not supported", where=folder / CONFIG, expected=", ".join(sorted(by_type)),
                          found=config.get("peft_type"))
    for key, inert in _INERT.items():
        if config.get(key) not in inert:
            raise Unsupported("this PEFT option is not supported yet", where=f"{folder / CONFIG}#/{key}", found=config[key])
    assert method.peft is not None
    file = folder / "adapter_model.safetensors"
    tensors = SafetensorsFile(file)
    params, full = _sort(method, tensors, file)
    cfg = method.peft.from_config(config)
    adapters = {}
    for path, found in sorted(params.items()):
        here = cfg.at(path)
        site = _site(method, here, path, found, file)
        adapters[site] = (here, found)
    if not adapters:
        raise FormatError("the folder holds no adapter tensors", where=file)
    task = {value: key for key, value in _PEFT_TASKS.items()}.get(config.get("task_type"), "feature-extraction")
    hint = config.get("base_model_name_or_path")
    local = not isinstance(hint, str) or hint.startswith(("/", ".", "~")) or "\\" in hint
    return build(name or folder.resolve().name, method, adapters, full=full, task=m.Task(task),
                 base=m.Base(None if local else hint),
                 training={"imported_from": "peft", "peft_version": str(config.get("peft_version"))})


def _sort(method: Method, tensors: SafetensorsFile, where: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    assert method.peft is not None
    params: dict[str, dict[str, np.ndarray]] = {}
    full: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors.tensors:
        if not name.startswith(_PREFIX):
            raise FormatError("a tensor name that PEFT does not write", where=where, found=name, expected=f"{_PREFIX}...")
        rest = name.removeprefix(_PREFIX)
        for param, suffix in method.peft.suffixes.items():
            if rest.endswith("." + suffix):
                params.setdefault(rest.removesuffix("." + suffix), {})[param] = tensors.read(name)
                break
        else:
            path, _, param = rest.rpartition(".")
            full.setdefault(path, {})[param] = tensors.read(name)
    return params, full


def _site(method: Method, cfg: Any, path: str, params: dict[str, np.ndarray], where: Path) -> Site:
    assert method.peft is not None
    expected = set(method.shapes(cfg, Site(path, 1, 1)))
    if set(params) != expected or any(value.ndim < 2 for value in params.values()):
        raise FormatError("the tensors of a site do not pair up", where=f"{where}, {path}", expected=sorted(expected), found=sorted(params))
    return check_shapes(method, cfg, Site(path, *method.peft.features(params)), params, where)


def check_shapes(method: Method, cfg: Any, site: Site, params: dict[str, np.ndarray], where: object) -> Site:
    """The site, if every parameter has the shape that the method gives it there.

    Raises:
        FormatError: one has not; names the site, the parameter and both shapes.
    """
    for param, shape in method.shapes(cfg, site).items():
        if param not in params or params[param].shape != shape:
            found = params[param].shape if param in params else "no such tensor"
            raise FormatError("a tensor has the wrong shape", where=f"{where}, {site.path}, {param}", expected=shape, found=found)
    return site
