"""Checks the installed packages: Python itself, adapterpack's requirements, its extras, and plugins."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..extras import EXTRAS
from ..version import VERSION
from .finding import CheckProblem, CheckResult


def list_requirements(extra: str = "") -> tuple[Requirement, ...]:
    """Lists adapterpack's requirements on this system, or those that one of its extras adds.

    Raises:
        PackageNotFoundError: adapterpack is not installed, but imported from a folder.

    Example:
        >>> "numpy" in [one.name for one in list_requirements()]
        True
    """
    return tuple(_list_extra_requirements("adapterpack", extra))


def _list_extra_requirements(name: str, extra: str) -> Iterator[Requirement]:
    """Yields the requirements that an extra of a distribution adds, including those of nested extras; without
    an extra, those that always apply.
    """
    for one in map(Requirement, requires(name) or ()):
        if _is_asked_for(one, extra) and not (extra and _is_asked_for(one, "")):
            yield one
            for further in one.extras if find_version(one.name) is not None else ():
                yield from _list_extra_requirements(one.name, further)


def _is_asked_for(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def find_version(name: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def fits(requirement: Requirement) -> bool:
    """Returns whether a requirement's distribution is installed in an accepted version."""
    found = find_version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


@cache
def providers_of(module: str) -> dict[str, str]:
    """Returns name -> version of every installed distribution that contains the package ``module``.

    Example:
        >>> list(providers_of("packaging"))
        ['packaging']
    """
    found = {}
    for one in distributions():
        name = canonicalize_name(str(one.name or ""))
        if name.startswith(module) and any(str(file) == f"{module}/__init__.py" for file in one.files or ()):
            found[name] = str(one.version)
    return dict(sorted(found.items()))


def check_python() -> CheckResult:
    """Reports the version of Python and the system."""
    libc = " ".join(filter(None, platform.libc_ver()))
    return CheckResult(
        {
            "adapterpack": VERSION,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "at": sys.executable,
            "environment": sys.prefix
            if sys.prefix != sys.base_prefix
            else "none: packages go into this Python itself",
            "system": platform.platform() + (f", {libc}" if libc else ""),
            "machine": platform.machine(),
        }
    )


def check_dependencies() -> CheckResult:
    """Checks that the required libraries are installed in fitting versions."""
    rows, problems = [], []
    for requirement in list_requirements():
        found = find_version(requirement.name)
        rows.append(
            {"library": requirement.name, "version": found, "asked_for": str(requirement.specifier) or "any"}
        )
        if not fits(requirement):
            problems.append(
                CheckProblem(
                    f"{requirement.name} is {found or 'not installed'}, adapterpack asks for "
                    f"{requirement.specifier}",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                    broken=True,
                )
            )
    return CheckResult({"libraries": rows}, tuple(problems))


def check_extras() -> CheckResult:
    """Reports which extras are installed, what a missing one would add, and the command that installs it."""
    rows, problems = [], []
    for extra, brings in EXTRAS.items():
        wanted = list_requirements(extra)
        missing = [one.name for one in wanted if find_version(one.name) is None]
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
                CheckProblem(
                    f"{one.name} is {find_version(one.name)}, the extra {extra} asks for {one.specifier}",
                    install,
                )
                for one in wanted
                if not fits(one)
            ]
    return CheckResult({"extras": rows}, tuple(problems))


def check_plugins() -> CheckResult:
    """Checks that the plugins of other packages can be imported."""
    rows, problems = [], []
    for package, point in ((str(one.name), point) for one in distributions() for point in one.entry_points):
        if not point.group.startswith("adapterpack."):
            continue
        rows.append(
            {"kind": point.group.removeprefix("adapterpack."), "name": point.name, "package": package}
        )
        try:
            point.load()
        except (Exception, SystemExit) as error:  # another package's module may raise anything
            problems.append(
                CheckProblem(
                    f"{point.name} = {point.value} of {package} cannot be imported: "
                    f"{type(error).__name__}: {error}",
                    f"update or uninstall {package}",
                )
            )
    return CheckResult({"plugins": rows}, tuple(problems))
