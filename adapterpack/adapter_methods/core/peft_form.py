"""Describes how a method is stored in a folder that PEFT loads: tensor names, config keys, and the kinds of
layers for which PEFT supports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict

import numpy as np

from ...errors import Unsupported
from .site import Arrays, Params, Shape, Shapes, Site, Tensors

PeftConfig = Mapping[str, Any]
"""The contents of PEFT's ``adapter_config.json``, or some of its keys."""
SiteConfigs = Mapping[str, Any]
"""Site path -> the config of a method at that site."""
Widths = tuple[int | None, int | None]
"""The input and output width of a site; None for one that is not known."""

WITH_BASE = "make a pack of it first: adapterpack convert SRC --to pack --base BASE -o OUT"
"""The remedy in errors about a PEFT folder that cannot be read without its base model."""


class OfBase(NamedTuple):
    """What a base model says about things that a PEFT folder leaves open: ``shape`` maps the path of a
    parameter to its shape (None if there is none), and ``modules`` returns the paths of the modules in the
    model's order.
    """

    shape: Callable[[str], Shape | None]
    modules: Callable[[], Sequence[str]]


class PeftContent(NamedTuple):
    """The content of a folder that PEFT wrote: the config (for all sites), the shared tensors, and the
    tensors of each site by path.

    ``packed``: the folder belongs to a pack, whose manifest settles what PEFT's files leave open, so they are
    taken as they are. ``written`` is PEFT's config as written; ``kinds`` overrides the kind of a site where
    the shapes of its tensors would suggest another one. ``base`` describes the base model, if available.
    """

    config: Any
    shared: Tensors
    sites: Mapping[str, Tensors]
    packed: bool = False
    written: Mapping[str, Any] = {}
    kinds: Mapping[str, str] = {}
    base: OfBase | None = None

    def configure(self, **changes: Any) -> PeftContent:
        """Returns the content with another config, which differs by these fields."""
        return self._replace(config=replace(self.config, **changes))

    def change_sites(self, change: Callable[[Tensors], Tensors]) -> PeftContent:
        """Returns the content with the tensors that ``change`` makes of those of each site."""
        return self._replace(sites={path: change(params) for path, params in self.sites.items()})


def leave_open(shapes: Shapes) -> bool | None:
    """Returns None: the shapes of a site's tensors do not tell its kind."""
    return None


class PeftLayer(NamedTuple):
    """How PEFT stores a method's parameters at a kind of site other than a linear layer.

    ``suffixes`` works as in :class:`PeftForm`; None means the method's own. Two fields recognise such a site:
    ``config``, the keys that PEFT's config must have, and ``shapes_say_so``, which decides by the shapes of
    the site's tensors (what PEFT appends to the site's path -> shape) and returns None if they leave it open.
    If neither decides, the site is read as a linear layer, and the model or the base determines its kind
    (:mod:`~adapterpack.pack.layer_kinds`).

    ``stored`` converts a site's parameters to PEFT's shapes under its config, and ``loaded`` converts them
    back; without ``loaded`` all axes after the first are flattened into one. ``ambiguous_because`` takes the
    config and the site (its kernel is empty if unknown) and returns why PEFT's tensors have no certain
    meaning there, or an empty string.
    """

    suffixes: Mapping[str, str] | None = None
    config: Mapping[str, Any] = {}
    shapes_say_so: Callable[[Shapes], bool | None] = leave_open
    stored: Callable[[Any, Site, Params], Arrays] | None = None
    loaded: Callable[[Any, Params], Arrays] | None = None
    ambiguous_because: Callable[[Any, Site], str] = lambda cfg, site: ""

    @property
    def is_silent(self) -> bool:
        """Whether no file of PEFT's can tell that a site is of this kind."""
        return self.suffixes is None and not self.config and self.shapes_say_so is leave_open

    def is_of(self, config: PeftConfig, shapes: Shapes) -> bool:
        """Whether PEFT's config and the shapes of a site's tensors say that it is of this kind."""
        if self.is_silent or any(config.get(key) != value for key, value in self.config.items()):
            return False
        return self.shapes_say_so is leave_open or self.shapes_say_so(shapes) is True


def has_axes(*counts: int) -> Callable[[Shapes], bool]:
    """Returns a test of whether all tensors of a site with more than one axis have one of these numbers of
    axes.

    Example:
        >>> has_axes(3, 4)({"A": (2, 3, 1), "scale": (2,)}), has_axes(3, 4)({"A": (2, 3)})
        (True, False)
    """
    return lambda shapes: {len(shape) for shape in shapes.values() if len(shape) > 1} <= set(counts)


def as_matrices(params: Params) -> Arrays:
    """Returns a site's tensors with all axes after the first flattened into one."""
    return {
        name: value.reshape(len(value), math.prod(value.shape[1:])) if value.ndim > 2 else value
        for name, value in params.items()
    }


def refuse_site(path: str, params: Params, reason: str) -> Unsupported:
    """Returns the error for a site whose PEFT tensors have a form that this package cannot read."""
    return Unsupported(
        reason,
        where=path,
        found=", ".join(f"{name} of shape {value.shape}" for name, value in params.items()),
        remedy="merge this adapter with the library that made it, or keep it there",
    )


def as_kernels(down: str, up: str) -> Callable[[Any, Site, Params], Arrays]:
    """Returns a ``stored`` function for two factors that PEFT stores as convolutions: ``down`` with the
    layer's kernel, ``up`` with a kernel of size 1.

    Example:
        >>> factors = {"A": np.zeros((2, 12)), "B": np.zeros((5, 2))}
        >>> site = Site("layer", 12, 5, "conv", kernel=(2, 2))
        >>> {name: value.shape for name, value in as_kernels("A", "B")(None, site, factors).items()}
        {'A': (2, 3, 2, 2), 'B': (5, 2, 1, 1)}
    """

    def stored(cfg: Any, site: Site, params: Params) -> Arrays:
        A, B = params[down], params[up]
        return {down: A.reshape(len(A), -1, *site.kernel), up: B.reshape(*B.shape, *(1,) * len(site.kernel))}

    return stored


TRANSPOSED: Mapping[str, PeftLayer] = {"transposed": PeftLayer(config={"fan_in_fan_out": True})}
"""The ``layers`` of a method that PEFT also supports for transposed linear layers, with the same tensors."""


class PeftSecondary(NamedTuple):
    """How PEFT stores a method's tensors inside the folder of another method, such as trainable tokens inside
    a LoRA folder.

    ``hosts`` are the PEFT types whose config has the ``key`` for it; ``suffixes`` works as in
    :class:`PeftForm`. ``to_config`` turns site path -> config into the key's value; ``from_config`` turns the
    key's value into the config at a path.
    """

    hosts: tuple[str, ...]
    key: str
    suffixes: Mapping[str, str]
    to_config: Callable[[SiteConfigs], Any]
    from_config: Callable[[Any, str], Any]


class Estimate(NamedTuple):
    """A request for only the first ``rank`` singular vectors, estimated from random numbers of ``seed`` in
    ``niter`` rounds of power iteration.
    """

    rank: int
    niter: int
    seed: int


class Factorise(Protocol):
    """Decomposes a float32 weight ``[out, in]`` into U, S and V^T with the signs that another library's SVD
    gives: all of them, or an estimate of the first ones.
    """

    def __call__(self, weight: np.ndarray, estimate: Estimate | None = None, /) -> tuple[np.ndarray, ...]:
        """U ``[out, r]``, S ``[r]`` and V^T ``[r, in]``."""


Completed: TypeAlias = "Callable[[Any, Tensors, Site, Factorise], tuple[Any, Arrays]]"
"""(config of a site, its own parameters, the site with its weight, how PEFT decomposes a weight) -> the
config and the parameters that replace them.
"""


class BaseChange(NamedTuple):
    """How to undo a change that PEFT made to the base model when it created an adapter: ``completed`` removes
    it from the tensors, and ``note`` says what remains.

    ``why`` is the sentence of the error if the base is not available.
    """

    completed: Completed
    why: str
    note: str


def widths_of(down: str | None, up: str | None) -> Callable[[Params], Widths]:
    """Returns a ``features`` function for two factors ``[r, in]`` and ``[out, r]``; pass None for a factor
    that says nothing about a width.
    """
    return lambda params: (
        None if down is None else params[down].shape[1],
        None if up is None else params[up].shape[0],
    )


LORA_ALONE: Mapping[str, str] = {"vLLM": "it takes LoRA alone"}
SHARES_A_PART: Mapping[str, str] = {
    **LORA_ALONE,
    "transformers": "it refuses methods whose sites share a part",
}
NOT_IN_LAYERS: Mapping[str, str] = {
    **LORA_ALONE,
    "transformers": "it refuses prompts and what else is not in the layers",
}
"""Reasons why other libraries refuse some methods, for :attr:`PeftForm.refused_by`."""


class PeftOverrides(TypedDict, total=False):
    """What PEFT stores differently for a few methods: stage -> function or data."""

    features: Callable[[str, Params], Widths]
    """(kind of site, its parameters) -> its input and output width, for methods where they depend on the
    kind.
    """
    indexed: tuple[str, ...]
    """Lists of tensors, each given by what PEFT writes between the module path and a tensor's number: a site
    may have ``NAME.0``, ``NAME.1``, ..., which become parameters with these names.
    """
    secondary: PeftSecondary
    """How PEFT stores the method in another method's folder."""
    from_peft_with_base: Completed
    """The reverse of :attr:`PeftForm.to_peft_with_base`, for methods whose PEFT tensors mean nothing without
    their base. The folder of such a pack is never a PEFT folder.
    """
    reorder_for_peft: Callable[[Any, Params, str | None], tuple[PeftConfig, Arrays] | None]
    """(config of a site, its parameters, PEFT's task name) -> further keys of PEFT's config and the
    parameters in the order in which PEFT computes the same, where ``equivalent`` says that it does not; None
    if PEFT has no such adapter. Only ``convert`` writes this form; a pack's folder never contains it.
    """
    bare_parameters: Callable[[Site, Params], Arrays]
    """(site, parameters) -> the parameters as PEFT stores them for a site that is a bare parameter of the
    base, or a stack of them (``target_parameters`` in PEFT's config). Only ``convert`` writes this form; a
    pack's tensors stay as they are.
    """


class PeftForm(NamedTuple):
    """How a method is stored in a folder that PEFT loads."""

    peft_type: str
    suffixes: Mapping[str, str]
    """Parameter name -> what follows the module path in PEFT's tensor name."""
    to_config: Callable[[SiteConfigs], PeftConfig | None]
    """(site path -> config at that site) -> PEFT's config keys; None if PEFT could not load the tensors."""
    from_config: Callable[[PeftConfig], Any]
    """PEFT's config keys -> this package's config."""
    features: Callable[[Params], Widths] = lambda params: (None, None)
    """Parameters of a site -> its input and output width; None for a width that they do not determine."""
    shared: Mapping[str, str] = {}
    """Shared parameter name -> PEFT's full tensor name. With ``{"v": "x"}``, ``v_0`` is ``x.0``, and
    ``v_query/weight`` is ``x.query.weight``.
    """
    matches: Callable[[PeftConfig], bool] | None = None
    """Whether a PEFT config describes this method; None means every config of its ``peft_type``. Needed where
    several methods share one type.
    """
    aliases: Mapping[str, str] = {}
    """What older versions of PEFT wrote after the module path -> parameter name."""
    site: str | None = None
    """The only site of a method that acts on the model as a unit: PEFT names its tensors without a path, and
    its modules without ``model.``.
    """
    equivalent: Callable[[SiteConfigs, str | None], bool] = lambda sites, task: True
    """(configs of the sites, PEFT's task name) -> whether PEFT computes the same. If not, no PEFT config is
    written.
    """
    peft_supports: Callable[[Any, Site], bool] = lambda cfg, site: True
    """Whether PEFT itself loads and merges an adapter with this config at such a site; it refuses some
    adapters that its files can hold.
    """
    from_peft_file: Callable[[PeftContent], PeftContent] | None = None
    """The content of a PEFT folder -> the content of the pack, for a method whose tensors say more than the
    config, or whose packs store less than PEFT does.
    """
    known_keys: frozenset[str] = frozenset()
    """Keys of PEFT's config that reading takes into account although writing never produces them."""
    ignored_suffixes: tuple[str, ...] = ()
    """What follows the module path in the names of tensors that PEFT stores only for training; reading skips
    them.
    """
    to_peft_with_base: Completed | None = None
    """Computes from the base's weights the config and tensors that PEFT's file needs and the pack does not
    store.
    """
    undo_base_change: Callable[[PeftConfig], BaseChange | None] = lambda config: None
    """PEFT's config -> how to undo what the initialisation it names did to the base; None if PEFT left the
    base as it was. Raises Unsupported if the base alone does not determine the change.
    """
    layers: Mapping[str, PeftLayer] = {}
    """Kind of site -> how PEFT stores the method there, for kinds other than the method's first. PEFT does
    not support the method at kinds that are missing here.
    """
    refused_by: Mapping[str, str] = LORA_ALONE
    """Library -> why it cannot use the folder as intended. The libraries are ``transformers``, whose
    ``load_adapter`` inserts PEFT's layers without PEFT's own model class, and ``vLLM``.
    """
    overrides: PeftOverrides = {}  # noqa: RUF012 - never changed

    def features_of(self, kind: str, params: Params) -> Widths:
        """Returns the input and output width that the parameters of a site of that kind determine, None for a
        width they do not.
        """
        override = self.overrides.get("features")
        return self.features(params) if override is None else override(kind, params)

    def reads(self, config: PeftConfig) -> bool:
        """Whether a PEFT config describes this method."""
        return config.get("peft_type") == self.peft_type if self.matches is None else self.matches(config)
