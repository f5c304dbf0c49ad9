"""Defines and registers rules of composition: what a rule computes, from which inputs, with which parameters,
and which laws it obeys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
import numpy as np
from msgspec import Meta

from ...errors import ConfigError, nearest
from ...lowrank import Factors, FactorSum, RowSource, Term, Terms, zero
from ...registry import Registry

Weights = Sequence[float]
Arguments = Mapping[str, Any]
"""The parameters of a rule, by name."""
Combination = Factors | FactorSum | RowSource
"""The result of a rule at a site: factors, a weighted sum of the given factors, or a dense change that yields
blocks of rows.
"""
Steps = Annotated[int, Meta(ge=1, le=10_000)]
"""A number of iterations. An untrusted recipe may set it, so it is bounded."""
Count = Annotated[int, Meta(ge=0, le=10_000)]
"""A number of packs or of parts."""
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Scope = Literal["adapter", "tensor"]
"""Whether a rule measures the whole adapter or each tensor for itself."""


class Laws(NamedTuple):
    """The laws that a rule obeys. Tests check each law for every rule, and check that a law set to False is
    really broken.

    Two laws hold for all rules: a weight of 0 equals leaving the pack out, and the same packs give the same
    bytes.
    """

    identity: bool = True
    """A lone pack of weight 1 stays what it is, under the parameters ``neutral``."""
    sums: bool = False
    """Under ``neutral`` the result is the weighted sum of the changes."""
    permutation: bool = True
    """The order of the packs changes nothing."""
    gauge: bool = True
    """Only the changes count, not how they are written as factors."""
    homogeneous: bool = True
    """All changes times c give the result times c."""
    weighted: bool = True
    """The weight w of a lone pack multiplies the result by w."""
    odd: bool = True
    """All weights negated negate the result."""
    cancels: bool = True
    """A pack and itself with weights 1 and -1 give zero."""
    mixed_ranks: bool = True
    """The packs may have different ranks."""


SUM = Laws(sums=True)
MEAN = Laws(weighted=False)
"""The laws of a mean, in which a lone pack's weight cancels out."""
THINNED = {"density": 1.0}


class Rule(NamedTuple):
    """Combines the terms of one site into one change.

    ``needs`` says what the rule looks at: ``G`` inner products of the changes, ``C`` the joint column and row
    spaces, ``S`` scalings of one side, ``D`` every entry of the dense change, ``F`` the factors one by one.
    ``exact``: the result is what the formula says, without truncation. ``function`` takes the site's terms,
    then the result of ``survey`` if there is one, and the rule's parameters by keyword. ``survey`` sees many
    sites first: all of them where the parameter ``scope`` is ``adapter``, else at each one alone. ``reduce``:
    the result is reduced to its numerical rank. ``cut``: the rule needs a rank or an energy. ``unit``:
    without weights every pack counts 1, not 1/T. ``neutral``: parameters under which the rule changes a lone
    pack least. ``statistics``: the kind of statistics that the rule needs for every pack. ``search``: compose
    searches for the weights by the score of their result; the function has the search's parameters too.
    ``coefficients`` is set for a rule that is a sum of the changes with factors that follow from the weights
    alone: it takes the weights, and the rule's parameters by keyword. ``mix`` is set for one whose factors
    follow from inner products, too: it takes the products ``[L, T, T]`` of the whole changes, or of each of
    their ``L`` lines (the parameter ``per``), and the weights, and returns the factors ``[L, T]``. ``merge``
    is set for a rule of entries: it merges changes in any coordinates. ``each`` are the parameters that may
    differ from pack to pack.
    """

    name: str
    summary: str
    formula: str
    paper: str
    needs: str
    function: Callable[..., Combination]
    exact: bool = True
    survey: Callable[..., Any] | None = None
    reduce: bool = True
    cut: bool = False
    unit: bool = False
    neutral: Mapping[str, Any] = {}
    laws: Laws = Laws()
    statistics: str = ""
    search: bool = False
    coefficients: Callable[..., Sequence[float]] | None = None
    mix: Callable[..., np.ndarray] | None = None
    merge: Callable[..., RowSource] | None = None
    each: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The rule's parameters by name: the keyword-only parameters of its function. An annotation such as
        :data:`Steps` or a ``Literal`` declares which values there are.
        """
        parameters = _signature(self.function).parameters
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    def arguments(self, params: Arguments | None) -> dict[str, Any]:
        """Returns every parameter with its given or default value; accepts an integer where the parameter is
        a float.

        Raises:
            ConfigError: a parameter that the rule does not have, one of another type, or one that it needs is
                missing.
        """
        parameters = self.parameters
        arguments = dict(params or {})
        for name in arguments:
            if name not in parameters:
                raise ConfigError(
                    "the rule has no such parameter",
                    where=f"rule {self.name}",
                    found=repr(name),
                    remedy=nearest(name, parameters)
                    if parameters
                    else "leave it out: the rule takes no parameters",
                )
        values = {name: arguments.get(name, parameter.default) for name, parameter in parameters.items()}
        for name, value in values.items():
            if value is inspect.Parameter.empty:
                raise ConfigError(
                    "the rule needs a parameter",
                    where=f"rule {self.name}",
                    expected=name,
                    remedy=f"give {name}",
                )
            values[name] = _convert(f"rule {self.name}, {name}", value, parameters[name])
        return values

    def prepared(self, sites: Sequence[Terms], arguments: Arguments) -> Callable[[Terms], Combination]:
        """Runs the survey on these sites and returns a function that combines the terms of one of them.
        Leaves out terms of weight 0.
        """
        whole = None
        if self.survey is not None and arguments["scope"] == "adapter":
            whole = self.survey(
                [_present(terms) for terms in sites if any(term.weight for term in terms)], **arguments
            )

        def combine(terms: Terms) -> Combination:
            kept = _present(terms)
            if not any(len(term.A) for term in kept):
                return zero(*terms[0].change.shape)
            if self.survey is None:
                return self.function(kept, **arguments)
            return self.function(
                kept, self.survey([kept], **arguments) if whole is None else whole, **arguments
            )

        return combine


RULES: Registry[Rule] = Registry("composition rule", Rule, "adapterpack.rules", "adapterpack.composing.rules")
"""The rules by name; a module of this folder registers the rules that it defines."""


def rules() -> dict[str, Rule]:
    """Lists every rule of composition, including those of other packages (entry points
    ``adapterpack.rules``).

    Example:
        >>> sorted(rules())[:2]
        ['average', 'breadcrumbs']
    """
    return dict(RULES)


Function = TypeVar("Function", bound=Callable[..., Any])


def rule(name: str, summary: str, **fields: Any) -> Callable[[Function], Function]:
    """Registers the decorated function as the rule of that name; ``fields`` are those of :class:`Rule`.

    The function takes the terms of one site and its parameters by keyword.
    """

    def register(function: Function) -> Function:
        RULES.register(Rule(name, summary, function=function, **fields))
        return function

    return register


def with_scope(function: Callable[..., Any], default: str) -> inspect.Signature:
    """Returns the signature of a rule built on ``function``: its keywords and ``scope``."""
    parameters = _signature(function).parameters.values()
    keywords = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    scope = inspect.Parameter("scope", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Scope)
    return inspect.Signature([*keywords, scope])


def _present(terms: Terms) -> tuple[Term, ...]:
    return tuple(term for term in terms if term.weight)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    # another package's rule may annotate with names that it imports only under TYPE_CHECKING
    except NameError:
        return inspect.signature(function)


def _convert(where: str, value: Any, parameter: inspect.Parameter) -> Any:
    """Returns the value as the parameter's annotation has it; a parameter without one has the type of its
    default.

    Raises:
        ConfigError: the value is of another type, or not one of those that the annotation admits.
    """
    kind, default = parameter.annotation, parameter.default
    if kind is parameter.empty or isinstance(kind, str):
        kind = Any if default is None or default is parameter.empty else type(default)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        raise ConfigError(
            "the rule's parameter cannot have this value",
            where=where,
            expected=" or ".join(choices) or str(error).removeprefix("Expected ").replace("`", ""),
            found=repr(value),
            remedy="leave it out" if default is parameter.empty else f"give a value such as {default!r}",
        ) from error
