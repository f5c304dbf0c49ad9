"""The page about quantized bases: its commands run, and what they write computes what bitsandbytes computes
in torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from noise import shake
from pages import ROOT, blocks, words
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from adapterpack import LoRA, Session, adapt, attach, load, save
from adapterpack.cli.main import main


@pytest.fixture
def wide_base(guide_folder: Path) -> None:
    """A base whose rows are as long as a block of bitsandbytes: with AVX512 it is wrong about shorter
    ones.
    """
    config = LlamaConfig.from_pretrained("models/SmolLM2", hidden_size=64, intermediate_size=128, head_dim=16)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32), alpha=0.05)
    model.save_pretrained("models/SmolLM2")
    shutil.rmtree("packs/orders")
    save(shake(adapt(AutoModelForCausalLM.from_pretrained("models/SmolLM2"), LoRA(r=3))), "packs/orders")


def test_from_training_in_four_bits_to_a_graph(wide_base: None) -> None:
    """The logits of the base in NF4 and of the trained adapter on it, in torch with bitsandbytes' own
    products, within the float noise of two layers; the float base is further away. The checkpoint in
    double-quantized NF4 likewise, as codes and as floats.
    """
    for block in blocks(ROOT / "docs" / "stages" / "quantized-bases.md"):
        if block.language == "python":
            exec(compile(block.text, "quantized-bases.md", "exec"), {})
        for command in block.commands() if block.language == "sh" else ():
            if "gguf" in command:
                continue  # tests/test_stored_gguf.py has such a file
            short = (
                ["max_steps=2", "max_length=48"] if command.startswith("adapterpack train") else ["--json"]
            )
            done = CliRunner().invoke(main, [*words(command)[1:], *short])
            assert done.exit_code == 0, (command, done.output, done.exception)
    for options, why in (
        (["packs/orders"], "one and the same quantized form"),
        (["packs/qlora", "packs/orders"], "one and the same quantized form"),
        ([], "one and the same quantized form"),
        (["packs/qlora", "--dtype", "float16"], "in float32"),
        (["packs/qlora", "--head", "int8"], "has no effect"),
    ):
        done = CliRunner().invoke(
            main, ["export", "models/SmolLM2", *options, "--quantize", "as-trained", "-o", "refused"]
        )
        assert done.exit_code != 0 and why in done.output, done.output
    assert not Path("refused").exists()
    ids = np.random.default_rng(3).integers(3, 60, (2, 7))

    def distance(model: Any, bundle: str, name: str | None = None) -> float:
        with torch.no_grad():  # without dropout; in evaluation bitsandbytes may round to bfloat16
            right = model.train()(input_ids=torch.from_numpy(ids)).logits.float().numpy()
        return float(
            np.abs(Session(bundle, "cpu").run({"input_ids": ids}, name)["logits"] - right).max()
            / np.abs(right).max()
        )

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        "models/SmolLM2", quantization_config=nf4, dtype=torch.float32
    ).eval()
    assert distance(model, "bundle-qlora") <= 2e-5
    assert distance(attach(model, load("packs/qlora")), "bundle-qlora", "qlora") <= 2e-5
    assert (
        distance(
            AutoModelForCausalLM.from_pretrained("models/SmolLM2", dtype=torch.float32).eval(), "bundle-qlora"
        )
        > 1e-2
    )
    double = AutoModelForCausalLM.from_pretrained("models/SmolLM2-nf4", dtype=torch.float32).eval()
    assert max(distance(double, "bundle-nf4"), distance(double, "bundle-floats")) <= 2e-5
