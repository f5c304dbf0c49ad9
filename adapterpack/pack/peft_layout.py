"""The PEFT face of a pack: tensor names, ``adapter_config.json`` out, and a PEFT folder in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AdapterpackError, FormatError, Unsupported, storage_errors
from ..methods import Method, PeftContent, PeftForm, Site, get, methods
from . import manifest as m
from . import patterns, strict_json
from .safetensors import SafetensorsFile

if TYPE_CHECKING:
    from .pack import Pack

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAX_CONFIG = 4 << 20
_PEFT_TASKS = {"text-classification": "SEQ_CLS", "text-generation": "CAUSAL_LM", "token-classification": "TOKEN_CLS",
               "feature-extraction": "FEATURE_EXTRACTION"}
_INERT: dict[str, tuple[Any, ...]] = {"bias": (None, "none"), "use_dora": (None, False), "fan_in_fan_out": (None, False),
                                      "lora_bias": (None, False), "use_qalora": (None, False), "layer_replication": (None, []),
                                      "alora_invocation_tokens": (None, []), "target_parameters": (None, []),
                                      "trainable_token_indices": (None, [], {})}
"""Keys that change the mathematics, with the values under which they do not."""
_NEUTRAL = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
})
"""Keys that say where the tensors came from and where they go: the tensors themselves say it again, so any value will do."""
_OFF: tuple[Any, ...] = (None, False, "", [], {})
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INPUTS, _OUTPUTS = (1, 5040, 1 << 20), (2, 720720, 12)
"""Stand-ins for widths that are not known."""
_PICKLES = ("adapter_model.bin", "adapter_model.pt")


def tensor_name(method: Method, path: str, param: str) -> str:
    """PEFT's name for a parameter at a site.

    Raises:
        FormatError: the method does not say how PEFT calls that parameter.
    """
    suffixes = method.peft.suffixes if method.peft else {param: param}
    if param not in suffixes:
        raise FormatError(f"the method {method.name} has no parameter of that name", where=path, expected=", ".join(suffixes), found=param)
    return suffixes[param] if method.peft and path == method.peft.site else f"{_PREFIX}{path}.{suffixes[param]}"


def shared_name(method: Method, param: str) -> str:
    """PEFT's name for a parameter that all sites share; one of our own for a method that PEFT does not know."""
    if method.peft is None:
        return f"{_PREFIX}@shared.{param}"
    if param in method.peft.shared:
        return method.peft.shared[param]
    stem, _, number = param.rpartition("_")
    return f"{method.peft.shared[stem]}.{number}"


def _shared_param(method: Method, name: str) -> str | None:
    """The shared parameter that PEFT's tensor ``name`` holds, or None."""
    assert method.peft is not None
    for param, whole in method.peft.shared.items():
        number = name.removeprefix(f"{whole}.")
        if name == whole or (number != name and number.isdecimal()):
            return param if name == whole else f"{param}_{number}"
    return None


def full_name(method: Method, path: str, param: str) -> str:
    """PEFT's name for a parameter of a module that was trained whole."""
    return f"{_prefix(method)}{path}.{param}"


def _prefix(method: Method) -> str:
    """What stands before the path of a module: PEFT wraps the model once less for a method that acts on it as a whole."""
    return _PREFIX.removesuffix("model.") if method.peft and method.peft.site else _PREFIX


def config_bytes(manifest: m.Manifest) -> bytes | None:
    """PEFT's config for a manifest, or None where PEFT cannot load the tensors (another method, quantized tensors, tensors left out)."""
    from .pack import Pack  # noqa: PLC0415 - pack and its PEFT face know each other

    method = get(manifest.method.type)
    if method.peft is None or manifest.quantization is not None:
        return None
    adapters = [group for group in manifest.groups if group.role == "adapter"]
    sites = {group.path: Pack(manifest, {}).config_at(group) for group in adapters}
    saved = [group.path for group in manifest.groups if group.role == "full"]
    task, own = _PEFT_TASKS.get(manifest.task.type), method.peft.to_config(sites) if sites else {}
    if own is None or not method.peft.same(sites, task):
        return None
    config = {
        "peft_type": method.peft.peft_type,
        "task_type": task,
        "base_model_name_or_path": manifest.base.name,
        "revision": manifest.base.commit,
        "inference_mode": True,
        **({} if method.peft.site else {"target_modules": list(sites)}),
        "modules_to_save": saved or None,
        **own,
    }
    return strict_json.canonical(config)


def read(folder: Path, name: str | None = None) -> Pack:
    """A pack made from a folder that PEFT wrote; its base is known by name only, so its digests are empty.

    Raises:
        FormatError: the folder is not a PEFT adapter, or its tensors do not pair up.
        Unsupported: it uses a method or an option that adapterpack cannot reproduce exactly.
    """
    from .pack import build  # noqa: PLC0415 - pack and its PEFT face know each other

    config = _config(folder / CONFIG)
    _refuse_pickle(folder / TENSORS)
    method, adapters, shared, full = _parts(folder, config, None, None)
    task = {value: key for key, value in _PEFT_TASKS.items()}.get(str(config.get("task_type")), "feature-extraction")
    version = config.get("peft_version")
    return build(name or _plain_name(folder.resolve().name), method, adapters, shared=shared, full=full, task=m.Task(task),
                 base=_base_hint(config),
                 training={"imported_from": "peft", **({"peft_version": version} if isinstance(version, str) else {})})


def _parts(
    folder: Path, config: Mapping[str, Any], expected: Method | None, tensors: SafetensorsFile | None
) -> tuple[Method, dict[Site, tuple[Any, dict[str, np.ndarray]]], dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Method, adapted sites, shared parameters and whole modules of a PEFT folder; ``tensors``: its file, if it is open already.

    ``expected`` is asked first, because listing every method means looking through every installed package.
    """
    is_expected = expected is not None and expected.peft is not None and expected.peft.reads(config)
    known_methods = [expected] if is_expected and expected is not None else list(methods().values())
    method = next((method for method in known_methods if method.peft and method.peft.reads(config)), None)
    if method is None or method.peft is None:
        raise Unsupported("this PEFT method is not supported", where=folder / CONFIG, found=config.get("peft_type"),
                          expected=", ".join(sorted({method.peft.peft_type for method in known_methods if method.peft})))
    file = folder / TENSORS
    expressions = [key for key, value in config.items() if key.endswith("_pattern") and patterns.is_expression(value)]
    if expressions:
        tensors = tensors or SafetensorsFile(file, private=True)
        paths = sorted(_sort(method, tensors, config.get("modules_to_save") or (), file)[0])
        config = {**config, **{key: patterns.expanded(config[key], paths, f"{folder / CONFIG}#/{key}") for key in expressions}}
    try:
        cfg = method.peft.from_config(config)
        written = method.peft.to_config({"": cfg}) or {}
    except (TypeError, ValueError, ArithmeticError) as error:
        raise FormatError(f"the PEFT configuration is not usable: {error}", where=folder / CONFIG) from error
    _refuse_options(config, written, folder / CONFIG)
    tensors = tensors or SafetensorsFile(file, private=True)
    params, shared, full = _sort(method, tensors, config.get("modules_to_save") or (), file)
    if method.peft.tied:
        params = _untied(params, config.get("target_modules"), file)
    if method.peft.adopt is not None:
        try:
            cfg, common, own = method.peft.adopt(PeftContent(cfg, shared, params))
            shared, params = dict(common), {path: dict(found) for path, found in own.items()}
        except (TypeError, ValueError, IndexError) as error:
            raise FormatError(f"the tensors do not fit the PEFT configuration: {error}", where=file) from error
    adapters = {}
    for path, found in sorted(params.items()):
        try:
            here = cfg.at(path)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise FormatError(f"the PEFT configuration is not usable: {error}", where=f"{folder / CONFIG}, {path}") from error
        site = _site(method, here, path, found, file)
        adapters[site] = (here, found)
    if not adapters:
        raise FormatError("the folder holds no adapter tensors", where=file)
    shapes = {name: value.shape for name, value in shared.items()}
    wanted = {} if method.shared is None else method.shared.shapes(next(iter(adapters.values()))[0], list(adapters))
    if shapes != wanted:
        raise FormatError("the tensors that all sites share are not those of the method", where=file, expected=wanted, found=shapes)
    return method, adapters, shared, full


def _untied(params: dict[str, dict[str, np.ndarray]], targets: Any, where: Path) -> dict[str, dict[str, np.ndarray]]:
    """Without the heads that are tied to a table: of modules with the same tensors, those that the config does not name."""
    names = [targets] if isinstance(targets, str) else targets if isinstance(targets, list) else []
    named = {path for path in params if any(f".{path}".endswith(f".{name}") for name in names)}
    kept = {}
    for path, found in params.items():
        twins = {other for other, its in params.items() if other != path and found.keys() == its.keys()
                 and all(np.array_equal(found[key], its[key]) for key in found)}
        if path in named and twins & named:
            raise Unsupported("two modules have the same rows, and the configuration does not say which is the table", where=where,
                              found=", ".join(sorted({path} | twins)), remedy="name only the embedding in target_modules")
        if path in named or not twins & named:
            kept[path] = found
    return kept


def disagreement(folder: Path, manifest: m.Manifest, config_bytes: bytes, tensors: SafetensorsFile) -> str | None:
    """What PEFT would read otherwise than ``manifest`` says, or None; from bytes already read, ``folder`` is for messages."""
    truth = get(manifest.method.type)
    try:
        config = _parsed(config_bytes, folder / CONFIG)
        method, adapters, _, full = _parts(folder, config, truth, tensors)
    except AdapterpackError as error:
        return f"PEFT's reading of it fails: {error}"
    whole = [group.path for group in manifest.groups if group.role == "full"]  # which may be several layers in PEFT's reading
    theirs: dict[str, tuple[str, int | None, float | None]] = {site.path: ("adapter", cfg.rank, cfg.scale)
                                                                for site, (cfg, _) in adapters.items()}
    theirs |= {next((path for path in whole if f"{found}.".startswith(f"{path}.")), found): ("full", None, None) for found in full}
    ours = {group.path: (group.role, group.rank, group.scale) for group in manifest.groups if group.role != "shared"}
    for path in sorted(theirs.keys() ^ ours.keys()):
        return f"the modules differ at {path}"
    for path, meaning in ours.items():
        if theirs[path] != meaning:
            return f"{path} is {theirs[path]} there and {meaning} in the manifest"
    targets = {group.path for group in manifest.groups if group.role == "adapter"} - {truth.peft.site if truth.peft else None}
    if set(config.get("target_modules") or ()) != targets:
        return "target_modules are not the adapted modules"
    return None if method is truth else f"the method is {method.name}"


def _config(path: Path) -> dict[str, Any]:
    with storage_errors(path):
        if path.stat().st_size > _MAX_CONFIG:
            raise FormatError("the PEFT configuration is too large", where=path, expected=f"at most {_MAX_CONFIG} bytes",
                              found=path.stat().st_size)
        data = path.read_bytes()
    return _parsed(data, path)


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    config = strict_json.loads(data, path, _MAX_CONFIG)
    if not isinstance(config, dict):
        raise FormatError("this is not a PEFT configuration", where=path, expected="an object with peft_type")
    return config


def _refuse_options(config: Mapping[str, Any], written: Mapping[str, Any], where: Path) -> None:
    """An option that is switched on and not understood would change the result without a word: it is refused.

    What the method writes itself it understands.
    """
    for key, value in config.items():
        known = key in _NEUTRAL or key in written
        if value not in _INERT.get(key, (value,) if known else _OFF) and (key not in written or value != written[key]):
            raise Unsupported(f"this PEFT option is not supported: {key}", where=f"{where}#/{key}", found=repr(value)[:80],
                              remedy="merge this adapter with the library that made it, or train it without that option")


def _refuse_pickle(file: Path) -> None:
    pickles = [name for name in _PICKLES if (file.parent / name).exists()]
    if pickles and not file.exists():
        raise Unsupported("the adapter is stored as a pickle, which can run code and is never opened", where=file.parent / pickles[0],
                          expected=file.name, remedy="save it again with save_pretrained(..., safe_serialization=True) where you trust it")


def _base_hint(config: Mapping[str, Any]) -> m.Base:
    """The base by its hub name, if it has one: the path of somebody's disk says nothing to others and stays out of the manifest."""
    hint, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(hint, str) or len(hint) > 200 or not _HUB_ID.fullmatch(hint):
        return m.Base()
    return m.Base(hint, revision if isinstance(revision, str) and _COMMIT.fullmatch(revision) else None)


def _plain_name(folder: str) -> str:
    """A folder's name in the characters that a pack's name may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder).strip("-._")[:128] or "adapter"


def _saved(path: str, modules_to_save: Any) -> bool:
    """Whether PEFT saves module ``path`` whole: it, or a module around it, has a name that ends in a saved one."""
    parts = path.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return isinstance(modules_to_save, list | tuple) and any(module.endswith(str(saved)) for module in around for saved in modules_to_save)


def _sort(
    method: Method, tensors: SafetensorsFile, modules_to_save: Any, where: Path
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    assert method.peft is not None
    params: dict[str, dict[str, np.ndarray]] = {}
    full: dict[str, dict[str, np.ndarray]] = {}
    endings = {**{suffix: param for param, suffix in method.peft.suffixes.items()}, **method.peft.aliases}
    prefix, bare = _prefix(method), {suffix: param for param, suffix in method.peft.suffixes.items()} if method.peft.site else {}
    shared: dict[str, np.ndarray] = {}
    for name in tensors.tensors:
        if (common := _shared_param(method, name)) is not None:
            shared[common] = tensors.read(name)
            continue
        if name in bare:
            params.setdefault(str(method.peft.site), {})[bare[name]] = tensors.read(name)
            continue
        if not name.startswith(prefix):
            raise FormatError("a tensor name that PEFT does not write", where=where, found=name, expected=f"{prefix}...")
        rest = name.removeprefix(prefix)
        for suffix, param in endings.items():
            if not bare and rest.endswith("." + suffix):
                params.setdefault(rest.removesuffix("." + suffix), {})[param] = tensors.read(name)
                break
        else:
            path, _, param = rest.rpartition(".")
            if not _saved(path, modules_to_save):
                raise Unsupported("a tensor that the PEFT configuration does not account for", where=where, found=name,
                                  expected=f"{', '.join(method.peft.suffixes.values())}, or a module of modules_to_save",
                                  remedy="name its module in modules_to_save, or remove the tensor")
            full.setdefault(path, {})[param] = tensors.read(name)
    return params, shared, full


def _site(method: Method, cfg: Any, path: str, params: dict[str, np.ndarray], where: Path) -> Site:
    assert method.peft is not None
    widths = _features(method.peft, params, f"{where}, {path}")
    site = Site(path, widths[0] or 0, widths[1] or 0, method.traits.layers[0], "bias" in params)
    try:
        expected = set(method.shapes(cfg, site))  # which of them there are may depend on the widths
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        shapes = {name: value.shape for name, value in params.items()}
        raise FormatError("the tensors of a site do not pair up, or have too few axes", where=f"{where}, {path}", found=shapes) from error
    if set(params) != expected:
        raise FormatError("the tensors of a site do not pair up", where=f"{where}, {path}", expected=sorted(expected), found=sorted(params))
    return check_shapes(method, cfg, site, params, where)


def _features(form: PeftForm, params: dict[str, np.ndarray], where: str) -> tuple[int | None, int | None]:
    try:
        return form.features(params)
    except (IndexError, KeyError, ValueError) as error:
        shapes = {name: value.shape for name, value in params.items()}
        raise FormatError("the tensors of a site do not pair up, or have too few axes", where=where, found=shapes) from error


def check_shapes(method: Method, cfg: Any, site: Site, params: dict[str, np.ndarray], where: object) -> Site:
    """The site, if every parameter has the shape that the method gives it there, as far as the site's known widths say it.

    Raises:
        FormatError: one has not; names the site, the parameter and both shapes.
    """
    widths = (site.in_features, site.out_features)
    if method.peft is not None and not all(widths) and params:
        said = _features(method.peft, params, f"{where}, {site.path}")
        if any(mine == 0 and its is not None for mine, its in zip(widths, said, strict=True)):
            raise FormatError("the tensors say a width that the site leaves out", where=f"{where}, {site.path}", expected=said,
                              found=widths)
    for param, shape in _known_shapes(method, cfg, site).items():
        found = params[param].shape if param in params else None
        if found is None or len(found) != len(shape) or any(axis not in {None, its} for axis, its in zip(shape, found, strict=True)):
            raise FormatError("a tensor has the wrong shape", where=f"{where}, {site.path}, {param}", expected=shape,
                              found="no such tensor" if found is None else found)
    return site


def _known_shapes(method: Method, cfg: Any, site: Site) -> dict[str, tuple[int | None, ...]]:
    """The shapes of a site's parameters; an axis that changes with a width that the site does not know is None."""
    tries = [method.shapes(cfg, dataclasses.replace(site, in_features=site.in_features or wide, out_features=site.out_features or tall))
             for wide, tall in zip(_INPUTS, _OUTPUTS, strict=True)]
    return {param: tuple(axes[0] if len(set(axes)) == 1 else None for axes in zip(*(shapes[param] for shapes in tries), strict=True))
            for param in tries[0]}
