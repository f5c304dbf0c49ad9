"""Measures how heavy the library is, and writes the figures that ``tests/test_house.py`` lets fall but not rise.

    python tests/house.py            # the figures, each with the most that is allowed and the goal
    python tests/house.py --walks    # these and how many files a call passes through, which takes half a minute
    python tests/house.py --write    # after a change that made it lighter: the figures become the most

A figure may rise only together with the reason, in the last column of tests/golden/house.tsv.
"""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import method_fields
import test_layers

PACKAGE = test_layers.PACKAGE
RECORD = Path(__file__).parent / "golden" / "house.tsv"
WIDTH = 110
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
"""Tokens that are no mass: how code is laid out, and what is said about it."""
IRREGULAR = frozenset(
    [
        "begun",
        "broken",
        "built",
        "chosen",
        "done",
        "drawn",
        "driven",
        "found",
        "frozen",
        "given",
        "grown",
        "held",
        "hidden",
        "kept",
        "known",
        "laid",
        "led",
        "left",
        "lost",
        "made",
        "met",
        "paid",
        "said",
        "seen",
        "sent",
        "shown",
        "sought",
        "sold",
        "spent",
        "taken",
        "taught",
        "thought",
        "told",
        "torn",
        "won",
        "worn",
        "written",
    ]
)
NO_PARTICIPLES = frozenset(["embed", "exceed", "feed", "need", "proceed", "seed", "speed"])
GRAPH_CODE = ("exporting", "engine_graph", "onnx_graph", "graph_passes")
SMALL = 45


class Module(NamedTuple):
    """A file of the library."""

    file: Path
    text: str
    tree: ast.Module
    functions: tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]
    """All functions and methods, nested ones, too."""


def modules() -> list[Module]:
    """The files of the library, in order."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(text := file.read_text("utf-8"))
        functions = (
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        found.append(Module(file, text, tree, tuple(functions)))
    return found


def tokens(text: str) -> int:
    """How many tokens a file has besides its layout and its comments; an f-string is one, as before Python
    3.12.
    """
    count = inside = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        inside -= kind == "FSTRING_END"
        count += not inside and token.type not in LAYOUT and kind != "FSTRING_END"
        inside += kind == "FSTRING_START"
    return count


def names_of_several_classes(library: list[Module]) -> list[str]:
    """Public names of classes that more than one module defines."""
    places: dict[str, set[Path]] = defaultdict(set)
    for module in library:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(module.file)
    return sorted(name for name, files in places.items() if len(files) > 1)


def is_participle(name: str) -> bool:
    """Whether a function says what has been done, as ``packed`` does, where its name should say what it does."""
    word = name.strip("_").rpartition("_")[2]
    return word in IRREGULAR or (len(word) > 4 and word.endswith("ed") and word not in NO_PARTICIPLES)


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is asked like a value."""
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def named_functions(library: list[Module]) -> list[str]:
    """The names of all functions and methods that a reader calls."""
    return [
        function.name
        for module in library
        for function in module.functions
        if not function.name.startswith("__") and not is_property(function)
    ]


def only_refers(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a docstring says nothing but where else to look."""
    text = (ast.get_docstring(function) or "").strip()
    return bool(re.fullmatch(r"See (above|:\w+:`[^`]*`|[\w.`]+)\.?", text))


def late_imports(module: Module) -> set[int]:
    """The lines of imports inside functions."""
    return {
        node.lineno
        for function in module.functions
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }


def untyped_arguments(module: Module) -> tuple[int, int]:
    """How many arguments are annotated ``Any``, and how many are annotated."""
    annotations = [
        ast.unparse(argument.annotation)
        for function in module.functions
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None
    ]
    return annotations.count("Any"), len(annotations)


def folder_circles() -> list[set[str]]:
    """Sets of folders whose modules import each other, by whatever way round."""
    edges: dict[str, set[str]] = defaultdict(set)
    for name, imported in test_layers.graph().items():
        for other in imported:
            here, there = name.rpartition(".")[0], other.rpartition(".")[0]
            if here != there and "adapterpack" not in (here, there) and here and there:
                edges[here].add(there)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for folder in edges[waiting.pop()] - seen:
                seen.add(folder)
                waiting.append(folder)
        return seen

    reach = {folder: reached(folder) for folder in list(edges)}
    circles: list[set[str]] = []
    for folder, others in reach.items():
        if folder in others and not any(folder in circle for circle in circles):
            circles.append({folder} | {other for other in others if folder in reach.get(other, ())})
    return circles


def measure() -> dict[str, float]:
    """Every figure by its name in the record."""
    library = modules()
    names = named_functions(library)
    graph_code = [
        untyped_arguments(module)
        for module in library
        if set(GRAPH_CODE) & set(module.file.relative_to(PACKAGE).parts)
    ]
    untyped, typed = (sum(column) for column in zip(*graph_code, strict=True))
    return {
        "tokens of the library": sum(tokens(module.text) for module in library),
        "lines over 110 columns": sum(
            len(line) > WIDTH for module in library for line in module.text.splitlines()
        ),
        "names of several public classes": len(names_of_several_classes(library)),
        "functions named by a participle, per mille": round(
            1000 * sum(map(is_participle, names)) / len(names)
        ),
        "docstrings that only refer elsewhere": sum(
            only_refers(function) for module in library for function in module.functions
        ),
        "folders in circles": sum(map(len, folder_circles())),
        "modules under 45 lines": sum(
            len(module.text.splitlines()) < SMALL and module.file.name != "__init__.py" for module in library
        ),
        "imports inside functions": sum(len(late_imports(module)) for module in library),
        "bare Any among arguments of graph code, per mille": round(1000 * untyped / typed),
        "fields of a method": len(method_fields.count_users()),
    }


class Limit(NamedTuple):
    """A line of the record: the figure at 0192e78b, the most that is allowed now, the goal, and why it rose."""

    first: str
    most: float
    goal: float
    reason: str


def read_record() -> dict[str, Limit]:
    """The limits by the names of the figures."""
    rows = [line.split("\t") for line in RECORD.read_text("utf-8").splitlines()[1:]]
    return {name: Limit(first, float(most), float(goal), reason) for name, first, most, goal, reason in rows}


def main() -> None:
    """Prints the figures, or writes them into the record."""
    record, figures = read_record(), measure()
    if "--walks" in sys.argv:
        command = [sys.executable, str(PACKAGE.parent / "benchmarks" / "walks.py"), "--json"]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        figures |= {f"walk: {name}": walk["files"] for name, walk in found.items()}
    if "--write" in sys.argv:
        lines = ["figure\tat 0192e78b\tat most\tgoal\twhy it rose"]
        for name, limit in record.items():
            most = min(figures.get(name, limit.most), limit.most)
            lines.append(
                f"{name}\t{limit.first}\t{most:g}\t{limit.goal:g}\t{limit.reason}".replace("e+05", "e5")
            )
        RECORD.write_text("\n".join(lines) + "\n", "utf-8")
        return
    for name, value in figures.items():
        limit = record[name]
        print(f"{name}: {value:,} (at most {limit.most:,.0f}; goal {limit.goal:,.0f})")
    for circle in folder_circles():
        print("circle:", *sorted(circle))
    print("names of several public classes:", *names_of_several_classes(modules()))


if __name__ == "__main__":
    main()
