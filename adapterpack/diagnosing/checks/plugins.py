"""Whether what other packages add to adapterpack can be imported."""

from __future__ import annotations

from importlib.metadata import distributions

from ..check import CHECKS, Check, Looked, Problem


def _look() -> Looked:
    rows, problems = [], []
    for package, point in ((str(one.name), point) for one in distributions() for point in one.entry_points):
        if not point.group.startswith("adapterpack."):
            continue
        rows.append(
            {"kind": point.group.removeprefix("adapterpack."), "name": point.name, "package": package}
        )
        try:
            point.load()
        except (Exception, SystemExit) as error:  # whatever the module of another package does
            problems.append(
                Problem(
                    f"{point.name} = {point.value} of {package} cannot be imported: "
                    f"{type(error).__name__}: {error}",
                    f"update or uninstall {package}",
                )
            )
    return Looked({"plugins": rows}, tuple(problems))


CHECKS.register(Check(name="plugins", title="Plugins", rank=75, look=_look))
