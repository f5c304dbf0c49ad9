"""An encoder and a decoder on the engine: a step beside the ordinary graph's, and beam search beside
transformers', on one random model.

``ordinary``: the decoder on caches that each pass gives anew, a batch of one length. ``none``, ``one``,
``mixed``: the engine's graph, on rows without an adapter, with one for all, and with another in each. Steps
are run in turn; the median counts, and the minimum beside it says how quiet the machine was. ``beams``: whole
searches for answers of 32 tokens.

    python benchmarks/seq2seq.py --family t5 --rows 8
    python benchmarks/seq2seq.py --family bart --size tiny --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from engine import timed

from adapterpack import Session
from adapterpack.adapter_methods.lora import LoRA
from adapterpack.exporting.pipeline import export
from adapterpack.runtime.engine.engine import DecoderEngine
from adapterpack.runtime.engine.requests import SequenceState
from adapterpack.runtime.sessions.decoder import EncoderDecoder
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.adapt import adapt
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.torch_adapters.save import save

SIZES = {"tiny": (64, 2, 4, 128), "small": (512, 6, 8, 1024)}
"""Width, layers of each side, heads, and the width between."""
SOURCE, SO_FAR = 64, 32
"""Tokens that the encoder reads, and those of the answer before a step."""


def build_base(folder: Path, family: str, size: str) -> None:
    """A random model with a one-word tokenizer: prompts are given as ids."""
    torch.manual_seed(0)
    width, layers, heads, inner = SIZES[size]
    tokens = {
        "vocab_size": 32128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "decoder_start_token_id": 0,
    }
    if family == "t5":
        config: Any = transformers.T5Config(
            **tokens, d_model=width, d_kv=width // heads, d_ff=2 * inner, num_layers=layers, num_heads=heads
        )
        model: Any = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BartConfig(
            **tokens,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=2 * inner,
            decoder_ffn_dim=2 * inner,
            forced_eos_token_id=None,
        )
        model = transformers.BartForConditionalGeneration(config)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"},
            }
        )
    )


def build_packs(base: Path, folder: Path, family: str, count: int, rank: int) -> list[Path]:
    """Random LoRAs at queries, values and one layer between."""
    targets = ("q", "v", "wo") if family == "t5" else ("q_proj", "v_proj", "fc1")
    packs = []
    for number in range(count):
        model = load_model(get_task("text2text-generation"), base)
        adapt(model, LoRA(r=rank, targets=targets), f"a{number}")
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.02)
        save(model, folder / f"a{number}", base=base, name=f"a{number}")
        packs.append(folder / f"a{number}")
    return packs


def ordinary_step(session: Session, names: list[str | None], prompts: list[list[int]]) -> Callable[[], None]:
    """One token more for a batch on the ordinary graph, again and again on the same cache."""
    going = EncoderDecoder(session, prompts, names, {}, [0] * SO_FAR)
    outputs, tokens = going.prefill(), np.full(len(names), 7)
    return lambda: (going.step(tokens, outputs), None)[1]


def engine_step(
    engine: DecoderEngine, names: list[str | None], prompts: list[list[int]]
) -> Callable[[], None]:
    """The same on the engine's."""
    batch: Any = engine.rows
    rows = [
        SequenceState(
            prompt=[0] * SO_FAR,
            source={"input_ids": np.array([ids])},
            adapter=None if name is None else engine.adapters.acquire(engine.adapters.pack(name)),
        )
        for name, ids in zip(names, prompts, strict=True)
    ]
    for row in rows:
        batch.admit(row)
    for row in rows:
        batch.prefill(SO_FAR)
        row.next_token = 7

    def step() -> None:
        batch.decode()
        for row in rows:
            row.kv_len -= 1

    return step


def searches(
    session: Session, base: Path, prompts: list[list[int]], beams: int, tokens: int
) -> dict[str, Callable[[], None]]:
    """Whole searches, of ours and of transformers'."""
    model = load_model(get_task("text2text-generation"), base).eval()
    batch = torch.tensor(prompts)

    def theirs() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                num_beams=beams,
                max_new_tokens=tokens,
                do_sample=False,
            )

    return {
        f"{beams} beams": lambda: (session.generate(prompts, num_beams=beams, max_new_tokens=tokens), None)[
            1
        ],
        f"{beams} beams transformers": theirs,
    }


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON."""
    base, count = work / "base", arguments.rows
    build_base(base, arguments.family, arguments.size)
    export(
        base,
        build_packs(base, work, arguments.family, 3, arguments.rank),
        work / "bank",
        mode="bank",
        in_place=True,
    )
    rng = np.random.default_rng(0)
    prompts = [[int(token) for token in rng.integers(1, 30000, SOURCE)] for _ in range(count)]
    session, names = Session(work / "bank", "cpu"), [None, "a0", "a1", "a2"]
    batches: dict[str, list[str | None]] = {
        "none": [None] * count,
        "one": ["a0"] * count,
        "mixed": [*names * count][:count],
    }
    contestants = {"ordinary mixed": ordinary_step(session, batches["mixed"], prompts)}
    contestants |= {
        kind: engine_step(
            DecoderEngine(work / "bank", "cpu", max_rows=count, max_length=256), chosen, prompts
        )
        for kind, chosen in batches.items()
    }
    times = timed(contestants, arguments.runs)
    times |= timed(searches(session, base, prompts[: arguments.prompts], arguments.beams, 32), 3)
    return {
        "benchmark": "seq2seq",
        "family": arguments.family,
        "size": arguments.size,
        "rows": count,
        "milliseconds": {
            name: {"median": median(all_times), "min": min(all_times)} for name, all_times in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("t5", "bart"), default="t5")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2, help="prompts that are searched for at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(Path(scratch), arguments)
    if arguments.json:
        print(json.dumps(report))
        return
    for name, found in report["milliseconds"].items():
        print(f"{name:26} {found['median']:9.1f} ms  (least {found['min']:.1f})")


if __name__ == "__main__":
    main()
