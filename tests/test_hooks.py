"""What methods ask of a training: penalties, learning rates, budgets; beside PEFT, and through the
trainer.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from noise import shake
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

from adapterpack import CPT, AdaLoRA, KaSA, LoRA, adapt, attach, save
from adapterpack.adapter_methods import Progress
from adapterpack.pack import from_peft
from adapterpack.torch_adapters.layers.layer import Adapted
from adapterpack.training.loop import hooks
from adapterpack.training.loop.trainer import AdapterTrainer


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(9, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


noisy = partial(shake, size=0.3, seed=2)


def pair(config: Any, folder: Path) -> tuple[nn.Module, peft.PeftModel]:
    """PEFT's model with random tensors, and ours with the same."""
    theirs = peft.get_peft_model(Two(), config)
    noisy(theirs)
    theirs.save_pretrained(folder)
    ours = attach(Two(), from_peft.read(folder, "same"), check_base=False)
    for layer in (ours.a, ours.b):
        layer._trainable("same")
    return ours, theirs


def test_the_budget_is_pefts(tmp_path: Path) -> None:
    """Twelve SGD steps: after each one, PEFT's rank allocator and ours have set the same values to zero; all
    parameters agree to 1e-5.
    """
    ours, theirs = pair(
        peft.AdaLoraConfig(
            init_r=5,
            target_r=2,
            lora_alpha=4,
            total_step=12,
            tinit=2,
            tfinal=3,
            deltaT=2,
            target_modules=["a", "b"],
        ),
        tmp_path / "theirs",
    )
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for model in (ours, theirs)
    ]
    generator, states, zeros = torch.Generator().manual_seed(3), {}, []
    for step in range(1, 13):
        x = torch.randn(6, 9, generator=generator)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        states = hooks.after_step(ours, Progress(step, 12), states)
        theirs.base_model.update_and_allocate(step)
        found = {path: dict(getattr(ours, path)._part("same").named_parameters()) for path in "ab"}
        for path, own in found.items():
            layer = theirs.base_model.model.get_submodule(path)
            for name, value in own.items():
                other = getattr(layer, name)["default"].detach().numpy()
                np.testing.assert_allclose(
                    value.detach().numpy(), other, rtol=0, atol=1e-5, err_msg=f"{step}, {path}.{name}"
                )
        zeros.append(sum(int((own["lora_E"] == 0).sum()) for own in found.values()))
    assert zeros[1] == 0, "nothing before tinit"
    assert zeros[-1] == zeros[8] == 10 - 4, "the target, from the ninth step on"
    assert 0 < zeros[3] < zeros[8]


def test_penalties_are_the_papers(tmp_path: Path) -> None:
    """KaSA: PEFT's own loss, within 1e-5; AdaLoRA: orth_reg_weight times the mean of ||G - I||_F over all A
    and B, in numpy.
    """
    config = peft.LoraConfig(r=3, kasa_config=peft.KasaConfig(beta=0.3, gamma=0.2), target_modules=["a", "b"])
    ours, theirs = pair(config, tmp_path / "kasa")
    assert float(hooks.penalty(ours)) == pytest.approx(float(theirs._get_kasa_loss()), rel=1e-5)
    model = adapt(Two(), AdaLoRA(init_r=4, target_r=2, orth_reg_weight=0.7), "one")
    noisy(model)
    terms = []
    for layer in (model.a, model.b):
        A, B = (layer._params("one")[name].astype(np.float64) for name in ("lora_A", "lora_B"))
        terms += [np.linalg.norm(gram - np.eye(4)) for gram in (A @ A.T, B.T @ B)]
    assert float(hooks.penalty(model)) == pytest.approx(0.7 * np.mean(terms), rel=1e-5)
    assert hooks.penalty(adapt(Two(), LoRA(r=2))) is None


class Experts(nn.Module):
    """Three matrices in one parameter, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x @ one.T for one in self.up], dim=-1)


class Apart(nn.Module):
    """The same as three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(9, 7, bias=False) for _ in range(3))
        for layer, weight in zip(self.layers, Experts().up, strict=True):
            layer.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def test_stacked_experts_share_a_budget_as_layers_do() -> None:
    """AdaLoRA, eight SGD steps with its penalty and its budget: the matrices of a stack end where layers of
    their own end, with ranks of their own; the pack has the largest of these for all, and gives what was
    trained.
    """
    config = AdaLoRA(init_r=5, target_r=2, alpha=4, tinit=1, tfinal=2, orth_reg_weight=0.3)
    model, apart = nn.Sequential(Experts()), Apart()
    stacked = adapt(model, dataclasses.replace(config, targets=("up",)), "one")
    layers = adapt(apart, config, "one").layers
    noisy(stacked)
    (own,) = (
        dict(module._part("one").named_parameters())
        for module in stacked.modules()
        if isinstance(module, Adapted)
    )
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for name, value in layer._part("one").named_parameters():
                value.copy_(own[name][number])
    generator, states = torch.Generator().manual_seed(3), {"stacked": {}, "apart": {}}
    for step in range(1, 9):
        x = torch.randn(6, 9, generator=generator)
        for label, one in (("stacked", stacked), ("apart", apart)):
            optimizer = torch.optim.SGD([value for value in one.parameters() if value.requires_grad], lr=0.02)
            optimizer.zero_grad()
            ((one(x) - 1).square().mean() + hooks.penalty(one)).backward()
            optimizer.step()
            states[label] = hooks.after_step(one, Progress(step, 8), states[label])
    for number, layer in enumerate(layers):
        for name, value in layer._part("one").named_parameters():
            torch.testing.assert_close(own[name][number], value, rtol=0, atol=1e-6, msg=f"{number}, {name}")
    ranks = [int((one != 0).sum()) for one in own["lora_E"]]
    assert sum(ranks) == 3 * config.target_r and len(set(ranks)) > 1
    pack = save(stacked, None, name="experts")
    (adapter,) = pack.adapters()
    assert (adapter.config.r, adapter.params["lora_A"].shape) == (max(ranks), (3, max(ranks), 9))
    assert [int((one != 0).sum()) for one in adapter.params["lora_E"]] == ranks
    torch.testing.assert_close(attach(nn.Sequential(Experts()), pack)(x), stacked(x), rtol=0, atol=1e-6)


def trainer(base: Path, folder: Path, config: Any, **arguments: Any) -> AdapterTrainer:
    """One optimizer step of SGD on four rows of a tiny Llama, whose loss is divided by the tokens of all
    batches of the step.
    """
    model = adapt(AutoModelForCausalLM.from_pretrained(base), config, "one", seed=4)
    noisy(model)
    rows = [
        {"input_ids": torch.arange(4, 12) + 3 * row, "labels": torch.arange(4, 12) + 3 * row}
        for row in range(4)
    ]
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        report_to="none",
        save_strategy="no",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return AdapterTrainer(model=model, args=settings, train_dataset=rows)


def moved(base: Path, folder: Path, config: Any, **arguments: Any) -> dict[str, np.ndarray]:
    """What one step changes, by parameter."""
    one = trainer(base, folder, config, **arguments)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad}
    one.train()
    return {
        name: (p.detach() - before[name]).numpy()
        for name, p in one.model.named_parameters()
        if name in before
    }


def test_a_penalty_counts_once_a_step(tiny_llama: Path, tmp_path: Path) -> None:
    """One batch of four rows moves the parameters as two of two do, within 1e-6, and otherwise than without
    the penalty.
    """
    config = KaSA(r=2, targets=("q_proj",), beta=0.5, gamma=0.5)
    whole = moved(tiny_llama, tmp_path, config, per_device_train_batch_size=4)
    halves = moved(tiny_llama, tmp_path, config, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    without = moved(
        tiny_llama, tmp_path, KaSA(r=2, targets=("q_proj",), beta=0, gamma=0), per_device_train_batch_size=4
    )
    for name, value in whole.items():
        np.testing.assert_allclose(halves[name], value, rtol=0, atol=2e-6, err_msg=name)
    assert max(np.abs(value - without[name]).max() for name, value in whole.items()) > 1e-2


def test_b_learns_at_its_own_rate(tiny_llama: Path, tmp_path: Path) -> None:
    """LoRA+: with lr_ratio=4 one step of SGD moves B by four times as much, and A by as much, as with 1; the
    scheduler keeps that.
    """
    plain, plus = (
        moved(
            tiny_llama,
            tmp_path,
            LoRA(r=2, targets=("q_proj",), lr_ratio=ratio),
            per_device_train_batch_size=4,
        )
        for ratio in (1, 4)
    )
    assert all(np.abs(value).max() > 0 for value in plain.values())
    for name, value in plain.items():
        np.testing.assert_allclose(
            plus[name], (4 if name.endswith("lora_B") else 1) * value, rtol=1e-4, atol=1e-7, err_msg=name
        )
    one = trainer(tiny_llama, tmp_path, LoRA(r=2, targets=("q_proj",), lr_ratio=4))
    one.create_optimizer_and_scheduler(10)
    assert sorted({group["lr"] for group in one.optimizer.param_groups}) == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize(("kind", "factor"), [("none", 1.0), ("decay", 0.6)])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_loss_on_a_context_is_pefts(
    tiny_llama: Path, tmp_path: Path, kind: str, factor: float, steps: int
) -> None:
    """CPT, two groups of labels in the context: the trainer's loss and the gradient of the prompt are PEFT's,
    from the same tensors.
    """
    ids, types = [9, 4, 5, 6, 11, 12], [1, 2, 4, 6, 8, 8]
    rows = [([5, 6, 7, 30], 2), ([8, 9, 10, 11], 1)] * steps
    batches = [
        {"input_ids": torch.tensor([row]), "labels": torch.tensor([[-100] * cut + row[cut:]])}
        for row, cut in rows
    ]
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    peers = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=ids,
            cpt_mask=[1] * 6,
            cpt_tokens_type_mask=types,
            opt_weighted_loss_type=kind,
            opt_loss_decay_factor=factor,
            opt_projection_epsilon=50.0,
            opt_projection_format_epsilon=50.0,
        ),
    )
    prompt = next(value for name, value in peers.named_parameters() if "delta_embedding" in name)
    mine = adapt(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        CPT(
            token_ids=tuple(ids),
            token_types=tuple(types),
            input_epsilon=50.0,
            format_epsilon=50.0,
            opt_weighted_loss_type=kind,
            opt_loss_decay_factor=factor,
        ),
    )
    own = next(value for value in mine.parameters() if value.requires_grad)
    with torch.no_grad():
        own.copy_(0.1 * torch.randn(own.shape, generator=torch.Generator().manual_seed(1)))
        prompt.copy_(own * (torch.tensor(types) % 4 > 0)[:, None])
    expected = peers(**joined, attention_mask=torch.ones_like(joined["input_ids"])).loss
    expected.backward()
    trainer = AdapterTrainer(
        model=mine.train(), args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    )
    trainer.current_gradient_accumulation_steps = steps
    halves = [{key: value[2 * at : 2 * at + 2] for key, value in joined.items()} for at in range(steps)]
    items = int((joined["labels"][:, 1:] != -100).sum()) if steps > 1 else None
    found = sum(trainer.compute_loss(mine, half, num_items_in_batch=items) for half in halves)
    found.backward()
    np.testing.assert_allclose(float(found.detach()), float(expected.detach()), rtol=1e-5)
    np.testing.assert_allclose(own.grad, prompt.grad, rtol=0, atol=1e-5)
    learnt = mine.get_input_embeddings()._held["default"].config.learnt
    assert learnt == ((2, 5, factor**2), (4, 11, factor), (5, 12, factor))
