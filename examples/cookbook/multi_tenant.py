"""One server for many tenants: each has a key that names its adapters, and all of them share the base and the
batch.

python examples/cookbook/multi_tenant.py bundle packs keys.yaml
"""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMAND = [sys.executable, "-m", "adapterpack", "serve"]


def new_keys(file: Path, tenants: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Writes the file of keys, which holds digests alone; returns the key of each tenant. It allows no base
    and 60 requests a minute.
    """
    keys, entries = {}, ["keys:"]
    for tenant, adapters in tenants.items():
        made = subprocess.run([*COMMAND, "--new-key", tenant], capture_output=True, text=True, check=True)
        keys[tenant] = made.stderr.partition("\n")[0].rpartition(" ")[2]  # shown once, and in no file
        digest = made.stdout.partition("sha256: ")[2][:64]
        entries.append(
            f"- {{id: {tenant}, sha256: {digest}, adapters: [{', '.join(adapters)}], base: false, "
            "requests_per_minute: 60}"
        )
    file.write_text("\n".join(entries) + "\n")
    file.chmod(0o600)  # the server refuses a file that others can read
    return keys


def ask(address: str, key: str, adapter: str, text: str) -> dict:
    """One request to a classifier's bundle; what a key may not use looks as if it did not exist."""
    request = urllib.request.Request(
        f"{address}/v1/classify",
        json.dumps({"model": adapter, "input": text}).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refusal:
        return json.load(refusal)


def main(
    bundle: str, packs: str, file: str, tenants: Mapping[str, Sequence[str]] | None = None
) -> list[dict]:
    """Serves the bundle and every pack of a folder that is watched; asks for each tenant its own adapters,
    and the next one's.
    """
    tenants = tenants or {"shop": ["tickets"], "press": ["reviews"]}
    keys = new_keys(Path(file), tenants)
    command = [*COMMAND, bundle, "--adapters", packs, "--watch", "1", "--keys", file, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            address = json.loads(server.stdout.readline())["address"]
            everybody = [adapter for adapters in tenants.values() for adapter in adapters]
            return [
                ask(address, key, adapter, "Where is my parcel?")
                for key in keys.values()
                for adapter in everybody
            ]
        finally:
            server.terminate()  # answers that were begun end first


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(*main(*sys.argv[1:4]), sep="\n")
