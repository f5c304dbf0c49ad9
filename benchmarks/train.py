"""One training step of a LoRA: adapterpack beside PEFT, on the same random Llama, targets, initial tensors, batch and optimizer.

Both models live in one process and take their steps in turn, after warm-up steps that are not counted; a step is forward, backward and
AdamW. The gradients of the first step are compared. Peak memory is that of a process of its own for each, which takes three steps: on
CUDA what torch allocated, on the CPU the largest resident size above that before the first step.

    python benchmarks/train.py --size 135m
    python benchmarks/train.py --size tiny --dtype bfloat16 --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

SIZES = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3},
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Subject(NamedTuple):
    """A model with its adapter in training, and the adapter's tensors by ``path.lora_A`` and ``path.lora_B``."""

    model: Any
    adapter: dict[str, Any]


def base(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[args.size], tie_word_embeddings=True))
    return model.to(args.device, getattr(torch, args.dtype))


def ours(args: argparse.Namespace) -> Subject:
    from adapterpack import LoRA, adapt
    from adapterpack.training.layers.layer import AdaptedLayer

    model = adapt(base(args), LoRA(r=args.rank, alpha=2 * args.rank, targets=TARGETS), "bench").train()
    return Subject(model, {f"{layer._site.path}.{key}": value for layer in model.modules() if isinstance(layer, AdaptedLayer)
                           for key, value in layer._part("bench").items()})


def peft(args: argparse.Namespace) -> Subject:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base(args), config).train()
    return Subject(model, {name.removeprefix("base_model.model.").replace(".default.weight", ""): value
                           for name, value in model.named_parameters() if value.requires_grad})


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {"adapterpack": ours, "peft": peft}


@torch.no_grad()
def fill(subject: Subject) -> None:
    """The same tensors in both, B not zero, so that every gradient is at work."""
    generator = torch.Generator().manual_seed(1)
    for name in sorted(subject.adapter):
        value = subject.adapter[name]
        value.copy_(0.02 * torch.randn(value.shape, generator=generator))


def batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, SIZES[args.size]["vocab_size"], (args.batch, args.length), generator=generator).to(args.device)
    return {"input_ids": ids, "labels": ids}


def stepper(subject: Subject, inputs: dict[str, torch.Tensor]) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    optimizer = torch.optim.AdamW(subject.adapter.values(), lr=1e-4)

    def step() -> float:
        loss = subject.model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def gradients(subject: Subject, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    subject.model(**inputs).loss.backward()
    found = {name: value.grad.float().clone() for name, value in subject.adapter.items()}
    subject.model.zero_grad()
    return found


def wait(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(args: argparse.Namespace) -> float:
    """MB above the model and its adapter, over three steps of one subject in this process."""
    subject, inputs = SUBJECTS[args.worker](args), batch(args)
    step = stepper(subject, inputs)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = resident_mb("VmRSS")
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else resident_mb("VmHWM")) - before


def measure(args: argparse.Namespace) -> dict[str, Any]:
    subjects = {who: make(args) for who, make in SUBJECTS.items()}
    inputs = batch(args)
    for subject in subjects.values():
        fill(subject)
    found = {who: gradients(subject, inputs) for who, subject in subjects.items()}
    assert found["adapterpack"].keys() == found["peft"].keys()
    largest = max(float(value.abs().max()) for value in found["peft"].values())
    difference = max(float((found["adapterpack"][name] - value).abs().max()) for name, value in found["peft"].items())
    steps = {who: stepper(subject, inputs) for who, subject in subjects.items()}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for run in range(args.warm_up + args.runs):
        for who in list(steps) if run % 2 else reversed(steps):  # neither always goes first
            wait(args)
            started = time.perf_counter()
            steps[who]()
            wait(args)
            if run >= args.warm_up:
                times[who].append(time.perf_counter() - started)
    figures = {who: {"seconds": median(values), "fastest": min(values), "peak_mb": memory(who)} for who, values in times.items()}
    return {
        "benchmark": "train",
        "size": args.size,
        "device": args.device,
        "dtype": args.dtype,
        "batch": [args.batch, args.length],
        "rank": args.rank,
        "sites": len(found["peft"]) // 2,
        "threads": torch.get_num_threads(),
        "runs": args.runs,
        **figures,
        "ratio": figures["peft"]["seconds"] / figures["adapterpack"]["seconds"],
        "ratio_peak": figures["peft"]["peak_mb"] / figures["adapterpack"]["peak_mb"],
        "gradient_difference": difference / largest,
    }


def memory(who: str) -> float:
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker", who], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def show(result: dict[str, Any]) -> None:
    rows, length = result["batch"]
    print(f"Llama {result['size']}, {result['device']}, {result['dtype']}, {rows} x {length} tokens, {result['sites']} sites of rank "
          f"{result['rank']}; median of {result['runs']}")
    for who in SUBJECTS:
        r = result[who]
        print(f"  {who:12} step {1000 * r['seconds']:8.1f} ms   fastest {1000 * r['fastest']:8.1f} ms   peak {r['peak_mb']:6.0f} MB")
    print(f"  ratio (PEFT / adapterpack): time {result['ratio']:.2f}, peak memory {result['ratio_peak']:.2f}")
    print(f"  largest difference between the gradients: {result['gradient_difference']:.1e} of the largest gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base; adapters are in float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=SUBJECTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(peak(args))
        return
    result = measure(args)
    print(json.dumps(result, indent=2)) if args.json else show(result)


if __name__ == "__main__":
    main()
