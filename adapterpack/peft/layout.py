"""Writes the ``adapter_config.json`` of a pack, and reads folders that PEFT wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter_methods import (
    Arrays,
    BaseChange,
    Method,
    OfBase,
    PeftConfig,
    PeftContent,
    PeftLayer,
    Shapes,
    Site,
    SiteConfigs,
    Tensors,
    is_bare,
    methods,
    shapes_of,
)
from ..adapter_methods.peft.parameters import KEY as TARGET_PARAMETERS
from ..adapter_methods.peft.parameters import WRAPPED, named_at, names_in, unwrap
from ..errors import AdapterpackError, FormatError, Unsupported
from ..io import TENSORS, SafetensorsFile, strict_json
from ..manifest import Described
from ..manifest import manifest as m
from ..manifest.migrations import refuse_layer_replication
from ..tasks import peft_type_of
from . import patterns
from .names import form_of, limit, secondary_form
from .options import likely, not_read, parse_config, unknown_options
from .tensors import as_parameters, kind_of, site_of, sort

CONFIG = "adapter_config.json"
_COUNTED = ("attention",)
"""The kinds of methods for which PEFT's config counts layers from the last one instead of naming modules."""
Adapters = dict[Site, tuple[Any, Arrays]]
"""Site -> its config and its parameters."""


class Content(NamedTuple):
    """The meaning of a folder that PEFT wrote: its method with the adapted sites and their shared tensors,
    the sites of its secondary methods, the modules that were trained in full, unknown options that are off,
    and what PEFT did to the base.
    """

    method: Method
    adapters: Adapters
    shared: Arrays
    secondary: list[tuple[Method, Adapters]]
    full: dict[str, Arrays]
    unknown: dict[str, Any]
    base_change: BaseChange | None = None


def config_bytes(
    manifest: m.Manifest, on_base: bool = False, parameters: bool = False, reordered: PeftConfig | None = None
) -> bytes | None:
    """Returns PEFT's config for a manifest, or None if PEFT cannot load the tensors: unsupported method or
    kind of layer, quantized tensors, omitted tensors, or no adapter next to modules that were trained in
    full.

    ``on_base``: the tensors are those that PEFT needs on the pack's base. ``parameters``: the tensors of bare
    parameters are as PEFT stores them. ``reordered``: the tensors are in PEFT's order, and PEFT's config
    needs these further keys.
    """
    pack = Described(manifest)
    method = pack.method
    adapters = manifest.adapter_groups
    if (
        not adapters
        or method.peft is None
        or manifest.quantization is not None
        or ("from_peft_with_base" in method.peft.overrides and not on_base)
    ):
        return None
    bare = [
        group.path
        for group in adapters
        if parameters and "bare_parameters" in method.peft.overrides and is_bare(group.kind)
    ]
    layers = [group for group in adapters if group.path not in bare]
    forms = [
        form
        for group in layers
        if (form := form_of(pack.method_of(group), group.kind, None if group.method is None else method))
        and _is_in_peft_form(form, pack.shapes.get(group.path, {}))
    ]
    if len(forms) < len(layers):
        return None
    # PEFT can load tensors that came from its own folder again, even where the manifest leaves something open
    from_peft = (manifest.training or {}).get("imported_from") == "peft"
    if not from_peft and any(
        limit(
            pack.method_of(group),
            pack.config_at(group),
            Site(group.path, group.in_features or 0, group.out_features or 0, group.kind),
        )
        for group in adapters
    ):
        return None
    sites = {group.path: pack.config_at(group) for group in adapters if group.method is None}
    full = [group.path for group in manifest.full_groups]
    task = peft_type_of(manifest.task.type)
    method_config = method.peft.to_config(sites) if sites else {}
    if method_config is None or (reordered is None and not method.peft.equivalent(sites, task)):
        return None
    biases = [path for path in full if "bias" in method_config and pack.shapes[path].keys() == {"bias"}]
    secondary_configs = {}
    for secondary in pack.methods[1:]:
        guest_form = secondary_form(secondary)
        secondary_configs[guest_form.key] = guest_form.to_config(
            {
                group.path: pack.config_at(group)
                for group in adapters
                if group.method is not None and group.method.type == secondary.name
            }
        )
    config = {
        "peft_type": method.peft.peft_type,
        "task_type": task,
        "base_model_name_or_path": manifest.base.name,
        "revision": manifest.base.commit,
        "inference_mode": True,
        **(
            {}
            if method.peft.site or method.kind in _COUNTED
            else {"target_modules": [path for path in sites if path not in bare]}
        ),
        "modules_to_save": [path for path in full if path not in biases] or None,
        **method_config,
        **{key: value for form in forms for key, value in form.config.items()},
        **secondary_configs,
        **({"bias": "all"} if biases else {}),
        **(reordered or {}),
        **({TARGET_PARAMETERS: bare, "lora_dropout": 0.0} if bare else {}),
    }
    if bare and config.get("fan_in_fan_out"):
        return None  # PEFT supports only one of the two
    return strict_json.canonical(config)


def _is_in_peft_form(form: PeftLayer, shapes: Shapes) -> bool:
    """Whether tensors of these ``shapes`` (by parameter) are in PEFT's form; a pack may store them as
    matrices.
    """
    named = {(form.suffixes or {}).get(param, param): shape for param, shape in shapes.items()}
    return form.shapes_say_so(named) is not False


def content_of(
    folder: Path,
    config: PeftConfig,
    expected: Iterable[Method],
    tensors: SafetensorsFile | None,
    packed: bool = False,
    base: OfBase | None = None,
) -> Content:
    """Reads what a PEFT folder means. ``tensors`` is its file, if already open; ``packed`` and ``base`` are
    as in :class:`~..adapter_methods.PeftContent`.

    The first ``expected`` method, or the method with PEFT's name for it, is tried first: only one method
    reads a config, and listing all of them would search every installed package.
    """
    candidates = [method for method in expected if method.peft is not None] or likely(config)
    if not candidates or candidates[0].peft is None or not candidates[0].peft.reads(config):
        # Listing all methods imports plugins, so the likely ones are tried first.
        candidates = list(methods().values())
    refuse_layer_replication(config.get("layer_replication"), f"{folder / CONFIG}#/layer_replication")
    method = next((method for method in candidates if method.peft and method.peft.reads(config)), None)
    if method is None or method.peft is None:
        raise not_read(config, candidates, folder / CONFIG)
    secondary = {
        secondary_form(guest).key: guest
        for guest in candidates
        if guest.peft is not None
        and "secondary" in guest.peft.overrides
        and method.peft.peft_type in secondary_form(guest).hosts
        and config.get(secondary_form(guest).key)
    }
    file = folder / TENSORS
    config, tensors = _expand_patterns(method, config, tensors, folder)
    with _translate_errors(folder / CONFIG):
        cfg = method.peft.from_config(config)
        base_change = method.peft.undo_base_change(config)
        written = method.peft.to_config({"": cfg}) or {}
    layers = [layer.config for layer in method.peft.layers.values()]
    known = {*secondary, *method.peft.known_keys}
    unknown = unknown_options(
        {key: value for key, value in config.items() if key not in known}, written, layers, folder / CONFIG
    )
    tensors = tensors or SafetensorsFile(file, private=True)
    parts = sort(method, secondary, tensors, config, file)
    kinds = {path: kind_of(method, config, stored) for path, stored in parts.params.items()}
    sites = {path: as_parameters(method, kinds[path], stored) for path, stored in parts.params.items()}
    adapters, shared = _adapters(
        method, PeftContent(cfg, parts.shared, sites, packed, config, kinds, base), folder
    )
    guests = [
        (guest, _secondary(guest, key, config[key], parts.secondary.get(key, {}), folder))
        for key, guest in secondary.items()
    ]
    return Content(method, adapters, dict(shared), guests, parts.full, unknown, base_change)


def _expand_patterns(
    method: Method, config: PeftConfig, tensors: SafetensorsFile | None, folder: Path
) -> tuple[PeftConfig, SafetensorsFile | None]:
    """Returns the config with names in place of regular expressions, and the tensors if they had to be
    opened.
    """
    expressions = [
        key for key, value in config.items() if key.endswith("_pattern") and patterns.is_expression(value)
    ]
    by_expression = isinstance(config.get("target_modules"), str) and bool(config.get(TARGET_PARAMETERS))
    if not expressions and not by_expression:
        return config, tensors
    tensors = tensors or SafetensorsFile(folder / TENSORS, private=True)
    paths = sorted(sort(method, {}, tensors, config, folder / TENSORS, strict=False).params)
    if by_expression:
        config = {
            **config,
            "target_modules": patterns.match_paths(
                config["target_modules"], paths, f"{folder / CONFIG}#/target_modules"
            ),
        }
    names = names_in(config)
    paths += (
        [name for owner in dict.fromkeys(map(unwrap, paths)) for name in named_at(owner, names, config)]
        if names
        else []
    )
    return {
        **config,
        **{key: patterns.expand(config[key], paths, f"{folder / CONFIG}#/{key}") for key in expressions},
    }, tensors


def _adapters(method: Method, content: PeftContent, folder: Path) -> tuple[Adapters, Tensors]:
    """Returns the sites of the folder's own method and their shared tensors."""
    assert method.peft is not None
    file = folder / TENSORS
    kinds = content.kinds
    if method.peft.from_peft_file is not None:
        try:
            content = method.peft.from_peft_file(content)
        except (TypeError, ValueError, IndexError) as error:
            raise FormatError(
                f"the tensors do not fit the PEFT configuration: {error}", where=file
            ) from error
        kinds = {**kinds, **content.kinds}
    adapters = {}
    # Sorted, so that equal adapters give equal packs whatever the order in the file; parameters of one module
    # keep their order, in which PEFT nests its wrappers.
    for path, tensors in sorted(
        content.sites.items(),
        key=lambda item: item[0].rpartition(".")[0] if is_bare(kinds.get(item[0], "")) else item[0],
    ):
        if f"{WRAPPED}." in f"{path}.":  # PEFT adds one wrapper per adapted parameter of a module
            raise Unsupported(
                "an adapter of several bare parameters of one module has no form in which PEFT and this "
                "package agree",
                where=f"{file}, {path}",
                remedy="merge this adapter with the library that made it",
            )
        with _translate_errors(f"{folder / CONFIG}, {path}"):
            cfg = content.config.at(path)
        kind = kinds.get(path) or kind_of(method, content.written, {})
        site, params = site_of(method, cfg, path, kind, tensors, file)
        adapters[site] = (cfg, params)
    if not adapters:
        raise FormatError("the folder holds no adapter tensors", where=file)
    shapes = shapes_of(content.shared)
    storage = method.storage
    first, _ = next(iter(adapters.values()))
    wanted = {} if storage.shared is None else storage.shared.shapes(first, list(adapters))
    if shapes != wanted:
        raise FormatError(
            "the tensors that all sites share are not those of the method",
            where=file,
            expected=wanted,
            found=shapes,
        )
    return adapters, content.shared


@contextmanager
def _translate_errors(where: object) -> Iterator[None]:
    """Raises FormatError for a value of PEFT's configuration that the method refuses inside of the block."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        raise FormatError(f"the PEFT configuration is not usable: {error}", where=where) from error


def _secondary(
    method: Method, key: str, value: Any, tensors_by_path: Mapping[str, Arrays], folder: Path
) -> Adapters:
    """Returns the sites of a secondary method in another method's folder, from the config's ``value`` and
    path -> tensors.
    """
    form = secondary_form(method)
    names = {suffix: param for param, suffix in form.suffixes.items()}
    adapters = {}
    for path, tensors in sorted(tensors_by_path.items()):
        with _translate_errors(f"{folder / CONFIG}#/{key}"):
            cfg = form.from_config(value, path)
        params = {names[suffix]: tensor for suffix, tensor in tensors.items()}
        site, params = site_of(method, cfg, path, method.traits.layers[0], params, folder / TENSORS)
        adapters[site] = (cfg, params)
    if not adapters:
        raise FormatError(
            f"the folder holds no tensors of its {key}",
            where=folder / TENSORS,
            expected=f"... {', '.join(names)}",
        )
    return adapters


def disagreement(
    folder: Path, manifest: m.Manifest, config_bytes: bytes, tensors: SafetensorsFile
) -> str | None:
    """Returns how PEFT's reading of the folder differs from ``manifest``, or None. It uses bytes already
    read; ``folder`` is only for messages.
    """
    pack = Described(manifest)
    truth = pack.methods
    try:
        config = parse_config(config_bytes, folder / CONFIG)
        content = content_of(folder, config, truth, tensors, packed=True)
    except AdapterpackError as error:
        return f"PEFT's reading of it fails: {error}"
    parts = [(content.method, content.adapters), *content.secondary]
    # a module trained in full may be several layers for PEFT
    whole = [group.path for group in manifest.full_groups]
    # Compare what matters for the result at each module: its role, method, rank and scale.
    theirs: dict[str, tuple[Any, ...]] = {
        site.path: ("adapter", method.name, cfg.rank, cfg.scale)
        for method, adapters in parts
        for site, (cfg, _) in adapters.items()
    }
    theirs |= {
        next((path for path in whole if f"{module}.".startswith(f"{path}.")), module): ("full",)
        for module in content.full
    }
    ours: dict[str, tuple[Any, ...]] = {
        group.path: ("adapter", pack.method_of(group).name, group.rank, group.scale)
        for group in manifest.adapter_groups
    } | dict.fromkeys(whole, ("full",))
    for path in sorted(theirs.keys() ^ ours.keys()):
        return f"the modules differ at {path}"
    for path, meaning in ours.items():
        if theirs[path] != meaning:
            return f"{path} is {theirs[path]} there and {meaning} in the manifest"
    for method, adapters in parts:
        there = {site.path: cfg for site, (cfg, _) in adapters.items()}
        here = {group.path: pack.config_at(group) for group in manifest.groups if group.path in there}
        read, said = (
            _written_config(method, method is not content.method, {path: cfgs[path] for path in here})
            for cfgs in (there, here)
        )
        for key in sorted(read.keys() | said.keys()):
            if read.get(key) != said.get(key):
                return f"{key} is {read.get(key)!r:.100} there and {said.get(key)!r:.100} in the manifest"
    adapted = {group.path for group in manifest.adapter_groups if group.method is None}
    form = truth[0].peft
    if (
        form is not None
        and truth[0].kind not in _COUNTED
        and set(config.get("target_modules") or ()) != adapted - {form.site}
    ):
        return "target_modules are not the adapted modules"
    return None


def _written_config(method: Method, as_secondary: bool, sites: SiteConfigs) -> dict[str, Any]:
    """Returns what PEFT's config contains for a method with these configs by path, as JSON values;
    ``as_secondary``: inside the folder of another method.
    """
    if method.peft is None or not sites:
        return {}
    secondary = secondary_form(method) if as_secondary else None
    config = (
        method.peft.to_config(sites) or {}
        if secondary is None
        else {secondary.key: secondary.to_config(sites)}
    )
    written: dict[str, Any] = strict_json.plain(config)
    return written
