"""Adapters in a model: what is exact stays exact, what is wrong is said, and the numbers are those of the
formula.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise import shake
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import adapterpack
from adapterpack import LoRA, active, adapt, attach, detach, load, merge_into, save
from adapterpack.adapter_methods import Dense, Diagonal, Method, NormalForm, Site, Traits, evaluate, registry
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    NonFinite,
    NothingToDo,
    ParityError,
    SiteNotFound,
    UnknownAdapter,
    Unsupported,
)
from adapterpack.manifest.structs import Canary
from adapterpack.pack import canary
from adapterpack.torch_adapters.canaries.canary import verify_canary
from adapterpack.torch_adapters.kernels.low_rank import Dropout, add_low_rank, is_low_rank
from adapterpack.torch_adapters.layers.active import adapter_names
from adapterpack.torch_adapters.layers.layer import Adapted, AdaptedLayer
from adapterpack.torch_adapters.layers.modules_to_save import SavedModule
from adapterpack.torch_adapters.layers.wrapper import base_modules
from adapterpack.torch_adapters.model_base import _model_fingerprint
from adapterpack.torch_adapters.save import parts_of

pytestmark = pytest.mark.fast

IDS = torch.tensor([[5, 17, 40, 8, 61, 33, 7], [9, 9, 50, 2, 11, 72, 90]])


def causal(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def classifier(folder: Path, labels: int = 3) -> Any:
    torch.manual_seed(0)  # of the new head
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels).eval()


def with_head(folder: Path, out: Path) -> Path:
    """A checkpoint that holds a classifier's head, too."""
    classifier(folder).save_pretrained(out / "classifier")
    return out / "classifier"


def mlp(seed: int = 0) -> nn.Sequential:
    """Odd sizes; a bias and none."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5, bias=False))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def steps(model: nn.Module, loss: Callable[[], torch.Tensor], count: int = 2) -> None:
    """Steps of SGD on what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def modules_by_path(model: nn.Module) -> dict[str, int]:
    return {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}


def dense(model: nn.Module, x: torch.Tensor, names: list[str]) -> np.ndarray:
    """The adapted :func:`mlp` from its formula in float64: ``y = W x + b + sum_i s_i B_i A_i x`` at each
    linear layer, tanh between.
    """
    y = x.detach().numpy().astype(np.float64)
    for module in model.children():
        if isinstance(module, nn.Tanh):
            y = np.tanh(y)
            continue
        x64 = y
        y = x64 @ _float64(module.weight).T + (0 if module.bias is None else _float64(module.bias))
        for name in names:
            if name in getattr(module, "_held", {}):
                p = {key: value.astype(np.float64) for key, value in module._params(name).items()}
                y = y + module._held[name].config.scale * (x64 @ p["lora_A"].T @ p["lora_B"].T)
    return y


def _float64(value: torch.Tensor) -> np.ndarray:
    return value.detach().numpy().astype(np.float64)


# --- exactness


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(tiny_llama: Path, dtype: torch.dtype) -> None:
    """``logits(adapted at init) == logits(base)`` bit for bit, in every precision of the base; and so it is
    once the trained one is off.
    """
    model = causal(tiny_llama, dtype=dtype)
    before = logits(model)
    adapt(model, LoRA(r=3))
    assert torch.equal(logits(model), before)
    assert logits(model).dtype == dtype
    shake(model)
    assert (logits(model) - before).abs().max() > 0.01
    assert torch.equal(logits(active(model, None)), before)


def test_only_the_adapter_is_trained(tiny_llama: Path) -> None:
    """After two steps every parameter of the adapter has changed (A can only from the second on), and none of
    the base by a bit.
    """
    model = adapt(causal(tiny_llama), LoRA(r=3))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    steps(model, lambda: model(input_ids=IDS, labels=IDS).loss)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 2 * 14  # seven linear layers in each of two blocks


def test_detach_gives_back_the_same_objects(tiny_bert: Path, tmp_path: Path) -> None:
    """After ``adapt, train, detach`` the module tree holds the very objects of before, under the same paths,
    and gives the same bits.
    """
    model = classifier(with_head(tiny_bert, tmp_path))
    tree, before, keys = modules_by_path(model), logits(model), list(model.state_dict())
    adapt(model, LoRA(r=2, modules_to_save=("classifier",)), "a")
    adapt(model, LoRA(r=5, targets=("query", "intermediate.dense")), "b")
    shake(model)
    detach(model, "a")
    assert adapter_names(model) == ["b"]
    assert isinstance(model.classifier, nn.Linear)
    detach(model)
    assert modules_by_path(model) == tree
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("names", [["one"], ["two"], ["one", "two"], ["two", "one"], []])
def test_several_adapters_and_the_formula(names: list[str]) -> None:
    """Each alone, both, none: always ``W x + b + sum s B A x`` in float64. 1e-6: float32 sums of 11 terms of
    size 1.
    """
    model = mlp()
    shake(adapt(model, LoRA(r=3, alpha=5), "one"), 0.5)
    shake(adapt(model, LoRA(r=4, alpha=4, use_rslora=True, targets=("2",)), "two", seed=1), 0.5)
    x = torch.randn(6, 7)
    found = active(model, names)(x).detach().numpy()
    np.testing.assert_allclose(found, dense(model, x, names), atol=1e-6, rtol=1e-6)
    others = [
        dense(model, x, other) for other in ([], ["one"], ["two"], ["one", "two"]) if set(other) != set(names)
    ]
    assert all(np.abs(found - other).max() > 0.1 for other in others)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_base_in_float64_stays_in_float64(dropout: float) -> None:
    """The branch of a float64 base is computed in float64, with dropout and without: the formula within
    1e-12.
    """
    model = mlp().double()
    shake(adapt(model, LoRA(r=3, alpha=5, dropout=dropout)), 0.5)
    model.eval()[0].training = dropout > 0
    x = torch.randn(6, 7, dtype=torch.float64)
    if dropout:
        torch.manual_seed(3)
        y = model[0](x)
        torch.manual_seed(3)
        dropped = Dropout.draw(dropout).of(x)
        p = {key: value.astype(np.float64) for key, value in model[0]._params("default").items()}
        branch = dropped.numpy() @ p["lora_A"].T @ p["lora_B"].T * (5 / 3)
        expected = x.numpy() @ _float64(model[0].weight).T + _float64(model[0].bias) + branch
    else:
        y, expected = model(x), dense(model, x, ["default"])
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("labels", [("neg", "neu", "pos", "mixed", "none"), None])
def test_attach_gives_the_trained_model(
    tiny_bert: Path, tmp_path: Path, labels: tuple[str, ...] | None
) -> None:
    """``logits(attach(base, load(path))) == logits(trained)`` within 1e-6, with a head of five labels on a
    model of two; detach undoes.
    """
    trained = classifier(tiny_bert, 5)
    if labels:
        trained.config.id2label = dict(enumerate(labels))
    shake(adapt(trained, LoRA(r=3, modules_to_save=("classifier",)), "t"))
    written = save(trained, tmp_path / "t")
    known = labels or tuple(f"LABEL_{number}" for number in range(5))
    assert written.manifest.task.labels == known
    model = classifier(tiny_bert, 2)
    before = logits(model)
    attach(model, load(tmp_path / "t"))
    assert logits(model).shape == (2, 5)
    torch.testing.assert_close(logits(model), logits(trained), atol=1e-6, rtol=0)
    again = save(model, None)
    assert again.manifest.task.labels == known  # not those of the model that it is attached to
    assert {name: entry.sha256 for name, entry in again.manifest.tensors.items()} == {
        name: entry.sha256 for name, entry in written.manifest.tensors.items()
    }
    assert torch.equal(logits(detach(model)), before)


def test_attached_adapters_can_be_trained_on(tiny_llama: Path) -> None:
    """After attach only the pack's parameters require gradients: the base stays the base in further
    training.
    """
    pack = save(shake(adapt(causal(tiny_llama), LoRA(r=2), "p")), None)
    model = attach(causal(tiny_llama), pack)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


# --- paths and names


def test_a_second_adapter_finds_the_original_paths(tiny_bert: Path, tmp_path: Path) -> None:
    """``paths(adapt(adapt(model, a), b)) == paths(adapt(model, b))``, also where ``a`` trained the head whole
    and ``b`` adapts it.
    """
    base = with_head(tiny_bert, tmp_path)
    alone = adapt(classifier(base), LoRA(r=2), "b")
    both = adapt(adapt(classifier(base), LoRA(r=2, modules_to_save=("classifier",)), "a"), LoRA(r=2), "b")
    paths = [site.path for site in parts_of(alone, "b").adapters]
    assert "classifier" in paths
    assert [site.path for site in parts_of(both, "b").adapters] == paths
    assert [path for path, _ in base_modules(both)] == [
        path for path, _ in classifier(tiny_bert).named_modules()
    ]
    for model in (alone, both):
        shake(active(model, "b"), seed=5) if model is alone else None
    for site, (_, params) in parts_of(alone, "b").adapters.items():
        layer = dict(own_wrappers(both))[site.path]
        with torch.no_grad():
            for key, value in params.items():
                layer._part("b")[key].copy_(torch.from_numpy(value))
    assert torch.equal(logits(active(both, "b")), logits(alone))
    detach(both, "b")
    assert isinstance(both.classifier, SavedModule)
    assert isinstance(detach(both).classifier, nn.Linear)


def test_one_adapter_adapts_a_module_that_another_trains_whole(tiny_bert: Path) -> None:
    """In either order, on the same layer and on the one around it; the copy holds the module's own
    parameters, and detach undoes all.
    """
    for first in ("a", "b"):
        model = classifier(tiny_bert)
        tree, before = modules_by_path(model), logits(model)
        settings = {
            "a": LoRA(r=2, targets=("classifier", "intermediate.dense")),
            "b": LoRA(r=2, targets="query", modules_to_save=("classifier", "layer.1.intermediate")),
        }
        for name in (first, "b" if first == "a" else "a"):
            adapt(model, settings[name], name)
            assert torch.equal(logits(model), before)
        full = parts_of(model, "b").full
        assert {path: sorted(params) for path, params in full.items()} == {
            "classifier": ["bias", "weight"],
            "bert.encoder.layer.1.intermediate": ["dense.bias", "dense.weight"],
        }
        shake(model)
        changed = logits(model)
        assert not torch.equal(changed, before)
        assert torch.equal(logits(active(model, None)), before)
        assert torch.equal(logits(active(model, "b" if first == "a" else "a")), changed)
        assert modules_by_path(detach(model)) == tree
        assert torch.equal(logits(model), before)


def own_wrappers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    return [(module._site.path, module) for module in model.modules() if isinstance(module, AdaptedLayer)]


def test_the_output_embedding_is_left_out_every_time(tiny_llama: Path) -> None:
    """``all-linear`` never means the output embedding, not even when an earlier adapter sits on it."""
    model = adapt(adapt(causal(tiny_llama), LoRA(r=2, targets="lm_head"), "a"), LoRA(r=2), "b")
    assert [site.path for site in parts_of(model, "a").adapters] == ["lm_head"]
    assert "lm_head" not in [site.path for site in parts_of(model, "b").adapters]


@pytest.mark.parametrize("name", ["team.tickets-v1.2", "keys", "train", "active", "a%2eb"])
def test_any_name_will_do(tmp_path: Path, name: str) -> None:
    """Dots, words of torch's own dictionaries, and what looks like an escape: adapt, switch, train, detach
    under that name.
    """
    model = mlp()
    x = torch.randn(2, 7)
    before = model(x)
    adapt(adapt(model, LoRA(r=2), "a.b"), LoRA(r=2), name)
    shake(model)
    assert adapter_names(model) == sorted(["a.b", name])
    assert not torch.equal(model(x), before)
    assert torch.equal(active(model, "a.b")(x), before)  # untrained
    assert torch.equal(detach(model, name)(x), before)
    assert adapter_names(model) == ["a.b"]


def test_targets_are_names_or_the_ends_of_paths(tiny_llama: Path) -> None:
    """A name is matched by whole components; a full path names one module; the order is the model's."""

    def paths(targets: Any, **rest: Any) -> list[str]:
        return [
            site.path
            for site in parts_of(
                adapt(causal(tiny_llama), LoRA(r=1, targets=targets, **rest)), "default"
            ).adapters
        ]

    assert paths("v_proj") == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    assert paths(("mlp.up_proj", "model.layers.1.self_attn.q_proj")) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert len(paths("all-linear", modules_to_save=("layers.0.mlp.up_proj",))) == 13


# --- refusals: each a sentence, and the model stays as it was


def _tiny(request: pytest.FixtureRequest) -> Any:
    return classifier(request.getfixturevalue("tiny_bert"))


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda m, p: adapt(m, LoRA(targets="qery")), SiteNotFound, ["'qery'", "did you mean 'query'"]),
        (
            lambda m, p: adapt(m, LoRA(targets="LayerNorm")),
            Unsupported,
            ["bert.embeddings.LayerNorm", "found LayerNorm", "expected linear"],
        ),
        (
            lambda m, p: adapt(m, LoRA(targets="bert.encoder.layer.0")),
            Unsupported,
            ["bert.encoder.layer.0", "BertLayer"],
        ),
        (
            lambda m, p: adapt(m, LoRA(modules_to_save=("clasifier",))),
            SiteNotFound,
            ["'clasifier'", "did you mean 'classifier'"],
        ),
        (
            lambda m, p: adapt(m, LoRA(modules_to_save=("query",))),
            SiteNotFound,
            ["'query'", "bert.encoder.layer.1.attention.self.query", "whole path"],
        ),
        (
            lambda m, p: adapt(m, LoRA(targets=("classifier",), modules_to_save=("classifier",))),
            Unsupported,
            ["classifier", "not both"],
        ),
        (lambda m, p: adapt(m, LoRA(), "first"), AdapterpackError, ["first", "already"]),
        (lambda m, p: adapt(m, LoRA(), ""), AdapterpackError, ["needs a name"]),
        (lambda m, p: attach(m, p, "first"), AdapterpackError, ["first", "already"]),
        (attach, SiteNotFound, ["pack 'other'", "BertForSequenceClassification", "found 0"]),
        (lambda m, p: active(m, "frist"), UnknownAdapter, ["'frist'", "did you mean 'first'"]),
        (lambda m, p: active(m, ["first", "x"]), UnknownAdapter, ["'x'"]),
        (lambda m, p: detach(m, "frist"), UnknownAdapter, ["'frist'", "did you mean 'first'"]),
        (lambda m, p: save(m, None, adapter="frist"), UnknownAdapter, ["'frist'", "did you mean 'first'"]),
    ],
)
def test_what_is_refused(
    request: pytest.FixtureRequest,
    act: Callable[[Any, Any], Any],
    error: type[AdapterpackError],
    words: list[str],
) -> None:
    """The message names what is wrong, where, and the nearest right thing; tree, gradients and the active
    adapter are as before.
    """
    other = save(shake(adapt(mlp(), LoRA(r=2), "other")), None)
    model = adapt(_tiny(request), LoRA(r=2, targets="query"), "first")
    tree, trained = modules_by_path(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error) as caught:
        act(model, other)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert modules_by_path(model) == tree
    assert [p.requires_grad for p in model.parameters()] == trained
    assert {layer._active for _, layer in own_wrappers(model)} == {("first",)}


def test_a_pack_that_does_not_fit_leaves_nothing_behind() -> None:
    """The second layer of the pack has another width than the model's: refused, with the first layer as it
    was, adapted or not.
    """
    wide = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 6, bias=False))
    pack = save(shake(adapt(wide, LoRA(r=2), "wide")), None)
    model = adapt(mlp(), LoRA(r=2, targets="0"), "first")
    tree = modules_by_path(model)
    with pytest.raises(SiteNotFound, match=r"another shape.*at 2, out_features; expected 6, found 5"):
        attach(model, pack, check_base=False)
    assert modules_by_path(model) == tree
    assert adapter_names(model) == ["first"]


def test_a_bare_layer_is_refused() -> None:
    """A model that is itself the layer has no place where an adapter could be put."""
    with pytest.raises(Unsupported, match=r"nn\.Sequential"):
        adapt(nn.Linear(3, 2), LoRA())


# --- the base that a pack belongs to


def _llama(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_another_base_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    """Same shapes, other weights: BaseMismatch names both bases with their fingerprints; ``check_base=False``
    lets it pass.
    """
    pack = save(shake(adapt(causal(tiny_llama), LoRA(r=2), "p")), None)
    other = causal(_llama(tmp_path / "other-llama", 3))
    with pytest.raises(BaseMismatch) as caught:
        attach(other, pack)
    digests = [Checkpoint(folder).content[:17] for folder in (tiny_llama, tmp_path / "other-llama")]
    for word in ("'p'", "tiny-llama", "other-llama", *digests):
        assert word in str(caught.value)
    assert adapter_names(other) == []
    assert adapter_names(attach(other, pack, check_base=False)) == ["p"]


def test_a_plain_module_works_end_to_end(tmp_path: Path) -> None:
    """``nn.Sequential`` without a config: adapt, train, save, load, attach to an equal model; not to one with
    other weights or buffers.
    """

    def make(seed: int) -> nn.Sequential:
        return nn.Sequential(*mlp(seed), nn.BatchNorm1d(5))

    model, x, target = make(0), torch.randn(16, 7), torch.randn(16, 5)
    adapt(model.eval(), LoRA(r=2), "plain")

    def loss() -> torch.Tensor:
        return ((model.eval()(x) - target) ** 2).mean()

    first = loss().item()
    steps(model, loss, 30)
    assert loss().item() < 0.9 * first
    save(model, tmp_path / "plain")
    assert adapterpack.validate(tmp_path / "plain").valid
    twin = attach(make(0).eval(), load(tmp_path / "plain"))
    torch.testing.assert_close(twin(x), model.eval()(x), atol=1e-6, rtol=0)
    with pytest.raises(BaseMismatch, match=r"Sequential.*expected .*bfp1:.*found bfp1:"):
        attach(make(1), load(tmp_path / "plain"))
    moved = make(0)
    moved[3].running_mean += 1
    with pytest.raises(BaseMismatch):
        attach(moved, load(tmp_path / "plain"))


def test_a_model_in_memory_is_its_checkpoint(tiny_llama: Path, tiny_bert: Path) -> None:
    """The fingerprint of a model's own tensors is that of the checkpoint it would give: same names, dtypes,
    ties and bytes.
    """
    assert _model_fingerprint(causal(tiny_llama))[:2] == Checkpoint(tiny_llama).fingerprint()[:2]
    assert (
        _model_fingerprint(adapt(AutoModel.from_pretrained(tiny_bert), LoRA(r=2)))[:2]
        == Checkpoint(tiny_bert).fingerprint()[:2]
    )


# --- unusual models


def test_a_shared_layer_is_adapted_at_both_places() -> None:
    """``f(f(x))`` with one layer used twice: the adapter acts in both, and detach restores both."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    tree = modules_by_path(model)
    shake(adapt(model, LoRA(r=2)), 0.5)
    x = torch.randn(3, 4)
    np.testing.assert_allclose(model(x).detach(), dense_twice(model[0], x), atol=1e-6)
    assert modules_by_path(detach(model)) == tree


def dense_twice(layer: Any, x: torch.Tensor) -> np.ndarray:
    W = _float64(layer.weight) + layer._held["default"].config.scale * (
        layer._params("default")["lora_B"].astype(np.float64)
        @ layer._params("default")["lora_A"].astype(np.float64)
    )
    b = _float64(layer.bias)
    return np.tanh(_float64(x) @ W.T + b) @ W.T + b


def test_torch_encoder_layers_do_not_bypass_the_adapter() -> None:
    """``nn.TransformerEncoderLayer`` reads its weights in a fused path of its own in evaluation; with an
    adapter it must not. The output projection of its attention is never called, so it is refused.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(2, 5, 8)
    adapt(model, LoRA(r=2))
    assert [site.path for site in parts_of(model, "default").adapters] == ["0.linear1", "0.linear2"]
    shake(model, 0.5)
    with_gradients = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), with_gradients.detach(), atol=1e-5, rtol=0)
        assert not torch.allclose(active(model, None)(x), with_gradients, atol=1e-2)
    with pytest.raises(Unsupported, match=r"out_proj"):
        adapt(model, LoRA(targets="out_proj"), "other")


def test_an_embedding_can_be_trained_whole(tiny_bert: Path, tmp_path: Path) -> None:
    """A module that takes ids, trained whole: ids stay whole numbers, gradients reach it, the pack brings it
    back; also in bfloat16.
    """
    model = adapt(classifier(tiny_bert), LoRA(r=2, modules_to_save=("word_embeddings", "classifier")), "e")
    steps(model, lambda: model(input_ids=IDS, labels=torch.tensor([0, 2])).loss)
    embedding = model.bert.embeddings.word_embeddings
    used = torch.unique(IDS)
    moved = (embedding._part("e").weight - embedding._base.weight).abs().sum(1).nonzero().flatten()
    assert torch.equal(moved, used)
    save(model, tmp_path / "e")
    torch.testing.assert_close(
        logits(attach(classifier(tiny_bert), load(tmp_path / "e"))), logits(model), atol=1e-6, rtol=0
    )
    half = attach(
        AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype=torch.bfloat16),
        load(tmp_path / "e"),
    )
    assert logits(half).dtype == torch.bfloat16
    # logits of size 1, a hundred bf16 roundings
    torch.testing.assert_close(logits(half).float(), logits(model), atol=0.1, rtol=0)


def test_a_copy_of_an_adapted_model_is_independent(tiny_llama: Path) -> None:
    """``deepcopy`` gives a model with adapters of its own."""
    model = adapt(causal(tiny_llama), LoRA(r=2))
    before = logits(model)
    twin = shake(copy.deepcopy(model))
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    assert adapter_names(detach(twin)) == []
    assert adapter_names(model) == ["default"]


def test_what_a_layer_says_of_itself_can_still_be_read() -> None:
    """Models look at ``weight``, ``in_features`` and the like of their layers."""
    model = adapt(mlp(), LoRA(r=2, targets="0", modules_to_save=("2",)))
    assert (model[0].in_features, model[0].out_features, model[2].out_features) == (7, 11, 5)
    assert model[2].weight.shape == (5, 11)
    with pytest.raises(AttributeError):
        model[0].no_such_thing  # noqa: B018


def test_a_method_that_reads_the_weight_is_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trait ``reads_weight``: ``init`` and ``attach`` see the base weight; here y = base(x) + x (0.5 W)^T =
    1.5 W x + b.
    """

    def _attach(cfg: Any, params: Any, site: Site) -> NormalForm:
        assert site.weight is not None
        return NormalForm(down=Dense(params["g"] * site.weight), up=Dense(torch.eye(site.out_features)))

    @dataclasses.dataclass(frozen=True)
    class Half(LoRA):
        pass

    def _init(cfg: Any, site: Site, rng: Any) -> dict[str, np.ndarray]:
        assert site.weight is not None and site.weight.shape == (site.out_features, site.in_features)
        return {"g": np.full((1, 1), 0.5, np.float32)}

    half = Method(
        "half",
        "",
        "",
        Half,
        Traits(
            additive=False, identity_at_init=False, row_separable=False, low_rank=False, reads_weight=True
        ),
        lambda cfg, site: {"g": (1, 1)},
        _init,
        _attach,
        (),
    )
    monkeypatch.setitem(registry.METHODS._values, "half", half)
    model, x = mlp(), torch.randn(4, 7)
    adapt(model, Half(targets="0"))
    expected = 1.5 * (_float64(x) @ _float64(model[0].weight).T) + _float64(model[0].bias)
    np.testing.assert_allclose(model[0](x).detach(), expected, atol=1e-6)


# --- kernels, precision, dropout, checkpointing, generation


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,), (0, 7)])
@pytest.mark.parametrize("wants", [(True, True), (False, False), (True, False)])
def test_the_kernel_has_the_right_gradients(shape: tuple[int, ...], wants: tuple[bool, bool]) -> None:
    """``d (y + x A^T B^T)`` against finite differences in float64, first and second order; with and without
    gradients for y and x.
    """
    torch.manual_seed(0)
    y = torch.randn((*shape[:-1], 4), dtype=torch.float64, requires_grad=wants[0])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=wants[1])
    A, B = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 7), (4, 3)))

    def f(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return add_low_rank(NormalForm(down=Dense(A), up=Dense(B)), y, x)

    before = y.detach().clone()
    torch.testing.assert_close(
        f(y, x, A, B), y + torch.einsum("...i,ri,or->...o", x, A, B), atol=1e-12, rtol=1e-12
    )
    assert torch.equal(y, before)
    assert torch.autograd.gradcheck(f, (y, x, A, B))
    if x.numel():
        assert torch.autograd.gradgradcheck(f, (y, x, A, B))
    with torch.no_grad():
        frozen = [value.detach() for value in (A, B)]
    out = f(y, x, *frozen)
    assert out.requires_grad == any(wants)


def test_the_kernel_equals_the_generic_path() -> None:
    """Value and all gradients of the kernel and of :func:`evaluate` on the same float64 numbers, within 1e-10
    of sums of cubes.
    """
    results = []
    for quick in (True, False):
        generator = torch.Generator().manual_seed(2)
        sizes = ((2, 5, 7), (3, 7), (4, 3), (4, 7))
        x, A, B, W = (
            torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_() for size in sizes
        )
        form = NormalForm(down=Dense(A), up=Dense(B))
        y = add_low_rank(form, x @ W.T, x) if quick else evaluate(form, lambda value, W=W: value @ W.T, x)
        (y**3).sum().backward()
        results.append([y.detach(), x.grad, A.grad, B.grad, W.grad])
    for ours, generic in zip(*results, strict=True):
        torch.testing.assert_close(ours, generic, atol=1e-10, rtol=1e-12)


def test_only_a_dense_low_rank_branch_takes_the_kernel() -> None:
    """A changed input or a structured factor means the generic path; the kernel gives what the generic path
    gives.
    """
    A, B = torch.randn(2, 3), torch.randn(4, 2)
    y, x = torch.randn(5, 4), torch.randn(5, 3)
    scale, shift = torch.randn(4), torch.randn(4)
    for other in ({}, {"output_scale": scale}, {"shift": shift}, {"output_scale": scale[:1], "shift": shift}):
        form = NormalForm(down=Dense(A), up=Dense(B), **other)
        assert is_low_rank(form)
        expected = (y.double() + x.double() @ A.double().T @ B.double().T) * other.get(
            "output_scale", 1
        ) + other.get("shift", 0)
        torch.testing.assert_close(add_low_rank(form, y, x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not is_low_rank(NormalForm(down=Dense(A), up=Dense(B), pre=Dense(torch.eye(3))))
    assert not is_low_rank(NormalForm(output_scale=torch.ones(4)))
    assert not is_low_rank(NormalForm(down=Dense(A), up=Diagonal(torch.ones(2))))


def test_a_half_precision_base_keeps_its_inputs_as_they_are() -> None:
    """On a bfloat16 base the kernel keeps the very input for the backward pass, not a float32 copy; gradients
    have the right dtypes.
    """
    model = adapt(nn.Sequential(nn.Linear(6, 9)).bfloat16(), LoRA(r=2))
    shake(model)
    kept: list[torch.Tensor] = []
    x = torch.randn(3, 6, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value) or value, lambda value: value
    ):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert {value.dtype for value in kept if value.shape == x.shape} == {torch.bfloat16}
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    grads = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    p = {key: torch.from_numpy(value).double() for key, value in model[0]._params("default").items()}
    inner = x.detach().double().sum(0)  # d sum(y) / dA = s B^T 1 (sum x)^T
    expected = 2.0 * p["lora_B"].sum(0)[:, None] * inner[None, :]
    found = next(grad for name, grad in grads.items() if "lora_A" in name)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_autocast_trains_and_is_close(tiny_bert: Path) -> None:
    """bfloat16 autocast on the CPU: no dtype error, not even with adapted queries alone; logits near
    float32's; the loss falls.
    """
    for targets in ("all-linear", "query"):
        model = adapt(classifier(tiny_bert), LoRA(r=3, targets=targets, modules_to_save=("classifier",)))
        shake(model, 0.05)
        exact = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            query = model.bert.encoder.layer[0].attention.self.query
            hidden = torch.randn(2, 24)
            # as its neighbours k and v
            assert query(hidden).dtype == query._base(hidden).dtype == torch.bfloat16
            rough = logits(model)
        assert 0 < (rough.float() - exact).abs().max() < 0.05 * exact.abs().max().clamp(min=1)

        def loss(model: Any = model) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(input_ids=IDS, labels=torch.tensor([0, 2])).loss

        first = loss().item()
        steps(model, loss, 6)
        assert loss().item() < first


def test_dropout_only_while_training() -> None:
    """In evaluation dropout is off: the formula holds. In training E[y] is the formula's value: 4000 draws, 5
    standard errors.
    """
    model = shake(adapt(mlp(), LoRA(r=3, dropout=0.4, targets="2")), 0.5)
    x = torch.randn(3, 7)
    np.testing.assert_allclose(model.eval()(x).detach(), dense(model, x, ["default"]), atol=1e-6)
    layer, inner = model.train()[2], torch.randn(11)
    torch.manual_seed(0)
    draws = layer(inner.expand(4000, 11)).detach().double()
    expected = layer.eval()(inner).detach().double()
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / 4000**0.5).all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", ["adapt", "checkpointing"])
def test_gradients_pass_checkpoints(tiny_llama: Path, reentrant: bool, first: str) -> None:
    """The gradient of every adapter parameter with checkpointing equals the one without, within 1e-6;
    whichever was switched on first.
    """
    grads = []
    for checkpointing in (False, True):
        model = causal(tiny_llama)
        for step in (first, "checkpointing" if first == "adapt" else "adapt"):
            if step == "adapt":
                shake(adapt(model, LoRA(r=2)))
            elif checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert len(grads[0]) == 28
    for name, plain in grads[0].items():
        assert plain.abs().max() > 0
        torch.testing.assert_close(grads[1][name], plain, atol=1e-6, rtol=1e-5)


def test_generate_on_an_adapted_model(tiny_llama: Path) -> None:
    """``generate`` with its cache gives the greedy tokens of whole forward passes, with the adapter; other
    ones than the base.
    """
    model = shake(adapt(causal(tiny_llama), LoRA(r=3)), 0.3)
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    found = model.eval().generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **settings)
    ids = IDS[:1]
    for _ in range(8):
        ids = torch.cat([ids, logits(model, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    assert not torch.equal(
        active(model, None).generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **settings), ids
    )


# --- PEFT


@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_gradients_are_pefts(tiny_llama: Path, tmp_path: Path, rslora: bool) -> None:
    """The same tensors in PEFT and, through its saved folder, in us: logits, loss and the gradients of every
    A and B agree.

    Within 2e-6 for logits of about 0.2 after two layers of float32 whose products are taken in another order;
    1e-6 for what is averaged.
    """
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(causal(tiny_llama), config)
    theirs.save_pretrained(tmp_path / "peft")
    ours = attach(causal(tiny_llama), load(tmp_path / "peft", name="p"))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-6, rtol=1e-6)
    losses = []
    for model in (ours, theirs):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - losses[1]) <= 1e-6
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): value.grad
        for name, value in theirs.named_parameters()
        if "lora_" in name
    }
    found = {
        f"{path}.{key}": value.grad
        for path, layer in own_wrappers(ours)
        for key, value in layer._part("p").items()
    }
    assert found.keys() == expected.keys()
    assert len(found) == 28
    for name, grad in expected.items():
        assert grad.abs().max() > 1e-4
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5, msg=name)


# --- canary


@pytest.fixture
def packed(tiny_llama: Path) -> adapterpack.Pack:
    return save(shake(adapt(causal(tiny_llama), LoRA(r=3), "p"), 0.05), None)


def test_the_canary_holds_on_the_same_model(tiny_llama: Path, packed: adapterpack.Pack) -> None:
    """Recorded and replayed logits are equal within 1e-6; the model is left in its mode and with its active
    adapters.
    """
    model = attach(adapt(causal(tiny_llama), LoRA(r=1), "other"), packed)
    active(model, ["other", "p"])
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert verify_canary(model, packed) <= 1e-6
    assert [module.training for module in model.modules()] == modes
    assert model.model.layers[0].mlp.up_proj._active == ("other", "p")


def test_the_canary_records_last_position_logits(tiny_llama: Path, packed: adapterpack.Pack) -> None:
    """Its rows are the eight largest logits at the last position of the stated ids, without and with the
    adapter.
    """
    recorded = packed.manifest.canary
    assert recorded is not None
    base, adapted = causal(tiny_llama), attach(causal(tiny_llama), packed)
    for model, rows in ((base, recorded.base), (adapted, recorded.adapter)):
        for ids, row in zip(recorded.input_ids, rows, strict=True):
            values, order = logits(model, torch.tensor([ids]))[0, -1].sort(descending=True)
            assert row["ids"] == order[:8].tolist()
            np.testing.assert_allclose(row["logits"], values[:8].numpy(), atol=1e-6)


def test_the_canary_sees_another_base(packed: adapterpack.Pack, tmp_path: Path) -> None:
    """Other weights of the same shape under the adapter: BaseMismatch."""
    model = attach(causal(_llama(tmp_path / "other", 4)), packed, check_base=False)
    with pytest.raises(BaseMismatch, match="not the base"):
        verify_canary(model, packed)


@torch.no_grad()
def test_the_canary_sees_an_adapter_without_effect(tiny_llama: Path, packed: adapterpack.Pack) -> None:
    """All B zero: NothingToDo, not a success."""
    model = attach(causal(tiny_llama), packed)
    for _, layer in own_wrappers(model):
        layer._part("p")["lora_B"].zero_()
    with pytest.raises(NothingToDo, match="no effect"):
        verify_canary(model, packed)


@torch.no_grad()
def test_a_weak_adapter_has_a_canary_too(tiny_llama: Path) -> None:
    """An adapter that moves logits by less than a thousandth of their size: that it is missing is still
    seen.
    """
    pack = save(shake(adapt(causal(tiny_llama), LoRA(r=3), "weak"), 5e-5), None)
    model = attach(causal(tiny_llama), pack)
    before = logits(active(model, None))
    effect = (logits(active(model, "weak")) - before).abs().max() / before.abs().max()
    assert 1e-5 < effect < 1e-3
    assert verify_canary(model, pack) <= 1e-6
    for _, layer in own_wrappers(model):
        layer._part("weak")["lora_B"].zero_()
    with pytest.raises(NothingToDo):
        verify_canary(model, pack)


@torch.no_grad()
@pytest.mark.parametrize("value", [0.03, float("nan")])
def test_the_canary_sees_a_changed_adapter(tiny_llama: Path, packed: adapterpack.Pack, value: float) -> None:
    """B a little off, or a NaN in it: ParityError."""
    model = attach(causal(tiny_llama), packed)
    for _, layer in own_wrappers(model):
        layer._part("p")["lora_B"].add_(value)
    with pytest.raises(ParityError):
        verify_canary(model, packed)


def test_the_canary_check_looks_at_every_row() -> None:
    """A NaN in any one row, a row too few, an infinite record: none is lost in a maximum."""
    rows = [np.arange(12, dtype=np.float32), np.arange(12, 0, -1, dtype=np.float32)]
    recorded = canary.record(Canary(((1, 2), (3,)), (), (), 0.0), rows, [row * 2 for row in rows])
    assert canary.check(recorded, rows, [row * 2 for row in rows], "here") == 0
    for broken in (0, 1):
        adapted = [row * 2 for row in rows]
        adapted[broken] = np.full(12, np.nan, np.float32)
        with pytest.raises(ParityError):
            canary.check(recorded, rows, adapted, "here")
    with pytest.raises(ValueError, match="zip"):
        canary.check(recorded, rows, [rows[0] * 2], "here")
    with pytest.raises(BaseMismatch):
        canary.check(recorded, [row[:4] for row in rows], [row[:4] for row in rows], "here")
    with pytest.raises(NonFinite):
        canary.record(Canary(((1,),), (), (), 0.0), [rows[0]], [np.full(12, np.inf, np.float32)])


def test_a_canary_in_half_precision(tiny_llama: Path, packed: adapterpack.Pack, tmp_path: Path) -> None:
    """A float32 canary holds on the same base in bfloat16, and still sees another base."""
    error = verify_canary(attach(causal(tiny_llama, dtype=torch.bfloat16), packed), packed)
    assert error > 1e-4
    other = attach(causal(_llama(tmp_path / "other", 4), dtype=torch.bfloat16), packed, check_base=False)
    with pytest.raises(BaseMismatch):
        verify_canary(other, packed)


def test_no_canary_and_no_adapter(tiny_llama: Path, packed: adapterpack.Pack) -> None:
    """A pack without a canary, and a pack that is not attached, are errors of their own."""
    plain = save(shake(adapt(mlp(), LoRA(r=2), "plain")), None)
    with pytest.raises(NothingToDo, match="no canary"):
        verify_canary(attach(mlp(), plain), plain)
    with pytest.raises(UnknownAdapter):
        verify_canary(causal(tiny_llama), packed)


def test_what_save_refuses(tiny_llama: Path, tmp_path: Path) -> None:
    """Several adapters and none named; a taken folder; NaN in a tensor; finite tensors whose product is not:
    nothing is written.
    """
    model = adapt(adapt(causal(tiny_llama), LoRA(r=1), "a"), LoRA(r=1), "b")
    with pytest.raises(AdapterpackError, match="a, b"):
        save(model, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(AdapterpackError, match="already exists"):
        save(model, tmp_path / "taken", adapter="a")
    for value in (float("nan"), 1e30):
        with torch.no_grad():
            for _, layer in own_wrappers(model):
                layer._part("b")["lora_B"].fill_(value)
        with pytest.raises(NonFinite):
            save(model, tmp_path / "out", adapter="b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_pack_whose_head_has_other_parameters(tiny_bert: Path) -> None:
    """A parameter that the module of that path does not have is an error that names it, not an attribute
    more.
    """
    pack = save(shake(adapt(classifier(tiny_bert), LoRA(r=1, modules_to_save=("classifier",)), "c")), None)
    model = classifier(tiny_bert)
    model.classifier = nn.Linear(24, 3, bias=False)
    with pytest.raises(SiteNotFound, match="bias"):
        attach(model, pack, check_base=False)
    assert adapter_names(model) == []


def test_a_head_that_no_file_holds_is_trained_whole(
    tiny_bert: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """DistilBERT's class adds two modules to its base, BERT's one. Each load draws others, so an adapter of
    them would be lost: with ``all-linear`` they are trained whole, and the pack works on a fresh model; where
    one is named as a target, ``save`` refuses.
    """
    torch.manual_seed(3)
    DistilBertModel(
        DistilBertConfig(vocab_size=96, dim=24, n_layers=1, n_heads=3, hidden_dim=40)
    ).save_pretrained(tmp_path / "distil")
    for base, heads in ((tiny_bert, ["classifier"]), (tmp_path / "distil", ["classifier", "pre_classifier"])):
        model = shake(adapt(classifier(base), LoRA(r=2), "one"))
        pack = save(model, tmp_path / f"{base.name}-pack")
        assert sorted(pack.full()) == heads
        torch.manual_seed(1)
        fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
        assert torch.equal(logits(attach(fresh, load(tmp_path / f"{base.name}-pack"))), logits(model))
        named = adapt(classifier(base), LoRA(r=2, targets=("classifier",)), "two")
        with pytest.raises(SiteNotFound, match=r"does not hold.*modules_to_save"):
            save(named, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # its head is tied, and the checkpoint holds it once
    assert not parts_of(adapt(causal(tiny_llama), LoRA(r=2)), "default").full


def test_a_checkpoint_holds_the_adapter_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """What trainers write of an adapted model: its adapters, which load back, and no configuration by which
    somebody could take it for a model; without adapters the model is saved as ever.
    """
    model = shake(adapt(causal(tiny_llama), LoRA(r=2), "one"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "checkpoint", state_dict=None)
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["model.safetensors"]
    assert sum(value.numel() for value in tensors.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    again = adapt(causal(tiny_llama), LoRA(r=2), "one", seed=9)
    found = again.load_state_dict(tensors, strict=False)
    assert not found.unexpected_keys
    assert torch.equal(logits(again), expected)
    copy.deepcopy(again).save_pretrained(tmp_path / "copy")
    detach(model).save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(causal(tmp_path / "whole")), logits(causal(tiny_llama)))


def test_experts_are_taken_by_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Fused or one by one, alone and with all linear layers; what chooses among them never is, and what is
    left is said.
    """
    torch.manual_seed(0)
    common = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    }

    def paths(model: nn.Module, targets: Any) -> set[str]:
        adapt(model, LoRA(r=2, targets=targets))
        return {
            module._site.path.removeprefix("model.layers.0.")
            for module in model.modules()
            if isinstance(module, Adapted)
        }

    def mixtral() -> nn.Module:
        return MixtralForCausalLM(MixtralConfig(**common, num_local_experts=3, num_experts_per_tok=2))

    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    fused = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    with caplog.at_level(logging.INFO):
        assert paths(mixtral(), "all-linear") == attention
    assert (
        "all-linear takes 4 layers and leaves experts.down_proj (1), experts.gate_up_proj (1), "
        "gate.weight (1)"
    ) in caplog.text
    assert paths(mixtral(), "all-experts") == fused
    model = mixtral()
    assert paths(model, ("all-linear", "all-experts")) == attention | fused
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.mix = nn.Linear(4, 3), nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    assert paths(nn.Sequential(One()), "all-experts") == {"0.experts.0", "0.experts.1", "0.experts.2"}
    assert paths(nn.Sequential(One()), "all-linear") == {"0.mix", "0.experts.0", "0.experts.1", "0.experts.2"}
    assert paths(nn.Sequential(One()), ("all-linear", "gate")) == {
        "0.gate",
        "0.mix",
        "0.experts.0",
        "0.experts.1",
        "0.experts.2",
    }


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


LAYERS = LoRA(r=2, targets=("0",)), LoRA(r=3, targets=("1",))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: adapt(two_layers(), LoRA(r=2, targets=())), ConfigError, "would change no layer"),
        (lambda: adapt(two_layers(), []), ConfigError, "needs the configuration of a method"),
        (lambda: adapt(two_layers(), "lora"), ConfigError, "needs the configuration of a method"),
        (
            lambda: adapt(two_layers(), LoRA(r=2), 5),
            AdapterpackError,
            "needs a name .*expected a text, found 5",
        ),
        (lambda: adapt(two_layers(), LAYERS), Unsupported, "has each of its methods once .*lora twice"),
        (lambda: LoRA(targets=5), ValueError, "targets must be names of modules, not 5"),
        (lambda: LoRA(targets=["0", 3]), ValueError, "targets must be names of modules"),
        (lambda: active(adapt(two_layers(), LoRA(r=2)), 5), UnknownAdapter, "no such adapter .*found 5"),
        (lambda: merge_into(adapt(two_layers(), LoRA(r=2)), 5), UnknownAdapter, "no such adapter .*found 5"),
        (lambda: detach(adapt(two_layers(), LoRA(r=2)), 5), UnknownAdapter, "no such adapter .*found 5"),
    ],
)
def test_what_is_no_target_method_or_name_is_said_to_be_none(
    call: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        call()
    assert type(raised.value) is error


def test_one_module_to_save_may_be_a_text() -> None:
    assert LoRA(modules_to_save="classifier", targets=["q", "v"]) == LoRA(
        modules_to_save=("classifier",), targets=("q", "v")
    )
