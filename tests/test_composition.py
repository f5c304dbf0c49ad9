"""Composition at run time: every kind of node against its formula in float64; torch, merge, ONNX Runtime;
Arrow and X-LoRA against PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_export import BATCHES, assert_close, batch_of
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import adapterpack
from adapterpack import (
    IA3,
    OFT,
    Bottleneck,
    DoRA,
    LoRA,
    Session,
    attach,
    compose,
    detach,
    export,
    load,
    merge,
    save,
)
from adapterpack.adapter_methods import Site, complete, evaluate, fold, get, method_of, run
from adapterpack.adapter_methods.nodes import NODES, as_text, decode, encode
from adapterpack.adapter_methods.nodes.arrow import prototype
from adapterpack.cli.commands.compose import command
from adapterpack.composing.tree_syntax import parse
from adapterpack.errors import AdapterpackError, ConfigError, FormatError, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.slots.values import pack_values
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.loop.trainer import AdapterTrainer

Make = Callable[..., Any]
IN, OUT = 11, 7
FOLDING = [text for kind in NODES.values() if not kind.routes for text in kind.examples]
ROUTING = [text for name in ("arrow", "gate", "fuse") for text in NODES[name].examples]
MIXED = ["stack(a, i, o)", "parallel(stack(i, a), o)", "sum(0.5*i, -0.25*stack(o, d), b)"]
"""Trees over members that are not additive: IA3 ``i``, OFT ``o`` and DoRA ``d``."""


def member(
    name: str, config: Any, seed: int, sites: tuple[str, ...] = ("net.q",), shape: tuple[int, int] = (OUT, IN)
) -> Pack:
    """A pack of random values in float64."""
    rng, method, adapters = np.random.default_rng(seed), method_of(config), {}
    for path in sites:
        site = Site(path, shape[1], shape[0], bias=True, weight=rng.standard_normal(shape))
        start = method.init(config, site, rng)
        values = {key: rng.standard_normal(value.shape) for key, value in start.items()}
        adapters[Site(path, shape[1], shape[0], bias=True)] = config, values
    return build(name, method, adapters, task=m.PackTask("text-generation"), base=m.Base("org/base"))


def members() -> dict[str, Pack]:
    """Mixed ranks and scales, rsLoRA, and three that are not additive."""
    return {
        "a": member("a", LoRA(r=3, alpha=5), 1),
        "b": member("b", LoRA(r=1, alpha=2, use_rslora=True), 2),
        "c": member("c", LoRA(r=4), 3),
        "i": member("i", IA3(), 4),
        "o": member("o", OFT(block_size=11), 5),
        "d": member("d", DoRA(r=2), 6),
    }


def tree_pack(text: str, known: dict[str, Pack] | None = None, **options: Any) -> Pack:
    known = known or members()
    names = [name for name in known if name in json.dumps(encode(parse(text))).replace('"', " ").split()]
    return compose([known[name] for name in names], tree=text, **options)


def delta(pack: Pack) -> np.ndarray:
    """``s B A`` of a LoRA, from its tensors."""
    (adapter,) = pack.adapters()
    scale = adapter.config.alpha / (adapter.config.r**0.5 if adapter.config.use_rslora else adapter.config.r)
    product: np.ndarray = scale * adapter.params["lora_B"] @ adapter.params["lora_A"]
    return product


class Formula:
    """The nodes, written out with dense matrices in float64: the change of one layer at each token, from a
    tree's JSON.
    """

    def __init__(self, known: dict[str, Pack], weight: np.ndarray, bias: np.ndarray, own: Any = None) -> None:
        self.known, self.weight, self.bias, self.own = known, weight, bias, own

    def layer(
        self, tree: dict[str, Any], base: Callable[[np.ndarray], np.ndarray]
    ) -> Callable[[np.ndarray], np.ndarray]:
        if "member" in tree:
            return self.leaf(tree["member"], base)
        below = [self.layer(child, base) for child in tree["of"]]
        if tree["kind"] == "stack":
            made = base
            for child in tree["of"]:
                made = self.layer(child, made)
            return made
        if tree["kind"] in {"sum", "parallel"}:
            weights = (
                [1 / len(below)] * len(below)
                if tree["kind"] == "parallel"
                else tree["weights"] or [1.0] * len(below)
            )
            return lambda x: base(x) + sum(w * (f(x) - base(x)) for w, f in zip(weights, below, strict=True))
        changes = [self.dense(child) for child in tree["of"]]
        if tree["kind"] == "fuse":
            Q, K = (
                next(value for key, value in self.own.items() if key.endswith(end))
                for end in ("/query", "/key")
            )
            answers = lambda x: np.stack(  # noqa: E731
                [((x @ Q.T) * (x @ change.T @ K.T)).sum(axis=-1) for change in changes], axis=-1
            )
            return lambda x: base(x) + self.mixed(answers(x), changes, x, tree["top_k"])
        if tree["kind"] == "arrow":
            vectors = np.stack([np.linalg.svd(change)[2][0] for change in changes])
            scores = lambda x: np.abs(x @ vectors.T) / tree["temperature"]  # noqa: E731
        else:
            # a gate that is not trained
            scores = lambda x: np.zeros((*x.shape[:-1], len(changes)))  # noqa: E731
        return lambda x: base(x) + self.mixed(scores(x), changes, x, tree["top_k"])

    @staticmethod
    def mixed(scores: np.ndarray, changes: list[np.ndarray], x: np.ndarray, top_k: int) -> np.ndarray:
        """The loop over tokens that a router stands for; among equal scores all count."""
        result = np.zeros((*x.shape[:-1], len(changes[0])))
        for place in np.ndindex(x.shape[:-1]):
            least = sorted(scores[place])[-min(top_k or len(changes), len(changes))]
            powers = np.array(
                [np.exp(score - max(scores[place])) if score >= least else 0.0 for score in scores[place]]
            )
            result[place] = sum(
                power / powers.sum() * (change @ x[place])
                for power, change in zip(powers, changes, strict=True)
            )
        return result

    def dense(self, tree: dict[str, Any]) -> np.ndarray:
        """The change of a foldable subtree."""
        zero = lambda x: np.zeros((*x.shape[:-1], OUT))  # noqa: E731
        return self.layer(tree, zero)(np.eye(IN)).T

    def leaf(self, name: str, base: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        pack = self.known[name]
        if pack.method.name == "lora":
            return lambda x: base(x) + x @ delta(pack).T
        (adapter,) = pack.adapters()
        site = Site("net.q", IN, OUT, bias=True, weight=self.weight, base_bias=self.bias)
        params = complete(pack.method, adapter.config, adapter.params, site)
        return lambda x: run(pack.method, adapter.config, params, site, base, x)


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((OUT, IN)), rng.standard_normal(OUT), rng.standard_normal((2, 5, IN))


def evaluated(pack: Pack, weight: np.ndarray, bias: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What the composed method's own functions give, in float64."""
    (adapter,) = pack.adapters()
    site = Site("net.q", IN, OUT, bias=True, weight=weight, base_bias=bias)
    params = complete(pack.method, adapter.config, adapter.params, site)
    found: np.ndarray = run(
        pack.method, adapter.config, params, site, lambda value: value @ weight.T + bias, x
    )
    return found


@pytest.mark.fast
@pytest.mark.parametrize("text", [*FOLDING, *ROUTING, *MIXED])
def test_a_tree_is_its_formula(text: str, layer: Any) -> None:
    """run(x) of the composed method == the formula with dense matrices, both in float64, to 1e-5 of the
    largest entry: members are stored as float32, and so are Arrow's directions.
    """
    weight, bias, x = layer
    known = members()
    pack = tree_pack(text, known)
    if "fuse" in text:  # attention that does something
        pack = _trained_gates(pack)
    formula = Formula(known, weight, bias, next(iter(pack.adapters())).params)
    wanted = formula.layer(dict(pack.manifest.composition.tree), lambda value: value @ weight.T + bias)(x)
    found = evaluated(pack, weight, bias, x)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(found - (x @ weight.T + bias)).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.fast
@pytest.mark.parametrize("text", [*FOLDING, *MIXED])
@pytest.mark.parametrize("rows", [slice(0, OUT), slice(2, 5)])
def test_folding_a_tree_is_running_it(text: str, rows: slice, layer: Any) -> None:
    """x W'^T + b' == run(x), for the whole weight and, where rows stand alone, for a block of it."""
    weight, bias, x = layer
    pack = tree_pack(text)
    if rows != slice(0, OUT) and not pack.method.traits.row_separable:
        rows = slice(0, OUT)
    (adapter,) = pack.adapters()
    site = Site("net.q", IN, OUT, bias=True, weight=weight, base_bias=bias)
    params = complete(pack.method, adapter.config, adapter.params, site)
    folded, moved = fold(pack.method, adapter.config, params, site, weight[rows], bias[rows], rows)
    wanted = evaluated(pack, weight, bias, x)
    np.testing.assert_allclose(
        x @ folded.T + moved, wanted[..., rows], atol=1e-12 * np.abs(wanted).max() * 100
    )
    form = pack.method.normal_form(adapter.config, params, site)
    np.testing.assert_allclose(
        evaluate(form, lambda value: value @ weight.T + bias, x), wanted, atol=1e-10 * np.abs(wanted).max()
    )


@pytest.mark.fast
def test_rows_and_positions_go_to_their_members(layer: Any) -> None:
    """batch_split: row 0 is a's, rows 1 and 2 are b's; split: positions 0 to 2 are a's, the rest b's, also
    beyond what was said.
    """
    weight, bias, _ = layer
    known = members()
    x = np.random.default_rng(4).standard_normal((3, 8, IN))
    base = x @ weight.T + bias
    one, two = base + x @ delta(known["a"]).T, base + x @ delta(known["b"]).T
    rows = evaluated(tree_pack("batch_split(a, b, sizes=1:2)", known), weight, bias, x)
    np.testing.assert_allclose(rows, np.concatenate([one[:1], two[1:]]), rtol=1e-5, atol=1e-5)
    places = evaluated(tree_pack("split(a, b, sizes=3:4)", known), weight, bias, x)
    np.testing.assert_allclose(places, np.concatenate([one[:, :3], two[:, 3:]], axis=1), rtol=1e-5, atol=1e-5)
    with pytest.raises(Unsupported, match="another number of rows"):
        evaluated(tree_pack("batch_split(a, b, sizes=1:1)", known), weight, bias, x)


@pytest.mark.fast
def test_a_prototype_is_the_direction_of_the_largest_change() -> None:
    """|v| = 1 and |D v| = |D|_2, from the factors; of odd ranks, a rank above the width, and of no change at
    all.
    """
    rng = np.random.default_rng(3)
    for rank in (1, 4, 13):
        down, up = rng.standard_normal((rank, 9)), rng.standard_normal((6, rank))
        vector = prototype(down, up)
        found = [np.linalg.norm(vector), np.linalg.norm(up @ (down @ vector))]
        np.testing.assert_allclose(found, [1, np.linalg.norm(up @ down, 2)], rtol=1e-12)
    assert not prototype(np.ones((2, 9)), np.zeros((6, 2))).any()


@pytest.mark.fast
def test_an_expert_that_a_layer_lacks_has_no_part_there(tmp_path: Path) -> None:
    """At a site with one of two experts Arrow is that expert alone, and the pack survives the disk with equal
    bytes and directions.
    """
    a, b = member("a", LoRA(r=2), 1, ("net.q", "net.v")), member("b", LoRA(r=3), 2)
    pack = compose([a, b], tree="arrow(a, b, top_k=1)", out=tmp_path / "routed")
    again = load(tmp_path / "routed")
    assert (
        again.id == pack.id
        and again.manifest.must_understand == ("composition",)
        and again.manifest.method.type == "composed"
    )
    assert {
        group.path: sorted(group.config.get("members", pack.manifest.config["members"]))
        for group in again.manifest.groups
    } == {"net.q": ["a", "b"], "net.v": ["a"]}
    x = np.random.default_rng(0).standard_normal((4, IN))
    alone = next(adapter for adapter in again.adapters() if adapter.site.path == "net.v")
    found = run(again.method, alone.config, alone.params, alone.site, lambda value: np.zeros((4, OUT)), x)
    own = next(adapter for adapter in a.adapters() if adapter.site.path == "net.v")
    np.testing.assert_allclose(
        found, x @ (2 * own.params["lora_B"] @ own.params["lora_A"]).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.fast
def test_an_older_reader_refuses_a_composed_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 1.1 understood of must_understand was int8."""
    compose([member("a", LoRA(r=2), 1)], tree="sum(0.5*a)", out=tmp_path / "half")
    monkeypatch.setattr(m, "FEATURES", frozenset({"int8"}))
    with pytest.raises(FormatError, match="needs features"):
        load(tmp_path / "half")


# ------------------------------------------------------------------------------------------------------------
# text


@pytest.mark.fast
@pytest.mark.parametrize("text", [text for kind in NODES.values() for text in kind.examples])
def test_text_and_json_say_the_same(text: str) -> None:
    tree = parse(text)
    assert parse(as_text(tree)) == tree == decode(json.loads(json.dumps(encode(tree))))


@pytest.mark.fast
@pytest.mark.parametrize("text", [
    "", "sum(", "sum()", "sum(a", "sum(a,)", "sum(a b)", "sum(a))", "a b", "sum(1e999*a)", "sum(nan*a)", "exec(a)", "sum(a, x=1)",
    "sum(a, weights=b)", "arrow(a, top_k=0)", "arrow(a, top_k=1.5)", "arrow(a, temperature=0)", "arrow(a, top_k=1, top_k=2)", "sum(../a)",
    "sum(a.b)", "sum(2*3*a)", "sum(2*)", "sum(\0a)", "batch_split(a, b, sizes=1)", "sum(" * 7 + "a" + ")" * 7, "sum(" * 1000, "9" * 5000,
    "sum(" + ", ".join(["a"] * 65) + ")",
])  # fmt: skip
def test_text_that_is_no_tree_is_a_named_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


@pytest.mark.fast
@given(st.text("abs um(),=*:.0129-e\n\0", max_size=60) | st.text(max_size=30))
def test_any_text_is_a_tree_or_a_named_error(text: str) -> None:
    try:
        tree = parse(text)
    except AdapterpackError:
        return
    assert decode(encode(tree)) == tree


@pytest.mark.fast
def test_what_cannot_be_composed_is_said(tmp_path: Path) -> None:
    """Names, the node and the way out; nothing is written."""
    known = members()
    cases: list[tuple[list[Pack], Any, str]] = [
        ([known["a"]], "sum(a, b)", "names a pack that is not given"),
        ([known["a"], known["b"]], "sum(a)", "does not name every pack"),
        ([known["a"], known["i"]], "arrow(a, i)", "router.*low rank"),
        ([known["a"], known["d"]], "gate(a, d)", "router.*low rank"),
        ([known["a"].renamed("a.b")], "sum(a)", "letters, digits"),
        ([compose([known["a"]], tree="sum(a)", name="s")], "sum(s)", "composed itself"),
        (
            [known["a"], member("w", LoRA(r=2), 1, shape=(OUT, IN + 1))],
            "sum(a, w)",
            "describe a site differently",
        ),
        ([known["a"], known["b"]], "arrow(arrow(a, b), b)", "another router inside"),
        ([known["a"]], "xlora(a)", "hidden states"),
    ]
    for packs, tree, message in cases:
        with pytest.raises(AdapterpackError, match=message):
            compose(packs, tree=tree, out=tmp_path / "none")
    for options in ({"rule": "cat"}, {"weights": [1.0]}, {"rank": 2}, {"energy": 0.5}, {"params": {"k": 1}}):
        with pytest.raises(ConfigError, match="tree says itself"):
            compose([known["a"]], tree="sum(a)", **options)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
    with pytest.raises(Unsupported, match="'xlora' has no form in a graph"):
        pack_values(compose([known["a"]], tree="xlora(a, hidden=4)"))


# ---------------------------------------------------------------------------------------------------- real
# models: torch, merge, ONNX


@pytest.fixture(scope="module")
def parts_of_base(base_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Base -> three LoRAs of other ranks and reach, and an IA3, without heads."""
    found: dict[str, dict[str, Pack]] = {}

    def make(kind: str) -> dict[str, Pack]:
        if kind not in found:
            q, v = ("query", "value") if kind == "bert" else ("q_proj", "v_proj")
            last = "output.dense" if kind == "bert" else "down_proj"
            configs = {
                "a": LoRA(r=3, alpha=5),
                "b": LoRA(r=5, alpha=4, targets=(q, v, last)),
                "c": LoRA(r=2, targets=(q, v)),
                "i": IA3(targets=(v, last), feedforward=()),
            }
            found[kind] = {
                name: _random(kind, base_of(kind), name, config, seed)
                for seed, (name, config) in enumerate(configs.items())
            }
        return found[kind]

    return make


TASK = {"bert": "feature-extraction", "llama": "text-generation"}


def _random(kind: str, base: Path, name: str, config: Any, seed: int) -> Pack:
    model = adapterpack.adapt(load_model(get_task(TASK[kind]), base), config, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(
                    (isinstance(config, IA3)) + 0.3 * torch.randn(parameter.shape, generator=generator)
                )
    return save(model, None, base=base)


TREES = {
    "sum": ("sum(0.7*a, -0.5*stack(b, c))", "abc"),
    "mixed": ("parallel(stack(a, i), i)", "ai"),
    "arrow": ("sum(0.4*a, 0.8*arrow(a, b, c, top_k=2))", "abc"),
    "minus": ("arrow(sum(a, -0.5*c), b, top_k=1, temperature=2)", "abc"),
    "gate": ("stack(gate(b, c), arrow(a, c, top_k=1))", "abc"),
    "fuse": ("sum(0.6*a, fuse(a, sum(b, -0.5*c), c, size=6, top_k=2))", "abc"),
}


def outputs(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    inputs = {key: torch.from_numpy(value) for key, value in batch.items()}
    if model.config.model_type == "llama":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        answer = model(**inputs)
    found: np.ndarray = (answer.logits if "logits" in answer else answer.last_hidden_state).numpy()
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_torch_merge_and_onnx_agree(kind: str, base_of: Make, parts_of_base: Make, tmp_path: Path) -> None:
    """A bank, and of Llama an ``inputs`` bundle, with every tree, a plain LoRA and the base: each equals
    torch's float64 layers, and what folds equals the merged checkpoint. Mixed rows too, whose adapters have
    other routers or none.
    """
    parts, base = parts_of_base(kind), base_of(kind)
    packs = [
        parts["b"],
        *(
            compose([parts[name] for name in names], tree=text, name=label)
            for label, (text, names) in TREES.items()
        ),
    ]
    if kind == "llama":  # gates that do something
        packs[-2:] = map(_trained_gates, packs[-2:])
    batch = batch_of(kind, BATCHES["ragged"])
    key = "logits" if kind == "llama" else "last_hidden_state"
    wanted: dict[str | None, np.ndarray] = {}
    model = load_model(get_task(TASK[kind]), base).double().eval()
    wanted[None] = outputs(model, batch)
    for pack in packs:
        attach(model, pack, check_base=False)
        wanted[pack.name] = outputs(model, batch)
        detach(model, pack.name)
        assert np.abs(wanted[pack.name] - wanted[None]).max() > 1e-2 * np.abs(wanted[None]).max()
    for mode in ("bank", "inputs") if kind == "llama" else ("bank",):
        session = Session(
            export(base, packs, tmp_path / mode, mode=mode, task=TASK[kind]) and tmp_path / mode, "cpu"
        )
        for name, right in wanted.items():
            assert_close(session.run(batch, name)[key], right, batch["attention_mask"], 5e-5)
    rows: tuple[str | None, ...] = ("arrow", None, "fuse")
    found = Session(tmp_path / "bank", "cpu").run(batch, list(rows))[key]
    assert_close(
        found, np.stack([wanted[name][row] for row, name in enumerate(rows)]), batch["attention_mask"], 5e-5
    )
    for pack in packs[1:]:
        if TREES[pack.name][0].startswith(("sum(0.7", "parallel")):
            merge(base, [pack], tmp_path / f"merged-{pack.name}")
            merged = load_model(get_task(TASK[kind]), tmp_path / f"merged-{pack.name}").double().eval()
            assert_close(outputs(merged, batch), wanted[pack.name], batch["attention_mask"])
        else:
            with pytest.raises(Unsupported, match=r"the node '(arrow|gate|fuse)' cannot be folded"):
                merge(base, [pack], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def _trained_gates(pack: Pack) -> Pack:
    rng = np.random.default_rng(9)
    adapters = {}
    for adapter in pack.adapters():
        own = {
            key: rng.standard_normal(value.shape).astype(np.float32)
            for key, value in adapter.params.items()
            if key.endswith(("/weight", "/bias", "/query", "/key"))
        }
        adapters[adapter.site] = adapter.config, {**adapter.params, **own}
    return build(
        pack.name,
        pack.method,
        adapters,
        task=pack.manifest.task,
        base=pack.manifest.base,
        lineage=pack.manifest.lineage,
    )


def test_a_router_is_loaded_into_a_running_bank(base_of: Make, parts_of_base: Make, tmp_path: Path) -> None:
    """A bundle exported with an Arrow of three experts takes one of two later: unused experts and ranks
    change nothing.
    """
    parts, base = parts_of_base("llama"), base_of("llama")
    three = compose([parts[name] for name in "abc"], tree="arrow(a, b, c, top_k=2)", name="three")
    two = compose([parts["a"], parts["c"]], tree="arrow(a, c, top_k=1)", name="two")
    export(base, [three], tmp_path / "bundle", slots=3)
    session = Session(tmp_path / "bundle", "cpu")
    session.load(two)
    model = load_model(get_task("text-generation"), base).double().eval()
    batch = batch_of("llama", (6, 3))
    for pack in (two, three):
        attach(model, pack, check_base=False)
        assert_close(
            session.run(batch, pack.name)["logits"], outputs(model, batch), batch["attention_mask"], 5e-5
        )
        detach(model, pack.name)


# ------------------------------------------------------------------------------------------------------------
# PEFT


def peft_loras(tmp_path: Path, count: int, rank: int = 4) -> tuple[Path, list[Path]]:
    """A tiny Llama and LoRAs that PEFT saved, whose changes have a largest singular value far above the next:
    PEFT's fixed number of power iterations then converges.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    folders = []
    for number in range(count):
        model = peft.get_peft_model(
            LlamaForCausalLM.from_pretrained(tmp_path / "base"),
            peft.LoraConfig(r=rank, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
        )
        generator = torch.Generator().manual_seed(number)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data = 0.2 * torch.randn(value.shape, generator=generator)
                (value.data[0] if "lora_A" in name else value.data[:, 0]).mul_(4)
        model.save_pretrained(tmp_path / f"x{number}")
        folders.append(tmp_path / f"x{number}")
    return tmp_path / "base", folders


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.3), (3, 2.0)])
def test_arrow_is_pefts_arrow(top_k: int, temperature: float, tmp_path: Path) -> None:
    """The same logits as create_arrow_model on the same LoRAs, to 2e-4 of the largest: its directions come
    from 15 power iterations.
    """
    base, folders = peft_loras(tmp_path, 3)
    theirs = peft.create_arrow_model(
        LlamaForCausalLM.from_pretrained(base),
        [str(folder) for folder in folders],
        peft.ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=1),
    ).eval()
    pack = compose(folders, tree=f"arrow(x0, x1, x2, top_k={top_k}, temperature={temperature})")
    ours = attach(LlamaForCausalLM.from_pretrained(base), pack, check_base=False).eval()
    ids = torch.randint(3, 31, (3, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found, plain = (
            theirs(ids).logits,
            ours(ids).logits,
            LlamaForCausalLM.from_pretrained(base)(ids).logits,
        )
    assert (found - wanted).abs().max() <= 2e-4 * wanted.abs().max() < (plain - wanted).abs().max()


def test_general_knowledge_is_taken_off_the_change(tmp_path: Path) -> None:
    """GenKnowSub: an expert without its general knowledge is s B A - s G H at every site. PEFT subtracts the
    factors from each other, whose product is another matrix.
    """
    _, (one, general) = peft_loras(tmp_path, 2)
    pack = compose([one, general], tree="arrow(sum(x0, -1*x1))")
    for ours, expert, known in zip(
        pack.adapters(), load(one).adapters(), load(general).adapters(), strict=True
    ):
        right = 1.5 * (
            expert.params["lora_B"] @ expert.params["lora_A"]
            - known.params["lora_B"] @ known.params["lora_A"]
        )
        theirs = (
            1.5
            * (expert.params["lora_B"] - known.params["lora_B"])
            @ (expert.params["lora_A"] - known.params["lora_A"])
        )
        x = np.eye(ours.site.in_features, dtype=np.float32)
        zero = partial(_zeros, ours.site.out_features)
        found = run(pack.method, ours.config, ours.params, ours.site, zero, x).T
        np.testing.assert_allclose(found, right, atol=1e-4 * np.abs(right).max())
        assert np.abs(theirs - right).max() > 0.1 * np.abs(right).max()


def _zeros(width: int, value: np.ndarray) -> np.ndarray:
    return np.zeros((*value.shape[:-1], width))


XLORAS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ""),
    "deep, by layer": (
        {"xlora_depth": 3, "xlora_size": 10, "xlora_dropout_p": 0.0, "layerwise_scalings": True},
        ", depth=3, size=10, layerwise=true",
    ),
    "top two": (
        {
            "top_k_lora": 2,
            "enable_softmax_topk": True,
            "softmax_temperature": 0.5,
            "global_scaling_weight": 1.7,
        },
        ", top_k=2, softmax_topk=true, temperature=0.5, scale=1.7",
    ),
}


@pytest.mark.parametrize("label", XLORAS)
def test_xlora_is_pefts_xlora(label: str, tmp_path: Path) -> None:
    """The same logits as PEFT's X-LoRA with the same experts and classifier, to 1e-5 of the largest."""
    base, folders = peft_loras(tmp_path, 3)
    options, text = XLORAS[label]
    adapters = {str(number): str(folder) for number, folder in enumerate(folders)}
    theirs = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        peft.XLoraConfig(
            task_type="CAUSAL_LM", peft_type="XLORA", hidden_size=24, adapters=adapters, **options
        ),
    ).eval()
    linear = [
        one for one in theirs.base_model.internal_xlora_classifier.layers if isinstance(one, torch.nn.Linear)
    ]
    pack = compose(folders, tree=f"xlora(x0, x1, x2, hidden=24{text})")
    ours = attach(LlamaForCausalLM.from_pretrained(base), pack, check_base=False).eval()
    with torch.no_grad():
        for number, one in enumerate(linear):
            one.weight.normal_(generator=torch.Generator().manual_seed(number))
            for name, value in ours.named_parameters():
                if name.endswith((f"@0/weight_{number}", f"@0/bias_{number}")):
                    value.copy_(one.weight if "weight" in name else one.bias)
        ids = torch.randint(3, 31, (2, 7), generator=torch.Generator().manual_seed(6))
        wanted, found, plain = (
            theirs(input_ids=ids).logits,
            ours(input_ids=ids).logits,
            LlamaForCausalLM.from_pretrained(base)(ids).logits,
        )
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (plain - wanted).abs().max() > 1e-2 * wanted.abs().max()


def _losses(model: Any, data: list[dict[str, Any]], folder: Path) -> list[float]:
    """The losses of thirty steps of the Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=30,
        learning_rate=0.02,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=True,
    )
    trainer = AdapterTrainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.long
def test_xlora_learns_and_comes_back(tmp_path: Path) -> None:
    """Trained by the Trainer: only the classifier moves, the loss falls, the pack says its logits, and
    another model has them too.
    """
    base, folders = peft_loras(tmp_path, 3)
    pack = compose(folders, tree="xlora(x0, x1, x2, hidden=24, depth=2, size=9, layerwise=true)", name="mix")
    model = attach(LlamaForCausalLM.from_pretrained(base), pack, check_base=False)
    moving = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name.rpartition("@0/")[2] for name in moving} == {"weight_0", "bias_0", "weight_1", "bias_1"}
    before = {name: value.detach().clone() for name, value in model.named_parameters() if name not in moving}
    rng = np.random.default_rng(0)
    data = [{"input_ids": row, "labels": row} for row in rng.integers(3, 31, (8, 10)).tolist()]
    losses = _losses(model, data, tmp_path / "run")
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
    saved = save(model.eval(), tmp_path / "mix", base=base)
    assert saved.manifest.canary is not None and saved.manifest.composition == pack.manifest.composition
    ids = torch.tensor([data[0]["input_ids"]])
    # replays the canary
    again = attach(LlamaForCausalLM.from_pretrained(base), load(tmp_path / "mix")).eval()
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        assert again.generate(ids, max_new_tokens=2, use_cache=False, do_sample=False).shape == (1, 12)
        with pytest.raises(Unsupported, match="a cache holds some"):
            again.generate(ids, max_new_tokens=2, do_sample=False, use_cache=True)
    detach(again)
    assert not again._forward_pre_hooks and not again._forward_hooks
    with torch.no_grad():
        assert torch.equal(again(ids).logits, LlamaForCausalLM.from_pretrained(base).eval()(ids).logits)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("tree", "own"),
    [("fuse(x0, x1, x2, size=16)", {"query", "key"}), ("gate(x0, x1, x2)", {"weight", "bias"})],
)
def test_routers_of_layers_learn_and_come_back(tree: str, own: set[str], tmp_path: Path) -> None:
    """Trained by the Trainer: what is the node's own moves at every layer, nothing else does; the loss falls;
    another model answers so.
    """
    base, folders = peft_loras(tmp_path, 3)
    pack = compose(folders, tree=tree, name="mix")
    model = attach(LlamaForCausalLM.from_pretrained(base), pack, check_base=False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    moving = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name.rpartition("/")[2] for name in moving} == own and len(moving) == 2 * len(
        list(pack.adapters())
    )
    data = [
        {"input_ids": row, "labels": row}
        for row in np.random.default_rng(0).integers(3, 31, (8, 10)).tolist()
    ]
    losses = _losses(model, data, tmp_path / "run")
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != (name in moving), name
    save(model.eval(), tmp_path / "mix", base=base)
    ids = torch.tensor([data[0]["input_ids"]])
    again = attach(LlamaForCausalLM.from_pretrained(base), load(tmp_path / "mix")).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.fast
def test_what_a_node_begins_with_is_drawn_by_seed_and_site() -> None:
    """The generator that a tree is given reaches its nodes: another seed draws other queries, and no two
    sites draw the same.
    """
    known = members()

    def queries(seed: int) -> np.ndarray:
        pack = compose([known["a"], known["b"]], tree="fuse(a, b, size=3)", seed=seed)
        assert pack.manifest.lineage is not None and pack.manifest.lineage.params["seed"] == seed
        return np.concatenate([adapter.params["@0/query"].ravel() for adapter in pack.adapters()])

    first = queries(0)
    np.testing.assert_array_equal(queries(0), first)
    assert not np.intersect1d(queries(1), first).size and len(np.unique(first)) == first.size
    with pytest.raises(ConfigError, match="from 0 on"):
        queries(-1)


@pytest.mark.fast
def test_members_of_other_kinds_are_refused() -> None:
    """A member behind a block, and one whose sites share tensors."""
    bottleneck = get("bottleneck")
    assert isinstance(bottleneck.examples[0], Bottleneck) and get("vblora").storage.shared is not None
    from adapterpack.adapter_methods.nodes.composed import compose_method

    for name, message in (("bottleneck", "act on layers"), ("vblora", "cannot be part of a tree")):
        with pytest.raises(Unsupported, match=message):
            compose_method(parse("sum(a)"), {"a": get(name)})


@pytest.mark.fast
def test_a_node_without_evaluate_takes_additive_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of another package that only folds cannot run members that have no sum, and says so."""
    from adapterpack.adapter_methods.nodes import composed

    monkeypatch.setattr(composed, "NODES", {"sum": composed.NODES["sum"]._replace(evaluate=None)})
    assert composed.compose_method(parse("sum(a)"), {"a": get("lora")}).traits.additive
    with pytest.raises(Unsupported, match="such a node takes members"):
        composed.compose_method(parse("sum(a)"), {"a": get("ia3")})


@pytest.mark.fast
def test_a_composed_pack_goes_on_through_the_stages(tmp_path: Path) -> None:
    """A tree that folds is low-rank: int8, and flattened to one LoRA by a rule with the same change; a router
    is refused there.
    """
    known = members()
    pack = compose([known["a"], known["b"]], tree="sum(2*a, parallel(a, -1*b))", name="s", out=tmp_path / "s")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "adapter_model.safetensors",
        "adapterpack.json",
    ]
    (flat,) = compose([pack], weights=[1.0]).adapters()
    wanted = 2.5 * delta(known["a"]) - 0.5 * delta(known["b"])
    np.testing.assert_allclose(
        flat.params["lora_B"] @ flat.params["lora_A"], wanted, atol=1e-5 * np.abs(wanted).max()
    )
    small = load(adapterpack.quantize(tmp_path / "s", tmp_path / "q", scheme="int8").path or "")
    assert small.manifest.must_understand == ("composition", "packed") and small.method is pack.method
    with pytest.raises(Unsupported, match="have no low rank"):
        compose([compose([known["a"], known["b"]], tree="arrow(a, b)"), known["c"]])


def test_a_layer_behind_a_router_compiles(parts_of_base: Make, base_of: Make) -> None:
    """Traced whole, the output and the gradients of the gate are those without torch.compile, to 1e-5 of the
    largest.
    """
    parts = parts_of_base("llama")
    pack = compose([parts["a"], parts["b"]], tree="gate(a, b, top_k=1)")
    model = attach(load_model(get_task("text-generation"), base_of("llama")), pack)
    layer, x = (
        model.model.layers[0].self_attn.q_proj,
        torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)),
    )
    torch._dynamo.reset()
    found = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        y = function(x)
        y.square().sum().backward()
        gate = next(value for name, value in layer.named_parameters() if name.endswith("@0/weight"))
        found.append((y.detach().numpy(), gate.grad.numpy().copy()))
    for plain, compiled in zip(*found, strict=True):
        assert np.abs(plain - compiled).max() <= 1e-5 * np.abs(plain).max()


@pytest.mark.fast
def test_a_sequence_that_is_divided_must_be_whole(parts_of_base: Make, base_of: Make) -> None:
    """split counts positions, so a cache is refused; without one tokens are generated."""
    parts = parts_of_base("llama")
    pack = compose([parts["a"], parts["b"]], tree="split(a, b, sizes=2:2)")
    model = attach(load_model(get_task("text-generation"), base_of("llama")), pack).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(Unsupported, match="all tokens at once"):
        model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=True)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False).shape == (1, 6)


@pytest.mark.fast
def test_the_command_line_takes_text_and_files(tmp_path: Path) -> None:
    """--tree as text, JSON and YAML gives the same bytes; a file that is none is a named error and writes
    nothing.
    """
    known = members()
    for name in "ab":
        known[name].write(tmp_path / name)
    tree = encode(parse("sum(0.5*a, arrow(a, b, top_k=1))"))
    (tmp_path / "t.json").write_text(json.dumps(tree))
    text = (
        "kind: sum\nof: [{member: a}, {kind: arrow, of: [{member: a}, {member: b}], top_k: 1}]\nweights: "
        "[0.5, 1]\n"
    )
    (tmp_path / "t.yaml").write_text(text)
    (tmp_path / "bad.yaml").write_text("kind: [")
    ids = set()
    for number, text in enumerate(
        ("sum(0.5*a, arrow(a, b, top_k=1))", str(tmp_path / "t.json"), str(tmp_path / "t.yaml"))
    ):
        arguments = [
            str(tmp_path / "a"),
            str(tmp_path / "b"),
            "--tree",
            text,
            "-o",
            str(tmp_path / f"{number}"),
            "--json",
        ]
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 0, done.output
        found = json.loads(done.output)
        assert found["composition"] == "sum(0.5*a, 1*arrow(a, b, top_k=1))" and found["method"] == "composed"
        ids.add(load(tmp_path / f"{number}").renamed("same").id)
    assert len(ids) == 1
    done = CliRunner().invoke(
        command, [str(tmp_path / "a"), "--tree", str(tmp_path / "bad.yaml"), "-o", str(tmp_path / "none")]
    )
    assert isinstance(done.exception, ConfigError) and not (tmp_path / "none").exists()
