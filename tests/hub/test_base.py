"""The base that an adapter names, looked at on the hub by its listing and its headers: what fits, what does
not, and what it costs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hubs import Hub, make_pack
from msgspec.structs import replace

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base import fingerprint as fp
from adapterpack.base.checkpoint import INDEX, Checkpoint
from adapterpack.errors import HubError
from adapterpack.hub.server.storage import HubStorage
from adapterpack.io import safetensors
from adapterpack.manifest import manifest as m
from adapterpack.manifest.structs import PackTokenizer
from adapterpack.pack.pack import Pack, build, seal

pytestmark = pytest.mark.fast


def write_base(folder: Path, width: int = 7, scale: float = 1.0, shards: int = 2) -> Path:
    """A base with the site ``net.q`` that the packs of these tests change, in several shards."""
    folder.mkdir(parents=True)
    tensors = {
        "net.q.weight": np.full((5, width), scale, np.float32),
        "net.v.weight": np.ones((30, 20), ml_dtypes.bfloat16),
    }
    weight_map = {}
    for number, (name, value) in enumerate(tensors.items()):
        shard = f"model-{number + 1:05}-of-00002.safetensors" if shards == 2 else "model.safetensors"
        weight_map[name] = shard
        if shards == 2:
            safetensors.write(folder / shard, {name: value})
    if shards == 1:
        safetensors.write(folder / "model.safetensors", tensors)
    else:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "architectures": ["Tiny"]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def put(hub: Hub, repo: str, folder: Path) -> str:
    """A folder as a repository, written where the hub keeps its files; the commit."""
    storage = HubStorage(hub.folder)
    storage.create(repo, private=False, author="ann")
    entries = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        entry = storage.keep_bytes(data)
        entries[path.name] = storage.large(entry.sha256) if path.suffix == ".safetensors" else entry
    return storage.change(
        repo, "main", "ann", "base", "", parent=None, change=lambda files: files.update(entries), as_pr=False
    )[0]


def made_for(base: m.Base, **claims: Any) -> Pack:
    pack = make_pack(**claims)
    return seal(replace(pack.manifest, base=base), pack.tensors)


def knows(folder: Path, name: str, **more: Any) -> m.Base:
    found = Checkpoint(folder).fingerprint(files=True)
    return m.Base(
        name, structure=found.structure, content=found.content, files=found.files, probe=found.probe, **more
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_equal_files_are_the_same_base_without_a_byte_of_weights(
    hub: Hub, tmp_path: Path, shards: int
) -> None:
    folder, name = write_base(tmp_path / "base", shards=shards), f"org/base{shards}"
    put(hub, name, folder)
    tokenizer = PackTokenizer(tokenizer_json=hashlib.sha256(b"{}").hexdigest())
    adapterpack.push(made_for(knows(folder, name), tokenizer=tokenizer), f"hf://org/fits{shards}")
    for full in (False, True):
        report = adapterpack.validate(f"hf://org/fits{shards}", full=full)
        assert (report.findings, report.base and report.base.name) == ((), "same")
        assert not [text for text in report.not_checked if text.startswith(("base", "tokenizer"))]
        assert report.state == ("valid" if full else "not fully checked")
    assert adapterpack.validate(f"hf://org/fits{shards}", f"hf://{name}").base.name == "same", (
        "named by the user"
    )  # type: ignore[union-attr]


def test_other_shards_leave_the_weights_open_and_other_shapes_are_another_base(
    hub: Hub, tmp_path: Path
) -> None:
    folder = write_base(tmp_path / "base")
    put(hub, "org/resharded", write_base(tmp_path / "one", shards=1))
    put(hub, "org/wider", write_base(tmp_path / "wider", width=9))
    adapterpack.push(made_for(knows(folder, "org/resharded")), "hf://org/onresharded")
    report = adapterpack.validate("hf://org/onresharded")
    assert (report.findings, report.base and report.base.name) == ((), "structural")
    assert any("its weights were not" in text for text in report.not_checked)

    adapterpack.push(made_for(knows(folder, "org/wider")), "hf://org/onwider")
    for full in (False, True):
        report = adapterpack.validate("hf://org/onwider", full=full)
        assert [finding.rule for finding in report.findings] == ["AP701"]
        assert "hf://org/wider@" in report.findings[0].message + report.findings[0].where


def test_another_tokenizer_on_the_hub_is_a_finding(hub: Hub, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    put(hub, "org/base-other-tokenizer", folder)
    pack = made_for(
        knows(folder, "org/base-other-tokenizer"), tokenizer=PackTokenizer(tokenizer_json="0" * 64)
    )
    adapterpack.push(pack, "hf://org/tokenized")
    assert [finding.rule for finding in adapterpack.validate("hf://org/tokenized").findings] == ["AP702"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/nowhere", "no such repository"),
        ("org/pickled", "no safetensors"),
        ("org/unindexed", "shards that are not there"),
    ],
)
def test_a_base_that_cannot_be_read_is_told_as_not_checked(
    hub: Hub, tmp_path: Path, name: str, says: str
) -> None:
    if name != "org/nowhere":
        folder = write_base(tmp_path / "base")
        (folder / "model-00001-of-00002.safetensors").unlink()
        if name == "org/pickled":
            (folder / INDEX).unlink()
        put(hub, name, folder)
    repo = name.replace("org/", "hf://org/on-")
    adapterpack.push(made_for(m.Base(name)), repo)
    report = adapterpack.validate(repo)
    assert (report.findings, report.base) == ((), None)
    assert any(
        text.startswith(f"base: {name} was not compared") and says in text for text in report.not_checked
    )
    if name == "org/nowhere":
        with pytest.raises(HubError, match="no such repository"):
            adapterpack.validate(repo, f"hf://{name}")


def test_a_peft_repository_is_bound_to_the_base_that_it_names(hub: Hub, tmp_path: Path) -> None:
    """What only PEFT knows is imported with the fingerprint of its base; validated without a manifest as far
    as that goes.
    """
    folder = write_base(tmp_path / "base")
    commit = put(hub, "org/peftbase", folder)
    adapter = made_for(m.Base("org/peftbase")).write(tmp_path / "peft").path
    assert adapter is not None
    (adapter / "adapterpack.json").unlink()
    put(hub, "org/bound", adapter)
    report = adapterpack.validate("hf://org/bound")
    assert (report.kind, report.findings, report.state) == ("peft", (), "not fully checked")
    assert any(text.startswith("no manifest: one would add") for text in report.not_checked)

    pulled = adapterpack.pull("hf://org/bound")
    base = adapterpack.load(pulled.path).manifest.base
    known = Checkpoint(folder).fingerprint(content=False, files=True)
    assert base == m.Base("org/peftbase", commit, "tiny", known.structure, files=known.files)
    assert any("identified by the listing and the headers" in note for note in pulled.notes)
    assert adapterpack.validate(pulled.path, folder).base.name == "same"  # type: ignore[union-attr]
    assert adapterpack.validate(pulled.path, write_base(tmp_path / "tuned", scale=2.0)).state == "invalid", (
        "other weights are another base"
    )

    put(hub, "org/unfit-base", write_base(tmp_path / "wider", width=9))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "org/unfit-base"
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    put(hub, "org/unfit", adapter)
    assert [finding.rule for finding in adapterpack.validate("hf://org/unfit").findings] == ["AP701"]
    pulled = adapterpack.pull("hf://org/unfit")
    assert adapterpack.load(pulled.path).manifest.base == m.Base("org/unfit-base")
    assert any("known by name only: a site has another shape" in note for note in pulled.notes)


def test_a_look_at_an_adapter_of_a_2_gb_base_reads_less_than_2_mb(hub: Hub) -> None:
    """Two shards of 1 GB, 290 tensors, with an index: the bytes that the hub sends are counted."""
    storage, width, per_shard = HubStorage(hub.folder), 1857, 145
    storage.create("org/base-2gb", private=False, author="ann")
    entries, weight_map, headers = {}, {}, []
    for number in range(2):
        header, at = {}, 0
        for layer in range(per_shard):
            name = f"model.layers.{number * per_shard + layer}.self_attn.q_proj.weight"
            header[name] = {
                "dtype": "BF16",
                "shape": [width, width],
                "data_offsets": [at, at + 2 * width * width],
            }
            at += 2 * width * width
            weight_map[name] = f"model-{number + 1:05}-of-00002.safetensors"
            headers.append((name, "BF16", (width, width)))
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        sha256 = hashlib.sha256(b"%d" % number).hexdigest()  # the hub's word: nobody reads these bytes
        storage.blob(sha256).parent.mkdir(parents=True, exist_ok=True)
        with storage.blob(sha256).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + at)
        entries[f"model-{number + 1:05}-of-00002.safetensors"] = storage.large(sha256)
    entries[INDEX] = storage.keep_bytes(json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    entries["config.json"] = storage.keep_bytes(b"{}")
    commit, _ = storage.change(
        "org/base-2gb",
        "main",
        "ann",
        "",
        "",
        parent=None,
        change=lambda files: files.update(entries),
        as_pr=False,
    )
    assert sum(entry.size for entry in entries.values()) > 2e9

    site = Site("model.layers.7.self_attn.q_proj", width, width)
    params = {"lora_A": np.ones((8, width), np.float32), "lora_B": np.ones((width, 8), np.float32)}
    files = fp.files(
        (name, entry.size, entry.sha256) for name, entry in entries.items() if name != "config.json"
    )
    base = m.Base("org/base-2gb", commit, structure=fp.structure(headers), content=None, files=files)
    adapterpack.push(
        build(
            "small",
            get("lora"),
            {site: (LoRA(r=8, alpha=16), params)},
            task=m.PackTask("text-generation"),
            base=base,
            license="mit",
        ),
        "hf://org/small",
    )
    hub.sent()
    report = adapterpack.validate("hf://org/small")
    read = hub.sent()
    assert (report.findings, report.base and report.base.name) == ((), "same")
    assert 60_000 < read < 2_000_000 / 4, f"{read} bytes"
