"""What the servers of `contestants.py` read: one base and its adapters, in the format of each. What is
missing is made once and kept.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from decode import SIZES, build_base, build_pack

import adapterpack
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.demos import SMOLLM2, fetch
from adapterpack.exporting.pipeline import export


def _copy_gguf(source: Path, target: Path) -> None:
    for file in source.glob("*.gguf"):
        shutil.copy(file, target)


GGUF = dataclasses.replace(SMOLLM2, name=f"{SMOLLM2.name}-GGUF", prepare=_copy_gguf)
"""The file that the checkpoint was made from, with llama.cpp's own tokenizer in it."""
PACKS = {"large": (16, ("_proj.weight",)), "small": (8, ("q_proj.weight", "v_proj.weight"))}
"""Kind -> rank and layers: all linear layers (20 MB of SmolLM2), or what PEFT takes by default (2 MB)."""
GENAI_ADAPTERS = 8


class Files:
    """The files in a folder, for a base of this size; ``peers`` is where peers' own converters are."""

    def __init__(self, folder: Path, size: str, peers: Path | None = None) -> None:
        self.folder, self.size, self.peers = folder.absolute(), size, peers
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def base(self) -> Path:
        """The checkpoint."""
        return (
            fetch(SMOLLM2)
            if self.size == "135m"
            else self._made("base", lambda path: build_base(path, self.size))
        )

    def adapters(self, kind: str, count: int, form: str = "pack", precision: str = "fp32") -> list[Path]:
        """So many adapters of one kind, in the format of a contestant, the number in their names."""
        packs = [
            self._made(f"{kind}/{kind}{number}", lambda path, seed=number: self._pack(path, kind, seed))
            for number in range(count)
        ]
        if form == "onnx_adapter":
            return [
                self.genai(precision) / "adapters" / f"{pack.name}.onnx_adapter"
                for pack in packs[:GENAI_ADAPTERS]
            ]
        if form == "gguf":
            return [
                self._made(
                    f"{kind}-gguf/{pack.name}.gguf", lambda path, pack=pack: self._converted(pack, path)
                )
                for pack in packs
            ]
        return packs

    def bundle(self, precision: str) -> Path:
        """A bundle with slots at all linear layers, and one adapter that nobody asks for."""
        seed = self._made("seed", lambda path: self._pack(path, "large", 1 << 20))
        scheme = None if precision == "fp32" else precision
        return self._made(
            precision,
            lambda path: export(self.base, [seed], path, mode="bank", in_place=True, quantize=scheme),
        )

    def gguf(self, kind: str) -> Path:
        """The base for llama.cpp, all of its matrices in this format; with ``q4_0`` the table has ``q8_0``,
        as llama.cpp's own files and ours have more bits there, too.
        """
        smollm2 = next(fetch(GGUF).glob("*.gguf"))
        if self.size == "135m":
            return self._made(f"base-{kind}.gguf", lambda path: _write_gguf(smollm2, path, kind))
        return self._made(
            f"base-{kind}.gguf",
            lambda path: _write_gguf(smollm2, path, kind, _metadata(self.size), _weights(self.base)),
        )

    def genai(self, precision: str) -> Path:
        """The graph of onnxruntime-genai's own builder with slots for adapters, and adapter files."""
        return self._made(f"genai-{precision}", lambda path: self._genai(path, precision))

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path

    def _pack(self, path: Path, kind: str, seed: int) -> None:
        rank, layers = PACKS[kind]
        build_pack(self.base, path, rank, seed, layers)

    def _converted(self, pack: Path, path: Path) -> None:
        adapterpack.convert(pack, path, to="gguf", base=self.base)

    def _genai(self, path: Path, precision: str) -> None:
        assert self.peers is not None
        built = self.folder / f"genai-built-{precision}"
        if not (built / "genai_config.json").is_file():
            command = [
                self.peers / "genai/bin/python",
                "-W",
                "ignore",
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                self.base,
                "-o",
                built,
                "-p",
                precision,
                "-e",
                "cpu",
                "-c",
                self.folder / "genai-cache",
            ]
            subprocess.run(
                [str(each) for each in command],
                check=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            )
        export(
            built / "model.onnx",
            self.adapters("large", GENAI_ADAPTERS),
            path,
            mode="inputs",
            target="ort-genai",
            checkpoint=self.base,
        )


def _metadata(size: str) -> dict[str, Any]:
    """What a GGUF file says of a random Llama, beside the tokenizer of SmolLM2."""
    shape = SIZES[size]
    heads = shape["num_attention_heads"]
    return {
        "llama.block_count": shape["num_hidden_layers"],
        "llama.embedding_length": shape["hidden_size"],
        "llama.feed_forward_length": shape["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": shape["num_key_value_heads"],
        "llama.rope.dimension_count": shape["hidden_size"] // heads,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
    }


def _weights(base: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checkpoint of Llama under the names of llama.cpp, which keeps the two halves of a
    rotated head in turn.
    """
    import gguf

    checkpoint = Checkpoint(base)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, checkpoint.config["num_hidden_layers"])
    heads = {
        "q_proj": checkpoint.config["num_attention_heads"],
        "k_proj": checkpoint.config["num_key_value_heads"],
    }
    for name in checkpoint.tensors:
        values = np.asarray(checkpoint.read(name), np.float32)
        if count := heads.get(name.split(".")[-2]):
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        yield str(names.get_name(name, (".weight",))), values


def _write_gguf(
    source: Path,
    out: Path,
    kind: str,
    metadata: dict[str, Any] | None = None,
    weights: Iterable[tuple[str, np.ndarray]] | None = None,
) -> None:
    """Another GGUF file of the same model, with its matrices in another format, or of other weights with what
    differs in ``metadata``.
    """
    import gguf

    reader, wanted = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (
            "general.architecture",
            "general.file_type",
        ):
            last = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            value = (metadata or {}).get(field.name, field.contents())
            writer.add_key_value(field.name, value, field.types[0], sub_type=last)
    for name, values in weights or (
        (each.name, gguf.quants.dequantize(each.data, each.tensor_type).astype("float32"))
        for each in reader.tensors
    ):
        plain, table = values.ndim == 1, name == "token_embd.weight" and kind == "q4_0"
        dtype = (
            gguf.GGMLQuantizationType.F32 if plain else gguf.GGMLQuantizationType.Q8_0 if table else wanted
        )
        writer.add_tensor(name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
