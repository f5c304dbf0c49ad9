"""Defines a target: the files that it adds to a finished bundle so that another product can run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...bundle import Bundle
from ...errors import Unsupported
from ...graph_passes import default_slot_name
from ...registry import Registry
from ...tasks import Task


class Target(NamedTuple):
    """One product that runs what export writes.

    ``modes`` lists the modes that it can run, ``remedy`` says what to do about the others. ``slot_name(path,
    field)`` returns the product's name for a slot; ``groups`` says whether several modules may share one,
    ``engine`` whether adapterpack's own engine may run the bundle. ``place(bundle)`` returns the bundle's
    path within the output folder, ``""`` for the folder itself. ``write(folder, bundle)`` adds the product's
    own files to a bundle's ``folder``, and whatever else it needs. ``finish(folder, split)`` changes the
    finished bundle; ``split`` is the size limit of data files in bytes, if the user set one, which only a
    target that ``splits`` allows. ``next_step`` says what to do with ``{out}``.
    """

    name: str
    summary: str
    modes: frozenset[str]
    remedy: str
    serves: Callable[[Task], bool]
    slot_name: Callable[[str, str], str] = default_slot_name
    groups: bool = True
    engine: bool = False
    place: Callable[[Bundle], str] = lambda bundle: ""
    write: Callable[[Path, Bundle], None] = lambda folder, bundle: None
    finish: Callable[[Path, int | None], None] | None = None
    splits: bool = False
    next_step: str = ""

    def require(self, mode: str, task: Task) -> None:
        """Checks that the product can run the mode and the task.

        Raises:
            Unsupported: the product cannot.
        """
        if mode not in self.modes:
            raise Unsupported(
                f"the target {self.name} cannot run this mode",
                found=mode,
                expected=" or ".join(sorted(self.modes)),
                remedy=self.remedy,
            )
        if not self.serves(task):
            raise Unsupported(
                f"the target {self.name} has nothing for this task",
                found=task.name,
                remedy="leave --target out",
            )


TARGETS = Registry("target", Target, "adapterpack.targets", "adapterpack.exporting.targets")
"""Name -> the target; a module of this folder registers the one that it defines."""
