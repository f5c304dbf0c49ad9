"""Kills at any moment: what is at the target is whole or absent, and the same call again gives the bytes of
one that was not disturbed.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from processes_of_trials import done, killed

import adapterpack
from adapterpack import Fleet, LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.io import safetensors
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

Work = Callable[[], object]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pack(name: str, seed: int, shapes: dict[str, tuple[int, int]], task: str = "feature-extraction") -> Pack:
    """A LoRA of random factors; ``shapes`` are (out, in)."""
    rng, r = np.random.default_rng(seed), 2
    return build(
        name,
        get("lora"),
        {
            Site(path, columns, rows): (
                LoRA(r=r, alpha=4),
                {
                    "lora_A": rng.standard_normal((r, columns)).astype(np.float32),
                    "lora_B": rng.standard_normal((rows, r)).astype(np.float32),
                },
            )
            for path, (rows, columns) in shapes.items()
        },
        task=m.PackTask(task),
        base=m.Base("org/base"),
        license="apache-2.0",
    )


def _hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def kill_merge(dice: random.Random, folder: Path) -> None:
    """Into a checkpoint of several shards, twice in a row at the same place."""
    shapes = {
        f"layers.{number}.q": (dice.randrange(8, 700), dice.randrange(8, 700))
        for number in range(dice.randrange(1, 9))
    }
    dtype = dice.choice((np.float32, np.float16))
    rng, base = np.random.default_rng(dice.randrange(1 << 30)), folder / "base"
    base.mkdir()
    weights = {f"{path}.weight": rng.standard_normal(shape).astype(dtype) for path, shape in shapes.items()}
    names, count = list(weights), dice.randrange(1, 4)
    index: dict[str, str] = {}
    for shard in range(count):
        file = f"model-{shard}.safetensors"
        held = {name: weights[name] for name in names[shard::count]}
        if held:
            safetensors.write(base / file, held)
            index |= dict.fromkeys(held, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (base / "config.json").write_text('{"model_type": "none"}')
    changed = dice.sample(sorted(shapes), dice.randrange(1, len(shapes) + 1))
    one = (
        pack("one", dice.randrange(99), {path: shapes[path] for path in changed}).write(folder / "pack").path
    )
    merge = partial(adapterpack.merge, base, [one], resume=dice.random() < 0.5)
    took = done(lambda: merge(out=folder / "whole"), folder)
    for _ in range(2):
        killed(lambda: merge(out=folder / "out"), folder, dice.uniform(0, 1.2 * took))
        if (folder / "out").exists():
            assert digests(folder / "out") == digests(folder / "whole"), "a part was published"
            shutil.rmtree(folder / "out")
    done(lambda: merge(out=folder / "out"), folder)
    assert digests(folder / "out") == digests(folder / "whole")
    assert not _hidden(folder), _hidden(folder)


def kill_compress(dice: random.Random, folder: Path) -> None:
    """Into a fleet: the older one or the newer one is there."""
    shapes = {
        f"layers.{number}.q": (dice.randrange(8, 90), dice.randrange(8, 90))
        for number in range(dice.randrange(1, 5))
    }
    first = [pack(name, seed, shapes) for seed, name in enumerate("ab")]
    fleet = folder / "fleet"
    done(lambda: adapterpack.compress(first, basis=dice.randrange(2, 6), out=fleet), folder)
    more = pack("c", 7, shapes)
    took = done(lambda: adapterpack.compress([more], into=fleet, out=folder / "whole"), folder)
    before, after = digests(fleet), digests(folder / "whole")
    killed(lambda: adapterpack.compress([more], into=fleet), folder, dice.uniform(0, 1.2 * took))
    assert digests(fleet) in (before, after)
    if digests(fleet) == before:
        done(lambda: adapterpack.compress([more], into=fleet), folder)
    assert Fleet.load(fleet).names == ("a", "b", "c")
    assert digests(fleet) == after


def _tiny_llama(folder: Path) -> Path:
    import transformers

    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        "[PAD]": 0,
        "[BOS]": 1,
        "[EOS]": 2,
        "[UNK]": 3,
        **{f"w{number}": number for number in range(4, 40)},
    }
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        chat_template="{% for x in messages %}{{ x['content'] }}{% endfor %}",
    ).save_pretrained(folder)


def kill_train(dice: random.Random, folder: Path) -> None:
    """A training goes on to the pack of one that was not disturbed."""
    done(lambda: _tiny_llama(folder / "base"), folder)
    rows = [
        {
            "prompt": " ".join(f"w{dice.randrange(4, 40)}" for _ in range(dice.randrange(1, 9))),
            "completion": f"w{dice.randrange(4, 40)}",
        }
        for _ in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model_name_or_path": str(folder / "base"),
        "train_file": str(folder / "rows.jsonl"),
        "name": "p",
        "learning_rate": 1e-2,
        "max_steps": dice.randrange(4, 12),
        "per_device_train_batch_size": 2,
        "save_steps": dice.randrange(1, 5),
        "r": 2,
        "lora_dropout": dice.choice((0.0, 0.1)),
        "gradient_accumulation_steps": dice.choice((1, 2)),
    }
    took = done(lambda: adapterpack.train({**settings, "output_dir": str(folder / "whole")}), folder)
    for _ in range(2):
        killed(
            lambda: adapterpack.train({**settings, "output_dir": str(folder / "out")}),
            folder,
            dice.uniform(0.3 * took, took),
        )
        if (folder / "out").exists():
            break
    else:
        done(lambda: adapterpack.train({**settings, "output_dir": str(folder / "out")}), folder)
    whole, out = (
        {key: value.tobytes() for key, value in adapterpack.load(folder / name).tensors.items()}
        for name in ("whole", "out")
    )
    assert whole == out
    assert not _hidden(folder), _hidden(folder)


def kill_export(dice: random.Random, folder: Path) -> None:
    """A bundle is absent, or valid to the last byte; the next export publishes one and leaves nothing
    else.
    """
    done(lambda: _tiny_llama(folder / "base"), folder)
    one = (
        pack("one", 1, {"model.layers.0.self_attn.q_proj": (16, 16)}, "text-generation")
        .write(folder / "pack")
        .path
    )
    export = partial(adapterpack.export, folder / "base", [one])
    took = done(lambda: export(out=folder / "whole"), folder)
    if not killed(lambda: export(out=folder / "out"), folder, dice.uniform(0.1 * took, took)):
        assert adapterpack.validate(folder / "out").valid
        return
    if not (folder / "out").exists():
        done(lambda: export(out=folder / "out"), folder)
    assert adapterpack.validate(folder / "out").valid
    left = [name for name in _hidden(folder) if "out" in name]
    assert not left, left


def _hub(folder: Path, port: int) -> subprocess.Popen[bytes]:
    token = folder / "tokens"
    if not token.exists():
        token.write_text("ann write hf_writerwriterwriterwriter\n")
        token.chmod(0o600)
    command = [
        sys.executable,
        "-m",
        "adapterpack",
        "hub",
        "serve",
        str(folder / "hub"),
        "--port",
        str(port),
        "--tokens",
        str(token),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        assert process.poll() is None, "the hub does not start"
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the hub does not start")


def kill_hub(dice: random.Random, folder: Path) -> None:
    """A push, a pull or the hub itself is killed: the repository has the older or the newer commit whole, and
    what is asked next works.
    """
    import os

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_TOKEN": "hf_writerwriterwriterwriter",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "hf"),
        "ADAPTERPACK_CACHE": str(folder / "cache"),
    }
    width = dice.choice((16, 800))
    ids = {}
    for seed, name in enumerate(("older", "newer")):
        ids[name] = pack("p", seed, {"net.q": (width, width)}).write(folder / name).id
    hub = _hub(folder, port)
    try:
        push = lambda name: adapterpack.push(folder / name, "hf://org/p")  # noqa: E731
        took = done(lambda: push("older"), folder)
        what = dice.choice(("push", "pull", "hub"))
        if what == "hub":
            child = killed(lambda: (time.sleep(dice.uniform(0, took)), os.kill(hub.pid, 9)), folder, 60)
            assert not child
            hub.wait()
            hub = _hub(folder, port)
        elif what == "push":
            killed(lambda: push("newer"), folder, dice.uniform(0, 1.2 * took))
        else:
            killed(lambda: adapterpack.pull("hf://org/p"), folder, dice.uniform(0, took))
        done(lambda: _require_whole(folder, ids), folder)
        done(lambda: push("newer"), folder)
        done(lambda: _require_whole(folder, {"newer": ids["newer"]}), folder)
    finally:
        hub.kill()
        hub.wait()


def _require_whole(folder: Path, ids: dict[str, str]) -> None:
    found = adapterpack.pull("hf://org/p")
    assert found.id in ids.values(), found


TRIALS = {
    "kill_merge": kill_merge,
    "kill_compress": kill_compress,
    "kill_train": kill_train,
    "kill_export": kill_export,
    "kill_hub": kill_hub,
}
