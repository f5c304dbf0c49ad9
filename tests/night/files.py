"""Changed bytes in the folders of packs, fleets, bundles and other tools' adapters: an error by name, or what
it says is true.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from kills import _tiny_llama, digests, pack
from processes_of_trials import done

sys.path.insert(0, str(Path(__file__).parent.parent / "fuzz"))
import mutate

import adapterpack
from adapterpack import Fleet
from adapterpack.errors import AdapterpackError
from adapterpack.quantizing.packs import quantize_pack

FREE = {"README.md", ".gitattributes", "adapterpack.sig.json"}
"""Files that a pack may have beside those that it lists."""


def _shapes(dice: random.Random) -> dict[str, tuple[int, int]]:
    return {
        f"layers.{number}.q": (dice.randrange(4, 60), dice.randrange(4, 60))
        for number in range(dice.randrange(1, 4))
    }


def changed(dice: random.Random, folder: Path) -> str:
    """One change of one file of a folder, in words; bytes of a manifest are forged so that they fit its own
    digest, at times.
    """
    file = dice.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
    data, other = (
        file.read_bytes(),
        dice.choice([path for path in sorted(folder.rglob("*")) if path.is_file()]).read_bytes(),
    )
    action = dice.choice(
        ("bytes", "bytes", "header", "json", "json", "swap", "link", "gone", "folder", "more", "copy")
    )
    if action == "json" and file.suffix == ".json":
        file.write_bytes(mutate.canonical_or_bytes(data, dice, other))
    elif action == "header" and file.suffix == ".safetensors":
        file.write_bytes(mutate.header_or_bytes(data, dice, other))
    elif action == "swap":
        file.write_bytes(other)
    elif action == "link":
        away = folder.parent / f"away-{dice.randrange(10**9)}"
        file.rename(away)
        file.symlink_to(away)
    elif action == "gone":
        file.unlink()
    elif action == "folder":
        file.unlink()
        file.mkdir()
    elif action == "more":
        (
            folder / dice.choice(("x", "x.bin", "adapter_model.bin", "model.py", ".x", "README.md"))
        ).write_bytes(data[:1000])
    elif action == "copy":
        shutil.copy(file, folder / f"copy-{file.name}")
    else:
        file.write_bytes(mutate.mutated_bytes(data, dice, other))
    return f"{action} of {file.relative_to(folder)}"


def _looked_at(what: str, path: Path, use: Callable[[], object], same: bool) -> None:
    """The validator's answer is that of use; ``same`` says that nothing was changed that counts, else both
    refuse.
    """
    report = adapterpack.validate(path)
    try:
        use()
        used = True
    except AdapterpackError:
        used = False
    assert report.valid == used, f"{what}: {report.state}, used {used}: {report.findings[:3]}"
    assert used or not same, f"{what}: refused though nothing that counts was changed: {report.findings[:3]}"


def file_pack(dice: random.Random, folder: Path) -> None:
    """A pack, plain or quantized."""
    made = pack("one", dice.randrange(99), _shapes(dice))
    kind = dice.choice((None, "int8", "int4", "mixed"))
    made = made if kind is None else quantize_pack(made, scheme=kind)
    for number in range(30):
        at = folder / f"p{number}"
        before = digests(made.write(at).path or at)
        what = changed(dice, at)
        listed = {name: digest for name, digest in digests(at).items() if name not in FREE}
        forged = listed.get("adapterpack.json") != before["adapterpack.json"]

        def use(at: Path = at) -> None:
            loaded = adapterpack.load(at)
            for adapter in loaded.adapters():
                assert all(np.isfinite(value).all() for value in adapter.wide.values())

        if listed == before and not any(path.is_symlink() for path in at.iterdir()):
            _looked_at(what, at, use, same=True)
        elif forged:
            _looked_at(what, at, use, same=False)
        else:
            report = adapterpack.validate(at)
            assert not report.valid, f"{what}: valid"
        shutil.rmtree(at)


def file_fleet(dice: random.Random, folder: Path) -> None:
    """A fleet: every byte counts, and a forged manifest is refused or is a fleet of packs."""
    shapes = _shapes(dice)
    fleet = adapterpack.compress(
        [pack(name, seed, shapes) for seed, name in enumerate("abc")], basis=dice.randrange(1, 5)
    )
    for number in range(30):
        at = folder / f"f{number}"
        fleet.write(at)
        before = digests(at)
        what = changed(dice, at)

        def use(at: Path = at) -> None:
            loaded = Fleet.load(at)
            for name in loaded.names:
                for adapter in loaded.pack(name).adapters():
                    assert all(np.isfinite(value).all() for value in adapter.wide.values())

        kept = all(digests(at).get(name) == digest for name, digest in before.items())
        _looked_at(what, at, use, same=kept and not any(path.is_symlink() for path in at.iterdir()))
        shutil.rmtree(at)


def file_bundle(dice: random.Random, folder: Path) -> None:
    """A bundle: a session opens exactly those that are valid, and every listed byte counts."""
    done(lambda: _tiny_llama(folder / "base"), folder)
    one = (
        pack("one", 1, {"model.layers.0.self_attn.q_proj": (16, 16)}, "text-generation")
        .write(folder / "pack")
        .path
    )
    done(lambda: adapterpack.export(folder / "base", [one], folder / "bundle"), folder)
    whole = digests(folder / "bundle")
    for number in range(8):
        at = folder / f"b{number}"
        shutil.copytree(folder / "bundle", at)
        what = changed(dice, at)
        now = digests(at)
        done(partial(_bundle_looked_at, at, what, now, whole), folder)
        shutil.rmtree(at)


def _bundle_looked_at(at: Path, what: str, now: dict[str, str], whole: dict[str, str]) -> None:
    manifest = next(name for name in whole if name.endswith("bundle.json"))
    report = adapterpack.validate(at)
    if now.get(manifest) == whole[manifest] and any(
        now.get(name) != digest for name, digest in whole.items()
    ):
        assert not report.valid, f"{what}: valid"
    try:
        adapterpack.Session(at)
        opened = True
    except AdapterpackError:
        opened = False
    assert opened or not report.valid, f"{what}: valid, but a session refuses it"


def file_fuzz(dice: random.Random, folder: Path) -> None:
    """Some seconds of the fuzzer from a seed of its own."""
    command = [
        sys.executable,
        str(Path(mutate.__file__).with_name("fuzz.py")),
        "--seconds",
        "20",
        "--seed",
        str(dice.randrange(1 << 30)),
        "--findings",
        str(folder / "findings"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]


TRIALS = {
    "file_pack": file_pack,
    "file_fleet": file_fleet,
    "file_bundle": file_bundle,
    "file_fuzz": file_fuzz,
}
