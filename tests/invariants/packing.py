"""Proves that packs of a method are read as they were written, and that PEFT reads and computes the same."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np

from adapterpack.io.safe_open import TENSORS
from adapterpack.pack import from_peft
from adapterpack.peft import layout
from adapterpack.testing import Case, build_pack, digests, is_float, require, resolve_config

from .model import in_single, inputs_of, module_of


def scale_recomputed(case: Case) -> None:
    """The manifest's ``scale`` and ``rank`` of a group are ``cfg.scale`` and ``cfg.rank``, exactly: nobody
    has to infer them.
    """
    group, pack = build_pack(case).manifest.groups[0], build_pack(case)
    cfg = pack.config_at(group)
    require(
        group.scale == cfg.scale and isinstance(group.scale, float),
        f"the manifest says scale {group.scale}, the config {cfg.scale}",
    )
    require(group.rank == cfg.rank, f"the manifest says rank {group.rank}, the config {cfg.rank}")


def peft_round_trip(case: Case) -> None:
    """The folder read as PEFT's, without the manifest, gives the same parameters bit for bit, the same config
    and the same features.

    Where a config leaves out what PEFT needs, the folder does not offer itself to PEFT.
    """
    with tempfile.TemporaryDirectory() as folder:
        build_pack(case).write(Path(folder) / "pack")
        if layout.config_bytes(build_pack(case).manifest) is None:
            require(
                not (Path(folder) / "pack" / layout.CONFIG).exists(),
                "PEFT would load a folder that lacks tensors",
            )
            return
        back = from_peft.read(Path(folder) / "pack")
    ((alone,), (adapter,)) = (
        back.adapters(),
        back.adapters(lambda _: (case.layer.out_features, case.layer.in_features)),
    )
    (stored,) = build_pack(case).adapters()
    require(digests(adapter.params) == digests(stored.params), "tensors came back with other bytes")
    require(adapter.config == stored.config, f"{stored.config} came back as {adapter.config}")
    widths = zip(
        (alone.site.in_features, alone.site.out_features),
        (case.layer.in_features, case.layer.out_features),
        strict=True,
    )
    require(all(mine in {0, its} for mine, its in widths), "features changed")


def file_size(case: Case) -> None:
    """The tensor file is at most 1.05 times the bytes of what is trained, and its header: nothing is stored
    that follows from a seed.

    A start that is taken off again counts as trained: the pack holds the difference. A frozen vector as wide
    as the layer is let pass, and so is a config that says that it stores more for another library.
    """
    own = case.own()
    vectors = {
        name
        for name in case.method.traits.frozen
        if name in own and own[name].ndim == 1 and is_float(own[name])
    }
    kept = case.trains | case.config.frozen | vectors
    trained = sum(
        v.astype(np.float32).nbytes for name, v in {**case.shared(), **case.own()}.items() if name in kept
    )
    with tempfile.TemporaryDirectory() as folder:
        build_pack(case).write(Path(folder) / "pack")
        data = (Path(folder) / "pack" / TENSORS).read_bytes()
    body = len(data) - 8 - int.from_bytes(data[:8], "little")
    require(
        case.config.redundant or body <= 1.05 * trained,
        f"the file holds {body} bytes of tensors, {trained} are trained",
    )


def peft_parity(case: Case) -> None:
    """PEFT, given the folder, gives ``run(x)``, and merged into the weight again: within 2e-5 of the largest
    entry and of ``|W| |x|``.

    Where it can: not every pack offers a file to PEFT, and PEFT refuses some widths and configs.
    """
    import torch
    from peft import PeftModel

    pack = build_pack(case)
    assert case.method.peft is not None
    if layout.config_bytes(pack.manifest) is None or not case.method.peft.peft_supports(
        resolve_config(case), case.site
    ):
        return
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pack.write(Path(folder) / "pack")
        theirs = PeftModel.from_pretrained(module_of(case), str(Path(folder) / "pack")).eval()
    expected, size = in_single(case)
    with torch.no_grad():
        x = inputs_of(case)
        outputs = {"PEFT": theirs(x), "PEFT merged": theirs.merge_and_unload()(x)}
    for name, found in outputs.items():
        error = float(np.abs(found.numpy() - expected).max())
        require(error <= 2e-5 * size, f"{name} is off by {error:.2g}, of sums of size {size:.2g}")
