"""Our engine and vLLM's server on the same card, one after the other, with the requests of
`peers_decode.py`: float16, eight rows, LoRAs of rank 16 at all linear layers.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from contestant_files import Files
from contestants import vllm
from gpu_plan import Plan, Row, Table
from peers_decode import BATCHES, engine, measured, server

FORM, PEER, MEMORY = "fp16", "vLLM", "host MB"
MORE = ("--gpu-memory-utilization", "0.6")
"""Options of vLLM, which asks for nine tenths of a card: other parts of the plan have memory there, too."""


class PlanFiles(Files):
    """The plan's base and its bundle in float16, and adapters that both read."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.work / "peers", plan.args.size)
        self.base, self._plan = plan.base, plan

    def bundle(self, precision: str) -> Path:
        """The bundle of the plan, whatever is asked for."""
        return self._plan.bundle("float16", "bank")


def measure(plan: Plan) -> Table:
    """Tokens a second of each batch and milliseconds to a first token: ours, vLLM's, and how many times
    ours is better.
    """
    files, notes = PlanFiles(plan), list[str]()
    asked = argparse.Namespace(
        size=plan.args.size,
        batches=BATCHES,
        tokens=plan.args.tokens,
        runs=min(plan.args.runs, 5),
        prefill=[plan.args.prefill],
    )
    rows = list[Row]()
    for name, opened in _contestants(plan, files, notes):
        with opened as (wave, names, memory):
            rows.append({"name": name, **measured(wave, names, asked), MEMORY: memory()})
    return Table([*rows, *over_vllm(rows)], notes)


def over_vllm(rows: Sequence[Row]) -> list[Row]:
    """How many times as many tokens a second each of ours makes, and how many times as soon the first comes;
    nothing where vLLM is not among them.
    """
    peer = next((row for row in rows if row["name"] == PEER), None)
    if peer is None:
        return []
    return [
        {
            "name": f"{one['name']} over {PEER}",
            **{
                what: one[what] / peer[what] if what in BATCHES else peer[what] / one[what]
                for what in one
                if what not in ("name", MEMORY)
            },
            MEMORY: None,
        }
        for one in rows
        if one is not peer
    ]


def _contestants(
    plan: Plan, files: Files, notes: list[str]
) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    for kind, device in plan.devices.items():
        yield f"ours, {kind}", engine(files, FORM, device)
    given = plan.args.vllm
    program = None if given is None else shutil.which(given)
    if program is not None:
        yield (
            PEER,
            server(vllm(FORM, "float16", program, *(MORE if plan.on_card else ())), files, files.folder),
        )
    elif given is None:
        notes.append("vLLM was not measured: --vllm names the Python of an environment that has it")
    else:
        notes.append(f"vLLM was not measured: there is no Python at {given}")
