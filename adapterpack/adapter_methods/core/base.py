"""The Method value: pure functions, a frozen config class and declared traits, and the normal form that
methods reduce to.

Every weight method reduces its trained tensors to one **normal form**::

    y' = post(output_scale * (base(pre(x)) + up(down(x)) + routes(x))) + shift

so that training, merging, composing and exporting handle seven fields, not N methods. The mathematics is
written once, against the Python array API: the same few lines run on torch tensors while training and on
numpy arrays everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypedDict

import numpy as np

from ...errors import Unsupported
from .columns import columns
from .config import SiteConfig
from .layouts import WEIGHTS
from .operators import Array, Operator
from .peft_form import PeftForm
from .routers import Route
from .site import Params, Site

Forward = Callable[[Array], Array]


class NormalForm(NamedTuple):
    """The normal form of one adapter at one site; ``None`` means identity (``pre``, ``up``, ``post``), absent
    (``down``), one, or zero.

    Shapes: ``pre`` ``[in, in]``, ``down`` ``[r, in]``, ``up`` ``[out, r]``, ``output_scale`` ``[out]`` or
    ``[1]``, ``shift`` ``[out]``, ``post`` ``[out, out]``. A change that has no factors is a ``down`` of
    ``[out, in]`` without an ``up``.
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
        """Whether a pair of factors is all that there is: a change of low rank, parallel to the layer."""
        return (
            self.is_parallel
            and self.down is not None
            and self.up is not None
            and self.output_scale is None
            and self.shift is None
        )

    @property
    def is_parallel(self) -> bool:
        """Whether it leaves the input alone, mixes no outputs and has no router: a branch parallel to the
        layer, a scale and a shift.
        """
        return self.pre is None and self.post is None and len(self.routes) == 0


@dataclass(frozen=True)
class Traits:
    """What a method can do, declared as data; generic code looks at these and never at a name."""

    additive: bool
    """The change is added to the weight: adapters sum, and a weight on the adapter is a weight on the
    change.
    """
    identity_at_init: bool
    """A fresh adapter changes nothing, exactly."""
    row_separable: bool
    """A block of output rows can be folded without the others."""
    low_rank: bool
    """The change is ``up @ down`` of a small rank: composing in factor space is exact."""
    reads_weight: bool = False
    """``init`` and ``normal_form`` need the base weight."""
    quantizable: bool = True
    """Its tensors may be stored as int8."""
    batchable: bool = True
    """Rows of one batch may carry different adapters of this method."""
    layers: tuple[str, ...] = WEIGHTS
    """The kinds of site it supports."""
    min_features: tuple[int, int] = (1, 1)
    """The smallest numbers of outputs and inputs of a layer that it can change: a single number cannot be
    rotated.
    """
    frozen: tuple[str, ...] = ()
    """Its parameters that are stored and not trained, besides those that are not of a floating type; ``v``
    stands for ``v_...``, too.
    """
    exclusive: bool = False
    """At most one adapter of such a method is active at a time."""

    @property
    def tied(self) -> bool:
        """Whether what has an embedding's table for its weight, an output head or another embedding, is
        changed with the embedding: a method that puts values of its own into a table puts them there, too.
        """
        return self.exclusive and "table" in self.layers


class Shared(NamedTuple):
    """Parameters that all sites of one adapter have in common, stored once; ``normal_form`` gets them among
    its parameters, and an ``init`` that begins from them finds them at its site. With ``reads_weights`` they
    themselves begin from the weights of all sites.
    """

    shapes: Callable[[Any, Sequence[Site]], dict[str, tuple[int, ...]]]
    init: Callable[[Any, Sequence[Site], np.random.Generator], dict[str, np.ndarray]]
    reads_weights: bool = False


class Progress(NamedTuple):
    """The progress of a training: ``step`` of ``total`` optimizer steps are done; the first step is number
    1.
    """

    step: int
    total: int


class TrainedSite(NamedTuple):
    """One site after an optimizer step: its config, its trained parameters and their gradients."""

    config: Any
    params: Params
    gradients: Params


class Training(NamedTuple):
    """What a method adds to an ordinary training."""

    needs: Callable[[Any], frozenset[str]] | None = None
    """config -> what ``init`` reads of a site: of ``weight``, ``moment``, ``gradient``
    (:class:`~.site.Calibration`).
    """
    allocate: Callable[[Any, Sequence[Site]], Any] | None = None
    """The config, adapted to the calibration of all sites: ranks that are shared out among them, for
    instance.
    """
    rates: Callable[[Any], Mapping[str, float]] | None = None
    """config -> parameter name -> what multiplies its learning rate."""


class Storage(NamedTuple):
    """What a pack holds of a method besides the parameters of each site, and what follows from it when the
    pack is read.
    """

    shared: Shared | None = None
    constants: Callable[[Any, Site], dict[str, np.ndarray]] | None = None
    """What follows from the config, the site and (by trait) its weight, and is neither trained nor stored:
    random bases from a seed, ...
    """
    expanded_size: Callable[[Any, Site], int] | None = None
    """How many numbers ``constants`` and ``normal_form`` make at a site, within a small factor, where the
    stored parameters and the site's weight have fewer. The config comes from the pack: what it may have its
    reader make is limited by this (pack/expansion_limit.py).
    """
    resolve: Callable[[Sequence[Any], Sequence[Site]], Sequence[Any]] | None = None
    """The configs of all sites -> the same with what follows from the sites together (their largest width, a
    site's number), as a pack stores them. Resolving them again changes nothing, and what an unknown width
    leaves open stays open.
    """
    to_stored: Callable[[Any, Params, Site], tuple[Any, dict[str, np.ndarray]]] | None = None
    """The config and the parameters of a trained site in the form that a pack stores, where that differs.
    Those of a stack come all at once, its matrices along their first axis.
    """
    require: Callable[[Any, Params, Site], None] | None = None
    """Raises ValueError unless the values of a site's parameters, which are strangers', are possible there:
    places in its weight, ... A width that is not known is 0.
    """


class Overrides(TypedDict, total=False):
    """The stages that a method does in a way of its own: stage -> function. Few methods need one."""

    forward: Callable[[Any, Params, Site, Forward, Array, Forward], Array]
    """A forward pass, where that of the normal form is slower or holds less."""
    fold: Callable[[Any, Params, Site, Array, Array | None, slice], tuple[Array, Array | None]]
    """A fold: weight and bias of a block of rows -> the adapted ones."""
    refuse: Callable[[str], str]
    """Why the method cannot do a stage, empty where it can: ``fold`` (no weight can hold it), ``graph`` (no
    graph can), ``cache`` (the model must see all tokens of a row in one pass).
    """
    active_together: Callable[[Sequence[Any]], bool]
    """Whether several adapters of an ``exclusive`` method, by their configs, change nothing in common, and
    may be active at once.
    """
    first_pass: Callable[[Params, Array, int, int], dict[str, Array]]
    """Further parameters of a layer from a pass of the model without the adapter: (the shared parameters, the
    last hidden states, the number of the layer, the number of layers) -> parameters.
    """
    training_form: Callable[[Any, Params, Site], NormalForm]
    """The normal form while a linear layer trains, where that draws random numbers."""
    penalty: Callable[[Any, Params, int], Array]
    """A term of one site that is added to the loss; the number of all sites is for those that are an
    average.
    """
    after_step: Callable[
        [Progress, Any, Mapping[str, TrainedSite]], tuple[Any, Mapping[str, Mapping[str, Array]]]
    ]
    """Runs after each optimizer step, over all sites of an adapter at once: (progress, state, path -> site)
    -> (state, path -> new values of some parameters). The state is the method's own, None at first.
    """
    derive: Callable[[Any, Params, Site], dict[str, np.ndarray]]
    """Constants, as in :class:`Storage`, that follow from parameters which are stored and not trained,
    too.
    """
    append_rows: Callable[[Any, Params, int], np.ndarray | None]
    """The rows that an adapter of a table of so many rows puts after the last of them (words added before
    training), or None.
    """
    linear_combination: Callable[[Sequence[tuple[Params, float]]], dict[str, np.ndarray]]
    """The parameters of one adapter whose change is the weighted sum of those of several of the same config
    at a site, exactly; numpy.
    """


class Method(NamedTuple):
    """An adapter method: a core of plain functions and data, a group each for training, storage and PEFT's
    files, and the stages that it overrides.

    ``examples`` are the configs under which the test matrix proves it. The parameters that ``normal_form``,
    ``forward`` and ``fold`` take are complete: the site's own, the shared ones, and the constants.
    """

    name: str
    summary: str
    paper: str
    config: type[Any]
    traits: Traits
    shapes: Callable[[Any, Site], dict[str, tuple[int, ...]]]
    init: Callable[[Any, Site, np.random.Generator], dict[str, np.ndarray]]
    normal_form: Callable[[Any, Params, Site], Any]
    """The normal form of the method's kind: :class:`NormalForm`, a block's form, or a prompt's."""
    examples: tuple[Any, ...]
    formula: str = ""
    """What it computes, in one line; ``W x + b`` is the layer."""
    kind: str = "weight"
    training: Training = Training()
    storage: Storage = Storage()
    peft: PeftForm | None = None
    overrides: Overrides = {}  # noqa: RUF012 - never changed

    @property
    def is_positional(self) -> bool:
        """Whether the config may say which positions of a row the adapter acts on (``acts``): then no weight
        can hold the change.
        """
        return self.config.acts is not SiteConfig.acts

    def reason_against(self, stage: str) -> str:
        """Why the method cannot do a stage (:class:`Overrides`); empty where it can."""
        refuse = self.overrides.get("refuse")
        return "" if refuse is None else refuse(stage)


def describe_traits(method: Method) -> dict[str, Any]:
    """The traits of a method by name, those that follow from others among them."""
    declared = {field.name: getattr(method.traits, field.name) for field in fields(method.traits)}
    return {**declared, "tied": method.traits.tied, "positional": method.is_positional}


def zeros(
    shapes: Callable[[Any, Site], dict[str, tuple[int, ...]]],
) -> Callable[[Any, Site, np.random.Generator], dict[str, np.ndarray]]:
    """The ``init`` of a method whose parameters all begin at zero."""
    return lambda cfg, site, rng: {
        name: np.zeros(shape, np.float32) for name, shape in shapes(cfg, site).items()
    }


def constant(value: Array) -> Array:
    """The same array as something that no gradient flows through; numpy's has none."""
    return value.detach() if hasattr(value, "detach") else value


def evaluate(form: NormalForm, base: Forward, x: Array, drop: Forward | None = None) -> Array:
    """``post(output_scale * (base(pre(x)) + up(down(x)) + routes(x))) + shift`` for ``x`` of shape ``[...,
    in]``.

    ``drop`` is the dropout on the branch's input while training.
    """
    y = base(x if form.pre is None else form.pre.apply(x))
    if form.down is not None:
        inner = form.down.apply(x if drop is None else drop(x))
        y = y + (inner if form.up is None else form.up.apply(inner))
    for route in form.routes:
        y = y + route.mixed(x, x if drop is None else drop(x))
    if form.output_scale is not None:
        y = y * form.output_scale
    if form.post is not None:
        y = form.post.apply(y)
    return y if form.shift is None else y + form.shift


def look_up(form: NormalForm, base: Forward, ids: Array, keep: Array | None = None) -> Array:
    """:func:`evaluate` for a layer whose inputs are one-hot vectors, given as their numbers ``ids``:
    ``[...]`` to ``[..., out]``.

    ``keep`` (``[...]``) multiplies the branch: dropout on a one-hot vector leaves all of it or nothing.

    Raises:
        Unsupported: the form changes the input, which ids do not let it.
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
    """The normal form folded into a block of rows: ``W' = post output_scale (W pre + up down)``, ``b' = post
    output_scale b + shift``.

    ``weight`` is the block ``[len(rows), in]`` and ``bias`` its part ``[len(rows)]`` or None; both are left
    as they are. A shift where there was no bias gives a bias. With a ``post``, which mixes rows, the block is
    the whole.

    Raises:
        Unsupported: the form has routes, whose weights depend on the input.
    """
    if len(form.routes) > 0:
        raise Unsupported(
            "branches behind a gate cannot be folded into a weight", remedy="keep the adapter unmerged"
        )
    folded = weight if form.pre is None else form.pre.after(weight)
    if form.down is not None:
        folded = folded + (form.down.rows(rows) if form.up is None else form.down.after(form.up.rows(rows)))
    if form.output_scale is not None:
        scale = _block(form.output_scale, rows)
        folded = folded * scale[:, None]
        bias = None if bias is None else bias * scale
    if form.post is not None:
        folded, bias = form.post.apply(folded.T).T, None if bias is None else form.post.apply(bias)
    if form.shift is not None:
        shift = _block(form.shift, rows)
        bias = shift if bias is None else bias + shift
    return folded, bias


def _block(vector: Array, rows: slice) -> Array:
    return vector if vector.shape[0] == 1 else vector[rows]


def frozen(method: Method, cfg: Any, names: Iterable[str]) -> frozenset[str]:
    """Those of the parameters that are stored and not trained under a config: the method's own, and those
    that the config keeps.

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
    """The stored parameters of a site (numpy) with the method's constants, in the parameters' floating dtype.

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


def constants_of(method: Method, cfg: Any, params: Params, site: Site) -> dict[str, np.ndarray]:
    """What is neither trained nor stored at a site (:class:`Storage`), as the method makes it of the stored
    parameters.
    """
    made = {} if method.storage.constants is None else method.storage.constants(cfg, site)
    derive = method.overrides.get("derive")
    return made if derive is None else {**made, **derive(cfg, params, site)}


def amount(method: Method, cfg: Any, site: Site) -> int:
    """How many numbers an adapter computes at a site in addition to those that it stores.

    The two factors and the product of one with itself, or what ``expanded_size`` gives.

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
    """The numbers of two factors of the config's rank, and of the product of one with itself."""
    rank = cfg.rank or 0
    return rank * (site.in_features + site.out_features + rank)


def resolve_configs(method: Method, configs: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """The configs of all ``sites`` of one adapter, each with what follows from the others
    (:class:`Storage`).
    """
    return list(configs if method.storage.resolve is None else method.storage.resolve(configs, sites))


def require_widths(site: Site) -> None:
    """Checks that both widths of a site are known, for a method whose numbers say nothing without them.

    Raises:
        Unsupported: one is not; the pack came from a file that does not say it.
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
    """The adapted output ``[..., out]`` of ``base`` at ``x`` (``[..., in]``): the method's own ``forward``,
    or the normal form.
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
    """Weight and bias with the adapter folded in: the method's own ``fold``, or the normal form's.

    ``weight`` is ``[out, in]``, or the block of output rows named by ``rows``; ``bias`` likewise. Inputs are
    not changed.

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
    """Slices that cut a ``[rows, columns]`` weight into blocks of about ``elements``, so that the scratch
    memory stays in cache.
    """
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
