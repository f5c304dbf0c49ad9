"""What vLLM's own loader makes of folders: ``python vllm_child.py OUT FOLDER...``, in an environment with
vLLM (``vllm_loads.py``).

Each folder goes through ``PEFTHelper.from_local_dir``, ``validate_legal`` and
``LoRAModel.from_local_checkpoint``, as the engine's worker has it, on the CPU. OUT gets ``FOLDER/MODULE`` ->
scaling * B A in float64, and ``FOLDER/MODULE.whole`` for a module trained whole. Prints one line of JSON:
folder -> the refusal, or null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.llama import LlamaForCausalLM

POSITIONS, VOCABULARY = 64, 37


def expected_modules() -> set[str]:
    """The layers that vLLM's Llama takes adapters for, by the names that they have in folders."""
    packed = [part for parts in LlamaForCausalLM.packed_modules_mapping.values() for part in parts]
    return {*packed, *LlamaForCausalLM.embedding_modules, "o_proj", "down_proj"}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> its change, and the modules trained whole."""
    helper = PEFTHelper.from_local_dir(str(folder), POSITIONS)
    helper.validate_legal(LoRAConfig(max_lora_rank=16))
    # "cpu" alone would pin the memory for a GPU
    model = LoRAModel.from_local_checkpoint(
        str(folder), expected_modules(), helper, lora_model_id=1, device="cpu:0", model_vocab_size=VOCABULARY
    )
    changes = {
        name: lora.scaling * lora.lora_b.double() @ lora.lora_a.double() for name, lora in model.loras.items()
    }
    return changes | {
        f"{name}.whole": module.weight.double() for name, module in model.modules_to_save.items()
    }


def main(out: Path, folders: list[Path]) -> None:
    """Loads every folder."""
    refusals: dict[str, str | None] = {}
    tensors = {}
    for folder in folders:
        try:
            tensors |= {f"{folder.name}/{name}": value.contiguous() for name, value in loaded(folder).items()}
            refusals[folder.name] = None
        # a TypeError where settings of its own are missing
        except (TypeError, ValueError, RuntimeError) as error:
            refusals[folder.name] = str(error)
    save_file(tensors, out)
    sys.stdout.write(json.dumps(refusals) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
