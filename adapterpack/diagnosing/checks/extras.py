"""Which extras are installed, what each missing one would bring, and the command that installs it."""

from __future__ import annotations

from ...extras import EXTRAS
from ..check import CHECKS, Check, Looked, Problem
from ..requirements import fits, installed, required


def _look() -> Looked:
    rows, problems = [], []
    for extra, brings in EXTRAS.items():
        wanted = required(extra)
        missing = [one.name for one in wanted if installed(one.name) is None]
        state = "installed" if not missing else "missing" if len(missing) == len(wanted) else "in part"
        install = f"pip install 'adapterpack[{extra}]'"
        rows.append(
            {
                "extra": extra,
                "state": state,
                "brings": brings,
                "install": install if missing else "",
                "missing": missing,
            }
        )
        if not missing:
            problems += [
                Problem(
                    f"{one.name} is {installed(one.name)}, the extra {extra} asks for {one.specifier}",
                    install,
                )
                for one in wanted
                if not fits(one)
            ]
    return Looked({"extras": rows}, tuple(problems))


CHECKS.register(Check(name="extras", title="Extras", rank=70, look=_look))
