"""Prompts in a torch model: against dense float64 references and against PEFT, in training, in generation,
and out again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

import adapterpack as ap
from adapterpack.adapter_methods import PROMPT, Site, methods
from adapterpack.adapter_methods.forms.prompt import PromptSite
from adapterpack.errors import AdapterpackError, BaseMismatch, SiteNotFound, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build
from adapterpack.runtime.adapters.prompt_cache import prompt_kv
from adapterpack.torch_adapters.canaries.canary import verify_canary
from adapterpack.torch_adapters.layers.active import adapter_names
from adapterpack.training.pipeline import train

ROWS = [[5, 6, 7, 30, 31], [8, 9], [10, 11, 12, 13, 14, 15, 16]]
CONFIGS: dict[str, Any] = {
    "vocabulary": ap.PromptTuning(num_virtual_tokens=3),
    "text": ap.PromptTuning(num_virtual_tokens=5, init="text", text="w1 w2 w3"),
    "p-tuning": ap.PTuning(num_virtual_tokens=3),
    "p-tuning lstm": ap.PTuning(num_virtual_tokens=4, encoder="lstm", encoder_hidden=9),
    "prefix": ap.PrefixTuning(num_virtual_tokens=3),
    "projected prefix": ap.PrefixTuning(num_virtual_tokens=4, projection=True, encoder_hidden=9),
    "cartridge": ap.Cartridge(num_virtual_tokens=4, token_ids=(1, 8, 9, 10)),
    "multitask": ap.MultitaskPromptTuning(num_virtual_tokens=3, num_tasks=2, num_ranks=2),
    "cpt": ap.CPT(token_ids=(4, 5, 6), token_types=(1, 2, 4), input_epsilon=20.0, format_epsilon=30.0),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
CLOSE = 2e-5
"""float32 logits of about 5, summed in another order."""


@pytest.fixture
def llama(tiny_llama: Path) -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def prompted(model: Any, name: str, seed: int = 3) -> Any:
    """The model with a fresh adapter, moved by noise."""
    ap.adapt(model, CONFIGS[name], "p")
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.3)
    return model


def padded(rows: list[list[int]], left: bool = False) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, rows: list[list[int]] = ROWS, left: bool = False, **more: Any) -> torch.Tensor:
    """The real positions of all rows, one after the other."""
    batch = padded(rows, left)
    with torch.no_grad():
        return model(**batch, **more).logits[batch["attention_mask"] > 0]


def form_of(model: Any) -> Any:
    """The normal form of the adapter, in float64 by numpy."""
    holder = model.get_input_embeddings()
    method, cfg = holder._held["p"].method, holder._held["p"].config
    params = {key: np.float64(value) for key, value in holder._params("p").items()}
    constants = method.storage.constants(cfg, holder._site) if method.storage.constants else {}
    return method.normal_form(cfg, {**constants, **params}, holder._site)


# --- against dense references


@EVERY
def test_a_decoder_sees_the_prompt_before_each_row(llama: Any, tiny_llama: Path, name: str) -> None:
    """Logits equal those of the plain float64 model on [virtual embeddings; embeddings], or on a cache that
    holds the keys and values.
    """
    form = form_of(prompted(llama, name))
    found = logits(llama)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).double().eval()
    expected = []
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            if form.embeds is not None:
                first = form.embeds[form.task] if form.embeds.ndim == 3 else form.embeds
                inputs = torch.cat([torch.tensor(first)[None], plain.get_input_embeddings()(ids)], dim=1)
                expected.append(plain(inputs_embeds=inputs).logits[0, form.length :])
            else:
                cache = DynamicCache(config=plain.config)
                for layer, (keys, values) in enumerate(torch.tensor(form.cache)):
                    cache.update(keys[None], values[None], layer)
                expected.append(plain(input_ids=ids, cache=cache).logits[0])
    np.testing.assert_allclose(found, torch.cat(expected), rtol=0, atol=CLOSE)
    np.testing.assert_allclose(logits(llama, left=True), torch.cat(expected), rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    "config",
    [
        ap.PromptTuning(num_virtual_tokens=4, init="text", token_ids=(7, 8, 9, 20)),
        ap.CPT(token_ids=(7, 8, 9, 20)),
        ap.PrefixTuning(num_virtual_tokens=4, init="text", token_ids=(7, 8, 9, 20)),
        ap.Cartridge(num_virtual_tokens=4, token_ids=(7, 8, 9, 20)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_prompt_made_from_tokens_is_those_tokens(llama: Any, config: Any) -> None:
    """Fresh from the ids of a text, the model on x is the base on [text; x]; other adapters on the model do
    not get into the cache.
    """
    longer = [[7, 8, 9, 20, *row] for row in ROWS]
    expected = torch.cat([logits(llama, [row])[4:] for row in longer])
    other = prompted(llama, "vocabulary")
    np.testing.assert_allclose(logits(ap.adapt(other, config, "q")), expected, rtol=0, atol=CLOSE)


def test_a_text_is_read_by_the_models_tokenizer(llama: Any) -> None:
    """``text`` becomes ids, repeated to the number of virtual tokens, and the ids are in the pack."""
    ap.adapt(llama, CONFIGS["text"], "p")
    holder = llama.get_input_embeddings()
    assert holder._held["p"].config.token_ids == (5, 6, 7)
    rows = holder._base.weight[[5, 6, 7, 5, 6]]
    assert torch.equal(holder._adapters["adapter:p"]["prompt_embeddings"], rows)


def test_networks_are_torchs_own() -> None:
    """P-tuning's MLP and LSTM and the prefix projection equal torch.nn's modules on the same float64 tensors,
    within 1e-12.
    """
    rng, site = np.random.default_rng(0), PromptSite(PROMPT, 6, 0, "prompt", layers=2, heads=1, head_dim=4)
    for config in (
        ap.PTuning(num_virtual_tokens=5, encoder_hidden=7),
        ap.PTuning(num_virtual_tokens=5, encoder="lstm", encoder_hidden=3),
        ap.PrefixTuning(num_virtual_tokens=5, projection=True, encoder_hidden=7),
    ):
        method = next(one for one in methods().values() if one.config is type(config))
        params = {key: rng.normal(size=shape) for key, shape in method.shapes(config, site).items()}
        x = torch.tensor(params["prompt_embeddings"])
        if type(config) is ap.PTuning and config.encoder == "lstm":
            lstm = torch.nn.LSTM(6, 3, num_layers=2, bidirectional=True, batch_first=True).double()
            lstm.load_state_dict(
                {
                    key.removeprefix("lstm_"): torch.tensor(value)
                    for key, value in params.items()
                    if "lstm" in key
                }
            )
            x = lstm(x)[0]
        layers, act = (
            (("down", "up"), torch.tanh)
            if "down_bias" in params
            else ([f"mlp_{number}" for number in range(3) if f"mlp_{number}_bias" in params], torch.relu)
        )
        for number, layer in enumerate(layers):
            weight, bias = (torch.tensor(params[f"{layer}_{leaf}"]) for leaf in ("weight", "bias"))
            x = torch.nn.functional.linear(x if number == 0 else act(x), weight, bias)
        form = method.normal_form(config, params, site)
        found = (
            form.embeds if form.cache is None else np.transpose(form.cache, (3, 0, 1, 2, 4)).reshape(5, -1)
        )
        np.testing.assert_allclose(found, x.detach(), rtol=0, atol=1e-12)


def test_cpt_moves_within_its_balls(llama: Any) -> None:
    """|P_i - E(x_i)| is at most e_i = epsilon sqrt(in / 2048), and exactly that far out; a label does not
    move at all.
    """
    prompted(llama, "cpt")
    holder = llama.get_input_embeddings()
    with torch.no_grad():
        holder._adapters["adapter:p"]["delta_embedding"].mul_(100)
    moved = np.linalg.norm(form_of(llama).embeds - holder._base.weight[[4, 5, 6]].detach().numpy(), axis=1)
    np.testing.assert_allclose(
        moved, np.array([30.0, 20.0, 0.0]) * math.sqrt(32 / 2048), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("pooled", ["input", "prompt"])
def test_an_encoder_pools_the_right_token(tiny_bert: Path, pooled: str) -> None:
    """A classifier's pooled token is the model's own first one, behind the prompt; or the first virtual one,
    where the config says so.
    """
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    plain = copy.deepcopy(model).double()
    ap.adapt(model, ap.PromptTuning(num_virtual_tokens=3, init="random", pooled=pooled), "p")
    first = torch.tensor(form_of(model).embeds)
    for row in ROWS:
        inputs = torch.cat([first, plain.get_input_embeddings()(torch.tensor(row))])[None]
        hidden = plain.bert(inputs_embeds=inputs).last_hidden_state[:, 3 if pooled == "input" else 0 :]
        expected = plain.classifier(plain.bert.pooler(hidden))
        np.testing.assert_allclose(
            model(torch.tensor([row])).logits.detach(), expected.detach(), rtol=0, atol=1e-6
        )
    batch, kinds = padded(ROWS), torch.zeros(3, 7, dtype=torch.int64)
    kinds[:, 2:] = 1
    together = model(**batch, token_type_ids=kinds).logits
    for number, row in enumerate(ROWS):
        alone = model(torch.tensor([row]), token_type_ids=kinds[number : number + 1, : len(row)]).logits[0]
        np.testing.assert_allclose(together[number].detach(), alone.detach(), rtol=0, atol=1e-6)


def test_an_encoder_takes_keys_and_values(tiny_bert: Path) -> None:
    """Prefix tuning of a BERT: rows of a padded batch equal single rows, and with the prompt off all is as
    before.
    """
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    before = model(**padded(ROWS)).logits
    prompted(model, "prefix")
    together = model(**padded(ROWS)).logits
    assert (together - before).abs().max() > 1e-3
    for number, row in enumerate(ROWS):
        np.testing.assert_allclose(
            together[number].detach(), model(torch.tensor([row])).logits[0].detach(), rtol=0, atol=1e-6
        )
    assert torch.equal(ap.active(model, None)(**padded(ROWS)).logits, before)


# --- generation and training


@EVERY
def test_generation_counts_the_prompt_once(llama: Any, name: str) -> None:
    """Greedy and beam search on a left-padded batch give the same tokens with a cache as without, and as each
    row alone.
    """
    prompted(llama, name)
    batch, kwargs = (
        padded(ROWS, left=True),
        {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 95, "pad_token_id": 0},
    )
    for beams in (1, 3):
        found = llama.generate(**batch, **kwargs, num_beams=beams)
        assert torch.equal(found, llama.generate(**batch, **kwargs, num_beams=beams, use_cache=False))
        for number, row in enumerate(ROWS):
            assert torch.equal(
                found[number, 7:],
                llama.generate(torch.tensor([row]), **kwargs, num_beams=beams)[0, len(row) :],
            )
    with torch.no_grad():
        cache = llama(torch.tensor([ROWS[0]]), use_cache=True).cache
        step = llama(torch.tensor([[40]]), cache=cache).logits[0, -1]
    assert cache.get_seq_length() == CONFIGS[name].num_virtual_tokens + len(ROWS[0]) + 1
    np.testing.assert_allclose(step, logits(llama, [[*ROWS[0], 40]])[-1], rtol=0, atol=CLOSE)


@EVERY
def test_the_loss_is_that_of_the_real_tokens(llama: Any, name: str) -> None:
    """With labels of -100 on padding the loss is the mean cross entropy of the row's own tokens; only the
    adapter has gradients.
    """
    prompted(llama, name).train()
    batch = padded(ROWS)
    labels = torch.where(batch["attention_mask"] > 0, batch["input_ids"], -100)
    output = llama(**batch, labels=labels)
    assert output.logits.shape[:2] == labels.shape
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert math.isclose(output.loss.item(), expected.item(), rel_tol=1e-6)
    output.loss.backward()
    graded = {
        key.partition("embed_tokens.")[2] for key, value in llama.named_parameters() if value.grad is not None
    }
    holder = llama.get_input_embeddings()
    assert graded == {
        f"adapters.adapter:p.{key}"
        for key in holder._params("p")
        if key not in holder._held["p"].method.traits.frozen
    }


def test_tasks_are_chosen_by_row(llama: Any) -> None:
    """``task_ids`` gives each row the prompt of its task; without them all have the config's."""
    prompted(llama, "multitask")
    by_task = [
        torch.split(logits(llama, task_ids=torch.tensor([task] * 3)), list(map(len, ROWS))) for task in (0, 1)
    ]
    mixed = torch.split(logits(llama, task_ids=torch.tensor([1, 0, 1])), list(map(len, ROWS)))
    for row, task in enumerate((1, 0, 1)):
        np.testing.assert_allclose(mixed[row], by_task[task][row], rtol=0, atol=CLOSE)
        assert (by_task[0][row] - by_task[1][row]).abs().max() > 1e-3
    assert torch.equal(logits(llama), torch.cat(by_task[0]))


def test_checkpointing_gives_the_same_gradients_or_is_refused(llama: Any) -> None:
    """Virtual embeddings train under gradient checkpointing as without; keys and values are refused, since
    the cache would be dropped.
    """
    prompted(llama, "vocabulary").train()

    def gradient() -> torch.Tensor:
        llama.zero_grad()
        llama(**padded(ROWS), labels=padded(ROWS)["input_ids"]).loss.backward()
        return next(value.grad.clone() for value in llama.parameters() if value.grad is not None)

    plain = gradient()
    llama.gradient_checkpointing_enable()
    np.testing.assert_allclose(gradient(), plain, rtol=0, atol=1e-6)
    ap.detach(llama)
    prompted(llama, "prefix")
    with pytest.raises(Unsupported, match="checkpointing"):
        gradient()


def test_training_from_a_file_reaches_the_pack(tiny_llama: Path, tmp_path: Path) -> None:
    """A config that names the method trains: the loss falls, the text was read, the pack is valid and its
    canary holds.
    """
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"w{n}", "completion": "w40 w41"}) for n in range(8)))
    settings = {
        "model_name_or_path": str(tiny_llama),
        "train_file": str(data),
        "eval_file": str(data),
        "learning_rate": 0.05,
        "method": "prompt_tuning",
        "init": "text",
        "text": "w1 w2",
        "num_virtual_tokens": 6,
    }
    losses = []
    for steps in (1, 40):
        (pack,) = train({**settings, "max_steps": steps, "output_dir": str(tmp_path / f"pack-{steps}")})
        losses.append(pack.manifest.metrics[0]["value"])
    assert losses[1] < losses[0] - 1
    assert ap.validate(tmp_path / "pack-40", base=tiny_llama).findings == ()
    assert tuple(pack.manifest.config["token_ids"]) == (5, 6)
    model = ap.attach(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), ap.load(tmp_path / "pack-40"))
    assert verify_canary(model, ap.load(tmp_path / "pack-40")) < 1e-4


# --- in and out


@EVERY
def test_off_and_out_are_exactly_the_base(llama: Any, name: str) -> None:
    """Inactive and detached: the same bits, keys and attributes; a copy of the model is independent of it."""
    before, keys = logits(llama), list(llama.state_dict())
    with_it = logits(prompted(llama, name))
    twin = copy.deepcopy(llama)
    assert torch.equal(logits(ap.active(llama, None)), before)
    assert torch.equal(logits(twin), with_it)
    ap.detach(llama, "p")
    assert torch.equal(logits(llama), before)
    assert list(llama.state_dict()) == keys
    assert "forward" not in vars(llama.model)
    assert type(llama.get_input_embeddings()) is torch.nn.Embedding
    assert torch.equal(logits(twin), with_it)


def test_one_prompt_is_active_at_a_time(llama: Any) -> None:
    """Two prompts at once are an error that changes nothing; a prompt and a LoRA work together, also a LoRA
    on the same model first.
    """
    prompted(llama, "vocabulary")
    first = logits(llama)
    ap.adapt(llama, CONFIGS["prefix"], "q")
    second = logits(llama)
    with pytest.raises(Unsupported, match="one of these adapters"):
        ap.active(llama, ["p", "q"])
    assert torch.equal(logits(llama), second)
    assert torch.equal(logits(ap.active(llama, "p")), first)
    ap.adapt(llama, ap.LoRA(r=2), "lora")
    with torch.no_grad():
        for key, value in llama.named_parameters():
            if "lora_B" in key:
                value.fill_(0.05)
    both = logits(ap.active(llama, ["lora", "q"]))
    assert (both - second).abs().max() > 1e-3
    assert (both - logits(ap.active(llama, "lora"))).abs().max() > 1e-3
    ap.detach(llama, "lora")
    assert torch.equal(logits(ap.active(llama, "q")), second)
    assert adapter_names(llama) == ["p", "q"]


def test_what_is_refused(llama: Any, tiny_bert: Path) -> None:
    """Caches of another state or kind, masks that count the prompt, models that are none, and embeddings that
    are trained whole.
    """
    with torch.no_grad():
        foreign = llama(torch.tensor([ROWS[0]]), use_cache=True).cache
    nameless = copy.deepcopy(llama)
    nameless.config._name_or_path = ""
    prompted(llama, "prefix")
    for match, call in {
        "filled without the prompt": lambda: llama(torch.tensor([[5]]), cache=foreign),
        "cache that grows": lambda: llama.generate(
            torch.tensor([ROWS[0]]), cache_implementation="static", max_new_tokens=2
        ),
        "attention mask": lambda: llama(
            torch.tensor([ROWS[0]]), attention_mask=torch.ones(1, 8, dtype=torch.int64)
        ),
        "model of transformers": lambda: ap.adapt(
            torch.nn.Sequential(torch.nn.Linear(3, 3)), CONFIGS["prefix"]
        ),
        "input embedding": lambda: ap.adapt(
            llama, dataclasses.replace(CONFIGS["prefix"], modules_to_save=("embed_tokens",)), "r"
        ),
        "no folder": lambda: ap.adapt(nameless, CONFIGS["text"]),
    }.items():
        with pytest.raises(AdapterpackError, match=match):
            pytest.fail(f"{match}: {call()}")
    assert adapter_names(llama) == ["p"]
    for fields in (
        {"num_virtual_tokens": 0},
        {"targets": ("q_proj",)},
        {"dropout": 0.1},
        {"init": "magic"},
        {"token_ids": (-1,)},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            ap.PromptTuning(**fields)
    held = build(
        "p",
        methods()["prefix_tuning"],
        {
            PromptSite(PROMPT, 0, 0, "prompt"): (
                ap.PrefixTuning(num_virtual_tokens=1, num_layers=2, num_heads=4, head_dim=4),
                {"prompt_embeddings": np.ones((1, 64), np.float32)},
            )
        },
        task=m.PackTask("text-generation"),
        base=m.Base(),
    )
    ap.detach(llama)
    sizes = {"key": (1, 16), "value": (1, 8)}
    latent = {
        f"past_key_values.{layer}.{side}": SimpleNamespace(shape=["batch", heads, "past", width])
        for layer in range(2)
        for side, (heads, width) in sizes.items()
    }
    with pytest.raises(Unsupported, match="several sizes"):
        prompt_kv(held, Path(), latent)
    with pytest.raises(BaseMismatch, match="other sizes"):
        ap.attach(llama, held)
    assert adapter_names(llama) == []
    assert "forward" not in vars(llama.model)


# --- packs, and PEFT


@EVERY
def test_a_pack_is_valid_and_gives_the_same_model(
    llama: Any, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    """Saved, validated in full, attached: the same logits and canary; the prompt alone is stored; merge,
    compose and others refuse.
    """
    expected = logits(prompted(llama, name))
    pack = ap.save(llama, tmp_path / "pack", base=tiny_llama)
    assert ap.validate(tmp_path / "pack", base=tiny_llama, full=True).findings == ()
    assert [group.path for group in pack.manifest.groups] == [PROMPT]
    assert set(pack.tensors) <= {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}
    other = ap.attach(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), ap.load(tmp_path / "pack"))
    np.testing.assert_allclose(logits(other), expected, rtol=0, atol=CLOSE)
    assert verify_canary(other, ap.load(tmp_path / "pack")) < 1e-4
    assert ap.save(other, None, base=tiny_llama, name="again").tensors.keys() == pack.tensors.keys()
    with pytest.raises(Unsupported, match="does not act on weights"):
        ap.merge(tiny_llama, [pack], tmp_path / "merged")
    for form, match in (("onnx_adapter", "has none"), ("gguf", "low-rank factors")):
        with pytest.raises(Unsupported, match=match):
            ap.convert(tmp_path / "pack", tmp_path / f"{form}.out", to=form, base=tiny_llama)
    with pytest.raises(Unsupported, match="cannot be combined"):
        ap.compose([pack, pack.renamed("other")], rule="linear", out=tmp_path / "composed")


def test_a_prompt_is_the_one_site_of_its_kind(llama: Any, tmp_path: Path) -> None:
    """A manifest that puts a prompt at a module is refused by the validator, by rule; no other path stands
    for the model.
    """
    site = PromptSite("model.layers.0", 4, 0, "prompt")
    pack = build(
        "p",
        methods()["prompt_tuning"]._replace(peft=None),
        {site: (ap.PromptTuning(num_virtual_tokens=1), {"prompt_embeddings": np.ones((1, 4), np.float32)})},
        task=m.PackTask("text-generation"),
        base=m.Base("org/base"),
    )
    pack.write(tmp_path / "pack")
    assert "AP405" in [finding.rule for finding in ap.validate(tmp_path / "pack").findings]
    factors = {"lora_A": np.ones((1, 32)), "lora_B": np.ones((32, 1))}
    stray = build(
        "p",
        methods()["lora"],
        {Site("@other", 32, 32): (ap.LoRA(r=1), factors)},
        task=m.PackTask("text-generation"),
        base=m.Base(),
    )
    with pytest.raises(SiteNotFound, match="@other"):
        ap.attach(llama, stray)


PEFT: dict[str, Callable[[], Any]] = {
    "vocabulary": lambda: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=9
    ),
    "p-tuning lstm": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=9,
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "projected prefix": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=9
    ),
    "cartridge": lambda: peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=2
    ),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2
    ),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[4, 5, 6], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]
    ),
}


def peft_logits(model: Any, name: str) -> torch.Tensor:
    """The real positions; PEFT leaves the virtual ones of a prompt of embeddings in front."""
    batch = padded(ROWS)
    more = {"task_ids": torch.zeros(3, dtype=torch.int64)} if name == "multitask" else {}
    with torch.no_grad():
        return model(**batch, **more).logits[:, -7:][batch["attention_mask"] > 0]


@pytest.mark.parametrize("name", PEFT)
def test_a_folder_of_peft_gives_pefts_outputs(
    llama: Any, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    """Made, moved and saved by PEFT, with its network still in place there: read here, the same logits within
    2e-5.
    """
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), PEFT[name]()).eval()
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = peft_logits(theirs, name)
    theirs.save_pretrained(tmp_path / "peft")
    found = logits(ap.attach(llama, ap.load(tmp_path / "peft"), check_base=False))
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


@EVERY
def test_our_folder_gives_our_outputs_in_peft(
    llama: Any, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    """Packed here, read by PEFT: the same logits within 2e-5."""
    expected = logits(prompted(llama, name))
    ap.save(llama, tmp_path / "pack", base=tiny_llama)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "pack"
    ).eval()
    np.testing.assert_allclose(peft_logits(theirs, name), expected, rtol=0, atol=CLOSE)


def test_a_classifier_of_peft(tiny_bert: Path, tmp_path: Path) -> None:
    """PEFT pools the first virtual token, and so does a pack read from it; ours, which pools the model's own,
    has no face for PEFT.
    """
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        expected = theirs(**padded(ROWS)).logits
    theirs.save_pretrained(tmp_path / "peft")
    pack = ap.load(tmp_path / "peft")
    assert list(pack.full()) == ["classifier"]
    found = ap.attach(copy.deepcopy(base), pack, check_base=False)
    np.testing.assert_allclose(found(**padded(ROWS)).logits.detach(), expected, rtol=0, atol=CLOSE)
    back = ap.save(found, tmp_path / "back", base=tiny_bert)
    assert (tmp_path / "back" / "adapter_config.json").is_file()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    np.testing.assert_allclose(again(**padded(ROWS)).logits.detach(), expected, rtol=0, atol=CLOSE)
    assert set(back.tensors) == {
        "prompt_embeddings",
        "base_model.classifier.weight",
        "base_model.classifier.bias",
    }
    own = ap.adapt(copy.deepcopy(base), ap.PromptTuning(num_virtual_tokens=3), "own")
    ap.save(own, tmp_path / "own", base=tiny_bert)
    assert not (tmp_path / "own" / "adapter_config.json").exists()
