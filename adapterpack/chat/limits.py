"""A jinja2 environment for templates of strangers: the sandbox, and limits of time and size on everything that a template can do.

The sandbox of jinja2 keeps a template away from Python, but lets it count to a trillion or make a text of gigabytes. Here every turn of a
loop, every call and every filter looks at the clock, and every value that a template makes is paid for out of one sum (:class:`Meter`);
where it could be large, before it is made. No single operation of Python takes long, then, since nothing that it works on is large.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import islice
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context, pass_eval_context
from jinja2.visitor import NodeTransformer

from . import checks
from .meter import Meter

MAX_NODES = 20_000
"""The most nodes of a template; one of 20 kB has about 2000."""


_METER: ContextVar[Meter] = ContextVar("meter")


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Whatever is rendered in the block is paid for out of ``meter``."""
    token = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(token)


@pass_context
def _written(context: Context, value: Any) -> Any:
    """A value that goes into the text. Given the context, jinja2 calls it while it renders, and never while it compiles."""
    meter = _METER.get()
    meter.step()
    meter.spend(meter.size(value))
    return value


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment. What it compiles is rendered in a block of :func:`metered`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=_written, extensions=[LoopControlExtension, GenerationExtension],
                         optimized=False)  # which would compute what is constant while it compiles, when nothing is paid for
        self.globals = {"range": self.globals["range"], "dict": _mapping, "namespace": _Namespace}
        self.filters = {name: _paid(function, checks.FILTERS.get(name)) for name, function in self.filters.items()
                        if name not in checks.NO_FILTERS}
        self.filters["tojson"] = _tojson  # jinja2's own escapes for HTML

    def compiled(self, source: str) -> Any:
        """The template of that source.

        Raises:
            TemplateError: it has no form that jinja2 knows, or is too long to be compiled.
        """
        tree = self.parse(source)
        if any(True for _ in islice(tree.find_all(nodes.Node), MAX_NODES, None)):
            raise TemplateRuntimeError(f"it has more than {MAX_NODES} parts")
        return self.from_string(_Metering().visit(tree))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have that attribute: of data, only methods that are known."""
        allowed = next((methods for kind, methods in checks.METHODS if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed or not callable(value))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operation, unless it would be large."""
        meter = _METER.get()
        meter.step()
        if operator == "%" and isinstance(left, str):
            checks.percent(meter, left, right)
        elif operator == "*":
            meter.require_product(left, right)
        elif operator == "**":
            meter.require_power(left, right)
        return meter.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - any other name may be a keyword
        """The result of a function, a macro or a method; of a method of a text, unless it would be large."""
        meter = _METER.get()
        meter.step()
        method = getattr(__obj, "__wrapped__", __obj)  # str.format is wrapped by the sandbox
        owner, check = getattr(method, "__self__", None), checks.TEXT_METHODS.get(getattr(method, "__name__", ""))
        if isinstance(owner, str) and check is not None:
            args = check(meter, owner, *args, **kwargs) or args
        return meter.made(super().call(__context, __obj, *args, **kwargs))

    @property
    def turn(self) -> None:
        """Looked at in every turn of a loop, which is a step."""
        _METER.get().step()

    def made(self, value: Any) -> Any:
        """Called with every list, mapping and slice: results of calls are paid for."""
        return value

    @pass_eval_context
    def joined(self, eval_ctx: Any, parts: list[Any]) -> Any:
        """Called in the place of ``~``."""
        meter = _METER.get()
        meter.spend(sum(map(meter.size, parts)))
        return (markup_join if eval_ctx.autoescape else str_join)(parts)


def _paid(function: Callable[..., Any], check: Callable[[Meter, dict[str, Any]], None] | None) -> Callable[..., Any]:
    """A filter whose result is paid for. ``check`` is shown its arguments, and may change them."""
    function = inspect.unwrap(function)  # of its two forms, the one that waits for nothing
    signature = inspect.signature(function)

    @wraps(function)  # jinja2's mark of what it is given, too
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.step()
        if check is None:
            return meter.made(function(*args, **kwargs))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        check(meter, bound.arguments)
        return meter.made(function(*bound.args, **bound.kwargs))

    return run


def _mapping(*pairs: Any, **items: Any) -> dict[Any, Any]:
    """A mapping; the type itself would have more than templates need."""
    return dict(*pairs, **items)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return checks.tojson(_METER.get(), value, indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)


class GenerationExtension(Extension):
    """``{% generation %}`` marks what is trained on; it changes nothing of the text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> Any:
        """The statements in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace may hold itself, or another one many times: it is not written out."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Metering(NodeTransformer):
    """Puts calls of the environment's methods into a template. Methods are named by jinja2, after its nodes."""

    def visit_For(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("turn"), lineno=node.lineno))
        return node

    def visit_TemplateData(self, node: Any) -> Any:  # noqa: N802
        return nodes.MarkSafeIfAutoescape(nodes.Const(node.data), lineno=node.lineno)  # written, and paid for, as any other value

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", nodes.List(node.nodes, lineno=node.lineno), lineno=node.lineno)

    def visit_Tuple(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx == "store" else _call("made", node, lineno=node.lineno)

    def visit_List(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return _call("made", node, lineno=node.lineno)

    def visit_Dict(self, node: Any) -> Any:  # noqa: N802
        return self.visit_List(node)

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return _call("made", node, lineno=node.lineno) if isinstance(node.arg, nodes.Slice) else node


def _call(method: str, *args: Any, lineno: int) -> Any:
    return nodes.Call(nodes.EnvironmentAttribute(method, lineno=lineno), list(args), [], None, None, lineno=lineno)
