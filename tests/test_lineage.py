"""What packs made from packs say of where they come from: the true graph, as far back as a manifest
reaches.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import adapterpack
from adapterpack import LoRA, Pack, validate
from adapterpack.adapter_methods import Site, method_of
from adapterpack.converting.packs import dequantize
from adapterpack.errors import FormatError
from adapterpack.manifest import manifest as m
from adapterpack.pack.lineage import MAX_ANCESTORS, descend
from adapterpack.pack.pack import build
from adapterpack.pack.validate.checks.lineage import MAX_DEPTH, depths
from adapterpack.quantizing.packs import quantize_pack

pytestmark = pytest.mark.fast

SITE = Site("layers.0.proj", 5, 7)


def made(seed: int, lineage: m.Lineage | None = None) -> Pack:
    rng, cfg = np.random.default_rng(seed), LoRA(r=2)
    params = {
        "lora_A": rng.normal(size=(2, 5)).astype(np.float32),
        "lora_B": rng.normal(size=(7, 2)).astype(np.float32),
    }
    return build(
        f"p{seed}",
        method_of(cfg),
        {SITE: (cfg, params)},
        task=m.PackTask("text-generation"),
        base=m.Base(name="b"),
        lineage=lineage,
    )


def lineage_of(pack: Pack) -> m.Lineage:
    assert pack.manifest.lineage is not None
    return pack.manifest.lineage


def valid(pack: Pack, folder: Path) -> bool:
    return validate(pack.write(folder).path).valid  # type: ignore[arg-type]


def test_three_generations(tmp_path: Path) -> None:
    """compose(quantize(compose(a, b)), c, a): the packs that were made from packs stand in ``ancestors`` with
    their parents, no others.
    """
    a, b, c = made(1), made(2), made(3)
    first = adapterpack.compose([a, b])
    assert lineage_of(first).ancestors == {}
    small = quantize_pack(first)
    assert lineage_of(small).ancestors == {first.id: (a.id, b.id)}
    last = adapterpack.compose([small, c, a], out=tmp_path / "last")
    assert [parent.digest for parent in lineage_of(last).parents] == [small.id, c.id, a.id]
    assert lineage_of(last).ancestors == {first.id: (a.id, b.id), small.id: (first.id,)}
    assert validate(tmp_path / "last").valid
    assert lineage_of(adapterpack.load(tmp_path / "last")) == lineage_of(last)
    plain, _ = dequantize(small)
    assert lineage_of(plain).ancestors == {first.id: (a.id, b.id), small.id: (first.id,)}


def test_what_lies_too_far_back_is_left_out(tmp_path: Path) -> None:
    """A chain of twelve compositions: every pack of it is valid, so none says more than the generations that
    a manifest reaches.
    """
    pack = made(0)
    for number in range(12):
        pack = adapterpack.compose([pack, made(100 + number)], name=f"c{number}")
        known = lineage_of(pack)
        reached = depths([parent.digest for parent in known.parents], known.ancestors)
        assert reached is not None
        assert max(reached.values()) == min(number + 1, MAX_DEPTH)
        assert valid(pack, tmp_path / pack.name)


def test_no_more_ancestors_than_a_manifest_names(tmp_path: Path) -> None:
    """64 parents of 7 composed parents each: the nearest 256 are kept, which are all 64 parents first; the
    pack is valid.
    """
    before = {f"sha256:{number:064x}": (f"sha256:{number:032x}{1:032x}",) for number in range(1, 64 * 7 + 1)}
    digests, parents = list(before), []
    for number in range(64):
        own = digests[7 * number : 7 * number + 7]
        parents.append(
            made(
                number,
                m.Lineage(
                    "linear", tuple(m.Parent(one, "x") for one in own), ancestors={d: before[d] for d in own}
                ),
            )
        )
    found = descend("linear", parents, {}, [1.0] * 64)
    assert len(found.ancestors) == MAX_ANCESTORS
    assert {parent.id for parent in parents} <= set(found.ancestors)
    assert valid(made(999, found), tmp_path / "many")


def test_claims_that_contradict_each_other_are_refused() -> None:
    """Two packs that name other parents of one ancestor; two that are each other's ancestors, as no digest
    allows; the order is free.
    """
    x, y, z = (f"sha256:{letter * 64}" for letter in "abc")

    def claims(seed: int, ancestors: dict[str, tuple[str, ...]]) -> Pack:
        return made(
            seed, m.Lineage("linear", tuple(m.Parent(one, "n") for one in ancestors), ancestors=ancestors)
        )

    with pytest.raises(FormatError, match="different parents"):
        adapterpack.compose([claims(1, {x: (y,)}), claims(2, {x: (z,)})])
    with pytest.raises(FormatError, match="its own ancestors"):
        adapterpack.compose([claims(1, {x: (y,)}), claims(2, {y: (x,)})])
    assert set(
        lineage_of(adapterpack.compose([claims(1, {x: (y, z)}), claims(2, {x: (z, y)})])).ancestors
    ) >= {x}


def test_the_same_parent_twice_is_one_ancestor() -> None:
    """compose(d, d) where d has parents (p, p): named once."""
    p = made(1)
    twice = adapterpack.compose([p, p], weights=[0.5, 0.5])
    again = adapterpack.compose([twice, dataclasses.replace(twice)], name="again")
    assert lineage_of(again).ancestors == {twice.id: (p.id,)}
