"""Sorts the tensors of a file that PEFT wrote: by site, shared by all sites, or belonging to modules trained
in full.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import (
    CONVOLUTIONS,
    Arrays,
    Method,
    PeftConfig,
    Shapes,
    Site,
    Tensors,
    check_shapes,
    shapes_of,
)
from ..adapter_methods.core.peft_form import leave_open
from ..adapter_methods.core.shapes import features
from ..errors import FormatError, Unsupported
from ..io import SafetensorsFile
from .names import (
    form_of,
    from_peft_shapes,
    is_indexed,
    kernel_of,
    prefix_of,
    secondary_form,
    shared_param,
    stack_of,
    to_peft_shapes,
)

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""PEFT's task -> the modules that PEFT saves in full for it, even if the configuration does not name them (up
to PEFT 0.8).
"""


def _saved_module(path: str, config: PeftConfig) -> str | None:
    """Returns the module saved in full that ``path`` is or is inside of, or None: the outermost one whose
    name ends in a saved name.

    A classifier of several layers is one such module: PEFT names the classifier, and its tensors are those of
    the layers inside.
    """
    parts = path.split(".")
    named = config.get("modules_to_save")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    saved = tuple(map(str, named)) if isinstance(named, list | tuple) else ()
    saved += _HEADS.get(str(config.get("task_type")), ())
    return next((module for module in around if module.endswith(saved)), None)


_OF_DEFAULT = re.compile(r"[.]default(?=[.](weight|bias)$|$)")
"""The name that PEFT gives a model's only adapter, if a file kept it; PEFT expects names without it."""


_COPIES = ("modules_to_save", "original_module")
_EMBEDDINGS = (
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "embed_out",
    "proj_out",
)
"""Modules that PEFT saves in full with an adapter after tokens were added (``save_embedding_layers``), by
their names in transformers.
"""

TINKER_EXPERTS = re.compile(r"(.+\.experts)\.(w[123])\.(lora_[AB]\.weight)")
"""The name of a tensor in which Tinker's service holds one matrix of all experts of a layer."""
_RENAMED = (("model.unembed_tokens.", "lm_head."),)
"""What modules are called by Tinker's service, and in transformers."""


class Sorted(NamedTuple):
    """The tensors of a file: ``params`` maps a site's path to its tensors by PEFT's suffix, ``shared`` maps
    shared parameters to tensors, ``full`` maps paths to modules trained in full, and ``secondary`` maps keys
    of the config to the sites of other methods.
    """

    params: dict[str, Arrays]
    shared: Arrays
    full: dict[str, Arrays]
    secondary: dict[str, dict[str, Arrays]]


def _require_split(tensors: SafetensorsFile, where: Path) -> None:
    """Checks that no tensor holds a matrix of all experts of a layer, as Tinker's service writes them.

    Raises:
        Unsupported: one does.
    """
    for name, info in tensors.tensors.items():
        if len(info.shape) == 3 and TINKER_EXPERTS.fullmatch(name):
            raise Unsupported(
                "the experts of a layer are in one tensor, as Tinker's service holds them",
                where=where,
                found=name,
                remedy="split them: adapterpack convert SRC --to pack -o OUT",
            )


def sort(
    method: Method,
    secondary: Mapping[str, Method],
    tensors: SafetensorsFile,
    config: PeftConfig,
    where: Path,
    strict: bool = True,
) -> Sorted:
    """Sorts the tensors of a file of ``method``, with ``secondary`` methods by their key in the config.

    Raises:
        FormatError: a tensor has a name that PEFT does not write.
        Unsupported: a tensor belongs to nothing known, unless ``strict`` is false.
    """
    assert method.peft is not None
    _require_split(tensors, where)
    result = Sorted({}, {}, {}, {})
    unknown: dict[str, Arrays] = {}
    forms = [method.peft.suffixes, *(form.suffixes or {} for form in method.peft.layers.values())]
    endings: dict[str, str | None] = dict.fromkeys(
        [*(end for suffixes in forms for end in suffixes.values()), *method.peft.aliases]
    )
    for key, guest in secondary.items():
        endings |= dict.fromkeys(secondary_form(guest).suffixes.values(), key)
    prefix = prefix_of(method)
    bare = set(method.peft.suffixes.values()) if method.peft.site else set()
    for name in tensors.tensors:
        if (common := shared_param(method, name)) is not None:
            result.shared[common] = tensors.read(name)
            continue
        if name in bare:
            result.params.setdefault(str(method.peft.site), {})[name] = tensors.read(name)
            continue
        if not name.startswith(prefix):
            raise FormatError(
                "a tensor name that PEFT does not write", where=where, found=name, expected=f"{prefix}..."
            )
        rest = name.removeprefix(prefix)
        for theirs, ours in _RENAMED:
            rest = ours + rest.removeprefix(theirs) if rest.startswith(theirs) else rest
        rest, ending = (rest, None) if bare else _split_name(method, rest, endings)
        if ending is None and any(rest.endswith(f".{end}") for end in method.peft.ignored_suffixes):
            continue
        if ending is not None:
            owner = endings.get(ending)
            sites = result.params if owner is None else result.secondary.setdefault(owner, {})
            here = sites.setdefault(rest.removesuffix(f".{ending}"), {})
            if ending in here:
                raise FormatError("two tensors are the same one of an adapter", where=where, found=name)
            here[ending] = tensors.read(name)
            continue
        path, _, param = rest.rpartition(".")
        if (
            path.endswith(".base_layer")
            and param == "weight"
            and any(f"{prefix}{path.removesuffix('.base_layer')}.{end}" in tensors.tensors for end in endings)
        ):
            continue  # PEFT saves the base's weight along with an adapted embedding
        owner_of, _, copy = path.rpartition(".")
        if copy in _COPIES and f"{prefix}{owner_of}.{param}" in tensors.tensors:
            continue  # a second copy from PEFT's wrapper around a module saved in full
        saved = _saved_module(path, config)
        module = saved or path
        (result.full if saved else unknown).setdefault(module, {})[rest.removeprefix(f"{module}.")] = (
            tensors.read(name)
        )
    _take_known(unknown, result, config)
    if unknown and strict:
        raise _unaccounted_error(unknown, prefix, endings, config, where)
    return result


def _take_known(unknown: dict[str, Arrays], result: Sorted, config: PeftConfig) -> None:
    """Moves modules from ``unknown`` to ``result`` that PEFT saves by special rules: embeddings, biases (of
    sites, too), and modules that are tied to one that was trained in full, which have equal tensors.
    """
    for path, params in list(unknown.items()):
        if params.keys() == {"bias"} and path in result.params and config.get("bias") not in (None, "none"):
            # up to PEFT 0.6 the parameters of an adapted layer kept their names
            result.params[path]["base_layer.bias"] = unknown.pop(path)["bias"]
            continue
        if params.keys() == {"weight"}:
            known = path.rpartition(".")[2] in _EMBEDDINGS and params["weight"].ndim == 2
        else:
            adapted = any(f"{site}.".startswith(f"{path}.") for site in result.params)
            known = params.keys() == {"bias"} and config.get("bias") == "all" and not adapted
        if known:
            result.full[path] = unknown.pop(path)
    if config.get("ensure_weight_tying") is not True:
        return
    for path, params in list(unknown.items()):
        if any(
            params.keys() == whole.keys() and all(np.array_equal(params[key], whole[key]) for key in whole)
            for whole in result.full.values()
        ):
            result.full[path] = unknown.pop(path)


def _ending(method: Method, rest: str, endings: Iterable[str]) -> str | None:
    """Returns what PEFT writes after a site's path in this name: one of the ``endings``, or the name of an
    indexed tensor; None if it is neither.
    """
    last = ".".join(rest.split(".")[-2:])
    return next(
        (ending for ending in endings if rest.endswith(f".{ending}")),
        last if is_indexed(method, last) else None,
    )


def _split_name(method: Method, rest: str, endings: Iterable[str]) -> tuple[str, str | None]:
    """Returns a tensor name without the adapter's name, if it has one, and the result of :func:`_ending` for
    it.
    """
    ending = _ending(method, rest, endings)
    plain = _OF_DEFAULT.sub("", rest) if ending is None else rest
    found = _ending(method, plain, endings) if plain != rest else ending
    return (rest, ending) if found is None else (plain, found)


def _unaccounted_error(
    unknown: Mapping[str, Tensors], prefix: str, endings: Iterable[str], config: PeftConfig, where: Path
) -> Unsupported:
    """Returns the error for tensors, by module, that belong to no site and to no module trained in full."""
    path, params = next(iter(unknown.items()))
    if "lora_magnitude_vector" in params and not config.get("use_dora"):
        return Unsupported(
            "the tensors are those of DoRA, and the configuration does not say so: PEFT would take them "
            "for a LoRA, as it does with what torchtune writes",
            where=where,
            found=f"{prefix}{path}.lora_magnitude_vector",
            expected="use_dora: true",
            remedy="set use_dora if PEFT wrote the tensors; torchtune leaves the lengths of "
            "queries and keys in an order of its own: merge such an adapter there",
        )
    return Unsupported(
        "a tensor that the PEFT configuration does not account for",
        where=where,
        found=f"{prefix}{path}.{min(params)}",
        expected=f"{', '.join(endings)}, or a module of modules_to_save",
        remedy="name its module in modules_to_save, or remove the tensor",
    )


def kind_of(method: Method, config: PeftConfig, tensors: Tensors) -> str:
    """Returns the kind of a site, from the names and axes of its tensors and from the config.

    PEFT keeps one ``fan_in_fan_out`` for all sites, that of the last one, and never sets it for HiRA; the
    base says more reliably how a linear layer is stored (:func:`~adapterpack.pack.layer_kinds.kinds_on`).
    """
    assert method.peft is not None
    shapes = shapes_of(tensors)
    for kind, form in method.peft.layers.items():
        if form.is_of(config, shapes) and tensors.keys() <= set(
            (form.suffixes or method.peft.suffixes).values()
        ):
            return kind
    return method.traits.layers[0]


def as_parameters(method: Method, kind: str, tensors: Tensors) -> Arrays:
    """Renames tensors from PEFT's suffixes to parameters; a tensor that is not a parameter of that kind keeps
    its suffix.
    """
    form = form_of(method, kind)
    assert form is not None
    assert method.peft is not None
    names = {**method.peft.aliases, **{suffix: param for param, suffix in (form.suffixes or {}).items()}}
    return {names.get(suffix, suffix): value for suffix, value in tensors.items()}


def site_of(
    method: Method, cfg: Any, path: str, kind: str, whole: Tensors, where: object
) -> tuple[Site, Arrays]:
    """Returns the site that parameters in PEFT's form belong to, and the parameters as matrices."""
    assert method.peft is not None
    shapes = shapes_of(whole)
    params = from_peft_shapes(method, kind, lambda: cfg, whole)
    here = f"{where}, {path}"
    _require_kind(method, cfg, kind, shapes, here)
    width, height = (size or 0 for size in features(method.peft, kind, params, here))
    kernel = kernel_of(kind, shapes.values())
    stack = stack_of(kind, shapes)
    site = Site(path, width, height, kind, "bias" in params, kernel, stack)
    try:
        declared = method.shapes(cfg, site)  # the set of parameters may depend on the widths
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise FormatError(
            "the tensors of a site do not pair up, or have too few axes", where=here, found=shapes
        ) from error
    if params.keys() != declared.keys():
        raise FormatError(
            "the tensors of a site do not pair up",
            where=here,
            expected=sorted(declared),
            found=sorted(params),
        )
    check_shapes(method, cfg, site, params, where)
    try:
        right = shapes_of(to_peft_shapes(method, cfg, site, params))
    except ValueError:  # the kernel does not divide the input's width
        right = None
    if shapes != right:
        raise FormatError("a tensor has the wrong shape", where=here, expected=right, found=shapes)
    return site, params


def _require_kind(method: Method, cfg: Any, kind: str, shapes: Shapes, where: str) -> None:
    """Checks that tensors have no more axes than the method gives them at such a layer: PEFT also stores some
    methods for convolutions in forms that are not read here, and LN tuning for any module.
    """
    assert method.peft is not None
    of_convolutions = (form for kind, form in method.peft.layers.items() if kind in CONVOLUTIONS)
    if any(form.shapes_say_so is not leave_open for form in of_convolutions):
        return  # convolutions are supported, so the tensors are malformed and a later check names them
    # the set of parameters may depend on the widths, but not their numbers of axes
    sizes = [Site("", 1, 1, kind), Site("", 5040, 720720, kind)]
    axes = {name: len(shape) for site in sizes for name, shape in method.shapes(cfg, site).items()}
    for name, shape in shapes.items():
        if len(shape) > axes.get(name, len(shape)):
            raise Unsupported(
                f"PEFT wrote this adapter for a kind of layer at which its form of {method.name} is not read",
                where=where,
                expected=f"a layer of kind '{kind}'",
                found=f"{name} of shape {shape}",
                remedy="merge this adapter with the library that made it",
            )
