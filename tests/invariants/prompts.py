"""Proves prompt methods: their normal form on arrays, and in a small decoder. Some proofs need torch and
transformers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from adapterpack.adapter_methods import Params, complete
from adapterpack.adapter_methods.forms.prompt import PromptForm
from adapterpack.pack import from_peft
from adapterpack.pack.pack import Pack
from adapterpack.testing import (
    VOCABULARY,
    Case,
    DecoderShape,
    build_pack,
    digests,
    is_float,
    make_leaves,
    require,
    require_close,
    to_tensor,
)

ROWS = ((5, 6, 7, 30, 31), (8, 9), (10, 11, 12, 13, 14, 15, 16))


def _form(case: Case, params: Params) -> PromptForm:
    form: PromptForm = case.method.normal_form(case.config, params, case.site)
    return form


def _array(form: PromptForm) -> Any:
    return form.cache if form.embeds is None else form.embeds


def form_as_declared(case: Case) -> None:
    """``attach`` gives embeddings ``[(tasks,) n, in]`` or a cache ``[layers, 2, heads, n, head_dim]``, not
    both, and changes no input.
    """
    params, model, count = case.trained(), case.layer, case.config.num_virtual_tokens
    before = digests(params)
    form = _form(case, params)
    require(digests(params) == before, "attach changed a parameter")
    require((form.embeds is None) != (form.cache is None), "a prompt is embeddings or a cache")
    wanted = (
        (count, model.hidden) if form.cache is None else (model.layers, 2, model.heads, count, model.head_dim)
    )
    found = _array(form).shape
    require(
        (found[-2:] if form.cache is None else found) == wanted, f"the form has shape {found}, not {wanted}"
    )
    require(form.length == count, f"the form has {form.length} virtual tokens, the config {count}")


def form_torch_equals_numpy(case: Case) -> None:
    """``attach`` on torch float64 tensors gives what it gives on numpy arrays, within 1e-12
    (:data:`~adapterpack.testing.EXACT`).
    """
    here = case.trained()
    there = {name: to_tensor(value) for name, value in here.items()}
    require_close(
        _array(_form(case, there)).numpy(), _array(_form(case, here)), "the form differs under torch"
    )


def form_gradients_reach_every_parameter(case: Case) -> None:
    """Within two steps of SGD from ``init`` each trained parameter has had a gradient that is not zero; the
    frozen ones have none.
    """
    params, reached = make_leaves(case, case.fresh()), set()
    for _ in range(2):
        ((_array(_form(case, params)) - 1.0) ** 2).mean().backward()
        reached |= {
            name
            for name, value in params.items()
            if value.grad is not None and bool(value.grad.abs().max() > 0)
        }
        params = make_leaves(
            case,
            {
                name: (v if v.grad is None else v - 0.1 * v.grad).detach().numpy()
                for name, v in params.items()
            },
        )
    require(reached == case.trains, f"gradients reach {sorted(reached)}, trained are {sorted(case.trains)}")


def form_loss_falls(case: Case) -> None:
    """100 steps of Adam at rate 0.02 at least halve ``mean (form - form(trained))^2`` from ``init``: a target
    that can be reached.
    """
    import torch

    params = make_leaves(case, case.fresh())
    target = _array(_form(case, {name: to_tensor(value) for name, value in case.trained().items()}))
    optimizer = torch.optim.Adam([value for value in params.values() if value.requires_grad], lr=0.02)
    losses = []
    for _ in range(101):
        optimizer.zero_grad()
        loss = ((_array(_form(case, params)) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    require(losses[-1] < 0.5 * losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} only")


def form_dtype_kept(case: Case) -> None:
    """``attach`` keeps the dtype that the parameters share: float32 and float64 in numpy, both halves in
    torch.
    """
    import torch

    for dtype in (np.float32, np.float64):
        found = _array(_form(case, case.trained(dtype))).dtype
        require(found == dtype, f"the form is {found}, not {np.dtype(dtype)}")
    for half in (torch.bfloat16, torch.float16):
        params = {
            name: to_tensor(v).to(half) if is_float(v) else to_tensor(v) for name, v in case.trained().items()
        }
        require(
            _array(_form(case, params)).dtype == half, f"the form is not {half}, though all parameters are"
        )


def form_kept_by_packing(case: Case) -> None:
    """The form of the packed parameters is that of the trained ones, within 1e-6 of its size: packs hold
    float32, whatever made them.
    """
    expected = np.asarray(_array(_form(case, case.trained(np.float32))), np.float64)
    np.testing.assert_allclose(
        _packed(build_pack(case)), expected, rtol=0, atol=1e-6 * max(1.0, float(np.abs(expected).max()))
    )


def form_kept_by_peft(case: Case) -> None:
    """The folder read as PEFT's, without the manifest, gives the same tensors and the same form, bit for
    bit.
    """
    stored = build_pack(case)
    with tempfile.TemporaryDirectory() as folder:
        stored.write(Path(folder) / "pack")
        back = from_peft.read(Path(folder) / "pack")
    require(
        digests(dict(back.tensors)) == digests(dict(stored.tensors)),
        "tensors came back with other names or bytes",
    )
    require(np.array_equal(_packed(back), _packed(stored)), "the form changed")


def _packed(pack: Pack) -> np.ndarray:
    (adapter,) = pack.adapters()
    params = complete(pack.method, adapter.config, adapter.params, adapter.site)
    return np.asarray(_array(pack.method.normal_form(adapter.config, params, adapter.site)))


def disabled_prompt_is_the_base(case: Case) -> None:
    """With the prompt inactive and after ``detach`` the logits are the base's, bit for bit; with it active
    they are not.
    """
    from adapterpack.torch_adapters.adapt import detach
    from adapterpack.torch_adapters.layers.active import active

    base = logits_of(decoder(case.layer), ROWS, left=False)
    model = prompted(case, case.layer)
    change = float((logits_of(model, ROWS, left=False) - base).abs().max())
    require(change > 1e-3, f"an active prompt changes logits by {change:.1e} only")
    require(
        bool((logits_of(active(model, None), ROWS, left=False) == base).all()),
        "an inactive prompt changes the logits",
    )
    require(
        bool((logits_of(detach(model), ROWS, left=False) == base).all()),
        "a detached prompt changes the logits",
    )


def prompted_rows_never_mix(case: Case) -> None:
    """Each row of a ragged batch, padded left or right, has the logits that it has alone, within 1e-5; as
    many as it has tokens.
    """
    model = prompted(case, case.layer)
    alone = [logits_of(model, [row], left=False)[0] for row in ROWS]
    for left in (False, True):
        together = logits_of(model, ROWS, left)
        for row, (mine, values) in enumerate(zip(alone, together, strict=True)):
            real = values[-len(mine) :] if left else values[: len(mine)]
            error = float((real - mine).abs().max())
            require(
                error < 1e-5, f"row {row}, padded on the {'left' if left else 'right'}, is off by {error:.1e}"
            )


def decoder(sizes: DecoderShape) -> Any:
    """A random Llama of these sizes, the same every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=sizes.hidden,
                num_hidden_layers=sizes.layers,
                num_attention_heads=2 * sizes.heads,
                num_key_value_heads=sizes.heads,
                head_dim=sizes.head_dim,
                intermediate_size=16,
                max_position_embeddings=64,
                pad_token_id=0,
                initializer_range=0.5,
            )
        )
    return model.eval()


def prompted(case: Case, sizes: DecoderShape) -> Any:
    """The decoder of these sizes with the case's adapter, moved by noise."""
    import torch

    from adapterpack.torch_adapters.adapt import adapt

    model, noise = adapt(decoder(sizes), case.config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.3)
    return model


def logits_of(model: Any, rows: Any, left: bool) -> Any:
    """The logits of ragged rows, padded on one side."""
    import torch

    ids, mask = padded(rows, left)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def padded(rows: Any, left: bool) -> tuple[Any, Any]:
    """Ragged ids and their mask, ``[rows, longest]`` int64."""
    import torch

    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask
