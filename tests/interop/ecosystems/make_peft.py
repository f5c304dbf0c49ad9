"""Adapters that a version of PEFT makes, and what its models give with them: ``python make_peft.py FOLDER``, in an
environment with PEFT.

``FOLDER/bases/FAMILY`` are checkpoints. It writes ``adapters/FAMILY/NAME`` as ``save_pretrained`` does, and
``made.safetensors`` (FAMILY/NAME -> logits). Cases that the version does not know are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.modules["torchao"] = None  # type: ignore[assignment] # one of another time is worse than none

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
LAYERS = {"target_modules": ["q_proj", "down_proj"]}
ATTENTION = r".*\.layers\.\d+\.self_attn\.(q|v)_proj"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama/lora": ("LoraConfig", LORA),
    "llama/regex": ("LoraConfig", {**LORA, "target_modules": ATTENTION}),
    "llama/layers": ("LoraConfig", {**LORA, "layers_to_transform": [1]}),
    "llama/saved": ("LoraConfig", {**LORA, "modules_to_save": ["lm_head"]}),
    "llama/embedding": ("LoraConfig", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "llama/patterns": ("LoraConfig", {**LORA, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 7}}),
    "llama/rslora": ("LoraConfig", {**LORA, "use_rslora": True}),
    "llama/dora": ("LoraConfig", {**LORA, "use_dora": True}),
    "llama/adalora": (
        "AdaLoraConfig",
        {**LORA, "target_r": 2, "init_r": 3, "total_step": 10, "lora_dropout": 0.1},
    ),
    "llama/ia3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "llama/prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "llama/p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
    "mha/prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "mha/adaption": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}),
    "llama/loha": ("LoHaConfig", {**LAYERS, "r": 2, "alpha": 3}),
    "llama/lokr": ("LoKrConfig", {**LAYERS, "r": 2, "alpha": 3}),
    "llama/boft": ("BOFTConfig", {**LAYERS, "boft_block_size": 4}),
    "llama/vera": ("VeraConfig", {"target_modules": ["q_proj", "o_proj"], "r": 4}),
    "llama/norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "llama/fourier": ("FourierFTConfig", {**LAYERS, "n_frequency": 20}),
    "llama/hra": ("HRAConfig", {**LAYERS, "r": 2}),
    "bert/head": (
        "LoraConfig",
        {"r": 2, "lora_alpha": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "bert/biases": (
        "LoraConfig",
        {"r": 2, "target_modules": ["query"], "bias": "all", "task_type": "FEATURE_EXTRACTION"},
    ),
    "gpt2/lora": (
        "LoraConfig",
        {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "FEATURE_EXTRACTION"},
    ),
    "gpt2/ia3": (
        "IA3Config",
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
            "task_type": "FEATURE_EXTRACTION",
        },
    ),
}
"""Family and name -> the class of the configuration and its options."""
CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


def base_of(folder: Path, case: str, task: str) -> Any:
    """The base of a case, with the class of its task."""
    kind = getattr(transformers, CLASSES.get(task, "AutoModel"))
    return kind.from_pretrained(folder / "bases" / case.partition("/")[0])


def output(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits or hidden states, at the tokens alone."""
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = found.logits if "logits" in found else found[0]
    return (found[:, -ids.shape[1] :] if found.dim() == 3 else found).float().contiguous()


def make(folder: Path, case: str, ids: torch.Tensor) -> torch.Tensor | None:
    """An adapter with random numbers, saved; nothing where this version has no such configuration."""
    kind, options = CASES[case]
    options = {"task_type": "CAUSAL_LM", **options}
    try:
        config = getattr(peft, kind)(**options)
    except (AttributeError, TypeError):
        return None
    try:
        model = peft.get_peft_model(base_of(folder, case, options["task_type"]), config)
        for value in model.parameters():
            if value.requires_grad:
                value.data.add_(0.2 * torch.randn(value.shape))
        wanted = output(model, ids)
    except Exception as error:
        sys.stdout.write(f"      {case}: PEFT {peft.__version__} itself fails: {error!r:.150}\n")
        return None
    model.save_pretrained(folder / "adapters" / case)
    return wanted


def main(folder: Path) -> None:
    """Every case that this version knows."""
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    ids = load_file(folder / "ids.safetensors")["ids"]
    made = {case: make(folder, case, ids) for case in CASES}
    save_file({case: value for case, value in made.items() if value is not None}, folder / "made.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
