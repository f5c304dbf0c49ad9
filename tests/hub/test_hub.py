"""The whole way: a real hub process, the official client, the command line as users start it, packs and
bundles that answer the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hubs import READ, WRITE, Hub, left, make_pack
from jsonschema import Draft202012Validator
from msgspec.structs import replace
from processes import child

import adapterpack
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import (
    ConfigError,
    FormatError,
    HubConflict,
    HubError,
    HubOffline,
    OutputExists,
    RepoNotFound,
    RevisionNotFound,
)
from adapterpack.http.http_error import HTTPError
from adapterpack.hub.auditing import audit, audit_sarif
from adapterpack.hub.lockfile import Lockfile
from adapterpack.hub.server.storage import HubStorage
from adapterpack.hub.transport import client, names, transfer
from adapterpack.resources import schema
from adapterpack.store import Store

sys.path.insert(0, str(Path(__file__).parent.parent / "packs"))
from make_bad import sealed_json

REPORT = Draft202012Validator(schema("report.v1"))


def command(environment: dict[str, str], folder: Path, *args: Any, code: int = 0) -> Any:
    """The command in a process of its own; the object that it prints, which fits the schema."""
    whole = [sys.executable, "-m", "adapterpack", *map(str, args), "--json"]
    done = subprocess.run(
        whole, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert WRITE not in done.stdout + done.stderr
    value = json.loads(done.stdout)
    REPORT.validate(value)
    return value


def test_a_pack_goes_up_and_comes_down_and_its_canary_sings(
    hub: Hub,
    client_environment: dict[str, str],
    pack_of: Callable[[str, str], Path],
    base_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """push -> pull in a fresh store -> validate -> attach: the canary is replayed; transformers and PEFT load
    what lies on the hub.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = pack_of("llama", "alpha")
    args = ("push", source, "hf://org/alpha", "--base-model", "org/llama", "--license", "apache-2.0")
    pushed = command(client_environment, tmp_path, *args, "--tag", "v1")
    assert pushed["created"]
    again = adapterpack.push(source, "hf://org/alpha", base_model="org/llama", license="apache-2.0", tag="v1")
    assert (again.sent, again.deleted, again.commit) == ((), (), pushed["commit"]), (
        "equal content is left alone"
    )

    client_environment = elsewhere(client_environment, tmp_path)
    pulled = command(client_environment, tmp_path, "pull", "hf://org/alpha@v1", "-o", "alpha")
    assert (pulled["commit"], pulled["id"]) == (pushed["commit"], pushed["id"])
    seen = command(
        client_environment, tmp_path, "validate", "hf://org/alpha@v1", "--base", base_of("llama"), code=3
    )
    assert (seen["state"], seen["findings"], seen["base"]["verdict"]) == ("not fully checked", [], "same")
    whole = adapterpack.validate("hf://org/alpha@v1", base_of("llama"), full=True)
    assert (whole.state, whole.id) == ("valid", pushed["id"])

    pack = adapterpack.load(tmp_path / "alpha")
    assert pack.manifest.canary == adapterpack.load(source).manifest.canary is not None
    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad():
        mine = adapterpack.attach(AutoModelForCausalLM.from_pretrained(base_of("llama")), pack)(ids).logits
        folder = snapshot_in_another_process(client_environment, "org/alpha", tmp_path)
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of("llama")), folder)(
            ids
        ).logits
    # float32 sums in another order, logits of size 3
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
    assert adapterpack.validate(folder).valid, "what the official client fetched is the pack"

    lock = json.loads((tmp_path / "adapterpack.lock").read_text())
    assert lock["entries"] == {
        "hf://org/alpha@v1": {"commit": pushed["commit"], "id": pushed["id"], "kind": "pack"}
    }
    offline = command(
        {**client_environment, "HF_HUB_OFFLINE": "1"}, tmp_path, "pull", "hf://org/alpha@v1", "-o", "offline"
    )
    assert offline["id"] == pushed["id"] == adapterpack.load(tmp_path / "offline").id


def elsewhere(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """Another machine, as far as the software can tell: no cache, no home, no store of the first."""
    return {
        **environment,
        "HOME": str(folder / "home2"),
        "HF_HOME": str(folder / "hf2"),
        "ADAPTERPACK_CACHE": str(folder / "cache2"),
        "XDG_CACHE_HOME": str(folder / "xdg2"),
    }


def without_times(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: item
        for key, item in value.items()
        if key not in {"bundle", "path"} and "second" not in key and "time" not in key
    }


def snapshot_in_another_process(environment: dict[str, str], repo: str, folder: Path) -> str:
    """The official client in its own process, which reads its settings when it is imported."""
    code = (
        f"from huggingface_hub import snapshot_download; print(snapshot_download({repo!r}, "
        f"local_dir={str(folder / 'official')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    shutil.rmtree(folder / "official" / ".cache")
    return done.stdout.strip()


def test_a_bundle_goes_up_and_comes_down_and_answers_the_same(
    hub: Hub,
    client_environment: dict[str, str],
    bundle_of: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    """push -> pull -> validate --full replays the canaries in ONNX Runtime -> the same outputs; hf:// is a
    bundle too.
    """
    source = bundle_of("llama", "bank")
    named = ("--base-model", "org/llama", "--license", "apache-2.0")
    pushed = command(client_environment, tmp_path, "push", source, "hf://org/bundle", *named)
    assert (
        adapterpack.push(source, "hf://org/bundle", base_model="org/llama", license="apache-2.0").sent == ()
    )
    fresh = elsewhere(client_environment, tmp_path)
    pulled = command(fresh, tmp_path, "pull", "hf://org/bundle", "-o", "bundle")
    assert (pulled["kind"], pulled["id"]) == ("bundle", pushed["id"])
    row = ("--adapter", "alpha", "--prompt", "w1 w2 w3", "--max-new-tokens", "4")
    here, there = (
        command(environment, tmp_path, "run", folder, *row)
        for environment, folder in ((client_environment, source), (fresh, tmp_path / "bundle"))
    )
    assert without_times(here) == without_times(there), "another process, another home, the same answer"
    report = adapterpack.validate(tmp_path / "bundle", full=True)
    assert report.findings == ()
    assert not any(text.startswith("canary of") for text in report.not_checked), "every canary was replayed"
    assert adapterpack.validate("hf://org/bundle").findings == ()

    inputs = adapterpack.Session(source).encode(["w1 w2 w3", "w5 w6"])
    one, other = (
        adapterpack.Session(folder).run(inputs, adapters=["alpha", None])["logits"]
        for folder in (source, tmp_path / "bundle")
    )
    np.testing.assert_array_equal(one, other)
    assert adapterpack.inspect("hf://org/bundle")["kind"] == "bundle"


def test_what_a_bundle_on_a_hub_reads_texts_with_is_checked_without_its_weights(
    hub: Hub,
    bundle_of: Callable[[str, str], Path],
    base_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """A tokenizer that is none, and another one than the packs' and the base's; what only the whole bundle
    shows is named.
    """
    api, words = client.api(), json.loads((bundle_of("llama", "bank") / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    found = {}
    for name, text in (("none", "{}"), ("other", json.dumps(words))):
        folder = tmp_path / name
        shutil.copytree(bundle_of("llama", "bank"), folder)
        (folder / "tokenizer.json").write_text(text)
        read_bundle(folder).write(folder)
        api.create_repo(f"org/{name}")
        add(
            api,
            f"org/{name}",
            {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in folder.rglob("*")
                if path.is_file()
            },
        )
        report = adapterpack.validate(f"hf://org/{name}", base_of("llama"))
        found[name] = {(finding.rule, finding.where) for finding in report.findings}
        assert any(text.startswith("graphs and slots: ") for text in report.not_checked)
    packs = {("AB203", f"adapters/{name}") for name in ("alpha", "beta")}
    assert found == {
        "none": {("AB106", "tokenizer.json"), ("AB303", "tokenizer.json"), *packs},
        "other": {("AB303", "tokenizer.json"), *packs},
    }


def test_a_peft_repository_is_imported(hub: Hub, tmp_path: Path) -> None:
    """What only PEFT knows comes down as a pack; a pickle in its place is refused."""
    folder = make_pack().write(tmp_path / "peft").path
    assert folder is not None
    (folder / "adapterpack.json").unlink()
    api = client.api()
    api.create_repo("org/peft")
    add(
        api,
        "org/peft",
        {path.name: path.read_bytes() for path in folder.iterdir()} | {"training_args.bin": b"beside"},
    )
    pulled = adapterpack.pull("hf://org/peft")
    assert (pulled.kind, pulled.id) == ("peft", adapterpack.load(folder).id)
    assert adapterpack.validate("hf://org/peft").kind == "peft"
    assert adapterpack.inspect("hf://org/peft")["id"] == pulled.id

    api.create_repo("org/pickle")
    add(api, "org/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    with pytest.raises(FormatError, match="pickle files are refused"):
        adapterpack.pull("hf://org/pickle")


def add(api: Any, repo: str, files: dict[str, bytes]) -> str:
    import io

    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, io.BytesIO(data)) for name, data in files.items()]
    return str(api.create_commit(repo, operations, commit_message="by hand").oid)


@pytest.mark.fast
def test_the_card_says_what_the_manifest_says(hub: Hub, tmp_path: Path) -> None:
    metric = {"name": "accuracy", "value": 0.875, "dataset": "held out | <b>", "n": 40}
    adapterpack.push(
        make_pack("carded", metrics=(metric,), training={"epochs": 3, "learning_rate": 1e-3}),
        "hf://org/carded",
    )
    listed = client.tree(remote := client.connect(names.parse("hf://org/carded")))
    transfer.fetch(remote, listed["README.md"], tmp_path / "README.md")
    _, header, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(header)
    assert {key: told[key] for key in ("base_model", "base_model_relation", "library_name", "license")} == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
    }
    assert told["tags"] == ["adapterpack", "lora"]
    assert told["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.875}]
    for text in (
        "hf://org/carded",
        "PeftModel.from_pretrained",
        "vLLM does not take this adapter",
        "adapterpack export",
        "| learning rate | 0.001 |",
    ):
        assert text in body
    assert "| files, digests, structure, values | valid |" in body
    assert str(tmp_path) not in body
    assert "<b>" not in body
    assert "held out \\| \\<b\\>" in body

    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "README.md")  # the official reader, and its own check of the results
    [result] = card.data.eval_results
    assert (card.data.base_model, card.data.model_name) == ("org/base", "carded")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.875)
    assert card.data.to_dict()["base_model_relation"] == "adapter"


@pytest.mark.fast
@pytest.mark.parametrize(("claims", "options", "says"), [
    ({"license": None}, {}, "no license"),
    ({"base": "tiny-bert"}, {}, "place on your disk"),
    ({"base": None}, {}, "place on your disk"),
    ({"training": {"note": "login with hf_" + "a" * 34}}, {}, "a Hugging Face token"),
    ({"training": {"key": "AKIA" + "A" * 16}}, {}, "an AWS access key"),
    ({}, {"base_model": "/home/me/llama"}, "named as others can find it"),
    ({}, {"tag": "a..b"}, "cannot be a tag"),
])  # fmt: skip
def test_what_must_not_leave_this_machine_does_not(
    claims: dict[str, Any], options: dict[str, Any], says: str, hub: Hub
) -> None:
    import dataclasses

    pack = make_pack()
    manifest = pack.manifest
    if "base" in claims:
        manifest = replace(manifest, base=replace(manifest.base, name=claims["base"]))
    manifest = replace(manifest, **{key: value for key, value in claims.items() if key != "base"})
    with pytest.raises(ConfigError, match=says) as caught:
        adapterpack.push(dataclasses.replace(pack, manifest=manifest), "hf://org/refused", **options)
    assert "hf_aaa" not in str(caught.value)
    with pytest.raises(RepoNotFound):
        client.connect(names.parse("hf://org/refused"))


@pytest.mark.fast
def test_files_beside_a_pack_stop_it(hub: Hub, tmp_path: Path) -> None:
    folder = make_pack().write(tmp_path / "tickets").path
    assert folder is not None
    (folder / "training_args.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="AP106"):
        adapterpack.push(folder, "hf://org/refused")
    (folder / "training_args.bin").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match="AP102"):
        adapterpack.push(folder, "hf://org/refused")


@pytest.mark.fast
def test_what_lies_in_a_repository_is_not_overwritten_by_mistake(hub: Hub) -> None:
    """Files of something else stop a push; files of the pack before go; a text of one's own stays."""
    api = client.api()
    api.create_repo("org/full")
    add(api, "org/full", {"model.py": b"print()"})
    with pytest.raises(ConfigError, match=r"model\.py"):
        adapterpack.push(make_pack(), "hf://org/full")

    adapterpack.push(make_pack(), "hf://org/own")
    add(api, "org/own", {"README.md": b"my own words"})
    pushed = adapterpack.push(make_pack(seed=8), "hf://org/own")
    assert "README.md" not in pushed.sent
    assert client.tree(client.connect(names.parse("org/own"))).keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapterpack.json",
    }


def test_dry_run_pull_request_tag_and_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    target = "hf://org/modes"
    dry = adapterpack.push(make_pack(), target, dry_run=True)
    assert (dry.dry_run, dry.commit, dry.created, len(dry.sent)) == (True, None, True, 4)
    with pytest.raises(RepoNotFound):
        client.connect(names.parse(target))
    first = adapterpack.push(make_pack(), target, private=True, tag="v1")
    request = adapterpack.push(make_pack(seed=8), target, pr=True)
    assert request.pull_request is not None
    assert request.pull_request.endswith("/discussions/1")
    assert adapterpack.pull(f"{target}@refs/pr/1").id == request.id
    assert adapterpack.pull(target).id == first.id, "the branch stays"
    with pytest.raises(HubConflict, match="tags do not move"):
        adapterpack.push(make_pack(seed=8), target, tag="v1")
    assert adapterpack.pull(target).id == first.id, "and nothing was sent"

    monkeypatch.setenv("HF_TOKEN", READ)
    assert adapterpack.pull(target).id == first.id
    with pytest.raises(HubError, match="refuses the token"):
        adapterpack.push(make_pack(seed=8), target)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepoNotFound):
        adapterpack.pull(target)


def test_a_lock_pins_and_an_update_tells(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, lock = "hf://org/moving", tmp_path / "adapterpack.lock"
    first = adapterpack.push(make_pack(), target)
    assert adapterpack.pull(target, lock=lock).notes == ()
    second = adapterpack.push(make_pack(seed=8, training={"epochs": 2}), target)
    held = adapterpack.pull(target, lock=lock)
    assert (held.id, held.commit) == (first.id, first.commit)
    assert second.commit is not None
    assert second.commit in held.notes[0]
    moved = adapterpack.pull(target, lock=lock, update=True)
    assert (moved.id, moved.before and moved.before.id) == (second.id, first.id)
    assert moved.changed[0] == f"id: {first.id} -> {second.id}"
    assert "tensors: 2 of 2 differ" in moved.changed
    assert any(text.startswith("training") for text in moved.changed)
    assert adapterpack.pull(target, lock=lock).id == second.id

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert adapterpack.pull(target).id == second.id, "offline, by what this machine remembers"
    assert adapterpack.inspect(target)["id"] == second.id
    with pytest.raises(HubOffline):
        adapterpack.pull("hf://org/never")
    blob = Store().get(second.id).path
    assert blob is not None
    file = blob / "adapter_model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(HubOffline, match="not in the store any more"):
        adapterpack.pull(target)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert adapterpack.pull(target).id == second.id, "with the network it is mended"
    lock.write_text("{}")
    with pytest.raises(FormatError, match="lock file"):
        Lockfile(lock).get(names.parse(target))


@pytest.mark.fast
def test_limits_come_before_downloads(hub: Hub, tmp_path: Path) -> None:
    adapterpack.push(make_pack(), "hf://org/large")
    with pytest.raises(FormatError, match="larger than allowed"):
        adapterpack.pull("hf://org/large", max_bytes=10)
    assert left(tmp_path / "cache") == []
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExists):
        adapterpack.pull("hf://org/large", tmp_path / "taken")
    with pytest.raises(RevisionNotFound):
        adapterpack.pull("hf://org/large@v9")


@pytest.mark.fast
def test_an_invalid_pack_on_a_hub_is_found_by_its_headers(hub: Hub) -> None:
    """A pack whose scale lies, put there by hand with all digests right: AP501 without a weight
    downloaded.
    """
    import hashlib

    pack = make_pack()
    value = pack.manifest.to_json()
    value["groups"][0]["scale"] = 99.0
    data = sealed_json(value)
    from adapterpack.pack.files import encode_files

    api = client.api()
    api.create_repo("org/liar")
    add(api, "org/liar", {**encode_files(pack.manifest, pack.tensors), "adapterpack.json": data})
    report = adapterpack.validate("hf://org/liar")
    assert [finding.rule for finding in report.findings] == ["AP501"]
    assert report.id == f"sha256:{hashlib.sha256(data).hexdigest()}"
    adapterpack.push(make_pack(), "hf://org/honest")
    found = audit(["org/liar", "org/honest", "org/nowhere"])
    assert [one.state for one in found] == ["invalid", "not fully checked", "repo-not-found"]
    runs = audit_sarif(found, "0")["runs"]
    assert [len(run["results"]) for run in runs] == [1, 0, 0]
    assert [run["invocations"][0]["executionSuccessful"] for run in runs] == [False, False, False], (
        "none was looked at to the end"
    )
    assert runs[0]["results"][0]["ruleId"] == "AP501"


@pytest.mark.fast
@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://one",
        "hf://../b",
        "hf://a/b@../x",
        "hf://a/b@",
        "hf://a%2fb/c",
        "hf://a/b@-x",
        "hf://a/b/",
        "hf://a/b//c",
        "hf://a/b/../c",
        "hf://a/b/.git/c",
        "hf://a/b/c%2fd",
        "hf://a/b/nul",
        "hf://a/b/c d",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a repository"):
        names.parse(text if text != "hf://a/b@" else "hf://a/b@ ")


# --- the hub's own promises ---------------------------------------------------------------------------------


@pytest.mark.fast
def test_of_commits_at_once_on_one_parent_one_wins(tmp_path: Path) -> None:
    storage = HubStorage(tmp_path)
    storage.create("org/name", private=False, author="me")
    head, outcomes = storage.resolve("org/name", "main"), []

    def attempt(number: int) -> None:
        try:
            entry = storage.keep_bytes(b"%d" % number)
            outcomes.append(
                storage.change(
                    "org/name",
                    "main",
                    "me",
                    "",
                    "",
                    parent=head,
                    as_pr=False,
                    change=lambda files: files.update(a=entry),
                )[0]
            )
        except HTTPError as refused:
            outcomes.append(refused.status)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(412) == 7
    [won] = [one for one in outcomes if one != 412]
    assert storage.resolve("org/name", "main") == won
    assert storage.commit("org/name", won).parent == head


@pytest.mark.fast
def test_a_hub_refuses_what_would_harm_its_clients(hub: Hub) -> None:
    """Paths that lead out, colliding names, objects that were never uploaded, addresses that it never gave
    out.
    """
    from huggingface_hub.utils import get_session

    api = client.api()
    api.create_repo("org/strict")
    headers = {"Authorization": f"Bearer {WRITE}"}

    def commit(*operations: tuple[str, dict[str, Any]]) -> int:
        lines = [
            {"key": "header", "value": {"summary": "x"}},
            *({"key": key, "value": value} for key, value in operations),
        ]
        body = "\n".join(map(json.dumps, lines))
        return int(
            get_session()
            .post(f"{hub.address}/api/models/org/strict/commit/main", content=body, headers=headers)
            .status_code
        )

    for path in ("../x", "/x", "a//b", "a\\b", "con", "x\u202e"):
        assert commit(("file", {"path": path, "content": "", "encoding": "base64"})) == 400
    twins = [("file", {"path": path, "content": "", "encoding": "base64"}) for path in ("a", "A")]
    assert commit(*twins) == 400
    assert commit(("lfsFile", {"path": "a", "algo": "sha256", "oid": "0" * 64, "size": 1})) == 400
    assert commit(("copy", {"path": "a"})) == 400
    assert (
        get_session()
        .put(f"{hub.address}/lfs/{'0' * 64}?size=1&until=9999999999&signature=0", content=b"x")
        .status_code
        == 403
    )
    assert (
        get_session().get(f"{hub.address}/org/strict/resolve/main/..%2f..%2f..%2ftokens").status_code == 404
    )
    assert get_session().post(f"{hub.address}/api/repos/create", json={"name": "x"}).status_code == 401
    assert client.tree(client.connect(names.parse("org/strict"))) == {}


@pytest.mark.fast
def test_the_listing_comes_in_pages(hub: Hub) -> None:
    api = client.api()
    api.create_repo("org/pages")
    add(api, "org/pages", {f"many/f{number:04}.json": b"{}" for number in range(1100)})
    assert len(client.tree(client.connect(names.parse("org/pages")))) == 1100


@pytest.mark.fast
def test_tokens_are_kept_by_nobody_else(tmp_path: Path) -> None:
    from adapterpack.hub.server.access import Access

    file = tmp_path / "tokens"
    file.write_text(f"ann write {WRITE}\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        Access.from_file(file)
    file.chmod(0o600)
    assert WRITE not in repr(Access.from_file(file))
    file.write_text("ann admin short\n")
    with pytest.raises(ConfigError, match="line 1") as caught:
        Access.from_file(file)
    assert "short" not in str(caught.value)


def test_the_hub_as_a_command(tmp_path: Path, client_environment: dict[str, str]) -> None:
    """``adapterpack hub serve`` says where it is, serves, and ends when it is told to."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ann write {WRITE}\n")
    tokens.chmod(0o600)
    args = [
        sys.executable,
        "-m",
        "adapterpack",
        "hub",
        "serve",
        str(tmp_path / "data"),
        "--port",
        "0",
        "--tokens",
        str(tokens),
        "--json",
    ]
    with child(args, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        REPORT.validate(told)
        environment = {**client_environment, "HF_ENDPOINT": told["address"]}
        make_pack().write(tmp_path / "tickets")
        pushed = command(environment, tmp_path, "push", "tickets", "hf://ann/tickets")
        table = command(
            environment, tmp_path, "hub", "audit", "ann/tickets", "--sarif", "found.sarif", code=3
        )
        assert table["repos"][0]["report"]["id"] == pushed["id"]
        assert len(json.loads((tmp_path / "found.sarif").read_text())["runs"]) == 1
        process.terminate()
        assert process.wait(timeout=120) in {0, -15}
