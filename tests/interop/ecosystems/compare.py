"""Adapters of other tools, made by the tools themselves, against what this package makes of them: ``python
compare.py TOOL PYTHON``.

``PYTHON`` is that of an environment with the tool, in which ``make_TOOL.py`` writes adapters and what the
tool's own models give with them. Each is converted to a pack and attached to a model here, and where the
format is written, too, it goes back and the tool loads it again. Prints a line for each, and ends with 1 if
one differs. `.ci/ecosystems` makes the environments.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import transformers.utils.logging
from safetensors.numpy import load_file, save_file

import adapterpack
from adapterpack.converting.pipeline import detect
from adapterpack.errors import AdapterpackError
from adapterpack.io.safe_open import TENSORS

CLOSE = 2e-5
"""Of the largest output: float32 on both sides, through two layers, sums in other orders."""
FORM = {"lycoris": "kohya", "peft": None}
"""The format that a tool writes, where it is not called like the tool; None if nothing goes back to it."""
SMALLEST = 1e-2
"""How much of it an adapter must change, so that one without effect is no success."""
INPUTS = {
    "ids": np.array([[5, 6, 7, 8, 9, 10], [11, 2, 3, 4, 5, 1]]),
    "pixels": np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32),
}
SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 28,
}
BASES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1)),
    "mha": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SIZES,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        )
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "resnet": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic")
    ),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=37, n_embd=24, n_layer=2, n_head=3, n_positions=16)
    ),
}


def make_bases(folder: Path) -> None:
    """A random model of every family, and the token ids."""
    for seed, (family, make) in enumerate(BASES.items()):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.2 * torch.randn_like(value))
        model.save_pretrained(folder / "bases" / family)
    save_file(INPUTS, folder / "ids.safetensors")


def output(base: Path, pack: adapterpack.Pack | None) -> np.ndarray:
    """Logits, or the last hidden states, of a base with a pack attached."""
    config = transformers.AutoConfig.from_pretrained(base)
    kind = config.architectures[0]
    if pack is not None and pack.manifest.task.type == "text-classification":
        kind = kind.replace("Model", "ForSequenceClassification")
        config.num_labels = len(pack.manifest.task.labels or ()) or 2
    model: Any = getattr(transformers, kind).from_pretrained(base, config=config).eval()
    if pack is not None:
        adapterpack.attach(model, pack)
    with torch.no_grad():
        given = torch.from_numpy(INPUTS["pixels" if model.main_input_name == "pixel_values" else "ids"])
        found = model(given)
    values = (found.logits if "logits" in found else found[0]).numpy()
    return values[:, -given.shape[1] :] if values.ndim == 3 else values  # without virtual tokens


def say(line: str) -> None:
    """One line of the result."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def judged(name: str, found: np.ndarray, wanted: np.ndarray, plain: np.ndarray) -> bool:
    """Prints by how much two outputs differ, and says whether that is rounding."""
    size = np.abs(wanted).max()
    error = np.abs(found - wanted).max() / size
    # a head has no plain
    change = np.abs(wanted - plain).max() / size if wanted.shape == plain.shape else 1.0
    right = bool(error <= CLOSE and change >= SMALLEST)
    say(f"{'ok' if right else 'WRONG':6}{name:40} error {error:.1e} of a change of {change:.2g}")
    return right


def main(tool: str, python: str) -> int:
    """0 if all of them agree."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder, wrong = Path(scratch), 0
        make_bases(folder)
        script = [python, str(Path(__file__).parent / f"make_{tool}.py"), scratch]
        subprocess.run(script, check=True)
        made, written = load_file(folder / "made.safetensors"), []
        for name, wanted in made.items():
            base, source = folder / "bases" / name.split("/")[0], folder / "adapters" / name
            source = source if source.exists() else source.with_name(f"{source.name}.safetensors")
            plain = output(base, None)
            form = detect(source)
            try:
                pack = adapterpack.convert(source, folder / "packs" / name, to="pack", base=base).pack
            except AdapterpackError as error:
                say(f"WRONG {form.name} {name}: {error}")
                wrong += 1
                continue
            wrong += not judged(f"{form.name} {name}", output(base, pack), wanted, plain)
            if form.name == "peft" and (source / TENSORS).exists():
                found = adapterpack.validate(source, base=base).findings
                wrong += bool(found) + (
                    not judged(f"peft {name} as it is", output(base, adapterpack.load(source)), wanted, plain)
                )
                for finding in found:
                    say(f"WRONG validate {name}: {finding}")
            if form.name == FORM.get(tool, tool) and form.write is not None:
                try:
                    target = (folder / "back" / name).with_suffix(source.suffix)
                    adapterpack.convert(folder / "packs" / name, target, to=form.name, base=base)
                except AdapterpackError as error:
                    say(f"      {name}: not written: {error}")
                else:
                    written.append((name, wanted, plain))
        if written:
            subprocess.run([*script, "back"], check=True)
            back = load_file(folder / "back.safetensors")
            wrong += sum(
                not judged(f"{tool} {name} and back", back[name], wanted, plain)
                for name, wanted, plain in written
            )
    return 1 if wrong or not made else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
