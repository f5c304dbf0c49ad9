"""Training by several processes at once: one writes, and what they train together is what one trains
alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import fork_two
from processes import run_two
from transformers import AutoModelForCausalLM

from adapterpack import LoRA, Pack, adapt, load, save, train

pytestmark = pytest.mark.long

SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from adapterpack import LoRA, adapt, save
dist.init_process_group("gloo")
model = adapt(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoRA(r=2), "one")
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
rank = dist.get_rank()
optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.5)
rows = torch.arange(4 * 6).reshape(4, 6) % 96
for _ in range(2):
    mine = rows[2 * rank : 2 * rank + 2]
    model(input_ids=mine, labels=mine).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
save(model, sys.argv[2] if rank == 0 else None, base=sys.argv[1])
dist.barrier()
dist.destroy_process_group()
"""


def close(one: Pack, other: Pack) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        np.testing.assert_allclose(value, other.tensors[name], atol=1e-5)


def test_two_processes_write_the_packs_of_one(tiny_llama: Path, tmp_path: Path) -> None:
    """``torchrun adapterpack train`` with a list of adapters: every pack is there, equal to that of one
    process with twice the batch.
    """
    rng = random.Random(0)
    rows = [{"prompt": f"w{rng.randrange(90)}", "completion": f"w{rng.randrange(90)} w3"} for _ in range(16)]
    labelled = [
        {"text": " ".join(row.values()), "label": "even" if number % 2 else "odd"}
        for number, row in enumerate(rows)
    ]
    for name, some in (("rows", rows), ("labelled", labelled)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    config = {
        "model_name_or_path": str(tiny_llama),
        "train_file": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "two"),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "r": 2,
        "lr_scheduler_type": "constant",
        "adapters": [
            {"name": "a"},
            {"name": "b", "r": 4},
            {"name": "c", "task": "text-classification", "train_file": str(tmp_path / "labelled.jsonl")},
        ],
    }
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps({**config, "per_device_train_batch_size": 2}))
    run_two("-m", "adapterpack", "train", str(path))
    alone = train({**config, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4})
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["a", "b", "c"]
    for pack in alone:
        two = load(tmp_path / "two" / pack.name)
        close(pack, two)
        assert two.manifest.training["final_loss"] == pytest.approx(
            pack.manifest.training["final_loss"], rel=1e-4
        )


def test_a_sharded_model_is_gathered(tiny_llama: Path, tmp_path: Path) -> None:
    """FSDP2 over two processes: ``save`` writes the whole adapter, that of one process with all rows, and
    validates on the base.
    """
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    fork_two(script, str(tiny_llama), str(tmp_path / "pack"))
    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_llama), LoRA(r=2), "one")
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.5)
    rows = torch.arange(4 * 6).reshape(4, 6) % 96
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    close(load(tmp_path / "pack"), save(model, None))
