"""Large files: in parts, through the official client and ours; what a killed process had sent or fetched is
not sent or fetched again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hubs import WRITE, Hub, make_pack
from processes import child

import adapterpack
from adapterpack.bundle.manifest import FILE_NAME, Bundle, BundledAdapter
from adapterpack.hub.transport import names, transfer
from adapterpack.hub.transport.client import ListedFile, connect, tree
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build

pytestmark = pytest.mark.fast
SIZE = 10 << 20
PROGRAM = (
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from adapterpack.cli.main "
    "import main; main()",
)
"""A shell that runs the tests in the background has its children ignore SIGINT; a user's terminal does
not.
"""


def make_bundle(folder: Path, size: int = SIZE) -> Path:
    """A bundle of a pack and of bytes in place of a graph: what a hub has to carry, and nothing that could be
    run.
    """
    pack = make_pack().write(folder / "adapters" / "tickets")
    (folder / "model.onnx.data").write_bytes(np.random.default_rng(0).bytes(size))
    (folder / "model.onnx").write_bytes(b"\x08\x0a\x3a\x00")  # ir_version 10, and an empty graph
    Bundle(
        "folded",
        "feature-extraction",
        m.Base("org/base"),
        "mobius",
        {},
        (BundledAdapter("tickets", pack.id, "adapters/tickets"),),
        (),
    ).write(folder)
    return folder


def killed_at(
    condition: Callable[[], bool],
    environment: dict[str, str],
    folder: Path,
    *args: str,
    by: int = signal.SIGKILL,
) -> str:
    """Runs the command and ends it once the condition holds, by default without a chance to clean up; what it
    said.
    """
    with child([*PROGRAM, *args], env=environment, cwd=folder, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 300
        try:
            while not condition():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.02)
        finally:
            process.send_signal(by)
        return process.communicate(timeout=300)[1]


def run(environment: dict[str, str], folder: Path, *args: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "adapterpack", *args, "--json"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert WRITE not in done.stdout + done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_killed_push_and_a_killed_pull_go_on(
    served: Hub, client_environment: dict[str, str], tmp_path: Path
) -> None:
    """Ten parts of a megabyte: after a kill the second push sends only those that are missing; the second
    pull fetches only the rest.
    """
    make_bundle(tmp_path / "bundle")
    args = ("push", "bundle", "hf://org/resumed", "--license", "mit")
    parts = served.folder / "tmp" / "parts"
    served.arm("third part stalled", times=1)
    killed_at(lambda: len([*parts.glob("*/*")]) == 2, client_environment, tmp_path, *args)
    assert len([*parts.glob("*/*")]) == 2
    before = served.received()
    pushed = run(client_environment, tmp_path, *args)
    again = served.received() - before
    assert SIZE - (2 << 20) <= again < SIZE - (1 << 20), "eight of ten parts, and the small files"
    assert not [*parts.iterdir()]

    partial = tmp_path / "cache" / "partial"
    served.arm("stalled half way", times=1)
    fetching = ("pull", "hf://org/resumed", "-o", "fetched")
    said = killed_at(
        lambda: (
            sum(path.stat().st_size for path in partial.glob("*")) > SIZE // 4 if partial.is_dir() else False
        ),
        client_environment,
        tmp_path,
        *fetching,
        by=signal.SIGINT,
    )
    assert f"of {SIZE} bytes of model.onnx.data are kept for a week: the same command goes on there" in said
    assert "nothing was left behind" not in said
    assert not (tmp_path / "fetched").exists()
    assert not (tmp_path / "adapterpack.lock").exists()
    here = sum(path.stat().st_size for path in partial.glob("*"))
    served.arm()
    pulled = run(client_environment, tmp_path, *fetching)
    assert pulled["id"] == pushed["id"]
    assert served.sent() < SIZE - here + (1 << 20), "only what was missing"
    assert (tmp_path / "fetched" / "model.onnx.data").read_bytes() == (
        tmp_path / "bundle" / "model.onnx.data"
    ).read_bytes()
    assert (tmp_path / "fetched" / FILE_NAME).read_bytes() == (tmp_path / "bundle" / FILE_NAME).read_bytes()
    assert not [path for path in partial.glob("*") if not path.name.endswith(".lock")]


def test_what_was_kept_of_another_file_is_not_built_upon(hub: Hub, tmp_path: Path) -> None:
    """A partial file whose bytes are others, shorter or longer, costs a second download and never a wrong
    result.
    """
    adapterpack.push(make_bundle(tmp_path / "bundle"), "hf://org/tampered", license="mit")
    remote = connect(names.parse("hf://org/tampered"))
    listed: ListedFile = tree(remote)["model.onnx.data"]
    partial = tmp_path / "cache" / "partial"
    partial.mkdir(parents=True)
    for kept in (b"x" * 1000, b"x" * (SIZE + 5), b"x" * SIZE):
        (partial / str(listed.sha256)).write_bytes(kept)
        transfer.fetch(remote, listed, tmp_path / "whole")
        assert (tmp_path / "whole").read_bytes() == (tmp_path / "bundle" / "model.onnx.data").read_bytes()
        assert not (partial / str(listed.sha256)).exists()


def test_the_official_client_uploads_in_parts(hub: Hub, tmp_path: Path) -> None:
    """The parts of its own protocol, with its own command; and equal content is not sent twice."""
    (tmp_path / "big.bin").write_bytes(np.random.default_rng(1).bytes((3 << 20) + 17))
    from adapterpack.hub.transport import client

    api = client.api()
    api.create_repo("org/parts")
    with (tmp_path / "big.bin").open("rb") as file:
        api.upload_file(path_or_fileobj=file, path_in_repo="big.bin", repo_id="org/parts")
    remote = connect(names.parse("hf://org/parts"))
    transfer.fetch(remote, tree(remote)["big.bin"], tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "big.bin").read_bytes()


def test_parts_that_are_not_the_announced_file_make_no_blob(hub: Hub, tmp_path: Path) -> None:
    """A hub believes no digest: parts of something else are refused when they are put together, and are
    gone.
    """
    import hashlib

    from huggingface_hub.utils import build_hf_headers, get_session

    from adapterpack.hub.transport import client

    client.api().create_repo("org/forged")
    sha256, size = hashlib.sha256(b"announced").hexdigest(), (1 << 20) + 5
    session, url = get_session(), f"{hub.address}/org/forged.git/info/lfs/objects/batch"
    value = {"operation": "upload", "transfers": ["multipart"], "objects": [{"oid": sha256, "size": size}]}
    [told] = session.post(url, json=value, headers=build_hf_headers()).json()["objects"]
    action = told["actions"]["upload"]
    short = session.put(action["header"]["1"], content=b"short")
    assert short.status_code == 400
    etags = [
        session.put(action["header"][key], content=bytes(length)).headers["etag"]
        for key, length in (("1", 1 << 20), ("2", 5))
    ]
    parts = [{"partNumber": number, "etag": etag} for number, etag in enumerate(etags, 1)]
    assert session.post(action["href"], json={"oid": sha256, "parts": parts[:1]}).status_code == 400, (
        "a part left out"
    )
    for payload in (
        {"parts": parts},
        {"parts": parts},
        {"parts": "all"},
        {"parts": [{"partNumber": 1, "etag": "../../x"}]},
    ):
        assert session.post(action["href"], json=payload).status_code == 400
    assert (
        session.put(action["header"]["1"].replace("/1?", "/2?"), content=bytes(1 << 20)).status_code == 403
    ), "signed for another part"
    assert not [*(hub.folder / "tmp" / "parts").iterdir()]
    [again] = session.post(url, json=value, headers=build_hf_headers()).json()["objects"]
    assert "actions" in again


def test_a_pack_is_unpacked_from_what_was_sent(hub: Hub) -> None:
    """A pack of one large tensor goes in parts, too."""
    from adapterpack import LoRA
    from adapterpack.adapter_methods import Site, get

    width = 300_000
    params = {"lora_A": np.ones((8, width), np.float32), "lora_B": np.ones((2, 8), np.float32)}
    site = {Site("net.q", width, 2): (LoRA(r=8, alpha=8), params)}
    pack = build(
        "wide",
        get("lora"),
        site,
        task=m.PackTask("feature-extraction"),
        base=m.Base("org/base"),
        license="mit",
    )
    seen: list[tuple[int, int]] = []
    assert (
        adapterpack.push(pack, "hf://org/wide", progress=lambda done, total: seen.append((done, total))).id
        == pack.id
    )
    assert len(seen) == 10
    assert seen[-1][0] > 8 * width * 4
    assert adapterpack.pull("hf://org/wide").id == pack.id
