"""The base classes of all method configs, and the checks of values that they share."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from msgspec import Meta

from ...errors import nearest

if TYPE_CHECKING:
    from .token_positions import Acts

T = TypeVar("T")
WIDEST = 1 << 24
"""The largest width of a layer and the largest vocabulary; the manifest's schema has the same limit."""
LARGEST_WHOLE = 1 << 53
"""The largest integer that every JSON reader represents exactly: the limit of seeds and of step counts."""
MOST_SITES = 50_000
"""The most sites that a pack can have."""
PositiveInt = Annotated[int, Meta(ge=1, le=WIDEST)]
"""The type of a rank, a width or a count that cannot be zero. Configs come from untrusted files, so
:class:`SiteConfig` checks the bounds of every field whose type has some.
"""
NonNegativeInt = Annotated[int, Meta(ge=0, le=WIDEST)]
"""The type of a count that may be zero."""
Seed = Annotated[int, Meta(ge=0, le=LARGEST_WHOLE)]
"""The type of a seed of random numbers."""
FiniteFloat = Annotated[float, Meta()]
"""The type of a finite number."""
PositiveFloat = Annotated[float, Meta(gt=0)]
"""The type of a finite number above zero."""

FOR_TRAINING = {"packed": False}
"""Metadata of a field that only training reads; a pack does not store it."""

OPTIONAL = {"optional": True}
"""Metadata of a field that a pack omits if it has its default at every site."""


def pattern_of(name: str, **metadata: Any) -> Any:
    """Returns the dataclass field that maps names of sites to the values that the field ``name`` has there
    (:meth:`SiteConfig.at`).
    """
    return field(default_factory=dict, metadata={"of": name, **metadata})


_OF_PEFT = {
    **dict.fromkeys(("rank", "lora_rank", "lora_r"), "it is r here"),
    **dict.fromkeys(("init_lora_weights", "init_weights"), "it is init here"),
    "use_dora": "DoRA(...) is a method of its own here",
    "task_type": "leave it out: the class of the model says it",
    "fan_in_fan_out": "leave it out: the kind of each layer says it",
    "bias": "leave it out: biases are not trained; modules_to_save trains modules whole",
    "inference_mode": "leave it out: what attach loads is not trained",
    "layers_to_transform": "name these layers under targets; adapterpack train has layers_to_transform",
    "exclude_modules": "name the other layers under targets",
}
"""What stands here for options of PEFT's configs, beyond those whose names are similar."""


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | Set) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be names of modules, not {value!r:.80}")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """Where an adapter goes. A method's config is a frozen dataclass derived from this class; its fields are
    the method's only schema.

    Types say which values a field can have: ``bool``, a ``Literal``, or a number with bounds such as
    :data:`PositiveInt`; each of them may also allow None. Other types allow every value.

    Example:
        >>> SiteConfig(targets=("q_proj", "v_proj")).at("layers.0.q_proj").scale
        1.0
    """

    targets: str | tuple[str, ...] = field(default="all-linear", metadata=FOR_TRAINING)
    modules_to_save: tuple[str, ...] = field(default=(), metadata=FOR_TRAINING)
    dropout: float = 0.0

    spec_version: ClassVar[int] = 1
    """The version of this config's format in packs; a reader refuses a pack with a newer version than its
    own.
    """
    composition: ClassVar[Any] = None
    """For a method composed of several packs' methods, what its manifest says about them; None for others."""
    task_field: ClassVar[str] = ""
    """The name of the field that selects a task, for methods whose file holds several tasks."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Answers a setting of another name, such as PEFT's, with the name here."""
        known = [one.name for one in fields(cls)]
        for name in settings.keys() - set(known):
            answer = _OF_PEFT.get(name) or nearest(name, known)
            raise TypeError(f"{cls.__name__} has no setting {name!r}: {answer}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", _names("targets", self.targets))
        whole = [self.modules_to_save] if isinstance(self.modules_to_save, str) else self.modules_to_save
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", whole))
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout!r}")
        check_fields(self)

    @property
    def acts(self) -> Acts | None:
        """Which positions of a row the adapter acts on, the same at every site; None means all positions."""
        return None

    @property
    def redundant(self) -> bool:
        """Whether a pack stores more tensors than are trained because another library expects them."""
        return False

    @property
    def frozen(self) -> frozenset[str]:
        """The parameters that this config keeps from being trained, in addition to those that the method
        never trains.
        """
        return frozenset()

    def at(self, path: str) -> Self:
        """Returns the config for one site, with the patterns resolved. A pattern's name matches the literal
        path or its last components.

        The longest name that matches wins; a name that begins with ``^`` matches only the path after it.
        """
        here: dict[str, Any] = {}
        for pattern in fields(self):
            name = pattern.metadata.get("of")
            values = getattr(self, pattern.name)
            if name is not None and values:
                here |= {name: by_suffix(values, path, getattr(self, name)), pattern.name: {}}
        return replace(self, **here) if here else self

    @property
    def scale(self) -> float:
        """The number that multiplies the branch; the manifest records it for every site."""
        return 1.0

    @property
    def rank(self) -> int | None:
        """The rank of the branch, or None for a method without one."""
        return None


@dataclass(frozen=True)
class RankConfig(SiteConfig):
    """The config of a method with a rank.

    Example:
        >>> RankConfig(r=4).rank
        4
    """

    r: PositiveInt = 8

    @property
    def rank(self) -> int | None:
        """The inner dimension of the branch."""
        return self.r


@dataclass(frozen=True)
class RanksConfig(RankConfig):
    """The config of a method with a rank that may differ by site.

    Example:
        >>> RanksConfig(r=8, rank_pattern={"v_proj": 2, "1.v_proj": 4}).at("layers.1.v_proj").rank
        4
    """

    rank_pattern: Mapping[str, int] = pattern_of("r")


@dataclass(frozen=True)
class AlphaConfig(RanksConfig):
    """The config of a method whose branch is scaled by ``alpha / r``; ``alpha`` defaults to ``2 r`` and may
    differ by site.

    Example:
        >>> AlphaConfig(r=4, alpha=6).scale
        1.5
    """

    alpha: FiniteFloat | None = None
    alpha_pattern: Mapping[str, float] = pattern_of("alpha")

    def __post_init__(self) -> None:
        super().__post_init__()
        set_defaults(self, alpha=2.0 * self.r)

    @property
    def scale(self) -> float:
        """The number that multiplies the branch."""
        return float(self.alpha or 0.0) / self.r


@dataclass(frozen=True, kw_only=True)
class NoBranch(SiteConfig):
    """The config of a method without a branch parallel to the layer, which therefore has no use for
    dropout.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(
                "dropout acts on a branch parallel to the layer, and this method has none: not "
                f"{self.dropout!r}"
            )


def check_fields(settings: Any) -> None:
    """Checks the fields of a frozen dataclass whose types say which values they can have, such as
    :data:`PositiveInt`, and makes floats of numbers.

    Raises:
        ValueError: a field has another value.
    """
    config: Any = type(settings)
    for name, optional, check in _checks(config):
        value = getattr(settings, name)
        if not (optional and value is None) and (number := check(name, value)) is not None:
            # 16 and 16.0 are one config, and must be the same bytes in a manifest
            object.__setattr__(settings, name, number)


def from_json(config: type[T], values: Mapping[str, Any]) -> T:
    """Returns a config with these fields; lists, which is what JSON has, become tuples."""
    return config(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )


def set_defaults(config: SiteConfig, **usual: Any) -> None:
    """Sets those fields of a config that are None to their usual values."""
    for name, value in usual.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)


def types_of_fields(config: type[Any], with_bounds: bool = False) -> dict[str, Any]:
    """Returns field -> type, which is Any where the annotations of a plugin cannot be resolved at run
    time.
    """
    try:
        return get_type_hints(config, include_extras=with_bounds)
    except NameError:
        inherited = types_of_fields(config.__base__ or object, with_bounds)
        return {**inherited, **dict.fromkeys(config.__annotations__, Any)}


@cache
def _checks(config: type[Any]) -> tuple[tuple[str, bool, Callable[[str, Any], Any]], ...]:
    """Returns each field whose type says which values it can have: its name, whether None is one of them, and
    the check of the others.
    """
    checks = []
    for name, hint in types_of_fields(config, with_bounds=True).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        found = [check for kind in kinds if (check := _check_of(kind)) is not None]
        if len(found) == len(kinds) - (NoneType in kinds):
            checks += [(name, NoneType in kinds, check) for check in found]
    return tuple(checks)


def _check_of(kind: Any) -> Callable[[str, Any], Any] | None:
    """Returns the check of the values of a type, or None if it allows every value."""
    if kind is bool:
        return require_flag
    if get_origin(kind) is Literal:
        return partial(require_choice, choices=get_args(kind))
    if get_origin(kind) is not Annotated:
        return None
    number, bounds = get_args(kind)
    if number is int:
        return partial(require_whole, least=bounds.ge, most=bounds.le)
    return partial(require_number, bounds=bounds)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_whole(name: str, value: Any, least: int = 1, most: int = WIDEST) -> None:
    """Raises ValueError unless ``value`` is an integer between ``least`` and ``most``: configs come from
    untrusted files.
    """
    if type(value) is not int or not least <= value <= most:
        bounds = (
            f"at least {least}"
            if type(value) is int and value < least
            else f"at least {least} and at most {most}"
        )
        raise ValueError(f"{name} must be a whole number of {bounds}, not {value!r:.80}")


def require_flag(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is true or false."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, not {value!r}")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r:.80}")


_ORDER = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def require_number(name: str, value: Any, bounds: Meta | None = None) -> float:
    """Returns a number as a float.

    Raises:
        ValueError: the value is not a finite number within the ``bounds``.

    Example:
        >>> require_number("eps", 1, Meta(gt=0, lt=1))
        Traceback (most recent call last):
        ValueError: eps must be a finite number, above 0 and below 1, not 1
    """
    limits = [(*_ORDER[key], limit) for key in _ORDER if (limit := getattr(bounds, key, None)) is not None]
    if not is_number(value) or not all(holds(value, limit) for holds, _, limit in limits):
        within = " and ".join(f"{words} {limit}" for _, words, limit in limits)
        raise ValueError(f"{name} must be a finite number, {within and f'{within}, '}not {value!r}")
    return float(value)


def by_suffix(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Returns the value of a pattern for a site. A name matches the literal path or its last components; the
    longest match wins.

    A name that begins with ``^`` matches only the path after it.

    Example:
        >>> by_suffix({"v_proj": 2, "1.v_proj": 4}, "layers.1.v_proj", 8)
        4
    """
    return (
        next((pattern[name] for name in (f"^{path}", *ends(path)) if name in pattern), default)
        if pattern
        else default
    )


def ends(path: str) -> Iterator[str]:
    """Yields a path and all its suffixes of components, the longest first.

    Example:
        >>> list(ends("layers.1.v_proj"))
        ['layers.1.v_proj', '1.v_proj', 'v_proj']
    """
    start = 0
    while start >= 0:
        yield path[start:]
        dot = path.find(".", start)
        start = dot + 1 if dot >= 0 else -1
