"""Packages that are called: ``adapterpack.merge`` is the folder of the merge stage and the function ``merge`` at once.

Python binds a subpackage to its parent's attribute on import, so a function of the same name would be overwritten whenever someone
imports from the package. Making the package callable keeps both names true, whatever was imported first.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class Stage(ModuleType):
    """A package that is called."""

    _target: tuple[str, str]

    def _function(self) -> Any:
        module, name = self._target
        return getattr(import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())


def callable_package(package: str, function: str | None = None, module: str | None = None) -> None:
    """Makes the package callable: by default ``adapterpack.x`` calls ``adapterpack.x.x.x``, imported when first called."""
    name = function or package.rpartition(".")[2]
    this = sys.modules[package]
    this.__class__ = Stage
    this.__dict__["_target"] = (f"{package}.{module or name}", name)
