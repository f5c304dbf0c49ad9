"""One case, done: PEFT builds, moves and saves the adapter; then it is validated, attached, merged,
converted, and read by PEFT again.

What is right is what PEFT's model gives before it is saved, row by row: a row by itself has no padding, on
which PEFT's own prompts and activated LoRAs depend. A merge is right if the merged model gives that, too,
whether or not PEFT can merge.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack.errors import AdapterpackError

from .cases import Case
from .models import Model, shaken
from .reading import Call

SAME = 1e-4
"""Of the largest number in an output: both sides compute in float32, in another order, and some methods
invert a matrix first. A mistake is of the size of the change, which is at least ``MOVED``.
"""
MOVED = 1e-2
"""Of the largest number in an output: how far an adapter has to move it."""
SECONDS = 120
STEPS = ("attach", "merge", "trip")
OK, REFUSED, CRASH, WRONG, NONE = "ok", "refused", "crash", "wrong", "n/a"


class NotApplicable(Exception):
    """PEFT itself cannot do it."""


@dataclass
class Step:
    """How a step went, and why it did not go well; ``trace`` says where."""

    status: str
    why: str = ""
    trace: str = ""


@dataclass
class Outcome:
    """How a case went on which model; ``error`` is the largest, relative to the output."""

    name: str
    model: str = ""
    attach: Step = field(default_factory=lambda: Step(NONE))
    merge: Step = field(default_factory=lambda: Step(NONE))
    trip: Step = field(default_factory=lambda: Step(NONE))
    why: str = ""
    error: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Built:
    """What PEFT made of a case: the model, its folder, what the adapted model and the base give."""

    model: Model
    folder: Path
    theirs: torch.nn.Module
    wanted: list[torch.Tensor]
    base: list[torch.Tensor]


@dataclass
class Trial:
    """How cases of a sort are done: how PEFT builds them on a model, and the steps by their names."""

    build: Callable[[Case, Model, Path], Built]
    steps: dict[str, Callable[[Built, Outcome], None]]


def run(case: Case, scratch: Path, trial: Trial) -> Outcome:
    """Does one case in a folder of its own."""
    folder = scratch / hashlib.sha256(case.name.encode()).hexdigest()[:16]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome = Outcome(case.name)
    try:
        with _quiet(), _in_time():
            built = _build(case, folder, trial)
    except NotApplicable as error:
        outcome.why = _plain(str(error))
        return outcome
    except Exception as error:
        outcome.why = _plain(_of_peft(error))
        return outcome
    outcome.model = built.model.name
    for name, do in trial.steps.items():
        setattr(outcome, name, _step(do, built, outcome))
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _build(case: Case, folder: Path, trial: Trial) -> Built:
    reason = "no model of its family is here"
    for number, model in enumerate(case.models()):
        try:
            return trial.build(case, model, folder / str(number))
        except Exception as error:  # PEFT cannot put it on this model
            reason = str(error) if isinstance(error, NotApplicable) else _of_peft(error)
    raise NotApplicable(reason)


def _built(case: Case, model: Model, folder: Path) -> Built:
    plain = model.load()
    base = model.outputs(plain)
    theirs = peft.get_peft_model(plain, fresh(case, case.config)).eval()
    wanted = moved(theirs, model, base)
    theirs.save_pretrained(folder)
    if case.dtype is not None:
        file = folder / "adapter_model.safetensors"
        dtype = getattr(torch, case.dtype)
        save_file(
            {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in load_file(file).items()
            },
            file,
        )
    again = peft.PeftModel.from_pretrained(model.load(), folder).eval()
    reread = model.outputs(again)
    if case.dtype is not None:
        wanted = reread
    elif apart(reread, wanted) > SAME:
        raise NotApplicable("PEFT gives other numbers after it has saved and loaded it")
    return Built(model, folder, again, wanted, base)


def fresh(case: Case, config: Call) -> Any:
    """A configuration that is to be trained, and the seed of its case, set; of two adapters PEFT may allow
    but one to be trained.
    """
    torch.manual_seed(int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:4]))
    made = config()
    made.inference_mode = case.second is not None and made.inference_mode
    return made


def moved(theirs: torch.nn.Module, model: Model, base: list[torch.Tensor]) -> list[torch.Tensor]:
    """What PEFT's model gives once its adapters do something."""
    for _ in range(6):
        _move(theirs)
        wanted = model.outputs(theirs)
        if not all(out.isfinite().all() for out in wanted):
            raise NotApplicable("PEFT's model gives numbers that are not finite")
        if apart(wanted, base) > MOVED:
            break
    return wanted


@torch.no_grad()
def _move(theirs: torch.nn.Module) -> None:
    """Moves what is trained, and the running means of norms that are stored with it."""
    for module in theirs.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and any(
            p.requires_grad for p in module.parameters(recurse=False)
        ):
            shaken(module, 0.1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))


def pack_of(folder: Path, model: Model) -> Any:
    """A folder as a pack; where it means something with its base alone, by way of a pack that was made with
    the base.
    """
    try:
        return adapterpack.load(folder)
    except AdapterpackError as error:
        if "--base" not in str(error.remedy):
            raise
    out = folder.parent / f"{folder.name}-with-base"
    if not out.is_dir():
        adapterpack.convert(folder, out, to="pack", base=model.folder)
    return adapterpack.load(out)


def _attach(built: Built, outcome: Outcome) -> None:
    report = adapterpack.validate(built.folder)
    try:
        pack = pack_of(built.folder, built.model)
    except AdapterpackError as error:
        if report.valid:
            outcome.notes.append("validate finds nothing wrong with what load refuses")
        if reason := _unlike_itself(built):
            raise NotApplicable(reason) from error
        raise
    model = adapterpack.attach(built.model.load(), pack)
    require(built, outcome, model)
    adapterpack.active(model, None)
    if apart(built.model.outputs(model), built.base) > 0:
        raise AssertionError("switched off, the base gives other numbers")


def _merge(built: Built, outcome: Outcome) -> None:
    out = built.folder.parent / "merged"
    try:
        adapterpack.merge(built.model.folder, [pack_of(built.folder, built.model)], out, durable=False)
    except AdapterpackError as error:
        if reason := _unmergeable(built):
            raise NotApplicable(reason) from error
        raise
    require(built, outcome, built.model.load(out))


def _unmergeable(built: Built) -> str | None:
    """Why PEFT cannot merge it either, or None."""
    try:
        merged = peft.PeftModel.from_pretrained(built.model.load(), built.folder).eval().merge_and_unload()
        return (
            "PEFT's merge gives other numbers than its model"
            if apart(built.model.outputs(merged), built.wanted) > SAME
            else None
        )
    except Exception as error:
        return f"PEFT cannot merge it: {type(error).__name__}"


def _unlike_itself(built: Built) -> str | None:
    """That PEFT's own model of the file is no function of its inputs, if it gives the same batch other
    numbers the second time.
    """
    with contextlib.suppress(RuntimeError):  # a model that takes no single rows
        first, second = built.model.alone(built.theirs), built.model.alone(built.theirs)
        return "PEFT's own model gives other numbers at every call" if apart(first, second) > SAME else None
    return None


def _trip(built: Built, outcome: Outcome) -> None:
    pack, back = built.folder.parent / "pack", built.folder.parent / "back"
    try:
        adapterpack.convert(built.folder, pack, to="pack")
    except AdapterpackError as error:
        if "--base" not in str(error.remedy):
            if reason := _unlike_itself(built):
                raise NotApplicable(reason) from error
            raise
        adapterpack.convert(built.folder, pack, to="pack", base=built.model.folder)
    if not (pack / "adapter_config.json").is_file():
        adapterpack.convert(pack, back, to="peft", base=built.model.folder)
    theirs = back if back.is_dir() else pack
    require(built, outcome, peft.PeftModel.from_pretrained(built.model.load(), theirs).eval())
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (built.folder, theirs))
    if before.keys() != after.keys() or any(
        not torch.equal(before[name].float(), after[name].float()) for name in before
    ):
        outcome.notes.append("other tensors")


def require(built: Built, outcome: Outcome, model: torch.nn.Module) -> None:
    """Checks that a model gives what PEFT's does; or of each row by itself, where in PEFT rows change each
    other, as Lily's routes do.
    """
    error = apart(built.model.outputs(model.eval()), built.wanted)
    if not error <= SAME:
        with contextlib.suppress(Exception):  # a model that takes no single rows
            error = min(error, apart(built.model.alone(model), built.model.alone(built.theirs)))
            outcome.notes.append("row by row")
    if not error <= SAME:
        change = apart(built.wanted, built.base)
        raise AssertionError(f"off by {error:.0e} of the output, where the change is {change:.0e}")
    outcome.error = max(outcome.error, error)


def apart(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest wanted number; of sequences the last tokens, since
    prompts may stand before them.
    """
    assert len(found) == len(wanted), "another number of outputs"
    worst = 0.0
    for ours, right in zip(found, wanted, strict=True):
        last = slice(-min(ours.shape[1], right.shape[1]) if ours.dim() == right.dim() == 3 else None, None)
        one, other = (ours[:, last], right[:, last]) if ours.dim() == right.dim() == 3 else (ours, right)
        assert one.shape == other.shape, "another shape"
        worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp_min(1e-6)))
    return worst


ALONE = Trial(_built, {"attach": _attach, "merge": _merge, "trip": _trip})


def _step(do: Callable[[Built, Outcome], None], built: Built, outcome: Outcome) -> Step:
    try:
        with _quiet(), _in_time():
            do(built, outcome)
    except NotApplicable as error:
        return Step(NONE, _plain(str(error)))
    except AdapterpackError as error:
        return Step(REFUSED, f"{type(error).__name__}: {_reason(error)}", str(error))
    except AssertionError as error:
        return Step(WRONG, _plain(str(error)), traceback.format_exc())
    except Exception as error:
        return Step(CRASH, _plain(f"{type(error).__name__}: {error}"), traceback.format_exc())
    return Step(OK)


def _reason(error: AdapterpackError) -> str:
    """What is wrong, and what was found, without the places, which are long; what loading says stands inside
    of another sentence.
    """
    inner = re.match(r"the pack is not valid, \w+: (.*)", error.what)
    what, found = (inner[1], None) if inner else (error.what, error.found)
    details = re.search(r" \((?:at .*?; )?(?:expected .*?, )?found (.*)\)\.?", what)
    if details:
        what, found = what[: details.start()], details[1]
    return _plain(f"{re.sub(r' [(]at .*', '', what)}{f' ({found[:60]})' if found else ''}")


def _of_peft(error: Exception) -> str:
    """What PEFT says, up to the first set, whose order is another in each process."""
    return f"PEFT: {type(error).__name__}: {str(error).partition('{')[0][:60]}"


def _plain(text: str) -> str:
    """One line without paths or addresses, the same in every run."""
    line = re.sub(r"\s+", " ", text)
    line = re.sub(r"(/[\w.+-]+){2,}/?", "...", line)
    line = re.sub(r"0x[0-9a-f]+", "0x...", line)
    return line[:160].strip()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
