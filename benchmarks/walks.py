"""How many files and calls of the package an operation passes through: ``python benchmarks/walks.py
[--json]``.

A newcomer who follows a call reads those files. Counted are the functions of adapterpack that run, by the
file that defines them, after everything is imported; a first run warms what is cached. The model is a tiny
random Llama, the adapter a LoRA on all linear layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import peft
from transformers import LlamaConfig, LlamaForCausalLM

import adapterpack
from adapterpack import LoRA

PACKAGE = str(Path(adapterpack.__file__).parent)


def walked(operation: Callable[[], Any]) -> dict[str, Any]:
    """The files of the package in which functions ran, with the number of calls in each."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name != "<module>":
            calls[code.co_filename.removeprefix(PACKAGE + "/")] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        operation()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return {"files": len(calls), "calls": calls.total(), "by_file": dict(calls.most_common())}


def main() -> None:
    """Prints a line an operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = folder / "base"
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
        LlamaForCausalLM(config).save_pretrained(base)
        model = adapterpack.adapt(LlamaForCausalLM.from_pretrained(base), LoRA(r=2), "a")
        adapterpack.save(model, folder / "pack", base=base)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        other = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
        other.save_pretrained(folder / "peft")
        number = iter(range(99))
        ids = np.array([[5, 6, 7]])

        def export_and_run() -> None:
            out = folder / f"bundle-{next(number)}"
            adapterpack.export(base, [folder / "pack"], out, mode="bank")
            adapterpack.Session(out).run({"input_ids": ids}, adapters=["pack"])

        def load_and_attach() -> None:
            adapterpack.attach(LlamaForCausalLM.from_pretrained(base), adapterpack.load(folder / "pack"))

        operations = {
            "save": lambda: adapterpack.save(model, folder / f"again-{next(number)}", base=base),
            "load and attach": load_and_attach,
            "load a PEFT folder": lambda: adapterpack.load(folder / "peft"),
            "export --mode bank, then Session.run": export_and_run,
        }
        result = {}
        for name, operation in operations.items():
            operation()
            result[name] = walked(operation)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, found in result.items():
        print(f"{name}: {found['files']} files, {found['calls']} calls")


if __name__ == "__main__":
    main()
