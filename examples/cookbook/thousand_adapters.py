"""A thousand adapters of one base: kept as a fleet on shared bases, served by an engine that loads each when
it is first asked for.

python examples/cookbook/thousand_adapters.py models/base fleet bundle packs/*
"""

import sys
from pathlib import Path

import adapterpack


def size(*folders: str) -> int:
    """The bytes of all files in the folders."""
    return sum(
        path.stat().st_size for folder in folders for path in Path(folder).rglob("*") if path.is_file()
    )


def main(base: str, fleet: str, bundle: str, packs: list[str], basis: int = 64) -> dict[str, float]:
    """Compresses the packs, exports the base once, and answers a prompt with every adapter; returns sizes and
    the largest error.
    """
    kept = adapterpack.compress(packs, out=fleet, basis=basis)
    adapterpack.export(base, [], bundle)  # slots wherever training puts adapters; no pack in it
    engine = adapterpack.Engine(bundle, "cpu", max_rows=8)
    for name in kept.names:  # the engine keeps the shared bases once, and of each member its small core
        engine.adapters.load(kept.pack(name))
    waiting = {engine.add("Where is my parcel?", adapter=name, max_new_tokens=4): name for name in kept.names}
    while engine.busy:  # rows of eight adapters at a time, in one batch
        for event in engine.step():
            if event.finish_reason:
                print(waiting.pop(event.request), event.text)
    assert not waiting
    return {
        "packs": size(*packs),
        "fleet": size(fleet),
        "worst error": max(member.error for member in kept.manifest.members),
    }


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:4], sys.argv[4:]))
