"""How a method is stored in a folder that PEFT loads: its names, its config, and the kinds of layers that
PEFT has it for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict

import numpy as np

from ...errors import Unsupported
from .site import Params, Site

WITH_BASE = "make a pack of it first: adapterpack convert SRC --to pack --base BASE -o OUT"
"""What to do where the base says what a file of PEFT's leaves open."""


class OfBase(NamedTuple):
    """What a base says of what a folder of PEFT's leaves open: ``shape`` of a parameter by its path, None for
    one that is not there, and ``modules``, the paths of its modules in the order in which its model has them.
    """

    shape: Callable[[str], tuple[int, ...] | None]
    modules: Callable[[], Sequence[str]]


class PeftContent(NamedTuple):
    """What a folder that PEFT wrote holds: the config (for all sites), the tensors that all sites share, and
    site path -> its tensors.

    ``packed``: it is the folder of a pack, whose manifest says what these files leave open; they are taken as
    they are. ``written`` is PEFT's own configuration; ``kinds`` are the kinds of sites that are not what
    their tensors look like. ``base`` is what the base says of itself, where it is at hand.
    """

    config: Any
    shared: Mapping[str, np.ndarray]
    sites: Mapping[str, Mapping[str, np.ndarray]]
    packed: bool = False
    written: Mapping[str, Any] = {}
    kinds: Mapping[str, str] = {}
    base: OfBase | None = None


Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"
"""What PEFT writes behind a site's path -> the shape of that tensor."""


class PeftLayer(NamedTuple):
    """How PEFT stores a method's parameters at a kind of site other than a linear layer.

    ``suffixes`` are as in :class:`PeftForm`, and the method's own if it is None. What says that there are
    such sites: the keys of PEFT's config in ``config``, or ``shapes_say_so`` by the shapes of a site's
    tensors, which gives None where they leave it open. Where neither says it, the site is read as that of a
    linear layer, and the model or the base tells its kind (:mod:`~adapterpack.pack.layer_kinds`).

    ``stored`` turns a site's parameters into PEFT's shapes under its config, and ``loaded`` turns them back.
    Without ``loaded`` all axes after the first become one. ``ambiguous_because`` gives the reason why PEFT's
    tensors have no certain meaning at a site of that kind, by the config and the site with its kernel, which
    is empty where it is not known; an empty text where they have.
    """

    suffixes: Mapping[str, str] | None = None
    config: Mapping[str, Any] = {}
    shapes_say_so: Callable[[Shapes], bool | None] | None = None
    stored: Callable[[Any, Site, Params], dict[str, np.ndarray]] | None = None
    loaded: Callable[[Any, Params], dict[str, np.ndarray]] | None = None
    ambiguous_because: Callable[[Any, Site], str] | None = None

    @property
    def is_silent(self) -> bool:
        """Whether nothing in a file says that a site is of this kind."""
        return self.suffixes is None and not self.config and self.shapes_say_so is None

    def allows(self, shapes: Shapes) -> bool | None:
        """Whether the shapes of a site's tensors say that it is of this kind; None where they leave it
        open.
        """
        return None if self.shapes_say_so is None else self.shapes_say_so(shapes)

    def is_of(self, config: Mapping[str, Any], shapes: Shapes) -> bool:
        """Whether PEFT's config, or the shapes of a site's tensors, say that it is of this kind."""
        if self.is_silent or any(config.get(key) != value for key, value in self.config.items()):
            return False
        return self.shapes_say_so is None or self.shapes_say_so(shapes) is True


def has_axes(*counts: int) -> Callable[[Shapes], bool]:
    """Tells by their shapes whether all matrices among a site's tensors have one of these numbers of axes.

    Example:
        >>> has_axes(3, 4)({"A": (2, 3, 1), "scale": (2,)}), has_axes(3, 4)({"A": (2, 3)})
        (True, False)
    """
    return lambda shapes: {len(shape) for shape in shapes.values() if len(shape) > 1} <= set(counts)


def as_matrices(params: Params) -> dict[str, np.ndarray]:
    """A site's tensors with all axes after the first as one."""
    return {
        name: value.reshape(len(value), math.prod(value.shape[1:])) if value.ndim > 2 else value
        for name, value in params.items()
    }


def refuse_site(path: str, params: Params, reason: str) -> Unsupported:
    """The error for the tensors of a site in a form of PEFT's that is not read."""
    return Unsupported(
        reason,
        where=path,
        found=", ".join(f"{name} of shape {value.shape}" for name, value in params.items()),
        remedy="merge this adapter with the library that made it, or keep it there",
    )


def as_kernels(down: str, up: str) -> Callable[[Any, Site, Params], dict[str, np.ndarray]]:
    """The ``stored`` of two factors that PEFT has as convolutions: ``down`` with the layer's kernel, ``up``
    with one of size 1.

    Example:
        >>> factors = {"A": np.zeros((2, 12)), "B": np.zeros((5, 2))}
        >>> site = Site("layer", 12, 5, "conv", kernel=(2, 2))
        >>> {name: value.shape for name, value in as_kernels("A", "B")(None, site, factors).items()}
        {'A': (2, 3, 2, 2), 'B': (5, 2, 1, 1)}
    """

    def stored(cfg: Any, site: Site, params: Params) -> dict[str, np.ndarray]:
        A, B = params[down], params[up]
        return {down: A.reshape(len(A), -1, *site.kernel), up: B.reshape(*B.shape, *(1,) * len(site.kernel))}

    return stored


TRANSPOSED: Mapping[str, PeftLayer] = {"transposed": PeftLayer(config={"fan_in_fan_out": True})}
"""For a method that PEFT also has for transposed linear layers, with the same tensors."""


class PeftSecondary(NamedTuple):
    """How PEFT stores a method's tensors in a folder of another method, as trainable tokens in a folder of
    LoRA.

    ``hosts`` are the types of PEFT whose config has the ``key`` for it; ``suffixes`` are as in
    :class:`PeftForm`. ``to_config`` makes the key's value of site path -> config, ``from_config`` the config
    at a path of the key's value.
    """

    hosts: tuple[str, ...]
    key: str
    suffixes: Mapping[str, str]
    to_config: Callable[[Mapping[str, Any]], Any]
    from_config: Callable[[Any, str], Any]


class Estimate(NamedTuple):
    """The first ``rank`` singular vectors alone, estimated from random numbers of ``seed`` in ``niter``
    rounds of power iteration.
    """

    rank: int
    niter: int
    seed: int


class Factorise(Protocol):
    """A float32 weight [out, in] -> U, S and V^T, in the signs of another library; all of them, or an
    estimate of the first.
    """

    def __call__(self, weight: np.ndarray, estimate: Estimate | None = None, /) -> tuple[np.ndarray, ...]:
        """U ``[out, r]``, S ``[r]`` and V^T ``[r, in]``."""


Completed: TypeAlias = (
    "Callable[[Any, Mapping[str, np.ndarray], Site, Factorise], tuple[Any, dict[str, np.ndarray]]]"
)
"""A site's config and own parameters, the site with its weight, how PEFT decomposes it -> the config and
parameters that replace them.
"""


class BaseChange(NamedTuple):
    """What PEFT did to the base when it made an adapter: ``completed`` takes it off the tensors again, and
    ``note`` says what is left.

    ``why``: the sentence of the error where the base is not at hand.
    """

    completed: Completed
    why: str
    note: str


def widths_of(down: str | None, up: str | None) -> Callable[[Params], tuple[int | None, int | None]]:
    """The ``features`` of two factors ``[r, in]`` and ``[out, r]``, of which one may say nothing."""
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
"""What other libraries make of some methods: see :attr:`PeftForm.refused_by`."""


class PeftOverrides(TypedDict, total=False):
    """What PEFT stores in a way of its own for few methods: stage -> function or data."""

    features: Callable[[str, Params], tuple[int | None, int | None]]
    """Kind of site, its parameters -> its input and output width, where the kind makes a difference."""
    indexed: tuple[str, ...]
    """Lists of tensors, by what PEFT writes between the module path and their numbers: a site may have
    ``NAME.0``, ``NAME.1``, ..., which are parameters of these names.
    """
    shared_modules: Mapping[str, str]
    """As :attr:`PeftForm.shared` for whole modules: with ``{"v": "x"}`` the shared parameter ``v_a/b`` is
    ``x.a.b``.
    """
    secondary: PeftSecondary
    """How PEFT stores the method in another method's folder."""
    from_peft_with_base: Completed
    """The reverse of :attr:`PeftForm.to_peft_with_base`, where PEFT's tensors mean nothing without their
    base: such a pack's folder is never a folder of PEFT's.
    """
    reorder_for_peft: Callable[[Any, Params, str | None], tuple[dict[str, Any], dict[str, np.ndarray]] | None]
    """What PEFT's config has to say besides, and the parameters in the order in which PEFT means the same by
    them, of a site's config and parameters and PEFT's name of the task, where ``equivalent`` says no; None
    where PEFT has no such adapter. ``convert`` writes it, and a pack's folder never is.
    """
    bare_parameters: Callable[[Site, Params], dict[str, np.ndarray]]
    """The parameters of a site that is a bare parameter of the base, or a stack of them, as PEFT stores them
    where its config names such parameters (``target_parameters``). A pack's folder never does: its tensors
    stay as they are, and ``convert`` makes PEFT's.
    """


class PeftForm(NamedTuple):
    """How a method is stored in a folder that PEFT loads."""

    peft_type: str
    suffixes: Mapping[str, str]
    """parameter name -> what follows the module path in PEFT's tensor name."""
    to_config: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    """site path -> config at that site, to PEFT's own config keys; None where PEFT could not load the
    tensors.
    """
    from_config: Callable[[Mapping[str, Any]], Any]
    """PEFT's config keys to ours."""
    features: Callable[[Params], tuple[int | None, int | None]] = lambda params: (None, None)
    """parameters of a site -> its input and output width, None where they do not say it."""
    shared: Mapping[str, str] = {}
    """shared parameter name -> PEFT's whole tensor name. With ``{"v": "x"}``, ``v_0`` is ``x.0``, and
    ``v_query`` ``x.query``.
    """
    matches: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a PEFT config is of this method; None: every one of its ``peft_type``. Needed where one type
    stands for several methods.
    """
    aliases: Mapping[str, str] = {}
    """what older versions of PEFT wrote after the module path -> parameter name."""
    site: str | None = None
    """The one site of a method that acts on the model as a whole: PEFT names its tensors without a path, and
    modules without ``model.``.
    """
    equivalent: Callable[[Mapping[str, Any], str | None], bool] = lambda sites, task: True
    """Whether PEFT computes the same, by the configs of the sites and PEFT's name of the task; if not, its
    config is not written.
    """
    peft_supports: Callable[[Any, Site], bool] = lambda cfg, site: True
    """Whether PEFT itself loads and merges this at such a site; it refuses some of what its files can
    hold.
    """
    from_peft_file: Callable[[PeftContent], PeftContent] | None = None
    """A PEFT file's content -> the pack's: for a method whose tensors say more than the config, or that
    stores less than PEFT.
    """
    known_keys: frozenset[str] = frozenset()
    """Keys of PEFT's config that the reading accounts for, though none is written."""
    ignored_suffixes: tuple[str, ...] = ()
    """What follows the module path in the names of tensors that PEFT stores for training alone, and that are
    left out.
    """
    to_peft_with_base: Completed | None = None
    """Computes, from the base's weights, the config and tensors that PEFT's file needs and the pack does not
    store.
    """
    undo_base_change: Callable[[Mapping[str, Any]], BaseChange | None] = lambda config: None
    """What PEFT did to the base by an initialisation that PEFT's config names; None where it left the base as
    it was. It raises Unsupported where the base alone does not say it.
    """
    layers: Mapping[str, PeftLayer] = {}
    """Kind of site -> how PEFT has it there, for kinds other than the method's first. At a kind that is not
    here PEFT has no such form.
    """
    refused_by: Mapping[str, str] = LORA_ALONE
    """Library (``transformers``, whose ``load_adapter`` has PEFT put the layers in and does without PEFT's
    own model, or ``vLLM``) -> why it does not make of the folder what it means.
    """
    overrides: PeftOverrides = {}  # noqa: RUF012 - never changed

    def features_of(self, kind: str, params: Params) -> tuple[int | None, int | None]:
        """What the parameters of a site of that kind say of its input and output width."""
        override = self.overrides.get("features")
        return self.features(params) if override is None else override(kind, params)

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a PEFT config is of this method."""
        return config.get("peft_type") == self.peft_type if self.matches is None else self.matches(config)
