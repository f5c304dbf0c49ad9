"""What the parts of `gpu.py` share: the plan with its files and devices, graphs whose values stay on the
device, and tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from engine import bundles, random_packs

from adapterpack.runtime.ort.values import HOST, array_of, empty, value_of
from adapterpack.runtime.providers.device import Device
from adapterpack.runtime.providers.placement import nodes_by_provider
from adapterpack.runtime.providers.provider import CPU
from adapterpack.runtime.providers.resolved_device import resolve

FORMS: dict[str, tuple[str | None, str]] = {
    "float32": (None, "float32"),
    "float16": (None, "float16"),
    "bfloat16": (None, "bfloat16"),
    "int8": ("int8", "float16"),
    "int4": ("int4", "float16"),
}
"""Form of the weights -> scheme of quantization and float type of the graph."""
Row = dict[str, Any]
"""A row of a table: a value for each column, None where nothing was measured."""


@dataclass
class Table:
    """What a part measured, and what must be said about it."""

    rows: list[Row]
    notes: list[str]


@dataclass
class Plan:
    """The options of the command, the folder for its files, and the base."""

    args: argparse.Namespace
    work: Path
    base: Path

    @cached_property
    def devices(self) -> dict[str, Device]:
        """Plain, and on CUDA captured, too. Threads of a model as small as ``tiny`` only wait for each
        other.
        """
        threads = 1 if self.args.size == "tiny" else None
        kinds = {"plain": Device(provider=self.args.provider, threads=threads)}
        if self.args.provider == "cuda":
            kinds["captured"] = Device(provider="cuda", threads=threads, capture=True)
        return kinds

    @property
    def on_card(self) -> bool:
        """Whether times are those of a card."""
        return bool(self.args.provider != "cpu")

    @cached_property
    def packs(self) -> list[Path]:
        """A pack for each row, and one that no bundle has."""
        return random_packs(self.base, self.work, self.args.rank, max(self.args.rows) + 1)

    def bundle(self, form: str, kind: str) -> Path:
        """The base alone (``slotless``) or with a ``bank``, in one of the forms."""
        scheme, dtype = FORMS[form]
        return bundles(self.work / form, self.base, self.packs[:-1], scheme, dtype, [kind])[kind]


class BoundGraph:
    """A graph on a device, whose inputs and outputs keep their memory; called, it runs once.

    ``outputs`` are the shapes and dtypes of outputs, ``in_place`` the outputs that are written into an
    input, and ``on_host`` the inputs that kernels read on the host. ``folder`` has the weights of a graph
    that was given as bytes.
    """

    def __init__(
        self,
        graph: Path | bytes,
        device: Device,
        feeds: Mapping[str, np.ndarray],
        outputs: Mapping[str, tuple[Sequence[int], Any]],
        *,
        in_place: Mapping[str, str] | None = None,
        on_host: Collection[str] = (),
        folder: Path | None = None,
    ) -> None:
        resolved = resolve(device)
        options = resolved.session_options()
        if folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folder)
            )
        self._session = resolved.open(graph, options)
        self._binding, self._options = self._session.io_binding(), ort.RunOptions()
        if resolved.captures:
            self._options.add_run_config_entry("gpu_graph_id", "1")
        wanted = {value.name for value in self._session.get_inputs()}
        self._inputs = {
            name: value_of(array, HOST if name in on_host else resolved.memory)
            for name, array in feeds.items()
            if name in wanted
        }
        self._outputs = {
            name: empty(tuple(shape), np.dtype(dtype), resolved.memory)
            for name, (shape, dtype) in outputs.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, source in (in_place or {}).items():
            self._binding.bind_ortvalue_output(name, self._inputs[source])
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self()

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)

    def result(self, name: str) -> np.ndarray:
        """An output of the last run."""
        return np.array(array_of(self._outputs[name]))

    @property
    def on_cpu(self) -> list[str]:
        """The operators that another provider left to the CPU."""
        if self._session.get_providers()[0] == CPU:
            return []
        return sorted({node[2] for node in nodes_by_provider(self._session).get(CPU, [])})


def tried(notes: list[str], what: str, make: Callable[[], BoundGraph]) -> BoundGraph | None:
    """A graph, or None and a note with ONNX Runtime's reason."""
    try:
        return make()
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        reason = " ".join(str(error).split())[:300]
        if (note := f"{what} does not run: {reason}") not in notes:
            notes.append(note)
        return None


def error_of(found: np.ndarray, expected: np.ndarray) -> float | None:
    """The largest difference, relative to the largest number that is expected; None where no number is
    finite, or none is expected.
    """
    most = float(np.abs(expected.astype(np.float64)).max())
    error = float(np.abs(found.astype(np.float64) - expected).max())
    return error / most if most > 0 and np.isfinite([error, most]).all() else None


def worst(errors: Sequence[float | None]) -> float | None:
    """The largest error; None where there is none, or one of them is None."""
    known = [error for error in errors if error is not None]
    return max(known) if known and len(known) == len(errors) else None


def ratio(one: float | None, other: float | None) -> float | None:
    """``one / other``, None where one of them was not measured."""
    return None if one is None or other is None else one / other


def table_of(rows: Sequence[Row]) -> str:
    """The rows as text, a column for each key."""
    if not rows:
        return ""
    lines = [[*rows[0]], *([_written(row[name]) for name in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _written(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
