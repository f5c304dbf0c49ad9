"""Training files that other projects publish are read as they are: each under ``../shared/world`` resolves, or stops for a
reason of its own; some train a step. ``python tests/world_files.py`` does the same for all of them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import world_files

from adapterpack.errors import ConfigError
from adapterpack.training.config.config import read_config
from adapterpack.training.config.sources import sources_of

pytestmark = pytest.mark.skipif(
    not world_files.WORLD.is_dir(), reason="NOT RUN: the files that others wrote are not beside this checkout"
)
RECORDED = dict(line.split("\t") for line in world_files.recorded())
TRAINED = (
    "axolotl/examples/llama-3/instruct-dpo-lora-8b.yml",
    "axolotl/examples/llama-3/qlora-1b-kto.yaml",
    "axolotl/examples/mistral/orpo/mistral-qlora-orpo.yml",
    "axolotl/examples/gpt-oss/gpt-oss-20b-sft-lora-singlegpu.yaml",
    "llamafactory/examples/train_lora/qwen3_lora_sft.yaml",
    "llamafactory/examples/train_lora/qwen3_lora_dpo.yaml",
)


def test_every_file_is_in_the_record() -> None:
    """``python tests/world_files.py --write`` renews it."""
    assert sorted(str(path.relative_to(world_files.WORLD)) for path in world_files.files()) == sorted(
        RECORDED
    )


def test_nothing_breaks_and_nearly_all_that_can_train_here_train() -> None:
    """A file stops with an error of ours, or trains; of those that are read and stop later few may be."""
    assert [name for name, outcome in RECORDED.items() if outcome.startswith("breaks")] == []
    late = [
        name for name, said in RECORDED.items() if said.startswith("stops") and "some settings of" not in said
    ]
    trained = [name for name, outcome in RECORDED.items() if outcome == "trained"]
    assert len(trained) >= 0.95 * (len(trained) + len(late)), late


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_file_is_read_or_stops_for_the_reason_that_is_recorded(name: str) -> None:
    """Reading needs no model: names, defaults, meanings, and the sources of its data."""
    path = world_files.WORLD / name
    try:
        with contextlib.chdir(world_files.WORLD / Path(name).parts[0]):
            (config,), _ = read_config(path)
            assert sources_of(config.train_file, path)
    except ConfigError as error:
        said = f"stops: {' '.join(str(error).replace(str(path), 'the file').split())}"
        assert RECORDED[name].startswith(said[:250])
    else:
        assert not RECORDED[name].startswith("stops: some settings of"), RECORDED[name]


@pytest.mark.parametrize("name", TRAINED)
def test_a_file_trains_a_step_on_a_tiny_model_of_its_kind(name: str) -> None:
    """With two rows of the form that it names; only sizes and the paths of the base and the data are ours."""
    assert world_files.outcome(world_files.WORLD / name) == RECORDED[name] == "trained"
