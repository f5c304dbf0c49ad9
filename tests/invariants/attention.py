"""Proves methods whose prompt is looked at by a layer's attention, in a small decoder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from adapterpack.testing import MODELS, Case, require

from .prompts import ROWS, decoder, logits_of, padded, prompted


def disabled_attention_is_the_base(case: Case) -> None:
    """Fresh, inactive, and after ``detach`` the logits are the base's, bit for bit; trained and active they
    are not.
    """
    from adapterpack.torch_adapters.adapt import adapt, detach
    from adapterpack.torch_adapters.layers.active import active

    base = logits_of(decoder(MODELS[0]), ROWS, left=False)
    fresh = logits_of(adapt(decoder(MODELS[0]), case.config), ROWS, left=False)
    require(bool((fresh == base).all()), "a fresh adapter changes the logits")
    model = prompted(case, MODELS[0])
    change = float((logits_of(model, ROWS, left=False) - base).abs().max())
    require(change > 1e-3, f"an active adapter changes logits by {change:.1e} only")
    require(
        bool((logits_of(active(model, None), ROWS, left=False) == base).all()),
        "an inactive adapter changes the logits",
    )
    require(
        bool((logits_of(detach(model), ROWS, left=False) == base).all()),
        "a detached adapter changes the logits",
    )


def attended_rows_never_mix(case: Case) -> None:
    """Each row of a ragged batch, padded left or right, has the logits that it has alone; and its last one on
    a cache; within 1e-5.
    """
    import torch

    model = prompted(case, MODELS[0])
    for row in ROWS:
        alone = logits_of(model, [row], left=False)[0]
        for left in (False, True):
            ids, mask = padded([row, ROWS[2]], left)
            with torch.no_grad():
                places = (mask.cumsum(1) - 1).clamp(min=0)
                together = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[0][
                    mask[0] > 0
                ]
            error = float((together - alone).abs().max())
            require(error < 1e-5, f"a row padded on the {'left' if left else 'right'} is off by {error:.1e}")
        with torch.no_grad():
            first = model(torch.tensor([row[:-1]]), use_cache=True)
            # its name in newer and older transformers
            cache = next(name for name in ("cache", "past_key_values") if name in first)
            error = float(
                (model(torch.tensor([row[-1:]]), **{cache: first[cache]}).logits[0, -1] - alone[-1])
                .abs()
                .max()
            )
        require(error < 1e-5, f"a token on a cache is off by {error:.1e}")


def attended_onnx_agrees(case: Case) -> None:
    """A graph of the decoder with the adapter in it, as inputs and in a bank, gives the torch model's logits
    in float64, within 1e-4 of the largest: ragged rows padded on both sides, some with the adapter and some
    without, whole and piece by piece on a cache.
    """
    from adapterpack.exporting.pipeline import export
    from adapterpack.runtime.sessions.session import Session
    from adapterpack.tasks.task import get_task
    from adapterpack.torch_adapters.save import save

    from .bundles import Reference, check

    task, mode = (
        get_task("text-generation"),
        "inputs" if case.config == case.method.examples[-1] else "bank",
    )
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "base", Path(folder) / "bundle"
        decoder(MODELS[0]).save_pretrained(base)
        pack = save(prompted(case, MODELS[0]), None, base=base, name="example")
        export(base, [pack], out, mode=mode, task=task.name, frontend="mobius", in_place=False)
        check(Session(out, "cpu"), {None: Reference(task, base), pack.name: Reference(task, base, pack)})
