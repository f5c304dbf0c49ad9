"""ShadowPEFT as a plugin: what every method promises; PEFT's own models both ways, with caches and beams; the
formula in float64; what is refused. Run it where both packages are installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapterpack_shadow.form import advance, inject
from adapterpack_shadow.method import Shadow, shadow
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from adapterpack import active, adapt, attach, convert, detach, export, load, merge, save, validate
from adapterpack.errors import BaseMismatch, FormatError, Unsupported
from adapterpack.peft import layout
from adapterpack.testing import BLOCKS, PROOFS, SUBJECTS, AdaptedCase, Proof, prove
from adapterpack.torch_adapters.layers.active import using

pytestmark = pytest.mark.filterwarnings("ignore")
SAME = 1e-5
"""Of the largest logit: the same sums in float32, some in another order."""
IDS = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(7))
MASK = torch.ones_like(IDS)
MASK[0, :2] = 0
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA), {"task_type": "CAUSAL_LM"}),
    "narrow": (
        LlamaForCausalLM,
        LlamaConfig(**LLAMA),
        {
            "task_type": "CAUSAL_LM",
            "shadow_hidden_size": 16,
            "shadow_num_hidden_layers": 2,
            "shadow_intermediate_size": 10,
            "update_hidden_size": 5,
            "shadow_alpha": 0.3,
        },
    ),
    "own embeddings": (
        LlamaForCausalLM,
        LlamaConfig(**LLAMA),
        {
            "task_type": "CAUSAL_LM",
            "share_embeddings": False,
            "layers_to_transform": [1, 2],
            "layers_pattern": "layers",
        },
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=96, n_embd=24, n_layer=2, n_head=2, n_positions=64),
        {"task_type": "CAUSAL_LM"},
    ),
    "classifier": (
        LlamaForSequenceClassification,
        LlamaConfig(**LLAMA, num_labels=3),
        {"task_type": "SEQ_CLS"},
    ),
}


@torch.no_grad()
def shake(model: Any, size: float, seed: int) -> Any:
    """The model, with normal noise times ``size`` added to every parameter that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> np.ndarray:
    """What the model says of the same three rows, the first of which is padded."""
    found: np.ndarray = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
    return found


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Raise AssertionError unless both agree within :data:`SAME`."""
    assert np.abs(found - wanted).max() <= SAME * max(1, np.abs(wanted).max())


def based(case: str, folder: Path) -> Any:
    """A tiny base of the case in a folder, and what loads it."""
    cls, config, _ = CASES[case]
    torch.manual_seed(3)
    model = cls(config)
    shake(model, 0.1, 2)
    model.save_pretrained(folder)
    return lambda: cls.from_pretrained(folder).eval()


def theirs_of(fresh: Any, case: str, folder: Path) -> Any:
    """PEFT's own model of the case, whose adapter it saves in ``folder``."""
    options = CASES[case][2]
    theirs = peft.get_peft_model(fresh(), peft.ShadowConfig(r=3, init_weights=False, **options))
    shake(theirs, 0.2, 5).eval()
    theirs.save_pretrained(folder)
    return theirs


def _beside(layer: AdaptedCase, x: Any) -> Any:
    """The layer's output with a state that its input moved on once, from nothing."""
    form = layer.case.method.normal_form(layer.case.config, layer.params, layer.case.site)
    return layer.base(inject(form, x, advance(form, x, 0 * x)))


def test_it_keeps_what_every_method_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The invariants that its traits promise hold, on layers that stand for a decoder's."""
    monkeypatch.setitem(PROOFS, "shadow", Proof(_beside, folds=False))
    monkeypatch.setitem(SUBJECTS, "layer", BLOCKS)
    assert prove(shadow) > 10


@pytest.mark.parametrize("case", CASES)
def test_peft_both_ways(case: str, tmp_path: Path) -> None:
    """PEFT's logits, and the texts of its model by beams, which sees all tokens anew each time, are ours,
    with a cache or without; the pack made of its folder is PEFT's folder, too, with equal tensors; switched
    off, and detached, the base is what it was to the bit.
    """
    fresh = based(case, tmp_path / "base")
    theirs, plain = theirs_of(fresh, case, tmp_path / "theirs"), logits(fresh())
    wanted = logits(theirs)
    assert np.abs(wanted - plain).max() > 0.05
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack")
    ours = attach(fresh(), load(tmp_path / "pack"), "a", check_base=False)
    close(logits(ours), wanted)
    if case != "classifier":
        asked = {
            "input_ids": IDS,
            "attention_mask": MASK,
            "max_new_tokens": 6,
            "pad_token_id": 0,
            "num_beams": 3,
        }
        right = theirs.generate(**asked, use_cache=False)
        for use_cache in (False, True):
            assert torch.equal(ours.generate(**asked, use_cache=use_cache), right), use_cache
    before, after = (load_file(tmp_path / folder / layout.TENSORS) for folder in ("theirs", "pack"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    close(logits(peft.PeftModel.from_pretrained(fresh(), tmp_path / "pack").eval()), wanted)
    assert validate(tmp_path / "pack", base=tmp_path / "base").valid
    assert np.array_equal(logits(active(ours, None)), plain)
    assert np.array_equal(logits(detach(active(ours, "a"))), plain)


def test_ours_is_the_formula_in_float64(tmp_path: Path) -> None:
    """A model adapted here, in float64: each layer's input and the state by the paper's equations, within
    1e-12; PEFT reads its pack.
    """
    fresh = based("llama", tmp_path / "base")
    model = adapt(
        fresh(), Shadow(r=3, shadow_num_hidden_layers=2, update_hidden_size=5, shadow_alpha=0.7), seed=4
    )
    assert np.array_equal(logits(model.eval()), logits(fresh())), "a fresh adapter changes nothing"
    shake(model, 0.2, 5).eval()
    pack = save(model, tmp_path / "pack")
    close(logits(peft.PeftModel.from_pretrained(fresh(), tmp_path / "pack").eval()), logits(model))
    twin = fresh().model.double()
    backbone = type(twin)(LlamaConfig(**{**LLAMA, "num_hidden_layers": 2})).double().eval()
    shared = pack.shared()
    stored = {
        key.removeprefix("backbone_").replace("/", "."): torch.tensor(value).double()
        for key, value in shared.items()
    }
    assert backbone.load_state_dict(stored, strict=False).missing_keys == ["embed_tokens.weight"]
    params = {
        adapter.site.path: {key: value.astype(float) for key, value in adapter.params.items()}
        for adapter in pack.adapters()
    }

    def two(own: dict[str, np.ndarray], part: str, x: np.ndarray) -> np.ndarray:
        inner = torch.nn.functional.gelu(
            torch.tensor(x @ own[f"{part}_first"].T + own[f"{part}_first_bias"])
        ).numpy()
        found: np.ndarray = inner @ own[f"{part}_second"].T + own[f"{part}_second_bias"]
        return found

    entered: list[np.ndarray] = []
    with torch.no_grad():
        state = backbone(inputs_embeds=twin.embed_tokens(IDS), attention_mask=MASK).last_hidden_state.numpy()
        for number, layer in enumerate(twin.layers):
            own = params[f"model.layers.{number}"]

            def before(module: Any, args: Any, kwargs: Any, own: Any = own) -> Any:
                hidden = args[0].numpy()
                entered.append(hidden + 0.7 * (hidden - state) @ own["down"].T @ own["up"].T)
                return (torch.tensor(entered[-1]), *args[1:]), kwargs

            def after(module: Any, args: Any, output: torch.Tensor, own: Any = own) -> None:
                nonlocal state
                gate = 1 / (1 + np.exp(-two(own, "gate", output.numpy())))
                state = (1 - gate) * state + gate * two(own, "transform", output.numpy())

            layer.register_forward_pre_hook(before, with_kwargs=True)
            layer.register_forward_hook(after)
        wanted = twin(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state.numpy()
        found = (
            model.double()
            .model(input_ids=IDS, attention_mask=MASK, use_cache=False)
            .last_hidden_state.numpy()
        )
    assert len(entered) == 3
    assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()


def test_training_reaches_the_second_model_with_and_without_checkpointing(tmp_path: Path) -> None:
    """Gradients reach every tensor but those that move the last state on, which nothing reads; checkpointing
    changes no bit of them.
    """
    fresh = based("llama", tmp_path / "base")
    model = shake(adapt(fresh(), Shadow(r=2, dropout=0.0)), 0.1, 5).train()

    def gradients() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    plain = gradients()
    unread = {name for name, value in plain.items() if value is None}
    assert unread == {
        name
        for name in plain
        if ".2." in name.partition("adapters")[0] and ("gate_" in name or "transform_" in name)
    }
    assert len(unread) == 8
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert all(value is None or torch.equal(value, again[name]) for name, value in plain.items())


def test_what_is_refused(tmp_path: Path) -> None:
    """Merges, graphs, rows with adapters of their own, foreign caches, other models, checkpoints elsewhere,
    impossible sizes: by name.
    """
    fresh = based("llama", tmp_path / "base")
    theirs_of(fresh, "llama", tmp_path / "theirs")
    pack = load(tmp_path / "theirs")
    for mode, words in (("folded", "cannot be folded"), ("bank", "second model with a cache of its own")):
        with pytest.raises(Unsupported, match=words):
            export(tmp_path / "base", [pack], tmp_path / "bundle", mode=mode)
    with pytest.raises(Unsupported, match="cannot be folded"):
        merge(tmp_path / "base", [pack], tmp_path / "merged")
    ours = attach(fresh(), pack, "a", check_base=False)
    with pytest.raises(Unsupported, match="whole batch"), using(ours, adapters=["a", None, "a"]):
        pass
    first = active(ours, None)(input_ids=IDS)
    # its name in newer and older transformers
    cache = next(name for name in ("cache", "past_key_values") if name in first)
    with pytest.raises(Unsupported, match="filled without"):
        active(ours, "a")(input_ids=IDS[:, :1], **{cache: first[cache]})
    with pytest.raises(Unsupported, match="auxiliary loss"):
        adapt(fresh(), Shadow(auxiliary_loss_weight=0.1))
    other = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "intermediate_size": 30}))
    with pytest.raises(BaseMismatch, match="does not mirror"):
        attach(other, pack, check_base=False)
    assert not [module for module in other.modules() if module._forward_pre_hooks], "nothing is left behind"
    config = tmp_path / "theirs" / layout.CONFIG
    written = json.loads(config.read_text())
    for change, error, words in (
        ({"shadow_model": "org/shadow"}, Unsupported, "checkpoint elsewhere"),
        ({"r": 1 << 30}, FormatError, "r must be"),
        ({"shadow_num_hidden_layers": 1 << 40}, FormatError, "shadow_num_hidden_layers must be"),
    ):
        config.write_text(json.dumps({**written, **change}))
        with pytest.raises(error, match=words):
            load(tmp_path / "theirs")
    config.write_text(json.dumps({**written, "shadow_num_hidden_layers": 1 << 20}))
    with pytest.raises(Unsupported, match="more layers than"):
        attach(fresh(), load(tmp_path / "theirs"), check_base=False)
