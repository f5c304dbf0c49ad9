"""A random model with a real tokenizer and chat template, three adapters of it, and servers of it as processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import ANN, BOB, OLD, PROGRAM, Served, entry, write_keys


@pytest.fixture(scope="session")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two narrow layers that knows nothing, with the tokens of SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(5)
    folder = tmp_path_factory.mktemp("models") / "served"
    config = LlamaConfig(vocab_size=49_152, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=24, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder)
    return folder


@pytest.fixture(scope="session")
def packs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three packs: alpha, beta, gamma."""
    import torch

    from adapterpack import LoRA, adapt, save
    from adapterpack.tasks.task import task_named
    from adapterpack.training.loading import load_model

    folder = tmp_path_factory.mktemp("packs")
    for rank, name in enumerate(("alpha", "beta", "gamma"), 2):
        adapted = adapt(load_model(task_named("text-generation"), model, None), LoRA(r=rank, alpha=8), name)
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
        save(adapted, folder / name, base=model)
    return folder


@pytest.fixture(scope="session")
def bundle(model: Path, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the engine with alpha and beta; gamma is loaded by servers."""
    from adapterpack import export

    folder: Path = tmp_path_factory.mktemp("bundles") / "served"
    export(model, [packs / "alpha", packs / "beta"], folder, mode="bank", in_place=True, slots=4, max_rank=6)
    return folder


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts a server of a bundle with keys; those that still run at the end are ended."""
    running: list[subprocess.Popen[str]] = []

    def started(bundle: Path, **options: Any) -> Served:
        folder = tmp_path_factory.mktemp("server")
        if "keys" not in options:
            write_keys(folder / "keys", entry("ann", ANN, admin=True), entry("bob", BOB, adapters=["alpha"], base=False, max_rows=4),
                       entry("old", OLD, expires="2020-01-01T00:00:00Z"))
        given = {"keys": str(folder / "keys"), "audit": str(folder / "audit"), "provider": "cpu",
                 "name": "base", "max_rows": 4, "limits": {}, **options}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(bundle), json.dumps(given)], stdout=subprocess.PIPE, stderr=log,
                                       text=True, env=environment)
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        address, base, adapters, admin = json.loads(line)
        return Served(process, address, base, adapters, folder / "log", folder / "audit", admin)

    yield started
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(10)


@pytest.fixture(scope="session")
def start(bundle: Path, packs: Path, launch: Callable[..., Served]) -> Callable[..., Served]:
    """Starts a server with three adapters and with keys."""
    return lambda **options: launch(bundle, **{"adapters": [str(packs / "gamma")], **options})


@pytest.fixture(scope="session")
def server(start: Callable[..., Served]) -> Served:
    """The one that most tests ask."""
    return start(limits={"body_seconds": 0.5})
