"""How far logits lie from exact ones, by family and form of the weights: tiny random models, each with a
random LoRA, read by the engine as prompts and steps.

``of float64`` is the error beside transformers and PEFT in float64 on the original weights, so that of int8
and int4 is mostly their rounding's. ``of the CPU`` is the error beside the same bundle on ONNX Runtime's
CPU provider, which computes in float32 what has no smaller kernel: what the card adds. Errors are the
largest of all numbers, relative to the largest logit; each is that of the worst model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from decode import build_pack
from gpu_plan import FORMS, Plan, Row, Table, error_of, worst
from peft import PeftModel

from adapterpack.errors import AdapterpackError
from adapterpack.exporting.pipeline import export
from adapterpack.runtime.engine.engine import DecoderEngine
from adapterpack.runtime.engine.requests import SequenceState
from adapterpack.runtime.providers.device import Device

transformers.utils.logging.disable_progress_bar()

WORDS, PROMPT, STEPS = 96, 24, 4
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
}
"""Name -> its config in transformers, and what that has beside `SIZES`."""


def build_model(family: str, folder: Path, seed: int) -> None:
    """A random checkpoint in which no bias and no norm is trivial."""
    name, more = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**SIZES, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def exact_logits(base: Path, pack: Path | None, tokens: list[int]) -> np.ndarray:
    """Logits ``[tokens, vocabulary]`` of transformers and PEFT in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    )
    if pack is not None:
        model = PeftModel.from_pretrained(model, str(pack))
    with torch.no_grad():
        found: np.ndarray = model.double().eval()(torch.tensor([tokens])).logits[0].numpy()
    return found


def engine_logits(bundle: Path, device: Device, names: list[str | None], tokens: list[int]) -> np.ndarray:
    """Logits ``[rows, 1 + STEPS, vocabulary]`` after a prompt and after each step, of rows that read the
    same tokens with these adapters.
    """
    engine = DecoderEngine(bundle, device, max_rows=len(names), max_length=64, prefix_budget=0)
    batch, found = engine.rows, []
    for name in names:
        adapter = None if name is None else engine.adapters.acquire(engine.adapters.pack(name))
        batch.admit(SequenceState(prompt=tokens[:PROMPT], adapter=adapter))
        found.append([np.array(batch.prefill(PROMPT))])
    for token in tokens[PROMPT:]:
        for row in batch.running:
            row.next_token = token
        for row, logits in zip(found, batch.decode(), strict=True):
            row.append(np.array(logits))
    return np.array(found, np.float64)


def measure(plan: Plan) -> Table:
    """The largest errors by family and form."""
    table = Table([], [])
    for family in plan.args.families or FAMILIES:
        for form in plan.args.forms:
            errors = {
                f"{kind} of {what}": list[float]() for kind in plan.devices for what in ("float64", "the CPU")
            }
            for seed in range(plan.args.models):
                try:
                    found = _errors(plan, family, form, seed)
                except AdapterpackError as error:
                    table.notes.append(f"{family} in {form}: {error}")
                    continue
                for name, one in found.items():
                    errors[name].append(one)
            table.rows.append(
                {
                    "family": family,
                    "form": form,
                    **{name: worst(all_of) for name, all_of in errors.items()},
                }
            )
    return table


def _errors(plan: Plan, family: str, form: str, seed: int) -> Row:
    work = plan.work / "families" / f"{family}{seed}"
    base, pack, bundle = work / "base", work / "pack", work / form
    if not base.exists():
        build_model(family, base, seed)
        build_pack(base, pack, 8, seed)
    if not bundle.exists():
        scheme, dtype = FORMS[form]
        export(base, [pack], bundle, mode="bank", in_place=True, quantize=scheme, dtype=dtype)
    tokens = np.random.default_rng(seed).integers(3, WORDS, PROMPT + STEPS).tolist()
    names: list[str | None] = [None, pack.name]
    expected = np.array([exact_logits(base, one, tokens)[PROMPT - 1 :] for one in (None, pack)])
    on_cpu = engine_logits(bundle, Device(provider="cpu"), names, tokens) if plan.on_card else None
    errors: Row = {}
    for kind, device in plan.devices.items():
        found = engine_logits(bundle, device, names, tokens)
        errors[f"{kind} of float64"] = error_of(found, expected)
        if on_cpu is not None:
            errors[f"{kind} of the CPU"] = error_of(found, on_cpu)
    return errors
