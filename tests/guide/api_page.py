"""The pages of the Python API, read off the list of public names: ``python tests/guide/api_page.py
docs/api.md docs/api-methods.md``.

Signatures and docstrings as plain Markdown, which reads the same in the repository and on the site.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapterpack

STUB = Path(adapterpack.__file__).with_name("__init__.pyi")
GROUPS = {
    "The stages": (
        "train",
        "validate",
        "inspect",
        "merge",
        "unmerge",
        "compose",
        "resize",
        "extract",
        "port",
        "measure",
        "audit",
        "quantize",
        "compress",
        "convert",
        "declare",
        "export",
        "run",
        "serve",
        "demo",
    ),
    "Adapters in a torch model": (
        "adapt",
        "attach",
        "save",
        "load_for",
        "detach",
        "active",
        "using",
        "disabled",
        "set_weight",
        "merge_into",
        "unmerge_from",
        "status",
        "adapter_state_dict",
        "load_adapter_state_dict",
        "hotswap",
    ),
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
    return {
        name: f"adapterpack{module.rstrip('.') if module != '.' else ''}.{inner}"
        for module, inner, name in lines
    }


def pages() -> tuple[str, str]:
    """The functions and classes in groups, and the configurations of methods."""
    names = public()
    configs = [
        name
        for name, where in names.items()
        if ".adapter_methods." in where and where.rpartition(".")[2][0].isupper()
    ]
    grouped = {name for group in GROUPS.values() for name in group}
    left = names.keys() - grouped - set(configs) - {"hub"}
    groups = {**GROUPS, "Looking around": (*GROUPS["Looking around"], *sorted(left))}
    parts = [
        INTRO,
        *(
            f"## {title}\n\n" + "\n".join(_item(name, names[name]) for name in group)
            for title, group in groups.items()
        ),
    ]
    return "\n".join(parts), "\n".join([METHODS, *(_item(name, names[name], 2) for name in configs)])


_SECTION = re.compile(r"(Args|Raises|Returns|Yields|Warns|Example):")
_ENTRY = re.compile(r"(\S.*?): (.*)")
_WIDE = 100
"""Columns of a signature; longer ones have a line for each parameter."""


def _item(name: str, where: str, level: int = 3) -> str:
    """A function, or a class with its public members."""
    module, _, leaf = where.rpartition(".")
    __import__(module)
    value = getattr(sys.modules[module], leaf)
    return "\n".join(_described(f"adapterpack.{name}", name, value, level))


def _described(title: str, name: str, value: Any, level: int) -> Iterator[str]:
    yield from (
        f"{'#' * level} {title}",
        "",
        *_code(_signature(name, value)),
        *_text(inspect.getdoc(value) or ""),
    )
    for member, one in vars(value).items() if inspect.isclass(value) else ():
        held = (
            one.__func__
            if isinstance(one, classmethod | staticmethod)
            else getattr(one, "fget", None) or getattr(one, "func", one)
        )
        if not member.startswith("_") and inspect.isfunction(held) and held.__doc__ is not None:
            called = member if isinstance(one, property) or held is not one else _signature(member, one)
            called = (
                _signature(member, getattr(value, member))
                if isinstance(one, classmethod | staticmethod)
                else called
            )
            yield from (
                f"{'#' * (level + 1)} {name}.{member}",
                "",
                *_code(called),
                *_text(inspect.cleandoc(held.__doc__)),
            )


def _code(text: str) -> Iterator[str]:
    yield from ("```python", text, "```", "")


def _signature(name: str, value: Any) -> str:
    """The call as it is written, without quotes around annotations."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parts, kinds = list[str](), inspect.Parameter
    starred = False
    for one in (one for one in signature.parameters.values() if one.name != "self"):
        if one.kind == kinds.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or one.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        said = "" if one.annotation is kinds.empty else f": {_plain(one.annotation)}"
        given = "" if one.default is kinds.empty else f"{' = ' if said else '='}{_default(one.default)}"
        parts.append(
            f"{ {kinds.VAR_POSITIONAL: '*', kinds.VAR_KEYWORD: '**'}.get(one.kind, '') }{one.name}{said}{given}"
        )
    empty = inspect.isclass(value) or signature.return_annotation is inspect.Signature.empty
    end = ")" if empty else f") -> {_plain(signature.return_annotation)}"
    line = f"{name}({', '.join(parts)}{end}"
    return line if len(line) <= _WIDE else "\n".join([f"{name}(", *(f"    {part}," for part in parts), end])


_ALIASES = {
    "StrPath": "str | os.PathLike[str]",
    "Say": "Callable[[str], None]",
    "Progress": "Callable[[int, int], None]",
    "Tensors": "Mapping[str, np.ndarray]",
}
"""Names of types inside of the package -> what a reader of the page knows."""


def _plain(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\w+", lambda word: _ALIASES.get(word[0], word[0]), text)


def _default(value: Any) -> str:
    text = value.__name__ if inspect.isfunction(value) or inspect.isclass(value) else repr(value)
    return "..." if " at 0x" in text or text.startswith("<") else text


def _text(doc: str) -> Iterator[str]:
    """A docstring: its sections as lists, its examples as code."""
    lines = (
        re.sub(r":(?:class|func|meth|mod|attr|data|exc):`[.~]*([^`]+)`", r"`\1`", doc)
        .replace("``", "`")
        .splitlines()
    )
    at = 0
    while at < len(lines):
        if not _SECTION.fullmatch(lines[at]):
            yield lines[at]
            at += 1
            continue
        title, start = lines[at][:-1], at + 1
        at = start
        while at < len(lines) and (not lines[at] or lines[at].startswith(" ")):
            at += 1
        body = inspect.cleandoc("\n".join(["", *lines[start:at]]))
        if title == "Example":
            yield from ("```pycon", re.sub(r" +# doctest: .*", "", body).replace("\n\n", "\n"), "```")
        else:
            yield from (
                f"**{ {'Args': 'Arguments'}.get(title, title) }**",
                "",
                *([body, ""] if title == "Returns" else _entries(body)),
            )
    yield ""


def _entries(body: str) -> Iterator[str]:
    """What stands under a title, one entry a line."""
    for line in re.sub(r"\n {2,}", " ", body).splitlines():
        found = _ENTRY.fullmatch(line)
        yield (
            f"- `{found[1]}`: {found[2]}" if found and len(found[1]) < 80 and "`" not in found[1] else line
        )
    yield ""


if __name__ == "__main__":
    for path, text in zip(sys.argv[1:], pages(), strict=True):
        Path(path).write_text(text, "utf-8")
