"""The plan for a card (``benchmarks/gpu.py``): all of it in small on the CPU, what only ONNX Runtime's CUDA
provider takes on the hollow CUDA, whose numbers mean nothing, and PagedAttention against the formula of its
documentation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hollow import cuda

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_moe
import gpu_paged
import gpu_vllm
from decode import build_base
from engine import bundles
from gpu_plan import BoundGraph, table_of
from paged_graph import BOUNDS, LENGTHS, PAST_LENGTHS, TABLE, in_standard_operators, replace_by_paged

from adapterpack.runtime.providers.device import Device
from adapterpack.runtime.providers.kernels import kernels_of, nodes_without_kernel

SMALL = {
    "--size": "tiny",
    "--runs": "2",
    "--forms": "float16",
    "--prefill": "16",
    "--tokens": "4",
    "--loads": "1",
    "--contexts": "40",
    "--adapters": "2",
    "--families": "gemma2",
    "--models": "1",
}
Parts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the plan, which its runs share."""
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def run(files: Path) -> Callable[..., Parts]:
    """Runs parts of the plan in small, and returns their tables."""

    def plan(*options: str, environment: dict[str, str] | None = None) -> Parts:
        script = Path(gpu_moe.__file__).with_name("gpu.py")
        command = [sys.executable, script, *chain(*SMALL.items()), "--rows", "1", "2", "--files", files]
        done = subprocess.run(
            [*command, "--json", *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found: Parts = json.loads(done.stdout)["parts"]
        return found

    return plan


def numbers(rows: Sequence[dict[str, Any]], column: str) -> list[float]:
    """A column, in which nothing is missing."""
    found = [row[column] for row in rows]
    assert found and all(isinstance(number, float) for number in found), (column, found)
    return found


def test_the_whole_plan_runs_in_small_on_the_cpu(run: Callable[..., Parts]) -> None:
    """Every part has its table; errors are those of float32 and float16, and what is not measured is
    named.
    """
    parts = run("--provider", "cpu")
    assert [*parts] == ["engine", "moe", "paged", "hot", "vllm", "tolerance"]
    rows = {name: part["rows"] for name, part in parts.items()}
    notes = {name: part["notes"] for name, part in parts.items() if part["notes"]}
    assert [row["pass"] for row in rows["engine"]] == ["1 rows", "2 rows", "16 tokens"]
    assert min(numbers(rows["engine"], "one ms")) > 0 < rows["engine"][1]["mixed ms"]
    for form in gpu_moe.CONTESTANTS:
        assert max(numbers(rows["moe"], f"{form} error")) < 2e-6
    assert max(numbers(rows["paged"], "difference")) < 2e-6
    assert {row["blocks of 16 ms"] for row in rows["paged"]} == {None}
    hot = rows["hot"][0]
    assert 0 < hot["load ms"] <= hot["to first token ms"]
    assert hot["longest pause ms"] > 0
    assert rows["vllm"][0]["name"] == "ours, plain"
    assert 1e-6 < rows["tolerance"][0]["plain of float64"] < 1e-2
    assert [*notes] == ["paged", "vllm"]
    assert "PagedAttention does not run" in notes["paged"][0]
    assert notes["vllm"] == ["vLLM was not measured: --vllm names the Python of an environment that has it"]
    assert all(table_of(table) for table in rows.values())


@pytest.mark.skipif(
    not cuda.provider_libraries() or not all(map(shutil.which, cuda.TOOLS)),
    reason="this build of ONNX Runtime has no CUDA provider, or there is no compiler",
)
def test_steps_are_captured_on_the_hollow_card(run: Callable[..., Parts], tmp_path: Path) -> None:
    """ONNX Runtime's CUDA provider opens the graphs with PagedAttention, takes their inputs, and captures
    them, and an adapter is loaded beside a captured step.
    """
    environment = cuda.environment(cuda.build(tmp_path))
    parts = run("--provider", "cuda", "--parts", "engine", "paged", "hot", environment=environment)
    assert not any(part["notes"] for part in parts.values())
    for part, column in (("engine", "one ms"), ("paged", "blocks of 16 ms"), ("hot", "longest pause ms")):
        rows = parts[part]["rows"]
        assert {row["steps"] for row in rows} == {"plain", "captured"}
        assert min(numbers(rows, column)) > 0


@pytest.mark.fast
def test_cuda_has_a_kernel_for_every_node_of_the_banks_graphs() -> None:
    table = kernels_of("cuda")
    assert table is not None
    for form in gpu_moe.CONTESTANTS:
        for width, out in ((8, 8), (8, 12), (12, 8)):
            graph = gpu_moe.layer_graph(form, width, out, 3, 4, "float16")
            missing = nodes_without_kernel(onnx.load_from_string(graph), table)
            assert {unfit.node.operator for unfit in missing} <= {"Constant"}  # which becomes a weight


@pytest.mark.fast
def test_ratios_to_vllm_are_there_where_it_is() -> None:
    """Tokens a second are better where there are more, first tokens where they come sooner."""
    rows = [
        {"name": name, "8 mixed": speed, "first token after 16, base": first, "host MB": 100}
        for name, speed, first in (
            ("ours, plain", 50.0, 4.0),
            ("ours, captured", 80.0, 2.0),
            ("vLLM", 40.0, 3.0),
        )
    ]
    assert [[*row.values()] for row in gpu_vllm.over_vllm(rows)] == [
        ["ours, plain over vLLM", 1.25, 0.75, None],
        ["ours, captured over vLLM", 2.0, 1.5, None],
    ]
    assert gpu_vllm.over_vllm(rows[:2]) == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny Llama alone, in float32."""
    folder = tmp_path_factory.mktemp("alone")
    build_base(folder / "base", "tiny")
    return bundles(folder, folder / "base", [], None, kinds=["slotless"])["slotless"]


def test_cuda_has_a_kernel_for_every_node_of_the_paged_graph(alone: Path) -> None:
    """In float16; of float32 the table says what ONNX Runtime does."""
    table = kernels_of("cuda")
    assert table is not None
    missing = [*nodes_without_kernel(onnx.load_from_string(gpu_paged.paged_model(alone)), table)]
    assert {unfit.node.operator for unfit in missing} == {"PagedAttention"}
    assert "bfloat16, float16" in missing[0].reason


def test_tokens_of_several_rows_in_one_paged_pass_are_those_of_each_row_alone(alone: Path) -> None:
    """Three rows of other lengths read one, four and two tokens in one pass, from blocks in random order;
    each gets the logits, and leaves the keys and values, that GroupQueryAttention gives it alone.
    """
    rng, device = np.random.default_rng(4), Device(provider="cpu")
    past, counts, size, each = np.array([9, 0, 23]), np.array([1, 4, 2]), 8, 4
    model = ir.load(alone / "decoder.onnx")
    caches = {
        value.name: rng.standard_normal((3, value.shape[1], size * each, value.shape[3])).astype(np.float32)
        for value in model.graph.inputs
        if value.name.startswith("past_key_values")
    }
    presents = {f"present{name.removeprefix('past_key_values')}": name for name in caches}
    ids = [rng.integers(1, 60, count) for count in counts]
    vocabulary = next(iter(model.graph.outputs)).shape[2]
    table = rng.permutation(3 * each)

    def logits_of(
        graph: Path | bytes, feeds: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        kept = feeds["logits_positions"].shape[1]
        outputs = {"logits": ((1, kept, vocabulary), np.float32)}
        outputs |= {name: (feeds[cache].shape, np.float32) for name, cache in presents.items()}
        bound = BoundGraph(graph, device, feeds, outputs, folder=None if isinstance(graph, Path) else alone)
        return bound.result("logits")[0], {name: bound.result(name) for name in presents}

    def in_blocks(cache: np.ndarray) -> np.ndarray:
        pool = np.empty((3 * each, size, cache.shape[1], cache.shape[3]), np.float32)
        pool[table] = cache.swapaxes(1, 2).reshape(-1, *pool.shape[1:])
        return pool

    found, pools = logits_of(
        gpu_paged.paged_model(alone, documented=True),
        {
            "input_ids": np.concatenate(ids)[None],
            "logits_positions": np.arange(counts.sum())[None],
            LENGTHS: np.array([0, *counts.cumsum()], np.int32),
            PAST_LENGTHS: past.astype(np.int32),
            TABLE: table.reshape(3, each).astype(np.int32),
            BOUNDS: np.zeros(2, np.int32),
            **{name: in_blocks(cache) for name, cache in caches.items()},
        },
    )
    left = {name: caches[cache].copy() for name, cache in presents.items()}
    for row, logits in enumerate(np.split(found, counts.cumsum()[:-1])):
        end = past[row] + counts[row]
        expected, after = logits_of(
            alone / "decoder.onnx",
            {
                "input_ids": ids[row][None],
                "logits_positions": np.arange(counts[row])[None],
                "seqlens_k": np.array([end - 1], np.int32),
                "total_sequence_length": np.array(end, np.int32),
                **{name: cache[row : row + 1] for name, cache in caches.items()},
            },
        )
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        for name, cache in after.items():
            left[name][row, :, past[row] : end] = cache[0, :, past[row] : end]
    for name, cache in left.items():
        np.testing.assert_allclose(pools[name], in_blocks(cache), rtol=1e-4, atol=1e-5)


def test_what_paged_attention_lacks_is_refused(alone: Path) -> None:
    model = ir.load(alone / "decoder.onnx")
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    node.attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    with pytest.raises(ValueError, match=f"PagedAttention cannot stand for {node.name}"):
        replace_by_paged(model)
    model = ir.load(alone / "decoder.onnx")
    replace_by_paged(model)
    with pytest.raises(ValueError, match="no GroupQueryAttention"):
        replace_by_paged(model)
    node = next(node for node in model.graph if node.op_type == "PagedAttention")
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)
    with pytest.raises(ValueError, match="a window, a cap, sinks"):
        in_standard_operators(model)
