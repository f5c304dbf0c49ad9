"""Attacks by recipes, compositions and values on the command line of ``compose``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack import Attacks

DIGEST = "sha256:" + "0" * 64
GOOD = {
    "format": "adapterpack-recipe-1",
    "name": "both",
    "rule": "linear",
    "parents": [{"digest": DIGEST, "name": "alpha", "weight": 0.5}],
}
CHANGES: dict[str, dict[str, Any]] = {
    "parents that are a number": {"parents": 5},
    "parents that are numbers": {"parents": [1]},
    "parents that are null": {"parents": None},
    "parents that are lists": {"parents": [["a"]]},
    "parents that are a mapping": {"parents": {"a": 1}},
    "no parents": {"parents": []},
    "a parent without a digest": {"parents": [{"name": "a"}]},
    "a digest that is a number": {"parents": [{"digest": 1, "name": "a"}]},
    "a digest out of its folder": {"parents": [{"digest": "../../x", "name": "a"}]},
    "a weight that is text": {"parents": [{"digest": DIGEST, "name": "a", "weight": "x"}]},
    "a weight that is a list": {"parents": [{"digest": DIGEST, "name": "a", "weight": [1]}]},
    "20,000 parents": {"parents": [{"digest": DIGEST, "name": "a"}] * 20_000},
    "a rank that is text": {"rank": "8"},
    "a rank that is a list": {"rank": [8]},
    "a rank that is half": {"rank": 0.5},
    "an energy that is text": {"energy": "all"},
    "a budget that is a mapping": {"budget": {}},
    "whole that is a number": {"whole": 1},
    "a rule that is a list": {"rule": ["linear"]},
    "a rule that is a number": {"rule": 1},
    "neither rule nor tree": {"rule": None},
    "rule and tree": {"tree": "sum(a)"},
    "parameters that are a list": {"params": ["density"]},
    "a seed that is text": {"seed": "x"},
    "a seed that is half": {"seed": 0.5},
    "statistics that are a text": {"statistics": "abc"},
    "statistics of numbers": {"statistics": [1]},
    "statistics that are a number": {"statistics": 5},
    "a result that is a number": {"result": 1},
    "a name that is a list": {"name": []},
    "a name out of its folder": {"name": "../x"},
    "a name that repaints": {"name": "\x1b[2J\u202e"},
    "a key of another": {"run": "rm -rf"},
    "a format of another": {"format": "x"},
    "a format that is a list": {"format": [1]},
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "a parameter of another type": {"rule": "ties", "rank": 2, "params": {"density": "x"}},
    "a parameter that is a mapping": {"rule": "ties", "rank": 2, "params": {"density": {}}},
    "a scope that is a list": {"rule": "ties", "rank": 2, "params": {"scope": ["tensor"]}},
    "10^12 steps": {"rule": "ziplora", "params": {"steps": 10**12}},
    "10^12 evaluations": {"rule": "lorahub", "params": {"evaluations": 10**12}},
    "10^12 iterations": {"rule": "karcher", "params": {"iterations": 10**12, "tolerance": 0.0}},
    "10^12 clusters": {"rule": "lora_lego", "params": {"clusters": 10**12}},
    "a seed of 2^70": {"rule": "dare_linear", "rank": 2, "params": {"seed": 1 << 70}},
    "a seed below 0": {"rule": "lorahub", "params": {"seed": -1}},
    "no such parameter": {"params": {"\x1b[2J": 1}},
    "no such rule": {"rule": "\x1b[2J"},
    "a rank of -1": {"rank": -1},
    "an energy of 2": {"energy": 2.0},
    "a budget of -1": {"budget": -1},
    "whole of nothing": {"whole": "pick:"},
    "a tree that is a number": {"rule": None, "tree": 5},
    "a tree that is a list": {"rule": None, "tree": [1]},
    "a tree nested 10 deep": {"rule": None, "tree": "sum(" * 2_000 + "alpha"},
}
FILES: dict[str, tuple[bytes, str]] = {
    "nested 100,000 deep": (b"[" * 100_000, "nested too deeply"),
    "cut": (json.dumps(GOOD).encode()[:-5], "valid JSON"),
    "a list": (b"[]", "recipe"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "valid JSON"),
    "2 MB": (b" " * (2 << 20), "too large"),
    "a key twice": (b'{"format": "a", "format": "b"}', "twice"),
}
TREES: dict[str, tuple[str, str]] = {
    "aliases of aliases": (
        "k0: &k0 [x, x]\n" + "".join(f"k{n}: &k{n} [{f'*k{n - 1}, ' * 9}]\n" for n in range(1, 9)),
        "aliases",
    ),
    "nested": ("[" * 20_000, "nest"),
    "an object": ("!!python/object/apply:os.system [x]", "tag"),
    "a number": ("9" * 5_000, "digits"),
    "an alias of itself": ("&a {sum: [*a]}", "in itself"),
    "a number in its place": ("5", "error"),
    "a list": ("[1, 2]", "error"),
    "a mapping of numbers": ("{1: 2}", "error"),
    "30 MB": ("# " + "x" * (30 << 20), "larger than"),
}


@pytest.mark.parametrize("attack", CHANGES)
def test_a_recipe(attacks: Attacks, pack_of: Callable[[str, str], Path], attack: str) -> None:
    (attacks.work / "recipe.json").write_text(json.dumps({**GOOD, **CHANGES[attack]}))
    _compose(attacks, pack_of).refused("recipe", absent=attacks.work / "out")


@pytest.mark.parametrize("attack", PARAMETERS)
def test_what_a_recipe_of_these_packs_asks_for(
    attacks: Attacks, pack_of: Callable[[str, str], Path], attack: str
) -> None:
    from adapterpack import load

    parents = [
        {"digest": load(pack_of("llama", name)).id, "name": name, "weight": 0.5} for name in ("alpha", "beta")
    ]
    (attacks.work / "recipe.json").write_text(json.dumps({**GOOD, "parents": parents, **PARAMETERS[attack]}))
    _compose(attacks, pack_of).refused(absent=attacks.work / "out")


@pytest.mark.parametrize("attack", FILES)
def test_a_file_that_is_no_recipe(attacks: Attacks, pack_of: Callable[[str, str], Path], attack: str) -> None:
    data, words = FILES[attack]
    (attacks.work / "recipe.json").write_bytes(data)
    _compose(attacks, pack_of).refused(words, absent=attacks.work / "out")


@pytest.mark.parametrize("attack", TREES)
def test_a_tree_in_a_file(attacks: Attacks, pack_of: Callable[[str, str], Path], attack: str) -> None:
    text, words = TREES[attack]
    (attacks.work / "tree.yaml").write_text(text)
    attacks.command(
        "compose", *(pack_of("llama", name) for name in ("alpha", "beta")), "--tree", "tree.yaml", "-o", "out"
    ).refused(words, absent=attacks.work / "out")


def _compose(attacks: Attacks, pack_of: Callable[[str, str], Path]) -> Any:
    return attacks.command(
        "compose",
        *(pack_of("llama", name) for name in ("alpha", "beta")),
        "--recipe",
        "recipe.json",
        "-o",
        "out",
    )
