"""Models whose modules have other names than their checkpoints, because transformers renames them as it
loads.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTModel

from adapterpack import LoRA, adapt, attach, convert, load, merge, save, validate
from adapterpack.torch_adapters.canaries.canary import verify_canary

CONFIG = ViTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    image_size=8,
    patch_size=4,
    num_labels=3,
)


@pytest.mark.fast
@pytest.mark.parametrize("source", [ViTForImageClassification, ViTModel])
def test_packed_attached_and_merged(source: Any, tmp_path: Path) -> None:
    """Of a checkpoint of the very class, and of one without its prefix and head: the pack names the tensors
    that there are, its canary is replayed, and the merged checkpoint gives the logits of base and adapter
    (float32, rounded once: 1e-5 of logits of size 1).
    """
    torch.manual_seed(0)
    source(CONFIG).save_pretrained(tmp_path / "base")

    def fresh() -> Any:
        torch.manual_seed(1)
        return ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)

    model = adapt(fresh(), LoRA(r=2, targets=("q_proj", "fc1"), modules_to_save=("classifier",)), "v")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    pack = save(model, tmp_path / "p")
    weights = {group.weight for group in pack.manifest.groups if group.role == "adapter"}
    assert any(str(name).endswith("encoder.layer.0.attention.attention.query.weight") for name in weights), (
        "the checkpoint's names"
    )
    assert validate(tmp_path / "p", base=tmp_path / "base").findings == ()
    again = attach(fresh(), load(tmp_path / "p")).eval()
    assert verify_canary(again, pack) < 1e-5
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = again(pixel_values=pixels).logits
        assert not torch.allclose(wanted, fresh().eval()(pixel_values=pixels).logits, atol=1e-2)
    convert(tmp_path / "p", tmp_path / "peft", to="peft", base=tmp_path / "base")
    if source is ViTForImageClassification:  # a checkpoint without a head has no place for the trained one
        merge(tmp_path / "base", [pack], tmp_path / "merged")
        with torch.no_grad():
            found = (
                ViTForImageClassification.from_pretrained(tmp_path / "merged")
                .eval()(pixel_values=pixels)
                .logits
            )
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


WITHOUT_INTERNALS = """
import sys, warnings
from transformers import BertModel, ViTModel, conversion_mapping, core_model_loading
models = [BertModel.from_pretrained(sys.argv[1]), ViTModel.from_pretrained(sys.argv[2])]
del core_model_loading.WeightRenaming, core_model_loading.rename_source_key, conversion_mapping.get_model_conversion_mapping
from adapterpack import LoRA, adapt, save
for model, target, out in zip(models, ("query", "q_proj"), sys.argv[3:]):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pack = save(adapt(model, LoRA(r=2, targets=(target,)), "v"), out)
    print(pack.manifest.groups[0].weight, sum("renames weights" in str(one.message) for one in said))
"""


@pytest.mark.long
def test_packs_are_saved_where_transformers_has_other_internals(tmp_path: Path) -> None:
    """In a process whose transformers lacks the names that are not public the map that is shipped says what
    they are in the checkpoint.
    """
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    BertModel(BertConfig(**sizes, vocab_size=30)).save_pretrained(tmp_path / "bert")
    ViTModel(CONFIG).save_pretrained(tmp_path / "vit")
    paths = [str(tmp_path / name) for name in ("bert", "vit", "on-bert", "on-vit")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_INTERNALS, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "encoder.layer.0.attention.self.query.weight 0",
        "encoder.layer.0.attention.attention.query.weight 0",
    ]
    assert PeftModel.from_pretrained(
        ViTModel.from_pretrained(tmp_path / "vit"), tmp_path / "on-vit"
    ).active_adapters == ["default"]
