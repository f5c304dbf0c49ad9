"""A batch whose rows have adapters of their own, in torch; and an adapter's tensors, its status, and
another's values in its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import noise
import peft
import pytest
import torch
from families import FAMILIES
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, XLNetConfig, XLNetModel

import adapterpack as ap
from adapterpack.errors import (
    BaseMismatch,
    ConfigError,
    FormatError,
    SiteNotFound,
    UnknownAdapter,
    Unsupported,
)
from adapterpack.pack import from_peft

pytestmark = pytest.mark.fast

IDS = torch.tensor(
    [
        [5, 17, 40, 8, 61, 33, 7],
        [9, 9, 7, 8, 11, 72, 90],
        [1, 7, 8, 4, 3, 21, 60],
        [4, 7, 8, 7, 3, 8, 2],
        [0, 0, 7, 8, 3, 9, 5],
    ]
)
MASK = (IDS != 0).long()
ROWS = ["a", None, "b", "a", "b"]
KINDS: dict[str, tuple[Any, Any]] = {
    "low rank": (ap.LoRA(r=3, alpha=5), ap.LoRA(r=2, alpha=7, targets=("q_proj", "down_proj"))),
    "factors": (ap.IA3(), ap.LoRA(r=2)),
    "rotations": (ap.OFT(block_size=4), ap.DoRA(r=2)),
    "blocks": (ap.Bottleneck(targets="all-blocks", reduction=8), ap.LoReFT(r=2, targets="all-blocks")),
    "tables": (ap.TrainableTokens(token_indices=(5, 7)), ap.TrainableTokens(token_indices=(7, 8, 9))),
    "embeddings": (ap.LoRA(r=2, targets=("embed_tokens",)), ap.DoRA(r=3, targets=("embed_tokens",))),
    "norms": (ap.LNTuning(targets=("input_layernorm",)), ap.LNTuning(targets=("input_layernorm", "norm"))),
    "positions": (ap.ALoRA(r=2, alora_invocation_tokens=(7, 8)), ap.LoRA(r=2)),
    "attention": (ap.LLaMAAdapter(adapter_len=2), ap.LLaMAAdapter(adapter_len=3)),
    "whole": (
        ap.LoRA(r=2, targets=("q_proj",), modules_to_save=("layers.1.mlp",)),
        ap.IA3(targets=("v_proj",)),
    ),
}


def causal(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    return noise.shake(model, 0.2, seed)


def pair(folder: Path, kind: str) -> Any:
    """A tiny Llama with the two adapters of a kind."""
    model = causal(folder)
    for seed, (name, config) in enumerate(zip("ab", KINDS[kind], strict=True)):
        shake(ap.adapt(model, config, name), seed)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_row_is_what_it_is_alone(kind: str, tiny_llama: Path) -> None:
    """Rows of two adapters and of the base in one batch, padded on the left: as each is with its adapter for
    all, within 1e-5; with a cache too, token by token; with a weight on one of them, too.
    """
    model = pair(tiny_llama, kind)
    ap.set_weight(model, "a", 0.5)
    expected = torch.empty(0)
    for name in ("a", "b", None):
        with ap.using(model, name):
            found = model(input_ids=IDS, attention_mask=MASK).logits
        expected = found.clone() if not expected.numel() else expected
        rows = [row for row, own in enumerate(ROWS) if own == name]
        expected[rows] = found[rows]
    with ap.using(model, adapters=ROWS):
        torch.testing.assert_close(
            model(input_ids=IDS, attention_mask=MASK).logits, expected, rtol=1e-5, atol=1e-5
        )
        cache = model(input_ids=IDS[:, :5], attention_mask=MASK[:, :5], use_cache=True).past_key_values
        for place in (5, 6):
            step = model(
                input_ids=IDS[:, place : place + 1],
                attention_mask=MASK[:, : place + 1],
                past_key_values=cache,
                use_cache=True,
            )
            torch.testing.assert_close(step.logits[:, 0], expected[:, place], rtol=1e-5, atol=2e-5)
    assert ap.status(model).rows is None


def test_generation_is_by_rows(tiny_llama: Path) -> None:
    """Greedy, and by beams of which each row has three: the tokens of each row are those that it generates
    alone.
    """
    model = pair(tiny_llama, "low rank")
    for options in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1, **options}
        with ap.using(model, adapters=ROWS):
            found = model.generate(IDS, attention_mask=MASK, **settings)
        each = len(found) // len(IDS)
        for row, name in enumerate(ROWS):
            with ap.using(model, name):
                alone = model.generate(IDS[row : row + 1], attention_mask=MASK[row : row + 1], **settings)
            assert torch.equal(found[row * each : (row + 1) * each], alone), (row, options)


@torch.no_grad()
def test_rows_are_pefts(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT's own ``adapter_names`` on the same tensors: the logits of every row within 1e-5."""
    theirs = peft.get_peft_model(causal(tiny_llama), peft.LoraConfig(r=3, task_type="CAUSAL_LM"), "a")
    theirs.add_adapter(
        "b", peft.LoraConfig(r=2, lora_alpha=9, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.copy_(
                0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            )
    theirs.save_pretrained(tmp_path)
    model = causal(tiny_llama)
    for name in "ab":
        ap.attach(model, from_peft.read(tmp_path / name, name), check_base=False)
    expected = theirs.eval()(
        input_ids=IDS, attention_mask=MASK, adapter_names=[name or "__base__" for name in ROWS]
    ).logits
    with ap.using(model, adapters=ROWS):
        torch.testing.assert_close(
            model(input_ids=IDS, attention_mask=MASK).logits, expected, rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_rows_of_an_encoder_and_a_decoder(tiny_bert: Path) -> None:
    """T5, whose encoder generation calls by itself; and a pooled head, of which a layer sees one vector a
    row.
    """
    family = FAMILIES["t5"]
    model = shake(
        ap.adapt(shake(ap.adapt(family.build(), ap.LoRA(r=2), "a"), 1), ap.IA3(targets=("q", "wo")), "b"), 2
    ).eval()
    ids = IDS[:3] % 40 + 1
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": -1}
    with ap.using(model, adapters=["a", None, "b"]):
        found = model.generate(ids, **settings)
    for row, name in enumerate(["a", None, "b"]):
        with ap.using(model, name):
            assert torch.equal(found[row : row + 1], model.generate(ids[row : row + 1], **settings))
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).eval()
    for seed, name in enumerate("ab"):
        shake(
            ap.adapt(
                classifier,
                ap.LoRA(r=2, targets=("query", "pooler.dense"), modules_to_save=("classifier",)),
                name,
            ),
            seed,
        )
    with ap.using(classifier, adapters=["a", None, "b"]):
        together = classifier(input_ids=IDS[:3]).logits
    for row, name in enumerate(["a", None, "b"]):
        with ap.using(classifier, name):
            torch.testing.assert_close(
                together[row], classifier(input_ids=IDS[:3]).logits[row], rtol=1e-5, atol=1e-5
            )


@torch.no_grad()
def test_what_cannot_differ_by_row_is_refused(tiny_llama: Path) -> None:
    """Prompts, parameters of experts, a wrong number of rows, layers that have the rows elsewhere; and
    nothing stays behind.
    """
    model = shake(
        ap.adapt(
            ap.adapt(causal(tiny_llama), ap.PromptTuning(num_virtual_tokens=2), "soft"), ap.LoRA(r=2), "a"
        )
    )
    for adapters, error, what in (
        (["soft", "a"], Unsupported, r"row to row.*prompt.*soft"),
        (["a", "nobody"], UnknownAdapter, "nobody"),
        ([], ConfigError, "for each row"),
        ("a", ConfigError, "for each row"),
    ):
        with pytest.raises(error, match=what), ap.using(model, adapters=adapters):  # type: ignore[arg-type]
            pass
    with pytest.raises(ConfigError, match="one of the two"), ap.using(model, "a", adapters=["a"]):
        pass
    with (
        pytest.raises(Unsupported, match=r"one adapter for each row"),
        ap.using(model, adapters=["a", None, "a"]),
    ):
        model(input_ids=IDS)
    assert not model._forward_pre_hooks
    assert ap.status(model).active == ("a",)
    mixtral = FAMILIES["mixtral"].build()
    ap.adapt(mixtral, ap.LoRA(r=2, targets=("all-experts",)), "a")
    with pytest.raises(Unsupported, match="row to row"), ap.using(mixtral, adapters=["a", None]):
        pass
    turned = XLNetModel(XLNetConfig(vocab_size=100, d_model=16, n_layer=1, n_head=2, d_inner=16)).eval()
    shake(ap.adapt(turned, ap.LoRA(r=2, targets=("layer_1", "layer_2")), "a"))
    for ids in (IDS[:2], IDS[:, :5]):  # [length, batch, width] inside
        with (
            pytest.raises(Unsupported, match=r"rows|tokens"),
            ap.using(turned, adapters=["a", None, None, "a", None][: len(ids)]),
        ):
            turned(input_ids=ids)


def test_a_status_says_what_a_model_holds(tiny_llama: Path) -> None:
    """Counts beside those of the parameters themselves; a table, and JSON that is JSON."""
    model = ap.adapt(
        causal(tiny_llama),
        [
            ap.LoRA(r=3, targets=("q_proj",), modules_to_save=("lm_head",)),
            ap.TrainableTokens(token_indices=(5,)),
        ],
        "tickets",
    )
    ap.adapt(model, ap.VeRA(r=2, targets=("v_proj", "o_proj")), "other")
    ap.set_weight(model, "tickets", 0.5)
    found = ap.status(model)
    tickets, other = (
        next(one for one in found.adapters if one.name == name) for name in ("tickets", "other")
    )
    assert (found.active, found.merged, found.model) == (("other",), (), "LlamaForCausalLM")
    assert (found.parameters, found.trainable) == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    assert found.trainable_share == found.trainable / found.parameters
    assert (tickets.methods, tickets.sites, tickets.whole_modules, tickets.active, tickets.weight) == (
        ("lora", "trainable_tokens"),
        3,
        1,
        False,
        0.5,
    )
    assert tickets.parameters == 2 * 3 * (32 + 32) + 32 + 96 * 32
    assert (other.trainable, other.dtypes, other.devices) == (
        sum(value.numel() for value in ap.adapter_state_dict(model, "other").values()),
        ("float32",),
        ("cpu",),
    )
    assert json.loads(json.dumps(found.to_json()))["adapters"][1]["name"] == "tickets"
    text = str(ap.status(ap.merge_into(model, "tickets")))
    for part in (
        "LlamaForCausalLM",
        "merged",
        "tickets",
        "lora trainable_tokens",
        "kept for unmerge_from",
        f"{found.trainable:,}",
    ):
        assert part in text, text
    assert "no adapters" in str(ap.status(nn.Linear(2, 2)))


def test_tensors_come_out_and_go_in(tiny_llama: Path) -> None:
    """Whole, by path and name; into a fresh adapter they give the same logits; what does not fit is named,
    and nothing is copied.
    """
    config = [
        ap.VeRA(r=2, targets=("q_proj", "v_proj"), modules_to_save=("lm_head",)),
        ap.TrainableTokens(token_indices=(5,)),
    ]
    model, fresh = shake(ap.adapt(causal(tiny_llama), config, "a")), ap.adapt(causal(tiny_llama), config, "b")
    state = ap.adapter_state_dict(model, "a")
    assert "model.layers.0.self_attn.q_proj.vera_lambda_b" in state
    assert not any(value.requires_grad for value in state.values())
    before = {key: value.clone() for key, value in ap.adapter_state_dict(fresh, "b").items()}
    key = "lm_head.weight"
    for wrong, error, what in (
        ({**state, "nonsense": state[key]}, SiteNotFound, "nonsense"),
        ({k: v for k, v in state.items() if k != key}, SiteNotFound, key),
        ({**state, key: state[key].T}, FormatError, key),
        ({**state, key: state[key].long()}, FormatError, "int64"),
        ({**state, key: 1}, FormatError, "int"),
    ):
        with pytest.raises(error, match=what):
            ap.load_adapter_state_dict(fresh, "b", wrong)
    assert all(torch.equal(value, before[key]) for key, value in ap.adapter_state_dict(fresh, "b").items())
    ap.load_adapter_state_dict(fresh, "b", {key: value.double() for key, value in state.items()})
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, fresh(input_ids=IDS).logits)


class Two(nn.Module):
    """Two linear layers of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(9, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


@torch.no_grad()
def test_values_are_swapped_without_compiling_again() -> None:
    """Two packs in turns in a compiled model: their own outputs, and one graph for all; a pack that differs
    is refused by what differs.
    """
    configs = {
        "a": ap.LoRA(r=3, alpha=5, dropout=0.1),
        "b": ap.LoRA(r=3, alpha=5),
        "wide": ap.LoRA(r=4, alpha=5),
        "few": ap.LoRA(r=3, alpha=5, targets=("one",)),
        "factors": ap.IA3(),
    }
    packs = {
        name: ap.save(shake(ap.adapt(Two(), config, name), seed), None)
        for seed, (name, config) in enumerate(configs.items())
    }
    x = torch.randn(4, 9)
    expected = {name: ap.attach(Two().eval(), packs[name]).eval()(x) for name in ("a", "b")}
    model = ap.attach(Two(), packs["a"], "own").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    counters.clear()
    for name in ("a", "b", "a", "b"):
        ap.hotswap(model, "own", packs[name])
        torch.testing.assert_close(compiled(x), expected[name], rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert (expected["a"] - expected["b"]).abs().max() > 1e-2
    for name, error, what in (
        ("wide", Unsupported, "r=4"),
        ("few", SiteNotFound, "missing"),
        ("factors", Unsupported, "ia3"),
    ):
        with pytest.raises(error, match=what):
            ap.hotswap(model, "own", packs[name])
    other = Two()
    other.one.weight.add_(1)
    with pytest.raises(BaseMismatch):
        ap.hotswap(ap.adapt(other, ap.LoRA(r=3, alpha=5), "own"), "own", packs["b"])
    torch.testing.assert_close(compiled(x), expected["b"], rtol=1e-6, atol=1e-6)
