"""The PEFT face of a pack: tensor names, ``adapter_config.json`` out, and a PEFT folder in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AdapterpackError, FormatError, Unsupported, storage_errors
from ..methods import Method, PeftLayer, Site, get, is_stacked, methods
from . import manifest as m
from . import strict_json
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
_PICKLES = ("adapter_model.bin", "adapter_model.pt")


def form_of(method: Method, kind: str) -> PeftLayer | None:
    """How PEFT stores the method at sites of that kind, or None where it has no such form."""
    if method.peft is None:
        return None
    return PeftLayer(method.peft.suffixes) if kind == "linear" else method.peft.layers.get(kind)


def tensor_name(method: Method, path: str, param: str, kind: str = "linear") -> str:
    """PEFT's name for a parameter at a site; one of our own where PEFT has none.

    Raises:
        FormatError: the method does not say how PEFT calls that parameter.
    """
    form = form_of(method, kind)
    suffixes = form.suffixes if form else {param: param}
    if param not in suffixes:
        raise FormatError(f"the method {method.name} has no parameter of that name", where=path, expected=", ".join(suffixes), found=param)
    return f"{_PREFIX}{path}.{suffixes[param]}"


def stored(method: Method, site: Site, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a site in the shapes that PEFT stores."""
    form = form_of(method, site.kind)
    return form.stored(site, params) if form is not None and form.stored is not None else dict(params)


def loaded(method: Method, kind: str, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reverse of :func:`stored`: a convolution's tensors as matrices."""
    form = form_of(method, kind)
    if form is None or form.stored is None:
        return dict(params)
    return {name: value.reshape(len(value), math.prod(value.shape[1:])) if value.ndim > 2 else value for name, value in params.items()}


def kernel_of(kind: str, shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The kernel of a convolution, which the tensors that belong to its input have behind their second axis; empty for other kinds."""
    return () if is_stacked(kind) else max((shape[2:] for shape in shapes), key=lambda axes: (math.prod(axes), len(axes)), default=())


def shared_name(method: Method, param: str) -> str:
    """PEFT's name for a parameter that all sites share; one of our own for a method that PEFT does not know."""
    return method.peft.shared[param] if method.peft else f"{_PREFIX}@shared.{param}"


def full_name(path: str, param: str) -> str:
    """PEFT's name for a parameter of a module that was trained whole."""
    return f"{_PREFIX}{path}.{param}"


def config_bytes(manifest: m.Manifest) -> bytes | None:
    """PEFT's config for a manifest, or None where PEFT cannot load the tensors: another method or kind of layer, quantized tensors."""
    from .pack import Pack  # noqa: PLC0415 - pack and its PEFT face know each other

    method = get(manifest.method.type)
    if method.peft is None or manifest.quantization is not None:
        return None
    adapters = [group for group in manifest.groups if group.role == "adapter"]
    forms = [form_of(method, group.kind) for group in adapters]
    if None in forms:
        return None
    sites = {group.path: Pack(manifest, {}).config_at(group) for group in adapters}
    saved = [group.path for group in manifest.groups if group.role == "full"]
    config = {
        "peft_type": method.peft.peft_type,
        "task_type": _PEFT_TASKS.get(manifest.task.type),
        "base_model_name_or_path": manifest.base.name,
        "revision": manifest.base.commit,
        "inference_mode": True,
        "target_modules": list(sites),
        "modules_to_save": saved or None,
        **(method.peft.to_config(sites) if sites else {}),
        **{key: value for form in forms if form is not None for key, value in form.config.items()},
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
    is_expected = expected is not None and expected.peft is not None and expected.peft.peft_type == config.get("peft_type")
    known_methods = [expected] if is_expected and expected is not None else methods().values()
    by_type = {method.peft.peft_type: method for method in known_methods if method.peft}
    method = by_type.get(str(config.get("peft_type")))
    if method is None or method.peft is None:
        raise Unsupported("this PEFT method is not supported", where=folder / CONFIG, expected=", ".join(sorted(by_type)),
                          found=config.get("peft_type"))
    try:
        cfg = method.peft.from_config(config)
        known = _NEUTRAL | set(method.peft.to_config({"": method.config()}))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise FormatError(f"the PEFT configuration is not usable: {error}", where=folder / CONFIG) from error
    _refuse_options(config, known, [layer.config for layer in method.peft.layers.values()], folder / CONFIG)
    file = folder / TENSORS
    tensors = tensors or SafetensorsFile(file, private=True)
    params, shared, full = _sort(method, tensors, config.get("modules_to_save") or (), file)
    adapters = {}
    for path, found in sorted(params.items()):
        if ".base_layer." in path:  # PEFT up to 0.21.2 counts attention's out_proj twice: its numbers mean another model
            raise Unsupported("an adapter of attention or of bare parameters has no form in which PEFT and this package agree",
                              where=f"{file}, {path}", remedy="merge this adapter with the library that made it")
        try:
            here = cfg.at(path)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise FormatError(f"the PEFT configuration is not usable: {error}", where=f"{folder / CONFIG}, {path}") from error
        site, here_params = _site(method, here, path, found, config, file)
        adapters[site] = (here, here_params)
    if not adapters:
        raise FormatError("the folder holds no adapter tensors", where=file)
    return method, adapters, shared, full


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
    if set(config.get("target_modules") or ()) != {group.path for group in manifest.groups if group.role == "adapter"}:
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


def _refuse_options(config: Mapping[str, Any], known: frozenset[str], layers: Sequence[Mapping[str, Any]], where: Path) -> None:
    """An option that is switched on and not understood would change the result without a word: it is refused.

    ``layers`` are the options that say what kind of layer the tensors belong to.
    """
    for key, value in config.items():
        if any(key in options and options[key] == value for options in layers):
            continue
        if value not in _INERT.get(key, (value,) if key in known else _OFF):
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
    shared = {param: tensors.read(name) for param, name in method.peft.shared.items() if name in tensors.tensors}
    suffixes = {suffix for named in (method.peft.suffixes, *(form.suffixes for form in method.peft.layers.values()))
                for suffix in named.values()}
    for name in tensors.tensors:
        if name in method.peft.shared.values():
            continue
        if not name.startswith(_PREFIX):
            raise FormatError("a tensor name that PEFT does not write", where=where, found=name, expected=f"{_PREFIX}...")
        rest = name.removeprefix(_PREFIX)
        suffix = next((suffix for suffix in suffixes if rest.endswith(f".{suffix}")), None)
        if suffix is not None:
            params.setdefault(rest.removesuffix(f".{suffix}"), {})[suffix] = tensors.read(name)
            continue
        path, _, param = rest.rpartition(".")
        if path.endswith(".base_layer") and param == "weight" and any(
            f"{_PREFIX}{path.removesuffix('.base_layer')}.{suffix}" in tensors.tensors for suffix in suffixes):
            continue  # the base's own weight, which PEFT saves beside an adapted embedding
        if not _saved(path, modules_to_save):
            raise Unsupported("a tensor that the PEFT configuration does not account for", where=where, found=name,
                              expected=f"{', '.join(sorted(suffixes))}, or a module of modules_to_save",
                              remedy="name its module in modules_to_save, or remove the tensor")
        full.setdefault(path, {})[param] = tensors.read(name)
    return params, shared, full


def _kind(method: Method, config: Mapping[str, Any], found: Mapping[str, np.ndarray]) -> str:
    """The kind of a site, told by the names and the axes of its tensors and by the config.

    PEFT keeps one ``fan_in_fan_out`` for all sites, the last one's: of a model with both kinds of linear layer it says one thing only.
    """
    assert method.peft is not None
    axes = {value.ndim for value in found.values()}
    for kind, form in method.peft.layers.items():
        named = found.keys() <= set(form.suffixes.values())
        if named and len(axes) == 1 and axes <= set(form.axes) and all(config.get(key) == value for key, value in form.config.items()):
            return kind
    return "linear"


def _site(
    method: Method, cfg: Any, path: str, found: Mapping[str, np.ndarray], config: Mapping[str, Any], where: Path
) -> tuple[Site, dict[str, np.ndarray]]:
    """The site behind tensors by PEFT's suffix, and its parameters."""
    assert method.peft is not None
    kind = _kind(method, config, found)
    form = form_of(method, kind)
    assert form is not None
    names = {suffix: param for param, suffix in form.suffixes.items()}
    params = {names.get(suffix, suffix): value for suffix, value in found.items()}
    expected = set(method.shapes(cfg, Site(path, 1, 1, kind)))
    if set(params) != expected:
        raise FormatError("the tensors of a site do not pair up", where=f"{where}, {path}", expected=sorted(expected), found=sorted(params))
    kernel, whole = kernel_of(kind, [value.shape for value in params.values()]), params
    try:
        params = loaded(method, kind, params)
        widths = method.peft.features(params)
    except (IndexError, ValueError) as error:
        shapes = {name: value.shape for name, value in params.items()}
        raise FormatError("the tensors of a site have too few axes", where=f"{where}, {path}", found=shapes) from error
    site = check_shapes(method, cfg, Site(path, widths[0] or 0, widths[1] or 0, kind, kernel=kernel), params, where)
    shapes = {name: value.shape for name, value in whole.items()}
    try:
        right = {name: value.shape for name, value in stored(method, site, params).items()}
    except ValueError:  # a kernel that the input's width is no multiple of
        right = None
    if shapes != right:
        raise FormatError("a tensor has the wrong shape", where=f"{where}, {path}", expected=right, found=shapes)
    return site, params


def check_shapes(method: Method, cfg: Any, site: Site, params: dict[str, np.ndarray], where: object) -> Site:
    """The site, if every parameter has the shape that the method gives it there.

    Raises:
        FormatError: one has not; names the site, the parameter and both shapes.
    """
    stack = (site.stack,) if is_stacked(site.kind) else ()
    for param, one in method.shapes(cfg, site).items():
        shape = (*stack, *one)
        if param not in params or params[param].shape != shape:
            found = params[param].shape if param in params else "no such tensor"
            raise FormatError("a tensor has the wrong shape", where=f"{where}, {site.path}, {param}", expected=shape, found=found)
    return site
