"""How the library is used, stage by stage, on tiny models: read this first. Every other file of this folder proves
one stage in depth.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import adapterpack

Packs = Callable[[str, str], Path]
TEXTS = ["w1 w2 w3", "w5 w6"]


def test_put_an_adapter_into_a_model_and_save_it(tiny_llama: Path, tmp_path: Path) -> None:
    """``adapt`` freezes the model and adds trainable parameters, any loop trains them, ``save`` writes a pack."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapterpack.adapt(model, adapterpack.LoRA(r=4, targets="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, ids = torch.optim.AdamW(trained, lr=1e-2), torch.tensor([[5, 6, 7, 8]])
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapterpack.save(model, tmp_path / "tickets", base=tiny_llama)
    assert adapterpack.validate(tmp_path / "tickets", base=tiny_llama).valid


def test_attach_a_pack_to_a_model(tiny_llama: Path, pack_of: Packs) -> None:
    """A pack that is attached changes what the model computes; detached, the model is as it was."""
    import torch
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(tiny_llama), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapterpack.attach(model, pack_of("llama", "alpha"))
        assert not torch.equal(model(input_ids=ids).logits, before)
        adapterpack.detach(model)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_look_at_a_pack(tiny_llama: Path, pack_of: Packs) -> None:
    """``inspect`` says what a pack is, ``validate`` whether it is sound and belongs to this base."""
    path = pack_of("llama", "alpha")
    assert adapterpack.inspect(path)["ranks"] == {"3": 14}
    report = adapterpack.validate(path, base=tiny_llama)
    assert report.state == "valid"
    assert report.base is not None and report.base.name == "same"


def test_merge_a_pack_into_its_base(tiny_llama: Path, pack_of: Packs, tmp_path: Path) -> None:
    """The result is a checkpoint as any other, and ``unmerge`` gives the base back, byte for byte."""
    report = adapterpack.merge(tiny_llama, [pack_of("llama", "alpha")], tmp_path / "merged")
    assert report.tensors_changed == 14
    assert adapterpack.inspect(tmp_path / "merged")["kind"] == "base"


def test_combine_packs_into_one(pack_of: Packs, tmp_path: Path) -> None:
    """``compose`` with weights is the exact sum of the changes; its rank is the sum of the ranks."""
    both = adapterpack.compose(
        [pack_of("llama", "alpha"), pack_of("llama", "gamma")], weights=[0.7, 0.3], out=tmp_path / "both"
    )
    assert set(adapterpack.inspect(tmp_path / "both")["ranks"]) <= {"2", "3", "5"}
    assert both.manifest.lineage is not None
    assert [parent.weight for parent in both.manifest.lineage.parents] == [0.7, 0.3]


def test_make_a_pack_smaller(pack_of: Packs, tmp_path: Path) -> None:
    """``quantize`` stores int8 and says the error it made."""
    before = adapterpack.inspect(pack_of("llama", "alpha"))
    adapterpack.quantize(pack_of("llama", "alpha"), tmp_path / "small")
    after = adapterpack.inspect(tmp_path / "small")
    assert after["bytes"] < before["bytes"] / 2
    assert after["quantization"]["scheme"] == "int8"


def test_run_rows_of_one_batch_with_different_adapters(bundle_of: Packs) -> None:
    """A bundle holds the base once and a bank of adapters; each row of a batch names its own."""
    session = adapterpack.Session(bundle_of("llama", "bank"), "cpu")
    inputs = session.encode(TEXTS)
    mixed = session.run(inputs, adapters=["alpha", None])["logits"]
    for row, name in enumerate(["alpha", None]):
        alone = session.run(inputs, adapters=[name, name])["logits"]
        np.testing.assert_allclose(mixed[row], alone[row], rtol=0, atol=1e-5)


def test_run_a_bundle_by_the_command_line(bundle_of: Packs, capfd: pytest.CaptureFixture[str]) -> None:
    """Every stage is a command of the same name as its function."""
    from adapterpack.cli.main import main

    arguments = ["run", str(bundle_of("bert", "bank")), "--adapter", "alpha", "--prompt", "w1 w2 w3"]
    main(arguments, standalone_mode=False)
    assert any(label in capfd.readouterr().out for label in "xyz")
