"""What tests of hubs share: the address of a served one, its tokens, a pack that numpy makes, and what a pull
leaves.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

WRITE, READ = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader"


@dataclass(frozen=True)
class Hub:
    """Its address and where it keeps what it has."""

    address: str
    folder: Path

    def arm(self, name: str = "", times: int = 1000) -> int:
        """Arms a fault, or with no name none; how often the one before was met."""
        return self._told(name, times)["seen"]

    def sent(self) -> int:
        """The bytes of all bodies that it sent since it was last asked or armed."""
        return self._told("", 0)["bytes"]

    def received(self) -> int:
        """The bytes of all bodies that it was ever sent."""
        return self._told("", 0)["received"]

    def _told(self, name: str, times: int) -> dict[str, int]:
        request = urllib.request.Request(
            f"{self.address}/_faults", json.dumps({"name": name, "times": times}).encode(), method="POST"
        )
        with urllib.request.urlopen(request) as response:
            found: dict[str, int] = json.load(response)
            return found


def make_pack(name: str = "tickets", seed: int = 7, width: int = 7, **claims: Any) -> Pack:
    rng = np.random.default_rng(seed)
    params = {
        "lora_A": rng.standard_normal((3, width), dtype=np.float32),
        "lora_B": rng.standard_normal((5, 3), dtype=np.float32),
    }
    return build(
        name,
        get("lora"),
        {Site("net.q", width, 5): (LoRA(r=3, alpha=6), params)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("org/base"),
        license="apache-2.0",
        **claims,
    )


def left(cache: Path) -> list[Path]:
    """Packs, blobs, partial files: everything that a pull could leave."""
    return [
        path
        for path in cache.rglob("*")
        if path.is_file() and not path.name.startswith(".lock") and path.parent.name != "locks"
    ]
