"""Tells what a path contains (a pack, a PEFT adapter, a bundle, a base, an adapter in one file, a folder of
onnxruntime-genai's) and passes each stage's question on to code for that kind.

Code for one kind is imported only when a path is of that kind: looking at a pack does not import what bundles
need.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bill_of_materials import bill_of
from .bundle import FILE_NAME as BUNDLE_FILE
from .bundle import GENAI_FILE
from .conformance.against import validate_against
from .errors import ConfigError, StorageError
from .fleet.fleet import sign_fleet, verify_fleet
from .fleet.inspect import inspect_fleet, validate_fleet
from .fleet.manifest import FILE_NAME as FLEET_FILE
from .hub import folder_of, is_remote
from .io import TENSORS, strict_json
from .manifest import manifest as m
from .notebook import Shown
from .pack import Budget, Pack, Signature, describe, load
from .pack.inspect import inspect_base
from .pack.trust import SigstoreIdentity, SigstoreSigner
from .pack.trust.sign import sign as sign_pack
from .pack.trust.sign import verify as verify_pack
from .pack.validate import Report
from .pack.validate.validation import validate as validate_pack
from .paths import StrPath
from .peft import layout

if TYPE_CHECKING:
    from torch.nn import Module


def kind_of(path: StrPath) -> str:
    """Returns ``pack``, ``peft``, ``fleet``, ``bundle``, ``genai_folder`` or ``base``, by the file that only
    this kind has; ``adapter`` for a single file and for another tool's folder.

    Raises:
        StorageError: there is no such path.
    """
    folder = Path(path)
    if folder.is_file():
        return "adapter"
    if not folder.is_dir():
        raise StorageError(
            "there is no such file or folder here",
            where=path,
            remedy="name a pack, a bundle or a base checkpoint",
        )
    marks = {m.FILE_NAME: "pack", layout.CONFIG: "peft", FLEET_FILE: "fleet", BUNDLE_FILE: "bundle"}
    if found := next((kind for mark, kind in marks.items() if (folder / mark).is_file()), None):
        return "adapter" if found == "peft" and _foreign(folder) else found
    weights = any(folder.glob("*.safetensors"))
    if (folder / GENAI_FILE).is_file() and not weights:
        return "genai_folder"
    # torchtune leaves its adapter beside the base's config.json.
    whole = weights and (folder / "config.json").is_file()
    return "base" if whole or not _foreign(folder) else "adapter"


def _foreign(folder: Path) -> bool:
    """Whether another tool wrote a folder: those with PEFT's config file name their tensors differently."""
    if (folder / TENSORS).exists():
        return False
    from .converting.format import format_of  # noqa: PLC0415 - PEFT's folders do not need it

    found = format_of(folder)
    return found is not None and found.name != "peft"


def validate(
    path: StrPath,
    base: StrPath | None = None,
    *,
    full: bool = False,
    budget: Budget | None = None,
    allow_structural: bool = False,
    provider: str | None = None,
    against: StrPath | Module | None = None,
    model: str | None = None,
) -> Report:
    """Makes every check that applies to a pack, a bundle, an adapter of PEFT or another tool, or a folder of
    onnxruntime-genai's; with a base, also that it fits the base.

    ``full`` adds the costly checks; if one of them cannot be made, or the ``budget`` of time or memory runs
    out, the report is ``not fully checked``. With ``allow_structural``, a base with the same names, dtypes
    and shapes but other weights is a warning only. Without ``full``, only the headers of
    ``hf://org/name@rev`` are read, and those of its base (by default the base that it names).

    For a bundle, ``provider`` (``cuda``) also checks that each node of its graphs has a kernel there, which
    needs no GPU.

    ``against`` asks what runs a pack whether it acts there: the address of a server (adapterpack, vLLM,
    llama.cpp), a folder (a checkpoint that it was merged into, onnxruntime-genai's, an adapter of MLX), or a
    model of transformers' or PEFT's in this process; ``model`` is the pack's name there. With a base it also
    tells the usual faults.

    Returns:
        A report: ``report.state``, ``report.findings``, ``report.not_checked``, ``report.base`` (the verdict
            on the base).
        Faults are findings, not exceptions.

    Raises:
        StorageError: there is no such path.

    Example:
        >>> validate("packs/tickets").valid  # doctest: +SKIP
        True
    """
    if against is not None:
        return validate_against(path, against, base, model)
    if model is not None:
        raise ConfigError(
            "only what runs a pack has a name for it", found=model, remedy="name it with --against"
        )
    if provider is not None and (is_remote(path) or kind_of(folder_of(path)) != "bundle"):
        raise ConfigError(
            "only a bundle on this machine has graphs for a provider",
            where=path,
            found=provider,
            remedy="leave --provider out",
        )
    if is_remote(path):
        from .hub.remote import validate_remote  # noqa: PLC0415 - as below

        there = base if base is None else str(base) if is_remote(base) else folder_of(base)
        return validate_remote(str(path), there, full=full, budget=budget, allow_structural=allow_structural)
    known = None if base is None else folder_of(base)
    return _validate_here(folder_of(path), known, full, budget, allow_structural, provider)


def _validate_here(
    folder: Path,
    base: Path | None,
    full: bool,
    budget: Budget | None,
    allow_structural: bool,
    provider: str | None,
) -> Report:
    kind = kind_of(folder)
    if kind == "adapter":
        from .converting.single_file import validate_file  # noqa: PLC0415 - as below

        return validate_file(folder, base, full)
    if kind == "fleet":
        return validate_fleet(folder, base, allow_structural)
    if kind == "genai_folder":
        # packs do not need it
        from .runtime.sessions.genai_checks import validate_other_folder  # noqa: PLC0415

        return validate_other_folder(folder, full)
    if kind == "bundle":
        # packs do not need what bundles need
        from .runtime.sessions.validation import validate_bundle  # noqa: PLC0415

        return validate_bundle(
            folder, base, full=full, budget=budget, allow_structural=allow_structural, provider=provider
        )
    return validate_pack(folder, base, full=full, budget=budget, allow_structural=allow_structural)


class Inspection(dict[str, Any], Shown):
    """What :func:`inspect` found, by name."""


def inspect(path: StrPath) -> dict[str, Any]:
    """Shows what an artifact is, which base it fits, how large it is and what it changes; packs are verified
    on the way.

    Example:
        >>> inspect("packs/tickets")["ranks"]  # doctest: +SKIP
        {'8': 37}
    """
    return Inspection(_inspect(path))


def _inspect(path: StrPath) -> dict[str, Any]:
    folder = folder_of(path)
    kind = kind_of(folder)
    if kind == "adapter":
        from .base.gguf.inspect import inspect_model  # noqa: PLC0415 - as above

        # packs do not need what other formats need
        from .converting.single_file import inspect_file  # noqa: PLC0415

        return (None if folder.is_dir() else inspect_model(folder)) or inspect_file(folder)
    if kind == "bundle":
        return _inspect_bundle(folder)
    if kind == "fleet":
        return inspect_fleet(folder)
    if kind == "genai_folder":
        # packs do not need it
        from .runtime.sessions.genai_checks import inspect_other_folder  # noqa: PLC0415

        return inspect_other_folder(folder)
    return inspect_base(folder) if kind == "base" else describe(load(folder), folder)


def sign(
    pack: Pack | StrPath,
    key: StrPath | SigstoreSigner,
    *,
    identity: str | None = None,
    expires: str | datetime | None = None,
    password: str | None = None,
) -> Signature:
    """Signs a pack, a fleet or a bundle: writes the detached signature ``adapterpack.sig.json`` into its
    folder, over the manifest and every file that it lists.

    ``key`` is a PEM file with a private elliptic-curve key, made with
    ``openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem``, or a
    :class:`SigstoreSigner`, which signs without one. ``identity`` is free text, with a key only, and
    ``expires`` a date or a time; both are signed too. OpenSSF's model-signing verifies the result.

    Raises:
        ConfigError: the key, the password, the expiry or the identity token cannot be used, or sigstore did
            not sign.
        FormatError: the folder is not a valid pack, fleet or bundle; or it is a PEFT folder, which has no
            closed list of files.
        OutputExists: there is a signature already.
        MissingExtra: ``cryptography`` is not installed.

    Example:
        >>> sign("packs/tickets", "key.pem", expires="2030-06-30").pack  # doctest: +SKIP
        'sha256:0f1c...'
    """
    if not isinstance(pack, Pack) and (kind := _kind_at(Path(pack))) in ("bundle", "fleet"):
        if kind == "fleet":
            return sign_fleet(Path(pack), key, identity=identity, expires=expires, password=password)
        # packs do not need what bundles need
        from .runtime.sessions.signing import sign_bundle  # noqa: PLC0415

        return sign_bundle(Path(pack), key, identity=identity, expires=expires, password=password)
    return sign_pack(pack, key, identity=identity, expires=expires, password=password)


def verify(
    pack: Pack | StrPath,
    key: StrPath | SigstoreIdentity,
    *,
    identity: str | None = None,
    at: datetime | None = None,
) -> Signature:
    """Verifies the signature of a pack, a fleet or a bundle: the holder of the key, or somebody under the
    identity, signed exactly these files.

    ``key`` is a PEM file with the public key (``openssl pkey -in key.pem -pubout -out key.pub``), or a
    :class:`SigstoreIdentity`. With ``identity``, the signed text must equal it. ``at`` is the time to compare
    the expiry with, by default now. Signatures made by OpenSSF's model-signing are verified too, with a local
    key or by sigstore. Only the envelope is parsed before its signature has been verified.

    Raises:
        Unsigned: there is no signature.
        WronglySigned: another key made it, the envelope was altered, or a file was altered, added or removed
            after signing; the error names the file.
        SignatureExpired: the signature is valid, but has expired.
        UnsupportedSignature: the signature relies on more than a local key, or on no identity.
        ConfigError: the key cannot be used.
        MissingExtra: ``cryptography`` is not installed.

    Example:
        >>> verify("packs/tickets", "key.pub").identity  # doctest: +SKIP
        'adapters@example.org'
    """
    if not isinstance(pack, Pack) and (kind := _kind_at(Path(pack))) in ("bundle", "fleet"):
        if kind == "fleet":
            return verify_fleet(Path(pack), key, identity=identity, at=at)
        from .runtime.sessions.signing import verify_bundle  # noqa: PLC0415 - as above

        return verify_bundle(Path(pack), key, identity=identity, at=at)
    return verify_pack(pack, key, identity=identity, at=at)


def bom(path: StrPath, form: str = "cyclonedx") -> dict[str, Any]:
    """Lists what a pack or a bundle is made of as a bill of materials: files with digests, base, packs, data
    and parents.

    ``form`` is ``cyclonedx`` (1.6) or ``spdx`` (2.3); the document is a value of JSON. A pack is verified on
    the way; what it says of its data, parents and license are claims of its author.

    Raises:
        ConfigError: there is no such form.
        AdapterpackError: the pack or bundle is not valid.

    Example:
        >>> bom("packs/tickets")["specVersion"]  # doctest: +SKIP
        '1.6'
    """
    return bill_of(folder_of(path), form)


def _kind_at(path: Path) -> str | None:
    """Returns the kind of the folder at a path, or None if there is no folder."""
    return kind_of(path) if path.is_dir() else None


def _inspect_bundle(folder: Path) -> dict[str, Any]:
    """Returns what a bundle's manifest says, as JSON values."""
    from .bundle import read_bundle  # noqa: PLC0415 - packs do not need what bundles need

    bundle = read_bundle(folder)
    return {
        "kind": "bundle",
        "path": str(folder),
        "mode": bundle.mode,
        "task": bundle.task,
        "frontend": bundle.frontend,
        "base": strict_json.plain(bundle.base),
        "adapters": [
            {"name": a.name, "slot": a.slot, "pack": a.pack, "labels": list(a.labels or ())}
            for a in bundle.adapters
        ],
        "slots": bundle.slots,
        "max_rank": bundle.max_rank,
        "sites": sum(not site.members for site in bundle.sites.values()),
        "quantization": bundle.quantization,
        "parity": bundle.parity,
        "bytes": sum(entry.size for entry in bundle.files),
        "graph_bytes": sum(entry.size for entry in bundle.files if entry.role == "graph"),
    }
