"""The PEFT face of a pack: tensor names, ``adapter_config.json`` out, and a PEFT folder in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AdapterpackError, FormatError, Unsupported, storage_errors
from ..methods import Method, PeftContent, PeftLayer, Site, built_in, get, is_stacked, methods
from . import manifest as m
from . import patterns, strict_json
from .composition import method_of
from .safetensors import SafetensorsFile
from .shapes import check_shapes, features

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
    return PeftLayer(method.peft.suffixes) if kind == method.traits.layers[0] else method.peft.layers.get(kind)


def tensor_name(method: Method, path: str, param: str, kind: str | None = None) -> str:
    """PEFT's name for a parameter at a site; one of our own where PEFT has none.

    Raises:
        FormatError: the method does not say how PEFT calls that parameter.
    """
    form = form_of(method, kind or method.traits.layers[0])
    suffixes = form.suffixes if form else {param: param}
    if param not in suffixes:
        raise FormatError(f"the method {method.name} has no parameter of that name", where=path, expected=", ".join(suffixes), found=param)
    return suffixes[param] if method.peft and path == method.peft.site else f"{_PREFIX}{path}.{suffixes[param]}"


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
    """PEFT's config for a manifest, or None where PEFT cannot load the tensors: another method or kind of layer, quantized tensors,
    tensors left out."""
    from .pack import Pack  # noqa: PLC0415 - pack and its PEFT face know each other

    method = method_of(manifest)
    if method.peft is None or manifest.quantization is not None:
        return None
    adapters = [group for group in manifest.groups if group.role == "adapter"]
    forms = [form_of(method, group.kind) for group in adapters]
    if None in forms:
        return None
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
        **({} if method.peft.site or not method.peft.names_sites else {"target_modules": list(sites)}),
        "modules_to_save": saved or None,
        **own,
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

    ``expected``, or the method that has PEFT's name, is asked first: no config is read by two, and listing every method means looking
    through every installed package.
    """
    expected = expected or built_in(str(config.get("peft_type")).lower())
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
    _refuse_options(config, written, [layer.config for layer in method.peft.layers.values()], folder / CONFIG)
    tensors = tensors or SafetensorsFile(file, private=True)
    by_suffix, shared, full = _sort(method, tensors, config.get("modules_to_save") or (), file)
    kinds = {path: _kind(method, config, found) for path, found in by_suffix.items()}
    params = {path: _named(method, kinds[path], found) for path, found in by_suffix.items()}
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
        if ".base_layer." in path:  # PEFT up to 0.21.2 counts attention's out_proj twice: its numbers mean another model
            raise Unsupported("an adapter of attention or of bare parameters has no form in which PEFT and this package agree",
                              where=f"{file}, {path}", remedy="merge this adapter with the library that made it")
        try:
            here = cfg.at(path)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise FormatError(f"the PEFT configuration is not usable: {error}", where=f"{folder / CONFIG}, {path}") from error
        site, here_params = _site(method, here, path, kinds.get(path, method.traits.layers[0]), found, file)
        adapters[site] = (here, here_params)
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
    if truth.peft is not None and truth.peft.names_sites and set(config.get("target_modules") or ()) != targets:
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


def _refuse_options(
    config: Mapping[str, Any], written: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], where: Path
) -> None:
    """An option that is switched on and not understood would change the result without a word: it is refused.

    What the method writes itself it understands; ``layers`` are the options that say what kind of layer the tensors belong to.
    """
    for key, value in config.items():
        if any(key in options and options[key] == value for options in layers):
            continue
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
    named = [method.peft.suffixes, *(form.suffixes for form in method.peft.layers.values())]
    endings = dict.fromkeys([*(suffix for suffixes in named for suffix in suffixes.values()), *method.peft.aliases])
    prefix, bare = _prefix(method), set(method.peft.suffixes.values()) if method.peft.site else set()
    shared: dict[str, np.ndarray] = {}
    for name in tensors.tensors:
        if (common := _shared_param(method, name)) is not None:
            shared[common] = tensors.read(name)
            continue
        if name in bare:
            params.setdefault(str(method.peft.site), {})[name] = tensors.read(name)
            continue
        if not name.startswith(prefix):
            raise FormatError("a tensor name that PEFT does not write", where=where, found=name, expected=f"{prefix}...")
        rest = name.removeprefix(prefix)
        suffix = next((suffix for suffix in endings if not bare and rest.endswith(f".{suffix}")), None)
        if suffix is not None:
            params.setdefault(rest.removesuffix(f".{suffix}"), {})[suffix] = tensors.read(name)
            continue
        path, _, param = rest.rpartition(".")
        if path.endswith(".base_layer") and param == "weight" and any(
            f"{prefix}{path.removesuffix('.base_layer')}.{suffix}" in tensors.tensors for suffix in endings):
            continue  # the base's own weight, which PEFT saves beside an adapted embedding
        if not _saved(path, modules_to_save):
            raise Unsupported("a tensor that the PEFT configuration does not account for", where=where, found=name,
                              expected=f"{', '.join(endings)}, or a module of modules_to_save",
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
    return method.traits.layers[0]


def _named(method: Method, kind: str, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by PEFT's suffix as a site's parameters; what is no parameter of that kind keeps its suffix."""
    form = form_of(method, kind)
    assert form is not None
    assert method.peft is not None
    names = {**method.peft.aliases, **{suffix: param for param, suffix in form.suffixes.items()}}
    return {names.get(suffix, suffix): value for suffix, value in found.items()}


def _site(method: Method, cfg: Any, path: str, kind: str, whole: dict[str, np.ndarray], where: Path) -> tuple[Site, dict[str, np.ndarray]]:
    """The site behind a site's parameters as PEFT has them, and the parameters as matrices."""
    assert method.peft is not None
    shapes, params = {name: value.shape for name, value in whole.items()}, loaded(method, kind, whole)
    widths = features(method.peft, params, f"{where}, {path}")
    site = Site(path, widths[0] or 0, widths[1] or 0, kind, "bias" in params, kernel_of(kind, shapes.values()))
    try:
        expected = set(method.shapes(cfg, site))  # which of them there are may depend on the widths
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise FormatError("the tensors of a site do not pair up, or have too few axes", where=f"{where}, {path}", found=shapes) from error
    if set(params) != expected:
        raise FormatError("the tensors of a site do not pair up", where=f"{where}, {path}", expected=sorted(expected), found=sorted(params))
    check_shapes(method, cfg, site, params, where)
    try:
        right = {name: value.shape for name, value in stored(method, site, params).items()}
    except ValueError:  # a kernel that the input's width is no multiple of
        right = None
    if shapes != right:
        raise FormatError("a tensor has the wrong shape", where=f"{where}, {path}", expected=right, found=shapes)
    return site, params
