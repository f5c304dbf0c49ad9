"""The table of architectures: a bank of every one, with every kind of adapter that it takes; the other modes
of some.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from architecture_proofs import make_base, prove
from architectures import ARCHITECTURES, render

GOLDEN = Path(__file__).parent.parent / "golden" / "architectures.md"
BY_NAME = {one.name: one for one in ARCHITECTURES}
LONG = {
    "gemma2",
    "phi3",
    "opt",
    "bloom",
    "falcon",
    "roberta",
    "electra",
    "deberta-v2",
    "distilbert",
    "modernbert",
    "bart",
    "t5",
    "whisper",
    "clip",
    "segformer",
    "yolos",
}
"""Slow to trace; of each kind another is left, and those of two parts have tests of their own too."""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bases and bundles lie."""
    import torch

    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("architectures")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in BY_NAME]
)
def test_bank(name: str, scratch: Path) -> None:
    """Rows of one batch, each with another kind of adapter or the base, equal plain transformers on each row
    alone.
    """
    assert len(prove(BY_NAME[name], "bank", scratch / name)) >= 3


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["llama", "whisper", "clip"])
def test_inputs(name: str, scratch: Path) -> None:
    """The same through ONNX Runtime's own adapters: a decoder, an encoder beside a decoder, two towers."""
    prove(BY_NAME[name], "inputs", scratch / name)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["qwen3", "vit", "distilbert"])
def test_folded(name: str, scratch: Path) -> None:
    """And in the weights: a decoder, images, an encoder."""
    prove(BY_NAME[name], "folded", scratch / f"{name}-folded", only=["low-rank"])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", ["bank", "inputs"])
@pytest.mark.parametrize(
    ("name", "targets"), [("vit", ("projection", "q_proj")), ("distilbert", ("word_embeddings", "q_lin"))]
)
def test_low_rank_at_patches_and_embeddings(
    name: str, targets: tuple[str, ...], mode: str, scratch: Path, tmp_path: Path
) -> None:
    """A convolution that cuts an image into patches, and a table of words, have slots for changes of low
    rank.
    """
    (tmp_path / "base").symlink_to(scratch / name / "base")
    if not (scratch / name / "base").exists():
        make_base(BY_NAME[name], scratch / name / "base")
    assert prove(BY_NAME[name]._replace(targets=targets), mode, tmp_path, only=["low-rank"]) == ["low-rank"]


@pytest.mark.fast
def test_the_table_of_architectures_is_the_recorded_one() -> None:
    """A promise that is dropped shows as a changed line; `make golden` records what was meant."""
    assert render() == GOLDEN.read_text("utf-8"), (
        "the table changed: run `make golden` and look at the difference"
    )
