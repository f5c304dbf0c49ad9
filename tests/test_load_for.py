"""A base and its adapter in one call: the pack's own task, labels and base, and never a path that a stranger
wrote.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import adapterpack as ap
from adapterpack.errors import BaseMismatch, ConfigError

pytestmark = pytest.mark.fast
IDS = torch.tensor([[5, 17, 40, 8], [9, 9, 50, 2]])


@torch.no_grad()
def test_a_pack_brings_its_base_and_head(tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """A classifier of five named labels: the trained model's logits, in the stored dtype or another; on
    another base an error.
    """
    labels = dict(enumerate("vwxyz"))
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=5, id2label=labels
    ).eval()
    ap.adapt(model, ap.LoRA(r=2, modules_to_save=("classifier",)), "t")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    ap.save(model, tmp_path / "t", base=tiny_bert)
    expected = model.eval()(input_ids=IDS).logits
    found = ap.load_for(tmp_path / "t", tiny_bert)
    assert (type(found).__name__, found.training, found.config.id2label) == (
        "BertForSequenceClassification",
        False,
        labels,
    )
    torch.testing.assert_close(found(input_ids=IDS).logits, expected, rtol=1e-6, atol=1e-6)
    half = ap.load_for(ap.load(tmp_path / "t"), tiny_bert, name="other", dtype=torch.bfloat16)
    assert ap.status(half).base_dtypes == ("bfloat16",)
    assert ap.status(half).active == ("other",)
    torch.testing.assert_close(half(input_ids=IDS).logits.float(), expected, rtol=0.1, atol=0.1)
    for dtype in ("int8", "nonsense"):
        with pytest.raises(ConfigError, match="dtype"):
            ap.load_for(tmp_path / "t", tiny_bert, dtype=dtype)
    other = tmp_path / "other"
    model.base_model.embeddings.word_embeddings.weight.add_(1)
    ap.detach(model).save_pretrained(other)
    with pytest.raises(BaseMismatch):
        ap.load_for(tmp_path / "t", other)


def test_a_base_is_a_hubs_or_is_given(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack of a local base names a folder that is nobody's to follow: the base must be given. A path in
    PEFT's configuration is not followed either, even where a model lies there.
    """
    model = ap.adapt(ap.load_for(_moved(tiny_llama, tmp_path), tiny_llama), ap.LoRA(r=1), "more")
    assert ap.status(model).active == ("more",)
    monkeypatch.chdir(tiny_llama.parent)
    with pytest.raises(ConfigError, match=r"base on a hub.*give the base"):
        ap.load_for(tmp_path / "local")
    folder = tmp_path / "theirs"
    ap.convert(tmp_path / "local", folder, to="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tiny_llama)})
    )
    with pytest.raises(ConfigError, match="give the base"):
        ap.load_for(folder)


@torch.no_grad()
def _moved(base: Path, folder: Path) -> Path:
    """A pack of one LoRA that changes something."""
    from transformers import AutoModelForCausalLM

    model = ap.adapt(AutoModelForCausalLM.from_pretrained(base), ap.LoRA(r=2), "local")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    ap.save(model, folder / "local", base=base)
    return folder / "local"
