"""The loss without logits: its values, its gradients, what it keeps, and the models that it is left alone
for.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adapterpack import LoRA, adapt, train
from adapterpack.training.loop import linear_cross_entropy as kernel
from adapterpack.training.loop import trainer
from adapterpack.training.loop.blockwise_loss import blockwise_loss

WORDS = 800
COMMON = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        num_key_value_heads=2,
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0
    ),
    "cohere": lambda: transformers.CohereConfig(**COMMON, logit_scale=0.5),
}


@pytest.mark.fast
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_blocks_are_the_cross_entropy_of_a_linear_layer(
    smoothing: float, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways in float64 to 1e-12, over several blocks and no rows at all, with a gradient from behind; in
    bfloat16 to its roundings.
    """
    monkeypatch.setattr(kernel, "_NUMBERS", 3 * 17)
    torch.manual_seed(0)
    head = nn.Linear(5, 17, bias=biased, dtype=torch.float64).requires_grad_(False)
    for rows in (0, 1, 8):
        hidden, targets = (
            torch.randn(rows, 5, dtype=torch.float64, requires_grad=True),
            torch.randint(17, (rows,)),
        )
        expected = functional.cross_entropy(head(hidden), targets, reduction="sum", label_smoothing=smoothing)
        (of_hidden,) = torch.autograd.grad(3 * expected, hidden)
        ways = [kernel.linear_cross_entropy(hidden, head.weight, head.bias, targets, smoothing)]
        ways += [kernel.by_blocks(head, 17, hidden, targets, smoothing)] if rows else []
        for total in ways:
            torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(
                torch.autograd.grad(3 * total, hidden)[0], of_hidden, atol=1e-12, rtol=1e-12
            )
    half = [None if value is None else value.bfloat16() for value in (head.weight, head.bias)]
    low = hidden.detach().bfloat16().requires_grad_()
    total = kernel.linear_cross_entropy(low, half[0], half[1], targets, smoothing)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected.detach(), rtol=0.03, atol=0.03)
    torch.testing.assert_close(
        torch.autograd.grad(3 * total, low)[0].double(), of_hidden, rtol=0.05, atol=0.1
    )


def model_of(kind: str, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    adapt(model, LoRA(r=2, **lora))
    return model.train()


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else [result]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("mixtral", {}),
        ("llama", {"modules_to_save": ("lm_head",)}),
        ("llama", {"targets": ("lm_head", "q_proj")}),
    ],
)
def test_a_models_loss_is_the_same_without_its_logits(
    kind: str, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients to float32's roundings, with labels that are ignored, a number of items, losses of
    routers, and heads that are adapted or trained; no tensor has as many numbers as the logits.
    """
    monkeypatch.setattr(kernel, "_NUMBERS", 5 * WORDS)
    model = model_of(kind, **lora)
    ids = torch.randint(WORDS, (3, 40), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(40) < 10, -100)
    inputs = {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(77)}
    found = blockwise_loss(model, inputs)
    assert found is not None
    results = []
    for way in (nullcontext(), found.instead()):
        model.zero_grad()
        with way, _Largest() as largest:
            loss = model(**inputs).loss
            loss.backward()
        results.append(
            (
                loss.detach(),
                largest.numbers,
                [value.grad.clone() for value in model.parameters() if value.grad is not None],
            )
        )
    (whole, most, theirs), (blocks, less, ours) = results
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert most >= 3 * 40 * WORDS > less
    assert model.loss_function is transformers.loss.loss_utils.ForCausalLMLoss
    assert torch.equal(model(**inputs).loss.detach(), whole)


@pytest.mark.parametrize("kind", ["gemma2", "cohere"])
def test_models_that_change_their_logits_keep_their_loss(kind: str) -> None:
    """A cap or a scale behind the head is in none of the blocks."""
    ids = torch.arange(1, 13)[None]
    assert blockwise_loss(model_of(kind), {"input_ids": ids, "labels": ids}) is None


def test_a_training_is_the_same_without_logits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label smoothing, accumulated batches and an evaluation included: the losses of all steps, to float32's
    roundings.
    """
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            f'{{"prompt": "w{number}", "completion": "w{number + 2} w{number + 1}"}}\n'
            for number in range(20)
        )
    )
    losses = []
    for name in ("blocks", "whole"):
        (pack,) = train(
            {
                "model_name_or_path": str(tiny_llama),
                "train_file": str(tmp_path / "rows.jsonl"),
                "max_steps": 4,
                "r": 2,
                "output_dir": str(tmp_path / name),
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 3,
                "label_smoothing_factor": 0.1,
                "val_set_size": 5,
                "learning_rate": 1e-2,
                "dropout": 0.1,
            }
        )
        losses.append(
            [pack.manifest.training["final_loss"], *(metric["value"] for metric in pack.manifest.metrics)]
        )
        monkeypatch.setattr(trainer, "blockwise_loss", lambda *_: None)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
