"""A random model with a real tokenizer and chat template, three adapters of it, and servers of it as
processes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from documented import Answers
from servers import Served, begin
from tiny import write_bundle, write_model, write_packs


@pytest.fixture(scope="session")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two narrow layers that knows nothing, with the tokens of SmolLM2."""
    return write_model(tmp_path_factory.mktemp("models") / "served", smollm2)


@pytest.fixture(scope="session")
def packs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three packs: alpha, beta, gamma."""
    return write_packs(tmp_path_factory.mktemp("packs"), model)


@pytest.fixture(scope="session")
def bundle(model: Path, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the engine with alpha and beta; gamma is loaded by servers."""
    return write_bundle(
        tmp_path_factory.mktemp("bundles") / "served", model, [packs / "alpha", packs / "beta"]
    )


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts a server of a bundle with keys. Those that still run at the end are ended, when all that they
    answered is known to be what their documents say.
    """
    running: list[tuple[Served, Answers]] = []

    def started(bundle: Path, **options: Any) -> Served:
        served, answers = begin(bundle, tmp_path_factory.mktemp("server"), **options), Answers()
        served.heard = answers.keep
        running.append((served, answers))
        return served

    yield started
    with ExitStack() as stack:
        still = [(served, answers) for served, answers in running if served.process.poll() is None]
        for served, _ in still:
            stack.callback(served.ended, signal.SIGKILL)
        for served, answers in still:
            answers.require(served)


@pytest.fixture(scope="session")
def start(bundle: Path, packs: Path, launch: Callable[..., Served]) -> Callable[..., Served]:
    """Starts a server with three adapters and with keys."""
    return lambda **options: launch(bundle, **{"adapters": [str(packs / "gamma")], **options})


@pytest.fixture(scope="session")
def server(start: Callable[..., Served]) -> Served:
    """The one that most tests ask."""
    return start(limits={"body_seconds": 5.0})


@pytest.fixture(scope="session")
def features(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of embeddings with two adapters."""
    from encoder_packs import packed

    from adapterpack import export

    folder = tmp_path_factory.mktemp("features")
    packs = [
        packed(tiny_bert, folder, "feature-extraction", name, r=rank)
        for name, rank in (("alpha", 2), ("another", 3))
    ]
    export(tiny_bert, packs, folder / "bundle", mode="bank", task="feature-extraction", slots=4, max_rank=6)
    return folder / "bundle"
