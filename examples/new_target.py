"""A target of export in one file: what a product that serves bundles wants to find in the folder.

This one writes a `Dockerfile` that runs the bundle. A package of yours brings its target by an entry point:
[project.entry-points."adapterpack.targets"] docker = "new_target:docker"; then `adapterpack export BASE PACK
-o OUT --target docker`.
"""

from pathlib import Path

from adapterpack.bundle.manifest import MODES, Bundle
from adapterpack.exporting.targets import TARGETS, Target


def write(folder: Path, bundle: Bundle) -> None:
    """Adds the file to the finished bundle in ``folder``."""
    names = ", ".join(adapter.name for adapter in bundle.adapters)
    (folder / "Dockerfile").write_text(
        f"# {bundle.task}: {names}\nFROM python:3.12-slim\nRUN pip install adapterpack\nCOPY . /bundle\n"
        'ENTRYPOINT ["adapterpack", "run", "/bundle"]\n'
    )


docker = TARGETS.register(
    Target("docker", "a container image", frozenset(MODES), "", lambda task: True, write=write)
)
