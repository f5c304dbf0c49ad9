"""Fleets: shared bases, cores and their errors against float64; the folder, what is refused, and what the
engine makes of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from format_schemas import fleet_schema
from shipped_schemas import fits

import adapterpack
from adapterpack import Fleet, LoRA, Pack, compress
from adapterpack.adapter_methods import Site, get
from adapterpack.cli.main import main
from adapterpack.compressing.joint_bases import group, joint_bases
from adapterpack.errors import (
    AdapterpackError,
    ConfigError,
    UnknownName,
    Unsigned,
    Unsupported,
    WronglySigned,
)
from adapterpack.io import strict_json
from adapterpack.lowrank.factors import Factors
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build
from adapterpack.pack.trust.sign import Signers
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.generation.sampling import Sampling
from adapterpack.serving.adapters.startup import StartupAdapters

sys.path.insert(0, str(Path(__file__).parent / "packs"))
from make_bad import sealed_json

Make = Callable[..., Any]
SITES = (
    Site("layers.0.q_proj", 31, 23),
    Site("layers.0.v_proj", 31, 17, bias=True),
    Site("layers.1.q_proj", 31, 23),
)
HEAD = {"weight": np.ones((2, 5), np.float16), "bias": np.zeros(2, np.float32)}


def member(seed: int, sites: tuple[Site, ...] = SITES, rank: int = 3, **more: Any) -> Pack:
    """A pack of random factors, of another scale and another rank than others."""
    rng = np.random.default_rng(seed)
    adapters = {
        site: (
            LoRA(r=rank, alpha=2 + seed),
            {
                "lora_A": rng.standard_normal((rank, site.in_features)).astype(np.float32),
                "lora_B": rng.standard_normal((site.out_features, rank)).astype(np.float32),
            },
        )
        for site in sites
    }
    return build(
        f"member-{seed}",
        get("lora"),
        adapters,
        task=m.PackTask("text-classification", None, ("a", "b")),
        base=m.Base("acme/base"),
        **more,
    )


def dense(pack: Pack) -> dict[str, np.ndarray]:
    """scale B A, float64, from the tensors of a LoRA."""

    def wide(adapter: Any, name: str) -> np.ndarray:
        return np.asarray(adapter.params[name], np.float64)

    return {
        adapter.site.path: adapter.config.scale * wide(adapter, "lora_B") @ wide(adapter, "lora_A")
        for adapter in pack.adapters()
    }


def error(exact: Pack, other: Pack) -> tuple[float, float]:
    """The relative Frobenius error over all sites, and at the worst."""
    one, two = dense(exact), dense(other)
    squares = {path: float(np.square(one[path] - two[path]).sum()) for path in one}
    sizes = {path: float(np.square(one[path]).sum()) for path in one}
    return math.sqrt(sum(squares.values()) / sum(sizes.values())), math.sqrt(
        max(squares[path] / sizes[path] for path in one)
    )


def test_bases_of_the_whole_rank_are_exact_and_smaller_ones_the_best_by_alternation() -> None:
    """At the summed rank nothing is lost; below it no random bases, and no singular vectors of the mean, are
    nearer.
    """
    rng = np.random.default_rng(3)
    changes = [Factors(rng.standard_normal((2, 19)), rng.standard_normal((29, 2))) for _ in range(5)]

    def lost(up: np.ndarray, down: np.ndarray) -> float:
        return sum(
            float(np.square(one.dense() - up @ (up.T @ one.dense() @ down.T) @ down).sum()) for one in changes
        )

    whole = joint_bases(changes, [1.0] * 5, 10)
    assert lost(*whole) < 1e-20
    for rank in (1, 4, 7):
        bases = joint_bases(changes, [1.0] * 5, rank)
        np.testing.assert_allclose(bases.up.T @ bases.up, np.eye(rank), atol=1e-12)
        np.testing.assert_allclose(bases.down @ bases.down.T, np.eye(rank), atol=1e-12)
        u, _, v = np.linalg.svd(sum(change.dense() for change in changes))
        assert lost(*bases) < lost(u[:, :rank], v[:rank])
        least = float(
            np.square(np.linalg.svd(np.concatenate([one.dense() for one in changes], axis=1))[1][rank:]).sum()
        )
        assert lost(*bases) >= least * (1 - 1e-12)  # of bases for the outputs alone, by Eckart and Young
    assert group(np.kron(np.eye(3), np.ones((2, 2))), 3).tolist() in (
        [0, 0, 1, 1, 2, 2],
        [0, 0, 2, 2, 1, 1],
    )


def test_the_stated_errors_are_those_of_the_changes(tmp_path: Path) -> None:
    """Of every member, after the folder was written and read, over all sites and at the worst: against the
    packs' dense float64 changes. At the summed rank what is left is int8's rounding.
    """
    packs = [
        member(0),
        member(1, SITES[:2]),
        member(2, SITES[1:], full={"classifier": HEAD}),
        member(3, rank=1),
    ]
    for basis, most in ((5, 1.0), (23, 0.02)):
        out = tmp_path / str(basis)
        assert compress(packs, basis=basis, out=out).path == out
        fleet = Fleet.load(out)
        assert fleet.names == tuple(pack.name for pack in packs)
        for pack, said in zip(packs, fleet.manifest.members, strict=True):
            back = fleet.pack(pack.name)
            assert [site.path for site in (adapter.site for adapter in back.adapters())] == list(dense(pack))
            # The members' factors are float32: 1e-7 of the change.
            assert (said.error, said.worst) == pytest.approx(error(pack, back), rel=1e-4, abs=1e-6)
            assert 0 < said.error < most
            assert said.pack == pack.id
            assert back.manifest.task == pack.manifest.task
            for path, params in pack.full().items():
                for name, value in params.items():
                    np.testing.assert_array_equal(back.full()[path][name], value)
            back.write(tmp_path / f"{basis}-{pack.name}")
            assert adapterpack.validate(tmp_path / f"{basis}-{pack.name}").valid
            assert error(back, adapterpack.load(tmp_path / f"{basis}-{pack.name}")) == (0, 0)
    assert fleet.nbytes == sum(file.stat().st_size for file in [out / "fleet.safetensors"]) - header(
        out / "fleet.safetensors"
    )


def header(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_budgets_decide_the_rank_and_who_keeps_factors() -> None:
    """An error budget alone: the least rank tried that keeps to it. With a basis: members above it are exact.
    A size: the largest that fits. Clusters: kin are put together.
    """
    packs = [member(seed) for seed in range(4)]
    fleet = compress(packs, error_budget=0.5)
    assert max(one.error for one in fleet.manifest.members) <= 0.5
    smaller = max(rank for rank in (1, 2, 4, 8, 12, 16, 24) if rank < fleet.manifest.rank)
    assert max(one.error for one in compress(packs, basis=smaller).manifest.members) > 0.5
    alone = compress(packs, basis=2, error_budget=0.5)
    assert [one.cluster for one in alone.manifest.members] == [None] * 4
    assert max(error(pack, alone.pack(pack.name))[0] for pack in packs) < 1e-6  # float32 factors
    half = compress(packs, size_budget=0.5)
    assert half.nbytes <= 0.5 * sum(value.nbytes for pack in packs for value in pack.tensors.values())
    kin = [member(seed) for seed in (0, 0, 7, 7)]
    kin = [pack.renamed(f"m{number}") for number, pack in enumerate(kin)]
    sorted_ = compress(kin, basis=3, clusters=2)
    assert [one.cluster for one in sorted_.manifest.members] in ([0, 0, 1, 1], [1, 1, 0, 0])
    assert max(one.error for one in sorted_.manifest.members) < 0.02  # of rank 3 each: int8's rounding
    for settings, words in (
        ({}, "how large the bases"),
        ({"size_budget": 1e-6}, "even at rank 1"),
        ({"basis": 0}, "out of range"),
    ):
        with pytest.raises(ConfigError, match=words):
            compress(packs, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one name"):
        compress([packs[0], packs[0]], basis=2)


def test_a_member_is_added_by_projection_and_by_itself_above_the_bound(tmp_path: Path) -> None:
    """Members that were there keep every number; a combination of them is held, a stranger keeps its factors,
    another site is refused. The command writes a member as a pack.
    """
    packs = [member(seed) for seed in range(3)]
    compress(packs, basis=9, error_budget=0.3, out=tmp_path / "fleet")
    before = Fleet.load(tmp_path / "fleet")
    mixed = adapterpack.compose(packs[:2], rule="cat", weights=[0.5, -1.0], name="mixed")
    mixed.write(tmp_path / "mixed")
    member(9).write(tmp_path / "stranger")
    ran = CliRunner().invoke(
        main,
        ["compress", str(tmp_path / "mixed"), str(tmp_path / "stranger"), "--into", str(tmp_path / "fleet")],
    )
    assert ran.exit_code == 0, ran.output
    assert "with factors of their own: member-9" in ran.output
    after = Fleet.load(tmp_path / "fleet")
    assert after.names == (*before.names, "mixed", "member-9")
    for name in before.names:
        assert dict(after.pack(name).tensors).keys() == dict(before.pack(name).tensors).keys()
        assert error(before.pack(name), after.pack(name)) == (0, 0)
    assert after.member("mixed")[1].error == pytest.approx(error(mixed, after.pack("mixed"))[0], rel=1e-3)
    assert after.member("mixed")[1].error < 0.02
    assert error(member(9), after.pack("member-9"))[0] < 1e-6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(Unsupported, match="no bases"):
        compress([member(5, (Site("layers.2.q_proj", 31, 23),))], into=tmp_path / "fleet")
    ran = CliRunner().invoke(
        main,
        ["compress", "--member", str(tmp_path / "fleet"), "mixed", "-o", str(tmp_path / "back"), "--json"],
    )
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)["name"] == "mixed"
    assert adapterpack.inspect(tmp_path / "fleet")["members"][3]["name"] == "mixed"
    with pytest.raises(UnknownName, match="did you mean 'mixed'"):
        after.pack("mixd")
    served = StartupAdapters.of([tmp_path / "fleet", tmp_path / "mixed"])  # what a server is started with
    assert [getattr(one, "name", None) for one in served.packs] == [*after.names, "mixed"]


def test_the_engine_holds_the_bases_once_and_runs_every_row_as_by_itself(
    base_of: Make, pack_of: Make, tmp_path: Path
) -> None:
    """Rows of three members, of the base and of a pack with its own factors, in one batch: their logits are
    those of the members written as packs, each alone. Members share arrays, which count once, and their own
    are the int8 cores.
    """
    packs = [adapterpack.load(pack_of("llama", name)) for name in ("alpha", "beta", "gamma")]
    bundle = tmp_path / "bundle"
    adapterpack.export(base_of("llama"), packs, bundle, mode="bank", in_place=True)
    fleet = compress(packs, basis=6, out=tmp_path / "fleet")
    members = [fleet.pack(name) for name in fleet.names]
    rows: list[Pack | None] = [members[0], None, members[1], packs[2], members[2], members[0]]
    plain = {
        id(pack): adapterpack.load(pack.write(tmp_path / pack.id[7:15]).path or "")
        for pack in (*members, packs[2])
    }
    prompts = [[3 + 7 * place, 11, 5 + place] for place in range(len(rows))]
    together, alone = Engine(bundle, "cpu", max_rows=len(rows)), Engine(bundle, "cpu", max_rows=1)
    for chosen in (rows, rows[:3], [members[0]], rows[::-1]):
        requests = [
            together.row(prompt, pack, Sampling()).sequences[0]
            for prompt, pack in zip(prompts, chosen, strict=False)
        ]
        for one in requests:
            together.rows.admit(one)
        for _ in requests:
            together.rows.prefill(len(prompts[0]))
        for one in requests:
            one.next_token = 7
        made = together.rows.decode().copy()
        for logits, prompt, pack in zip(made, prompts, chosen, strict=False):
            (single,) = alone.row(prompt, None if pack is None else plain[id(pack)], Sampling()).sequences
            alone.rows.admit(single)
            alone.rows.prefill(len(prompt))
            single.next_token = 7
            wanted = alone.rows.decode()[0]
            # Products of float32 in another order: 1e-5 of the largest logit.
            np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))
            alone.rows.remove(single)
        for one in requests:
            together.rows.remove(one)
    residents = list(together.adapters._resident.values())
    first, second = (
        next(adapter for adapter in residents if adapter.name == name) for name in ("alpha", "beta")
    )
    both = first.shared & second.shared  # the second changes fewer sites
    assert len(both) == 4
    assert all(first.values[name] is second.values[name] for name in both)
    cores = sum(factors.codes.nbytes + factors.scales.nbytes for factors in members[0].factored.values())
    assert first.nbytes == cores
    size = {place: nbytes for adapter in residents for place, nbytes in adapter.shared_nbytes.items()}
    assert together.adapters.nbytes == sum(adapter.nbytes for adapter in residents) + sum(size.values())


def altered(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / "adapterfleet.json").read_bytes())
    change(value)
    (folder / "adapterfleet.json").write_bytes(sealed_json(value))


def renamed(folder: Path) -> None:
    """One letter of a member's name."""
    manifest = folder / "adapterfleet.json"
    name = json.loads(manifest.read_bytes())["members"][1]["name"]
    manifest.write_bytes(manifest.read_bytes().replace(f'"{name}"'.encode(), f'"{name[:-1]}x"'.encode()))


def moved_out(file: Path) -> None:
    """The file as a link to where it lies now."""
    there = file.parent.parent / f"moved-{file.name}"
    file.rename(there)
    file.symlink_to(there)


FAULTS: dict[str, Callable[[Path], Any]] = {
    "a flipped byte": lambda at: flip(at / "fleet.safetensors"),
    "a file that ends early": lambda at: (at / "fleet.safetensors").write_bytes(
        (at / "fleet.safetensors").read_bytes()[:-1]
    ),
    "a manifest edited by hand": lambda at: (at / "adapterfleet.json").write_bytes(
        (at / "adapterfleet.json").read_bytes() + b" "
    ),
    "gigabytes that are not there": lambda at: altered(at, lambda x: x.update(rank=60_000)),
    "bases of nobody": lambda at: altered(at, lambda x: x["members"][0].update(cluster=1)),
    "sites of another fleet": lambda at: altered(at, lambda x: x["members"][0].update(sites=[0, 7])),
    "sites twice": lambda at: altered(at, lambda x: x["members"][0].update(sites=[1, 1])),
    "a width beyond any": lambda at: altered(at, lambda x: x["sites"][0].update(in_features=1 << 40)),
    "numbers beyond any": lambda at: altered(
        at, lambda x: (x.update(rank=65_536), x["sites"][0].update(in_features=1 << 24, out_features=1 << 24))
    ),
    "two of one name": lambda at: altered(at, lambda x: x["members"][1].update(name=x["members"][0]["name"])),
    "a name that leads elsewhere": lambda at: altered(at, lambda x: x["members"][0].update(name="../x")),
    "a letter of a name": renamed,
    "tensors behind a link": lambda at: moved_out(at / "fleet.safetensors"),
    "a manifest behind a link": lambda at: moved_out(at / "adapterfleet.json"),
    "a scale that overflows": lambda at: spoilt(at, np.float32(1e37)),
    "no digest of itself": lambda at: altered(at, lambda x: x.pop("integrity")),
    "a digest in an older version": lambda at: altered(at, lambda x: x.update(format_version="1.0")),
    "a version of tomorrow": lambda at: altered(at, lambda x: x.update(format_version="1.2")),
    "an unknown field": lambda at: altered(at, lambda x: x.update(more=1)),
    "an error that is none": lambda at: altered(at, lambda x: x["members"][0].update(error=-1)),
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def spoilt(at: Path, scale: Any) -> None:
    """The fleet with that scale under its first core, under a manifest that knows."""
    fleet = Fleet.load(at)
    tensors = {name: np.array(value) for name, value in fleet.tensors.items()}
    tensors["scales.0"][0, 0] = scale
    tensors["cores.0"][0, 0] = 127
    fields = {
        key: item
        for key, item in msgspec.structs.asdict(fleet.manifest).items()
        if key not in ("tensors", "size", "sha256")
    }
    shutil.rmtree(at)
    Fleet.sealed(tensors, **fields).write(at)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fleet") / "fleet"
    compress([member(0), member(1)], basis=4, out=out)
    return out


@pytest.mark.parametrize("fault", FAULTS)
def test_altered_fleets_are_refused(folder: Path, tmp_path: Path, fault: str) -> None:
    """By name, and the validator finds it without falling over. The shipped schema is that of the structs,
    and fits what is whole.
    """
    at = shutil.copytree(folder, tmp_path / "fleet")
    FAULTS[fault](at)
    with pytest.raises(AdapterpackError):
        fleet = Fleet.load(at)
        [fleet.pack(name) for name in fleet.names]
    report = adapterpack.validate(at)
    assert (report.kind, report.state) == ("fleet", "invalid")
    assert adapterpack.validate(folder).state == "valid"
    assert fits(json.loads((folder / "adapterfleet.json").read_bytes()), "fleet.v1")
    assert (
        json.loads((Path(__file__).parents[1] / "schemas" / "fleet.v1.json").read_text("utf-8"))
        == fleet_schema()
    )


def test_fleets_of_the_first_version_are_read(folder: Path, tmp_path: Path) -> None:
    """Whose manifests held no digest of themselves: they keep their ids, and what is added to them makes a
    fleet of today.
    """
    at = shutil.copytree(folder, tmp_path / "fleet")
    value = json.loads((at / "adapterfleet.json").read_bytes())
    del value["integrity"]
    data = strict_json.canonical({**value, "format_version": "1.0"})
    (at / "adapterfleet.json").write_bytes(data)
    assert fits(json.loads(data), "fleet.v1")
    fleet = Fleet.load(at)
    assert fleet.manifest.id == f"sha256:{hashlib.sha256(data).hexdigest()}"
    fleet.write(tmp_path / "again")
    assert (tmp_path / "again" / "adapterfleet.json").read_bytes() == data
    grown = compress([member(2)], into=at, out=tmp_path / "grown")
    assert (grown.manifest.format_version, grown.names) == ("1.1", (*fleet.names, "member-2"))


def test_a_fleet_is_signed_and_verified(folder: Path, tmp_path: Path) -> None:
    """By the commands of packs; a server that asks for signatures takes its members, and nothing of a fleet
    that was altered since.
    """
    keys = {}
    for name in ("ours", "theirs"):
        private = ec.generate_private_key(ec.SECP256R1())
        keys[name] = tmp_path / f"{name}.pub"
        (tmp_path / f"{name}.pem").write_bytes(
            private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        keys[name].write_bytes(
            private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
    at = shutil.copytree(folder, tmp_path / "fleet")
    with pytest.raises(Unsigned):
        adapterpack.verify(at, keys["ours"])
    signed = CliRunner().invoke(
        main, ["sign", str(at), "--key", str(tmp_path / "ours.pem"), "--identity", "me", "--json"]
    )
    assert signed.exit_code == 0, signed.output
    found = adapterpack.verify(at, keys["ours"], identity="me")
    assert (found.pack, set(found.files)) == (
        Fleet.load(at).manifest.id,
        {"adapterfleet.json", "fleet.safetensors"},
    )
    assert adapterpack.validate(at).valid
    with pytest.raises(WronglySigned):
        adapterpack.verify(at, keys["theirs"])
    pack = Fleet.load(at).pack("member-0")
    Signers([keys["theirs"], keys["ours"]]).require(pack)
    with pytest.raises(WronglySigned):
        Signers([keys["theirs"]]).require(pack)
    (at / "more.txt").write_text("x")
    with pytest.raises(WronglySigned, match="not signed"):
        adapterpack.verify(at, keys["ours"])
    (at / "more.txt").unlink()
    other = compress([member(0), member(2)], basis=4, out=tmp_path / "other")
    for name in ("adapterfleet.json", "fleet.safetensors"):
        shutil.copy(tmp_path / "other" / name, at / name)
    with pytest.raises(WronglySigned, match="altered"):
        Signers([keys["ours"]]).require(pack)
    (at / "adapterpack.sig.json").unlink()
    adapterpack.sign(at, tmp_path / "ours.pem")
    with pytest.raises(WronglySigned, match="another fleet"):
        Signers([keys["ours"]]).require(pack)
    Signers([keys["ours"]]).require(Fleet.load(at).pack(other.names[1]))


KILLED = """
import os, pathlib, signal, sys
import adapterpack
rename = pathlib.Path.rename
def killed(self, target):
    done = rename(self, target)
    if self == pathlib.Path(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return done
pathlib.Path.rename = killed
adapterpack.compress([sys.argv[2]], into=sys.argv[1])
"""


def test_the_older_fleet_is_never_away(folder: Path, tmp_path: Path) -> None:
    """Not even where a process is killed once it has renamed the older one: both change places in one step.
    What killed ones left is removed by the next.
    """
    at = shutil.copytree(folder, tmp_path / "fleet")
    left = tmp_path / f".fleet.{'0' * 16}.tmp"
    left.mkdir()
    new = member(2).write(tmp_path / "new").path
    subprocess.run([sys.executable, "-c", KILLED, str(at), str(new)], check=False, capture_output=True)
    assert Fleet.load(at).names in (("member-0", "member-1"), ("member-0", "member-1", "member-2"))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
