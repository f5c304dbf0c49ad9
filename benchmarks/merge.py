"""Merging a LoRA into a checkpoint: adapterpack beside PEFT's merge_and_unload + save_pretrained, and ``cp
-r`` as the floor.

Each run is a process of its own, in turn, after one warm-up each, and counts from its start to its exit. All
read the same base and the same pack. ``cp`` returns before its bytes are on the disk; beside it stands a
merge that does so, too (``--no-sync``), and beside a merge as it is by default, a ``cp`` followed by
``sync``.

    python benchmarks/merge.py --size 1.1b --built-dtype bfloat16 --double
    python benchmarks/merge.py --model models/SmolLM2-135M --json
    python benchmarks/merge.py --size 135m --onnx
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
    },
    "1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "1.2b": {  # the shape of Llama 3.2 1B
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {  # and of Llama 3.1 8B
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
    },
}
SHARD = 800 << 20
_ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
"""As an installed package runs: compiled once, not at every start."""
LINEAR = ("_proj.weight", ".query.weight", ".key.weight", ".value.weight", ".dense.weight")


def peft(base: str, pack: str, out: str, dtype: str | None) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM

    started = time.perf_counter()
    config = json.loads((Path(base) / "config.json").read_text())
    kind = AutoModelForCausalLM if "CausalLM" in str(config.get("architectures")) else AutoModel
    model = kind.from_pretrained(base, dtype=getattr(torch, dtype) if dtype else "auto")
    PeftModel.from_pretrained(model, pack).merge_and_unload().save_pretrained(out)
    return time.perf_counter() - started


ON_DISK = "adapterpack, on disk"
OURS = {
    "adapterpack": ("--no-sync",),
    ON_DISK: (),
    "adapterpack, base read whole": ("--no-sync", "--verify", "full"),
}
"""Name -> options of the command. ``cp`` leaves the writing to the system, so what it is compared with does,
too.
"""


def build_base(folder: Path, size: str, dtype: str, layers: int | None = None) -> None:
    """A random Llama in shards of about 800 MB, written tensor by tensor."""
    from adapterpack.io import safetensors as st

    sizes = {**SIZES[size], **({"num_hidden_layers": layers} if layers else {})}
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    narrow = hidden // heads * sizes.get("num_key_value_heads", heads)
    shapes = {"model.embed_tokens.weight": (sizes["vocab_size"], hidden)}
    for layer in range(sizes["num_hidden_layers"]):
        attention = {
            "q": (hidden, hidden),
            "k": (narrow, hidden),
            "v": (narrow, hidden),
            "o": (hidden, hidden),
        }
        shapes |= {
            f"model.layers.{layer}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()
        }
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
        shapes |= {
            f"model.layers.{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")
        }
    shapes |= {"model.norm.weight": (hidden,)}
    if not sizes.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (sizes["vocab_size"], hidden)
    numbers, code = np.random.default_rng(0), {"float32": "F32", "bfloat16": "BF16"}[dtype]
    pool = (numbers.standard_normal((1 << 24) + 1, np.float32) * np.float32(0.02)).astype(st.DTYPES[code])
    groups: list[list[str]] = [[]]
    weight = 0
    for name, shape in shapes.items():
        weight += int(np.prod(shape)) * st.DTYPES[code].itemsize
        if weight > SHARD and groups[-1]:
            groups.append([])
            weight = int(np.prod(shape)) * st.DTYPES[code].itemsize
        groups[-1].append(name)
    folder.mkdir()
    where = {}
    for number, names in enumerate(groups, 1):
        file = (
            f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        )
        tensors = {name: _random(numbers, pool, shapes[name]) for name in names}
        st.write(folder / file, tensors, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": where})
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _random(numbers: np.random.Generator, pool: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of the pool from a random one on: as quick as a copy."""
    array = np.resize(np.roll(pool, numbers.integers(len(pool))), shape)
    return array + array.dtype.type(1) if len(shape) == 1 else array  # the factors of norms are near one


def build_pack(base: Path, folder: Path, rank: int, most: int | None = None, seed: int = 0) -> int:
    """A random LoRA at every linear layer, or at the first ``most``, written as a pack; returns the number of
    sites.
    """
    from adapterpack import LoRA
    from adapterpack.adapter_methods import Site, get
    from adapterpack.base.checkpoint import Checkpoint
    from adapterpack.manifest import manifest as m
    from adapterpack.pack.pack import build

    checkpoint, rng = Checkpoint(base), np.random.default_rng(seed)
    adapters, weights = {}, {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(LINEAR) and len(info.shape) == 2 and (most is None or len(adapters) < most):
            site = Site(name.removesuffix(".weight"), info.shape[1], info.shape[0])
            shapes = {"lora_A": (rank, site.in_features), "lora_B": (site.out_features, rank)}
            adapters[site] = (
                LoRA(r=rank),
                {key: rng.normal(0, 0.02, shape).astype(np.float32) for key, shape in shapes.items()},
            )
            weights[site.path] = name
    task = m.PackTask("text-generation")
    pack_base = m.Base(
        "base", None, None, structure=checkpoint.structure, content=checkpoint.content, probe=checkpoint.probe
    )
    build(folder.name, get("lora"), adapters, task=task, base=pack_base, weights=weights).write(folder)
    return len(adapters)


def build_graph(base: Path, folder: Path) -> int:
    """An ONNX file with a MatMul for every linear layer of ``base`` and a Gather for its embedding, as
    exporters write them: weights transposed, in a file of external data, one after the other. Returns the
    bytes of that file.
    """
    # the protobuf itself, so that the weights are never held
    from onnx import TensorProto, helper  # noqa: TID251

    from adapterpack.base.checkpoint import Checkpoint

    folder.mkdir()
    checkpoint, initializers, nodes, widths, outputs = Checkpoint(base), [], [], set(), []
    with (folder / "model.onnx.data").open("wb") as data:
        for name, info in checkpoint.tensors.items():
            if len(info.shape) != 2:
                continue
            table = name.endswith("embed_tokens.weight")
            value = checkpoint.read(name) if table else checkpoint.read(name).T
            tensor = TensorProto(
                name=name, data_type=TensorProto.FLOAT, dims=value.shape, data_location=TensorProto.EXTERNAL
            )
            for key, entry in (
                ("location", "model.onnx.data"),
                ("offset", data.tell()),
                ("length", value.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(entry))
            data.write(np.ascontiguousarray(value).data)
            initializers.append(tensor)
            if table:
                nodes.append(helper.make_node("Gather", [name, "ids"], [f"{name}/y"]))
            else:
                nodes.append(helper.make_node("MatMul", [f"x{len(value)}", name], [f"{name}/y"]))
                widths.add(len(value))
            outputs.append(
                helper.make_tensor_value_info(f"{name}/y", TensorProto.FLOAT, ["n", value.shape[1]])
            )
        size = data.tell()
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"]),
        *(
            helper.make_tensor_value_info(f"x{width}", TensorProto.FLOAT, ["n", width])
            for width in sorted(widths)
        ),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "llama", inputs, outputs, initializers),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return size


def graph_compared(base: Path, merged: Path, before: Path, after: Path) -> dict[str, int]:
    """Bytes of the folded graph's data that differ from the merged checkpoint, in weights that changed and in
    those that did not.
    """
    import onnx

    from adapterpack.base.checkpoint import Checkpoint

    old, new = Checkpoint(base), Checkpoint(merged)
    changed = untouched = 0
    data = np.memmap(after / "model.onnx.data", np.uint8, "r")
    for tensor in onnx.load(str(after / "model.onnx"), load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        value = new.read(tensor.name)
        expected = (
            np.ascontiguousarray(value if tensor.name.endswith("embed_tokens.weight") else value.T)
            .view(np.uint8)
            .reshape(-1)
        )
        wrong = int(np.count_nonzero(data[int(where["offset"]) :][: int(where["length"])] != expected))
        touched = not np.array_equal(value, old.read(tensor.name))
        changed, untouched = changed + wrong * touched, untouched + wrong * (not touched)
    same = (before / "model.onnx").read_bytes() == (after / "model.onnx").read_bytes()
    return {"changed_unlike_checkpoint": changed, "untouched_unlike_base": untouched + (not same)}


def measure_graph(base: Path, work: Path, name: str, rank: int, most: int | None = None) -> dict[str, Any]:
    """One fold into a graph of ``base``: time, memory of its own, and whether the bytes are right."""
    pack, graph, out = work / f"{name}-pack", work / f"{name}-graph", work / f"{name}-folded"
    sites, size = build_pack(base, pack, rank, most), build_graph(base, graph)
    command = [
        sys.executable,
        "-m",
        "adapterpack",
        "merge",
        str(graph / "model.onnx"),
        str(pack),
        "--base",
        str(base),
        "-o",
        str(out),
    ]
    figures = once(command)
    merged = work / f"{name}-merged"
    once(command_of("adapterpack", base, pack, merged, None))
    found = {"bytes": size, "sites": sites, **figures, **graph_compared(base, merged, graph, out)}
    for folder in (graph, out, merged):
        shutil.rmtree(folder)
    return found


def once(command: list[str]) -> dict[str, float]:
    """One run in a fresh process, from its start to its exit; the peak of its own (anonymous) memory is
    sampled every few milliseconds.
    """
    os.sync()  # what the run before left to be written is not for this one to wait for
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, env=_ENVIRONMENT)
        peak = 0
        while child.poll() is None:
            try:
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            except OSError:
                lines = []
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.004)
        process = time.perf_counter() - started
        if child.returncode:
            said.seek(0)
            raise SystemExit(said.read())
    return {"process": process, "anonymous_mb": peak / 1024}


def command_of(who: str, base: Path, pack: Path, out: Path, dtype: str | None) -> list[str]:
    asked = ["--dtype", dtype] if dtype else []
    if who == "peft":
        return [sys.executable, __file__, "--worker", str(base), str(pack), str(out), *asked]
    return [
        sys.executable,
        "-m",
        "adapterpack",
        "merge",
        str(base),
        str(pack),
        "-o",
        str(out),
        *OURS[who],
        *asked,
    ]


def copy(base: Path, out: Path, on_disk: bool) -> float:
    # just before, as for the others: memory that was freed is quicker to write to
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # see above
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    if on_disk:
        subprocess.run(["sync", "-f", str(out)], check=True)
    return time.perf_counter() - started


def compared(base: Path, pack: Path, ours: Path, peer: Path) -> dict[str, int]:
    """Bytes that differ from the formula (float32, the whole matrix at once, rounded once) and from PEFT's
    output.
    """
    from adapterpack import load
    from adapterpack.base.checkpoint import Checkpoint
    from adapterpack.io.threads import one_thread_each

    a, b, c = Checkpoint(ours), Checkpoint(peer), Checkpoint(base)
    deltas = {adapter.weight: adapter for adapter in load(pack).adapters()}
    formula = other = 0
    for name in a.tensors:
        mine, expected = a.read(name), c.read(name)
        if (adapter := deltas.get(name)) is not None:
            with one_thread_each():  # with several, OpenBLAS rounds a few products in a million otherwise
                change = (
                    np.float32(adapter.config.scale) * adapter.params["lora_B"] @ adapter.params["lora_A"]
                )
            expected = (expected.astype(np.float32) + change).astype(mine.dtype)
        formula += int(np.count_nonzero(mine.view(np.uint8) != expected.view(np.uint8)))
        if a.tensors[name].dtype == b.tensors[name].dtype:
            other += int(np.count_nonzero(mine.view(np.uint8) != b.read(name).view(np.uint8)))
    return {"bytes_unlike_formula": formula, "bytes_unlike_peft": other}


def measure(base: Path, work: Path, runs: int, rank: int, dtype: str | None, quick: bool) -> dict[str, Any]:
    pack = work / "pack"
    sites = build_pack(base, pack, rank)
    found: dict[str, list[dict[str, float]]] = {}
    copies: dict[str, list[float]] = {"cp -r": [], "cp -r, on disk": []}
    for run in range(runs + 1):
        for who in [*OURS, "peft"]:
            if quick and who == ON_DISK:
                continue
            for name, on_disk in (("cp -r", False), ("cp -r, on disk", True)):
                if who == {"cp -r": "adapterpack", "cp -r, on disk": ON_DISK}[name]:
                    seconds = copy(base, work / "copy", on_disk)
                    copies[name] += [seconds] * bool(run)
            shutil.rmtree(work / who, ignore_errors=True)  # as in copy, and for its reason
            result = once(command_of(who, base, pack, work / who, dtype))
            if run:  # the first of each warms the file cache
                found.setdefault(who, []).append(result)
    for who in OURS.keys() - {"adapterpack"}:
        shutil.rmtree(work / who, ignore_errors=True)
    figures = {
        who: {key: median(result[key] for result in results) for key in results[0]}
        for who, results in found.items()
    }
    floors = {name: median(seconds) for name, seconds in copies.items() if seconds}
    ours = figures["adapterpack"]["process"]
    return {
        "benchmark": "merge",
        "base": base.name,
        "bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "sites": sites,
        "rank": rank,
        "dtype": dtype,
        "runs": runs,
        "seconds": figures | {name: {"process": seconds} for name, seconds in floors.items()},
        "ratio_peft": figures["peft"]["process"] / ours,
        "ratio_cp": ours / floors["cp -r"],
        **({} if quick else {"ratio_cp_on_disk": figures[ON_DISK]["process"] / floors["cp -r, on disk"]}),
        **compared(base, pack, work / "adapterpack", work / "peft"),
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['base']}: {result['bytes'] / 1e6:.0f} MB, {result['sites']} sites, rank "
        f"{result['rank']}; median of {result['runs']}"
    )
    for who, r in result["seconds"].items():
        memory = f"   anonymous peak {r['anonymous_mb']:5.0f} MB" if "anonymous_mb" in r else ""
        print(f"  {who:46} {r['process']:6.2f} s{memory}")
    if "doubled" in result:
        print(
            "  twice the layers, as large an adapter: anonymous peak "
            f"{result['doubled']['anonymous_mb']:.0f} MB"
        )
    disk = f", both on disk {result['ratio_cp_on_disk']:.2f}" if "ratio_cp_on_disk" in result else ""
    print(
        f"  PEFT / adapterpack {result['ratio_peft']:.1f}; adapterpack / cp -r {result['ratio_cp']:.2f}{disk}"
    )
    print(
        f"  bytes unlike the formula {result['bytes_unlike_formula']}, unlike PEFT's "
        f"{result['bytes_unlike_peft']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint folder; by default a random Llama is built")
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument(
        "--built-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="the dtype of the Llama that is built",
    )
    parser.add_argument("--dtype", help="the dtype of the output")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="leave out the runs that wait for the disk")
    parser.add_argument(
        "--work",
        type=Path,
        help="where to build and write; by default the system's folder for temporary files",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--double",
        action="store_true",
        help="merge as large an adapter into twice as many layers, for the memory",
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="fold into an ONNX graph instead, and into one twice as large, for the memory",
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        peft(*args.worker, args.dtype)
        return
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        base, work = args.model or Path(folder) / f"llama-{args.size}", Path(folder)
        if args.model is None:
            build_base(base, args.size, args.built_dtype)
        if args.onnx:
            build_base(work / "double", args.size, "float32", 2 * SIZES[args.size]["num_hidden_layers"])
            one = measure_graph(base, work, "one", args.rank)
            result = {
                "benchmark": "merge-onnx",
                "one": one,
                "double": measure_graph(work / "double", work, "two", args.rank, one["sites"]),
            }
            print(json.dumps(result, indent=2))
            return
        result = measure(base, work, args.runs, args.rank, args.dtype, args.quick)
        if args.double:
            shutil.rmtree(work / "peft")
            shutil.rmtree(work / "adapterpack")
            build_base(
                work / "double", args.size, args.built_dtype, 2 * SIZES[args.size]["num_hidden_layers"]
            )
            build_pack(work / "double", work / "double-pack", args.rank, most=result["sites"])
            result["doubled"] = once(
                command_of("adapterpack", work / "double", work / "double-pack", work / "out", args.dtype)
            )
    print(json.dumps(result, indent=2)) if args.json else show(result)


if __name__ == "__main__":
    main()
