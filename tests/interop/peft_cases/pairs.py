"""Two adapters that are active together: PEFT's model with both, ours with both attached, and both merged in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

import adapterpack

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
    adapterpack.merge(built.model.folder, [pack_of(built.folder / name, built.model) for name in NAMES], out, durable=False)
    require(built, outcome, built.model.load(out))


TOGETHER = Trial(_built, {"attach": _attach, "merge": _merge})
