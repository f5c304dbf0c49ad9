"""A project that uses adapterpack: type-checked in strict mode by ``tests/test_typing.py``, never run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import adapterpack
from adapterpack import Engine, LoRA, Pack, Session, Store


def combined(folder: str, out: str) -> Pack:
    """Two packs, their exact sum, and its digest in the store."""
    first, second = adapterpack.load(f"{folder}/a"), adapterpack.load(f"{folder}/b", "b")
    for finding in adapterpack.validate(folder, full=True).findings:
        print(finding.rule)
    both = adapterpack.compose([first, second], rule="ties", weights=[0.5, 0.5], rank=8, out=out)
    kept: Pack = Store().add(both)
    return adapterpack.resize(kept, energy=0.9)


def served(base: str, packs: list[Pack]) -> NDArray[np.generic]:
    """The packs merged, exported, and one batch through the bundle."""
    report = adapterpack.merge(base, packs, "merged", dtype="bf16")
    print(report)
    bundle = adapterpack.export(base, packs, "bundle", mode="bank", slots=4)
    print(bundle.mode)
    session = Session("bundle", provider="cpu")
    logits: NDArray[np.generic] = session.run(session.encode(["hello"]), adapters=[packs[0].name])["logits"]
    return logits


def streamed(prompt: str) -> dict[int, str]:
    """The texts of two requests with different adapters, as they grow."""
    engine, texts = Engine("bundle", provider="cpu", max_rows=4), dict[int, str]()
    for name in engine.adapters.names[:2]:
        texts[engine.add(prompt, name, max_new_tokens=20)] = ""
    while engine.busy:
        texts |= {event.request: event.text for event in engine.step()}
    return texts


def labelled(rows: list[str]) -> list[object]:
    """The labels of texts, which come as their rows end."""
    engine, labels = Engine("bundle"), list[object]()
    for row in rows:
        engine.add({"text": row}, engine.adapters.names[0])
    while engine.busy:
        labels += [event.result["label"] for event in engine.step() if event.result is not None]
    return labels


def configured() -> LoRA:
    """A configuration whose fields the checker knows."""
    config = LoRA(r=16, alpha=32, targets="all-linear")
    rank: int = config.r
    print(rank, sorted(adapterpack.methods()), sorted(adapterpack.rules()))
    return config


def guarded(path: str) -> dict[str, object]:
    """Errors are caught by their public class."""
    try:
        return dict(adapterpack.inspect(path))
    except adapterpack.AdapterpackError as error:
        return {"error": str(error)}
