"""What PEFT's loader and adapterpack say of the bad packs: prints the table of docs/validator.md.

python benchmarks/validator.py
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "packs"))
os.environ["HF_HUB_OFFLINE"] = "1"

import make_bad as bad
import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from adapterpack.pack.validate.validation import validate


class Net(nn.Module):
    """The base of the bad packs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"q": nn.Linear(5, 7, bias=False), "v": nn.Linear(5, 3, bias=False)})
        self.head = nn.Linear(3, 2, bias=False)
        self.config = PretrainedConfig()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net["v"](x))

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> dict[str, object]:
        return {}


def by_peft(folder: Path) -> str:
    """loads / warns / refuses."""
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        signal.setitimer(signal.ITIMER_REAL, 5)
        try:
            PeftModel.from_pretrained(Net(), str(folder))
        except TimeoutError:
            return "runs on (stopped after 5 s)"
        except Exception as error:
            return f"refuses ({type(error).__name__})"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return "loads, with a warning" if any("adapter" in str(one.message).lower() for one in told) else "loads"


def _too_long(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    signal.signal(signal.SIGALRM, _too_long)
    refused = 0
    print("| pack | adapterpack | PEFT's loader |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        bad.good(Path(scratch) / "good")
        if not (validate(Path(scratch) / "good").valid and by_peft(Path(scratch) / "good") == "loads"):
            raise SystemExit("the good pack must load in both")
        for case in bad.BAD:
            folder = bad.make(case, Path(scratch) / case.name)
            ours = next(finding.rule for finding in validate(folder).findings if finding.severity == "error")
            # a pipe would block PEFT's reader for ever, and a terabyte of holes would be hashed
            theirs = "not run: would wait for ever" if case.name == "pipe_for_tensors" else by_peft(folder)
            refused += theirs.startswith("refuses")
            print(f"| {case.name} | refuses ({ours}) | {theirs} |")
    print(f"\nOf {len(bad.BAD)} bad packs adapterpack refuses {len(bad.BAD)}, PEFT's loader {refused}.")


if __name__ == "__main__":
    main()
