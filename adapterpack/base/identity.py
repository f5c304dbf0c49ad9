"""Whether a base is the one that a pack or a bundle names: one comparison for checkpoints, models in memory and bundles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BaseMismatch
from ..manifest import manifest as m
from .fingerprint import Fingerprint
from .match import Variant, Verdict, match

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

OR_ELSE = {
    "structural": ", or accept another with --allow-structural-base (allow_structural=True; for attach check_base=False)",
    "other": ", or declare a cast, quantized or renamed form of it as a variant (adapterpack declare)",
}
"""Verdict -> what a user can do beside using the right base."""


def levels(base: m.Base) -> Fingerprint:
    """The levels of a base that a manifest knows."""
    return Fingerprint(base.structure, base.content, base.files, base.probe)


def variants(base: m.Base) -> tuple[Variant, ...]:
    """The variants that a manifest declares."""
    return tuple(Variant(one.relation, Fingerprint(one.structure, one.content), one.tested) for one in base.variants)


def read(base: Checkpoint, wanted: m.Base, content: bool | None = True) -> Fingerprint:
    """The levels of a checkpoint that tell whether it is ``wanted``; bytes are read only if they can still decide.

    ``content=False`` reads headers and samples only, unless the manifest names a base without its structure; None reads more where they
    leave it open: where the manifest knows no samples, or they are others and a variant might be meant.
    """
    known = [levels(wanted), *(variant.digests for variant in variants(wanted))]
    structures = {each.structure for each in known}
    if content is None:
        content = wanted.probe is None or (base.probe != wanted.probe and base.structure in {each.structure for each in known[1:]})
        content = content or wanted.structure != base.structure
    deciding = None in structures or (content and base.structure in structures)
    by_content = deciding and any(each.content is not None for each in known)
    by_files = deciding and any(each.content is None and each.files is not None for each in known)
    return base.fingerprint(content=by_content, files=by_files)


def verdict(wanted: m.Base, found: Fingerprint) -> Verdict:
    """What is known about ``found`` being the base that a manifest names, or one of the variants that it declares."""
    return match(levels(wanted), found, variants(wanted))


def agree(wanted: m.Base, other: m.Base) -> bool:
    """Whether ``other`` is the base ``wanted`` or one of the variants that it declares, as far as both are known.

    Example:
        >>> from adapterpack.manifest.parts import Variant
        >>> agree(m.Base(content="bfp1:a", variants=(Variant("dtype_cast", content="bfp1:b"),)), m.Base(content="bfp1:b"))
        True
        >>> agree(m.Base(content="bfp1:b"), m.Base(content="bfp1:a"))
        False
    """
    known = verdict(wanted, levels(other))
    return known.accepted or not (known.differs or known.variant is not None)


def require(owner: str, wanted: m.Base, found: Fingerprint, *, name: str | None, where: object,
            allow_structural: bool = False) -> Verdict:
    """The verdict on ``found``, if it lets the owner of ``wanted`` be used there. An owner without any digest is not held to one.

    ``owner`` says whose base it is, for instance ``pack 'tickets'``; ``name`` and ``where`` describe what was found.

    Raises:
        BaseMismatch: it is another base, or nothing shows that it is this one and ``allow_structural`` was not given.
    """
    known = verdict(wanted, found)
    if known.accepted or (allow_structural and known.name == "structural") or not any(levels(wanted)):
        return known
    what = f"{owner} was made for another base" if known.differs else f"nothing shows that {owner} was made for this base"
    raise BaseMismatch(f"{what}: {known.means}", where=where, expected=_described(wanted.name or "an unnamed base", levels(wanted), found),
                       found=_described(name, found, levels(wanted)), remedy="use the base that it names" + OR_ELSE.get(known.name, ""))


def _described(name: str | None, one: Fingerprint, other: Fingerprint) -> str:
    """A base by name and the first level in which it differs from the other, or the first that it has."""
    pairs = [(mine, theirs) for mine, theirs in zip(one, other, strict=True) if mine is not None]
    digest = next((mine for mine, theirs in pairs if theirs not in (None, mine)), pairs[0][0] if pairs else "no fingerprint")[:17]
    return digest if name is None else f"{name} ({digest})"
