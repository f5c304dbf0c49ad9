"""Two adapters that are active together: PEFT's model with both, ours with both attached, and both merged in
one go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

import adapterpack
from adapterpack.errors import AdapterpackError

from . import trial
from .cases import Case
from .models import Model
from .trial import Built, NotApplicable, Outcome, Trial, apart, fresh, moved, pack_of, require

NAMES = ("first", "second")


def run(case: Case, scratch: Path) -> Outcome:
    """Does one case, of one adapter or of two."""
    return trial.run(case, scratch, trial.ALONE if case.second is None else TOGETHER)


def _built(case: Case, model: Model, folder: Path) -> Built:
    assert case.second is not None
    plain = model.load()
    base = model.outputs(plain)
    theirs = peft.get_peft_model(plain, fresh(case, case.config), NAMES[0])
    theirs.add_adapter(NAMES[1], fresh(case, case.second))
    wanted = moved(_both(theirs), model, base)
    theirs.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(model.load(), folder / NAMES[0], NAMES[0])
    again.load_adapter(folder / NAMES[1], NAMES[1])
    if apart(model.outputs(_both(again)), wanted) > trial.SAME:
        raise NotApplicable("PEFT gives other numbers after it has saved and loaded them")
    return Built(model, folder, again, wanted, base)


def _both(theirs: Any) -> torch.nn.Module:
    """PEFT's model with both adapters active, trainable."""
    for module in theirs.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer | peft.utils.AuxiliaryTrainingWrapper):
            module.set_adapter(list(NAMES))
    model: torch.nn.Module = theirs.eval()
    return model


def _attach(built: Built, outcome: Outcome) -> None:
    model = built.model.load()
    for name in NAMES:
        adapterpack.attach(model, pack_of(built.folder / name, built.model), name)
    require(built, outcome, adapterpack.active(model, list(NAMES)))
    if apart(built.model.outputs(adapterpack.active(model, None)), built.base) > 0:
        raise AssertionError("switched off, the base gives other numbers")


def _merge(built: Built, outcome: Outcome) -> None:
    out = built.folder.parent / "merged"
    try:
        adapterpack.merge(
            built.model.folder,
            [pack_of(built.folder / name, built.model) for name in NAMES],
            out,
            durable=False,
        )
    except AdapterpackError as error:
        if reason := _unmergeable(built):
            raise NotApplicable(reason) from error
        raise
    require(built, outcome, built.model.load(out))


def _unmergeable(built: Built) -> str | None:
    """Why PEFT cannot merge the two either, or None."""
    again: Any = peft.PeftModel.from_pretrained(built.model.load(), built.folder / NAMES[0], NAMES[0])
    again.load_adapter(built.folder / NAMES[1], NAMES[1])
    try:
        merged = again.eval().merge_and_unload(adapter_names=list(NAMES))
    except Exception as error:
        return f"PEFT cannot merge them: {type(error).__name__}"
    return (
        "PEFT's merge gives other numbers than its model"
        if apart(built.model.outputs(merged), built.wanted) > trial.SAME
        else None
    )


TOGETHER = Trial(_built, {"attach": _attach, "merge": _merge})
