"""Writes the bill of materials of the package itself, which its wheels carry (PEP 770): ``python tests/own_bill.py``
prints ``adapterpack.cdx.json``.

It is read off what pyproject.toml and the site for browsers declare, so it holds ranges and direct dependencies: what
an environment has in the end, only a bill of that environment says.
"""

from __future__ import annotations

import json
import sys
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.model.lifecycle import LifecyclePhase, PredefinedLifecycle
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OF_DEVELOPERS = {"test", "docs", "bench"}
SAID = (
    "direct dependencies as declared, with their ranges; no resolved versions, nothing that they depend on; "
    "no code of others is copied into the package"
)


class Declared(NamedTuple):
    """A requirement: the package index, the name there, what was declared, and the extra that it belongs to."""

    index: str
    name: str
    text: str
    extra: str | None

    @property
    def url(self) -> PackageURL:
        """The package's address in bills of materials; a scope of npm's is a namespace."""
        namespace, _, name = self.name.rpartition("/")
        return PackageURL(self.index, namespace or None, name)


def declared() -> Iterator[Declared]:
    """Every requirement that users of the package can come to have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for extra, texts in {None: project["dependencies"], **project["optional-dependencies"]}.items():
        for text in texts if extra not in OF_DEVELOPERS else ():
            name = canonicalize_name(Requirement(text).name)
            if name != project["name"]:  # an extra that is made of others
                yield Declared("pypi", name, text, extra)
    site = json.loads((ROOT / "web" / "site-package.json").read_text("utf-8"))
    for name, text in site["dependencies"].items():
        yield Declared("npm", name, text, "browser")


def bill() -> str:
    """The document, as CycloneDX 1.6: the same bytes for the same declarations."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = list(declared())
    whole = PackageURL("pypi", name=project["name"], version=project["version"])
    root = Component(
        name=project["name"],
        version=project["version"],
        type=ComponentType.LIBRARY,
        bom_ref=str(whole),
        purl=whole,
        description=project["description"],
        licenses=[LicenseExpression(project["license"])],
        properties=[Property(name="adapterpack:completeness", value=SAID)],
    )
    made = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, repr((whole, requirements))))
    made.metadata.component = root
    made.metadata.timestamp = None  # type: ignore[assignment] # nothing in it depends on when
    made.metadata.lifecycles = [PredefinedLifecycle(LifecyclePhase.PRE_BUILD)]
    for url in sorted({one.url for one in requirements}, key=str):
        those = [one for one in requirements if one.url == url]
        needed = any(one.extra is None for one in those)
        made.components.add(
            Component(
                name=those[0].name,
                type=ComponentType.LIBRARY,
                bom_ref=str(url),
                purl=url,
                scope=ComponentScope.REQUIRED if needed else ComponentScope.OPTIONAL,
                properties=[
                    Property(name=f"adapterpack:declared:{one.extra or 'always'}", value=one.text)
                    for one in those
                ],
            )
        )
    made.register_dependency(root, made.components)
    return JsonV1Dot6(made).output_as_string(indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(bill())
