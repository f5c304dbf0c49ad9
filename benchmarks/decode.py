"""Decoding with adapters: tokens per second of a bank bundle under ONNX Runtime, beside PEFT in eager
PyTorch, on one random Llama.

Four rows decode greedily after prompts of 16 tokens. ``mixed``: three adapters and the base share the batch
(a bundle's rows by name, PEFT by ``adapter_names``). ``base``: the same batch without an adapter (PEFT with
its adapters switched off). The contestants run in turn in one process, after a warm-up each; the median
counts. No row can end early, so each makes the same number of tokens. ``--packing`` and ``--in-place`` decode
with the same bank twice instead, for one row and for four: with its sibling projections in one product each
and without, and with the graph for steps on caches that stay where they are and without it. ``--quantize``
does so on a quantized bank. The two are run in turn, each first as often as second.

    python benchmarks/decode.py --size 135m
    python benchmarks/decode.py --size 135m --packing --runs 11
    python benchmarks/decode.py --size 135m --in-place --quantize int4 --tokens 16
    python benchmarks/decode.py --size tiny --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.exporting.pipeline import export
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build
from adapterpack.runtime.sessions.session import Session

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1b": {  # Llama 3.2 1B with the vocabulary of SmolLM2
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
NAMES: list[str | None] = ["one", "two", None, "three"]
PROMPT = 16


def build_base(folder: Path, size: str, positions: int = 2048) -> None:
    """A random Llama, and a tokenizer with a word for each token: prompts are given as ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size],
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {
                    "type": "WordLevel",
                    "vocab": {f"w{number}": number for number in range(config.vocab_size)},
                    "unk_token": "w0",
                },
            }
        )
    )


def build_pack(
    base: Path, folder: Path, rank: int, seed: int, layers: tuple[str, ...] = ("_proj.weight",)
) -> int:
    """A random LoRA at the layers whose weights' names end so; returns the number of sites."""
    checkpoint, rng = Checkpoint(base), np.random.default_rng(seed)
    adapters = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(layers):
            site = Site(name.removesuffix(".weight"), info.shape[1], info.shape[0])
            shapes = {"lora_A": (rank, site.in_features), "lora_B": (site.out_features, rank)}
            adapters[site] = (
                LoRA(r=rank),
                {key: rng.normal(0, 0.02, shape).astype(np.float32) for key, shape in shapes.items()},
            )
    made_for = m.Base("base", structure=checkpoint.structure, content=checkpoint.content)
    build(folder.name, get("lora"), adapters, task=m.PackTask("text-generation"), base=made_for).write(folder)
    return len(adapters)


def peft_model(base: Path, packs: list[Path]) -> Any:
    """PEFT over the same base and the same packs."""
    first, *rest = packs
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), str(first), adapter_name=first.name
    )
    for pack in rest:
        model.load_adapter(str(pack), adapter_name=pack.name)
    return model.eval()


def contestants(
    session: Session, model: Any, prompts: list[list[int]], tokens: int
) -> dict[str, Callable[[], list[tuple[int, ...]]]]:
    """Each makes ``tokens`` new ids for every prompt."""
    inputs = {
        "input_ids": torch.tensor(prompts),
        "attention_mask": torch.ones(len(prompts), PROMPT, dtype=torch.int64),
    }
    options = {
        **inputs,
        "max_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def ours(names: list[str | None] | None) -> list[tuple[int, ...]]:
        return [answer.ids for answer in session.generate(prompts, names, max_new_tokens=tokens)]

    def theirs(mixed: bool) -> list[tuple[int, ...]]:
        with torch.no_grad():
            if mixed:
                output = model.generate(**options, adapter_names=[name or "__base__" for name in NAMES])
            else:
                with model.disable_adapter():
                    output = model.generate(**options)
        return [tuple(row[PROMPT:].tolist()) for row in output]

    return {
        "bank mixed": lambda: ours(NAMES),
        "bank base": lambda: ours(None),
        "peft mixed": lambda: theirs(True),
        "peft base": lambda: theirs(False),
    }


def measure(work: Path, size: str, runs: int, tokens: int, rank: int) -> dict[str, Any]:
    base = work / f"llama-{size}"
    build_base(base, size)
    packs = [work / name for name in NAMES if name]
    sites, *_ = [build_pack(base, pack, rank, seed) for seed, pack in enumerate(packs)]
    export(base, packs, work / "bundle", mode="bank")
    session, model = Session(work / "bundle", "cpu"), peft_model(base, packs)
    rng = np.random.default_rng(1)
    prompts = [list(map(int, rng.integers(1, SIZES[size]["vocab_size"], PROMPT))) for _ in NAMES]
    every = contestants(session, model, prompts, tokens)
    answers = {who: go() for who, go in every.items()}  # the warm-up
    seconds: dict[str, list[float]] = {who: [] for who in every}
    for _ in range(runs):
        for who, go in every.items():
            started = time.perf_counter()
            go()
            seconds[who].append(time.perf_counter() - started)
    made = tokens * len(NAMES)
    speed = {who: made / median(found) for who, found in seconds.items()}
    same = {
        kind: float(
            np.mean(
                [
                    a == b
                    for one, two in zip(answers[f"bank {kind}"], answers[f"peft {kind}"], strict=True)
                    for a, b in zip(one, two, strict=True)
                ]
            )
        )
        for kind in ("mixed", "base")
    }
    return {
        "benchmark": "decode",
        "size": size,
        "sites": sites,
        "rank": rank,
        "rows": len(NAMES),
        "tokens": tokens,
        "runs": runs,
        "threads": torch.get_num_threads(),
        "provider": session.provider,
        "tokens_per_second": speed,
        "seconds": seconds,
        "ratio_mixed": speed["bank mixed"] / speed["peft mixed"],
        "ratio_base": speed["bank base"] / speed["peft base"],
        "mixed_over_base": speed["bank mixed"] / speed["bank base"],
        "token_agreement": same,
    }


Pair = tuple[str, str]


def packed_or_not(base: Path, packs: list[Path], work: Path, scheme: str | None) -> Pair:
    """The bank with sibling projections in one product each, and without; the names of both folders."""
    stage: Any = import_module("adapterpack.exporting.bundle_writer")
    usual = stage.pack_siblings
    try:
        for name, way in {"packed": usual, "apart": lambda model, every, plan, shared: plan}.items():
            stage.pack_siblings = way
            export(base, packs, work / name, mode="bank", quantize=scheme)
    finally:
        stage.pack_siblings = usual
    return "packed", "apart"


def in_place_or_not(base: Path, packs: list[Path], work: Path, scheme: str | None) -> Pair:
    """The bank with the graph for steps in place, and without; the names of both folders."""
    for name, in_place in {"in place": True, "grown": False}.items():
        export(base, packs, work / name, mode="bank", in_place=in_place, quantize=scheme)
    return "in place", "grown"


PAIRS = {"packing": packed_or_not, "in place": in_place_or_not}


def measure_pair(
    work: Path, mode: str, scheme: str | None, size: str, runs: int, tokens: int, rank: int
) -> dict[str, Any]:
    """Tokens per second of two forms of a bank in turn, one and four rows, with adapters and without."""
    base = work / f"llama-{size}"
    build_base(base, size)
    packs = [work / name for name in NAMES if name]
    sites, *_ = [build_pack(base, pack, rank, seed) for seed, pack in enumerate(packs)]
    pair = PAIRS[mode](base, packs, work, scheme)
    sessions = {kind: Session(work / kind, "cpu") for kind in pair}
    rng = np.random.default_rng(1)
    prompts = [list(map(int, rng.integers(1, SIZES[size]["vocab_size"], PROMPT))) for _ in NAMES]
    kinds: dict[str, list[str | None]] = {"mixed": NAMES, "base": [None] * len(NAMES)}
    batches = {
        f"{rows} {kind}": (prompts[:rows], names[:rows])
        for rows in (1, len(NAMES))
        for kind, names in kinds.items()
    }
    seconds: dict[str, dict[str, list[float]]] = {what: {kind: [] for kind in pair} for what in batches}
    same: dict[str, float] = {}
    for turn in range(runs + 1):
        for what, (rows, names) in batches.items():
            answers = {}
            for kind in pair if turn % 2 else reversed(pair):
                started = time.perf_counter()
                answers[kind] = [
                    answer.ids for answer in sessions[kind].generate(rows, names, max_new_tokens=tokens)
                ]
                if turn:  # the first is the warm-up
                    seconds[what][kind].append(time.perf_counter() - started)
            same[what] = float(np.mean(np.array(answers[pair[0]]) == np.array(answers[pair[1]])))
    speed = {
        what: {kind: tokens * len(batches[what][0]) / median(found) for kind, found in each.items()}
        for what, each in seconds.items()
    }
    gains = {
        what: median(b / a for a, b in zip(each[pair[0]], each[pair[1]], strict=True))
        for what, each in seconds.items()
    }
    return {
        "benchmark": "decode",
        "mode": mode,
        "quantize": scheme,
        "size": size,
        "sites": sites,
        "rank": rank,
        "tokens": tokens,
        "runs": runs,
        "tokens_per_second": speed,
        f"{pair[0]}_over_{pair[1]}".replace(" ", "_"): gains,
        "seconds": seconds,
        "token_agreement": same,
        "nodes": {kind: sum(1 for _ in ir.load(work / kind / "model.onnx").graph) for kind in pair},
    }


def show_pair(result: dict[str, Any]) -> None:
    (gains,) = (value for key, value in result.items() if "_over_" in key)
    print(
        f"Llama {result['size']} {result['quantize'] or 'float32'}, {result['sites']} sites, rank "
        f"{result['rank']}, {result['tokens']} tokens a row, median of {result['runs']}; nodes: "
        + ", ".join(f"{kind} {count}" for kind, count in result["nodes"].items())
    )
    for what, each in result["tokens_per_second"].items():
        print(
            f"  {what:8}  "
            + "  ".join(f"{kind} {speed:7.1f} tokens/s" for kind, speed in each.items())
            + f"  {gains[what]:.3f}"
            f"  equal tokens {result['token_agreement'][what]:.1%}"
        )


def show(result: dict[str, Any]) -> None:
    print(
        f"Llama {result['size']}, {result['sites']} sites, rank {result['rank']}, {result['rows']} rows x "
        f"{result['tokens']} tokens, "
        f"prompts of {PROMPT}; median of {result['runs']}, {result['provider']}, {result['threads']} threads"
    )
    for who, speed in result["tokens_per_second"].items():
        print(f"  {who:10}  {speed:8.1f} tokens/s")
    print(f"  ratio (bank / PEFT): mixed {result['ratio_mixed']:.2f}, base {result['ratio_base']:.2f}")
    print(f"  the bank's mixed rows run at {result['mixed_over_base']:.2f} of the speed of its base rows")
    print(
        "  equal tokens: "
        + ", ".join(f"{kind} {share:.1%}" for kind, share in result["token_agreement"].items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    pairs = parser.add_mutually_exclusive_group()
    pairs.add_argument(
        "--packing",
        dest="mode",
        action="store_const",
        const="packing",
        help="with sibling projections in one product each, and without",
    )
    pairs.add_argument(
        "--in-place",
        dest="mode",
        action="store_const",
        const="in place",
        help="with the graph for steps on caches that stay where they are, and without",
    )
    parser.add_argument("--quantize", choices=("int4", "int8"), help="the bank of --packing or --in-place")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.runs < 5:
        parser.error("--runs must be at least 5")
    if args.quantize and not args.mode:
        parser.error("--quantize goes with --packing or --in-place")
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        sizes = args.size, args.runs, args.tokens, args.rank
        result = (
            measure_pair(Path(folder), args.mode, args.quantize, *sizes)
            if args.mode
            else measure(Path(folder), *sizes)
        )
    print(json.dumps(result, indent=2)) if args.json else (show_pair if args.mode else show)(result)


if __name__ == "__main__":
    main()
