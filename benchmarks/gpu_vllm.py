"""Our engine and vLLM's server on the same card, one after the other, with the requests of
`peers_decode.py`: float16, eight rows, LoRAs of rank 16 at all linear layers.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from contestant_files import Files
from contestants import vllm
from gpu_plan import Plan, Row, Table
from peers_decode import BATCHES, engine, measured, server

FORM = "fp16"
MORE = ("--gpu-memory-utilization", "0.6")
"""Options of vLLM, which asks for nine tenths of a card: other parts of the plan have memory there, too."""


def measure(plan: Plan) -> Table:
    """Tokens a second of each batch and milliseconds to a first token: ours, vLLM's, and how many times
    ours is better.
    """
    files, notes = Files(plan.work / "peers", plan.args.size), list[str]()
    files.base = plan.base
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
            rows.append({"name": name, **measured(wave, names, asked), "memory MB": memory()})
    if len(rows) > 1:
        *ours, peer = rows
        for one in ours:
            ratios = {
                what: one[what] / peer[what] if what in BATCHES else peer[what] / one[what]
                for what in one
                if what not in ("name", "memory MB")
            }
            rows.append({"name": f"{one['name']} over vLLM", **ratios, "memory MB": None})
    return Table(rows, notes)


def _contestants(
    plan: Plan, files: Files, notes: list[str]
) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    for kind, device in plan.devices.items():
        yield f"ours, {kind}", engine(files, FORM, device)
    given = plan.args.vllm
    program = None if given is None else shutil.which(given)
    if program is not None:
        yield (
            "vLLM",
            server(vllm(FORM, "float16", program, *(MORE if plan.on_card else ())), files, files.folder),
        )
    elif given is None:
        notes.append("vLLM was not measured: --vllm names the Python of an environment that has it")
    else:
        notes.append(f"vLLM was not measured: there is no Python at {given}")
