"""What `quantize.py` measures: our bundles, and what other quantizers make of the merged model; each is made
once and kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import adapterpack
from adapterpack.demos import SMOLLM2, fetch

DATA = Path(__file__).parents[1] / "examples" / "data"
CALIBRATION = DATA / "orders.train.jsonl"
ADAPTER, NEW, ENDS = "orders", 40, (0, 2)


@dataclass(frozen=True)
class Contestant:
    """One of them. ``make`` writes it to a path; ``kind`` is ``bundle``, or the peer that runs it from its
    environment.
    """

    make: Callable[[Path, Path, Path | None], Any]
    kind: str = "bundle"
    merged: bool = False
    needs: str = ""
    suffix: str = ""

    def there(self, peers: Path | None) -> bool:
        """Whether its environment is."""
        return not self.needs or (peers is not None and (peers / self.needs).exists())

    def program(self, peers: Path | None) -> Path:
        """Its environment's Python."""
        assert peers is not None
        return (peers / self.needs).absolute()

    def made(self, work: Path, peers: Path | None) -> Path:
        """Its folder or file in ``work``."""
        name = next(name for name, one in EVERY.items() if one is self)
        path = work / (name.replace(", ", "-").replace(" ", "-") + self.suffix)
        if not path.exists():
            self.make(work, path, peers)
        return path

    def nbytes(self, path: Path) -> int:
        """The bytes of its model; the engine's graph reads the weights of the ordinary one."""
        return (
            path.stat().st_size
            if path.is_file()
            else sum(file.stat().st_size for file in path.glob("model.onnx*"))
        )

    def logits(self, path: Path) -> Callable[[tuple[int, ...]], np.ndarray]:
        """Logits ``[tokens, vocabulary]`` of token ids: by ONNX Runtime on a peer's graph, or by transformers
        on a GGUF file's weights.
        """
        return _logits_of_graph(path / "model.onnx") if path.is_dir() else _logits_of_gguf(path)


def environment() -> dict[str, str]:
    """What peers' processes have."""
    return {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }


def pack(work: Path) -> Path:
    """The adapter, trained as the demo does."""
    path = work / ADAPTER
    if not path.exists():
        from adapterpack.training.config.config import read_config
        from adapterpack.training.pipeline import train_one

        train_one(
            read_config(
                {
                    "model_name_or_path": str(fetch(SMOLLM2)),
                    "task": "text-generation",
                    "name": ADAPTER,
                    "output_dir": str(path),
                    "train_file": str(DATA / "orders.train.jsonl"),
                    "method": "lora",
                    "r": 8,
                    "alpha": 16,
                    "targets": "all-linear",
                    "learning_rate": 2e-3,
                    "lr_scheduler_type": "cosine",
                    "num_train_epochs": 0.6,
                    "per_device_train_batch_size": 4,
                    "max_length": 160,
                    "group_by_length": True,
                    "seed": 0,
                }
            )[0][0]
        )
    return path


def _float(work: Path, out: Path, peers: Path | None) -> None:
    adapterpack.export(fetch(SMOLLM2), [pack(work)], out)


def _scheme(**options: Any) -> Contestant:
    return Contestant(
        lambda work, out, peers: adapterpack.quantize(EVERY["float"].made(work, peers), out, **options)
    )


def _merged(scheme: str | None) -> Contestant:
    return Contestant(
        lambda work, out, peers: adapterpack.export(
            fetch(SMOLLM2), [pack(work)], out, mode="folded", quantize=scheme
        ),
        merged=True,
    )


def _by_onnxruntime(quantize: Callable[[Path, Path], None]) -> Contestant:
    """The merged bundle with its graphs as ONNX Runtime's own quantizer writes them."""

    def make(work: Path, out: Path, peers: Path | None) -> None:
        source, draft = EVERY["merged, float"].made(work, peers), out.with_name(f"{out.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft, ignore=shutil.ignore_patterns("*.onnx", "*.onnx.data"))
        for graph in ("model.onnx", "decoder.onnx"):
            quantize(source / graph, draft / graph)
        draft.rename(out)

    return Contestant(make, merged=True)


def _weights(bits: int) -> Callable[[Path, Path], None]:
    def quantize(source: Path, target: Path) -> None:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        one = MatMulNBitsQuantizer(
            str(source), bits=bits, block_size=32, is_symmetric=False, accuracy_level=4
        )
        one.process()
        one.model.save_model_to_file(str(target), True)

    return quantize


def _dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def _genai(work: Path, out: Path, peers: Path | None) -> None:
    merged = work / "merged-checkpoint"
    if not merged.exists():
        adapterpack.merge(fetch(SMOLLM2), [pack(work)], merged)
    command = [
        EVERY["genai, int4"].program(peers),
        "-W",
        "ignore",
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        merged,
        "-o",
        out,
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        work / "genai-cache",
        "--extra_options",
        "int4_accuracy_level=4",
    ]
    subprocess.run(list(map(str, command)), check=True, env=environment(), stdout=subprocess.DEVNULL)


def _llama(kind: str) -> Contestant:
    def make(work: Path, out: Path, peers: Path | None) -> None:
        from contestant_files import GGUF, _write_gguf

        merged = work / "merged-f32.gguf"
        if not merged.exists():
            adapterpack.merge(
                next(fetch(GGUF).glob("*.gguf")),
                [pack(work)],
                merged,
                checkpoint=fetch(SMOLLM2),
                dtype="float32",
            )
        _write_gguf(merged, out, kind)

    return Contestant(make, "llama", True, "llama/bin/python", ".gguf")


def _logits_of_graph(file: Path) -> Callable[[tuple[int, ...]], np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    config = json.loads((fetch(SMOLLM2) / "config.json").read_text())
    heads, width = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]

    def logits(ids: tuple[int, ...]) -> np.ndarray:
        feeds: dict[str, np.ndarray] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                feeds[value.name] = np.zeros((1, heads, 0, width), np.float32)
            elif value.name == "position_ids":
                feeds[value.name] = np.arange(len(ids))[None]
        found: np.ndarray = session.run(["logits"], feeds)[0][0]
        return found

    return logits


def _logits_of_gguf(file: Path) -> Callable[[tuple[int, ...]], np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()

    def logits(ids: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
        return found

    return logits


EVERY: dict[str, Contestant] = {
    "float": Contestant(_float),
    "fp16": _scheme(scheme="fp16"),
    "int8": _scheme(scheme="int8"),
    "int4": _scheme(scheme="int4"),
    "int4, k-quant": _scheme(scheme="int4", algorithm="k-quant"),
    "int4, hqq": _scheme(scheme="int4", algorithm="hqq"),
    "int4, gptq": _scheme(scheme="int4", algorithm="gptq", calibration=CALIBRATION),
    "int4, awq": _scheme(scheme="int4", algorithm="awq", calibration=CALIBRATION),
    "int4, rank 32": _scheme(scheme="int4", compensate=32),
    "int4, rank 32, rows": _scheme(scheme="int4", compensate=32, calibration=CALIBRATION),
    "mixed, error 0.05": _scheme(scheme="mixed", error_budget=0.05),
    "int2": _scheme(scheme="int2"),
    "merged, float": _merged(None),
    "merged, int8": _merged("int8"),
    "merged, int4": _merged("int4"),
    "onnxruntime, int4": _by_onnxruntime(_weights(4)),
    "onnxruntime, int8": _by_onnxruntime(_weights(8)),
    "onnxruntime, dynamic int8": _by_onnxruntime(_dynamic),
    "genai, int4": Contestant(_genai, "genai", True, "genai/bin/python"),
    "llama.cpp, q8_0": _llama("q8_0"),
    "llama.cpp, q4_0": _llama("q4_0"),
}
