"""What adapterpack requires, as its installed metadata says, and which distributions are installed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(extra: str = "") -> tuple[Requirement, ...]:
    """What adapterpack requires on this system, or what one of its extras adds.

    Raises:
        PackageNotFoundError: adapterpack is not installed, but imported from a folder.

    Example:
        >>> "numpy" in [one.name for one in required()]
        True
    """
    return tuple(_added("adapterpack", extra))


def _added(name: str, extra: str) -> Iterator[Requirement]:
    """What a distribution requires by an extra alone, and what the extras of those ask for in turn; without
    one what it always requires.
    """
    for one in map(Requirement, requires(name) or ()):
        if _wanted(one, extra) and not (extra and _wanted(one, "")):
            yield one
            for further in one.extras if installed(one.name) is not None else ():
                yield from _added(one.name, further)


def _wanted(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def fits(requirement: Requirement) -> bool:
    """Whether what a requirement names is installed in a version that it takes."""
    found = installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


@cache
def providers_of(module: str) -> dict[str, str]:
    """Name -> version of every installed distribution that has the package ``module``, by the list of its
    files.

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
