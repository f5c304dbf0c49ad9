"""What exporting costs, beside the other exporters: seconds, memory, size, and how fast each graph decodes.

SmolLM2-135M in float32, text generation with a cache. Every contestant runs in a process of its own, in turn,
from its start to its end; ``bank`` has two adapters (r = 16, all linear layers) in it. Ours compares its
graph with torch in that time, which none of the others does: ``proof s`` is how long that takes, with the
import of the model's torch code, and with the writing that goes on beside it. Memory is that of the largest
process: all that is resident, with the pages of files that the system may take back, and what is the
process's own. Decoding is greedy, after a prompt of 32 tokens. Peers that need another build of ONNX Runtime
are given as virtual environments with torch and transformers; Olive calls onnxruntime-genai's builder there,
or torch.onnx.

    python benchmarks/export.py --genai VENV --olive VENV
    python benchmarks/export.py --only adapterpack mobius --runs 5
    python benchmarks/export.py --genai VENV --olive VENV --slow      # also the exporters that trace: minutes
    each
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

OURS = ("adapterpack", "adapterpack bank")
SLOW = ("torch.onnx", "transformers.exporters", "olive torch.onnx")
CONTESTANTS = (*OURS, "mobius", "genai builder", "olive", *SLOW)
PROMPT, STEPS = 32, 64


def mobius_graph(base: Path, out: Path, packs: list[Path]) -> None:
    import mobius
    import onnx_ir as ir

    model = mobius.build(str(base), task="text-generation", execution_provider="default", dtype="f32")[
        "model"
    ]
    out.mkdir()
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")


def torch_graph(base: Path, out: Path, packs: list[Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    width = config.head_dim

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            answer = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=True,
            )
            return (
                answer.logits,
                *(state for layer in answer.cache.layers for state in (layer.keys, layer.values)),
            )

    names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    past = [torch.zeros(2, heads, 3, width) for _ in names]
    ids = torch.ones((2, 4), dtype=torch.int64)
    dim = torch.export.Dim
    axes = [
        {0: dim("batch"), 1: dim("sequence")},
        {0: dim("batch"), 1: dim.DYNAMIC},
        {0: dim("batch"), 1: dim("sequence")},
    ]
    program = torch.onnx.export(
        Flat(),
        (ids, torch.ones((2, 7), dtype=torch.int64), ids, *past),
        dynamo=True,
        verbose=False,
        input_names=[
            "input_ids",
            "attention_mask",
            "position_ids",
            *(f"past_key_values.{name}" for name in names),
        ],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=(*axes, tuple({0: dim("batch"), 2: dim("past")} for _ in past)),
    )
    out.mkdir()
    program.save(out / "model.onnx", external_data=True)


def transformers_graph(base: Path, out: Path, packs: list[Path]) -> None:
    import onnx_ir as ir
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    example = {
        "input_ids": torch.ones((2, 7), dtype=torch.int64),
        "attention_mask": torch.ones((2, 7), dtype=torch.int64),
    }
    out.mkdir()
    ir.save(
        OnnxExporter().export(model, example, OnnxConfig(dynamic=True)).program,
        out / "model.onnx",
        external_data="model.onnx.data",
    )


MAKERS: dict[str, Any] = {
    "mobius": mobius_graph,
    "torch.onnx": torch_graph,
    "transformers.exporters": transformers_graph,
}


def command(who: str, base: Path, out: Path, packs: list[Path], venvs: dict[str, Path | None]) -> list[str]:
    venv = venv_of(who, venvs)
    if who in OURS:
        what = ["--mode", "folded"] if who == "adapterpack" else ["--mode", "bank", *map(str, packs)]
        return [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "adapterpack",
            "export",
            str(base),
            *what,
            "-o",
            str(out),
        ]
    if who == "genai builder":
        return [
            str(each)
            for each in (
                venv / "bin" / "python",
                "-W",
                "ignore",
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                base,  # type: ignore[operator]
                "-o",
                out,
                "-p",
                "fp32",
                "-e",
                "cpu",
                "-c",
                out.parent / "cache",
            )
        ]
    if who in {"olive", "olive torch.onnx"}:
        way = (
            ["--use_model_builder", "--precision", "fp32"]
            if who == "olive"
            else ["--use_dynamo_exporter", "--torch_dtype", "float32"]
        )
        return [
            str(venv / "bin" / "olive"),
            "capture-onnx-graph",
            "-m",
            str(base),
            "-o",
            str(out),
            "--disable_telemetry",
            *way,
        ]  # type: ignore[operator]
    return [sys.executable, "-W", "ignore", __file__, "--make", who, str(base), str(out), *map(str, packs)]


def venv_of(who: str, venvs: dict[str, Path | None]) -> Path | None:
    return venvs.get(who.split(maxsplit=1)[0])


WATCH = """
import resource, subprocess, sys, time
child, own = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL), 0
while child.poll() is None:
    try:
        with open(f"/proc/{child.pid}/status") as file:
            own = max(own, *(int(line.split()[1]) for line in file if line.startswith("RssAnon")), 0)
    except (OSError, ValueError, TypeError):
        pass
    time.sleep(0.02)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, own)
sys.exit(child.returncode)
"""


def made(who: str, base: Path, out: Path, packs: list[Path], venvs: dict[str, Path | None]) -> dict[str, Any]:
    """Runs one contestant; its own peak memory is that of the largest of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1"}
    environment |= {"PYTHONPATH": ""} if venv_of(who, venvs) else {}
    started = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", WATCH, *command(who, base, out, packs, venvs)],
        capture_output=True,
        text=True,
        check=False,
        cwd=out.parent,
        env=environment,
    )
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    graph = next(out.rglob("*.onnx"), None)
    if run.returncode or graph is None:
        return {
            "failed": run.stderr.strip().splitlines()[-1][:200]
            if run.stderr.strip()
            else f"exit code {run.returncode}"
        }
    proof, (peak, own) = re.search(r"the proof took ([0-9.]+) s", run.stderr), map(int, run.stdout.split())
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "proof_seconds": float(proof[1]) if proof else None,
        "peak_mb": peak / 1024,
        "own_mb": own / 1024,
        "graph_mb": graph.stat().st_size / 1e6,
        "data_mb": sum(path.stat().st_size for path in out.rglob("*.data")) / 1e6,
        "tokens_per_second": {rows: decoding(graph, rows) for rows in (1, 4)},
    }


def decoding(graph: Path, rows: int) -> float | None:
    """New tokens a second of all rows, by the median of ``STEPS`` steps after a prompt of ``PROMPT``; None
    for a graph without a cache.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    caches = [name for name in inputs if name.startswith("past_key_values.")]
    if not caches:
        return None
    names = [value.name for value in session.get_outputs()]
    past = {name: np.zeros((rows, 3, 0, 64), np.float32) for name in caches}
    ids = np.random.default_rng(0).integers(3, 49000, (rows, PROMPT))
    mask, seconds = np.ones((rows, 0), np.int64), []
    for _ in range(STEPS + 1):
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": np.clip(mask.cumsum(1) - 1, 0, None)[:, -ids.shape[1] :],
            "adapter_ids": np.arange(rows) % 3,
        }
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in {**feeds, **past}.items()
            if name in inputs and isinstance(array, np.ndarray)
        }
        values |= {name: value for name, value in past.items() if not isinstance(value, np.ndarray)}
        started = time.perf_counter()
        found = dict(zip(names, session.run_with_ort_values(names, values), strict=True))
        seconds.append(time.perf_counter() - started)
        past = {name: found[name.replace("past_key_values", "present")] for name in caches}
        ids = found["logits"].numpy()[:, -1:].argmax(-1)
    return rows / float(np.median(seconds[1:]))


def measure(who: list[str], runs: int, venvs: dict[str, Path | None]) -> dict[str, Any]:
    from decode import build_pack

    from adapterpack.demos import SMOLLM2, fetch

    base = fetch(SMOLLM2)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        packs = [work / "one", work / "two"]
        for seed, pack in enumerate(packs):
            build_pack(base, pack, 16, seed)
        for number in range(runs):
            for name in who:
                found = made(name, base, work / f"{name.replace(' ', '-')}-{number}", packs, venvs)
                print(f"{name}: {found}", file=sys.stderr)
                if "failed" in found or found["seconds"] < results.get(name, {}).get("seconds", float("inf")):
                    results[name] = found
                subprocess.run(["rm", "-rf", str(work / f"{name.replace(' ', '-')}-{number}")], check=True)
    return results


def show(results: dict[str, Any]) -> None:
    ours = results.get("adapterpack", {}).get("seconds")
    print(
        f"{'':24}{'s':>7}{'CPU s':>8}{'proof s':>9}{'peak MB':>9}{'own MB':>8}{'graph MB':>10}{'data MB':>9}"
        f"{'b1 tok/s':>10}{'b4 tok/s':>10}{'s / ours':>10}"
    )
    for name, found in results.items():
        if "failed" in found:
            print(f"{name:24}failed: {found['failed']}")
            continue
        decode = [
            f"{value:10.1f}" if value else f"{'-':>10}" for value in found["tokens_per_second"].values()
        ]
        ratio = f"{found['seconds'] / ours:10.2f}" if ours else ""
        proof = f"{found['proof_seconds']:9.1f}" if found["proof_seconds"] else f"{'-':>9}"
        print(
            f"{name:24}{found['seconds']:7.1f}{found['cpu_seconds']:8.1f}{proof}{found['peak_mb']:9.0f}{found['own_mb']:8.0f}"
            f"{found['graph_mb']:10.1f}{found['data_mb']:9.0f}{''.join(decode)}{ratio}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--genai",
        type=Path,
        metavar="VENV",
        help="an environment with onnxruntime-genai, torch and transformers",
    )
    parser.add_argument("--olive", type=Path, metavar="VENV", help="the same with olive-ai")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--runs", type=int, default=1, help="the fastest counts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--make", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        who, base, out, *packs = args.make
        MAKERS[who](Path(base), Path(out), [Path(pack) for pack in packs])
        return
    venvs = {"genai": args.genai, "olive": args.olive}
    able = [name for name in CONTESTANTS if name.split()[0] not in venvs or venv_of(name, venvs)]
    who = [
        name
        for name in args.only or CONTESTANTS
        if name in able and (args.only or args.slow or name not in SLOW)
    ]
    results = measure(who, args.runs, venvs)
    print(json.dumps(results, indent=2)) if args.json else show(results)


if __name__ == "__main__":
    main()
