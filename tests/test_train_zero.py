"""DeepSpeed's ZeRO over two processes: ``save`` writes whole adapters, those of one process with all rows.

The tests run where DeepSpeed is installed: in this environment, or in the one whose interpreter
``ADAPTERPACK_DEEPSPEED_PYTHON`` names.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from processes import run_two
from test_train_processes import close
from transformers import AutoModelForCausalLM

import adapterpack
from adapterpack import LoRA, adapt, load, save

PYTHON = os.environ.get("ADAPTERPACK_DEEPSPEED_PYTHON")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        PYTHON is None and importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]
ROWS = torch.arange(4 * 6).reshape(4, 6) % 96
SCRIPT = """
import sys, torch, deepspeed, torch.distributed as dist
from transformers import AutoModelForCausalLM
from adapterpack import LoRA, adapt, save
stage, base, out = sys.argv[1:]
deepspeed.init_distributed("gloo")
rank = dist.get_rank()
model = adapt(AutoModelForCausalLM.from_pretrained(base), LoRA(r=2), "one")
optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.5)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
    "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 0}})
rows = torch.arange(4 * 6).reshape(4, 6) % 96
for _ in range(2):
    mine = rows[2 * rank : 2 * rank + 2]
    engine.backward(engine(input_ids=mine, labels=mine).loss)
    engine.step()
save(model, out if rank == 0 else None, base=base)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("stage", ["2", "3"])
def test_partitioned_adapters_are_written_whole(stage: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Stage 3 partitions the adapter's parameters, too; the pack is that of one process and valid on the
    base.
    """
    script = tmp_path / "zero.py"
    script.write_text(SCRIPT)
    run_two(str(script), stage, str(tiny_llama), str(tmp_path / "pack"), python=PYTHON or sys.executable)
    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_llama), LoRA(r=2), "one")
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.5)
    for _ in range(2):
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    close(load(tmp_path / "pack"), save(model, None))
    assert adapterpack.validate(tmp_path / "pack", tiny_llama).valid
