"""A folder that ``export --target model-package`` wrote, opened by ONNX Runtime 1.32 itself, in a virtual
environment of its own.

    python tests/interop/model_package.py [VENV]

Without VENV one is made. What ``docs/model-package.md`` shows is run as it stands there. A random Llama and
two adapters of it generate greedily, by inputs and in a bank: their tokens must be those that torch makes
with the same adapters. Then onnxruntime-genai is tried on the same folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import genai_builder
import genai_runs
import torch
from click.testing import CliRunner

from adapterpack import attach, detach, export, load
from adapterpack.cli.main import main as command
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "guide"))
from pages import ROOT, blocks, words

NAMES = ("orders", "returns")
PROMPT = [5, 9, 23, 40, 7]
TOKENS = 12
EOS = 2


def main(venv: Path | None) -> None:
    """Exports, opens and compares; raises where they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        venv = venv or genai_runs.make_venv(folder / "venv")
        base = folder / "models" / "base"
        genai_builder.make_base(base)
        packs = [
            genai_runs.make_pack(base, folder / "packs" / name, rank)
            for name, rank in zip(NAMES, (4, 9), strict=True)
        ]
        export(base, packs, folder / "bank", mode="bank", target="model-package")
        page = list(blocks(ROOT / "docs" / "model-package.md"))
        with chdir(folder):
            for line in (line for block in page if block.language == "sh" for line in block.commands()):
                CliRunner().invoke(command, words(line)[1:], catch_exceptions=False)
        shown = [block.text for block in page if block.language == "python"]
        found = run_child(venv, folder, {"shown": shown, "prompt": PROMPT, "tokens": TOKENS, "names": NAMES})
        expected = torch_tokens(base, packs)
        for way in ("inputs", "bank"):
            if found[way] != expected:
                raise SystemExit(f"{way}: ONNX Runtime generates {found[way]}, torch {expected}")
        print(
            f"onnxruntime {found['version']}: base and {len(NAMES)} adapters of a package generate torch's "
            "tokens, by inputs and in a bank"
        )
        print(f"joined with a second bundle for CUDA: {found['variants']}")
        print(f"an altered bundle: {found['altered']}")
        for where, answer in found["genai"].items():
            if isinstance(answer, str):
                print(f"onnxruntime-genai {found['genai_version']} refuses the {where}: {answer}")
            elif answer == expected:
                print(f"onnxruntime-genai {found['genai_version']} opens the {where}: torch's tokens")
            else:
                raise SystemExit(f"onnxruntime-genai generates {answer} from the {where}, torch {expected}")
        if isinstance(found["genai"]["bundle"], str):
            raise SystemExit("onnxruntime-genai does not open the bundle in the package")


def run_child(venv: Path, folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """What ``model_package_child.py`` prints in the other environment."""
    run = subprocess.run(
        [str(venv / "bin" / "python"), str(Path(__file__).with_name("model_package_child.py"))],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
    )
    if run.returncode:
        raise SystemExit(f"ONNX Runtime refuses the package:\n{run.stderr[-2000:]}")
    return dict(json.loads(run.stdout.splitlines()[-1]))


def torch_tokens(base: Path, packs: list[Path]) -> list[list[int]]:
    """Torch's greedy tokens after the prompt: the base's, then each adapter's. All differ, and none ends."""
    model = load_model(get_task("text-generation"), base).eval()
    answers = [greedy(model)]
    for name, pack in zip(NAMES, packs, strict=True):
        attach(model, load(pack), check_base=False)
        answers.append(greedy(model))
        detach(model, name)
    assert len({tuple(ids) for ids in answers}) == len(answers)
    assert all(EOS not in ids for ids in answers)
    return answers


def greedy(model: torch.nn.Module) -> list[int]:
    """The likeliest tokens after the prompt, one after the other."""
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
