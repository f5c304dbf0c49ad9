"""A folder that ``export --target ort-genai`` wrote, loaded by onnxruntime-genai in a virtual environment of
its own.

    python tests/interop/genai_runs.py [VENV]

Without VENV one is made: the wheel brings an ONNX Runtime that would overwrite ours. SmolLM2 and two adapters
of it generate greedily: their tokens must be those that torch makes with the same adapters, and the tokenizer
must encode as ours does. Then the same environment builds graphs for ``genai_builder.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import genai_builder
import torch

from adapterpack import LoRA, Session, adapt, attach, detach, export, load, save
from adapterpack.demos import SMOLLM2, fetch
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

TOKENS = 12
PROMPT = "The capital of France is"
NAMES = ("one", "two")
WHERE = "import sysconfig; print(sysconfig.get_path('purelib'))"


def main(venv: Path | None) -> None:
    """Exports, runs and compares; raises where they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        venv = venv or make_venv(folder / "venv")
        python = venv / "bin" / "python"
        base = fetch(SMOLLM2)
        packs = [make_pack(base, folder / name, rank) for name, rank in zip(NAMES, (4, 9), strict=True)]
        export(base, packs, folder / "genai", mode="inputs", target="ort-genai")
        child = Path(__file__).with_name("genai_child.py")
        run = subprocess.run(
            [str(each) for each in (python, child, folder / "genai", TOKENS, PROMPT, *NAMES)],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin"},
        )
        if run.returncode:
            raise SystemExit(f"onnxruntime-genai refuses the folder:\n{run.stderr[-2000:]}")
        found = json.loads(run.stdout.splitlines()[-1])
        if found["prompt"] != Session(folder / "genai", "cpu").tokenizer.encode(PROMPT):
            raise SystemExit(f"the tokenizers differ: {found['prompt']}")
        model = load_model(get_task("text-generation"), base).eval()
        expected = {"": generated(model, found["prompt"]), " again": generated(model, found["prompt"])}
        for name, pack in zip(NAMES, packs, strict=True):
            attach(model, load(pack), check_base=False)
            expected[name] = generated(model, found["prompt"])
            detach(model, name)
        if found["answers"] != expected or len({tuple(ids) for ids in expected.values()}) != 3:
            raise SystemExit(
                f"onnxruntime-genai generates other tokens than torch: {found['answers']}, not {expected}"
            )
        print(
            f"onnxruntime-genai {found['version']}: base and {len(NAMES)} adapters generate torch's tokens; "
            f"{PROMPT!r} goes on with {found['text']!r}"
        )
        genai_builder.main(venv)


def make_venv(folder: Path) -> Path:
    """A fresh environment with onnxruntime-genai; where there is no wheel for this machine, says so and ends
    the script well.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run(
        [
            str(folder / "bin" / "pip"),
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
            "onnxruntime-genai>=0.9",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"NOT RUN: onnxruntime-genai cannot be installed here: {done.stderr.strip()[-500:]}")
        raise SystemExit(0)
    theirs = subprocess.run(
        [str(folder / "bin" / "python"), "-c", WHERE], capture_output=True, text=True, check=True
    )
    # torch and transformers, for the builder
    (Path(theirs.stdout.strip()) / "ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


def make_pack(base: Path, out: Path, rank: int) -> Path:
    """A random LoRA on every linear layer, large enough to change what is said."""
    model = adapt(load_model(get_task("text-generation"), base), LoRA(r=rank, targets="all-linear"), out.name)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.16 * rank**-0.5 * torch.randn(parameter.shape, generator=generator))
    save(model, out, base=base)
    return out


def generated(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """Torch's greedy tokens after a prompt."""
    with torch.no_grad():
        output = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return [int(each) for each in output[0, len(ids) :]]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
