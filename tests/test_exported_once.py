"""A base and packs in place of a bundle: exported once into the cache, for ``run``, ``serve`` and ``chat``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_sign import make_keys

import adapterpack
from adapterpack.cli.main import main
from adapterpack.errors import BaseMismatch, ConfigError, Unsupported

Packs = Callable[[str, str], Path]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of its own, which the tests of this file share."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ADAPTERPACK_CACHE", str(folder))
        yield folder


def rows_of(*arguments: object) -> tuple[list[dict[str, Any]], str]:
    """What ``run`` answers, without the paths of inputs; and what it says besides."""
    done = CliRunner().invoke(main, ["run", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_base_and_a_pack_answer_as_their_bundle(
    kind: str, base_of: Callable[[str], Path], pack_of: Packs, bundle_of: Packs, cache: Path
) -> None:
    """A classifier and a language model: the rows of a base are those of the bundle of an export."""
    base, pack = base_of(kind), pack_of(kind, "alpha")
    given = ["--prompt", "w1 w2 w3", *(["--max-new-tokens", "4"] if kind == "llama" else [])]
    found, said = rows_of(base, pack, *given)
    expected, _ = rows_of(bundle_of(kind, "bank"), "--adapter", "alpha", *given)
    if kind == "bert":
        assert found[0].pop("scores") == pytest.approx(expected[0].pop("scores"), abs=1e-5)
    assert found == expected and found[0]["adapter"] == "alpha"
    assert f"is exported to {cache / 'exports'}" in said
    if kind == "bert":
        with pytest.raises(Unsupported, match="a model for text-classification answers no messages"):
            adapterpack.chat(bundle_of(kind, "bank"))
    before = {path: path.stat().st_mtime_ns for path in (cache / "exports").iterdir()}
    assert rows_of(base, pack, *given)[0][0]["pack"] == found[0]["pack"]
    assert {path: path.stat().st_mtime_ns for path in (cache / "exports").iterdir()} == before


def test_what_a_bundle_hangs_on_is_in_its_key(tiny_llama: Path, pack_of: Packs) -> None:
    """The second call does not export, another pack or option does, and a bundle that was altered is made
    again; a bundle is returned as it is.
    """
    steps: list[str] = []
    packs = [pack_of("llama", "alpha")]
    first = adapterpack.bundle_for(tiny_llama, packs, proof="none")
    assert adapterpack.bundle_for(tiny_llama, packs, proof="none", progress=steps.append) == first
    assert adapterpack.bundle_for(first, progress=steps.append) == first
    assert steps == []
    graph = first / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1])
    assert adapterpack.bundle_for(tiny_llama, packs, proof="none", progress=steps.append) == first
    assert steps != [] and graph.read_bytes() == whole
    renamed = [adapterpack.load(packs[0], "other")]
    assert adapterpack.bundle_for(tiny_llama, renamed, proof="none") != first
    with pytest.raises(ConfigError, match="so --proof has no effect"):
        adapterpack.bundle_for(first, proof="none")


def test_what_cannot_be_exported_is_refused_before(
    tiny_llama: Path, pack_of: Packs, cache: Path, tmp_path: Path
) -> None:
    """A pack of another base, a pack in the place of the base, a folder of something else."""
    there = sorted((cache / "exports").glob("*")) if (cache / "exports").is_dir() else []
    with pytest.raises(BaseMismatch):
        adapterpack.bundle_for(tiny_llama, [pack_of("bert", "alpha")])
    with pytest.raises(ConfigError, match="an adapter comes after its base"):
        adapterpack.bundle_for(pack_of("llama", "alpha"))
    assert sorted((cache / "exports").glob("*")) == there


def test_another_process_may_be_first(tiny_llama: Path, pack_of: Packs, cache: Path, tmp_path: Path) -> None:
    """Its bundle is taken, and nothing else is left."""
    packs, meanwhile = [pack_of("llama", "gamma")], tmp_path / "meanwhile"
    first = adapterpack.bundle_for(tiny_llama, packs, proof="none")
    first.rename(meanwhile)
    made = meanwhile.stat().st_ino

    def finish(step: str) -> None:
        if meanwhile.exists():
            meanwhile.rename(first)

    assert adapterpack.bundle_for(tiny_llama, packs, proof="none", progress=finish) == first
    assert first.stat().st_ino == made
    assert not list((cache / "exports").glob(".*"))


def test_a_bundle_takes_more_packs(bundle_of: Packs, pack_of: Packs) -> None:
    """They are loaded, and rows that name no adapter run with them, as with ``--adapter``; what the options name
    comes after them, once.
    """
    bundle, pack = bundle_of("bert", "bank"), f"other={pack_of('bert', 'beta')}"
    found, _ = rows_of(bundle, pack, "--adapter", "alpha", "--adapter", "alpha", "--prompt", "w1 w2")
    assert [row["adapter"] for row in found] == ["other", "alpha"]
    (alone,), _ = rows_of(bundle, "--adapter", "beta", "--prompt", "w1 w2")
    assert alone["scores"] == pytest.approx(found[0]["scores"], abs=1e-6)


def test_a_server_asks_for_signatures_before_it_exports(
    tiny_bert: Path, pack_of: Packs, cache: Path, tmp_path: Path
) -> None:
    """Of the packs that go into the bundle, too."""
    there = sorted((cache / "exports").glob("*"))
    command = [
        "serve",
        tiny_bert,
        pack_of("bert", "gamma"),
        "--require-signature",
        make_keys(tmp_path).public,
    ]
    done = CliRunner().invoke(main, [*map(str, command)])
    assert (done.exit_code, sorted((cache / "exports").glob("*"))) == (4, there), done.stderr
