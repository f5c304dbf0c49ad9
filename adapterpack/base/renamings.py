"""Maps a checkpoint's tensor names to those in memory, as transformers renames them when loading, without
transformers.

A family's published checkpoints, older versions of transformers and the current one may each use different
names for a weight. All of them map to one name in memory, so two names mean the same weight if they map to
the same name.

``renamings.json`` is extracted from transformers (``tests/renamings.py``): the patterns of each model and of
its parts, by class or by type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..io import Config, Json
from ..resources import resource

Step = Callable[[str], str]
"""Renames a name, or returns it unchanged."""


@dataclass(frozen=True)
class Renaming:
    """One step: replaces what ``pattern`` matches in a name by ``target``, in which ``\\1`` is the pattern's
    first group.

    ``scope`` is the path of the part of the model that the step applies to, None for the whole; ``prefix`` is
    what a class with a head adds before every path of the model without one.

    Example:
        >>> step = Renaming(re.compile(r"^vision_model[.](.+)"), r"\\1", "vision_tower", "model")
        >>> (step("model.vision_tower.vision_model.post_layernorm.weight"),
        ...     step("vision_model.post_layernorm.weight"))
        ('model.vision_tower.post_layernorm.weight', 'vision_model.post_layernorm.weight')
    """

    pattern: re.Pattern[str]
    target: str
    scope: str | None = None
    prefix: str = ""

    def __call__(self, name: str) -> str:
        """Returns the name after the step; unchanged if the step does not apply."""
        before = self._before(name)
        rest = name.removeprefix(before or "")
        found = None if before is None else self.pattern.search(rest)
        if before is None or found is None:
            return name
        target = self.target.replace(r"\1", found[1]) if r"\1" in self.target else self.target
        return before + rest.replace(found[0], target, 1)

    def _before(self, name: str) -> str | None:
        """Returns the start of a name that leads to the part; None if the name belongs to another part."""
        if self.scope is None:
            return ""
        scope = f"{self.scope}." if self.scope else ""
        longer = f"{self.prefix}.{scope}" if self.prefix else scope
        return next((before for before in (longer, scope) if name.startswith(before)), None)


def in_memory(name: str, steps: Iterable[Step]) -> str:
    """Returns the name in memory of a weight that a checkpoint calls ``name``; names in memory stay
    unchanged.
    """
    for step in steps:
        name = step(name)
    return name


def renamings_of(config: Config, architecture: str | None) -> tuple[Renaming, ...]:
    """Returns the steps for a checkpoint with that configuration, saved from the class ``architecture``;
    empty if transformers renames nothing, or the model is unknown.

    Example:
        >>> steps = renamings_of({"model_type": "vit"}, "ViTForImageClassification")
        >>> in_memory("vit.encoder.layer.0.attention.attention.query.weight", steps)
        'vit.layers.0.attention.q_proj.weight'
    """
    table = _table()
    model = _follow(table["models"], architecture) or _follow(table["models"], config.get("model_type"))
    if model is None:
        return ()
    prefix, parts = model
    steps = []
    for scope, known, key in parts:
        inner = config.get(key) if key else None
        kind = inner.get("model_type") if isinstance(inner, Mapping) else None
        name = table["types"].get(kind, kind) if isinstance(kind, str) else known
        steps += [
            Renaming(_compiled(pattern), target, scope, prefix)
            for pattern, target in _follow(table["renamings"], name) or ()
        ]
    return (
        *steps,
        *(Renaming(_compiled(pattern), target) for pattern, target in table["renamings"]["legacy"]),
    )


def publish_path(path: str, steps: Sequence[Renaming]) -> str:
    """Returns a module's path in published checkpoints, if these have a prefix that loading drops; other
    tools use that path.

    Example:
        >>> publish_path("encoder.layers.0.mlp.fc1", renamings_of({"model_type": "clip_text_model"},
        ...     "CLIPTextModel"))
        'text_model.encoder.layers.0.mlp.fc1'
    """
    dropped = [
        found[1]
        for step in steps
        if step.target == r"\1" and (found := _DROPPED.fullmatch(step.pattern.pattern)) is not None
    ]
    older = (f"{prefix}.{path}" for prefix in dropped if not path.startswith(f"{prefix}."))
    return next((one for one in older if in_memory(one, steps) == path), path)


def is_known(kind: object) -> bool:
    """Whether transformers has models of that type.

    Example:
        >>> is_known("phi3"), is_known("somebodys_own")
        (True, False)
    """
    return isinstance(kind, str) and kind in _table()["known"]


def find_places(names: Iterable[str], stored: Iterable[str], steps: Sequence[Step]) -> dict[str, str]:
    """Returns those of ``names`` that are a weight's name outside memory, for the checkpoint with the names
    ``stored``, mapped to the names in memory.
    """
    known = rename_all(stored, steps) if steps else {}
    places = {name: in_memory(name, steps) for name in names if known and name not in known}
    return {name: place for name, place in places.items() if place != name and find(place, known) is not None}


def rename_all(names: Iterable[str], steps: Sequence[Step]) -> dict[str, str]:
    """Maps names in memory back to names; drops those that several names lead to."""
    found: dict[str, str | None] = {}
    for name in names:
        place = in_memory(name, steps)
        found[place] = None if place in found else name
    return {place: name for place, name in found.items() if name is not None}


def find(name: str, names: Mapping[str, str]) -> str | None:
    """Returns the entry for a name, or for the name with one prefix more or less, as in classes with and
    without a head; None if there is none, or several.

    Example:
        >>> find("vit.norm.weight", {"norm.weight": "a"}), find("norm.weight",
        ...     {"vit.norm.weight": "a"}), find("norm.weight", {})
        ('a', 'a', None)
    """
    for known in (name, name.partition(".")[2]):
        if known in names:
            return names[known]
    longer = [value for prefixed, value in names.items() if prefixed.partition(".")[2] == name]
    return longer[0] if len(longer) == 1 else None


_DROPPED = re.compile(r"\^(\w+)\\\.\(\.\+\)")
"""Matches the pattern of a step that drops a prefix."""
_compiled: Callable[[str], re.Pattern[str]] = cache(re.compile)


@cache
def _table() -> Json:
    loaded: Json = json.loads(resource("base/renamings.json").read_text("utf-8"))
    return loaded


def _follow(table: Mapping[str, Any], name: object) -> Any:
    """Returns a table's entry; an entry that is a string refers to another entry."""
    value = table.get(name) if isinstance(name, str) else None
    return table[value] if isinstance(value, str) else value
