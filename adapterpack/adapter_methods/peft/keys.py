"""Translates a method's config to PEFT's keys and back, with PEFT's patterns for values that differ by
site.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import Unsupported
from ..core.config import ends, is_number
from ..core.peft_form import PeftForm


def default_and_pattern(values: Mapping[str, Any], anchored: bool) -> tuple[Any, dict[str, Any]]:
    """Site path -> value, as PEFT reads it: a value for all, and names for the sites that have another.

    PEFT takes a name for the end of a path. Where it understands an anchor (``anchored``), a name that other
    paths end in has one; where it does not, such a site has the value for all, because a path that is named
    whole is found all the same.

    Example:
        >>> default_and_pattern({"a.fc": 1, "fc": 2, "b.fc": 1}, anchored=True)
        (1, {'^fc': 2})
        >>> default_and_pattern({"a.fc": 1, "fc": 2, "b.fc": 1}, anchored=False)
        (2, {'a.fc': 1, 'b.fc': 1})
    """
    if len(set(values.values())) == 1:
        return next(iter(values.values())), {}
    others_end = {end for path in values for end in ends(path) if end in values and end != path}
    default = values[
        next(iter(values) if anchored else iter([path for path in values if path in others_end] or values))
    ]
    return default, {
        f"^{path}" if anchored and path in others_end else path: value
        for path, value in values.items()
        if value != default
    }


class PeftKeys(NamedTuple):
    """A config's fields under PEFT's names, in both directions.

    ``fields``: each field that PEFT has too -> what PEFT means where its config lacks it; ``renamed``: those
    that PEFT calls otherwise; ``constants``: further keys that PEFT wants, always the same. The field
    ``by_site`` may differ by site: PEFT, too, has a pattern named after it (see :func:`default_and_pattern`
    for ``anchored``).
    """

    config: type[Any]
    fields: Mapping[str, Any]
    constants: Mapping[str, Any]
    renamed: Mapping[str, str] = {}
    by_site: str = ""
    anchored: bool = True

    def form(self, peft_type: str, suffixes: Mapping[str, str] | Sequence[str], **fields: Any) -> PeftForm:
        """PEFT's form of a method with these keys; ``suffixes`` may be names that PEFT has, too."""
        names = suffixes if isinstance(suffixes, Mapping) else {name: name for name in suffixes}
        keys = {"to_config": self.to_config, "from_config": self.from_config}
        return PeftForm(peft_type, names, **{**keys, **fields})

    def to_config(self, sites: Mapping[str, Any]) -> dict[str, Any]:
        """Site path -> config, to PEFT's keys."""
        first, keys = next(iter(sites.values())), dict(self.constants)
        if self.by_site:
            values = {path: getattr(cfg, self.by_site) for path, cfg in sites.items()}
            keys |= by_site(self.by_site, values, f"{self.by_site}_pattern", self.anchored)
        return {**{self.renamed.get(name, name): getattr(first, name) for name in self.fields}, **keys}

    def from_config(self, config: Mapping[str, Any]) -> Any:
        """PEFT's keys to a config."""
        pattern = f"{self.by_site}_pattern"
        differing = {pattern: literal(config.get(pattern), pattern)} if self.by_site else {}
        values = {
            name: config.get(self.renamed.get(name, name), missing) for name, missing in self.fields.items()
        }
        return self.config(**values, **differing)


def by_site(name: str, values: Mapping[str, Any], pattern: str, anchored: bool = True) -> dict[str, Any]:
    """``name``: the value of the first site, ``pattern``: those of the sites that have another.

    Example:
        >>> by_site("r", {"q": 2, "inner.q": 3, "v": 2}, "rank_pattern")
        {'r': 2, 'rank_pattern': {'inner.q': 3}}
    """
    default, differing = default_and_pattern(values, anchored)
    return {name: default, pattern: differing}


def plain(value: float) -> float:
    """A number as PEFT writes it: whole where it is."""
    return int(value) if float(value).is_integer() else value


def literal(pattern: Any, where: str) -> dict[str, Any]:
    """PEFT's pattern as names: PEFT takes the first key that fits the end of a path, we take the longest, so
    hidden keys are left out.

    Its keys are regular expressions; those that are more than names were expanded when the folder was read
    (pack/patterns.py).

    Raises:
        Unsupported: a key is more than a name.
        ValueError: this is no map of names to numbers.

    Example:
        >>> literal({"v_proj": 2, "1.v_proj": 4}, "rank_pattern")
        {'v_proj': 2}
    """
    if not isinstance(pattern or {}, Mapping) or not all(map(is_number, (pattern or {}).values())):
        raise ValueError(f"{where} must map names to numbers, not {pattern!r:.80}")
    names: dict[str, Any] = {}
    for key, value in (pattern or {}).items():
        name = key.replace("\\.", ".").removesuffix("$")
        if not re.fullmatch(r"\^?[A-Za-z0-9_.-]+", name):
            raise Unsupported(
                "this PEFT pattern is a regular expression, which is not run",
                where=where,
                found=repr(key)[:80],
                expected="module names",
                remedy="write the pattern with literal module names",
            )
        if not any(end in names for end in ends(name.removeprefix("^"))):
            names[name] = value
    return names
