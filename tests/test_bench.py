"""How fast a bundle answers, as ``adapterpack bench`` measures it: of every load, and in terms of a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from notebooks import page_in_notebook

import adapterpack
from adapterpack.errors import ConfigError
from adapterpack.report.bench import bench_report, bench_table

Bundle = Callable[[str, str], Path]


def test_every_load_is_measured(
    base_of: Callable[[str], Path], pack_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Each number of rows with the base, one adapter and several; no figure contradicts the clock around it."""
    bundle = tmp_path / "bundle"
    adapterpack.export(base_of("llama"), [pack_of("llama", name) for name in ("alpha", "beta")], bundle)
    began = time.perf_counter()
    found = adapterpack.bench(bundle, rows=(1, 3), prompt=7, tokens=4, runs=2)
    whole = time.perf_counter() - began
    loads = [(line.rows, line.adapters) for line in found.lines]
    assert loads == [(1, "base"), (1, "alpha"), (3, "base"), (3, "alpha"), (3, "mixed")]
    for line in found.lines:
        assert line.speed is not None and line.step is not None
        assert 0 < line.first_token + 3 * line.step < whole
        assert line.speed == pytest.approx(line.rows / line.step)
        assert line.prompt_speed <= line.rows * 7 / line.first_token
    # the engine's graph has its weights in the ordinary graph's file
    graph = onnx.load(bundle / "decoder.onnx").graph
    weights = sum(onnx.numpy_helper.to_array(one).nbytes for one in graph.initializer)
    assert (found.weights, found.floor) == (weights, weights / found.bandwidth)
    with pytest.raises(adapterpack.AdapterpackError, match="gamma"):
        adapterpack.bench(bundle, ["alpha", "gamma"], prompt=7, tokens=4)
    _, rows = bench_table(found.to_json())
    assert [row[:2] for row in rows] == [[str(rows), name] for rows, name in loads]
    assert "mixed" in bench_report(found.to_json(), "tiny")
    assert "mixed" in page_in_notebook(found)


def test_a_task_without_tokens_has_the_time_of_an_answer(bundle_of: Bundle) -> None:
    """Classifiers take one pass a row; what cannot be measured says why."""
    bundle = bundle_of("bert", "bank")
    found = adapterpack.bench(bundle, rows=(2,), prompt=5, runs=1)
    assert [(line.adapters, line.speed, line.step) for line in found.lines] == [
        (name, None, None) for name in ("base", "alpha", "mixed")
    ]
    assert min(line.first_token for line in found.lines) > 0
    assert bench_table(found.to_json())[0] == ["rows", "adapters", "answer", "tokens/s"]
    with pytest.raises(ConfigError, match="longer than the model can read"):
        adapterpack.bench(bundle, prompt=60, tokens=5)
    with pytest.raises(ConfigError, match="at least 1"):
        adapterpack.bench(bundle, rows=(0,))
