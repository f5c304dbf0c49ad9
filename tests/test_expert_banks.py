"""Adapters of stacks of experts in graphs, another one for each row: beside PEFT's own model in float64, and
W + s B A of each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
import transformers
from invariants.bundles import Reference, check

from adapterpack import HiRA, LoRA, Pack, adapt, convert, export, load, merge, quantize, save, validate
from adapterpack.errors import Unsupported
from adapterpack.runtime.engine.adapter_feeds import AdapterFeeds
from adapterpack.runtime.engine.adapter_reader import AdapterReader
from adapterpack.runtime.sessions.session import Session
from adapterpack.slots.sums import Summand, add_changes
from adapterpack.slots.values import pack_values
from adapterpack.tasks.task import get_task

pytestmark = pytest.mark.filterwarnings("ignore")
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    # gate and up projection as wide as the hidden states: no shape tells which way round a stack lies
    "qwen3_moe": _MANY,
    # chosen one by one, and every expert multiplies every token; queries grow with their positions
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [0],
        "floor_scale": 2,
        "attn_scale": 1.0,
    },
    "gpt_oss": {**_LOCAL, "intermediate_size": 32},
    "mixtral": _LOCAL,
    "qwen2_moe": {**_MANY, "shared_expert_intermediate_size": 20},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": _LOCAL,
    "glm4_moe": {**_MANY, **_ROUTED},
    "deepseek_v3": {
        **_MANY,
        **_ROUTED,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}
_NEAR = 1e-5
"""Of the largest output: float32 beside float64."""


def _shake(model: torch.nn.Module, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(size * torch.randn_like(value))


def _load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def make(family: str, root: Path) -> tuple[Path, Path, Pack, Pack]:
    """A base, PEFT's adapter of its experts and router, a pack of its experts, and one of its attention."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family]})
    )
    _shake(model, 0.3, 1)
    model.save_pretrained(root / "base")
    router = next(
        name for name, _ in model.named_parameters() if name.endswith(("router.weight", "gate.weight"))
    )
    named = [name for name, value in model.named_parameters() if ".experts." in name and value.ndim == 3]
    theirs = peft.get_peft_model(
        _load(root / "base"),
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=[*named, router]),
    )
    _shake(theirs, 0.3, 2)
    theirs.save_pretrained(root / "theirs")
    packs = []
    for number, (rank, targets) in enumerate([(3, ("all-experts",)), (1, ("q_proj", "o_proj"))]):
        ours = adapt(_load(root / "base"), LoRA(r=rank, alpha=2, targets=targets))
        _shake(ours, 0.3, 3 + number)
        packs.append(save(ours, root / f"ours{number}", base=root / "base", name=f"ours{number}"))
    return root / "base", root / "theirs", packs[0], packs[1]


class OfPeft(Reference):
    """PEFT's own model."""

    def __init__(self, base: Path, adapter: Path) -> None:
        super().__init__(get_task("text-generation"), base)
        self.model = peft.PeftModel.from_pretrained(self.model, adapter).double().eval()


def _known(base: Path, theirs: Path, ours: Sequence[Pack], root: Path) -> dict[str | None, Reference]:
    task = get_task("text-generation")
    return {
        None: Reference(task, base),
        "pack": OfPeft(base, theirs),
        **{one.name: Reference(task, base, one, root / f"folded-{one.name}") for one in ours},
    }


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(name, mode, marks=[pytest.mark.long] * ((name, mode) != ("llama4_text", "bank")))
        for name in FAMILIES
        for mode in ("bank", "inputs")
        if (name, mode) != ("qwen3_moe", "bank")
    ],
)
def test_each_row_has_its_own_experts(family: str, mode: str, tmp_path: Path) -> None:
    """Ragged rows, every adapter beside every other and beside the base, as prompts and step by step."""
    base, theirs, *ours = make(family, tmp_path)
    pack = convert(theirs, tmp_path / "pack", to="pack", base=base).path
    bundle = export(base, [pack, *ours], tmp_path / "bundle", mode=mode, frontend="transformers")
    assert bundle.decoder or mode == "inputs" or family == "gpt_oss"
    check(Session(tmp_path / "bundle"), _known(base, theirs, ours, tmp_path), tolerance=_NEAR)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bank of Qwen3's experts, with what it is made from."""
    root = tmp_path_factory.mktemp("experts")
    base, theirs, *ours = make("qwen3_moe", root)
    convert(theirs, root / "pack", to="pack", base=base)
    export(base, [root / "pack", ours[0]], root / "bank", mode="bank", frontend="transformers", slots=5)
    return root


@pytest.mark.long
def test_stacks_that_are_square(bank: Path) -> None:
    """No shape tells which way round a stack lies whose gate and up projection are as wide as its input."""
    known = _known(bank / "base", bank / "theirs", [load(bank / "ours0")], bank)
    check(Session(bank / "bank"), known, tolerance=_NEAR)
    assert validate(bank / "bank", full=True, base=bank / "base").findings == ()


@pytest.mark.long
def test_a_graph_takes_no_fold_of_experts(bank: Path, tmp_path: Path) -> None:
    """Neither where its site map tells of them, nor where the checkpoint has each apart."""
    for source, base, reason in (
        (bank / "bank", None, "does not say where the weights"),
        (bank / "bank" / "model.onnx", bank / "base", "one by one"),
    ):
        with pytest.raises(Unsupported, match=reason):
            merge(source, [load(bank / "ours0")], tmp_path / "out", checkpoint=base)


def test_the_engine_holds_experts_once_for_each_adapter(bank: Path) -> None:
    """And keeps them from batch to batch while no adapter comes that they lack."""
    session = Session(bank / "bank")
    reader = AdapterReader(session)
    one, two = (reader.read(load(bank / name)) for name in ("pack", "ours0"))
    feeds = AdapterFeeds(reader.layout, 4, ("cpu", 0))
    name = "model.layers.0.mlp.experts.gate_up_proj.experts_down"
    both = feeds.of([one, two, one, one])
    assert both[name].shape() == [2, 4, 32, 3]
    again = feeds.of([two, one])
    assert again[name] is both[name] and again["adapter_ids"].numpy().tolist() == [1, 0]
    alone = feeds.of([two])
    assert alone[name].shape() == [1, 4, 32, 3]
    assert np.shares_memory(alone[name].numpy(), two.values[name])
    assert feeds.of([None, None])[name].shape() == [1, 4, 32, 0]


def test_codes_of_experts_beside_float_adapters(bank: Path, tmp_path: Path) -> None:
    """The matrices of all experts become codes, and the adapters stay what they were."""
    before = Session(bank / "bank")
    quantize(bank / "bank", tmp_path / "int8", scheme="int8")
    after = Session(tmp_path / "int8")
    ids = np.arange(3, 11)[None].repeat(2, 0)
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found, right = (one.run(rows, ["pack", "ours0"])["logits"] for one in (after, before))
    assert np.abs(found - right).max() < 0.1 * np.abs(right).max()
    assert np.abs(right[0] - right[1]).max() > 0.3 * np.abs(right).max()
    nodes = ir.load(tmp_path / "int8" / "model.onnx").graph
    assert sum("experts" in (node.name or "") and node.op_type == "MatMul" for node in nodes) == 4


def test_the_sum_of_adapters_of_experts_is_exact() -> None:
    rng = np.random.default_rng(3)
    parts = [
        Summand(
            name,
            {"e.experts_down": rng.normal(size=(3, 5, rank)), "e.experts_up": rng.normal(size=(3, rank, 4))},
            weight,
        )
        for name, rank, weight in (("a", 2, 0.5), ("b", 1, -2.0))
    ]
    found = add_changes(parts, {})
    wanted = sum(
        part.weight * (part.values["e.experts_down"] @ part.values["e.experts_up"]) for part in parts
    )
    np.testing.assert_allclose(found["e.experts_down"] @ found["e.experts_up"], wanted, rtol=1e-5, atol=1e-5)


def test_only_what_is_added_has_a_slot_at_experts(bank: Path) -> None:
    """HiRA multiplies the weight, which a graph would have to hold once more for each expert."""
    model = adapt(_load(bank / "base"), HiRA(r=2, targets=("all-experts",)))
    with pytest.raises(Unsupported, match="only for what is added"):
        pack_values(save(model, None, name="other"), lambda adapter: (np.zeros((2, 2)), None))
