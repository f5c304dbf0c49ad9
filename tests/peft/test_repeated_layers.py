"""Adapters of a base whose blocks are repeated (``layer_replication``): against the real PEFT, and W + s B A
written out in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from noise import shake
from safetensors.numpy import load_file

import adapterpack
from adapterpack import (
    LoRA,
    adapt,
    attach,
    compose,
    convert,
    detach,
    export,
    load,
    load_for,
    merge,
    merge_into,
    resize,
    save,
    unmerge,
    validate,
)
from adapterpack.adapter_methods.forms.repeated_layers import MOST_LAYERS
from adapterpack.errors import BaseMismatch, FormatError, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = 2e-5
"""Absolute: float32 sums of 28 terms of size 1, through six blocks."""
SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 28,
}
RANGES, ORDER = [[0, 2], [1, 3], [1, 2]], [0, 1, 1, 2, 1]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 3]])
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SIZES, num_key_value_heads=1),
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"3.self_attn.q_proj": 2}},
    ),
    "bert": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**SIZES, num_labels=3),
        {"target_modules": ["query", "output.dense"], "use_dora": True},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of each kind; Llama's in two files."""
    folder = tmp_path_factory.mktemp("bases")
    for name, (kind, config, _) in MODELS.items():
        torch.manual_seed(3)
        with torch.no_grad():
            shake(kind(config)).save_pretrained(
                folder / name, max_shard_size="20KB" if name == "llama" else "1GB"
            )
    return folder


@pytest.fixture(scope="module")
def theirs(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Name -> a folder that PEFT wrote, and the logits of PEFT's model."""
    made = {}
    for name, (kind, _, options) in MODELS.items():
        torch.manual_seed(4)
        model = peft.get_peft_model(
            kind.from_pretrained(bases / name),
            peft.LoraConfig(r=3, lora_alpha=5, layer_replication=RANGES, **options),
        )
        with torch.no_grad():
            shake(model, 0.3, 5).eval().save_pretrained(folder := tmp_path_factory.mktemp("peft") / name)
        made[name] = folder, logits(model)
    return made


@torch.no_grad()
def logits(model: Any) -> np.ndarray:
    """The logits."""
    return model(IDS).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_repeated_blocks_here_in_peft_and_written_out(
    name: str, bases: Path, theirs: Any, tmp_path: Path
) -> None:
    """Valid on its base; attached, loaded and merged it is PEFT; taken out, the base; given back, PEFT's
    bits; cached tokens are right.
    """
    (kind, _, _), (folder, wanted), base = MODELS[name], theirs[name], bases / name
    pack = convert(folder, tmp_path / "pack", to="pack", base=base).pack
    assert validate(tmp_path / "pack", base=base, full=True).valid
    model = kind.from_pretrained(base).eval()
    plain = logits(model)
    assert np.abs(plain - wanted).max() > 0.05
    np.testing.assert_allclose(logits(attach(model, load(tmp_path / "pack"))), wanted, rtol=0, atol=FP32)
    # shared
    assert len(
        {id(value) for key, value in model.named_parameters() if key.endswith("query.base.weight")}
    ) in {0, 3}
    np.testing.assert_array_equal(logits(detach(model)), plain)
    assert model.config.num_hidden_layers == 3
    np.testing.assert_allclose(logits(load_for(tmp_path / "pack", base)), wanted, rtol=0, atol=FP32)
    convert(tmp_path / "pack", tmp_path / "again", to="peft")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["layer_replication"] == RANGES
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(value.tobytes() == after[key].tobytes() for key, value in before.items())
    merge(base, [pack], tmp_path / "merged")
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_hidden_layers == len(ORDER)
    np.testing.assert_allclose(logits(merged), wanted, rtol=0, atol=FP32)
    unmerge(tmp_path / "merged", tmp_path / "back", base=base)
    stored_files = {path.name: path.read_bytes() for path in base.glob("*.safetensors")}
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "back").glob("*.safetensors")
    } == stored_files
    with pytest.raises(Unsupported, match="repeated blocks"):
        unmerge(tmp_path / "merged", tmp_path / "computed", packs=[pack])
    if name == "llama":
        generated = [
            one.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()
            for one in (merged, load_for(tmp_path / "pack", base))
        ]
        assert generated[0] == generated[1]
        stored = {key: value for file in base.glob("*.safetensors") for key, value in load_file(file).items()}
        written = {
            key: value
            for file in (tmp_path / "merged").glob("*.safetensors")
            for key, value in load_file(file).items()
        }
        for place, number in enumerate(ORDER):
            key = f"base_model.model.model.layers.{place}.self_attn.q_proj"
            A, B = (before[f"{key}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
            dense = stored[f"model.layers.{number}.self_attn.q_proj.weight"] + 5 / len(A) * B @ A
            # one rounding
            np.testing.assert_allclose(
                written[f"model.layers.{place}.self_attn.q_proj.weight"], dense, rtol=0, atol=1e-6
            )
            for rest in ("self_attn.k_proj.weight", "input_layernorm.weight"):
                assert (
                    written[f"model.layers.{place}.{rest}"].tobytes()
                    == stored[f"model.layers.{number}.{rest}"].tobytes()
                )


def test_trained_here_peft_loads_it(bases: Path, tmp_path: Path) -> None:
    """Adapters of their own in blocks that share weights, saved with the digests of the whole stack."""
    model = adapt(
        transformers.LlamaForCausalLM.from_pretrained(bases / "llama"),
        LoRA(r=2, targets=("v_proj",), repeated_layers=(0, 2, 1, 3, 1, 2)),
        "ours",
    )
    with torch.no_grad():
        shake(model, 0.3, 6).eval()
    save(model, tmp_path / "ours")
    assert validate(tmp_path / "ours", base=bases / "llama", full=True).valid
    there = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(bases / "llama"), tmp_path / "ours"
    ).eval()
    assert len(there.base_model.model.model.layers) == len(ORDER)
    np.testing.assert_allclose(logits(there), logits(model), rtol=0, atol=FP32)


def test_what_cannot_repeat_blocks_says_so(bases: Path, theirs: Any, tmp_path: Path) -> None:
    """By name, and nothing is left behind; a base without such a block is another base."""
    pack = convert(theirs["llama"][0], tmp_path / "pack", to="pack", base=bases / "llama").pack
    other = adapterpack.save(
        adapt(transformers.LlamaForCausalLM.from_pretrained(bases / "llama"), LoRA(r=2), "other"), None
    )
    model = load_for(pack, bases / "llama")
    for stage in (
        lambda: compose([pack, pack.renamed("b")], out=tmp_path / "out"),
        lambda: resize(pack, rank=1, out=tmp_path / "out"),
        lambda: export(bases / "llama", [pack], tmp_path / "out"),
        lambda: convert(pack, tmp_path / "out", to="mlx"),
        lambda: merge(bases / "llama", [pack, other], tmp_path / "out"),
        lambda: merge_into(model),
        lambda: attach(model, other),
    ):
        with pytest.raises(Unsupported, match=r"blocks"):
            stage()
        assert not (tmp_path / "out").exists()
    small = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 2}, num_key_value_heads=1)
    )
    with pytest.raises(BaseMismatch, match="block 2"):
        attach(small, pack, check_base=False)
    assert len(small.model.layers) == 2
    config = json.loads((theirs["llama"][0] / "adapter_config.json").read_text())
    for wrong in (
        [[0, MOST_LAYERS + 1]],
        [[0, MOST_LAYERS], [0, 1]],
        [[2, 1]],
        [[0]],
        "all",
        [[-1, 2]],
        [[0, 2.0]],
        [[0, 1]] * 4096,
    ):
        (folder := tmp_path / "strange").mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(
            (theirs["llama"][0] / "adapter_model.safetensors").read_bytes()
        )
        (folder / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": wrong}))
        with pytest.raises(FormatError, match=r"repeated_layers|layer_replication"):
            load(folder)
