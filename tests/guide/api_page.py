"""The pages of the Python API, read off the list of public names: ``python tests/guide/api_page.py docs/api.md docs/api-methods.md``.

MkDocs fills them from the docstrings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import adapterpack

STUB = Path(adapterpack.__file__).with_name("__init__.pyi")
GROUPS = {
    "The stages": ("train", "validate", "inspect", "merge", "unmerge", "compose", "resize", "extract", "measure", "audit", "quantize",
                   "compress", "convert", "declare", "export", "run", "serve", "demo"),
    "Adapters in a torch model": ("adapt", "attach", "save", "load_for", "detach", "active", "using", "disabled", "set_weight",
                                  "merge_into", "unmerge_from", "status", "adapter_state_dict", "load_adapter_state_dict", "hotswap"),
    "Packs": ("load", "Pack", "Store", "Fleet", "sign", "verify", "push", "pull"),
    "Running a bundle": ("Session", "Engine"),
    "Looking around": ("methods", "rules", "AdapterpackError"),
}
"""Title -> names, in the order in which they are read; names that are in none are added to the last."""
INTRO = """# Python API

What `import adapterpack` offers; each name is imported when it is first used, so that looking at a pack never costs an import of torch.
Everything else may move between minor versions. [The configurations of methods](api-methods.md) have a page of their own.
"""
METHODS = """# Configurations of methods

One class for each [method](methods.md), as `adapterpack.LoRA`, `adapterpack.DoRA` ...: what `adapt` takes, and whose fields are keys of a
training configuration.
"""


def public() -> dict[str, str]:
    """Public name -> where it is defined."""
    lines = re.findall(r"^from (\S+) import (\w+) as (\w+)$", STUB.read_text("utf-8"), re.MULTILINE)
    return {name: f"adapterpack{module.rstrip('.') if module != '.' else ''}.{inner}" for module, inner, name in lines}


def pages() -> tuple[str, str]:
    """The functions and classes in groups, and the configurations of methods."""
    names = public()
    configs = [name for name, where in names.items() if ".adapter_methods." in where and where.rpartition(".")[2][0].isupper()]
    grouped = {name for group in GROUPS.values() for name in group}
    left = names.keys() - grouped - set(configs) - {"hub"}
    groups = {**GROUPS, "Looking around": (*GROUPS["Looking around"], *sorted(left))}
    parts = [INTRO, *(f"## {title}\n\n" + "\n".join(_item(name, names[name]) for name in group) for title, group in groups.items())]
    return "\n".join(parts), "\n".join([METHODS, *(_item(name, names[name], 2) for name in configs)])


def _item(name: str, where: str, level: int = 3) -> str:
    return f"::: {where}\n    options:\n      heading_level: {level}\n      heading: adapterpack.{name}\n"


if __name__ == "__main__":
    for path, text in zip(sys.argv[1:], pages(), strict=True):
        Path(path).write_text(text, "utf-8")
