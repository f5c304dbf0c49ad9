"""The page ``docs/families.md``, made of the table alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .table import Outcome
from .types import CAUSAL

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

REAL: Mapping[tuple[str, str], str] = MappingProxyType(
    {(CAUSAL, "llama"): "test_demo_causal.py, SmolLM2-135M-Instruct"}
)
"""Types of which the suite runs a real checkpoint -> the test that compares its tokens."""

LEVELS = (
    "transformers knows it, and no more",
    "a LoRA of all linear layers trains, is saved, and gives the same outputs on a model that is loaded anew",
    "export writes a bank of two adapters, which its own proof compares with torch",
    "rows of every length, alone and in ragged batches with another adapter in each row, and twelve greedy "
    "tokens of each are those of transformers on each row alone, within 2e-5 of the largest output",
    "the engine answers rows that come one after the other with the same tokens or outputs",
    "a real checkpoint gives the tokens that transformers gives",
)

INTRO = """Every type of model in the installed transformers' own table of causal models, and the main types of every other task,
is built from its configuration as a tiny random model with each of its kinds of layers, and taken through the whole line. Nothing is
chosen by hand: a type that a new release brings is in the table with the next run of `.ci/families`, which made this page. The suite
runs a few of the types again, and fails where the page says something else."""

COLUMNS = """`level` is the highest of the levels above that a type reached with all of those below; `merge` says whether a checkpoint into
which an adapter is merged gives that adapter's outputs; `int4` whether the bundle in four bits differs by no more than what it records;
`pictures` whether OpenAI's client, which asks a server about pictures of several sizes, gets the answers that transformers gives to what the
type's own processor makes of them;
`first failure` is the first stage that fails, and why. Stages after it are tried where they do not need it."""


def render(outcomes: Mapping[tuple[str, str], Outcome]) -> str:
    """The page."""
    rows, versions = list(outcomes.values()), sorted({one.version for one in outcomes.values()} - {"-"})
    groups = {
        group: [one for one in rows if one.group == group]
        for group in dict.fromkeys(one.group for one in rows)
    }
    levels = [f"{number}. {text}" for number, text in enumerate(LEVELS)][1:]
    parts = [
        "# Families and how far they go",
        f"{INTRO} Measured with transformers {' and '.join(versions)}.",
        f"What the levels mean; at level 0 {LEVELS[0]}:",
        "\n".join(levels),
        *_totals(groups),
        "## Type by type",
        COLUMNS,
    ]
    for group, members in groups.items():
        parts += [f"### {group}", _types(members)]
    return "\n\n".join(parts) + "\n"


def _totals(groups: Mapping[str, Sequence[Outcome]]) -> Iterable[str]:
    head = ["kind", "types", "built", *(f"level {level}" for level in range(1, 6)), "merge", "int4"]
    rows = [[group, *_counts(members)] for group, members in groups.items()]
    causal = [one for members in groups.values() for one in members if one.task == CAUSAL]
    built = [one for one in causal if "build" in one.passed]
    whole = [one for one in built if one.level >= 4]
    left = sum(one.level < 0 for members in groups.values() for one in members)
    yield "## How many"
    yield _table([head, *rows, ["all", *_counts([one for members in groups.values() for one in members])]])
    yield (
        f"Of {len(causal)} causal types {sum(one.level >= 0 for one in causal)} were measured. {len(built)} of them are built "
        f"tiny, and {len(whole)} of these ({100 * len(whole) // max(1, len(built))} %) go the whole way to the engine. "
        f"{left or 'None'} of all types {'was' if left == 1 else 'were'} not measured."
    )


def _counts(members: Sequence[Outcome]) -> list[str]:
    passed = [sum(name in one.passed for one in members) for name in ("build", "merge", "int4")]
    reached = [sum(one.level >= level for one in members) for level in range(1, 6)]
    return [str(number) for number in (len(members), passed[0], *reached, *passed[1:])]


def _types(members: Sequence[Outcome]) -> str:
    several = len({one.task for one in members}) > 1
    seeing = ["pictures"] * any("pictures" in one.passed for one in members)
    head = [*(["task"] if several else []), "type", "level", "merge", "int4", *seeing, "first failure"]
    rows = [
        [
            *([one.task] if several else []),
            one.kind,
            "-" if one.level < 0 else str(one.level),
            *("yes" if name in one.passed else "-" for name in ("merge", "int4", *seeing)),
            _escaped(one.reason),
        ]
        for one in members
    ]
    return _table([head, *rows])


def _escaped(text: str) -> str:
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return text


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *others])
