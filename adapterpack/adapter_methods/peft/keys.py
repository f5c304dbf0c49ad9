"""Translates a method's config to PEFT's keys and back, including PEFT's patterns for values that differ
between sites.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from ...errors import Unsupported, excerpt
from ..core.config import ends, is_number
from ..core.peft_form import PeftConfig, PeftForm, SiteConfigs


def default_and_pattern(values: Mapping[str, Any], anchored: bool) -> tuple[Any, dict[str, Any]]:
    """Splits site path -> value into what PEFT reads: a default, and a pattern with the names of the sites
    that differ from it.

    PEFT matches a name with the end of a path. Where PEFT understands an anchor (``anchored``), a name that
    also ends other paths gets one. Where it does not, the default must be the value of such a site, because
    PEFT always matches full paths.

    Example:
        >>> default_and_pattern({"a.fc": 1, "fc": 2, "b.fc": 1}, anchored=True)
        (1, {'^fc': 2})
        >>> default_and_pattern({"a.fc": 1, "fc": 2, "b.fc": 1}, anchored=False)
        (2, {'a.fc': 1, 'b.fc': 1})
    """
    if len(set(values.values())) == 1:
        return next(iter(values.values())), {}
    # Paths that are also the end of another path: as a plain name each would match both.
    others_end = {end for path in values for end in ends(path) if end in values and end != path}
    default = values[
        next(iter(values) if anchored else iter([path for path in values if path in others_end] or values))
    ]
    return default, {
        f"^{path}" if anchored and path in others_end else path: value
        for path, value in values.items()
        if value != default
    }


NO_EXTRAS: PeftConfig = {"bias": "none", "fan_in_fan_out": False, "init_weights": True}
"""Keys that many configs of PEFT have, with the values that change nothing."""


class PeftKeys(NamedTuple):
    """The fields of a config under PEFT's names, in both directions.

    ``fields``: each field that PEFT also has -> the value that a missing key means in PEFT, or only their
    names where that is always the config's own default; ``renamed``:
    field -> PEFT's name, where it differs; ``constants``: further keys with a fixed value that PEFT requires.
    A field that has a pattern in the config (:func:`~..core.config.pattern_of`) has one in PEFT, too, of that
    name (:func:`default_and_pattern` explains ``anchored``). ``whole`` are the numbers that PEFT has as
    integers where they are integral.
    """

    config: type[Any]
    fields: PeftConfig | tuple[str, ...]
    constants: PeftConfig
    renamed: Mapping[str, str] = {}
    anchored: bool = True
    whole: tuple[str, ...] = ()

    @property
    def patterns(self) -> dict[str, str]:
        """Field that may differ between sites -> the field that is its pattern."""
        found = {field.metadata.get("of"): field.name for field in fields(self.config)}
        return {name: found[name] for name in self.fields if name in found}

    def form(self, peft_type: str, suffixes: Mapping[str, str] | Sequence[str], **fields: Any) -> PeftForm:
        """Builds the :class:`PeftForm` of a method with these keys; ``suffixes`` may be a list if PEFT uses
        the same parameter names.
        """
        names = suffixes if isinstance(suffixes, Mapping) else {name: name for name in suffixes}
        keys = {"to_config": self.to_config, "from_config": self.from_config}
        return PeftForm(peft_type, names, **{**keys, **fields})

    def to_config(self, sites: SiteConfigs) -> PeftConfig:
        """Converts site path -> config to PEFT's keys."""
        first = next(iter(sites.values()))
        patterns = self.patterns
        keys = dict[str, Any]()
        for name in self.fields:
            key = self.renamed.get(name, name)
            if name in patterns:
                values = {path: self._written(name, cfg) for path, cfg in sites.items()}
                default, differing = default_and_pattern(values, self.anchored)
                keys |= {key: default, self.renamed.get(patterns[name], patterns[name]): differing}
            else:
                keys[key] = self._written(name, first)
        return {**keys, **self.constants}

    def _written(self, name: str, cfg: Any) -> Any:
        value = getattr(cfg, name)
        return int(value) if name in self.whole and value is not None and value.is_integer() else value

    def from_config(self, config: PeftConfig) -> Any:
        """Converts PEFT's keys to a config."""
        values = dict(self.fields) if isinstance(self.fields, Mapping) else {}
        keys = {name: self.renamed.get(name, name) for name in self.fields}
        values |= {name: config[key] for name, key in keys.items() if key in config}
        for pattern in self.patterns.values():
            key = self.renamed.get(pattern, pattern)
            values[pattern] = literal(config.get(key), key)
        return self.config(**values)


def literal(pattern: Any, where: str) -> dict[str, Any]:
    """Converts PEFT's pattern to names. PEFT uses the first key that matches the end of a path and this
    package the longest, so keys hidden by an earlier one are dropped.

    Keys are regular expressions in PEFT; reading the folder already expanded those that are more than names
    (peft/patterns.py).

    Raises:
        Unsupported: a key is a regular expression.
        ValueError: the pattern does not map names to numbers.

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
                found=excerpt(key),
                expected="module names",
                remedy="write the pattern with literal module names",
            )
        if not any(end in names for end in ends(name.removeprefix("^"))):
            names[name] = value
    return names
