"""Prepares a push: validates the pack or bundle, renders its card, and refuses whatever must not leave this
machine, such as text that contains secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from msgspec.structs import replace

from ..base import is_repo
from ..bundle import FILE_NAME, read_bundle
from ..errors import ConfigError, FormatError, StorageError
from ..io import scratch_folder, sha256_of
from ..manifest import manifest as m
from ..pack import SIGNATURE, Pack, load, seal
from ..pack.validate import check
from ..pack.validate.checks import FORBIDDEN_SUFFIXES, forbidden_files
from ..paths import StrPath
from ..runtime import validate_bundle
from .artifact import KINDS
from .card import bundle_card, pack_card
from .transport import LocalFile, names

_SECRETS: dict[str, re.Pattern[bytes]] = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{20,}"),
    "an AWS access key": re.compile(rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60})"),
    "an API key": re.compile(rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"),
    "an address with a password": re.compile(rb"https?://[^/\s:@\"']{1,100}:[^/\s:@\"']{1,100}@"),
}
"""Kind of secret -> its pattern, which runs in linear time."""
README = "README.md"
_TEXT = frozenset({".json", ".md", ".txt", ".jinja"})
_MAX_TEXT = 64 << 20


@dataclass(frozen=True)
class PreparedPush:
    """The files to publish by their path in the repository, the card, and the identity. ``label`` is the name
    for people, and ``folder`` holds the artifact here.
    """

    kind: str
    folder: Path
    id: str
    label: str
    files: dict[str, LocalFile]
    card: LocalFile


@contextmanager
def prepare(
    source: Pack | StrPath,
    to: names.HubReference,
    base_model: str | None,
    license_name: str | None,
) -> Iterator[PreparedPush]:
    """Checks an artifact and yields what to publish. A pack in memory, from PEFT, or with a new base name or
    license is written again.

    Raises:
        ConfigError: the base has no name that others can resolve, there is no license, or a text looks like a
            secret.
        FormatError: the artifact is not valid, or is none.
    """
    if base_model is not None and not is_repo(base_model):
        raise ConfigError(
            "the base must be named as others can find it",
            where="--base-model",
            expected="OWNER/NAME",
            found=base_model,
        )
    kind = "pack" if isinstance(source, Pack) else _kind(Path(source))
    with scratch_folder() as scratch:
        if kind in {"pack", "peft"}:
            ready = _pack(source, scratch, to, base_model, license_name)
        elif kind == "bundle" and not isinstance(source, Pack):
            ready = _bundle(Path(source), to, base_model, license_name)
        else:
            raise FormatError(
                "only packs, PEFT adapters and bundles are pushed",
                where=source,
                expected=" or ".join(KINDS),
                remedy="convert it first (adapterpack convert --to pack)",
            )
        _refuse_secrets(
            {
                README: ready.card.text(_MAX_TEXT),
                **{
                    name: file.text(_MAX_TEXT)
                    for name, file in ready.files.items()
                    if PurePosixPath(name).suffix in _TEXT
                },
            }
        )
        yield ready


def _kind(folder: Path) -> str | None:
    if not folder.exists():
        raise StorageError(
            "there is no such folder", where=folder, remedy="name the folder of a pack or a bundle"
        )
    return next((kind for mark, kind in KINDS.items() if (folder / mark).is_file()), None)


def _pack(
    source: Pack | StrPath,
    scratch: Path,
    to: names.HubReference,
    base_model: str | None,
    license_name: str | None,
) -> PreparedPush:
    folder = source.path if isinstance(source, Pack) else Path(source)
    if folder is not None and (strange := next(forbidden_files(folder), None)):
        raise FormatError(
            f"the pack must not be published, {strange.rule}: {strange.message}",
            where=folder / strange.where,
            remedy=strange.fix,
        )
    pack, report = (source, None) if isinstance(source, Pack) else check(source)
    manifest = pack.manifest
    changed = replace(
        manifest,
        license=license_name or manifest.license,
        base=replace(manifest.base, name=base_model or manifest.base.name),
    )
    _require_named(changed.base.name, changed.license, pack.name)
    if changed != manifest:
        pack = seal(changed, pack.tensors, pack.extra)
    if (
        folder is None
        or not (folder / m.FILE_NAME).is_file()
        or f"sha256:{sha256_of(folder / m.FILE_NAME)}" != pack.id
    ):
        folder = pack.write(scratch / "pack").path or scratch
        report = None
    if report is None:  # always validates the exact files that are sent
        pack, report = check(folder)
    files = _list_files(folder, m.FILE_NAME, pack.manifest.files)
    card = LocalFile.of(pack_card(pack, to, report).encode("utf-8"))
    return PreparedPush("pack", folder, pack.id, pack.manifest.pack.name, files, card)


def _bundle(
    folder: Path, to: names.HubReference, base_model: str | None, license_name: str | None
) -> PreparedPush:
    report = validate_bundle(folder)
    report.require_valid()
    bundle = read_bundle(folder)
    for entry in bundle.files:
        if names.unsafe(entry.path) or PurePosixPath(entry.path).suffix.casefold() in FORBIDDEN_SUFFIXES:
            raise FormatError(
                "the bundle holds a file that must not be published",
                where=folder / entry.path,
                remedy="export it again",
            )
    licenses = {load(folder / adapter.path).manifest.license for adapter in bundle.adapters}
    agreed = license_name or (licenses.pop() if len(licenses) == 1 else None)
    base = base_model or bundle.base.name
    _require_named(base, agreed, folder.name)
    files = _list_files(folder, FILE_NAME, bundle.files)
    card = bundle_card(bundle, to, str(base), str(agreed).lower(), report)
    identity = f"sha256:{files[FILE_NAME].sha256}"
    return PreparedPush("bundle", folder, identity, folder.name, files, LocalFile.of(card.encode("utf-8")))


def _list_files(folder: Path, manifest: str, entries: Iterable[m.FileEntry]) -> dict[str, LocalFile]:
    """Lists a manifest, the files that it lists, whose digests were verified before, and a signature, if
    there is one.
    """
    own = [name for name in (manifest, SIGNATURE) if (folder / name).is_file()]
    return {
        **{name: LocalFile.of(folder / name) for name in own},
        **{entry.path: LocalFile(folder / entry.path, entry.size, entry.sha256) for entry in entries},
    }


def _require_named(base: str | None, license_name: str | None, name: str) -> None:
    if base is None or not is_repo(base):
        raise ConfigError(
            "the base is named by a place on your disk, or not at all: nobody else could find it",
            where=f"'{name}', base",
            expected="OWNER/NAME",
            found=base,
            remedy="name it on the hub with --base-model OWNER/NAME",
        )
    if not license_name:
        raise ConfigError(
            "there is no license",
            where=f"'{name}', license",
            remedy="say under which with --license, such as apache-2.0",
        )


def _refuse_secrets(files: Mapping[str, bytes]) -> None:
    """Searches the texts that are to be published for secrets.

    Raises:
        ConfigError: a text contains something that looks like a secret.

    Example:
        >>> _refuse_secrets({"README.md": b"nothing to see"})
    """
    for name, data in files.items():
        for what, pattern in _SECRETS.items():
            if match := pattern.search(data):
                raise ConfigError(
                    f"a file to be published holds what looks like {what}",
                    where=f"{name}, byte {match.start()}",
                    remedy="revoke it, take it out and pack the adapter again; nothing was sent",
                )
