"""One training step of a LoRA: adapterpack beside PEFT, and PEFT's model under TRL, on the same base,
targets, initial tensors and rows.

The model is SmolLM2, of which real rows are learned, or a tiny random Llama. All models live in one process
and take their steps in turn, after warm-up steps that are not counted; a step is forward, backward and AdamW,
with the loss as each one's trainer computes it. The floor is the base without an adapter: forward, and
backward down to the embeddings, with our loss. Without dropout the gradients of the first step are compared.
Peak memory is that of a process of its own for each, which takes three steps: on CUDA what torch allocated,
on the CPU the largest resident size, whole and above that before the first step.

    python benchmarks/train.py
    python benchmarks/train.py --dropout 0.05 --length 1024
    python benchmarks/train.py --size tiny --dtype bfloat16 --json
"""

from __future__ import annotations

import argparse
import atexit
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Subject(NamedTuple):
    """A model with its adapter in training, the adapter's tensors by ``path.lora_A`` and ``path.lora_B``, and
    how its loss is computed.
    """

    model: Any
    adapter: dict[str, Any]
    loss: Callable[[dict[str, torch.Tensor]], torch.Tensor]


def base(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if args.size == "tiny":
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)).to(
            args.device, getattr(torch, args.dtype)
        )
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=getattr(torch, args.dtype)).to(args.device)


def smollm2() -> Path:
    from adapterpack.demos import SMOLLM2, fetch

    return fetch(SMOLLM2)


def ours(args: argparse.Namespace) -> Subject:
    from adapterpack import LoRA, adapt
    from adapterpack.torch_adapters.layers.layer import AdaptedLayer
    from adapterpack.training.loop.blockwise_loss import blockwise_loss

    model = adapt(
        base(args), LoRA(r=args.rank, alpha=2 * args.rank, dropout=args.dropout, targets=TARGETS), "bench"
    ).train()
    blocks = blockwise_loss(model, batch(args))
    assert blocks is not None

    def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with blocks.instead():
            return model(**inputs).loss

    return Subject(
        model,
        {
            f"{layer._site.path}.{key}": value
            for layer in model.modules()
            if isinstance(layer, AdaptedLayer)
            for key, value in layer._part("bench").items()
        },
        loss,
    )


def peft(args: argparse.Namespace) -> Subject:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base(args), config).train()
    return Subject(
        model,
        {
            name.removeprefix("base_model.model.").replace(".default.weight", ""): value
            for name, value in model.named_parameters()
            if value.requires_grad
        },
        lambda inputs: model(**inputs).loss,
    )


def trl(args: argparse.Namespace) -> Subject:
    """PEFT's model with the loss of TRL's SFTTrainer, which does not make all logits either."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    theirs = peft(args)
    scratch = TemporaryDirectory()
    atexit.register(scratch.cleanup)
    config = SFTConfig(
        scratch.name,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        max_length=args.length,
        use_cpu=args.device == "cpu",
    )
    trainer = SFTTrainer(
        theirs.model,
        config,
        train_dataset=Dataset.from_dict({"text": ["one row"]}),
        processing_class=AutoTokenizer.from_pretrained(smollm2()),
    )
    trainer.model.train()
    return theirs._replace(loss=lambda inputs: trainer.compute_loss(trainer.model, dict(inputs)))


def floor(args: argparse.Namespace) -> Subject:
    """The frozen base: what a step costs that has no adapter, with gradients of all activations as adapters
    need them.
    """
    from adapterpack.training.loop.blockwise_loss import blockwise_loss

    model = base(args).train().requires_grad_(False)
    model.enable_input_require_grads()
    blocks = blockwise_loss(model, batch(args))
    assert blocks is not None

    def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with blocks.instead():
            return model(**inputs).loss

    return Subject(model, {}, loss)


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "adapterpack": ours,
    "peft": peft,
    "trl": trl,
    "floor": floor,
}


@torch.no_grad()
def fill(subject: Subject) -> None:
    """The same tensors in both, B not zero, so that every gradient is at work."""
    generator = torch.Generator().manual_seed(1)
    for name in sorted(subject.adapter):
        value = subject.adapter[name]
        value.copy_(0.02 * torch.randn(value.shape, generator=generator))


def batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Rows of the demo's orders, one after the other, all of whose tokens are learned; of the tiny model
    random ones.
    """
    count = args.batch * args.length
    if args.size == "tiny":
        ids = torch.randint(1, TINY["vocab_size"], (count,), generator=torch.Generator().manual_seed(2))
    else:
        from transformers import AutoTokenizer

        from adapterpack.demos import load_stages

        text = "\n".join(
            f"{row['prompt']}\n{row['completion']}"
            for row in load_stages("common").rows_of("orders", "train")
        )
        tokens = AutoTokenizer.from_pretrained(smollm2())(text)["input_ids"]
        ids = torch.tensor((tokens * (count // len(tokens) + 1))[:count])
    ids = ids.reshape(args.batch, args.length).to(args.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def stepper(subject: Subject, inputs: dict[str, torch.Tensor]) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    optimizer = torch.optim.AdamW(subject.adapter.values(), lr=1e-4) if subject.adapter else None

    def step() -> float:
        loss = subject.loss(inputs)
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return step


def gradients(subject: Subject, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    subject.loss(inputs).backward()
    found = {name: value.grad.float().clone() for name, value in subject.adapter.items()}
    subject.model.zero_grad()
    return found


def contestants(args: argparse.Namespace) -> list[str]:
    """TRL is left out of the tiny model, which has no tokenizer."""
    return [who for who in SUBJECTS if who != "trl" or args.size != "tiny"]


def wait(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(args: argparse.Namespace) -> tuple[float, float]:
    """MB of this process over three steps of one subject, and those above the model and its adapter."""
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
    most = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else resident_mb("VmHWM")
    return most, most - before


def measure(args: argparse.Namespace) -> dict[str, Any]:
    subjects = {who: SUBJECTS[who](args) for who in contestants(args)}
    inputs = batch(args)
    for subject in subjects.values():
        fill(subject)
    found = {who: gradients(subjects[who], inputs) for who in ("adapterpack", "peft")}
    assert found["adapterpack"].keys() == found["peft"].keys()
    largest = max(float(value.abs().max()) for value in found["peft"].values())
    difference = max(
        float((found["adapterpack"][name] - value).abs().max()) for name, value in found["peft"].items()
    )
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
    figures = {
        who: {"seconds": median(values), "fastest": min(values), **memory(who)}
        for who, values in times.items()
    }
    pairs = {
        who: [ours / theirs for ours, theirs in zip(times["adapterpack"], values, strict=True)]
        for who, values in times.items()
        if who != "adapterpack"
    }
    return {
        "benchmark": "train",
        "size": args.size,
        "device": args.device,
        "dtype": args.dtype,
        "batch": [args.batch, args.length],
        "rank": args.rank,
        "dropout": args.dropout,
        "sites": len(found["peft"]) // 2,
        "threads": torch.get_num_threads(),
        "runs": args.runs,
        **figures,
        "ratios": {
            who: {
                "time": median(values),
                "times": [min(values), max(values)],
                "peak": figures["adapterpack"]["peak_mb"] / figures[who]["peak_mb"],
                "peak_above_model": figures["adapterpack"]["above_model_mb"] / figures[who]["above_model_mb"],
            }
            for who, values in pairs.items()
        },
        "gradient_difference": None if args.dropout else difference / largest,
    }


def memory(who: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--worker", who],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    most, above = map(float, done.stdout.splitlines()[-1].split())
    return {"peak_mb": most, "above_model_mb": above}


def show(result: dict[str, Any]) -> None:
    rows, length = result["batch"]
    print(
        f"{result['size']}, {result['device']}, {result['dtype']}, {rows} x {length} tokens, "
        f"{result['sites']} sites of rank "
        f"{result['rank']}, dropout {result['dropout']}; median of {result['runs']}"
    )
    for who in ("adapterpack", *result["ratios"]):
        r = result[who]
        print(
            f"  {who:12} step {1000 * r['seconds']:8.1f} ms   fastest {1000 * r['fastest']:8.1f} ms   peak "
            f"{r['peak_mb']:6.0f} MB, {r['above_model_mb']:.0f} above the model"
        )
    for who, ratio in result["ratios"].items():
        print(
            (
                "  adapterpack / {}: time {:.3f} in the median pair ({:.2f} to {:.2f}), peak memory {:.2f}, "
                "above the model {:.2f}"
            ).format(who, ratio["time"], *ratio["times"], ratio["peak"], ratio["peak_above_model"])
        )
    if result["gradient_difference"] is not None:
        print(
            f"  largest difference between the gradients: {result['gradient_difference']:.1e} of the "
            "largest gradient"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "135m"), default="135m", help="135m is SmolLM2")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the base; adapters are in float32",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=SUBJECTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(*peak(args))
        return
    result = measure(args)
    print(json.dumps(result, indent=2)) if args.json else show(result)


if __name__ == "__main__":
    main()
