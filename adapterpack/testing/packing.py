"""The laws of a method's packs, PEFT's form among them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..pack import peft_layout
from ..pack.validate import load
from .case import Case, digests, pack_of, require, resolved


def pack_round_trip(case: Case) -> None:
    """``load(write(build(p))) == p``: tensors bit for bit, config, site and id; writing twice gives the same bytes. Needs registration."""
    pack = pack_of(case)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            pack.write(Path(folder) / name)
        files = [{path.name: path.read_bytes() for path in (Path(folder) / name).iterdir()} for name in ("one", "two")]
        back = load(Path(folder) / "one")
    require(files[0] == files[1], "writing twice gives other bytes")
    require(back.id == pack.id, f"the id was {pack.id} and is {back.id}")
    (adapter,), (stored,) = back.adapters(), pack.adapters()
    require(digests(adapter.params) == digests(stored.params), "tensors came back with other bytes")
    require(all(adapter.params[name].dtype == value.dtype for name, value in stored.params.items()), "tensors changed their dtype")
    require((adapter.site, adapter.config) == (stored.site, stored.config), "site or config changed")
    require(case.method.bake is not None or adapter.config == resolved(case), "the config is not the one that was packed")


def scale_recomputed(case: Case) -> None:
    """The manifest's ``scale`` and ``rank`` of a group are ``cfg.scale`` and ``cfg.rank``, exactly: nobody has to infer them."""
    group, pack = pack_of(case).manifest.groups[0], pack_of(case)
    cfg = pack.config_at(group)
    require(group.scale == cfg.scale and isinstance(group.scale, float), f"the manifest says scale {group.scale}, the config {cfg.scale}")
    require(group.rank == cfg.rank, f"the manifest says rank {group.rank}, the config {cfg.rank}")


def peft_round_trip(case: Case) -> None:
    """The folder read as PEFT's, without the manifest, gives the same parameters bit for bit, the same config and the same features.

    Where a config leaves out what PEFT needs, the folder does not offer itself to PEFT.
    """
    with tempfile.TemporaryDirectory() as folder:
        pack_of(case).write(Path(folder) / "pack")
        if peft_layout.config_bytes(pack_of(case).manifest) is None:
            require(not (Path(folder) / "pack" / peft_layout.CONFIG).exists(), "PEFT would load a folder that lacks tensors")
            return
        back = peft_layout.read(Path(folder) / "pack")
    ((alone,), (adapter,)) = back.adapters(), back.adapters(lambda _: (case.layer.out_features, case.layer.in_features))
    (stored,) = pack_of(case).adapters()
    require(digests(adapter.params) == digests(stored.params), "tensors came back with other bytes")
    require(adapter.config == stored.config, f"{stored.config} came back as {adapter.config}")
    widths = zip((alone.site.in_features, alone.site.out_features), (case.layer.in_features, case.layer.out_features), strict=True)
    require(all(mine in {0, its} for mine, its in widths), "features changed")
