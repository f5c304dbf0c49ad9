"""Adapters folded into the graphs of onnxruntime-genai's model builder, float and int4, and attached to them,
against torch.

    python tests/interop/genai_builder.py VENV

VENV is a virtual environment with ``onnxruntime-genai``, which the environment of adapterpack cannot have:
its wheel brings an ONNX Runtime of its own. It needs torch and transformers too, or a ``.pth`` file that
names the folder of ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapterpack
from adapterpack import LoRA, adapt, save
from adapterpack.onnx_graph.graph_file import GraphFile
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

LENGTH = int(os.environ.get("LENGTH", "7"))


def main(venv: Path) -> None:
    """Builds, folds and compares; raises where they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, pack = folder / "base", folder / "pack"
        make_base(base)
        make_pack(base, pack)
        adapterpack.merge(base, [pack], folder / "merged")
        ids = np.random.default_rng(1).integers(4, 96, (2, LENGTH))
        with torch.no_grad():
            expected = (
                LlamaForCausalLM.from_pretrained(folder / "merged")
                .eval()(torch.from_numpy(ids))
                .logits.numpy()
            )
        for precision in ("fp32", "int4"):
            for name in ("base", "merged"):
                build(venv, folder / name, folder / f"{precision}-{name}", precision, folder / "cache")
            report = adapterpack.merge(
                folder / f"{precision}-base" / "model.onnx",
                [pack],
                folder / f"{precision}-folded",
                checkpoint=base,
            )
            folded, built = (
                folder / f"{precision}-folded" / "model.onnx",
                folder / f"{precision}-merged" / "model.onnx",
            )
            apart = float(np.abs(run(folded, ids) - run(built, ids)).max() / np.abs(expected).max())
            from_torch = float(np.abs(run(folded, ids) - expected).max() / np.abs(expected).max())
            print(
                f"{precision}: {apart:.2g} from the builder's graph of the merged checkpoint, "
                f"{from_torch:.2g} from torch; {len(report.tensors)} tensors in "
                f"{len({name for one in report.tensors for name in one.initializers})} initializers; "
                f"quantization {report.quantized}"
            )
            if precision == "fp32":
                require_equal(folded, built)
                if not from_torch <= 1e-5:
                    raise SystemExit("the folded graph differs from torch")
                attached(base, folder / "fp32-base" / "model.onnx", pack, folder)
            if not apart <= (0 if precision == "fp32" else 0.3):
                raise SystemExit("the folded graph is another than the builder's")


def attached(base: Path, graph: Path, pack: Path, scratch: Path) -> None:
    """Exports in every mode from the builder's file; export itself compares base, adapter and a mixed batch
    with torch, and raises.
    """
    answers = {}
    for mode in ("bank", "inputs", "folded"):
        bundle = adapterpack.export(graph, [pack], scratch / mode, mode=mode, checkpoint=base)
        session = adapterpack.Session(scratch / mode, "cpu")
        names = None if mode == "folded" else ["pack", "pack"]
        answers[mode] = [
            answer.ids for answer in session.generate([[5, 6, 7, 8, 9], [7, 8]], names, max_new_tokens=6)
        ]
        print(
            f"{mode}: {bundle.frontend}, rows padded on the {bundle.padding}, "
            f"{bundle.parity['max_abs']} from torch"
        )
    if len({str(answer) for answer in answers.values()}) != 1:
        raise SystemExit(f"the modes generate different tokens: {answers}")


def build(venv: Path, base: Path, out: Path, precision: str, cache: Path) -> None:
    """The builder's graph of a checkpoint, made in the other environment."""
    command = [
        venv / "bin" / "python",
        "-W",
        "ignore",
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        base,
        "-o",
        out,
        "-p",
        precision,
        "-e",
        "cpu",
        "-c",
        cache,
        "--extra_options",
        "int4_accuracy_level=0",
    ]
    subprocess.run(
        [str(each) for each in command],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )


def require_equal(one: Path, other: Path) -> None:
    """That two graphs hold the same bytes under the same names."""
    found = [GraphFile(path) for path in (one, other)]
    assert found[0].stored.keys() == found[1].stored.keys()
    for name in found[0].stored:
        a, b = (graph.array(name) for graph in found)
        if a.tobytes() != b.tobytes():
            raise SystemExit(f"{name} differs from the builder's own")


def make_base(folder: Path) -> None:
    """A random Llama with biases in its attention, whose head is its own, and a word-level tokenizer.

    No layer is as wide as the vocabulary but the head: the builder takes one that is for the head.
    """
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=112,
        attention_bias=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    words = {
        word: number
        for number, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(92))])
    }
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
    ).save_pretrained(folder)


def make_pack(base: Path, out: Path) -> None:
    """A random LoRA on every linear layer."""
    model = adapt(
        load_model(get_task("text-generation"), base), LoRA(r=4, alpha=6, targets="all-linear"), "random"
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    save(model, out, base=base)


def run(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of a graph with an empty cache: two heads of 16 numbers."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(ids), 2, 0, 16), np.float32)
    logits = session.run(["logits"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    assert logits.shape == (*ids.shape, 96), logits.shape
    return logits


if __name__ == "__main__":
    main(Path(sys.argv[1]))
