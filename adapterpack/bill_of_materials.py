"""Says what a pack or a bundle is made of as a bill of materials: CycloneDX 1.6 or SPDX 2.3, as JSON.

Both say the same: the artifact and its files with their digests, the base, the packs of a bundle, and the
data and parents that a pack names. All of it is read from manifests, so the same artifact gives the same
document.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .base import is_repo
from .bundle import FILE_NAME as BUNDLE_FILE
from .bundle import read_bundle
from .errors import ConfigError
from .io import Json
from .manifest.structs import Base, FileEntry
from .pack import Pack, load
from .version import VERSION

_UNDATED = "1970-01-01T00:00:00Z"
"""The date of what does not say when it was made: documents of the same artifact have the same bytes."""


class Material(NamedTuple):
    """One thing that an artifact is made of; ``kind`` is CycloneDX's, ``relation`` SPDX's to the artifact.
    ``digest`` is a sha256 in hexadecimal digits, of a pack or a bundle its manifest's; ``fingerprint`` is a
    base's, which is no digest of a file.
    """

    kind: str
    relation: str
    name: str
    version: str | None = None
    digest: str | None = None
    license: str | None = None
    url: str | None = None
    card: Json | None = None
    fingerprint: str | None = None

    @property
    def ref(self) -> str:
        """A name for this material in the document, which no other one has."""
        text = "\0".join(str(part) for part in self[:5])
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def bill_of(folder: Path, form: str = "cyclonedx") -> Json:
    """Lists what the pack or the bundle in a folder is made of; :func:`adapterpack.bom` documents the form.

    Raises:
        ConfigError: there is no such form.
    """
    if form not in FORMS:
        raise ConfigError("unknown form of a bill of materials", found=form, expected=" or ".join(FORMS))
    whole, parts, created = _of_bundle(folder) if (folder / BUNDLE_FILE).is_file() else _of_pack(load(folder))
    return FORMS[form](whole, list({one.ref: one for one in parts}.values()), created or _UNDATED)


def _of_pack(pack: Pack, relation: str = "DESCRIBES") -> tuple[Material, list[Material], str | None]:
    said = pack.manifest
    parameters: Json = {"task": said.task.type or "", "modelArchitecture": said.method.type}
    if said.base.model_type:
        parameters["architectureFamily"] = said.base.model_type
    measured = [
        {"type": metric["name"], "value": f"{metric['value']:g}"}
        for metric in said.metrics
        if metric.get("value") is not None
    ]
    card: Json = {"modelParameters": parameters}
    if measured:
        card["quantitativeAnalysis"] = {"performanceMetrics": measured}
    whole = Material(
        "machine-learning-model",
        relation,
        pack.name,
        said.pack.version,
        _hex(pack.id),
        said.license,
        card=card,
    )
    return (
        whole,
        [_base(said.base, said.base_license), *_claims_of(pack), *_files(said.files)],
        said.pack.created,
    )


def _claims_of(pack: Pack) -> Iterator[Material]:
    """Yields the data and the parents that a pack names."""
    for data in pack.manifest.training.get("datasets", ()):
        yield Material("data", "GENERATED_FROM", data["id"], data.get("revision"), _hex(data.get("digest")))
    if pack.manifest.lineage is not None:
        for parent in pack.manifest.lineage.parents:
            yield Material(
                "machine-learning-model", "DESCENDANT_OF", parent.name, parent.commit, _hex(parent.digest)
            )


def _of_bundle(folder: Path) -> tuple[Material, list[Material], None]:
    bundle = read_bundle(folder)
    parts = [_base(bundle.base, None), *_files(bundle.files)]
    for adapter in bundle.adapters:
        whole, inner, _ = _of_pack(load(folder / adapter.path), "CONTAINS")
        parts += [whole, *(one for one in inner if one.kind != "file")]
    digest = hashlib.sha256((folder / BUNDLE_FILE).read_bytes()).hexdigest()
    return Material("machine-learning-model", "DESCRIBES", folder.name, None, digest), parts, None


def _base(base: Base, license: str | None) -> Material:
    name = base.name or "unnamed base"
    commit = base.commit
    url = f"https://huggingface.co/{name}" + (f"/tree/{commit}" if commit else "") if is_repo(name) else None
    return Material(
        "machine-learning-model",
        "DEPENDS_ON",
        name,
        commit,
        license=license,
        url=url,
        fingerprint=base.content,
    )


def _files(files: Iterable[FileEntry]) -> Iterator[Material]:
    for file in files:
        yield Material("file", "CONTAINS", file.path, None, file.sha256)


def _hex(digest: str | None) -> str | None:
    found = re.search(r"[0-9a-f]{64}$", digest or "")
    return found and found.group()


def _cyclonedx(whole: Material, parts: list[Material], created: str) -> Json:
    def component(one: Material) -> Json:
        made = {
            "type": one.kind,
            "bom-ref": one.ref,
            "name": one.name,
            "version": one.version,
            "hashes": one.digest and [{"alg": "SHA-256", "content": one.digest}],
            "licenses": one.license and [{"license": {"name": one.license}}],
            "externalReferences": one.url and [{"type": "distribution", "url": one.url}],
            "properties": one.fingerprint
            and [{"name": "adapterpack:base:content", "value": one.fingerprint}],
            "modelCard": one.card,
        }
        return {key: value for key, value in made.items() if value}

    parents = [one for one in parts if one.relation == "DESCENDANT_OF"]
    rest = [one for one in parts if one not in parents]
    root = component(whole)
    if parents:
        root["pedigree"] = {"ancestors": [component(one) for one in parents]}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, whole.ref)}",
        "version": 1,
        "metadata": {
            "timestamp": created,
            "tools": {"components": [{"type": "application", "name": "adapterpack", "version": VERSION}]},
            "component": root,
        },
        "components": [component(one) for one in rest],
        "dependencies": [{"ref": whole.ref, "dependsOn": [one.ref for one in rest]}],
    }


def _spdx(whole: Material, parts: list[Material], created: str) -> Json:
    def package(one: Material) -> Json:
        made = {
            "SPDXID": f"SPDXRef-{one.ref}",
            "name": one.name,
            "versionInfo": one.version,
            "downloadLocation": one.url or "NOASSERTION",
            "filesAnalyzed": False,
            "checksums": one.digest and [{"algorithm": "SHA256", "checksumValue": one.digest}],
            "licenseComments": one.license and f"its author says: {one.license}",
            "comment": one.fingerprint and f"adapterpack's fingerprint of the content: {one.fingerprint}",
        }
        return {key: value for key, value in made.items() if value is not None}

    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": whole.name,
        "documentNamespace": f"https://adapterpack.dev/spdx/{whole.digest}",
        "creationInfo": {"created": created, "creators": [f"Tool: adapterpack-{VERSION}"]},
        "packages": [package(one) for one in [whole, *parts]],
        "relationships": [
            {
                "spdxElementId": f"SPDXRef-{'DOCUMENT' if one is whole else whole.ref}",
                "relationshipType": one.relation,
                "relatedSpdxElement": f"SPDXRef-{one.ref}",
            }
            for one in [whole, *parts]
        ],
    }


FORMS = {"cyclonedx": _cyclonedx, "spdx": _spdx}
"""How the forms are written, by name."""
