"""Declares that a pack may be used on a variant of its base: cast, quantized, resharded, or with renamed
tensors.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..base import Checkpoint, compatibility
from ..base.variants import variant
from ..errors import BaseMismatch, NothingToDo, Unsupported
from ..io import refuse_existing
from ..manifest.structs import Variant
from ..pack import Pack, as_pack, descend, seal
from ..paths import StrPath


def declare(pack: Pack | StrPath, base: StrPath, other: StrPath, out: StrPath | None = None) -> Pack:
    """Compares ``other`` with the base of a pack, and makes a copy of the pack that may be used on both.

    A cast, a new sharding and a renaming are compared byte by byte. A quantization can only be recognized by
    what the checkpoint says about itself and by the tensors that it did not change; the variant is then
    identified by its content. The copy keeps the pack's name, tensors and canary.

    Args:
        pack: the pack, or its folder.
        base: the checkpoint that the pack names.
        other: the checkpoint that is to be accepted as well.
        out: a new folder to write the pack to.

    Raises:
        BaseMismatch: ``base`` is not exactly the base that the pack names, or ``other`` is not a variant of
            it.
        NothingToDo: the pack is already accepted on ``other``.
        SiteNotFound: ``other`` has renamed a tensor that the pack changes, so that the path of its module
            does not lead to it.
        Unsupported: in ``other`` another tensor has the name of one that the pack changes.
        OutputExists: ``out`` already exists.

    Example:
        >>> declare("packs/tickets", "models/base",
        ...     "models/base-bf16").manifest.base.variants[0].relation  # doctest: +SKIP
        'dtype_cast'
    """
    refuse_existing(out)
    source = as_pack(pack)
    first, second = Checkpoint(base), Checkpoint(other)
    if (verdict := source.require_base(first)).name != "same":
        raise BaseMismatch(
            f"variants are declared of the base that a pack names by its content: {verdict.means}",
            where=base,
            found=str(verdict),
            remedy="name that base, or convert an imported adapter to a pack with its base first",
        )
    named = source.manifest.base
    if (already := compatibility.compare(named, compatibility.deciding_fingerprint(second, named))).accepted:
        raise NothingToDo(
            f"pack '{source.name}' is accepted there as it is: {already.means}",
            where=other,
            remedy="use the pack as it is",
        )
    compared = variant(first, second)
    if compared.relation == "renamed_keys":
        _require_same_places(source, first, second)
    declared = Variant(
        compared.relation, compared.digests.structure, compared.digests.content, compared.tested
    )
    lineage = descend("declare", [source], {"relation": declared.relation, "variant": declared.content})
    draft = replace(
        source.manifest, base=replace(named, variants=(*named.variants, declared)), lineage=lineage, files=()
    )
    made = seal(draft, source.tensors, source.extra)
    made.require_base(second)
    return made if out is None else made.write(out)


def _require_same_places(pack: Pack, base: Checkpoint, variant_base: Checkpoint) -> None:
    """Checks that the names by which the variant looks up a changed module's tensors lead to the same bytes,
    or to nothing.
    """
    for group in pack.manifest.groups:
        old = base.weight_name(group.path, group.weight)
        new = variant_base.weight_name(group.path, group.weight)
        if old is None or new is None:
            continue
        stem, place = old.rpartition(".")[0], new.rpartition(".")[0]
        for name in sorted(name for name in base.tensors if name.rpartition(".")[0] == stem):
            twin = f"{place}.{name.rpartition('.')[2]}"
            if twin not in variant_base.tensors or variant_base.digests[twin] != base.digests[name]:
                raise Unsupported(
                    "in this variant another tensor has the name of one that the pack changes",
                    where=f"{variant_base.folder}, {twin}",
                    expected=f"the bytes of {name}",
                    remedy="use the pack on the base that it names",
                )
