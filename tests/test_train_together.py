"""Several adapters in one run: one after the other, one base in memory, and the bytes that each would get
alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import child
from test_train_resume import KILLED

from adapterpack import Pack, train
from adapterpack.errors import ConfigError, NonFinite
from adapterpack.signals import Ended, raised
from adapterpack.tasks.task import get_task
from adapterpack.training.loop.shared_bases import SharedBases
from adapterpack.training.loop.steps import Step

TEXT = "text-classification"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(rng: random.Random, least: int = 1) -> list[str]:
    return [f"w{rng.randrange(90)}" for _ in range(rng.randrange(least, 9))]


def classified(folder: Path, name: str, labels: tuple[str, ...], count: int = 24) -> str:
    rng = random.Random(name)
    return write(
        folder / f"{name}.jsonl",
        [{"text": " ".join(words(rng)), "label": labels[i % len(labels)]} for i in range(count)],
    )


def tagged(folder: Path) -> str:
    rng = random.Random("tags")
    rows = [words(rng) for _ in range(20)]
    return write(
        folder / "tags.jsonl",
        [{"tokens": row, "labels": [("O", "X")[i % 2] for i in range(len(row))]} for row in rows],
    )


def prompts(folder: Path, name: str) -> str:
    rng = random.Random(name)
    return write(
        folder / f"{name}.jsonl",
        [{"prompt": " ".join(words(rng)), "completion": words(rng)[0]} for _ in range(20)],
    )


def classifiers(folder: Path) -> list[dict[str, Any]]:
    """Two heads with other labels, one without a bias; another class of model; dropout, evaluation, and runs
    of other lengths.
    """
    two, three = classified(folder, "two", ("no", "yes")), classified(folder, "three", ("a", "b", "c"))
    return [
        {
            "name": "lora",
            "train_file": two,
            "r": 3,
            "dropout": 0.1,
            "max_steps": 5,
            "val_set_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        {
            "name": "ia3",
            "train_file": three,
            "method": "ia3",
            "max_steps": 3,
            "per_device_train_batch_size": 5,
        },
        {
            "name": "bottleneck",
            "train_file": two,
            "method": "bottleneck",
            "targets": "all-blocks",
            "reduction": 4,
            "max_steps": 5,
            "seed": 3,
        },
        {
            "name": "tags",
            "task": "token-classification",
            "train_file": tagged(folder),
            "targets": ["query"],
            "r": 2,
            "max_steps": 4,
            "group_by_length": True,
            "gradient_accumulation_steps": 2,
        },
    ]


def decoders(folder: Path) -> list[dict[str, Any]]:
    """A method with states of its own, prompts, two methods' seeds and schedules, packed rows, and bfloat16
    beside float32.
    """
    one, other = prompts(folder, "one"), prompts(folder, "other")
    return [
        {
            "name": "adalora",
            "train_file": one,
            "method": "adalora",
            "init_r": 3,
            "target_r": 1,
            "tfinal": 1,
            "max_steps": 5,
            "dropout": 0.1,
        },
        {
            "name": "prefix",
            "train_file": other,
            "method": "prefix_tuning",
            "num_virtual_tokens": 3,
            "max_steps": 3,
        },
        {
            "name": "packed",
            "train_file": other,
            "r": 2,
            "packing": True,
            "max_length": 24,
            "max_steps": 4,
            "seed": 1,
        },
        {
            "name": "half",
            "train_file": one,
            "r": 4,
            "bf16": True,
            "dropout": 0.2,
            "max_steps": 4,
            "lr_scheduler_type": "cosine",
        },
    ]


def run(base: Path, folder: Path, adapters: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(base),
        "output_dir": str(folder / "packs"),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "task": TEXT,
        **more,
        "adapters": adapters,
    }


def alone(config: dict[str, Any], name: str) -> Pack:
    """The pack that one of the adapters gets by itself."""
    common = {key: value for key, value in config.items() if key != "adapters"}
    (entry,) = (entry for entry in config["adapters"] if entry["name"] == name)
    (pack,) = train({**common, **entry, "output_dir": f"{config['output_dir']}-alone/{name}"})
    return pack


@pytest.fixture(scope="module")
def alone_of(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The name of one of ``classifiers`` -> the id of the pack that it gets by itself, which is trained when
    first asked for.
    """
    folder = tmp_path_factory.mktemp("alone")
    config = run(tiny_bert, folder, classifiers(folder))
    return cache(lambda name: alone(config, name).id)


def test_each_gets_the_bytes_that_it_gets_alone(
    tiny_bert: Path, tmp_path: Path, alone_of: Callable[[str], str]
) -> None:
    """Four adapters of other methods, data, heads, lengths, tasks, seeds: they are trained one after the
    other in their order; each pack has the bytes of a run of its own.
    """
    adapters, steps = classifiers(tmp_path), list[Step]()
    config = run(tiny_bert, tmp_path, adapters)
    packs = train(config, progress=steps.append)
    names = [entry["name"] for entry in adapters]
    assert [(step.done, step.name) for step in steps] == [
        (done, entry["name"]) for entry in adapters for done in range(1, entry["max_steps"] + 1)
    ]
    assert [pack.name for pack in packs] == names
    for pack in packs:
        assert pack.id == alone_of(pack.name)
    assert sorted(path.name for path in (tmp_path / "packs").iterdir()) == sorted(names)


def test_the_base_is_in_memory_once(tiny_bert: Path) -> None:
    """Models of one task, of other labels and of another class hold the same tensors of the base, and
    modules, heads and buffers of their own; another dtype is another base.
    """
    bases = SharedBases()

    def model(task: str, labels: tuple[str, ...], dtype: str = "float32") -> Any:
        return bases.load(get_task(task), tiny_bert, labels, dtype=dtype, quantization=None, problem=None)[0]

    first, same = model(TEXT, ("a", "b")), model(TEXT, ("a", "b"))
    others = [model(TEXT, ("a", "b", "c")), model("token-classification", ("a", "b"))]
    for other in (same, *others):
        theirs = dict(other.bert.named_parameters())
        held = [name for name, value in first.bert.named_parameters() if theirs.get(name) is value]
        assert (
            len(held)
            == len([name for name in theirs if not name.startswith("pooler")]) + (other is not others[1]) * 2
        )
        assert not {id(module) for module in first.modules()} & {id(module) for module in other.modules()}
        assert not {value.data_ptr() for value in first.buffers()} & {
            value.data_ptr() for value in other.buffers()
        }
    assert others[0].classifier.weight.shape[0] == 3
    assert others[0].config.num_labels == 3 and first.config.num_labels == 2
    assert next(model(TEXT, ("a", "b"), "bfloat16").parameters()).dtype == torch.bfloat16


def test_ctrl_c_ends_all_with_checkpoints(
    tiny_bert: Path, tmp_path: Path, alone_of: Callable[[str], str]
) -> None:
    """The one that is trained ends at its next step; the same call goes on to the same packs, those of the
    adapters that were trained already, too. So it is with the signal of schedulers.
    """
    config = run(tiny_bert, tmp_path, classifiers(tmp_path)[:3])

    def interrupt_once(step: Step) -> None:
        if (step.name, step.done) == ("bottleneck", 3):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Ended) as interrupt, raised():
            train(config, progress=interrupt_once)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert interrupt.value.exit_code == 143
    places = [
        (name, f"step {step} is kept in {tmp_path}/packs/{name}.checkpoints")
        for name, step in (("bottleneck", 4), ("lora", 5), ("ia3", 3))
    ]
    for (name, words), note in zip(places, interrupt.value.__notes__, strict=True):
        assert words in note, name
    assert not any((tmp_path / "packs" / name).exists() for name in ("lora", "ia3", "bottleneck"))
    steps: list[Step] = []
    packs = train(config, progress=steps.append)
    assert [(step.name, step.done) for step in steps] == [("bottleneck", 5)]
    assert [pack.id for pack in packs] == [alone_of(pack.name) for pack in packs]
    assert sorted(path.name for path in (tmp_path / "packs").iterdir()) == ["bottleneck", "ia3", "lora"]


@pytest.mark.long
def test_a_kill_loses_no_step_of_a_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    """SIGKILL in the third step, with checkpoints every second step: the same bytes as without."""
    config = run(tiny_llama, tmp_path, decoders(tmp_path), task="text-generation", save_steps=2)
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(config))
    with child(
        [sys.executable, "-c", KILLED, path, "3"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.wait(600) == -signal.SIGKILL
    packs = train(config)
    assert [pack.id for pack in packs] == [alone(config, pack.name).id for pack in packs]


def test_one_that_fails_leaves_those_before_it_with_checkpoints(
    tiny_bert: Path, tmp_path: Path, alone_of: Callable[[str], str]
) -> None:
    """The error says whose it is; without that adapter those before it are packed as they were trained. Of an
    adapter that fails before its first step nothing is left behind.
    """
    lora, ia3, *_ = classifiers(tmp_path)
    broken = {
        "name": "broken",
        "train_file": ia3["train_file"],
        "learning_rate": 1e30,
        "max_steps": 9,
        "lr_scheduler_type": "constant",
    }
    config = run(tiny_bert, tmp_path, [lora, broken])
    with pytest.raises(NonFinite, match="diverged") as error:
        train(config)
    assert "adapter 'broken'" in error.value.__notes__[0] and "lora.checkpoints" in error.value.__notes__[-1]
    assert sorted(path.name for path in (tmp_path / "packs").iterdir()) == ["lora.checkpoints"]
    steps: list[Step] = []
    (pack,) = train({**config, "adapters": [lora]}, progress=steps.append)
    assert steps == [], "it was trained already"
    assert pack.id == alone_of("lora")

    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError) as empty:
        train(
            run(
                tiny_bert,
                tmp_path,
                [ia3, {**lora, "name": "empty", "train_file": str(tmp_path / "empty.jsonl")}],
            )
        )
    assert "adapter 'empty'" in empty.value.__notes__[0]
    assert sorted(path.name for path in (tmp_path / "packs").iterdir()) == ["ia3.checkpoints", "lora"]
