"""The pack: canonical bytes, verified bytes, and an error that names the place for everything that can be
wrong with a folder.
"""

from __future__ import annotations

import copy
import hashlib
import html
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from notebooks import page_in_notebook

from adapterpack import LoRA, TrainableTokens
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.composing.pipeline import compose
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    FormatError,
    NonFinite,
    NothingToDo,
    OutputExists,
    SiteNotFound,
    StorageError,
    UnknownMethod,
    Unsupported,
)
from adapterpack.io import safetensors, strict_json
from adapterpack.manifest import manifest as m
from adapterpack.manifest.migrations import STEPS
from adapterpack.manifest.secondary_methods import MethodSites
from adapterpack.manifest.structs import (
    BaseQuantization,
    Canary,
    Composition,
    CompositionMember,
    Dims,
    Features,
    PackTokenizer,
    Pixels,
    Variant,
)
from adapterpack.pack.pack import Pack, build, seal
from adapterpack.pack.validate.validation import load, validate
from adapterpack.store import Store

sys.path.insert(0, str(Path(__file__).parent / "packs"))
from make_bad import sealed_json

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parent / "golden"
FILES = ["adapter_config.json", "adapter_model.safetensors", "adapterpack.json"]
TENSORS, MANIFEST, CONFIG = "adapter_model.safetensors", "adapterpack.json", "adapter_config.json"


def ramp(*shape: int) -> np.ndarray:
    """Small numbers that float32 holds exactly, the same on every machine; none is zero."""
    return (np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape) - 0.5) / 64


def make_base(folder: Path, change: float = 0.0, width: int = 5) -> Path:
    """A tiny checkpoint: two linear layers, one with a bias, in one file."""
    folder.mkdir(parents=True)
    tensors = {
        "net.q.weight": ramp(7, width) + change,
        "net.v.weight": ramp(3, width),
        "net.v.bias": ramp(3),
        "head.weight": ramp(2, 3),
    }
    safetensors.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def make_pack(base: Path | None = None, name: str = "tickets") -> Pack:
    """Two sites of different ranks, one module trained whole, and the digests of ``base``."""
    known = Checkpoint(base) if base else None
    identity = (
        m.Base(known.name, None, "tiny", known.structure, known.content) if known else m.Base("org/base")
    )
    adapters = {
        Site("net.q", 5, 7): (LoRA(r=2, alpha=3), {"lora_A": ramp(2, 5), "lora_B": ramp(7, 2)}),
        Site("net.v", 5, 3, bias=True): (LoRA(r=1, alpha=3), {"lora_A": ramp(1, 5), "lora_B": ramp(3, 1)}),
    }
    weights = {"net.q": "net.q.weight", "net.v": "net.v.weight", "head": "head.weight"}
    return build(
        name,
        get("lora"),
        adapters,
        task=m.PackTask("text-classification", "Tiny", ("yes", "no")),
        base=identity,
        full={"head": {"weight": ramp(2, 3), "bias": ramp(2)}},
        weights=weights,
        license="apache-2.0",
    )


def with_methods() -> Pack:
    """LoRA, and rows of an embedding beside it."""
    tokens = Site("net.emb", 4, 9, "table")
    rows = MethodSites(
        get("trainable_tokens"),
        {tokens: (TrainableTokens(token_indices=(2, 7)), {"trainable_tokens_delta": ramp(2, 4)})},
    )
    q = {Site("net.q", 5, 7): (LoRA(r=2, alpha=3), {"lora_A": ramp(2, 5), "lora_B": ramp(7, 2)})}
    return build(
        "golden",
        get("lora"),
        q,
        secondary=[rows],
        task=m.PackTask("text-generation"),
        base=m.Base("org/base"),
    )


DIGESTS = {
    "one": "f4bd3937ef4f71741ad04321e41fbc4e4568c5ffe005a84f23889f916b785898",
    "two": "a10ed5a64731cbbe82e1a77b247777b254d39e9ab4c0f0041496875c566add69",
}


def with_composition() -> Pack:
    """Two members under a tree in which one of them stands twice; without its lineage, which names the
    program that wrote it. The members have the digests that they have in version 1.2.
    """
    whole = compose(
        [make_pack(name="one"), make_pack(name="two")], tree="sum(0.5*one, stack(one, two))", name="golden"
    )
    assert whole.manifest.composition is not None
    members = tuple(
        replace(one, digest=f"sha256:{DIGESTS[one.name]}") for one in whole.manifest.composition.members
    )
    composition = replace(whole.manifest.composition, members=members)
    return seal(replace(whole.manifest, lineage=None, composition=composition), whole.tensors)


def with_canary() -> Pack:
    """A canary of speech, of which only the recipe is stored."""
    pack, rows = (
        make_pack(name="golden"),
        ({"ids": [3, 1], "logits": [0.5, -0.25]}, {"ids": [0, 2], "logits": [1.0, 0.75]}),
    )
    heard = Canary(
        (), rows, rows[::-1], 0.125, decoder_input_ids=((2, 5), (2,)), features=Features(7, (2, 80, 3000))
    )
    return seal(replace(pack.manifest, canary=heard), pack.tensors)


FEATURES: dict[str, Callable[[], Pack]] = {
    "methods": with_methods,
    "composition": with_composition,
    "canary": with_canary,
}
"""What a pack may have beside the usual."""
SINCE = {"methods": "1.2", "composition": "1.2", "canary": "1.3"}
"""The first version with it."""
GOLDEN_PACKS: dict[str, Callable[[], Pack]] = {
    **{version: partial(make_pack, name="golden") for version in [*STEPS, m.FORMAT_VERSION]},
    **{
        f"{version}-{name}": make
        for name, make in FEATURES.items()
        for version in [*STEPS, m.FORMAT_VERSION]
        if version >= SINCE[name]
    },
}
"""Every version that the steps lead through, the one that is written, and in each one pack for every feature
that it has.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid pack on disk that a test may spoil."""
    make_pack().write(tmp_path / "tickets")
    return tmp_path / "tickets"


def canonical(value: Any) -> bytes:
    """The manifest's byte form, written out here a second time."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as a forger would, who knows the canonical form and the digest in it."""
    value = json.loads((folder / MANIFEST).read_bytes())
    change(value)
    (folder / MANIFEST).write_bytes(sealed_json(value))


def reseal(folder: Path) -> None:
    """Makes the manifest's sizes and digests of files and tensors fit the folder again: a forger who knows
    these, too.
    """

    def change(value: dict[str, Any]) -> None:
        for entry in value["files"]:
            data = (folder / entry["path"]).read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        file = safetensors.SafetensorsFile(folder / TENSORS)
        for name, entry in value["tensors"].items():
            entry["sha256"] = hashlib.sha256(file.buffer(name)).hexdigest()

    edit(folder, change)


def reseal_files(folder: Path) -> None:
    """As `reseal`, the digests of files only."""

    def change(value: dict[str, Any]) -> None:
        for entry in value["files"]:
            data = (folder / entry["path"]).read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit(folder, change)


def rules(folder: Path, base: Path | None = None) -> list[tuple[str, str]]:
    """The errors that validation finds, as (rule, where); `load` must refuse exactly when there is one."""
    report = validate(folder, base)
    errors = [(finding.rule, finding.where) for finding in report.findings if finding.severity == "error"]
    assert report.valid is not bool(errors)
    if base is None:
        if errors:
            with pytest.raises(AdapterpackError, match=errors[0][0]):
                load(folder)
        else:
            load(folder)
    return errors


# ------------------------------------------------------------------------------------------------------------
# what is written


def test_a_pack_comes_back_as_it_was_built(folder: Path) -> None:
    """load(write(build(...))): tensors, sites, resolved configs, scales, head, task; id = sha256 of the
    manifest's bytes.
    """
    pack, built = load(folder), make_pack()
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert pack.id == built.id == f"sha256:{hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()}"
    assert pack.path == folder
    assert set(pack.tensors) == set(built.tensors)
    assert all(np.array_equal(pack.tensors[name], built.tensors[name]) for name in built.tensors)
    q, v = pack.adapters()
    assert (q.site, v.site) == (Site("net.q", 5, 7), Site("net.v", 5, 3, bias=True))
    assert (q.config, v.config) == (LoRA(r=2, alpha=3), LoRA(r=1, alpha=3))
    assert [(group.rank, group.scale) for group in pack.manifest.groups] == [(2, 1.5), (1, 3.0), (None, None)]
    assert (q.weight, v.weight) == ("net.q.weight", "net.v.weight")
    assert np.array_equal(q.params["lora_B"], ramp(7, 2))
    assert {path: sorted(params) for path, params in pack.full().items()} == {"head": ["bias", "weight"]}
    assert pack.manifest.task == m.PackTask("text-classification", "Tiny", ("yes", "no"))


def test_the_repr_of_a_pack_is_a_line() -> None:
    """A notebook shows what a cell ends with: the name, the method, how much there is, and where; never the
    numbers.
    """
    assert re.fullmatch(r"<Pack tickets: lora, 3 modules, \d+ numbers, in memory>", repr(make_pack()))


def test_a_validation_is_a_line_and_a_page(folder: Path) -> None:
    """As text the rules that are broken; in a notebook each finding, with what to do."""
    assert repr(validate(folder)) == f"<Report of {folder}: valid; nothing found>"
    (folder / "adapter_model.safetensors").write_bytes(b"")
    report = validate(folder)
    assert repr(report) == f"<Report of {folder}: invalid; {report.findings[0].rule}>"
    page = page_in_notebook(report)
    assert "A validation" in page
    assert html.escape(report.findings[0].message) in page


def test_writing_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Also from the pack that was read back, and from equal configs written as 3 and 3.0; the manifest is in
    its canonical form.
    """
    make_pack().write(tmp_path / "again")
    load(folder).write(tmp_path / "copy")
    for name in FILES:
        assert (
            (tmp_path / "again" / name).read_bytes()
            == (tmp_path / "copy" / name).read_bytes()
            == (folder / name).read_bytes()
        )
    data = (folder / MANIFEST).read_bytes()
    assert canonical(json.loads(data)) == data
    assert LoRA(r=2, alpha=3) == LoRA(r=2, alpha=3.0) and repr(LoRA(r=2, alpha=3)) == repr(
        LoRA(r=2, alpha=3.0)
    )


@pytest.mark.parametrize("version", GOLDEN_PACKS)
def test_every_version_of_the_format_is_read_for_ever(version: str, tmp_path: Path) -> None:
    """The recorded pack of each version loads with the id of its own bytes, means what the same parts mean
    today, and copies.
    """
    golden = GOLDEN / f"pack-{version}"
    pack = load(golden)
    assert json.loads((golden / MANIFEST).read_bytes())["format_version"] == version.partition("-")[0]
    assert pack.id == "sha256:" + hashlib.sha256((golden / MANIFEST).read_bytes()).hexdigest()
    assert replace(pack.manifest).to_json() == GOLDEN_PACKS[version]().manifest.to_json()
    pack.write(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(golden)


@pytest.mark.parametrize(
    "version", [version for version in GOLDEN_PACKS if version.startswith(m.FORMAT_VERSION)]
)
def test_what_is_written_today_is_the_recorded_pack_of_this_version(version: str, tmp_path: Path) -> None:
    """From the same parts, the same bytes as in the golden pack: a change of the format needs a new
    version.
    """
    GOLDEN_PACKS[version]().write(tmp_path / "golden")
    assert contents(tmp_path / "golden") == contents(GOLDEN / f"pack-{version}")


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_newer_minor_version_keeps_what_it_alone_knows(folder: Path, tmp_path: Path) -> None:
    """An optional field of a later version is ignored, is part of the id, and is still there in a copy; a
    renamed pack is ours again.
    """
    edit(folder, lambda value: value.update(format_version="1.9", colour="red"))
    pack = load(folder)
    assert not hasattr(pack.manifest, "colour")
    assert (
        pack.id == "sha256:" + hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() != make_pack().id
    )
    pack.write(tmp_path / "copy")
    assert (tmp_path / "copy" / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    renamed = pack.renamed("other")
    assert b"colour" not in renamed.manifest.to_bytes() and renamed.id != pack.id


def test_a_name_given_here_changes_no_identity(folder: Path, tmp_path: Path) -> None:
    """load(path, name).id is the digest of the folder's manifest; copies and the store keep the pack's own
    name; a renamed pack is another one; a name that no pack could have is refused.
    """
    pack = load(folder, "mine")
    assert (pack.name, pack.manifest.pack.name) == ("mine", "tickets")
    assert (
        pack.id == load(folder).id == "sha256:" + hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    )
    assert load(pack.write(tmp_path / "copy").path or folder).name == "tickets"
    assert (tmp_path / "copy" / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert Store(tmp_path / "store").add(pack).id == pack.id
    other = pack.renamed("other")
    assert (other.name, other.manifest.pack.name) == ("other", "other")
    assert other.id != pack.id
    for name in ("", "../x", "a b", "-x", "x" * 129, "x\n"):
        with pytest.raises(ConfigError, match="cannot be called that"):
            load(folder, name)


def test_the_readme_of_a_hub_may_lie_beside_the_closed_list(folder: Path) -> None:
    """README.md and .gitattributes are the only files that are not listed."""
    (folder / "README.md").write_text("# tickets")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert rules(folder) == []


@pytest.mark.parametrize("name", ["", "my pack", "a/b", ".hidden", "x\n", "\u202egnp", "n" * 129])
def test_a_pack_that_could_not_be_loaded_is_not_written(name: str, tmp_path: Path) -> None:
    """A name that the schema does not allow is refused by write, which leaves nothing behind."""
    with pytest.raises(FormatError, match="schema"):
        make_pack(name=name).write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_claims_that_json_cannot_hold_are_refused_by_name() -> None:
    """A metric that is NaN has no place in a manifest, and the error says so."""
    draft = replace(make_pack().manifest, metrics=({"value": float("nan")},))
    with pytest.raises(FormatError, match="JSON"):
        draft.to_bytes()


def test_tensors_with_nan_are_not_packed() -> None:
    """build refuses NaN and infinity and names the tensor; the largest float64 is neither."""

    def packed(value: float) -> Pack:
        params = {"lora_A": np.full((2, 5), value), "lora_B": ramp(7, 2)}
        return build(
            "x", get("lora"), {Site("net.q", 5, 7): (LoRA(r=2), params)}, task=m.PackTask("t"), base=m.Base()
        )

    for bad in (np.nan, np.inf):
        with pytest.raises(NonFinite, match=r"net\.q\.lora_A"):
            packed(bad)
    assert packed(np.finfo(np.float64).max).name == "x"


def test_a_pack_of_nothing_is_not_built() -> None:
    """Neither an adapter nor a whole module: there is nothing to pack."""
    with pytest.raises(NothingToDo):
        build("x", get("lora"), {}, task=m.PackTask("text-generation"), base=m.Base())


def test_an_output_that_exists_is_left_as_it_is(folder: Path) -> None:
    """OutputExists for a folder, an empty folder, a file and a dangling link; nothing is changed and nothing
    is left behind.
    """
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder.parent / "empty").mkdir()
    (folder.parent / "file").write_text("mine")
    (folder.parent / "link").symlink_to("nowhere")
    there = sorted(path.name for path in folder.parent.iterdir())
    for name in ("tickets", "empty", "file", "link"):
        with pytest.raises(OutputExists, match=name):
            make_pack().write(folder.parent / name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == there


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_pack import make_pack
calls, real = 0, os.fsync
def fsync(descriptor):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
make_pack().write({out!r})
"""


@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_killed_write_leaves_nothing_at_the_target(call: int, tmp_path: Path) -> None:
    """SIGKILL before the first file, the last file or the folder is on disk: no pack at the target, and the
    next write succeeds.
    """
    out = tmp_path / "tickets"
    program = KILLED.format(tests=str(Path(__file__).parent), out=str(out), call=call)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"], (
        "what it had written lies under a name of its own"
    )
    with pytest.raises(StorageError):
        validate(out)
    make_pack().write(out)
    assert rules(out) == []


# ------------------------------------------------------------------------------------------------------
# spoiled files in the folder


def test_one_flipped_byte_in_any_tensor_names_the_tensor(folder: Path) -> None:
    """Every byte of every tensor, one at a time: validation says AP204 and the name of that tensor, not only
    of the file.
    """
    data = (folder / TENSORS).read_bytes()
    for name, info in safetensors.SafetensorsFile(folder / TENSORS).tensors.items():
        for position in (info.offset, info.offset + info.nbytes // 2, info.offset + info.nbytes - 1):
            changed = bytearray(data)
            changed[position] ^= 1
            (folder / TENSORS).write_bytes(changed)
            assert rules(folder) == [("AP204", name)]


def test_every_flipped_byte_of_the_tensor_file_is_found(folder: Path) -> None:
    """Length, header, padding and data: no change of a byte passes. Every third, which meets each field of
    each entry.
    """
    data = (folder / TENSORS).read_bytes()
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 0x20
        (folder / TENSORS).write_bytes(changed)
        assert not validate(folder).valid, position


def test_every_flipped_byte_of_a_pack_is_found_by_the_pack_alone(folder: Path) -> None:
    """Names, claims, digests, the version, the digest of the manifest itself: each byte of the manifest with
    a bit flipped is refused, without a base, a signature or an id that is known; so is any of the other
    files.
    """
    chance, files = random.Random(5), {path: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest = (folder / MANIFEST).read_bytes()
    for position in range(len(manifest)):
        changed = bytearray(manifest)
        changed[position] ^= 1 << chance.randrange(8)
        with pytest.raises(FormatError):
            m.parse(bytes(changed), MANIFEST)
    for path, data in files.items():
        for position in chance.sample(range(len(data)), 60):
            changed = bytearray(data)
            changed[position] ^= chance.randrange(1, 256)
            path.write_bytes(changed)
            assert not validate(folder).valid, (path.name, position)
            with pytest.raises(AdapterpackError):
                load(folder)
        path.write_bytes(data)
    assert validate(folder).valid


def test_the_digest_of_a_manifest_is_that_of_its_own_bytes(folder: Path) -> None:
    """The sha256 of the bytes with the digest taken out; a renamed pack has its own; older versions need
    none, and have none.
    """
    data = (folder / MANIFEST).read_bytes()
    value = json.loads(data)
    without = data.replace(value["integrity"].encode(), b"")
    assert value["integrity"] == load(folder).manifest.integrity == hashlib.sha256(without).hexdigest()
    assert sealed_json(value) == data == m.seal(value)
    renamed = load(folder).renamed("other").manifest
    assert renamed.integrity != value["integrity"]
    assert m.parse(renamed.to_bytes(), "renamed") == renamed
    for forged in (
        {**value, "integrity": "0" * 64},
        {**value, "integrity": None},
        {**value, "integrity": value["integrity"].upper()},
        {key: item for key, item in value.items() if key != "integrity"},
        {**value, "format_version": "1.3"},
        {**value, "format_version": "1.5"},
        {**value, "license": "mit"},
    ):
        with pytest.raises(FormatError, match=r"a byte of it was changed|format_version does not have"):
            m.parse(canonical(forged), MANIFEST)
    with pytest.raises(FormatError):
        m.parse(json.dumps(value).encode(), MANIFEST)  # another text of the same values is another manifest


def shortened(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-3])


def lengthened(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes() + b"PK\3\4")


def linked(folder: Path) -> None:
    (folder / TENSORS).rename(folder.parent / "elsewhere")
    (folder / TENSORS).symlink_to(folder.parent / "elsewhere")


def linked_manifest(folder: Path) -> None:
    (folder / MANIFEST).rename(folder.parent / "elsewhere")
    (folder / MANIFEST).symlink_to(folder.parent / "elsewhere")


def piped(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


def other_config(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"r": 2', '"r": 4'))


def other_config_resealed(folder: Path) -> None:
    other_config(folder)
    reseal(folder)


def reordered_resealed(folder: Path) -> None:
    file = safetensors.SafetensorsFile(folder / TENSORS)
    tensors = {name: file.read(name).copy() for name in file.tensors}
    (folder / TENSORS).unlink()
    safetensors.write(folder / TENSORS, tensors, {"format": "pt", "note": "x"})
    reseal(folder)


def not_a_number_resealed(folder: Path) -> None:
    info = safetensors.SafetensorsFile(folder / TENSORS).tensors["base_model.model.head.bias"]
    with (folder / TENSORS).open("r+b") as file:
        file.seek(info.offset)
        file.write(np.float32(np.nan).tobytes())
    reseal(folder)


def unlisted(folder: Path) -> None:
    edit(folder, lambda value: value["files"].pop(0))
    (folder / CONFIG).unlink()


def reformatted(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text())))


def doubled(folder: Path) -> None:
    (folder / MANIFEST).write_text(
        (folder / MANIFEST).read_text().replace('{\n  "base"', '{\n  "base": 1,\n  "base"', 1)
    )


def drop_tensor(folder: Path) -> None:
    file = safetensors.SafetensorsFile(folder / TENSORS, private=True)
    (folder / TENSORS).unlink()
    kept = {name: file.read(name) for name in file.tensors if name != "base_model.model.head.bias"}
    safetensors.write(folder / TENSORS, kept, {"format": "pt"})


def drop_tensor_resealed(folder: Path) -> None:
    drop_tensor(folder)
    reseal_files(folder)


SPOILED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (shortened, "AP104", TENSORS),
    "bytes appended": (lengthened, "AP104", TENSORS),
    "tensors missing": (lambda f: (f / TENSORS).unlink(), "AP103", TENSORS),
    "PEFT config missing": (lambda f: (f / CONFIG).unlink(), "AP103", CONFIG),
    "PEFT config altered": (other_config, "AP105", CONFIG),
    "PEFT config longer": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text() + " "),
        "AP104",
        CONFIG,
    ),
    "PEFT config altered and resealed": (other_config_resealed, "AP601", CONFIG),
    "PEFT config no longer listed": (unlisted, "AP602", "files"),
    "another file": (
        lambda f: (f / "adapter_model.bin").write_bytes(b"\x80\4"),
        "AP106",
        "adapter_model.bin",
    ),
    "a hidden file": (lambda f: (f / ".env").write_text("x"), "AP102", ".env"),
    "a folder": (lambda f: (f / "sub").mkdir(), "AP101", "sub"),
    "tensors behind a link": (linked, "AP101", TENSORS),
    "manifest behind a link": (linked_manifest, "AP101", MANIFEST),
    "README behind a link": (lambda f: (f / "README.md").symlink_to("/etc/hostname"), "AP101", "README.md"),
    "a pipe for a manifest": (piped, "AP101", MANIFEST),
    "metadata altered and resealed": (reordered_resealed, "AP601", TENSORS),
    "NaN, resealed": (not_a_number_resealed, "AP301", "base_model.model.head.bias"),
    "manifest reformatted by hand": (reformatted, "AP001", f"{MANIFEST}#/integrity"),
    "manifest with a blank at the end": (
        lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes() + b"\n"),
        "AP001",
        f"{MANIFEST}#/integrity",
    ),
    "manifest truncated": (
        lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:400]),
        "AP001",
        MANIFEST,
    ),
    "manifest empty": (lambda f: (f / MANIFEST).write_bytes(b""), "AP001", MANIFEST),
    "manifest far too large": (
        lambda f: (f / MANIFEST).write_bytes(b" " * (m.MAX_BYTES + 1)),
        "AP001",
        MANIFEST,
    ),
    "a key twice": (doubled, "AP001", MANIFEST),
    "a tensor cut from the file": (drop_tensor, "AP104", TENSORS),
    "a tensor cut from the file, size resealed": (
        drop_tensor_resealed,
        "AP201",
        "base_model.model.head.bias",
    ),
}


@pytest.mark.parametrize("label", SPOILED)
def test_a_spoiled_folder_is_refused_with_its_rule_and_place(label: str, folder: Path) -> None:
    """Each fault has one finding, with a stable rule id and the file or tensor that it is about; load refuses
    it.
    """
    spoil, rule, where = SPOILED[label]
    spoil(folder)
    (found,) = rules(folder)
    assert found[0] == rule
    assert found[1].endswith(where)


def test_links_of_the_hub_cache_into_its_blobs_are_the_one_exception(folder: Path, tmp_path: Path) -> None:
    """snapshots/COMMIT/file -> blobs/DIGEST is how the hub's client stores files; a link that leaves the
    blobs is refused.
    """
    snapshot, blobs = (
        tmp_path / "models--org--x" / "snapshots" / ("a" * 40),
        tmp_path / "models--org--x" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in FILES:
        shutil.move(folder / name, blobs / name[::-1])
        (snapshot / name).symlink_to(f"../../blobs/{name[::-1]}")
    assert rules(snapshot) == []
    (snapshot / CONFIG).unlink()
    shutil.move(blobs / CONFIG[::-1], tmp_path / "outside")
    (snapshot / CONFIG).symlink_to(tmp_path / "outside")
    assert rules(snapshot) == [("AP101", CONFIG)]


def test_what_was_loaded_does_not_change_with_the_file(folder: Path) -> None:
    """The arrays are made from the very bytes that were checked: writing to the file later changes
    nothing.
    """
    pack = load(folder)
    before = {name: value.copy() for name, value in pack.tensors.items()}
    with (folder / TENSORS).open("r+b") as file:
        file.write(bytes((folder / TENSORS).stat().st_size))
    assert all(np.array_equal(pack.tensors[name], value) for name, value in before.items())


def test_a_folder_that_is_no_pack_and_one_that_is_not_there(tmp_path: Path) -> None:
    """Two different errors, both naming the path."""
    with pytest.raises(StorageError, match="nowhere"):
        validate(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"adapterpack\.json or adapter_config\.json"):
        load(tmp_path)


def test_a_warning_says_where_an_adapter_has_no_effect(tmp_path: Path) -> None:
    """A site whose B is all zero is valid and does nothing: AP302, a warning."""
    params = {"lora_A": ramp(2, 5), "lora_B": np.zeros((7, 2), np.float32)}
    build(
        "x", get("lora"), {Site("net.q", 5, 7): (LoRA(r=2), params)}, task=m.PackTask("t"), base=m.Base()
    ).write(tmp_path / "x")
    report = validate(tmp_path / "x")
    assert report.valid
    assert [(finding.rule, finding.severity, finding.where) for finding in report.findings] == [
        ("AP302", "warning", "net.q")
    ]


# ------------------------------------------------------------------------------------------------------------
# forged manifests


def forge(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the value at a path of keys in the manifest."""

    def change(value: dict[str, Any]) -> None:
        here: Any = value
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = to

    return change


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Removes the value at a path of keys."""

    def change(value: dict[str, Any]) -> None:
        here: Any = value
        for key in path[:-1]:
            here = here[key]
        del here[path[-1]]

    return change


A = "base_model.model.net.q.lora_A.weight"
FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str, type[AdapterpackError], str]] = {
    # label: change, rule, error, words of the message
    "unknown field": (forge("colour", to="red"), "AP001", FormatError, "colour"),
    "unknown field in a group": (forge("groups", 0, "colour", to="red"), "AP001", FormatError, "#/groups/0"),
    "unknown field in a tensor": (forge("tensors", A, "colour", to=1), "AP001", FormatError, A),
    "field left out": (without("license"), "AP001", FormatError, "license"),
    "another format": (forge("format", to="other"), "AP001", FormatError, "not an adapterpack manifest"),
    "major version 2": (forge("format_version", to="2.0"), "AP001", FormatError, "another major version"),
    "major version 10": (forge("format_version", to="10.0"), "AP001", FormatError, "another major version"),
    "version as a number": (forge("format_version", to=1.0), "AP001", FormatError, "format_version"),
    "newer minor with a new role": (
        lambda v: (v.update(format_version="1.7"), v["groups"][0].update(role="gate")),
        "AP001",
        FormatError,
        "update adapterpack",
    ),
    "older minor with a newer field": (
        forge("format_version", to="1.0"),
        "AP001",
        FormatError,
        "format_version does not have",
    ),
    "newer minor that must be understood": (
        lambda v: v.update(format_version="1.7", colour="red", must_understand=["colour"]),
        "AP001",
        FormatError,
        "colour",
    ),
    "feature not understood": (
        forge("must_understand", to=["int8", "telepathy"]),
        "AP001",
        FormatError,
        "telepathy",
    ),
    "features of a wrong type": (forge("must_understand", to=[[]]), "AP001", FormatError, "features"),
    "features not a list": (forge("must_understand", to=5), "AP001", FormatError, "must_understand"),
    "unknown method": (forge("method", "type", to="loraa"), "AP001", UnknownMethod, "did you mean 'lora'"),
    "method of a later version": (
        forge("method", "spec_version", to=2),
        "AP001",
        Unsupported,
        "newer version of the method",
    ),
    "name with a newline at the end": (
        forge("pack", "name", to="tickets\n"),
        "AP001",
        FormatError,
        "#/pack/name",
    ),
    "name with a path": (forge("pack", "name", to="../tickets"), "AP001", FormatError, "#/pack/name"),
    "base that is a path": (forge("base", "name", to="/home/me/base"), "AP001", FormatError, "#/base/name"),
    "file outside the folder": (forge("files", 0, "path", to="../x"), "AP001", FormatError, "#/files/0/path"),
    "file listed twice": (lambda v: v["files"].append(v["files"][0]), "AP602", FormatError, "file list"),
    "file with another role": (forge("files", 0, "role", to="tensors"), "AP602", FormatError, "file list"),
    "README listed": (
        lambda v: v["files"].append({**v["files"][0], "path": "README.md"}),
        "AP103",
        FormatError,
        "README.md",
    ),
    "digest of a tensor": (forge("tensors", A, "sha256", to="0" * 64), "AP204", FormatError, A),
    "dtype of a tensor": (forge("tensors", A, "dtype", to="F16"), "AP203", FormatError, A),
    "shape of a tensor": (forge("tensors", A, "shape", to=[5, 2]), "AP203", FormatError, A),
    "empty tensor": (forge("tensors", A, "shape", to=[0, 5]), "AP001", FormatError, A),
    "tensor not listed": (without("tensors", A), "AP202", FormatError, A),
    "tensor of no group": (forge("tensors", A, "group", to="net.x"), "AP402", FormatError, A),
    "tensor of another group": (forge("tensors", A, "group", to="net.v"), "AP403", FormatError, "net.q"),
    "tensor of another file": (forge("tensors", A, "file", to=CONFIG), "AP402", FormatError, A),
    "tensor with scales of nothing": (forge("tensors", A, "scales", to="nowhere"), "AP205", FormatError, A),
    "scale": (forge("groups", 0, "scale", to=15.0), "AP501", FormatError, "net.q"),
    "scale left out": (forge("groups", 1, "scale", to=None), "AP501", FormatError, "net.v"),
    "rank": (forge("groups", 0, "rank", to=4), "AP502", FormatError, "net.q"),
    "alpha and nothing else": (forge("config", "alpha", to=30.0), "AP501", FormatError, "net.q"),
    "rank of the config": (forge("config", "r", to=3), "AP403", FormatError, "net.q"),
    "a rank to fill the memory": (forge("config", "r", to=2**40), "AP403", FormatError, "net.q"),
    "rank as text": (forge("config", "r", to="2"), "AP403", FormatError, "net.q"),
    "rank that is true": (forge("config", "r", to=True), "AP403", FormatError, "net.q"),
    "rank of a half": (forge("config", "r", to=2.5), "AP403", FormatError, "net.q"),
    "alpha as text": (forge("config", "alpha", to="3"), "AP403", FormatError, "net.q"),
    "alpha a list": (forge("groups", 0, "config", to={"alpha": [1]}), "AP403", FormatError, "net.q"),
    "hyper-parameter that LoRA lacks": (
        forge("config", "use_magic", to=True),
        "AP403",
        FormatError,
        "use_magic",
    ),
    "features of a site": (forge("groups", 0, "in_features", to=6), "AP403", FormatError, "net.q"),
    "features left out": (forge("groups", 0, "in_features", to=None), "AP403", FormatError, "net.q"),
    "kind that LoRA lacks": (forge("groups", 0, "kind", to="conv9d"), "AP405", FormatError, "conv9d"),
    "two groups of one path": (forge("groups", 1, "path", to="net.q"), "AP401", FormatError, "two groups"),
    "group without tensors": (
        lambda v: v["groups"].append({**v["groups"][2], "path": "tail"}),
        "AP403",
        FormatError,
        "tail",
    ),
    "path with a control character": (
        forge("groups", 0, "path", to="net\u0007q"),
        "AP001",
        FormatError,
        "#/groups/0/path",
    ),
    "half of a surrogate pair": (
        forge("pack", "description", to="\ud800"),
        "AP001",
        FormatError,
        "adapterpack.json",
    ),
    "an integer past 2^53": (forge("training", to={"steps": 2**53 + 1}), "AP001", FormatError, "2^53"),
    "nested too deeply": (
        forge("training", to=[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]),
        "AP001",
        FormatError,
        "nested too deeply",
    ),
    "code": (forge("safety", "contains_code", to=True), "AP001", FormatError, "#/safety"),
    "extension without its prefix": (
        forge("extensions", to={"vendor": 1}),
        "AP001",
        FormatError,
        "#/extensions",
    ),
    "int8 that is not": (
        forge("quantization", to={"scheme": "int8", "max_error": 0.0, "relative_error": 0.0}),
        "AP207",
        FormatError,
        "quantized",
    ),
    "empty label": (forge("task", "labels", to=["yes", ""]), "AP001", FormatError, "#/task/labels"),
}


@pytest.mark.parametrize("label", FORGED)
def test_a_forged_manifest_in_canonical_form_is_refused(label: str, folder: Path) -> None:
    """One finding with its rule, its error class and words that name the place; canonical bytes do not help
    the forger.
    """
    change, rule, error, words = FORGED[label]
    if label == "half of a surrogate pair":
        text = (folder / MANIFEST).read_text().replace('"description": ""', '"description": "\\ud800"')
        (folder / MANIFEST).write_text(text)
    else:
        edit(folder, change)
    report = validate(folder)
    (finding,) = [finding for finding in report.findings if finding.severity == "error"][:1]
    assert (finding.rule, finding.error) == (rule, error)
    assert words in f"{finding.where}: {finding.message}: {finding.fix}"
    with pytest.raises(error):
        load(folder)


def at_a_commit(folder: Path) -> None:
    edit(folder, forge("base", "commit", to="a" * 40))
    # PEFT's file says it as well
    text = (folder / CONFIG).read_text().replace('"revision": null', f'"revision": "{"a" * 40}"')
    (folder / CONFIG).write_text(text)
    reseal(folder)


LEFT_OPEN: dict[str, Callable[[Path], object]] = {
    "higher minor version with new fields": lambda folder: edit(
        folder,
        lambda v: (
            v.update(format_version="1.7", colour="red"),
            v["groups"][0].update(mood="calm"),
            v["base"].update(age=3),
        ),
    ),
    "higher minor version": lambda folder: edit(folder, forge("format_version", to="1.9")),
    "extension": lambda folder: edit(folder, forge("extensions", to={"x_vendor": {"anything": [1]}})),
    "claims": lambda folder: edit(folder, forge("training", to={"epochs": 3, "note": ["x"]})),
    "metrics": lambda folder: edit(folder, forge("metrics", to=[{"name": "accuracy", "value": 0.5}])),
    "commit": at_a_commit,
}


@pytest.mark.parametrize("label", LEFT_OPEN)
def test_what_the_format_leaves_open_is_accepted(label: str, folder: Path) -> None:
    """A higher minor version that needs nothing new, extensions under x_, claims: read, with another id;
    written again to the byte.
    """
    before = load(folder).id
    LEFT_OPEN[label](folder)
    pack = load(folder)
    assert pack.id != before
    assert pack.manifest.to_bytes() == (folder / MANIFEST).read_bytes()


def pointers(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inside for place in pointers(item, (*at, key)))]


VALUE = make_pack().manifest.to_json()
PLACES = pointers(VALUE)[1:]
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6),
    st.sampled_from(["lora", "net.q", A, "F32", "adapter", "full", "../x", "\u202e", "1.1"]),
    st.recursive(
        st.none() | st.integers(0, 3) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2),
        max_leaves=4,
    ),
    st.dictionaries(
        st.sampled_from(["r", "alpha", "x", "scale"]), st.integers(-1, 5) | st.text(max_size=2), max_size=2
    ),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=ANYTHING, remove=st.booleans())
def test_any_value_in_any_place_of_the_manifest_gives_a_named_error_or_a_pack(
    place: tuple[Any, ...], value: Any, remove: bool, folder: Path
) -> None:
    """Validation of a forged manifest reports; it never raises, and load raises nothing but
    AdapterpackError.
    """
    forged = copy.deepcopy(VALUE)
    (without(*place) if remove else forge(*place, to=value))(forged)
    (folder / MANIFEST).write_bytes(canonical(forged) if place == ("integrity",) else sealed_json(forged))
    report = validate(folder)
    try:
        pack = load(folder)
    except AdapterpackError:
        assert not report.valid
    else:
        assert report.valid
        assert pack.manifest.to_bytes() == (folder / MANIFEST).read_bytes()


# ----------------------------------------------------------------------------------------------------------
# schema and reader


SCHEMA = json.loads((Path(__file__).parent.parent / "schemas" / "manifest.v1.json").read_text())
OPEN = {
    "/config",
    "/groups/[]/config",
    "/lineage/params",
    "/base_quantization/params",
    "/training",
    "/metrics/[]",
    "/extensions",
    "/composition/tree",
}
"""Objects whose keys are not the format's business: hyper-parameters, nodes, claims, and what vendors add."""


def subschemas(schema: Any, at: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every schema inside a schema with the place that it describes."""
    part = SCHEMA["$defs"].get(schema.get("$ref", "").removeprefix("#/$defs/"), {})
    # a struct's; settings and claims hold more of their own kind
    schema = part if part.get("title") else schema
    found = [(at, schema)]
    for key, inner in schema.get("properties", {}).items():
        found += subschemas(inner, f"{at}/{key}")
    for inner in schema.get("anyOf", []):
        found += subschemas(inner, at)
    if isinstance(schema.get("items"), dict):
        found += subschemas(schema["items"], f"{at}/[]")
    for key in ("additionalProperties", "propertyNames"):
        if isinstance(schema.get(key), dict):
            found += subschemas(schema[key], f"{at}/{{}}" if key == "additionalProperties" else f"{at}/names")
    return found


@pytest.mark.parametrize(
    ("place", "described"),
    [
        ("", m.Manifest),
        ("/pack", m.PackInfo),
        ("/method", m.MethodRef),
        ("/task", m.PackTask),
        ("/base", m.Base),
        ("/groups/[]", m.Group),
        ("/tensors/{}", m.TensorEntry),
        ("/files/[]", m.PackFile),
        ("/lineage", m.Lineage),
        ("/lineage/parents/[]", m.Parent),
        ("/canary", Canary),
        ("/base/dims", Dims),
        ("/base/variants/[]", Variant),
        ("/tokenizer", PackTokenizer),
        ("/base_quantization", BaseQuantization),
        ("/composition", Composition),
        ("/composition/members/[]", CompositionMember),
        ("/canary/pixels", Pixels),
        ("/canary/features", Features),
    ],
)
def test_the_schema_and_the_reader_know_the_same_fields(place: str, described: type[Any]) -> None:
    """Every field stands in the schema and is required there, if every version has it, and the schema has no
    other.
    """
    (schema,) = [schema for at, schema in subschemas(SCHEMA) if at == place and "properties" in schema]
    fields = set(described.__struct_fields__) | ({"integrity"} if described is m.Manifest else set())
    assert set(schema["properties"]) == fields
    here = tuple(filter(None, place.split("/")))
    later = {field for step in STEPS.values() for field in step.fields.get(here, ())}
    assert set(schema["required"]) == fields - later


def test_the_schema_is_sound_and_closed() -> None:
    """Valid 2020-12; every object is closed or in the list of open ones; every pattern is anchored; the enums
    are the reader's own.
    """
    from jsonschema import Draft202012Validator

    from adapterpack.pack.pack import FILE_ROLES

    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(SCHEMA)
    opened = set()
    for place, schema in subschemas(SCHEMA):
        if "pattern" in schema:
            assert schema["pattern"].startswith("^") and schema["pattern"].endswith("$"), place
        if "object" in schema.get("type", ()) and schema["additionalProperties"] is not False:
            opened |= (
                {place}
                if schema["additionalProperties"].get("$ref") in ("#/$defs/setting", "#/$defs/claim")
                else set()
            )
        if schema.get("type") == "array":
            assert "items" in schema, place
    assert opened == OPEN
    by_place = dict(subschemas(SCHEMA))
    assert all(re.fullmatch(by_place["/tensors/{}/dtype"]["pattern"], name) for name in safetensors.DTYPES)
    assert all(re.fullmatch(by_place["/files/[]/role"]["pattern"], role) for role in FILE_ROLES.values())
    assert by_place["/format"]["enum"] == [make_pack().manifest.format]


def unbounded(schema: dict[str, Any]) -> list[str]:
    """What a schema says nothing of, of what a value's size depends on."""
    kinds = schema.get(
        "type", ["null"] if schema.keys() & {"const", "enum", "anyOf", "$ref"} else ["anything"]
    )
    wanted: dict[str, list[str]] = {
        "integer": ["minimum", "maximum"],
        "number": ["minimum", "maximum"],
        "array": ["items", "maxItems"],
        "string": ["maxLength"],
        "object": ["maxProperties", "propertyNames", "additionalProperties"],
        "anything": ["type"],
    }
    if schema.get("additionalProperties") is False:
        wanted["object"] = ["properties"]
    if not set("*+") & set(re.sub(r"\[[^]]*\]|\\.", "", schema.get("pattern", "+"))):
        wanted["string"] = ["pattern"]  # which repeats nothing without an end
    missing = {
        key for kind in ([kinds] if isinstance(kinds, str) else kinds) for key in wanted.get(kind, ())
    } - schema.keys()
    return sorted(missing - {"minimum"} if "exclusiveMinimum" in schema else missing)


def test_everything_in_the_schema_has_a_bound() -> None:
    """Numbers, texts, lists and objects, in the manifest and in what it refers to: nothing can be as large as
    a stranger likes.
    """
    places = subschemas(SCHEMA) + [
        found for name, schema in SCHEMA["$defs"].items() for found in subschemas(schema, f"$defs/{name}")
    ]
    assert {place: missing for place, schema in places if (missing := unbounded(schema))} == {}
    names = [schema for place, schema in places if place.endswith("/names")]
    assert all("maxLength" in schema or "pattern" in schema for schema in names)
    for hole in (
        {"type": "integer"},
        {"type": ["null", "number"], "minimum": 0},
        {"type": "string", "pattern": "^[a-z]+$"},
        {"type": "array"},
        {"type": "object", "maxProperties": 3},
        {},
    ):
        assert unbounded(hole), "the walk sees what has no bound"


def test_every_limit_of_json_holds_for_our_own_bytes() -> None:
    """strict_json reads back what it writes; the canonical form has sorted keys, two spaces and one newline
    at the end.
    """
    value = {"b": [1, 2.5, True, None, "\u00e9\u202e"], "a": {"z": {}, "y": []}}
    data = strict_json.canonical(value)
    assert strict_json.loads(data, "x", 1000) == value
    assert data == canonical(value)
    assert strict_json.digest(value) == hashlib.sha256(data).hexdigest()
    for bad in (
        b"-0",
        b"1e999",
        b"NaN",
        b'"\\udc00"',
        b'{"a":1,"a":1}',
        b"\xff",
        b"9007199254740993",
        b"[" * 17 + b"]" * 17,
    ):
        with pytest.raises(FormatError, match="x"):
            strict_json.loads(bad, "x", 1000)
    assert strict_json.loads(b"[-1, 0, 9007199254740992]", "x", 1000) == [-1, 0, 2**53]


# ------------------------------------------------------------------------------------------------------------
# the base


def test_a_pack_knows_its_base_and_refuses_another(tmp_path: Path) -> None:
    """Same bytes in another folder: accepted. Other weights, other shapes: BaseMismatch that names both bases
    and which level differs.
    """
    base = make_base(tmp_path / "base-one")
    pack = make_pack(base).write(tmp_path / "pack")
    same, other, wider = (
        make_base(tmp_path / "copy"),
        make_base(tmp_path / "base-two", 0.25),
        make_base(tmp_path / "base-wide", width=6),
    )
    assert rules(tmp_path / "pack", same) == []
    for wrong, words in ((other, "other weights"), (wider, "names, dtypes or shapes")):
        with pytest.raises(BaseMismatch, match=words) as caught:
            pack.require_base(Checkpoint(wrong))
        assert "base-one" in str(caught.value) and wrong.name in str(caught.value)
        assert rules(tmp_path / "pack", wrong) == [("AP701", "base")]
    with pytest.raises(BaseMismatch, match=r"no digest of the weights.*--allow-structural-base"):
        pack.require_base(Checkpoint(other), content=False)


def test_a_pack_without_digests_is_compared_site_by_site(tmp_path: Path) -> None:
    """An import knows its base by name only: its sites must be there, with their shapes."""
    pack = make_pack()
    pack.require_base(Checkpoint(make_base(tmp_path / "base")))
    with pytest.raises(BaseMismatch, match=r"net\.q"):
        pack.require_base(Checkpoint(make_base(tmp_path / "wide", width=6)))
    (tmp_path / "none").mkdir()
    safetensors.write(tmp_path / "none" / "model.safetensors", {"net.k.weight": ramp(7, 5)})
    with pytest.raises(SiteNotFound, match=r"did you mean 'net\.k'"):
        pack.require_base(Checkpoint(tmp_path / "none"))


def framed(*fields: str) -> bytes:
    return b"".join(len(raw).to_bytes(8, "little") + raw for raw in (field.encode() for field in fields))


def test_the_fingerprint_is_the_documented_hash_and_sees_content_only(tmp_path: Path) -> None:
    """structure = H(sorted headers), content = H(sorted leaves H(header, sha256(bytes))): order, shards and
    metadata do not count.
    """
    base = make_base(tmp_path / "base")
    file = safetensors.SafetensorsFile(base / "model.safetensors")
    headers = {
        name: framed(name, info.dtype, ",".join(map(str, info.shape)))
        for name, info in sorted(file.tensors.items())
    }
    structure = hashlib.sha256(b"bfp1:structure\0" + b"".join(headers.values())).hexdigest()
    leaves = [
        hashlib.sha256(b"bfp1:leaf\0" + header + hashlib.sha256(file.buffer(name)).digest()).digest()
        for name, header in headers.items()
    ]
    content = hashlib.sha256(b"bfp1:content\0" + b"".join(leaves)).hexdigest()
    found = Checkpoint(base)
    assert (found.structure, found.content) == (f"bfp1:{structure}", f"bfp1:{content}")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = sorted(file.tensors)
    shards = {"b.safetensors": names[:1], "a.safetensors": names[1:]}
    for shard, held in shards.items():
        safetensors.write(sharded / shard, {name: file.read(name) for name in held}, {"format": "np"})
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(sharded).fingerprint() == found.fingerprint()
    assert Checkpoint(make_base(tmp_path / "other", 0.25)).structure == found.structure


BAD_INDEX: dict[str, tuple[str, str]] = {
    "not an object": ("[]", "index"),
    "no weight map": ("{}", "index"),
    "weight map a list": ('{"weight_map": ["a"]}', "index"),
    "shard not text": ('{"weight_map": {"w": 1}}', "index"),
    "shard outside the folder": ('{"weight_map": {"w": "../a.safetensors"}}', "plain file name"),
    "a tensor that no shard has": (
        '{"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}',
        "tensor v",
    ),
    "a tensor in two shards": ('{"weight_map": {"w": "b.safetensors", "x": "a.safetensors"}}', "two shards"),
    "not JSON": ("{", "JSON"),
}


@pytest.mark.parametrize("label", BAD_INDEX)
def test_a_bad_index_of_a_base_is_refused(label: str, tmp_path: Path) -> None:
    """FormatError with the fault, whatever the index holds."""
    text, words = BAD_INDEX[label]
    safetensors.write(
        tmp_path / "a.safetensors", {"w": ramp(2), "x": ramp(1)} if "two" in label else {"w": ramp(2)}
    )
    safetensors.write(tmp_path / "b.safetensors", {"w": ramp(2)})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=words):
        Checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# what is shown


def test_errors_escape_what_could_repaint_a_terminal() -> None:
    """Control, bidirectional and line-breaking characters from names appear as escapes; the text stays one
    line; letters stay letters.
    """
    hostile = "a\x1b[2J\u202e\u2066\u200b\x07\x9b\r\n\u2028\ue000z\u00e9\u4e2d"
    error = FormatError(
        "bad " + hostile, where=hostile, expected=hostile, found=hostile, remedy="rename " + hostile
    )
    text = str(error)
    assert not set(text) & set("\x1b\u202e\u2066\u200b\x07\x9b\r\n\u2028\ue000")
    assert text.isprintable()
    assert text.count("z\u00e9\u4e2d") == 5
    assert text.count("\\u001b[2J\\u202e\\u2066\\u200b\\u0007\\u009b\\u000d") == 5


def test_a_hostile_name_in_a_file_is_shown_escaped(folder: Path) -> None:
    """The way from a header on disk to the message, end to end."""
    header = b'{"\\u001b]0;x\\u0007\\u202eevil":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    reseal_files(folder)
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert "\\u001b]0;x\\u0007\\u202eevil" in str(caught.value)
    assert str(caught.value).isprintable()
