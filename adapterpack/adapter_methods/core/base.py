"""Defines an adapter method as a value (:class:`Method`): pure functions, a frozen config class and declared
traits.

Every method that changes weights reduces its trained tensors to one **normal form**::

    y' = post(output_scale * (base(pre(x)) + up(down(x)) + routes(x))) + shift

so that training, merging, composing and exporting handle seven fields instead of N methods. The mathematics
is written once, against the Python array API: the same few lines run on torch tensors during training and on
numpy arrays everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypedDict

import numpy as np

from ...errors import Unsupported
from .config import SiteConfig
from .layouts import WEIGHTS
from .operators import Array, Operator, columns, rows_of
from .peft_form import PeftForm
from .routers import Route
from .site import Arrays, Params, Random, Shape, Shapes, Site

Forward = Callable[[Array], Array]


class NormalForm(NamedTuple):
    """The normal form of one adapter at one site.

    A field that is ``None`` has no effect: ``pre``, ``up`` and ``post`` are then the identity, ``down`` adds
    nothing, ``output_scale`` is one and ``shift`` is zero. Shapes: ``pre`` ``[in, in]``, ``down`` ``[r,
    in]``, ``up`` ``[out, r]``, ``output_scale`` ``[out]`` or ``[1]``, ``shift`` ``[out]``, ``post`` ``[out,
    out]``. A change that is not factored is a ``down`` of shape ``[out, in]`` without an ``up``.
    """

    pre: Operator | None = None
    down: Operator | None = None
    up: Operator | None = None
    output_scale: Array | None = None
    shift: Array | None = None
    post: Operator | None = None
    routes: tuple[Route, ...] = ()

    @property
    def is_branch(self) -> bool:
        """Whether the form is only a pair of factors: a low-rank branch parallel to the layer, as in LoRA."""
        return (
            self.is_parallel
            and self.down is not None
            and self.up is not None
            and self.output_scale is None
            and self.shift is None
        )

    @property
    def is_parallel(self) -> bool:
        """Whether the form has no ``pre``, no ``post`` and no routes, only a branch parallel to the layer, an
        output scale and a shift.
        """
        return self.pre is None and self.post is None and len(self.routes) == 0


@dataclass(frozen=True)
class Traits:
    """What a method can do, declared as data. Generic code reads these traits and never compares a method's
    name.
    """

    additive: bool = False
    """The change is added to the weight, so changes of several adapters can be summed, and a weight on the
    adapter multiplies the change.
    """
    identity_at_init: bool = True
    """A freshly initialised adapter leaves the model's outputs exactly as they are."""
    row_separable: bool = True
    """A block of output rows can be folded without reading the other rows."""
    low_rank: bool = False
    """The change is ``up @ down`` with a small rank, so composing the factors is exact."""
    reads_weight: bool = False
    """``init`` and ``normal_form`` need the base weight."""
    quantizable: bool = True
    """The tensors of an adapter may be stored as int8."""
    batchable: bool = True
    """Rows of one batch may carry different adapters of this method."""
    layers: tuple[str, ...] = WEIGHTS
    """The kinds of site that the method supports (keys of :data:`~.layouts.LAYOUTS`)."""
    min_features: tuple[int, int] = (1, 1)
    """The smallest number of outputs and of inputs of a layer that the method can change: a rotation, for
    instance, needs at least two.
    """
    frozen: tuple[str, ...] = ()
    """Names of parameters that are stored but not trained; parameters whose dtype is not floating are never
    trained. ``v`` also covers every name that begins with ``v_``.
    """
    exclusive: bool = False
    """At most one adapter of this method can be active at a time."""

    @property
    def independent(self) -> bool:
        """Whether the change is added to the weight and does not depend on it."""
        return self.additive and not self.reads_weight

    @property
    def tied(self) -> bool:
        """Whether the method, when it changes an embedding, also changes the modules tied to it (an output
        head or another embedding that shares its table). A method that replaces values in the table must
        replace them there, too.
        """
        return self.exclusive and "table" in self.layers


class Shared(NamedTuple):
    """Parameters that all sites of one adapter share and that a pack stores once.

    ``normal_form`` receives them among the site's parameters, and ``init`` finds their initial values in
    ``Site.shared``. With ``reads_weights`` their own ``init`` reads the weights of all sites.
    """

    shapes: Callable[[Any, Sequence[Site]], Shapes]
    init: Callable[[Any, Sequence[Site], Random], Arrays]
    reads_weights: bool = False


class Progress(NamedTuple):
    """The progress of a training run: ``step`` of ``total`` optimizer steps are done; the first step is
    number 1.
    """

    step: int
    total: int


class TrainedSite(NamedTuple):
    """One site after an optimizer step: its config, its trained parameters and their gradients."""

    config: Any
    params: Params
    gradients: Params


class Training(NamedTuple):
    """What a method adds to an ordinary training run."""

    needs: Callable[[Any], frozenset[str]] | None = None
    """config -> the calibration data that ``init`` reads at a site: a subset of ``weight``, ``moment`` and
    ``gradient`` (:class:`~.site.Calibration`).
    """
    allocate: Callable[[Any, Sequence[Site]], Any] | None = None
    """(config, sites) -> the config, adapted to the calibration data of all sites: for instance, with a rank
    budget distributed among them.
    """
    rates: Callable[[Any], Mapping[str, float]] | None = None
    """config -> parameter name -> factor on its learning rate."""


class Storage(NamedTuple):
    """What a pack stores for a method besides the parameters of each site, and what the reader computes from
    the stored values.
    """

    shared: Shared | None = None
    constants: Callable[[Any, Site], Arrays] | None = None
    """(config, site) -> tensors that are neither trained nor stored, because they follow from the config, the
    site and, with ``reads_weight``, its weight: random bases drawn from a seed, for instance.
    """
    expanded_size: Callable[[Any, Site], int] | None = None
    """(config, site) -> how many numbers ``constants`` and ``normal_form`` compute at a site, within a small
    factor; needed only where that exceeds the stored parameters and the site's weight. The config comes from
    an untrusted pack: this bounds how much memory it can make its reader allocate (pack/expansion_limit.py).
    """
    resolve: Callable[[Sequence[Any], Sequence[Site]], Sequence[Any]] | None = None
    """(configs, sites) -> the configs as a pack stores them, completed with values that depend on all sites
    together (their largest width, a site's number). Resolving twice gives the same result. A value that
    depends on an unknown width stays open.
    """
    to_stored: Callable[[Any, Params, Site], tuple[Any, Arrays]] | None = None
    """(config, parameters, site) -> the config and the parameters of a trained site as a pack stores them,
    where that differs from the form in training. A stacked site passes all its matrices in one call, along
    the first axis.
    """
    require: Callable[[Any, Params, Site], None] | None = None
    """Raises ValueError if the values of a site's parameters, which come from an untrusted pack, are
    impossible at that site: an index outside of its weight, for instance. A width of 0 is unknown.
    """


class Overrides(TypedDict, total=False):
    """The stages that a method implements itself instead of through its normal form: stage -> function. Few
    methods need one.
    """

    forward: Callable[[Any, Params, Site, Forward, Array, Forward], Array]
    """A forward pass, where evaluating the normal form would be slower or would keep more memory."""
    fold: Callable[[Any, Params, Site, Array, Array | None, slice], tuple[Array, Array | None]]
    """A fold: (config, parameters, site, weight, bias, rows) -> the adapted weight and bias of that block of
    rows.
    """
    refuse: Callable[[str], str]
    """stage -> why the method cannot do it, empty if it can. The stages are ``fold`` (no weight can hold the
    change), ``graph`` (no ONNX graph can) and ``cache`` (the model must see all tokens of a row in one pass,
    so a KV cache is impossible).
    """
    active_together: Callable[[Sequence[Any]], bool]
    """configs -> whether adapters with these configs may be active at once although the method is
    ``exclusive``, because they change disjoint parts of the model.
    """
    first_pass: Callable[[Params, Array, int, int], dict[str, Array]]
    """Computes further parameters of a layer from a first pass of the model without the adapter: (shared
    parameters, last hidden states, layer number, number of layers) -> parameters.
    """
    training_form: Callable[[Any, Params, Site], NormalForm]
    """The normal form during training of a linear layer, for methods that draw random numbers in it."""
    penalty: Callable[[Any, Params, int], Array]
    """(config, parameters, number of sites) -> the term that one site adds to the loss. A penalty that is an
    average over the sites divides by their number.
    """
    after_step: Callable[
        [Progress, Any, Mapping[str, TrainedSite]], tuple[Any, Mapping[str, Mapping[str, Array]]]
    ]
    """Runs after each optimizer step, over all sites of an adapter at once: (progress, state, path -> site)
    -> (state, path -> new values of some parameters). The state is the method's own and None at first.
    """
    derive: Callable[[Any, Params, Site], Arrays]
    """(config, parameters, site) -> further constants, as in :class:`Storage`, that also depend on parameters
    that are stored but not trained.
    """
    append_rows: Callable[[Any, Params, int], np.ndarray | None]
    """(config, parameters, rows of the table) -> the rows that the adapter appends to an embedding table of
    that length (tokens added before training), or None.
    """
    linear_combination: Callable[[Sequence[tuple[Params, float]]], Arrays]
    """[(parameters, weight), ...] of several adapters with the same config at a site -> the parameters
    (numpy) of one adapter whose change is exactly the weighted sum of theirs.
    """


class Method(NamedTuple):
    """An adapter method: plain functions and data, with one group each for training, storage and PEFT's
    files, and the stages it overrides.

    ``examples`` are the configs that the test matrix runs it with. The parameters passed to ``normal_form``,
    ``forward`` and ``fold`` are complete: the site's own, the shared ones and the constants.
    """

    name: str
    summary: str
    paper: str
    config: type[Any]
    traits: Traits
    shapes: Callable[[Any, Site], Shapes]
    init: Callable[[Any, Site, Random], Arrays]
    normal_form: Callable[[Any, Params, Site], Any]
    """Returns the normal form for the method's ``kind``: a :class:`NormalForm`, a block's form or a prompt's
    form.
    """
    examples: tuple[Any, ...]
    formula: str = ""
    """What the method computes, in one line; ``W x + b`` is the layer."""
    kind: str = "weight"
    training: Training = Training()
    storage: Storage = Storage()
    peft: PeftForm | None = None
    overrides: Overrides = {}  # noqa: RUF012 - never changed

    @property
    def is_positional(self) -> bool:
        """Whether the config can limit the adapter to some positions of a row (``acts``); no weight can hold
        such a change.
        """
        return self.config.acts is not SiteConfig.acts

    def reason_against(self, stage: str) -> str:
        """Returns why the method cannot do a stage (``refuse`` of :class:`Overrides`), or an empty string if
        it can.
        """
        refuse = self.overrides.get("refuse")
        return "" if refuse is None else refuse(stage)


def describe_traits(method: Method) -> dict[str, Any]:
    """Returns all traits of a method by name, including the derived ones (``tied``, ``positional``)."""
    declared = {field.name: getattr(method.traits, field.name) for field in fields(method.traits)}
    return {**declared, "tied": method.traits.tied, "positional": method.is_positional}


def zeros(
    shapes: Callable[[Any, Site], Shapes], **others: float | Callable[[Random, Shape], np.ndarray]
) -> Callable[[Any, Site, Random], Arrays]:
    """Returns an ``init`` that starts every parameter at zero, except the ``others``: name -> the number that
    fills it, or a function that draws it, such as :func:`kaiming`.

    Example:
        >>> init = zeros(lambda cfg, site: {"A": (2, site.in_features), "scale": (3,)}, scale=1)
        >>> init(None, Site("layer", 1, 3), np.random.default_rng(0))["scale"]
        array([1., 1., 1.], dtype=float32)
    """

    def start(name: str, shape: Shape, rng: Random) -> np.ndarray:
        value = others.get(name, 0.0)
        return value(rng, shape) if callable(value) else np.full(shape, value, np.float32)

    return lambda cfg, site, rng: {name: start(name, shape, rng) for name, shape in shapes(cfg, site).items()}


def kaiming(rng: Random, shape: Shape) -> np.ndarray:
    """Draws Kaiming uniform with a = sqrt(5), as the reference implementations do: the bound is ``1 /
    sqrt(columns)``.
    """
    bound = 1 / math.sqrt(max(1, math.prod(shape[1:])))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def normal(rng: Random, shape: Shape, deviation: float = 0.02) -> np.ndarray:
    """Draws normal numbers in float32."""
    return rng.normal(0, deviation, shape).astype(np.float32)


def constant(value: Array) -> Array:
    """Returns the same array detached from the autograd graph; numpy arrays are returned as they are."""
    return value.detach() if hasattr(value, "detach") else value


def evaluate(form: NormalForm, base: Forward, x: Array, drop: Forward | None = None) -> Array:
    """Computes ``post(output_scale * (base(pre(x)) + up(down(x)) + routes(x))) + shift`` for ``x`` of shape
    ``[..., in]``.

    ``drop`` is the dropout that training applies to the input of the branch.
    """
    y = base(x if form.pre is None else form.pre.apply(x))
    if form.down is not None:
        inner = form.down.apply(x if drop is None else drop(x))
        y = y + (inner if form.up is None else form.up.apply(inner))
    for route in form.routes:
        y = y + route.apply(x, x if drop is None else drop(x))
    if form.output_scale is not None:
        y = y * form.output_scale
    if form.post is not None:
        # `output_scale` comes before `post`, as in the formula.
        y = form.post.apply(y)
    return y if form.shift is None else y + form.shift


def look_up(form: NormalForm, base: Forward, ids: Array, keep: Array | None) -> Array:
    """Does what :func:`evaluate` does for an embedding, whose inputs are token ids (one-hot vectors): ``ids``
    of shape ``[...]`` give ``[..., out]``.

    ``keep`` (``[...]``) multiplies the branch. It stands for dropout, which keeps or drops a one-hot vector
    as a unit.

    Raises:
        Unsupported: the form changes or reads the input, which an embedding does not have as a vector.
    """
    if form.pre is not None or len(form.routes) > 0:
        raise Unsupported(
            "a method that looks at a layer's input cannot adapt an embedding, whose inputs are ids"
        )
    y = base(ids)
    if form.down is not None:
        inner = columns(form.down, ids)
        inner = inner if keep is None else inner * keep[..., None]
        y = y + (inner if form.up is None else form.up.apply(inner))
    if form.output_scale is not None:
        y = y * form.output_scale
    return y if form.shift is None else y + form.shift


def fold_form(form: NormalForm, weight: Array, bias: Array | None, rows: slice) -> tuple[Array, Array | None]:
    """Folds a normal form into a block of rows: ``W' = post output_scale (W pre + up down)``, ``b' = post
    output_scale b + shift``.

    ``weight`` is the block ``[len(rows), in]`` and ``bias`` its part ``[len(rows)]`` or None; neither is
    modified. If the form has a shift and the layer no bias, the result has a bias. A ``post`` mixes rows, so
    then the block must be the entire weight.

    Raises:
        Unsupported: the form has routes, whose weights depend on the input.
    """
    if len(form.routes) > 0:
        raise Unsupported(
            "branches behind a gate cannot be folded into a weight", remedy="keep the adapter unmerged"
        )
    folded = weight if form.pre is None else form.pre.after(weight)
    if form.down is not None:
        folded = folded + (
            rows_of(form.down, rows) if form.up is None else form.down.after(rows_of(form.up, rows))
        )
    if form.output_scale is not None:
        scale = _block(form.output_scale, rows)
        folded = folded * scale[:, None]
        bias = None if bias is None else bias * scale
    if form.post is not None:
        # `apply` acts on the last axis, and `post` mixes outputs, which are the rows of the weight.
        folded = form.post.apply(folded.T).T
        bias = None if bias is None else form.post.apply(bias)
    if form.shift is not None:
        shift = _block(form.shift, rows)
        bias = shift if bias is None else bias + shift
    return folded, bias


def _block(vector: Array, rows: slice) -> Array:
    return vector if vector.shape[0] == 1 else vector[rows]


def frozen(method: Method, cfg: Any, names: Iterable[str]) -> frozenset[str]:
    """Returns the names of the parameters that are stored but not trained: those that the method freezes, and
    those that this config freezes.

    Example:
        >>> from adapterpack import LoRA
        >>> from adapterpack.adapter_methods import get
        >>> sorted(frozen(get("lora"), LoRA(init="mica"), ["lora_A", "lora_B", "start_A", "start_B"]))
        ['lora_B', 'start_A', 'start_B']
    """
    kept: frozenset[str] = cfg.frozen.union(method.traits.frozen)
    stems = tuple(f"{name}_" for name in method.traits.frozen)
    return frozenset(name for name in names if name in kept or name.startswith(stems))


def complete(method: Method, cfg: Any, params: Params, site: Site) -> dict[str, Array]:
    """Returns the stored parameters of a site (numpy) together with the method's constants, cast to the
    floating dtype of the parameters.

    Example:
        >>> from adapterpack import LoRA
        >>> from adapterpack.adapter_methods import get
        >>> sorted(complete(get("lora"), LoRA(r=1), {"lora_A": np.ones((1, 2)), "lora_B": np.ones((3, 1))},
        ...     Site("layer", 2, 3)))
        ['lora_A', 'lora_B']
    """
    made = constants_of(method, cfg, params, site)
    dtype = next(
        (value.dtype for value in params.values() if np.issubdtype(value.dtype, np.floating)),
        np.dtype(np.float32),
    )
    return {
        **{
            name: value.astype(dtype) if np.issubdtype(value.dtype, np.floating) else value
            for name, value in made.items()
        },
        **params,
    }


def constants_of(method: Method, cfg: Any, params: Params, site: Site) -> Arrays:
    """Computes the tensors of a site that are neither trained nor stored: ``Storage.constants`` and
    ``Overrides.derive``.
    """
    made = {} if method.storage.constants is None else method.storage.constants(cfg, site)
    derive = method.overrides.get("derive")
    return made if derive is None else {**made, **derive(cfg, params, site)}


def amount(method: Method, cfg: Any, site: Site) -> int:
    """Returns how many numbers an adapter computes at a site in addition to the stored ones.

    That is what the method's ``expanded_size`` returns, or for a low-rank method the size of both factors and
    of the product of one factor with itself.

    Example:
        >>> from adapterpack import LoRA, VeRA
        >>> from adapterpack.adapter_methods import get
        >>> amount(get("lora"), LoRA(r=2), Site("layer", 3, 5)), amount(get("vera"), VeRA(r=2, width=30,
        ...     height=50), Site("layer", 3, 5))
        (20, 160)
    """
    if method.storage.expanded_size is not None:
        return method.storage.expanded_size(cfg, site)
    return factors(cfg, site) if method.traits.low_rank else 0


def factors(cfg: Any, site: Site) -> int:
    """Returns how many numbers two factors of the config's rank have, plus the ``rank x rank`` product of one
    factor with itself.
    """
    rank = cfg.rank or 0
    return rank * (site.in_features + site.out_features + rank)


def resolve_configs(method: Method, configs: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """Returns the configs of all ``sites`` of one adapter, completed with the values that depend on the other
    sites (``Storage.resolve``).
    """
    return list(configs if method.storage.resolve is None else method.storage.resolve(configs, sites))


def require_widths(site: Site) -> None:
    """Checks that both widths of a site are known, for a method whose stored numbers are useless without
    them.

    Raises:
        Unsupported: a width is unknown, because the pack came from a file that does not contain it.
    """
    if not site.in_features or not site.out_features:
        raise Unsupported(
            "this pack does not say how wide the layer is, and what it stores is of no use without that",
            where=site.path,
            remedy=(
                "give the base too, where that can be given; or attach the pack to it and save it again, or "
                "merge it"
            ),
        )


def run(
    method: Method, cfg: Any, params: Params, site: Site, base: Forward, x: Array, drop: Forward | None = None
) -> Array:
    """Returns the adapted output ``[..., out]`` of ``base`` at ``x`` (``[..., in]``), by the method's own
    ``forward`` or the normal form.
    """
    if forward := method.overrides.get("forward"):
        return forward(cfg, params, site, base, x, drop or (lambda value: value))
    return evaluate(method.normal_form(cfg, params, site), base, x, drop)


def fold(
    method: Method,
    cfg: Any,
    params: Params,
    site: Site,
    weight: Array,
    bias: Array | None,
    rows: slice | None = None,
) -> tuple[Array, Array | None]:
    """Returns the weight and bias with the adapter folded in, by the method's own ``fold`` or the normal
    form.

    ``weight`` is ``[out, in]``, or only the output rows ``rows``; ``bias`` likewise. The arguments are not
    modified.

    Example:
        >>> import numpy as np
        >>> from adapterpack import LoRA
        >>> from adapterpack.adapter_methods import get
        >>> site, lora = Site("layer", 3, 2), get("lora")
        >>> params = {"lora_A": np.ones((1, 3)), "lora_B": np.ones((2, 1))}
        >>> fold(lora, LoRA(r=1, alpha=2), params, site, np.zeros((2, 3)), None)[0]
        array([[2., 2., 2.],
               [2., 2., 2.]])
    """
    block = slice(0, site.out_features) if rows is None else rows
    if override := method.overrides.get("fold"):
        return override(cfg, params, site, weight, bias, block)
    return fold_form(method.normal_form(cfg, params, site), weight, bias, block)


def row_blocks(rows: int, columns: int, elements: int = 1 << 18) -> Iterator[slice]:
    """Yields slices that cut a ``[rows, columns]`` weight into blocks of about ``elements`` numbers, so that
    the scratch memory fits into the cache.
    """
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
