"""Whether the compiled kernels are used, or numpy does their work."""

from __future__ import annotations

import warnings

from ..._native import build
from ..._native.loading import load
from ..check import CHECKS, Check, Looked, Problem

_AGAIN = "install adapterpack again where there is a C compiler; numpy does the same work, more slowly"


def _look() -> Looked:
    facts, problems = {}, []
    for module in build.MODULES:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            used = load(module) is not None
        facts[module.removeprefix("_")] = "compiled" if used else "numpy"
        if said:  # it is there, and of other sources or for another machine
            what, _, remedy = str(said[0].message).partition(" To fix it: ")
            problems.append(Problem(what.rstrip("."), remedy or _AGAIN))
        elif not used:
            problems.append(
                Problem(
                    f"the kernel {module.removeprefix('_')} is not compiled, or not for a processor "
                    "like this one",
                    _AGAIN,
                )
            )
    return Looked({**facts, "sources": build.source_hash()}, tuple(problems))


CHECKS.register(Check(name="kernels", title="Compiled kernels", rank=60, look=_look))
