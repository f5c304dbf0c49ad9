"""Saves the state that methods keep between steps in a checkpoint, and loads it: trees of named tuples,
mappings, numbers and tensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "method_states.safetensors"
States = dict[tuple[str, str], Any]
"""Maps adapter and method names to the method's own state."""


def write(states: States, folder: Path) -> None:
    """Writes the states into a checkpoint: tensors as safetensors, the trees as JSON in its metadata."""
    tensors: dict[str, Tensor] = {}
    trees = [[*key, _plain(state, tensors)] for key, state in states.items()]
    save_file(tensors, folder / FILE, {"trees": json.dumps(trees)})


def read(folder: Path) -> States:
    """Returns the states in a checkpoint."""
    with safe_open(folder / FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {
            (adapter, method): _tree(plain, tensors)
            for adapter, method, plain in json.loads(file.metadata()["trees"])
        }


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns a tree as JSON; moves its tensors to ``tensors`` and refers to them by name."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": {key: _plain(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = {key: _plain(item, tensors) for key, item in zip(value._fields, value, strict=True)}
        return {"class": [type(value).__module__, type(value).__qualname__], "items": items}
    return value  # a number, a text, or None


def _tree(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuilds a tree from JSON and tensors."""
    if not isinstance(plain, Mapping):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "mapping" in plain:
        return {key: _tree(item, tensors) for key, item in plain["mapping"].items()}
    # Only modules that are imported already, as a method's in use is: a checkpoint cannot import code.
    module, name = plain["class"]
    return getattr(sys.modules[module], name)(
        **{key: _tree(item, tensors) for key, item in plain["items"].items()}
    )
