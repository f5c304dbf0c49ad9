"""Adapters in a model: chosen for a block, weighed, folded into its weights and taken out again, listed, read
and exchanged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import noise
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import adapterpack as ap
from adapterpack.errors import ConfigError, NonFinite, NothingToDo, UnknownAdapter, Unsupported
from adapterpack.pack import from_peft
from adapterpack.torch_adapters.layers.wrapper import base_modules

pytestmark = pytest.mark.fast

IDS = torch.tensor([[5, 17, 40, 8, 61, 33, 7], [9, 9, 50, 2, 11, 72, 90]])


def causal(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def shake(model: nn.Module, size: float = 0.2, seed: int = 1) -> nn.Module:
    return noise.shake(model, size, seed)


def two(folder: Path) -> Any:
    """A tiny Llama with two LoRAs at different layers, the second one active."""
    model = shake(ap.adapt(causal(folder), ap.LoRA(r=3, alpha=5), "a"))
    return shake(ap.adapt(model, ap.LoRA(r=2, alpha=7, targets=("q_proj", "down_proj")), "b"), seed=2)


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters, by the path of their module."""
    return {
        f"{path}.{leaf}": value
        for path, module in base_modules(model)
        for leaf, value in module._parameters.items()
        if value is not None
    }


# --- for a block


def test_blocks_choose_and_restore(tiny_llama: Path) -> None:
    """Inside the base's bits or an adapter's, nested in any order; after each block, and after errors, what
    was before.
    """
    base, model = causal(tiny_llama), two(tiny_llama)
    expected = {names: logits(ap.active(model, list(names))) for names in [(), ("a",), ("b",), ("a", "b")]}
    assert torch.equal(expected[()], logits(base))
    ap.active(model, "b")
    with ap.using(model, ["a", "b"]) as inside:
        assert inside is model
        assert torch.equal(logits(model), expected["a", "b"])
        with ap.disabled(model):
            assert torch.equal(logits(model), expected[()])
            with pytest.raises(ZeroDivisionError), ap.using(model, "a"):
                assert torch.equal(logits(model), expected[("a",)])
                _ = 1 / 0
            assert torch.equal(logits(model), expected[()])
        assert torch.equal(logits(model), expected["a", "b"])
        ap.detach(model, "a")
        assert torch.equal(logits(model), expected[("b",)])
    assert torch.equal(logits(model), expected[("b",)])
    with pytest.raises(UnknownAdapter, match="'a'"), ap.using(model, "a"):
        pass
    with ap.disabled(model):
        shake(ap.adapt(model, ap.LoRA(r=2), "new"))
        assert not torch.equal(logits(model), expected[("b",)])
    assert torch.equal(logits(model), expected[("b",)])


# --- weights


LAYERS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "linear": lambda: (nn.Linear(7, 11), torch.randn(5, 7)),
    "conv": lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 6)),
    "embedding": lambda: (nn.Embedding(9, 6), torch.arange(8).reshape(2, 4)),
    "norm": lambda: (nn.LayerNorm(7), torch.randn(5, 7)),
    "attention": lambda: (nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)),
}


class One(nn.Module):
    """A module that is called with one input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.x = LAYERS[kind]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x)[0] if hasattr(self.layer, "num_heads") else self.layer(x)


SINGLE = [
    *(
        ("linear", config)
        for config in (
            ap.LoRA(r=3, alpha=5),
            ap.DoRA(r=2),
            ap.IA3(),
            ap.IA3(feedforward=True),
            ap.LoHa(r=2),
            ap.LoKr(r=2),
            ap.OFT(block_size=3),
            ap.HRA(r=2),
            ap.GLoRA(r=2),
            ap.RoAd(),
            ap.HiRA(r=2),
            ap.VeRA(r=3),
            ap.FourierFT(n_frequency=5),
            ap.BEFT(),
            ap.SHiRA(r=2),
            ap.MiSS(r=2),
            ap.C3A(block_size=1),
            ap.TinyLoRA(),
        )
    ),
    ("conv", ap.LoRA(r=2)),
    ("conv", ap.LoHa(r=2)),
    ("embedding", ap.LoRA(r=2)),
    ("embedding", ap.DoRA(r=2)),
    ("embedding", ap.TrainableTokens(token_indices=(3, 1))),
    ("norm", ap.LNTuning()),
    ("attention", ap.LoRA(r=2)),
]


def single(kind: str, config: Any) -> One:
    """One layer with a shaken adapter ``a``; what reads the input embedding is told which it is."""
    return shake(ap.adapt(One(kind), dataclasses.replace(config, targets=("layer",)), "a"), 0.3).eval()


@pytest.mark.parametrize(
    ("kind", "config"), SINGLE, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_a_weight_is_one_on_the_change_and_a_merge_is_the_layer(kind: str, config: Any) -> None:
    """``y_w = y_0 + w (y_1 - y_0)`` for one layer of each kind (of attention, which is no linear function of
    its weights, the parameter); merged it gives the same within 2e-5, float32 sums of a few numbers near 1,
    and unmerged the same bits and objects as before.
    """
    model = single(kind, config)
    x, before = model.x, own(model)
    bits = {key: value.detach().clone() for key, value in before.items()}
    with torch.no_grad():
        full = model(x)
        with ap.disabled(model):
            base = model(x)
        assert (full - base).abs().max() > 1e-3
        for weight in (0.0, 0.4, -1.5, 1.0):
            found = ap.set_weight(model, "a", weight)(x)
            if kind != "attention":
                torch.testing.assert_close(found, base + weight * (full - base), rtol=2e-5, atol=2e-5)
            if weight:
                assert ap.status(ap.merge_into(model)).merged == ("a",)
                torch.testing.assert_close(model(x), found, rtol=2e-5, atol=2e-5)
                ap.unmerge_from(model)
            after = own(model)
            assert all(after[key] is value and torch.equal(value, bits[key]) for key, value in before.items())
            assert after.keys() == before.keys()
            assert torch.equal(model(x), found)
        assert torch.equal(model(x), full)


def test_weighted_adapters_are_the_composed_pack(tiny_llama: Path, tmp_path: Path) -> None:
    """Two LoRAs with weights are what ``sum(0.7*a, -0.3*b)`` composes, and the float64 model with these
    changes in its weights; saved, an adapter has the weight 1 again.
    """
    model = two(tiny_llama)
    packs = {name: ap.save(model, tmp_path / name, adapter=name) for name in "ab"}
    ap.set_weight(ap.set_weight(ap.active(model, ["a", "b"]), "a", 0.7), "b", -0.3)
    found = logits(model)
    ap.compose([tmp_path / name for name in "ab"], tree="sum(0.7*a, -0.3*b)", out=tmp_path / "mix")
    torch.testing.assert_close(
        found, logits(ap.attach(causal(tiny_llama), ap.load(tmp_path / "mix"))), rtol=1e-5, atol=1e-5
    )
    dense = causal(tiny_llama).double()
    with torch.no_grad():
        for name, weight in (("a", 0.7), ("b", -0.3)):
            for adapter in packs[name].adapters():
                A, B = (torch.tensor(adapter.params[key]).double() for key in ("lora_A", "lora_B"))
                dense.get_submodule(adapter.site.path).weight += weight * adapter.config.scale * (B @ A)
    torch.testing.assert_close(found.double(), logits(dense), rtol=1e-4, atol=1e-4)
    again = ap.save(model, None, adapter="a")
    assert (again.manifest.tensors, again.manifest.canary) == (
        packs["a"].manifest.tensors,
        packs["a"].manifest.canary,
    )
    assert torch.equal(logits(model), found)


def test_what_has_no_weight_is_refused(tiny_llama: Path) -> None:
    """Prompts, unknown names, numbers that are none."""
    model = ap.adapt(
        ap.adapt(causal(tiny_llama), ap.PromptTuning(num_virtual_tokens=2), "soft"), ap.LoRA(r=2), "a"
    )
    with pytest.raises(Unsupported, match="prompt"):
        ap.set_weight(model, "soft", 0.5)
    with pytest.raises(UnknownAdapter, match="nobody"):
        ap.set_weight(model, "nobody", 0.5)
    for weight in (float("nan"), float("inf"), 1e9, True, "0.5"):
        with pytest.raises(ConfigError, match="a number"):
            ap.set_weight(model, "a", weight)  # type: ignore[arg-type]


@torch.no_grad()
def test_two_sets_of_trained_tokens_are_active_together(tiny_llama: Path) -> None:
    """Of different tokens: the rows of both in the embedding and its tied head, in any order, and merged
    (PEFT refuses a second set on a tied model); one token in both is refused.
    """
    model, dense = causal(tiny_llama), causal(tiny_llama)
    for seed, (name, ids) in enumerate({"first": (5, 17), "other": (9, 40, 61)}.items()):
        shake(ap.adapt(model, ap.TrainableTokens(token_indices=ids), name), seed=seed)
        (rows,) = ap.adapter_state_dict(model, name).values()
        dense.get_input_embeddings().weight[list(ids)] = rows
    expected = logits(dense)
    for names in (["first", "other"], ["other", "first"]):
        torch.testing.assert_close(logits(ap.active(model, names)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(ap.merge_into(model)), expected, rtol=1e-5, atol=1e-5)
    ap.adapt(ap.unmerge_from(model), ap.TrainableTokens(token_indices=(40,)), "c")
    with pytest.raises(Unsupported, match="only one"):
        ap.active(model, ["other", "c"])


# --- merged into weights


PEERS = [
    peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "lm_head"]),
    peft.LoraConfig(r=2, use_dora=True, target_modules=["v_proj"]),
    peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    peft.OFTConfig(oft_block_size=4, target_modules=["o_proj"], use_cayley_neumann=False),
    peft.LoraConfig(r=2, target_modules=["up_proj"], trainable_token_indices=[3, 8]),
]


@pytest.mark.parametrize("config", PEERS, ids=["lora", "dora", "ia3", "oft", "tokens"])
def test_merged_weights_are_pefts(config: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """Every parameter of the merged model is PEFT's ``merge_and_unload`` within 1e-6; a tied head follows its
    embedding.
    """
    theirs = shake(
        peft.get_peft_model(causal(tiny_llama), dataclasses.replace(config, task_type="CAUSAL_LM"))
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = ap.attach(causal(tiny_llama), from_peft.read(tmp_path / "theirs", "a"), check_base=False)
    expected, attached = logits(theirs), logits(model)
    merged = ap.merge_into(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), attached, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(logits(merged), expected, rtol=2e-5, atol=2e-5)
    unloaded = theirs.merge_and_unload()
    for key, value in own(merged).items():
        # PEFT changes the embedding with a tied head
        if key != "model.embed_tokens.weight" or "lm_head" not in config.target_modules:
            torch.testing.assert_close(value, unloaded.get_parameter(key), rtol=1e-5, atol=1e-6, msg=key)
    assert torch.equal(logits(ap.unmerge_from(merged)), attached)
    if "lm_head" in config.target_modules:
        with pytest.raises(Unsupported, match="tied"):
            ap.merge_into(model, keep=False)
        assert torch.equal(logits(model), attached)
        model.config.tie_word_embeddings = False
    plain = ap.merge_into(model, keep=False)
    assert not ap.status(plain).adapters
    torch.testing.assert_close(logits(plain), attached, rtol=2e-5, atol=2e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(causal(tmp_path / "plain")), logits(plain))


def test_several_merge_in_their_order(tiny_llama: Path) -> None:
    """LoRA and (IA)^3 at one layer: folded one after the other as they are active, in both orders, in
    bfloat16 within its rounding.
    """
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        model = shake(ap.adapt(causal(tiny_llama, dtype=dtype), ap.LoRA(r=3), "a"))
        shake(ap.adapt(model, ap.IA3(targets=("q_proj", "down_proj")), "b"), seed=2)
        before = own(model)
        for order in (["a", "b"], ["b", "a"]):
            expected = logits(ap.active(model, order))
            ap.active(model, None)
            assert ap.status(ap.merge_into(model, order)).active == ()
            torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)
            assert torch.equal(logits(ap.unmerge_from(model)), expected)
            assert all(own(model)[key] is value for key, value in before.items())


def test_a_merged_model_moves_and_is_copied(tiny_llama: Path) -> None:
    """Cast to float64 and merged: unmerged, it is the base cast to float64; a copy is unmerged by itself."""
    model, base = ap.merge_into(two(tiny_llama)).double(), causal(tiny_llama).double()
    twin = copy.deepcopy(model)
    ap.unmerge_from(model)
    with ap.disabled(model):
        assert torch.equal(logits(model), logits(base))
    assert ap.status(twin).merged == ("b",)
    assert ap.status(ap.unmerge_from(twin)).kept_bytes == 0


def test_heads_stay_with_a_merge(tiny_bert: Path) -> None:
    """A head that was trained whole is active while its adapter is merged, and the model's own when the base
    is given up: labels, too.
    """
    torch.manual_seed(0)
    trained = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=5).eval()
    pack = ap.save(shake(ap.adapt(trained, ap.LoRA(r=3, modules_to_save=("classifier",)), "t")), None)
    model = ap.attach(
        AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2).eval(), pack, "t"
    )
    expected = logits(model)
    torch.testing.assert_close(logits(ap.merge_into(model)), expected, rtol=1e-5, atol=1e-5)
    ap.merge_into(ap.unmerge_from(model), keep=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model.classifier, nn.Linear)
    assert model.config.num_labels == 5


class Subclassed(nn.Parameter):
    """What quantizing libraries make of parameters."""


def test_what_cannot_be_merged_is_refused_and_changes_nothing(tiny_llama: Path) -> None:
    """By the name of the adapter and its reason; while something is merged, what looks at the base is
    refused, too.
    """
    model = causal(tiny_llama)
    for name, config in (
        ("soft", ap.PromptTuning(num_virtual_tokens=2)),
        ("block", ap.Bottleneck(targets="all-blocks", reduction=8)),
        ("acts", ap.ALoRA(r=2, alora_invocation_tokens=(7, 8))),
        ("fine", ap.LoRA(r=2)),
    ):
        shake(ap.adapt(model, config, name))
    ap.active(model, "fine")
    before = own(model)
    for name, reason in (
        ("soft", "does not act on weights"),
        ("block", "does not act on weights"),
        ("acts", "positions"),
    ):
        with pytest.raises(Unsupported, match=reason) as caught:
            ap.merge_into(model, ["fine", name])
        assert name in str(caught.value)
    quantized = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantized[1].weight = Subclassed(quantized[1].weight.detach())
    ap.adapt(quantized, ap.LoRA(r=2), "a")
    with pytest.raises(Unsupported, match=r"plain weight.*Subclassed"):
        ap.merge_into(quantized)
    assert all(own(model)[key] is value for key, value in before.items())
    ap.merge_into(model)
    for call in (
        lambda: ap.active(model, None),
        lambda: ap.detach(model),
        lambda: ap.merge_into(model),
        lambda: ap.set_weight(model, "fine", 2),
        lambda: ap.adapt(model, ap.LoRA(r=2), "more"),
        lambda: ap.save(model, None, adapter="fine"),
        lambda: ap.disabled(model).__enter__(),
    ):
        with pytest.raises(Unsupported, match=r"merged.*unmerge_from"):
            call()
    ap.unmerge_from(model)
    with pytest.raises(NothingToDo, match="nothing is merged"):
        ap.unmerge_from(model)
    with pytest.raises(NothingToDo, match="no adapter is active"):
        ap.merge_into(ap.active(model, None))
    small = shake(
        ap.adapt(nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16)), ap.LoRA(r=1, alpha=1), "a"), 1e-5
    )
    with pytest.raises(NothingToDo, match="rounding"):
        ap.merge_into(ap.set_weight(small, "a", 1e-12))
    with pytest.raises(NonFinite, match="infinite"):
        ap.merge_into(
            shake(
                ap.adapt(nn.Sequential(nn.Linear(4, 4, dtype=torch.float16)), ap.LoRA(r=1, alpha=1e9), "a"),
                1.0,
            )
        )
