"""Folders that ``convert --to peft`` wrote, read by vLLM's own loader: ``python tests/interop/vllm_loads.py
[VENV]``.

Without VENV one is made, which is kept nowhere; one that is named and missing is made there, and used again
the next time. vLLM's wheel is the one with the digest below; torch and transformers are those of this
environment, and the loader runs on the CPU, no engine with it. LoRAs of a tiny Llama in the forms that vLLM
serves must give, module by module, ``s B A`` of the pack; the forms that it does not serve it must refuse by
its own words, so that none is served as something else.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

import adapterpack
from adapterpack import DoRA, LoRA, Pack, adapt, compose, convert, save
from adapterpack.adapter_methods import methods

WHEEL = "vllm==0.33.0 --hash=sha256:4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa"
WHERE = "import sysconfig; print(sysconfig.get_path('purelib'))"
NEEDS = (
    "apache-tvm-ffi",
    "cachetools",
    "cbor2",
    "einops",
    "fastapi",
    "openai-harmony",
    "partial-json-parser",
    "py-cpuinfo",
    "pybase64",
    "pyzmq",
    "uvloop",
    "xgrammar",
)
"""What the modules around vLLM's loader import that the tests of this package do not."""
ATTENTION = ("q_proj", "v_proj")
SERVED: dict[str, Any] = {
    "plain": LoRA(r=3, alpha=5, targets="all-linear"),
    "rslora": LoRA(r=5, alpha=4, use_rslora=True, targets=ATTENTION),
    "patterns": LoRA(
        r=2,
        alpha=3,
        rank_pattern={"v_proj": 4, "1.q_proj": 1},
        alpha_pattern={"0.v_proj": 7},
        targets=ATTENTION,
    ),
    "pissa": LoRA(r=2, init="pissa", targets=("down_proj", "o_proj")),
    "embedding": LoRA(r=3, targets=("embed_tokens", "lm_head", "gate_proj")),
    "half": LoRA(r=4, targets=ATTENTION),
    "head": LoRA(r=2, targets=ATTENTION),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "dora": (DoRA(r=2, targets=ATTENTION), "DoRA"),
    "alora": (adapterpack.ALoRA(r=2, alora_invocation_tokens=(3, 4), targets=ATTENTION), "aLoRA"),
    "bias": (adapterpack.LoRABias(r=2, targets=ATTENTION), "lora_bias"),
    "wide": (LoRA(r=17, targets=ATTENTION), "rank 17"),
    "whole": (LoRA(r=2, targets=ATTENTION, modules_to_save=("lm_head",)), "modules_to_save"),
}


def main(venv: Path | None) -> None:
    """Writes, loads and compares; raises where they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = made_venv(venv or folder / "venv")
        packs = {name: make_pack(folder, name, config) for name, config in SERVED.items()}
        packs["sum"] = compose(
            [packs["plain"], packs["rslora"]], weights=[0.7, -1.3], out=folder / "packs" / "sum"
        )
        refused = {name: make_pack(folder, name, config) for name, (config, _) in REFUSED.items()}
        folders = []
        for name in packs | refused:
            convert(folder / "packs" / name, folder / "peft" / name, to="peft")
            folders.append(folder / "peft" / name)
        others = {
            name: config
            for name, config in of_other_methods().items()
            if (make_pack(folder, f"method-{name}", config).path / "adapter_config.json").exists()
        }
        folders += [folder / "packs" / f"method-{name}" for name in others]
        child = Path(__file__).with_name("vllm_child.py")
        run = subprocess.run(
            [str(python), str(child), str(folder / "loaded"), *map(str, folders)],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin"},
        )
        if run.returncode:
            raise SystemExit(f"vLLM's loader does not run:\n{run.stderr[-2000:]}")
        refusals, found = json.loads(run.stdout.splitlines()[-1]), load_file(folder / "loaded")
        for name, pack in packs.items():
            if refusals[name] is not None:
                raise SystemExit(f"vLLM refuses {name}: {refusals[name]}")
            compare(
                name,
                pack,
                {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{name}/")},
            )
        for name, (_, word) in REFUSED.items():
            if word not in (refusals[name] or ""):
                raise SystemExit(f"vLLM should refuse {name} for {word}, and says {refusals[name]}")
        if taken := [name for name in others if refusals[f"method-{name}"] is None]:
            raise SystemExit(f"vLLM should refuse these methods, and does not: {', '.join(taken)}")
        sys.stdout.write(f"vLLM's loader refuses {len(others)} other methods\n")
        sys.stdout.write(
            f"vLLM's loader reads {', '.join(packs)} with the values of the packs, and refuses "
            f"{', '.join(refused)}\n"
        )


def of_other_methods() -> dict[str, Any]:
    """A config of each method that PEFT has, too, but for the one that vLLM takes."""
    found = {}
    for name, method in methods().items():
        if method.peft is not None and "vLLM" in method.peft.refused_by:
            fields = {field.name for field in dataclasses.fields(method.examples[0])}
            targets = (
                {"targets": ATTENTION} if "targets" in fields and "linear" in method.traits.layers else {}
            )
            more = {"road": {"group_size": 2}}.get(name, {})
            found[name] = dataclasses.replace(method.examples[0], **targets, **more)
    return found


def made_venv(folder: Path) -> Path:
    """The python of an environment with vLLM, made where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        wheel = folder / "vllm.txt"
        wheel.write_text(f"{WHEEL}\n")
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
            "--no-deps",
        ]
        for packages in (["--require-hashes", "-r", str(wheel)], list(NEEDS)):
            done = subprocess.run([*install, *packages], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stdout.write(f"NOT RUN: vLLM cannot be installed here: {done.stderr.strip()[-500:]}\n")
                raise SystemExit(0)
        where = subprocess.run([str(python), "-c", WHERE], capture_output=True, text=True, check=True)
        (Path(where.stdout.strip()) / "ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def make_pack(folder: Path, name: str, config: Any) -> Pack:
    """A random adapter of a tiny Llama; ``head``'s is of one with a classifier, which is trained whole."""
    sizes = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=28,
        num_labels=3,
        pad_token_id=0,
    )
    kind = "LlamaForSequenceClassification" if name == "head" else "LlamaForCausalLM"
    base = folder / "bases" / kind
    torch.manual_seed(0)
    if not base.exists():
        getattr(transformers, kind)(sizes).save_pretrained(base)
    if name == "head":
        config = LoRA(r=2, targets=ATTENTION, modules_to_save=("score",))
    model = adapt(getattr(transformers, kind).from_pretrained(base), config, name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
                if name == "half":
                    parameter.data = parameter.data.to(torch.bfloat16)
    return save(model, folder / "packs" / name)


def compare(name: str, pack: Pack, found: dict[str, np.ndarray]) -> None:
    """Checks that the changes that vLLM loaded are the pack's: in float64 on both sides, so but for the last
    bit of the scale.
    """
    wanted = {}
    for each in pack.adapters():
        down, up = (np.asarray(each.params[factor], np.float64) for factor in ("lora_A", "lora_B"))
        wanted[each.site.path] = each.config.scale * up @ down
    wanted |= {
        f"{path}.whole": np.asarray(params["weight"], np.float64) for path, params in pack.full().items()
    }
    if set(found) != set(wanted) or not all(np.abs(value).max() > 1e-3 for value in wanted.values()):
        raise SystemExit(f"vLLM loads other modules of {name}: {sorted(set(found) ^ set(wanted))}")
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-13, atol=1e-15, err_msg=f"{name}, {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
