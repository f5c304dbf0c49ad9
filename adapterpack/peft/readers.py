"""Tells which other libraries load a pack's folder correctly, and why the others do not."""

from __future__ import annotations

from ..manifest import Described
from ..tasks import TASKS
from .layout import config_bytes

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``max_lora_rank``; its default is 16."""
_CAUSAL = "CAUSAL_LM"
_SERVED = ("linear", "embedding")


def readers(pack: Described) -> dict[str, str]:
    """Returns library -> why it does not load the pack's folder as intended, or an empty string if it does.

    The reasons were measured for each method: PEFT and transformers by ``tests/test_readers.py``, vLLM's
    loader by ``tests/interop/vllm_loads.py``.
    """
    if config_bytes(pack.manifest) is None:
        return dict.fromkeys(
            ("PEFT", "transformers", "vLLM"),
            "PEFT has no such adapter, so that the folder has no adapter_config.json",
        )
    # Reversed, so that reasons of the pack's own method win over those of secondary methods.
    forms = [method.peft for method in reversed(pack.methods) if method.peft is not None]
    reasons = {library: why for form in forms for library, why in form.refused_by.items()}
    return {
        "PEFT": "",
        "transformers": reasons.get("transformers", ""),
        "vLLM": reasons.get("vLLM") or _not_in_vllm(pack),
    }


def _not_in_vllm(pack: Described) -> str:
    """Returns why vLLM does not load a LoRA pack, or an empty string if it does."""
    task = TASKS.find(pack.manifest.task.type)
    groups = pack.manifest.adapter_groups
    if task is None or task.peft_type != _CAUSAL:
        return "it serves adapters of language models, and this is none"
    if len(groups) < len(pack.manifest.groups):
        return "it takes no module that was trained whole"
    if any(group.kind not in _SERVED for group in groups):
        return "it takes linear layers and embeddings alone"
    return f"it takes ranks up to {MAX_RANKS[-1]}" if largest_rank(pack) > MAX_RANKS[-1] else ""


def largest_rank(pack: Described) -> int:
    """Returns the largest rank among the sites of a pack."""
    return max((group.rank or 0 for group in pack.manifest.groups), default=0)


def line(pack: Described) -> str:
    """Returns one line about a written folder: which libraries load it, and which do not, with the reason."""
    found = readers(pack)
    right = [name for name, why in found.items() if not why]
    wrong = [f"{name}: {why}" for name, why in found.items() if why]
    if not right:
        return f"no other library loads this folder: {next(iter(found.values()))}"
    loads = f"{' and '.join(right)} {'loads' if len(right) == 1 else 'load'} this folder"
    return f"{loads}; not so {'; '.join(wrong)}" if wrong else loads
