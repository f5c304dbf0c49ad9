"""The PEFT face of a pack, beside PEFT itself: it loads ours, we load its, and both are the dense float64
formula.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from msgspec.structs import replace
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.errors import (
    AdapterpackError,
    FormatError,
    NonFinite,
    SiteNotFound,
    UnknownMethod,
    Unsupported,
)
from adapterpack.io import safetensors
from adapterpack.manifest import manifest as m
from adapterpack.pack import from_peft
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.validate.validation import load, validate
from adapterpack.peft import layout
from adapterpack.peft.patterns import is_expression

FP32 = 1e-5
"""Absolute: float32 forward passes of two layers with outputs of about 1 move by some 1e-6 against
float64.
"""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def llama() -> torch.nn.Module:
    """A random Llama of two layers with grouped keys, no bias."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> torch.nn.Module:
    """A random BERT classifier of two layers, with biases and three labels."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


class Nested(torch.nn.Module):
    """One path is the end of another: `q` and `inner.q`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.q, self.inner = (
            torch.nn.Linear(16, 16),
            torch.nn.ModuleDict({"q": torch.nn.Linear(16, 16), "zq": torch.nn.Linear(16, 16)}),
        )

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = torch.nn.functional.one_hot(input_ids % 16, 16).to(self.q.weight.dtype)
        return self.inner["zq"](torch.tanh(self.inner["q"](torch.tanh(self.q(x)))))


def nested() -> torch.nn.Module:
    return Nested()


def logits(model: torch.nn.Module) -> np.ndarray:
    """The outputs on two fixed rows, as float64."""
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    with torch.no_grad():
        out = model(input_ids=ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).double().numpy()


def dense(model: torch.nn.Module, pack: Pack) -> torch.nn.Module:
    """The formula in float64, from the manifest's own numbers: W + scale * B A at every site, and the modules
    trained whole.
    """
    adapted = copy.deepcopy(model).double()
    tensors = {name: torch.tensor(np.asarray(value, np.float64)) for name, value in pack.tensors.items()}
    for group in pack.manifest.groups:
        module = adapted.get_submodule(group.path)
        held = {
            entry.param: tensors[name]
            for name, entry in pack.manifest.tensors.items()
            if entry.group == group.path
        }
        with torch.no_grad():
            if group.role == "full":
                for param, value in held.items():
                    module.get_parameter(param).copy_(value)
            else:
                module.weight += group.scale * held["lora_B"] @ held["lora_A"]
    return adapted


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Every linear layer but the heads."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {path: module for path, module in found.items() if path not in {"lm_head", "classifier"}}


TASKS = {
    LlamaForCausalLM: "text-generation",
    BertForSequenceClassification: "text-classification",
    Nested: "image-classification",
}
CONFIGS: dict[str, Callable[[int], LoRA]] = {
    "one config": lambda i: LoRA(r=3, alpha=5),
    "rsLoRA": lambda i: LoRA(r=3, alpha=5, use_rslora=True),
    "ranks and alphas by site": lambda i: LoRA(r=1 + i % 4, alpha=2 + i % 3),
    "rsLoRA at some sites": lambda i: LoRA(r=1 + i % 4, alpha=2 + i % 3, use_rslora=i % 2 == 1),
    "plain after rsLoRA": lambda i: LoRA(r=1 + i % 4, alpha=2 + i % 3, use_rslora=i % 2 == 0),
}


def our_pack(model: torch.nn.Module, config: Callable[[int], LoRA]) -> Pack:
    """Random adapters at every linear layer, and a trained head where the model has one."""
    rng = np.random.default_rng(3)
    adapters = {}
    for i, (path, module) in enumerate(linears(model).items()):
        cfg = config(i)
        params = {
            "lora_A": rng.normal(size=(cfg.r, module.in_features)),
            "lora_B": rng.normal(size=(module.out_features, cfg.r)),
        }
        adapters[Site(path, module.in_features, module.out_features, bias=module.bias is not None)] = (
            cfg,
            {name: (0.2 * value).astype(np.float32) for name, value in params.items()},
        )
    head = {
        "weight": rng.normal(size=(3, 16)).astype(np.float32),
        "bias": rng.normal(size=3).astype(np.float32),
    }
    full = {"classifier": head} if isinstance(model, BertForSequenceClassification) else {}
    return build(
        "ours", get("lora"), adapters, task=m.PackTask(TASKS[type(model)]), base=m.Base("org/base"), full=full
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("make", [llama, bert, nested], ids=lambda make: make.__name__)
def test_peft_loads_our_pack_and_gives_the_dense_formula(
    make: Callable[[], torch.nn.Module], config: str, tmp_path: Path
) -> None:
    """PEFT(base, our folder)(x) == dense float64 formula within 1e-5, with no key missing; ours read as
    PEFT's has the same scales.
    """
    model = make()
    pack = our_pack(model, CONFIGS[config]).write(tmp_path / "ours")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert not [warning for warning in said if "key" in str(warning.message)]
    expected = logits(dense(model, pack))
    assert np.abs(expected - logits(copy.deepcopy(model).double())).max() > 0.05, "the adapter does something"
    np.testing.assert_allclose(logits(theirs), expected, rtol=0, atol=FP32)
    again = from_peft.read(tmp_path / "ours")
    scales = {group.path: group.scale for group in pack.manifest.groups if group.role == "adapter"}
    assert {
        group.path: group.scale for group in again.manifest.groups if group.role == "adapter"
    } == pytest.approx(scales, rel=1e-15)
    assert {name: value.tobytes() for name, value in again.tensors.items()} == {
        n: value.tobytes() for n, value in pack.tensors.items()
    }


QV = ["q_proj", "v_proj"]
THEIRS: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "LoRA": (llama, {"r": 3, "lora_alpha": 5, "target_modules": QV, "task_type": "CAUSAL_LM"}),
    "rsLoRA": (llama, {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": QV}),
    "all linear, gaussian": (
        llama,
        {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "init_lora_weights": "gaussian"},
    ),
    "patterns": (
        llama,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": QV,
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 7, "v_proj": 11},
        },
    ),
    "a pattern that hides another": (
        llama,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["k_proj", "v_proj"],
            "alpha_pattern": {"k_proj": 2, "layers.1.self_attn.k_proj": 40},
        },
    ),
    "a pattern that PEFT hides from itself": (
        llama,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": QV,
            "alpha_pattern": {"v_proj": 2, "layers.1.self_attn.v_proj": 40},
        },
    ),
    "the longer pattern first": (
        llama,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": QV,
            "alpha_pattern": {"layers.1.self_attn.v_proj": 40, "v_proj": 2},
        },
    ),
    "anchored and escaped patterns": (
        llama,
        {
            "r": 3,
            "target_modules": QV,
            "use_rslora": True,
            "rank_pattern": {r"^model\.layers\.1\.self_attn\.v_proj": 5, "^q_proj": 7},
        },
    ),
    "a part of a name is no match": (
        llama,
        {"r": 3, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"proj": 5, "p_proj": 2}},
    ),
    "some layers": (llama, {"r": 3, "target_modules": QV, "layers_to_transform": [1], "lora_dropout": 0.1}),
    "head": (bert, {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "pooler and head": (
        bert,
        {"r": 2, "target_modules": ["key"], "modules_to_save": ["classifier", "pooler"]},
    ),
    "one path ends another": (
        nested,
        {
            "r": 2,
            "target_modules": ["q", "zq"],
            "rank_pattern": {"inner.q": 3, "^q": 4},
            "alpha_pattern": {"q": 3},
        },
    ),
}


def their_model(
    make: Callable[[], torch.nn.Module], options: dict[str, Any], config: Any = peft.LoraConfig
) -> Any:
    """A PEFT model whose trained tensors are all random."""
    model = peft.get_peft_model(make(), config(**options))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and "original_module" not in name:
                value.copy_(0.3 * torch.randn_like(value))
    return model.eval()


@pytest.mark.parametrize("label", THEIRS)
def test_a_folder_that_peft_wrote_is_imported_exactly(label: str, tmp_path: Path) -> None:
    """At every site scale * B A equals PEFT's own, in float64 to 1e-15; the dense model gives PEFT's outputs;
    written again it loads.

    The oracle is the folder as PEFT reads it back: it takes the first pattern that fits and sorts them when
    it saves, so that a model with overlapping patterns is another one after its own save and load.
    """
    make, options = THEIRS[label]
    their_model(make, options).save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    pack = load(tmp_path / "theirs")
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    adapters = {adapter.site.path: adapter for adapter in pack.adapters()}
    assert set(adapters) == set(layers)
    for path, layer in layers.items():
        A, B = (
            layer.lora_A["default"].weight.detach().double().numpy(),
            layer.lora_B["default"].weight.detach().double().numpy(),
        )
        ours = adapters[path]
        change = (
            ours.config.scale
            * ours.params["lora_B"].astype(np.float64)
            @ ours.params["lora_A"].astype(np.float64)
        )
        np.testing.assert_allclose(change, layer.scaling["default"] * B @ A, rtol=0, atol=1e-15)
    np.testing.assert_allclose(logits(theirs), logits(dense(make(), pack)), rtol=0, atol=FP32)
    written = pack.write(tmp_path / "written")
    assert load(tmp_path / "written").id == written.id == pack.id
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "written").eval()
    np.testing.assert_allclose(logits(again), logits(theirs), rtol=0, atol=FP32)


def test_a_trained_head_keeps_its_module_names(tmp_path: Path) -> None:
    """modules_to_save comes in as groups of role full, one a module that PEFT saved, with the names of its
    inner layers.
    """
    their_model(*THEIRS["pooler and head"]).save_pretrained(tmp_path / "theirs")
    full = load(tmp_path / "theirs").full()
    assert {path: sorted(params) for path, params in full.items()} == {
        "classifier": ["bias", "weight"],
        "bert.pooler": ["dense.bias", "dense.weight"],
    }


UNSUPPORTED: dict[str, tuple[Callable[[], torch.nn.Module], Any, dict[str, Any], str]] = {
    "biases of the layers": (
        bert,
        peft.VeraConfig,
        {"target_modules": ["query"], "r": 2, "bias": "vera_only"},
        "bias",
    ),
    "PSOFT": (llama, peft.PsoftConfig, {"target_modules": QV, "r": 2}, "PSOFT"),
}


@pytest.mark.parametrize("label", UNSUPPORTED)
def test_what_peft_can_do_and_we_cannot_is_refused_in_a_sentence(label: str, tmp_path: Path) -> None:
    """Folders that PEFT itself wrote with other methods and options: Unsupported, with the option's name;
    never a wrong import.
    """
    make, config, options, words = UNSUPPORTED[label]
    their_model(make, options, config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(Unsupported, match=words) as caught:
        load(tmp_path / "theirs")
    assert str(tmp_path) in str(caught.value)
    assert [finding.rule for finding in validate(tmp_path / "theirs").findings] == ["AP001"]


def test_a_pickle_is_refused_and_not_opened(tmp_path: Path) -> None:
    """adapter_model.bin alone: refused with the way out; beside safetensors it is not looked at."""
    theirs = their_model(*THEIRS["LoRA"])
    theirs.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert (tmp_path / "pickle" / "adapter_model.bin").exists()
    with pytest.raises(Unsupported, match=r"pickle.*adapterpack convert"):
        load(tmp_path / "pickle")
    theirs.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "adapter_model.bin").write_bytes(b"\x80\x04not a pickle")
    assert load(tmp_path / "both").name == "both"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder that PEFT wrote."""
    folder = tmp_path_factory.mktemp("peft") / "theirs"
    their_model(*THEIRS["LoRA"]).save_pretrained(folder)
    return folder


def edited(saved: Path, tmp_path: Path, **values: Any) -> Path:
    """A copy of the folder with other values in its config."""
    folder = tmp_path / "edited"
    folder.mkdir()
    config = {**json.loads((saved / CONFIG).read_text()), **values}
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / TENSORS).write_bytes((saved / TENSORS).read_bytes())
    return folder


REFUSED: dict[str, tuple[dict[str, Any], type[AdapterpackError], str]] = {
    "transposed weights, as text": ({"fan_in_fan_out": "yes"}, Unsupported, "fan_in_fan_out"),
    "bare parameters as text": ({"target_parameters": "experts.gate"}, FormatError, "target_parameters"),
    "repeated layers as text": ({"layer_replication": "0-4"}, Unsupported, "layer_replication"),
    "an invocation that is no list of ids": (
        {"alora_invocation_tokens": "7"},
        FormatError,
        "alora_invocation_tokens",
    ),
    "activated DoRA": (
        {"alora_invocation_tokens": [1, 2], "use_dora": True},
        Unsupported,
        "alora_invocation_tokens",
    ),
    "QALoRA without groups": ({"use_qalora": True, "qalora_group_size": 0}, FormatError, "qalora_group_size"),
    "QALoRA with DoRA": ({"use_qalora": True, "use_dora": True}, Unsupported, "use_qalora"),
    "an option of some later version": ({"use_telepathy": True}, Unsupported, "use_telepathy"),
    "a router": ({"arrow_config": {"top_k": 2}}, Unsupported, "arrow_config"),
    "tokens without rows": (
        {"trainable_token_indices": [1, 2]},
        FormatError,
        "no tensors of its trainable_token_indices",
    ),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        Unsupported,
        "path_initial_model_for_weight_conversion",
    ),
    "OLoRA": ({"init_lora_weights": "olora"}, Unsupported, "rewrote"),
    "LoftQ": ({"init_lora_weights": "loftq"}, Unsupported, "rewrote"),
    "CorDA": ({"init_lora_weights": "corda"}, Unsupported, "rewrote"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, Unsupported, "rewrote"),
    "an unhashable initialisation": ({"init_lora_weights": ["pissa"]}, Unsupported, "rewrote"),
    "an expression for another rank than the tensors": (
        {"rank_pattern": {r".*layers\.[01].*": 4}},
        FormatError,
        "wrong shape",
    ),
    "a look-ahead": ({"alpha_pattern": {"(?=q)q_proj": 4}}, Unsupported, "bounded time"),
    "a back-reference": ({"alpha_pattern": {r"(q)\1_proj": 4}}, Unsupported, "bounded time"),
    "a repetition of repetitions": (
        {"alpha_pattern": {"((a{900}){900}){900}": 4}},
        Unsupported,
        "bounded time",
    ),
    "very many expressions": (
        {"alpha_pattern": {f"[{i}]": 4 for i in range(1025)}},
        FormatError,
        "too many keys",
    ),
    "a long expression": ({"alpha_pattern": {"[q]" * 400: 4}}, FormatError, "expression is too long"),
    "patterns as a list": ({"rank_pattern": ["q_proj"]}, FormatError, "rank_pattern"),
    "a pattern to text": ({"alpha_pattern": {"q_proj": "4"}}, FormatError, "alpha_pattern"),
    "half a rank": ({"rank_pattern": {"q_proj": 2.5}}, FormatError, "whole number"),
    "another rank than the tensors": ({"r": 4}, FormatError, "wrong shape"),
    "no rank": ({"r": 0}, FormatError, "at least 1"),
    "rank as text": ({"r": "3"}, FormatError, "whole number"),
    "rank of null": ({"r": None}, FormatError, "whole number"),
    "alpha as text": ({"lora_alpha": "5"}, FormatError, "alpha"),
    "dropout past 1": ({"lora_dropout": 2}, FormatError, "dropout"),
    "rsLoRA as text": ({"use_rslora": "no"}, FormatError, "use_rslora"),
    "no method": ({"peft_type": None}, Unsupported, "LORA"),
    "a list for a method": ({"peft_type": ["LORA"]}, Unsupported, "LORA"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_a_config_that_would_import_wrongly_is_refused(label: str, saved: Path, tmp_path: Path) -> None:
    """A real folder with one value changed: the error says which, and nothing but AdapterpackError is ever
    raised.
    """
    values, error, words = REFUSED[label]
    with pytest.raises(error, match=words):
        load(edited(saved, tmp_path, **values))


EXPRESSIONS: list[dict[str, float]] = [
    {r"layers\.[0-9]+\.self_attn\.(q|v)_proj": 9.0},
    {r".*\.1\..*": 7.0, r"q_proj": 2.0},
    {r"^model.*q_proj": 3.0, "v_proj$": 4.0},
    {"(a+)+$": 4.0},
    {"(.*a)*b|.*v_proj": 6.0},
]


@pytest.mark.parametrize("pattern", EXPRESSIONS, ids=str)
def test_expressions_mean_what_they_mean_to_peft(pattern: dict[str, float], tmp_path: Path) -> None:
    """The scale of every site is that of PEFT's own layer, also for expressions that would keep a
    backtracking engine busy for ever.
    """
    theirs = their_model(llama, {"target_modules": QV, "r": 3, "lora_alpha": 5, "alpha_pattern": pattern})
    theirs.save_pretrained(tmp_path / "theirs")
    scales = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in theirs.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    pack = load(tmp_path / "theirs")
    assert {group.path: group.scale for group in pack.manifest.groups} == pytest.approx(scales)
    assert all(
        not is_expression(dict.fromkeys(group.config.get("alpha_pattern", {}), 1))
        for group in pack.manifest.groups
    )


MALFORMED = [
    "",
    "[]",
    "null",
    "3",
    '{"peft_type": "LORA", "peft_type": "IA3"}',
    '{"r": NaN}',
    "{" * 99,
    "\ufeff{}",
    '"x"',
    "{}",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_config_that_is_no_object_is_refused(text: str, saved: Path, tmp_path: Path) -> None:
    """Malformed, doubled or of another type: a named error."""
    folder = edited(saved, tmp_path)
    (folder / CONFIG).write_text(text)
    with pytest.raises((FormatError, Unsupported), match="adapter_config"):
        load(folder)


def retensored(saved: Path, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """A copy of the folder with other tensors."""
    folder = edited(saved, tmp_path)
    file = safetensors.SafetensorsFile(folder / TENSORS, private=True)
    tensors = {name: file.read(name).copy() for name in file.tensors}
    change(tensors)
    (folder / TENSORS).unlink()
    safetensors.write(folder / TENSORS, tensors)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"
STRANGE: dict[str, tuple[Callable[[dict[str, Any]], object], type[AdapterpackError], str]] = {
    "A without B": (lambda t: t.pop(f"{Q}.lora_B.weight"), FormatError, "do not pair up"),
    "no tensors": (lambda t: t.clear(), FormatError, "no adapter tensors"),
    "another prefix": (
        lambda t: t.update({"model.x.lora_A.weight": np.ones((3, 2))}),
        FormatError,
        "does not write",
    ),
    "with and without its name": (
        lambda t: t.update({f"{Q}.lora_A.default.weight": np.ones((3, 2))}),
        FormatError,
        "two tensors.*lora_A",
    ),
    "a magnitude": (
        lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones(3)}),
        Unsupported,
        "lora_magnitude_vector",
    ),
    "a module that is no embedding": (
        lambda t: t.update({"base_model.model.score.weight": np.ones((3, 3))}),
        Unsupported,
        "score",
    ),
    "a convolution": (
        lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 16, 1, 1))}),
        FormatError,
        "wrong shape",
    ),
    "a vector": (lambda t: t.update({f"{Q}.lora_A.weight": np.ones(3)}), FormatError, "too few axes"),
    "NaN": (lambda t: t[f"{Q}.lora_A.weight"].fill(np.nan), NonFinite, "q_proj.lora_A"),
}


@pytest.mark.parametrize("label", STRANGE)
def test_tensors_that_the_config_does_not_explain_are_refused(
    label: str, saved: Path, tmp_path: Path
) -> None:
    """No tensor is dropped and none is taken for something else: the error names it."""
    change, error, words = STRANGE[label]
    with pytest.raises(error, match=words):
        load(retensored(saved, tmp_path, change))


@pytest.mark.parametrize(
    "hint",
    [
        "/home/someone/secret-project/base",
        "./secret-project",
        "../secret-project",
        "~/secret-project",
        "C:\\secret-project",
        "C:/secret-project",
        "a/secret-project/b",
        "secret-project/",
        "file:///secret-project",
        "https://host/secret-project",
        "secret-project base",
        "",
        None,
        5,
        "x" * 300 + "secret-project",
        ".secret-project",
    ],
)
def test_a_local_base_path_never_gets_into_a_manifest(hint: Any, saved: Path, tmp_path: Path) -> None:
    """Neither the manifest nor the PEFT file that is derived from it holds a path of somebody's disk."""
    pack = load(edited(saved, tmp_path, base_model_name_or_path=hint))
    assert pack.manifest.base == m.Base()
    pack.write(tmp_path / "out")
    assert all(b"secret" not in path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert rules_of(tmp_path / "out") == []


def rules_of(folder: Path) -> list[str]:
    return [finding.rule for finding in validate(folder).findings if finding.severity == "error"]


def test_a_hub_name_and_a_commit_are_kept_as_hints(saved: Path, tmp_path: Path) -> None:
    """org/name and a full commit come in; a branch name is no commit."""
    folder = edited(saved, tmp_path, base_model_name_or_path="org/some.model-1_b", revision="c" * 40)
    assert load(folder).manifest.base == m.Base("org/some.model-1_b", "c" * 40)
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("c" * 40, "main"))
    assert load(folder).manifest.base == m.Base("org/some.model-1_b")


NAMES = {"check point (3)": "check-point-3", ".hidden": "hidden", "\u00e9": "adapter", "ok-1.2": "ok-1.2"}


@pytest.mark.parametrize(("folder", "name"), NAMES.items())
def test_a_folder_of_any_name_imports_as_a_pack_that_can_be_written(
    folder: str, name: str, saved: Path, tmp_path: Path
) -> None:
    """The pack's name is the folder's in plain characters; load(..., name=) gives another."""
    edited(saved, tmp_path).rename(tmp_path / folder)
    pack = load(tmp_path / folder)
    assert pack.name == name
    pack.write(tmp_path / "out")
    assert rules_of(tmp_path / "out") == []
    assert load(tmp_path / folder, name="other").name == "other"


def test_a_report_on_a_peft_folder_says_what_it_could_not_check(saved: Path, tmp_path: Path) -> None:
    """Kind, open questions, and the base compared by its shapes when it is named."""
    report = validate(saved)
    assert (report.kind, report.valid, report.findings) == ("peft", True, ())
    assert "digests" in report.not_checked[0] and "--base" in report.not_checked[1]
    llama().save_pretrained(tmp_path / "llama")
    bert().save_pretrained(tmp_path / "bert")
    assert validate(saved, tmp_path / "llama").valid
    (finding,) = validate(saved, tmp_path / "bert").findings
    assert (finding.rule, finding.error) == ("AP701", SiteNotFound)


def test_the_folder_is_not_changed_by_being_read(saved: Path) -> None:
    """Import reads: the bytes on disk are the same afterwards."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    load(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_method_that_peft_does_not_know_has_no_peft_face(tmp_path: Path) -> None:
    """A manifest of a method that is not registered cannot even be derived: UnknownMethod, not a wrong
    file.
    """
    model = nested()
    manifest = our_pack(model, CONFIGS["one config"]).manifest
    with pytest.raises(UnknownMethod):
        layout.config_bytes(replace(manifest, method=m.MethodRef("nothing")))
    assert (
        layout.config_bytes(
            replace(manifest, quantization={"scheme": "int8", "max_error": 0.0, "relative_error": 0.0})
        )
        is None
    )
