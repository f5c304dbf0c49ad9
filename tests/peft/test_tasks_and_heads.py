"""The task and the trained heads of PEFT's folders: what PEFT makes of them decides how it wraps a model and
which modules it looks for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from noise import shake
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoder

from adapterpack import LoRA, adapt, attach, convert, load, merge, save, validate
from adapterpack.errors import Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.peft import layout

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = 1e-6
"""Outputs of about one, after two layers."""
CONFIG = "adapter_config.json"
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
    "type_vocab_size": 2,
}
IDS = torch.tensor([[0, 3, 9, 4, 11, 5], [0, 9, 2, 6, 5, 3]])


def shaken(model: Any) -> Any:
    """The model with all that is trained moved."""
    return shake(model, 0.3, 4).eval()


def made(architecture: str, **more: Any) -> Any:
    """A random model of transformers by its class."""
    torch.manual_seed(1)
    cls = getattr(hf, architecture)
    return cls(cls.config_class(**SIZES, **more)).eval()


class Plain(nn.Module):
    """No model of transformers: it takes numbers by position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.lin0, self.lin1 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., 6]`` -> ``[..., 3]``."""
        out: torch.Tensor = self.lin1(torch.tanh(self.lin0(x)))
        return out


def task_of(folder: Path) -> Any:
    """What PEFT reads as the task."""
    return json.loads((folder / CONFIG).read_text())["task_type"]


def test_no_task_is_invented(tmp_path: Path) -> None:
    """A folder without a task and an adapter of a plain module give PEFT folders without one: PEFT calls the
    module as it is called.
    """
    numbers = torch.randn(5, 6, generator=torch.Generator().manual_seed(6))
    theirs = shaken(peft.get_peft_model(Plain(), peft.LoraConfig(r=2, target_modules=["lin0", "lin1"])))
    theirs.save_pretrained(tmp_path / "theirs")
    pack = convert(tmp_path / "theirs", tmp_path / "pack", to="pack").pack
    assert pack.manifest.task == m.PackTask("other")
    convert(pack, tmp_path / "back", to="peft")
    save(attach(Plain(), pack), tmp_path / "saved")
    for name in ("pack", "back", "saved"):
        assert task_of(tmp_path / name) is None
        found = peft.PeftModel.from_pretrained(Plain(), tmp_path / name)
        torch.testing.assert_close(found(numbers), theirs(numbers), rtol=0, atol=FP32)
    assert validate(tmp_path / "saved").findings == ()


def vision() -> nn.Module:
    """An encoder of hidden states, which has a config and is no model of its own."""
    torch.manual_seed(6)
    return CLIPEncoder(
        hf.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ).eval()


def speech() -> nn.Module:
    """A model of transformers that gives features of sound."""
    torch.manual_seed(7)
    return hf.Wav2Vec2Model(
        hf.Wav2Vec2Config(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            conv_dim=(8, 8),
            conv_kernel=(4, 3),
            conv_stride=(2, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            vocab_size=9,
        )
    ).eval()


@pytest.mark.parametrize(
    ("make", "keyword", "shape"), [(vision, "inputs_embeds", (2, 5, 16)), (speech, "input_values", (2, 90))]
)
def test_a_model_that_takes_no_ids_has_no_task_of_peft(
    make: Callable[[], nn.Module], keyword: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """PEFT's wrapper for features calls a model with ids; without a task it passes on what it is called
    with.
    """
    values = {keyword: torch.randn(shape, generator=torch.Generator().manual_seed(6))}
    adapted = shaken(adapt(make(), LoRA(r=2, targets=("q_proj",))))
    save(adapted, tmp_path / "saved")
    assert task_of(tmp_path / "saved") is None
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "saved").eval()
    torch.testing.assert_close(theirs(**values)[0], adapted(**values)[0], rtol=0, atol=FP32)


def test_a_task_that_is_named_stays(tmp_path: Path) -> None:
    """A text encoder's features, a classifier, a language model, and what PEFT's folder says; a pack that
    holds such a task, too.
    """
    for architecture, wanted in (
        ("BertModel", "FEATURE_EXTRACTION"),
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("LlamaForCausalLM", "CAUSAL_LM"),
    ):
        save(adapt(made(architecture), LoRA(r=2, targets="all-linear")), tmp_path / wanted)
        assert task_of(tmp_path / wanted) == wanted
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    peft.get_peft_model(made("BertModel"), config).save_pretrained(tmp_path / "theirs")
    pack = load(tmp_path / "theirs").write(tmp_path / "pack")
    assert (pack.manifest.task, task_of(tmp_path / "pack")) == (
        m.PackTask("feature-extraction"),
        "FEATURE_EXTRACTION",
    )
    assert json.loads(layout.config_bytes(pack.manifest) or b"")["task_type"] == "FEATURE_EXTRACTION"


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_without_a_task_the_base_says_whether_a_table_is_the_head(task: str | None, tmp_path: Path) -> None:
    """A tied table with an adapter: merged, it would change the head, too, whatever PEFT's folder says of a
    task.
    """
    model = made("LlamaForCausalLM", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type=task)
    shaken(peft.get_peft_model(model, config)).save_pretrained(
        tmp_path / "theirs", save_embedding_layers=False
    )
    with pytest.raises(Unsupported, match="embedding and the output head at once"):
        merge(tmp_path / "base", [tmp_path / "theirs"], tmp_path / "merged")


HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "RobertaForSequenceClassification": ("SEQ_CLS", "classifier", {}),
    "BigBirdForSequenceClassification": ("SEQ_CLS", "classifier", {"attention_type": "original_full"}),
    "ElectraForSequenceClassification": ("SEQ_CLS", "classifier", {"embedding_size": 16}),
    "RobertaForTokenClassification": ("TOKEN_CLS", "classifier", {}),
    "LayoutLMv3ForQuestionAnswering": (
        "QUESTION_ANS",
        "qa_outputs",
        {"coordinate_size": 2, "shape_size": 4, "visual_embed": False},
    ),
    "BertForQuestionAnswering": ("QUESTION_ANS", "qa_outputs", {}),
}
"""Class of transformers -> PEFT's task, the head that PEFT adds by itself, and more of the config. Some heads
are several layers.
"""


@pytest.mark.parametrize("architecture", HEADS)
def test_a_head_comes_back_whole(architecture: str, tmp_path: Path) -> None:
    """PEFT's folder as a pack and as PEFT's again, with the base and without: PEFT loads the very tensors,
    and all give its outputs.
    """
    task, head, more = HEADS[architecture]
    theirs = shaken(
        peft.get_peft_model(
            made(architecture, **more), peft.LoraConfig(r=2, target_modules=["query"], task_type=task)
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    made(architecture, **more).save_pretrained(tmp_path / "base")
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack")
    convert(tmp_path / "theirs", tmp_path / "bound", to="pack", base=tmp_path / "base")
    convert(tmp_path / "pack", tmp_path / "back", to="peft")
    pack = load(tmp_path / "pack")
    assert [group.path for group in pack.manifest.groups if group.role == "full"] == [head]
    for name in ("pack", "bound", "back"):
        found = peft.PeftModel.from_pretrained(made(architecture, **more), tmp_path / name).state_dict()
        assert found.keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, found[key]) for key, value in theirs.state_dict().items())
    merge(tmp_path / "base", [pack], tmp_path / "merged", durable=False)
    for model in (
        attach(made(architecture, **more), pack),
        getattr(hf, architecture).from_pretrained(tmp_path / "merged").eval(),
    ):
        torch.testing.assert_close(model(input_ids=IDS)[0], theirs(input_ids=IDS)[0], rtol=0, atol=FP32)


OLD = {
    "BertForSequenceClassification": "SEQ_CLS",
    "GPT2ForSequenceClassification": "SEQ_CLS",
    "DistilBertForSequenceClassification": "SEQ_CLS",
    "BertForTokenClassification": "TOKEN_CLS",
    "BertForQuestionAnswering": "QUESTION_ANS",
}


@pytest.mark.parametrize("architecture", OLD)
def test_the_head_that_peft_adds_by_itself_is_read_where_the_configuration_does_not_name_it(
    architecture: str, tmp_path: Path
) -> None:
    """What PEFT up to 0.8 wrote, with and without the adapter's name in the tensors' names: attached, merged,
    and read again by PEFT.
    """
    make = partial(made, architecture)
    target = {"GPT2ForSequenceClassification": "c_attn", "DistilBertForSequenceClassification": "q_lin"}.get(
        architecture, "query"
    )
    make().save_pretrained(tmp_path / "base")
    theirs = shaken(
        peft.get_peft_model(
            make(), peft.LoraConfig(task_type=OLD[architecture], target_modules=[target], r=2)
        )
    )
    theirs.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / CONFIG).read_text())
    (tmp_path / "old" / CONFIG).write_text(json.dumps({**config, "modules_to_save": None}))
    wanted = _said(theirs)
    assert (_said(make()) - wanted).abs().max() > 0.01
    tensors = load_file(tmp_path / "old" / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "old", tmp_path / "named")
    save_file(
        {
            name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): value
            for name, value in tensors.items()
        },
        tmp_path / "named" / "adapter_model.safetensors",
        {"format": "pt"},
    )
    for name in ("old", "named"):
        _require_peft(make, tmp_path / name, tmp_path / "base", wanted)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "RobertaForTokenClassification"])
def test_all_biases_reach_norms_and_layers_that_are_not_adapted(architecture: str, tmp_path: Path) -> None:
    make, task = partial(made, architecture), "SEQ_CLS" if "Sequence" in architecture else "TOKEN_CLS"
    make().save_pretrained(tmp_path / "base")
    theirs = shaken(
        peft.get_peft_model(
            make(), peft.LoraConfig(task_type=task, target_modules=["query"], r=2, bias="all")
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert any(
        "LayerNorm.bias" in name for name in load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    )
    _require_peft(make, tmp_path / "theirs", tmp_path / "base", _said(theirs))


def _require_peft(make: Callable[[], Any], folder: Path, base: Path, wanted: torch.Tensor) -> None:
    """The folder is valid, and gives PEFT's outputs when it is attached, merged, and converted and read by
    PEFT again.
    """
    assert validate(folder).valid
    torch.testing.assert_close(_said(attach(make(), load(folder))), wanted, rtol=0, atol=FP32)
    merged, pack = (folder.parent / f"{folder.name}-{what}" for what in ("merged", "pack"))
    merge(base, [folder], merged)
    torch.testing.assert_close(_said(type(make()).from_pretrained(merged).eval()), wanted, rtol=0, atol=FP32)
    convert(folder, pack, to="pack", base=base)
    torch.testing.assert_close(
        _said(peft.PeftModel.from_pretrained(make(), pack).eval()), wanted, rtol=0, atol=FP32
    )


def _said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        said = model(input_ids=IDS)
    return torch.cat(
        [
            said[name].flatten()
            for name in ("logits", "start_logits", "end_logits")
            if said.get(name) is not None
        ]
    )
