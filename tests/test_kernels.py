"""The fast kernels of adapted layers: their results, their derivatives, what they keep in memory, and when
they are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from adapterpack import IA3, LoRA, RoAd, adapt
from adapterpack.adapter_methods import (
    BlockCirculant,
    BlockSums,
    Chain,
    Dense,
    Diagonal,
    Kronecker,
    NormalForm,
    PairRotation,
    Repeat,
    Scaled,
    evaluate,
)
from adapterpack.adapter_methods.core.base import fold_form
from adapterpack.adapter_methods.core.sparse import Sparse
from adapterpack.torch_adapters.kernels import low_rank
from adapterpack.torch_adapters.kernels.low_rank import Dropout, Frozen, belongs_within, fuse

pytestmark = pytest.mark.fast

FROZEN = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
PLACES = torch.tensor([[0, 8, 3, 8], [6, 0, 2, 5]])
FORMS: dict[str, Callable[..., NormalForm]] = {
    "low rank": lambda A, B, C, s: NormalForm(down=Dense(A), up=Dense(B)),
    "shifted": lambda A, B, C, s: NormalForm(down=Dense(A), up=Dense(B), shift=s),
    "scaled": lambda A, B, C, s: NormalForm(down=Dense(A), up=Dense(B), output_scale=s, shift=2 * s),
    "three": lambda A, B, C, s: NormalForm(down=Chain(Dense(A), Dense(C)), up=Dense(B)),
    "down kept": lambda A, B, C, s: NormalForm(down=Dense(FROZEN), up=Dense(B)),
    "sums": lambda A, B, C, s: NormalForm(down=BlockSums(7, 3, A), up=Dense(B)),
    # 2 do not divide 9
    "repeat": lambda A, B, C, s: NormalForm(down=Chain(Dense(A), Dense(C[:2])), up=Repeat(2, 9, A)),
    "cut off": lambda A, B, C, s: NormalForm(
        down=Chain(Repeat(7, 11, A), BlockSums(11, 4, A)), up=Chain(BlockSums(4, 3, A), Dense(B))
    ),
    "shift alone": lambda A, B, C, s: NormalForm(shift=s),
    "wide": lambda A, B, C, s: NormalForm(down=Dense(B @ A), output_scale=s),
    "sparse": lambda A, B, C, s: NormalForm(down=Sparse(C[0, :1] * s[:4], PLACES, (9, 7))),
    "circulant": lambda A, B, C, s: NormalForm(down=BlockCirculant((B @ A)[:, :, None]), shift=s),
    "kronecker": lambda A, B, C, s: NormalForm(down=Kronecker(C[:, :1], A), output_scale=s),
    "scaled factor": lambda A, B, C, s: NormalForm(down=Dense(A), up=Scaled(B, s, C[0])),
}


def numbers(*shape: int, wanted: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(wanted)


DRAW = Dropout(5, 1 << 14)
"""Drops a quarter, the same in each pass, whatever shape the numbers have."""


def dense(form: NormalForm, layer: Frozen, x: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
    """The normal form, by dense matrices."""
    change = (
        0
        if form.down is None
        else form.down.dense()
        if form.up is None
        else form.up.dense() @ form.down.dense()
    )
    y = (
        x @ layer.weight.T
        + (0 if layer.bias is None else layer.bias)
        + (0 if form.down is None else entry @ change.T)
    )
    return y * (1 if form.output_scale is None else form.output_scale) + (
        0 if form.shift is None else form.shift
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_the_fast_ways_have_the_right_values_and_derivatives(
    name: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against dense matrices to 1e-12 in float64, and against finite differences: all of the first order, a
    random product of the second.

    Inputs of three shapes and of no rows, with and without a bias, a gradient for x, dropout before the
    branch (``apart``), and with the change within the weight or not.
    """
    torch.manual_seed(0)
    layers = [Frozen(numbers(9, 7, wanted=False), bias) for bias in (None, numbers(9, wanted=False))]
    subjects = (
        ((2, 2, 7), layers[0], True),
        ((3, 7), layers[1], False),
        ((7,), layers[1], True),
        ((0, 7), layers[0], True),
    )
    for shape, layer, of_x in subjects:
        leaves = (numbers(*shape, wanted=of_x), numbers(3, 7), numbers(9, 3), numbers(3, 3), numbers(9))
        for within in (False, True):
            if within and not belongs_within(FORMS[name](*leaves[1:]), 10**6):
                continue
            monkeypatch.setattr(low_rank, "belongs_within", lambda form, rows, within=within: within)

            def f(x: torch.Tensor, *rest: torch.Tensor, layer: Frozen = layer) -> torch.Tensor:
                y = fuse(FORMS[name](*rest), layer, x, DRAW if apart else None)
                if y is None:  # none of the chains: only within
                    return dense(FORMS[name](*rest), layer, x, DRAW.of(x) if apart else x)
                return y

            form, (x, *_) = FORMS[name](*leaves[1:]), leaves
            torch.testing.assert_close(
                f(*leaves), dense(form, layer, x, DRAW.of(x) if apart else x), atol=1e-12, rtol=1e-12
            )
            if leaves[0].numel():
                assert torch.autograd.gradcheck(f, leaves)
                assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)
            monkeypatch.undo()


@pytest.mark.parametrize(
    ("half", "inputs", "shift"), [(0, 7, True), (1, 3, False), (2, 7, False), (4, 2, True)]
)
def test_what_comes_after_a_layer_is_one_step_with_it(half: int, inputs: int, shift: bool) -> None:
    """A scale (``half`` 0) or pairs turned, against the folded weight to 1e-12 and finite differences as
    above; of more rows than inputs and of fewer, where the gradient of x goes another way.
    """
    torch.manual_seed(0)

    def form(cos: torch.Tensor, sin: torch.Tensor) -> NormalForm:
        after = (
            NormalForm(post=PairRotation(cos, sin, half, 8))
            if half
            else NormalForm(output_scale=cos + 0 * sin)
        )
        return after._replace(shift=cos if shift else None)

    for shape, bias in (((2, 2, inputs), None), ((5, inputs), numbers(8, wanted=False)), ((1, inputs), None)):
        layer, leaves = (
            Frozen(numbers(8, inputs, wanted=False), bias),
            (numbers(*shape), numbers(8), numbers(8)),
        )

        def f(x: torch.Tensor, *rest: torch.Tensor, layer: Frozen = layer) -> torch.Tensor:
            y = fuse(form(*rest), layer, x)
            assert y is not None
            return y

        weight, moved = fold_form(form(*leaves[1:]), layer.weight, layer.bias, slice(0, 8))
        torch.testing.assert_close(
            f(*leaves), functional.linear(leaves[0], weight, moved), atol=1e-12, rtol=1e-12
        )
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def test_other_forms_are_evaluated() -> None:
    """What changes the input, mixes outputs, is none of the known maps, or is one number, has no fast way."""
    layer, x = Frozen(torch.randn(4, 3), None), torch.randn(5, 3)
    A, B = Dense(torch.randn(2, 3)), Dense(torch.randn(4, 2))
    for form in (
        NormalForm(pre=Dense(torch.eye(3)), down=A, up=B),
        NormalForm(down=A, up=B, post=Diagonal(torch.ones(4))),
        NormalForm(down=A, up=Chain(Diagonal(torch.ones(2)), B)),
        NormalForm(post=Diagonal(torch.ones(4))),
        NormalForm(output_scale=torch.ones(1)),
        NormalForm(),
    ):
        assert fuse(form, layer, x) is None


def test_the_place_of_a_change_follows_from_its_sizes() -> None:
    """A low rank stays beside the layer; one as high as the width goes into the weight, if there are many
    rows; a wide change always.
    """

    def form(rank: int, trained: bool = True) -> NormalForm:
        return NormalForm(
            down=Dense(torch.randn(rank, 64, requires_grad=trained)), up=Dense(torch.randn(64, rank))
        )

    assert not belongs_within(form(4), 10**6)
    assert belongs_within(form(64), 512)
    assert not belongs_within(form(64), 8)
    assert not belongs_within(form(64, trained=False), 8)
    assert belongs_within(form(64, trained=False), 512)
    assert belongs_within(NormalForm(down=Dense(torch.randn(64, 64))), 1)


def test_what_is_not_needed_is_not_kept() -> None:
    """For a matrix that is not trained, and for a fixed map, the input is not kept; the branch is never kept
    at its full width.
    """
    layer, x = Frozen(torch.randn(40, 30), None), torch.randn(50, 30)
    trained = Dense(torch.randn(2, 30, requires_grad=True))
    for down, sizes in (
        (Dense(torch.randn(2, 30)), set()),
        (BlockSums(30, 2, x), set()),
        (trained, {x.shape}),
    ):
        kept: list[torch.Tensor] = []
        up = Dense(torch.randn(40, 2, requires_grad=True))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, kept=kept: kept.append(value) or value, lambda value: value
        ):
            fuse(NormalForm(down=down, up=up), layer, x)
        assert {value.shape for value in kept if len(value) == 50} == {(50, 2), *sizes}


def test_structures_that_are_wide_inside_keep_their_input_alone() -> None:
    """No spectrum and no product with one of two factors, only x and the operator's own numbers."""
    layer, x = Frozen(torch.randn(48, 64), None), torch.randn(50, 64)
    for down in (
        BlockCirculant(torch.randn(3, 4, 16, requires_grad=True)),
        Kronecker(torch.randn(6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)),
    ):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, kept=kept: kept.append(value) or value, lambda value: value
        ):
            y = fuse(NormalForm(down=down), layer, x)
        assert y is not None
        assert {value.data_ptr() for value in kept} <= {value.data_ptr() for value in (x, *down)}
        torch.testing.assert_close(y, x @ (layer.weight + down.dense()).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("why", ["hook", "forward", "trained", "subclass", "precision", "second"])
def test_a_layer_that_is_more_than_its_weight_is_called(why: str) -> None:
    """A hook runs, a replaced forward runs, a trained base gets its gradient, and the result is the
    formula's, within float32.
    """

    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x)

    torch.manual_seed(0)
    model = adapt(nn.Sequential((Other if why == "subclass" else nn.Linear)(6, 5)), LoRA(r=2))
    layer: Any = model[0]
    for value in layer.parameters():
        value.data += 0.1 * torch.randn_like(value)
    base, x, factor = layer._base, torch.randn(4, 6), {"hook": 2, "forward": 5, "subclass": 3}.get(why, 1)
    if why == "hook":
        base.register_forward_hook(lambda module, inputs, output: 2 * output)
    if why == "forward":
        base.forward = lambda value: 5 * functional.linear(value, base.weight, base.bias)
    if why == "trained":
        base.requires_grad_(True)
    if why == "precision":
        x = x.double()
        base.double()
    if why == "second":
        adapt(model, LoRA(r=3), "other")
        layer._active = ("default", "other")
    y = layer(x)
    A, B = (layer._params("default")[f"lora_{side}"].astype(np.float64) for side in "AB")
    expected = (
        factor * (x.double() @ base.weight.double().T + base.bias.double()).detach().numpy()
        + 2 * x.double().numpy() @ A.T @ B.T
    )
    if why == "second":
        A, B = (layer._params("other")[f"lora_{side}"].astype(np.float64) for side in "AB")
        expected += layer._held["other"].config.scale * x.double().numpy() @ A.T @ B.T
    else:
        assert layer._held["default"].config.scale == 2
    np.testing.assert_allclose(y.detach(), expected, atol=1e-5)
    y.sum().backward()
    assert (base.weight.grad is not None) == (why == "trained")


def test_dropout_is_on_the_branch_alone() -> None:
    """With a fast way, too: with B at zero dropout changes nothing, and the mean over many draws is the
    formula's (5 standard errors).
    """
    torch.manual_seed(0)
    layer: Any = adapt(nn.Sequential(nn.Linear(6, 5)), LoRA(r=2, dropout=0.5))[0]
    x = torch.randn(6)
    plain = layer._base(x)
    assert torch.equal(layer.train()(x), plain)
    B = dict(layer._adapters.named_parameters())["adapter:default.lora_B"]
    B.data.normal_()
    for half in (False, True):
        if half:
            layer._base.bfloat16()
            x = x.bfloat16()
        draws, expected = (
            layer.train()(x.expand(4000, 6)).detach().double(),
            layer.eval()(x).detach().double(),
        )
        assert (
            (draws.mean(0) - expected).abs() < 5 * draws.std(0) / 4000**0.5 + half * 2**-8 * expected.abs()
        ).all()
        assert draws.std(0).min() > 0


@pytest.mark.parametrize("half", [False, True])
def test_dropout_keeps_nothing_but_what_it_is_made_of(half: bool) -> None:
    """Of a layer whose input is kept anyway, dropout adds nothing as wide as the input to what is kept for
    the backward pass; the share that is dropped is the one of the configuration, another in each pass, and
    the same again from torch's own random state.
    """
    layer: Any = adapt(nn.Sequential(nn.Linear(64, 64)), LoRA(r=2, dropout=0.1))[0].train()
    x = torch.randn(100, 64, requires_grad=True)
    if half:
        layer._base.bfloat16()
        x = x.detach().bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value) or value, lambda value: value
    ):
        layer(x)
    wide = {
        value.untyped_storage().data_ptr()
        for value in kept
        if value.shape[0] == len(x) and value.shape[-1] == 64
    }
    assert wide <= {x.untyped_storage().data_ptr()}
    ones = torch.ones(1000, 1000)
    first, second = Dropout.draw(0.1), Dropout.draw(0.1)
    assert abs(float((first.of(ones) == 0).double().mean()) - 0.1) < 5 * (0.09 / ones.numel()) ** 0.5
    assert not torch.equal(first.of(ones), second.of(ones))
    torch.manual_seed(3)
    again = Dropout.draw(0.1)
    torch.manual_seed(3)
    assert torch.equal(again.of(ones), Dropout.draw(0.1).of(ones))


def test_evaluating_agrees_in_single_precision() -> None:
    """Against :func:`evaluate` in float32 on a layer of real size: a few rounding errors of sums whose terms
    add up to 250.
    """
    torch.manual_seed(0)
    layer, x = Frozen(torch.randn(384, 384), torch.randn(384)), torch.randn(64, 384)
    for rank in (8, 384):
        form = NormalForm(down=Dense(torch.randn(rank, 384) / 20), up=Dense(torch.randn(384, rank) / 20))
        y, expected = (
            fuse(form, layer, x),
            evaluate(form, lambda value: functional.linear(value, layer.weight, layer.bias), x),
        )
        assert y is not None
        torch.testing.assert_close(y, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "config", [LoRA(r=2), LoRA(r=2, dropout=0.5), IA3(feedforward=()), RoAd(), LoRA(r=64)], ids=repr
)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
def test_an_output_may_be_changed_in_place(config: Any, half: bool, shape: tuple[int, ...]) -> None:
    """What follows a layer may write into its output, as ``ReLU(inplace=True)`` does: the same gradients as
    where it makes a new tensor.
    """
    gradients = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 8), nn.ReLU(inplace=inplace)
        )
        adapt(model.bfloat16() if half else model, config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
        x = torch.randn(shape).to(torch.bfloat16 if half else torch.float32)
        model(x).float().square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(map(torch.equal, *gradients))
    assert any(bool(gradient.any()) for gradient in gradients[0])


_WIDTHS = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
_SPEECH = {
    **_WIDTHS,
    "num_feat_extract_layers": 2,
    "conv_dim": (8, 8),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "mask_time_length": 2,
    "mask_time_prob": 0.5,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 20,
}


@pytest.mark.parametrize(
    ("family", "values"),
    [
        (
            "FalconForCausalLM",
            {"vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4},
        ),
        (
            "LongformerForMaskedLM",
            {
                **_WIDTHS,
                "vocab_size": 41,
                "attention_window": 4,
                "max_position_embeddings": 40,
                "pad_token_id": 1,
            },
        ),
        ("Wav2Vec2ForCTC", _SPEECH),
        ("HubertForCTC", _SPEECH),
    ],
)
def test_models_that_change_outputs_in_place_train(family: str, values: dict[str, Any]) -> None:
    """A step of each in training mode: every adapter gets a gradient."""
    torch.manual_seed(0)
    kind = getattr(transformers, family)
    model = adapt(kind(kind.config_class(**values)), LoRA(r=2)).train()
    inputs = (
        {"input_values": torch.randn(2, 400)}
        if "CTC" in family
        else {"input_ids": torch.arange(2 * 8).reshape(2, 8) + 2}
    )
    if "Longformer" in family:
        inputs["global_attention_mask"] = (torch.arange(8) == 0).long().expand(2, 8)
    model(**inputs).logits.square().mean().backward()
    wanted = {
        name: value.grad
        for name, value in model.named_parameters()
        if value.requires_grad and "lora_B" in name
    }
    assert wanted
    assert all(gradient is not None and gradient.any() for gradient in wanted.values())
