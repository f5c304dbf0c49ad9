"""Reads YAML as plain data, within limits of size, depth and number of values that are checked before
anything is built.

Aliases count as often as they are used, since nested aliases can expand to any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import AdapterpackError, ConfigError, storage_errors
from ..library_errors import library_errors
from .safe_open import read_at_most

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 30_000
"""The most keys and values; an alias counts as everything that it stands for."""
MAX_SCALAR = 1 << 16
"""The most characters in a string; longer text belongs into a file of its own."""
MAX_DIGITS = 100
MAX_INTEGER = 2**63 - 1
_WIDTH = 120


def loads(
    data: bytes | str,
    where: object,
    kind: type[AdapterpackError] = ConfigError,
    what: str = "this is not valid YAML",
    times: int = 1,
) -> Any:
    """Returns the value in ``data``: mappings, lists, strings, numbers, booleans and null; dates stay
    strings.

    ``times`` multiplies the limits of bytes and values.

    Raises:
        ConfigError: (or ``kind``) the data is not YAML in UTF-8, exceeds a limit, repeats a key, has a tag of
            another type, or an alias inside the value that it stands for.

    Example:
        >>> loads("{r: 8, since: 2026-02-30, targets: [q_proj]}", "here")
        {'r': 8, 'since': '2026-02-30', 'targets': ['q_proj']}
    """

    def refused(problem: str, found: object = None, line: int | None = None) -> AdapterpackError:
        return kind(
            f"{what}: {problem}",
            where=f"{where}, line {line}" if where is not None and line is not None else where,
            found=found,
        )

    if len(data) > times * MAX_BYTES:
        raise refused(f"it is larger than {times * MAX_BYTES} bytes", len(data))
    with library_errors("yaml", what, where=where, kind=kind):
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        try:
            for problem, line in _problems(yaml.parse(text, Loader=_Loader), times * MAX_VALUES):
                raise refused(problem, line=line)
            return yaml.load(text, Loader=_Loader)  # a SafeLoader
        except yaml.MarkedYAMLError as error:
            problem = ", ".join(filter(None, (error.context, error.problem)))
            raise refused(
                problem, line=None if error.problem_mark is None else error.problem_mark.line + 1
            ) from error


def read(path: Path) -> Any:
    """Returns the value in a file, which may be a pipe.

    Raises:
        StorageError: it cannot be read.
        ConfigError: as for :func:`loads`.
    """
    with storage_errors(path), path.open("rb") as file:
        data = read_at_most(file, MAX_BYTES + 1)
    return loads(data, path)


def dumps(value: Any) -> str:
    """Returns the value as YAML that :func:`loads` reads back, with keys in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=_WIDTH)


def _problems(events: Any, most: int) -> Iterator[tuple[str, int]]:
    """Yields each exceeded limit with its line, from the parser's events, before anything is built."""
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_nodes):
                yield "an alias stands for what it is in itself", line
            # An alias without an anchor counts nothing; loading raises an error for it.
            total += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total - 1))
            if len(open_nodes) > MAX_DEPTH:
                yield f"it is nested more than {MAX_DEPTH} levels deep", line
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if len(event.value) > MAX_SCALAR:
                yield f"a text is longer than {MAX_SCALAR} characters", line
        if total > most:
            yield f"it stands for more than {most} values, aliases in full", line


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Builds YAML's plain types only; a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping as the base class does; keys of merged mappings may be repeated."""
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        seen = set()
        for key in keys:
            value = self.construct_object(key, deep=True)
            if value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key stands twice: {value}", key.start_mark
                )
            seen.add(value)
        return mapping

    def number(self, node: yaml.ScalarNode) -> int | float:
        """Builds a number, within limits of digits and size."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark
            )
        whole = node.tag == "tag:yaml.org,2002:int"
        value: int | float = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if whole and abs(value) > MAX_INTEGER:
            raise yaml.constructor.ConstructorError(None, None, "a whole number beyond 2^63", node.start_mark)
        return value


_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "str", "seq", "map")}
_Loader.yaml_constructors = {
    **{tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN},
    **dict.fromkeys(("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"), _Loader.number),
    None: yaml.SafeLoader.yaml_constructors[None],
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
