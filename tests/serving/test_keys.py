"""Files of keys: how many they may have, what a request costs with many, and what happens when they change
or cannot be read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from servers import entry, write_keys

from adapterpack.http import reloading_file as followed
from adapterpack.http.http_error import HTTPError
from adapterpack.serving.tenants import keys as module
from adapterpack.serving.tenants.keys import Keys

pytestmark = pytest.mark.fast


def written(path: Path, count: int, as_json: bool = True) -> Path:
    """A file of so many keys, each with some fields."""
    path.touch(0o600)
    entries = [
        {
            "id": f"team-{n}",
            "sha256": hashlib.sha256(f"key-{n}".encode()).hexdigest(),
            "adapters": [f"a{n}"],
            "base": False,
            "max_rows": 8,
        }
        for n in range(count)
    ]
    lines = [
        f"- {{id: {one['id']}, sha256: {one['sha256']}, adapters: {one['adapters']}, base: false, "
        "max_rows: 8}\n"
        for one in entries
    ]
    path.write_text(json.dumps({"keys": entries}) if as_json else "keys:\n" + "".join(lines))
    return path


@pytest.mark.parametrize(("count", "as_json"), [(100_000, True), (6_000, False)])
def test_as_many_keys_are_read_as_the_schema_allows(count: int, as_json: bool, tmp_path: Path) -> None:
    keys = Keys(path=written(tmp_path / "keys", count, as_json))
    assert keys.of(f"Bearer key-{count - 1}").id == f"team-{count - 1}"
    assert not keys.of("Bearer key-0").base


def test_a_request_is_compared_with_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In constant time, however many there are; one that is not known with none."""
    keys, compared = Keys(path=written(tmp_path / "keys", 1000)), list[Any]()
    compare = hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *both: compared.append(both) or compare(*both))
    assert keys.of("Bearer key-500").id == "team-500"
    assert len(compared) == 1
    with pytest.raises(HTTPError, match="not known"):
        keys.of("Bearer key-1000")
    assert len(compared) == 1


def test_keys_are_read_again_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks meanwhile waits for them, so that no key counts that has left the file; the loop goes
    on.
    """
    path = written(tmp_path / "keys", 3000)
    keys, reading, threads = Keys(path=path), module.read_keys, list[threading.Thread]()
    monkeypatch.setattr(followed, "LOOK_SECONDS", 0.0)
    begun, go = threading.Event(), threading.Event()

    def held(path: Path) -> Any:
        threads.append(threading.current_thread())
        begun.set()
        assert go.wait(120)
        return reading(path)

    monkeypatch.setattr(module, "read_keys", held)

    async def ask() -> None:
        asking = [asyncio.create_task(keys.look()) for _ in range(5)]
        await asyncio.to_thread(begun.wait, 120)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in asking)
        go.set()
        await asyncio.gather(*asking)

    written(path, 2999)
    asyncio.run(ask())
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    with pytest.raises(HTTPError, match="not known"):
        keys.of("Bearer key-2999")


def test_keys_that_cannot_be_read_count_for_a_while_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the reason is: nobody knows which keys have left the file. Once it can be read all is as the
    file says, changed or not.
    """
    monkeypatch.setattr(followed, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(followed, "_AGAIN_SECONDS", 0.0)
    path = tmp_path / "keys"

    def whole() -> None:
        path.touch(0o600)
        path.chmod(0o600)
        write_keys(path, entry("ann", "key-ann"))

    for spoil in (lambda: path.write_text("keys: 5"), lambda: path.chmod(0o644), path.unlink):
        whole()
        patient, strict = Keys(path=path), Keys(path=path, unread_seconds=0.0)
        spoil()
        caplog.clear()
        for keys in (patient, strict):
            asyncio.run(keys.look())
            assert keys.unread_seconds > 0
        assert "the keys stay as they were" in caplog.text
        assert patient.of("Bearer key-ann").id == "ann"
        with pytest.raises(HTTPError, match="cannot be read") as refused:
            strict.of("Bearer key-ann")
        assert refused.value.status == 503
        whole()
        for keys in (patient, strict):
            asyncio.run(keys.look())
            assert (keys.unread_seconds, keys.of("Bearer key-ann").id) == (0, "ann")
