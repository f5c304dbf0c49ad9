"""Whether the libraries that every installation has are there, in versions that fit."""

from __future__ import annotations

from ..check import CHECKS, Check, Looked, Problem
from ..requirements import fits, installed, required


def _look() -> Looked:
    rows, problems = [], []
    for requirement in required():
        found = installed(requirement.name)
        rows.append(
            {"library": requirement.name, "version": found, "asked_for": str(requirement.specifier) or "any"}
        )
        if not fits(requirement):
            problems.append(
                Problem(
                    f"{requirement.name} is {found or 'not installed'}, adapterpack asks for "
                    f"{requirement.specifier}",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                    broken=True,
                )
            )
    return Looked({"libraries": rows}, tuple(problems))


CHECKS.register(Check(name="dependencies", title="Libraries", rank=20, look=_look))
