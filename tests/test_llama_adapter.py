"""LLaMA-Adapter: against PEFT and a float64 reference, in other families, in company, packed, trained, in
graphs; and refusals.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from noise import shake
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import adapterpack as ap
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import FormatError, Unsupported
from adapterpack.peft import layout
from adapterpack.runtime.padding import pad
from adapterpack.slots.projections import project

ROWS = [[5, 6, 7, 30, 31], [8, 9], [10, 11, 12, 13, 14, 15, 16]]
CLOSE = 2e-5
"""float32 logits of about 5, summed in another order."""


@pytest.fixture
def llama(tiny_llama: Path) -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def moved(model: Any, config: Any, name: str = "a", size: float = 0.5) -> Any:
    """The model with a fresh adapter, moved by noise."""
    ap.adapt(model, config, name)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=size)
    return model


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in pad(ROWS, 0, left=left).items()}


@pytest.mark.parametrize("left", [False, True])
def test_it_equals_peft_both_ways(llama: Any, tiny_llama: Path, tmp_path: Path, left: bool) -> None:
    """PEFT on our folder gives our logits and our greedy tokens, on a cache too; we on PEFT's folder give
    PEFT's, and write its config.
    """
    model = moved(llama, ap.LLaMAAdapter(adapter_len=4, adapter_layers=1))
    assert sorted(
        {name.split(".adapters")[0] for name, value in model.named_parameters() if value.requires_grad}
    ) == ["model.layers.1.self_attn"]
    ap.save(model, tmp_path / "ours", base=tiny_llama)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "ours")
    ).eval()
    given, options = batch(left), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    real = given["attention_mask"] > 0
    with torch.no_grad():
        assert float((model(**given).logits - theirs(**given).logits)[real].abs().max()) < CLOSE
    if left:
        assert torch.equal(model.generate(**given, **options), theirs.generate(**given, **options))
    peers = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    ).eval()
    with torch.no_grad():
        for name, value in peers.named_parameters():
            if "adaption_gate" in name:
                value.fill_(0.7)
    peers.save_pretrained(str(tmp_path / "theirs"))
    pack = ap.load(tmp_path / "theirs")
    ap.detach(llama)
    with torch.no_grad():
        mine, right = ap.attach(llama, pack, check_base=False)(**given).logits, peers(**given).logits
    assert float((mine - right)[real].abs().max()) < CLOSE
    pack.write(tmp_path / "pack")
    written, read = (
        json.loads((tmp_path / place / layout.CONFIG).read_bytes()) for place in ("pack", "theirs")
    )
    keys = ("peft_type", "adapter_len", "adapter_layers", "target_modules")
    assert [written[key] for key in keys] == [read[key] for key in keys]


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_formula(bias: bool) -> None:
    """One layer's attention, with grouped heads and biases, equals float64 loops over heads and tokens; a
    gate of zero is the base.
    """
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=4,
                intermediate_size=8,
                attention_bias=bias,
                initializer_range=0.5,
            )
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    ids, seen = torch.tensor([ROWS[0]]), {}
    own = model.model.layers[0].self_attn
    handle = own.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs, output=output[0]), with_kwargs=True
    )
    plain = model(ids).logits
    handle.remove()
    moved(model, ap.LLaMAAdapter(adapter_len=3), size=0.8)
    holder = model.model.layers[0].self_attn
    params = {key: torch.from_numpy(value.astype(np.float64)) for key, value in holder._params("a").items()}
    P, g = params["adaption_prompt"][0], params["adaption_gate"]
    with torch.no_grad():
        found = holder(
            **{key: seen[key] for key in ("hidden_states", "position_embeddings", "attention_mask")}
        )[0]
        h, (cos, sin) = seen["hidden_states"][0], seen["position_embeddings"]
        q, k, v = own.q_proj(h).view(5, 6, 4), own.k_proj(P).view(3, 2, 4), own.v_proj(P).view(3, 2, 4)
        expected = seen["output"][0].clone()
        for t in range(5):
            heads = []
            for i in range(6):
                turned = q[t, i] * cos[0, t] + torch.cat([-q[t, i, 2:], q[t, i, :2]]) * sin[0, t]
                scores = torch.tensor(
                    [float(turned @ k[n, i // 3]) / math.sqrt(4) for n in range(3)], dtype=torch.float64
                )
                heads.append(g * sum(weight * v[n, i // 3] for n, weight in enumerate(scores.softmax(0))))
            expected[t] += own.o_proj.weight @ torch.cat(heads)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        holder._part("a")["adaption_gate"].zero_()
        np.testing.assert_allclose(model(ids).logits, plain, rtol=0, atol=1e-12 if bias else 0)


def test_one_projection_of_all_three_as_in_gpt2(tmp_path: Path) -> None:
    """GPT-2: PEFT's folder gives PEFT's logits, and our folder does in PEFT; one attention equals a float64
    loop over its heads, which PEFT adds without the output projection.
    """
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=20, n_head=5, n_layer=2, n_positions=16, initializer_range=0.4)
    ).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    )
    shake(theirs.eval(), 0.7).save_pretrained(tmp_path / "theirs")
    ids, seen = torch.tensor([ROWS[0]]), {}
    model = ap.attach(copy.deepcopy(base), ap.load(tmp_path / "theirs"), "a", check_base=False)
    with torch.no_grad():
        right = theirs(ids).logits
        assert float((right - base(ids).logits).abs().max()) > 0.1
        np.testing.assert_allclose(model(ids).logits, right, rtol=0, atol=CLOSE)
    ap.save(model, tmp_path / "ours", base=None)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    holder = model.double().transformer.h[1].attn
    holder._base.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(x=args[0], y=output[0]), with_kwargs=True
    )
    with torch.no_grad():
        np.testing.assert_allclose(again(ids).logits, right, rtol=0, atol=CLOSE)
        found = {}
        holder.register_forward_hook(lambda module, args, output: found.update(y=output[0]))
        model(ids)
        params = {
            key: torch.from_numpy(value.astype(np.float64)) for key, value in holder._params("a").items()
        }
        q, (_, k, v) = (
            holder._base.c_attn(seen["x"])[0].split(20, -1)[0],
            holder._base.c_attn(params["adaption_prompt"])[0].split(20, -1),
        )
        for t, i in itertools.product(range(5), range(5)):
            own = slice(4 * i, 4 * i + 4)
            weights = (k[:, own] @ q[t, own] / math.sqrt(4)).softmax(0)
            np.testing.assert_allclose(
                found["y"][0, t, own],
                seen["y"][0, t, own] + params["adaption_gate"] * (weights @ v[:, own]),
                rtol=0,
                atol=1e-10,
            )


def test_queries_are_normed_and_turned_as_the_model_does() -> None:
    """Qwen3 norms queries and keys by head: the adapter asks with the attention's own queries, to the bit,
    and norms its keys.
    """
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=8,
            initializer_range=0.5,
        )
    ).eval()
    taken: dict[str, Any] = {}
    own = model.model.layers[0].self_attn
    moved(model, ap.LLaMAAdapter(adapter_len=3))
    own.q_norm.register_forward_hook(lambda module, args, output: taken.setdefault("q", []).append(output))
    own.k_norm.register_forward_hook(
        lambda module, args, output: taken.setdefault("k", []).append(output.shape[1])
    )
    with torch.no_grad():
        model(torch.tensor([ROWS[0]]))
    assert len(taken["q"]) == 2 and torch.equal(*taken["q"]) and taken["k"] == [len(ROWS[0]), 3]


def test_it_trains_beside_a_lora_and_goes_out_again(llama: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """Adam lowers the loss; the pack, attached beside a LoRA, gives the same as here; only one prompt at a
    time; out is the base.
    """
    given = batch()
    with torch.no_grad():
        base = llama(**given).logits
    model = ap.adapt(llama, ap.LLaMAAdapter(adapter_len=4), "a").train()
    assert torch.equal(model.eval()(**given).logits.detach(), base)
    model.train()
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.05)
    labels, losses = torch.where(given["attention_mask"] > 0, given["input_ids"], -100), []
    for _ in range(15):
        loss = model(**given, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    model.eval()
    pack = ap.save(model, tmp_path / "a", adapter="a", base=tiny_llama)
    moved(model, ap.LoRA(r=2), "lora")
    ap.active(model, ["a", "lora"])
    other = ap.attach(
        moved(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), ap.LoRA(r=2), "lora"), pack
    )
    ap.active(other, ["a", "lora"])
    with torch.no_grad():
        np.testing.assert_allclose(other(**given).logits, model(**given).logits, rtol=0, atol=CLOSE)
    moved(model, ap.LLaMAAdapter(adapter_len=2), "b")
    with pytest.raises(Unsupported, match="only one"):
        ap.active(model, ["a", "b"])
    assert torch.equal(ap.detach(model)(**given).logits.detach(), base)


def test_what_cannot_have_it_says_so(llama: Any, tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Too many layers, attention of another build, a merge; chosen layers that PEFT could not be told have no
    PEFT config.
    """
    from transformers import AutoModel

    with pytest.raises(Unsupported, match="fewer layers"):
        ap.adapt(llama, ap.LLaMAAdapter(adapter_layers=3))
    with pytest.raises(Unsupported, match="this kind of attention"):
        ap.adapt(AutoModel.from_pretrained(tiny_bert), ap.LLaMAAdapter())
    first = ap.save(
        moved(llama, ap.LLaMAAdapter(targets=("layers.0.self_attn",))), tmp_path / "first", base=tiny_llama
    )
    assert not (tmp_path / "first" / layout.CONFIG).exists() and ap.load(first.path).name == "first"
    with pytest.raises(Unsupported, match="does not act on weights"):
        ap.merge(tiny_llama, [first], tmp_path / "merged")
    for wrong in ({"adapter_len": 0}, {"adapter_layers": -1}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match=r"adapter_len|adapter_layers|dropout"):
            ap.LLaMAAdapter(**wrong)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads, biases, and norms of queries and keys, none of which is zero or one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen") / "base"
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=8,
            attention_bias=True,
            pad_token_id=0,
            max_position_embeddings=64,
        )
    )
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    return folder


def qwen_packs(base: Path) -> dict[str, Any]:
    """Prompts of two lengths, and others that change the layers which those are made with."""
    configs = {
        "long": ap.LLaMAAdapter(adapter_len=5),
        "short": ap.LLaMAAdapter(adapter_len=2),
        "lora": ap.LoRA(r=3, targets="all-linear"),
        "turned": ap.OFT(block_size=4, targets=("k_proj", "v_proj", "o_proj")),
    }
    return {
        name: ap.save(
            moved(AutoModelForCausalLM.from_pretrained(base).eval(), config, name, 0.2),
            None,
            base=base,
            name=name,
        )
        for name, config in configs.items()
    }


def test_a_bank_takes_prompts_while_it_runs(qwen: Path, tmp_path: Path) -> None:
    """Keys and values are made of the graph's own projections, whatever other adapters do at them; a slot
    filled later gives the logits of a slot filled at export, and the base's rows keep their bits.
    """
    packs, given = qwen_packs(qwen), pad(ROWS, 0, left=True)
    ap.export(qwen, list(packs.values()), tmp_path / "all")
    ap.export(
        qwen, [packs[name] for name in ("short", "lora", "turned")], tmp_path / "some", slots=5, max_rank=8
    )
    ap.export(qwen, [packs["short"]], tmp_path / "narrow", slots=3)
    ap.export(qwen, [], tmp_path / "none")
    whole, part = (ap.Session(tmp_path / name, provider="cpu") for name in ("all", "some"))
    with pytest.raises(Unsupported, match="does not fit its slot"):
        narrow = ap.Session(tmp_path / "narrow", provider="cpu")
        narrow.run(given, [narrow.load(packs["long"])] * 3)
    with pytest.raises(Unsupported, match="no place for a prompt"):
        ap.Session(tmp_path / "none", provider="cpu").load(packs["long"])
    before = part.run(given, [None] * 3)["logits"]
    part.load(packs["long"])
    names = ["long", "turned", "long"]
    found, right = (session.run(given, names)["logits"] for session in (part, whole))
    real = given["attention_mask"] > 0
    np.testing.assert_allclose(found[real], right[real], rtol=0, atol=CLOSE)
    assert np.abs(found - part.run(given, [None] * 3)["logits"])[real].max() > 1e-2
    for session in (part, whole):
        base = session.run(given, ["long", None, "short"])["logits"][1]
        np.testing.assert_array_equal(base, before[1])


def test_a_quantized_bank_takes_prompts(qwen: Path, tmp_path: Path) -> None:
    """The quantized projections make the keys and values: near those of the float graph, and not the same."""
    packs = qwen_packs(qwen)
    ap.export(qwen, [packs["long"], packs["lora"]], tmp_path / "bundle", slots=5)
    ap.quantize(tmp_path / "bundle", tmp_path / "small", scheme="int8")
    session, given = ap.Session(tmp_path / "small", provider="cpu"), pad(ROWS, 0, left=True)
    session.load(packs["long"], "same")
    session.load(packs["long"].renamed("again"))
    real = given["attention_mask"] > 0
    names = ("long", "same", "again", None)
    first, same, second, base = (session.run(given, [name] * 3)["logits"][real] for name in names)
    assert (same == first).all()  # the pack that the bundle was exported with keeps its exported values
    assert 0 < np.abs(first - second).max() < 0.1 * np.abs(first - base).max()


def test_a_graph_without_such_an_attention_says_so(qwen: Path, tmp_path: Path) -> None:
    """A site map that names what the graph has not is an error, and no crash."""
    packs = qwen_packs(qwen)
    ap.export(qwen, [packs["long"]], tmp_path / "bundle", slots=3)
    bundle = read_bundle(tmp_path / "bundle")
    site = next(site for site in bundle.sites.values() if site.heads is not None)
    model = ir.load(tmp_path / "bundle" / "model.onnx")
    for wrong in ({"keys": "nothing"}, {"norm": ("nothing", "nothing")}, {"keys": "input_ids"}):
        with pytest.raises(FormatError, match="graph has no"):
            project(
                model, dataclasses.replace(site.heads, **wrong), np.zeros((2, 24), np.float32), site.dtype
            )
