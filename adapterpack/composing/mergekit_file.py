"""Reads mergekit's configurations: which models are merged by which rule, and the weight and parameters of
each at every tensor.

A table, ``mergekit.toml``, says what becomes of methods and keys. A value is the first that a model's, a
slice's and the file's own settings have; a list is interpolated over the layers, and of a list of ``filter``
and ``value`` the first counts whose text occurs in the name of the tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .. import resources
from ..errors import ConfigError, Unsupported, excerpt, require_among
from ..manifest import FILE_NAME
from ..pack import Pack
from ..peft import layout
from .arguments import BySite
from .rules.rule import RULES
from .sites import adapters_by_path

_LAYER = re.compile(r"(.*?)\.([0-9]+)\.")
_FOLD = "fold each with adapterpack merge, and name the merged checkpoints instead"


Settings = Mapping[str, Any]


class MergeMethod(msgspec.Struct, frozen=True):
    """A method of mergekit, as ``mergekit.toml`` describes it."""

    rule: str
    on: str
    weight: str = "weight"
    counted: bool = False
    positive: bool = False
    most: int = 0
    each: dict[str, float] = {}
    shared: dict[str, bool | float] = {}
    params: dict[str, Any] = {}
    thinning: dict[str, bool] = {}
    when: list[dict[str, Any]] = []
    only: dict[str, bool] = {}
    note: str = ""


class MergekitTable(msgspec.Struct, frozen=True):
    """The contents of ``mergekit.toml``."""

    methods: dict[str, MergeMethod]
    refused: dict[str, str]
    names: dict[str, str]
    keys: dict[str, str]
    left_out: dict[str, list[str]]


@cache
def table() -> MergekitTable:
    """Returns what becomes of mergekit's methods and keys."""
    return resources.table("composing/mergekit.toml", MergekitTable)


class Model(NamedTuple):
    """A model of the file: a checkpoint, ``BASE+ADAPTER``, or an adapter alone, and its own settings."""

    name: str
    settings: Mapping[str, Any] = {}

    @property
    def base(self) -> str:
        """What stands before ``+``, or the whole name."""
        return self.name.partition("+")[0]

    @property
    def adapter(self) -> str:
        """What stands after ``+``."""
        return self.name.partition("+")[2]

    @property
    def is_adapter(self) -> bool:
        """Whether it names an adapter, alone or on a base."""
        marks = (Path(self.name, mark) for mark in (FILE_NAME, layout.CONFIG))
        return bool(self.adapter) or any(mark.is_file() for mark in marks)


class TensorValues(NamedTuple):
    """The weights of the models that are merged at a tensor, and the parameters that each has for itself."""

    weights: list[float]
    own: list[dict[str, float]]


class MergekitFile(NamedTuple):
    """A configuration that can be computed: ``models`` are those that are merged, ``base`` what their changes
    are of (None: they are merged themselves), ``donor`` the model of config and tokenizer.

    ``settings`` are those of slice and file, in the order in which they count.
    """

    where: Path
    method: MergeMethod
    models: tuple[Model, ...]
    base: Model | None
    donor: Model
    settings: tuple[Settings, ...]
    rule: str
    params: dict[str, Any]
    shared: dict[str, Any]
    dtype: str | None
    layers: int | None
    notes: tuple[str, ...]

    def values(self, name: str, size: int, layers: Mapping[str, int]) -> TensorValues:
        """Returns the values at a tensor of ``size`` entries; ``layers`` maps what stands before the number
        of a layer, such as ``model.layers``, to how many there are.

        Raises:
            ConfigError: a value is missing, or no number.
            Unsupported: the rule would compute something else with these values.
        """
        place: float | None = 0.0
        if found := _LAYER.match(name):
            alike = set(layers.values())
            count = layers.get(found[1], alike.pop() if len(alike) == 1 else 0)
            place = None if not count else int(found[2]) / (count - 1) if count > 1 else 1.0

        def value(key: str, model: Model, default: float | None = None) -> float:
            return _number(self._setting(key, name, place, model, default), f"{self.where}, {key}")

        method = self.method
        if method.weight == "t":
            t = value("t", self.models[0])
            weights = [t if model.name != self.donor.name else 1 - t for model in self.models]
        else:
            weights = [value(method.weight, model) if method.weight else 1.0 for model in self.models]
        names = table().names
        own = [
            {names[key]: value(key, model, default) for key, default in method.each.items()}
            for model in self.models
        ]
        weights = self._scale(weights, own)
        for index, values in enumerate(own):
            density = values.get("density", 1.0)
            if density <= 0:
                weights[index], values["density"] = 0.0, 1.0
            if "gamma" in values:
                values["gamma"] = max(0.0, min(values["gamma"], 1 - density))
            if method.counted:
                least = {"density": 1}
                own[index] = {
                    key: max(least.get(key, 0), int(min(1.0, share) * size)) / size
                    for key, share in values.items()
                }
        return TensorValues(weights, own)

    def _scale(self, weights: list[float], own: Sequence[Mapping[str, float]]) -> list[float]:
        """Returns the weights times what the rule has no parameter for: lambda, and the normalization."""
        thin = any(values.get("density", 1.0) < 1 for values in own)
        for key, needed in self.method.thinning.items():
            if thin and self.shared[key] != needed:
                raise self._differs(f"{key}: {self.shared[key]}", f"{key}: {str(needed).lower()}")
        parameters = RULES[self.rule].parameters
        total = sum(weights)
        if (self.params.get("normalize", False) or self.method.positive) and min(weights) < 0:
            raise self._differs(f"weights {weights}", "weights of 0 or more, which its rule divides by")
        factor = 1.0 if "lam" in parameters else float(self.shared.get("lambda", 1.0))
        if "normalize" in self.shared and "normalize" not in parameters and self.shared["normalize"]:
            factor /= total if abs(total) >= 1e-8 else 1.0
        return [factor * weight for weight in weights]

    def _setting(self, key: str, name: str, place: float | None, model: Model, default: float | None) -> Any:
        for settings in (model.settings, *self.settings):
            if key in settings and (value := _evaluate(settings[key], name, place)) is not None:
                return value
        if default is None:
            raise ConfigError(
                "the file lacks a value that its method needs",
                where=f"{self.where}, {model.name}",
                expected=key,
                found=f"none for {name}",
                remedy=f"give parameters: {{{key}: ...}}",
            )
        return default

    def _differs(self, found: str, expected: str) -> Unsupported:
        return Unsupported(
            "the result would not be mergekit's",
            where=self.where,
            found=found,
            expected=expected,
            remedy=f"adapterpack compose --rule {self.rule} says what it does with its own options",
        )

    @property
    def of_adapters(self) -> bool:
        """Whether the models are adapters, not checkpoints.

        Raises:
            Unsupported: they are both.
        """
        bases = {model.base for model in (*self.models, self.donor) if model.adapter} | {self.donor.name}
        others = [model for model in self.models if model.name not in bases] or self.models
        kinds = {model.is_adapter for model in others}
        if len(kinds) > 1:
            raise Unsupported(
                "the file merges adapters and full models",
                where=self.where,
                found=", ".join(model.name for model in self.models),
                remedy=f"make all adapters with adapterpack extract; or {_FOLD}",
            )
        return kinds.pop()

    @property
    def packs(self) -> list[str]:
        """The adapters.

        Raises:
            Unsupported: merged as full models they would not be the base with merged changes.
        """
        bases = {model.base for model in self.models if model.adapter}
        if self.base is not None and not self.base.is_adapter:
            bases.add(self.base.name)
        if self.method.on != "changes" and self.base is None and self.rule != "linear":
            raise Unsupported(
                "this method interpolates between whole weights, and adapters hold only changes",
                where=self.where,
                found=f"{', '.join(model.name for model in self.models)} under rule {self.rule}",
                expected="a base_model, or a method that merges changes",
                remedy=_FOLD,
            )
        if len(bases) > 1 or (self.base is not None and self.base.is_adapter):
            raise Unsupported(
                "these adapters are not of one base",
                where=self.where,
                found=", ".join(sorted(bases | ({self.base.name} if self.base is not None else set()))),
                remedy=_FOLD,
            )
        return [model.adapter or model.name for model in self.models if model.name not in bases]

    @property
    def base_name(self) -> str | None:
        """The base of the adapters, if the file names one."""
        named = [
            *([] if self.base is None else [self.base.name]),
            *(m.base for m in self.models if m.adapter),
        ]
        return named[0] if named else None

    def require_whole(self, layers: Mapping[str, int]) -> None:
        """Checks that a slice covers all ``layers`` of the base.

        Raises:
            Unsupported: it has not.
        """
        if self.layers is not None and layers and self.layers not in layers.values():
            every = ", ".join(f"{name} has {count}" for name, count in layers.items())
            raise _not_whole(f"{self.where}, layer_range", f"[0, {self.layers}]", f"all layers: {every}")

    def options(self, packs: Sequence[Pack], layers: Mapping[str, int]) -> dict[str, Any]:
        """Returns the options of compose for these packs, the adapters of the file in its order."""
        self.require_whole(layers)
        chosen = [i for i, model in enumerate(self.models) if model.is_adapter]
        at_sites = {}
        for path, there in adapters_by_path(packs).items():
            one, *_ = there.values()
            size = (one.site.in_features or 0) * (one.site.out_features or 0)
            at_sites[path] = self.values(one.weight or f"{path}.weight", size, layers)
        if self.base is None and any(abs(sum(at.weights) - 1) > 1e-6 for at in at_sites.values()):
            raise self._differs("weights whose sum is not 1, which scales the base itself", "normalize: true")
        by_site: BySite = {
            path: {
                "weight": [at.weights[i] for i in chosen],
                **{key: [at.own[i][key] for i in chosen] for key in at.own[chosen[0]]},
            }
            for path, at in at_sites.items()
        }
        weights = [
            math.fsum(values["weight"][i] for values in by_site.values()) / max(1, len(by_site))
            for i in range(len(chosen))
        ]
        return {"rule": self.rule, "weights": weights, "params": self.params, "by_site": by_site}


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """Returns how many layers there are under each prefix, by the numbers in the names of all tensors.

    Example:
        >>> layers_of(["model.layers.0.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight", "lm_head"])
        {'model.layers': 12}
    """
    layers: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            layers[found[1]] = max(layers.get(found[1], 0), int(found[2]) + 1)
    return layers


def read(path: Path) -> MergekitFile:
    """Reads a configuration of mergekit.

    Raises:
        ConfigError: it is none, or lacks a value.
        UnknownName, Unsupported: its method has no rule, or its slices are no whole models; the message says
            why.
    """
    from ..io import plain_yaml  # noqa: PLC0415 - keeps the help fast

    file = plain_yaml.read(path)
    if not isinstance(file, dict) or not isinstance(file.get("merge_method"), str):
        raise ConfigError(
            "this is not a configuration of mergekit",
            where=path,
            expected="a mapping with merge_method and models",
            remedy="name packs, or a mergekit file",
        )
    name = file["merge_method"]
    known = table()
    if name in known.refused:
        raise Unsupported(
            "no rule does what this method does", where=path, found=f"{name}: {known.refused[name]}"
        )
    require_among("unknown merge_method", name, known.methods, where=path, found=name)
    method = known.methods[name]
    entries, local, layers = _entries(file, path)
    settings = (*local, _mapping(file.get("parameters"), path))
    base = Model(str(file["base_model"])) if file.get("base_model") else None
    models, relative = _acting_models(method, entries, base, path)
    donor = base or models[0]
    shared = {key: _one_value(key, default, settings, path) for key, default in method.shared.items()}
    rule = method.rule
    params = dict(method.params)
    for case in method.when:
        if all(shared[key] == value for key, value in case["if"].items()):
            rule, params = case["rule"], case["params"]
    for key, value in method.only.items():
        if shared[key] != value:
            raise Unsupported(
                "no rule does what this method does with this value",
                where=path,
                found=f"{key}: {shared[key]}",
            )
    params |= {
        known.names[key]: value
        for key, value in shared.items()
        if known.names.get(key) in RULES[rule].parameters
    }
    if "scope" in RULES[rule].parameters:
        params["scope"] = "tensor"
    return MergekitFile(
        path,
        method,
        models,
        base if relative else None,
        donor,
        settings,
        rule,
        params,
        shared,
        file.get("out_dtype") or file.get("dtype"),
        layers,
        tuple(_notes(file, method, models, settings)),
    )


def _entries(file: Settings, path: Path) -> tuple[list[Model], list[Settings], int | None]:
    """Returns the models, the settings of a slice or module around them, and how many layers a slice has."""
    local = []
    inner = file
    if "modules" in file:
        modules = _mapping(file["modules"], path)
        if list(modules) != ["default"]:
            raise Unsupported(
                "the file merges modules of the model separately",
                where=f"{path}, modules",
                found=", ".join(map(str, modules)),
                expected="one module, default",
                remedy="merge each part by itself",
            )
        inner = _mapping(modules["default"], path)
        local.append(_mapping(inner.get("parameters"), path))
    listed = inner.get("models")
    layers = None
    if "slices" in inner:
        slices = inner["slices"]
        if not isinstance(slices, list) or len(slices) != 1:
            count = len(slices) if isinstance(slices, list) else 0
            raise _not_whole(f"{path}, slices", f"{count} slices", "one slice with all layers")
        inner = _mapping(slices[0], path)
        local.insert(0, _mapping(inner.get("parameters"), path))
        listed = inner.get("sources")
        ranges = {
            tuple(source.get("layer_range") or ()) for source in listed or () if isinstance(source, dict)
        }
        (first, *others) = ranges or {()}
        if others or len(first) != 2 or first[0] != 0 or not isinstance(first[1], int):
            found = ", ".join(str(list(each)) for each in sorted(ranges))
            raise _not_whole(f"{path}, layer_range", found, "[0, number of layers] for every model")
        layers = first[1]
    if not isinstance(listed, list) or not listed:
        raise ConfigError(
            "the file names no models", where=path, expected="models, or one slice with sources"
        )
    return [_model(entry, path) for entry in listed], local, layers


def _not_whole(where: str, found: str, expected: str) -> Unsupported:
    return Unsupported(
        "layers cannot be stacked, copied or left out: that is not a change of a base",
        where=where,
        found=found,
        expected=expected,
    )


def _model(entry: Any, path: Path) -> Model:
    name = entry.get("model") if isinstance(entry, dict) else None
    if not isinstance(name, str) or name.count("+") > 1:
        raise ConfigError(
            "a model must be named by a string",
            where=path,
            expected="PATH, or BASE+ADAPTER",
            found=excerpt(name),
        )
    return Model(name, _mapping(entry.get("parameters"), path))


def _acting_models(
    method: MergeMethod, entries: list[Model], base: Model | None, path: Path
) -> tuple[tuple[Model, ...], bool]:
    """Returns the models that are merged, and whether their changes of the base are."""
    others = [model for model in entries if base is None or model.name != base.name]
    relative = method.on == "changes" or (method.on == "either" and base is not None)
    if base is None and (method.on == "changes" or method.weight == "t"):
        raise ConfigError("the method needs a base_model", where=path, remedy="name it: base_model: PATH")
    if relative:
        models = others
    else:
        models = entries if base is None or len(others) < len(entries) else [*entries, base]
    if not models or (method.most and len(models) != method.most):
        raise ConfigError(
            "the method takes another number of models",
            where=path,
            expected=method.most or "one or more besides the base",
            found=len(models),
        )
    return tuple(models), relative


def _notes(
    file: Settings, method: MergeMethod, models: Sequence[Model], settings: Sequence[Settings]
) -> Iterator[str]:
    """Yields what a user should know: keys that are left out, and where the rule differs."""
    known = table()
    given = {str(key) for each in (*settings, *(model.settings for model in models)) for key in each}
    takes = {method.weight, *method.each, *method.shared}
    left_out = {key for keys in known.left_out.values() for key in keys}
    for why, keys in known.left_out.items():
        if left := sorted((given | file.keys()) & set(keys)):
            yield f"left out {', '.join(left)}: {why}"
    if unused := sorted(given - takes - left_out):
        yield f"left out {', '.join(unused)}: the method {file['merge_method']} takes no such parameter"
    if unknown := sorted(set(map(str, file)) - {*known.keys, *left_out}):
        yield f"left out {', '.join(unknown)}: unknown to mergekit"
    if method.note:
        yield method.note


def _evaluate(setting: Any, name: str, place: float | None) -> Any:
    """Returns the value of a setting at a tensor, ``place`` of the way through the layers; None for
    none.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if all(isinstance(each, dict) for each in setting):
        for each in setting:
            if each.keys() - {"filter", "value"}:
                raise ConfigError(
                    "a value for some tensors must be given by filter and value",
                    where=name,
                    expected="filter and value",
                    found=", ".join(map(str, each)),
                )
            if each.get("filter") in (None, "*") or str(each["filter"]) in name:
                return _evaluate(each.get("value"), name, place)
        return None
    if place is None:
        raise ConfigError(
            "a list of values goes over the layers, and the base's number of layers is not known",
            where=name,
            found=str(setting)[:80],
            remedy="name the folder of the base: base_model: FOLDER",
        )
    at = place * (len(setting) - 1)
    low = setting[int(at)]
    share = at - int(at)
    if not share:
        return low
    return (1 - share) * _number(low, "a list") + share * _number(setting[int(at) + 1], "a list")


def _one_value(key: str, default: bool | float, settings: Sequence[Settings], path: Path) -> Any:
    value = next((each[key] for each in settings if each.get(key) is not None), default)
    if isinstance(value, (list, dict)):
        raise Unsupported(
            "the rule takes only one value of this for all tensors",
            where=f"{path}, {key}",
            found=str(value)[:80],
            expected="one value",
        )
    number = _number(value, f"{path}, {key}")
    return bool(number) if isinstance(default, bool) else number


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            "this is not a number", where=where, expected="a finite number", found=excerpt(value)
        )
    return number


def _mapping(value: Any, path: Path) -> Settings:
    if value is not None and not isinstance(value, dict):
        raise ConfigError("expected a mapping of keys to values", where=path, found=excerpt(value))
    return value or {}
