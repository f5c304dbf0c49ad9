"""Hubs: where models and packs come from and go to - folders, hub ids, ``hf://`` references - and a small hub of one's own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {"audit": "auditing", "serve": "server.serve"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'adapterpack.hub' has no attribute '{name}'")
    return getattr(import_module(f"adapterpack.hub.{_PUBLIC[name]}"), name)
