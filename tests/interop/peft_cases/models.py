"""The models that PEFT's tests name: tiny random ones of the same families instead of a hub's, and the plain
modules of the tests.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from families import FAMILIES, WIDTH, WORDS, Family, image
from safetensors.torch import load_model, save_model
from torch import nn

ROOM = 128
"""Tokens in the vocabulary, since PEFT's tests train some beyond the first fifty, and positions, since
prompts are long.
"""
_ROOMY = ("vocab_size", "n_positions", "max_position_embeddings")
ROWS = ([1, 5, 17, 9, 30, 2, 23], [4, 11, 1, 8, 3])
"""Two texts of different lengths, each a batch of its own: how far a row is padded changes what PEFT computes
for prompts. Token 1 is the invocation of the tests' aLoRAs.
"""

_MORE: dict[str, Family] = {
    # as on the hub
    "llama": FAMILIES["llama"]._replace(
        fields={**FAMILIES["llama"].fields, "attention_bias": False, "mlp_bias": False}
    ),
    # else PEFT has no prompts for it
    "opt": FAMILIES["opt"]._replace(fields={**FAMILIES["opt"].fields, "word_embed_proj_dim": WIDTH}),
    "gptj": Family(
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 3,
            "rotary_dim": 4,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        dict,
    ),
    "deberta": Family(
        "DebertaModel",
        "DebertaConfig",
        {**FAMILIES["deberta_v2"].fields, "pos_att_type": ["p2c", "c2p"], "position_buckets": -1},
        dict,
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **FAMILIES["llama"].fields,
            "num_local_experts": 3,
            "head_dim": 8,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 40,
            "attention_bias": False,
            "interleave_moe_layer_step": 1,
        },
        dict,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**FAMILIES["llama"].fields, "num_local_experts": 3, "num_experts_per_tok": 2},
        dict,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**FAMILIES["qwen3"].fields, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        dict,
    ),
    "resnet": Family(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 10, "hidden_sizes": [10, 20], "depths": [1, 1], "num_labels": 3},
        dict,
    ),
    "clip_text": Family("CLIPTextModel", "CLIPTextConfig", FAMILIES["clip"].fields["text_config"], dict),
}
_NAMED = (
    ("gemma-?3", "gemma3"),
    ("gemma-?2", "gemma2"),
    ("llama-?4", "llama4"),
    ("gpt-?oss", "gpt_oss"),
    ("qwen-?3-?moe", "qwen3_moe"),
    ("qwen-?3", "qwen3"),
    ("qwen-?2", "qwen2"),
    ("mixtral", "mixtral"),
    ("mistral|zephyr", "mistral"),
    ("gpt-?neox", "gpt_neox"),
    ("gptj", "gptj"),
    ("gpt-?2", "gpt2"),
    ("opt-|optfor", "opt"),
    ("bloom", "bloom"),
    ("falcon-?7b", "falcon"),
    ("llama", "llama"),
    ("deberta-?v2", "deberta_v2"),
    ("deberta", "deberta"),
    ("roberta", "roberta"),
    ("bert", "bert"),
    ("t5", "t5"),
    ("bart", "bart"),
    ("whisper", "whisper"),
    ("resnet", "resnet"),
    ("vit-", "vit"),
    ("clip-text|sd-pipe", "clip_text"),
)
"""What names a family in a model's name on a hub, the first that is found -> the family."""
_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_IMAGES = {"resnet": 16, "vit": 8}


class Model(Protocol):
    """A model of a test: its name, its folder as a checkpoint, and a fresh copy of it."""

    name: str

    @property
    def folder(self) -> Path: ...

    def load(self, folder: Path | None = None) -> nn.Module:
        """A fresh copy; with ``folder``, with the weights that lie there."""

    def outputs(self, model: nn.Module) -> list[torch.Tensor]:
        """What a model, adapted or not, says of the inputs."""

    def alone(self, model: nn.Module) -> list[torch.Tensor]:
        """The same of each row by itself."""


class Pretrained:
    """A tiny random model of transformers, of the family that a hub's name tells, with the head of a task."""

    def __init__(self, family: str, task: str | None) -> None:
        self._family, self._head = (FAMILIES | _MORE)[family], _HEADS.get(task or "")
        self._kind = family
        self.name = family if self._head is None else f"{family} {task}"

    @property
    def _class(self) -> Any:
        return getattr(transformers, self._head or self._family.model)

    @property
    def folder(self) -> Path:
        """The checkpoint, made when first asked for."""
        return _folder(f"{self._kind}-{self._head}", self._save)

    def _save(self, folder: Path) -> None:
        torch.manual_seed(3)
        fields = {**self._family.fields, **{name: ROOM for name in _ROOMY if name in self._family.fields}}
        if self._head == _HEADS["QUESTION_ANS"]:
            fields["num_labels"] = 2  # a span's two ends
        config = getattr(transformers, self._family.config)(**fields)
        model = self._class.from_config(config) if self._head else self._class(config)
        shaken(model, 0.15).save_pretrained(folder)

    def load(self, folder: Path | None = None) -> nn.Module:
        model: nn.Module = self._class.from_pretrained(folder or self.folder, dtype=torch.float32).eval()
        return model

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[torch.Tensor]:
        said = [model(**inputs) for inputs in self._inputs()]
        names = ("logits", "last_hidden_state", "start_logits", "end_logits")
        return [out[name].float() for out in said for name in names if out.get(name) is not None]

    alone = outputs

    def _inputs(self) -> Iterator[dict[str, torch.Tensor]]:
        if self._kind in _IMAGES:
            yield {"pixel_values": image(_IMAGES[self._kind])}
            return
        for row in ROWS:
            ids = torch.tensor([row])
            if self._kind == "whisper":
                yield {
                    "input_features": torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16).sin(),
                    "decoder_input_ids": ids,
                }
                continue
            more = {"decoder_input_ids": ids.flip(1)[:, :4]} if self._kind in {"t5", "bart"} else {}
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


class Plain:
    """A plain module of the tests, and the first inputs that it takes."""

    def __init__(self, file: str, kind: type[nn.Module]) -> None:
        self._kind, self._file = kind, file
        self.name = kind.__name__

    def _make(self) -> nn.Module:
        torch.manual_seed(3)
        return shaken(self._kind(), 0.1).eval()

    @property
    def folder(self) -> Path:
        """The weights as a checkpoint."""
        return _folder(
            f"{self._file}-{self._kind.__qualname__}-{id(self._kind)}",
            lambda folder: save_model(self._make(), str(folder / "model.safetensors")),
        )

    def load(self, folder: Path | None = None) -> nn.Module:
        model = self._make()
        load_model(model, (folder or self.folder) / "model.safetensors")
        return model

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(5)
        return _tensors(model(*_accepted(self._kind)))

    @torch.no_grad()
    def alone(self, model: nn.Module) -> list[torch.Tensor]:
        inputs = _accepted(self._kind)
        return [
            out
            for row in range(len(inputs[0]))
            for out in _tensors(model(*(value[row : row + 1] for value in inputs)))
        ]


@cache
def _accepted(kind: type[nn.Module]) -> tuple[torch.Tensor, ...]:
    """Inputs that a model takes: of one sort or two, numbers before tokens, since an embedding refuses
    numbers.
    """
    torch.manual_seed(3)
    model = kind().eval()
    candidates = _candidates(model)
    for count in (1, 2):
        for chosen in product(candidates, repeat=count):
            try:
                with torch.no_grad():
                    if all(out.isfinite().all() for out in _tensors(model(*chosen))):
                        return chosen
            except Exception:  # these are not its inputs
                continue
    raise ValueError("the model takes none of the inputs that are tried")


def _candidates(model: nn.Module) -> list[torch.Tensor]:
    """Rows, pictures and tokens; rows and pictures are as wide as its layers."""
    generator = torch.Generator().manual_seed(4)
    rows = dict.fromkeys(layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear))
    channels = dict.fromkeys(
        layer.in_channels for layer in model.modules() if isinstance(layer, nn.modules.conv._ConvNd)
    )
    images = [
        (2, count, *size) for count in channels for size in ((16,), (8, 8), (24, 24), (10, 10), (8, 8, 8))
    ]
    shapes = ((9, 10), *((3, width) for width in rows), *images, (10, 1, 10, 10))
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    return [
        *numbers,
        torch.arange(90).view(9, 10),
        torch.arange(10).repeat(10, 1),
        torch.arange(6).view(2, 3) % 4,
    ]


def _tensors(said: Any) -> list[torch.Tensor]:
    if isinstance(said, torch.Tensor):
        return [said.float()]
    if isinstance(said, dict):
        return [tensor for value in said.values() for tensor in _tensors(value)]
    if isinstance(said, tuple | list):
        return [tensor for value in said for tensor in _tensors(value)]
    raise ValueError("the model gives no tensor")


@torch.no_grad()
def shaken(model: nn.Module, size: float) -> nn.Module:
    """Every parameter and running mean moved: a bias of zero would hide one that was lost."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "running_var" in name:
            value.mul_(torch.rand_like(value) + 0.5)
        elif isinstance(value, nn.Parameter) or "running_mean" in name:
            value.add_(size * torch.randn_like(value))
    return model


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="peft-tables-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _folder(name: str, save: Callable[[Path], None]) -> Path:
    folder = _scratch() / re.sub(r"[^A-Za-z0-9]+", "-", name)
    if not folder.is_dir():
        folder.mkdir()
        save(folder)
    return folder


def family_of(name: str) -> str | None:
    """The family of a model on a hub, by its name, or None."""
    return next((family for pattern, family in _NAMED if re.search(pattern, name.lower())), None)


def pretrained(name: str, task: str | None) -> Pretrained | None:
    """The model that stands for one on a hub, or None where its family is not here."""
    family = family_of(name)
    return None if family is None else Pretrained(family, task)


def fallbacks(task: str | None) -> Sequence[Pretrained]:
    """Models that a configuration is put on where its test names none."""
    if task == "SEQ_2_SEQ_LM":
        return [Pretrained("t5", task), Pretrained("bart", task)]
    if task in {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}:
        return [Pretrained("bert", task), Pretrained("roberta", task)]
    return [
        Pretrained("llama", "CAUSAL_LM"),
        Pretrained("opt", "CAUSAL_LM"),
        Pretrained("gpt2", "CAUSAL_LM"),
        Pretrained("bert", "FEATURE_EXTRACTION"),
        Pretrained("t5", "SEQ_2_SEQ_LM"),
    ]
