"""Reads values out of a Python file of tests as data: no function of the file is called.

What is understood: literals, names that the file imports from PEFT or torch, constants that it assigns, calls
of PEFT's own configuration classes, and calls of a function whose whole body is the ``return`` of such a
value. Classes of models are taken as they stand.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
import transformers
from torch import nn

_ROOTS = ("peft", "torch", "transformers")
_GROUPS: Mapping[type[ast.expr], Callable[..., Any]] = {ast.List: list, ast.Tuple: tuple, ast.Set: set}


class NotData(Exception):
    """An expression that only running the tests would give a value."""


class Source:
    """One file of tests."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem.removeprefix("test_")
        self.text = path.read_text("utf-8")
        self.tree = ast.parse(self.text)

    @cached_property
    def imported(self) -> dict[str, Any]:
        """What the file imports from PEFT, torch and transformers, by the names that it gives them."""
        found: dict[str, Any] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in _ROOTS:
                        importlib.import_module(alias.name)
                        found[alias.asname or alias.name.split(".")[0]] = importlib.import_module(
                            alias.name if alias.asname else alias.name.split(".")[0]
                        )
            elif (
                isinstance(node, ast.ImportFrom)
                and node.module
                and not node.level
                and node.module.split(".")[0] in _ROOTS
            ):
                for alias in node.names:
                    try:
                        found[alias.asname or alias.name] = getattr(
                            importlib.import_module(node.module), alias.name
                        )
                    except (ImportError, AttributeError):
                        continue
        return found

    @cached_property
    def assigned(self) -> dict[str, ast.expr]:
        """The values that the file assigns to names outside of functions."""
        return {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    @cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        """The functions outside of classes."""
        return {node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef)}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What the tables call a model -> its class: of every ``if name == "...": return Class()...`` in the
        file.
        """
        found = {}
        for node in ast.walk(self.tree):
            match node:
                case ast.If(
                    test=ast.Compare(
                        left=ast.Name(), ops=[ast.Eq()], comparators=[ast.Constant(str() as name)]
                    ),
                    body=[
                        ast.Return(value=ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(kind)))))
                    ],
                ):
                    found[name] = kind
        return found

    def constant(self, name: str) -> Any:
        """The value assigned to a name.

        Raises:
            NotData: it is no data, or the name is not there.
        """
        if name not in self.assigned:
            raise NotData(name)
        return self.value(self.assigned[name])

    def value(self, node: ast.expr, scope: Mapping[str, Any] | None = None) -> Any:
        """The value of an expression.

        Raises:
            NotData: it is no data.
        """
        here = scope or {}
        match node:
            case ast.Constant(value):
                found = value
            case ast.List(items) | ast.Tuple(items) | ast.Set(items):
                found = _GROUPS[type(node)](self.value(item, here) for item in items)
            case ast.Dict(keys, values) if None not in keys:
                found = {
                    self.value(key, here): self.value(value, here)
                    for key, value in zip(keys, values, strict=True)
                    if key
                }
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
                found = -number
            case ast.Name(name):
                found = (
                    here[name]
                    if name in here
                    else self.imported[name]
                    if name in self.imported
                    else self.constant(name)
                )
            case ast.Attribute(owner, name):
                found = _attribute(self.value(owner, here), name)
            case ast.Call(function, arguments, keywords):
                found = self._called(function, arguments, keywords, here)
            case _:
                raise NotData(type(node).__name__)
        return found

    def _called(
        self,
        function: ast.expr,
        arguments: list[ast.expr],
        keywords: list[ast.keyword],
        scope: Mapping[str, Any],
    ) -> Any:
        if any(keyword.arg is None for keyword in keywords) or any(
            isinstance(argument, ast.Starred) for argument in arguments
        ):
            raise NotData("**")
        given = [self.value(argument, scope) for argument in arguments]
        named = {str(keyword.arg): self.value(keyword.value, scope) for keyword in keywords}
        if isinstance(function, ast.Name) and function.id in self.functions:
            definition = self.functions[function.id]
            match definition:
                case ast.FunctionDef(body=[ast.Return(value=ast.expr() as returned)]):
                    names = [argument.arg for argument in definition.args.args]
                    return self.value(returned, dict(zip(names, given, strict=False)) | named)
            raise NotData(function.id)
        callee = self.value(function, scope)
        if not (
            isinstance(callee, type)
            and dataclasses.is_dataclass(callee)
            and callee.__module__.split(".")[0] == "peft"
        ):
            raise NotData(str(callee))
        return Call(callee, tuple(given), named)

    def calls(self) -> Iterator[tuple[str, Call]]:
        """Every configuration of PEFT that stands inside a function or class, with all its arguments, and the
        function's name.
        """
        for place, node in _inside(self.tree, ()):
            try:
                value = self.value(node)
            except NotData:
                continue
            if isinstance(value, Call) and issubclass(value.type, peft.PeftConfig):
                yield ".".join(place), value

    @cached_property
    def modules(self) -> list[tuple[str, type[nn.Module]]]:
        """The file's models, each with the name of the function that it stands in: classes of torch modules
        that need nothing of the file but such classes.
        """
        space: dict[str, Any] = {
            **self.imported,
            "torch": torch,
            "nn": nn,
            "F": nn.functional,
            "transformers": transformers,
        }
        return list(self._modules(self.tree, "", space))

    def _modules(
        self, node: ast.AST, place: str, space: dict[str, Any]
    ) -> Iterator[tuple[str, type[nn.Module]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and any(_is_module(base) for base in child.bases):
                plain = ast.ClassDef(
                    child.name, child.bases, child.keywords, child.body, [], lineno=child.lineno, col_offset=0
                )
                try:
                    exec(compile(ast.Module([plain], []), f"<{self.name}>", "exec"), space)
                except Exception:  # it needs what only its function has
                    continue
                if isinstance(made_class := space[child.name], type) and issubclass(made_class, nn.Module):
                    yield place, made_class
            elif isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from self._modules(child, f"{place}.{child.name}".lstrip("."), dict(space))


@dataclasses.dataclass(frozen=True)
class Call:
    """A configuration as it is written: its class and arguments, made anew for each use, since PEFT writes
    into it.
    """

    type: type[Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def __call__(self) -> Any:
        """A fresh configuration."""
        return self.type(
            *(made(value) for value in self.arguments),
            **{key: made(value) for key, value in self.keywords.items()},
        )

    def __str__(self) -> str:
        said = {
            key: value
            for key, value in self.keywords.items()
            if key not in {"task_type", "inference_mode"} and value is not None
        }
        listed = [*map(shown, self.arguments), *(f"{key}={shown(value)}" for key, value in said.items())]
        return f"{self.type.__name__.removesuffix('Config')}({', '.join(listed)})"


def made(value: Any) -> Any:
    """A value with fresh lists and dictionaries in it, and calls as what they make."""
    if isinstance(value, Call):
        return value()
    if isinstance(value, dict):
        return {key: made(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(made(each) for each in value)
    return value


def shown(value: Any) -> str:
    """A value as text that is the same in every process."""
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, set):
        return "{" + ", ".join(sorted(shown(each) for each in value)) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{shown(key)}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(each) for each in value) + "]"
    return value if isinstance(value, str) else str(value)


def _attribute(owner: Any, name: str) -> Any:
    of_library = isinstance(owner, ModuleType) and owner.__name__.split(".")[0] in _ROOTS
    if not hasattr(owner, name) or not (
        of_library or (isinstance(owner, type) and issubclass(owner, enum.Enum))
    ):
        raise NotData(name)
    return getattr(owner, name)


def _is_module(base: ast.expr) -> bool:
    match base:
        case ast.Attribute(attr="Module") | ast.Name("Module"):
            return True
    return False


def _inside(node: ast.AST, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.Call]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from _inside(child, (*place, child.name))
            continue
        if place and isinstance(child, ast.Call):
            yield place, child
        yield from _inside(child, place)
